"""How long tokens take to the ranks of their experts, as bfloat16 and as codes: GPUs of one machine, over NCCL.

    python benchmarks/exchange.py --json FILE

starts a process for every GPU. Each has tokens of its own, and sends their rows to experts chosen at random. Timed is
`lowbit_moe.Exchange.dispatch`, from tokens to rows in the order of experts, which `grouped_mm` takes: rows are gathered
(and rounded), sent, and put in order. "alone" is what the GPU does, where the sizes are known and the processor is
ahead; "whole" begins with the router's choice, so that ranks tell one another the sizes first, and the processor waits
for them. All payloads take turns. Times are medians, of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from lowbit_moe import Exchange

# Tokens of each rank, their width, experts in all, of which so many are chosen.
SHAPES = [(4096, 4096, 8, 2), (8192, 4096, 8, 2), (8192, 7168, 8, 2), (16384, 2880, 32, 4), (16384, 2048, 128, 8)]
# What rows travel as, and by which recipe: the second takes what comes as it is.
PAYLOADS = {"BF16": (None, "BF16"), "MXFP8": ("MXFP8", "MXFP8"), "FP8_ROW": ("e4m3fn:1x*:e8m0", "FP8_ROW")}
# Cycles of a kernel that does nothing, for the processor to get ahead.
AHEAD = 10_000_000


def serve(rank: int, ranks: int, port: int, samples: int, path: str) -> None:
    """Measure, as one of the ranks; the first writes the file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    rows = [row for shape in SHAPES for row in measured(shape, samples)]
    if rank == 0:
        Path(path).write_text(json.dumps(told(ranks, samples, rows), indent=1) + "\n")
    distributed.barrier()
    distributed.destroy_process_group()


def measured(shape: tuple[int, ...], samples: int) -> list[dict[str, Any]]:
    """A row for each payload."""
    tokens, width, experts, most = shape
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(rank)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    chosen = torch.randn(tokens, experts, device="cuda").topk(most).indices

    group = distributed.group.WORLD
    assert group is not None

    def exchange(name: str) -> Exchange:
        payload, recipe = PAYLOADS[name]
        return Exchange(chosen, experts // ranks, group=group, payload=payload, recipe=recipe)

    known = {name: exchange(name) for name in PAYLOADS}
    alone: dict[str, list[float]] = {name: [] for name in PAYLOADS}
    whole: dict[str, list[float]] = {name: [] for name in PAYLOADS}
    with torch.no_grad():
        for i in range(samples + 3):
            for name, way in known.items():
                times = on_device(lambda way=way: way.dispatch(x)), waited(lambda name=name: exchange(name).dispatch(x))
                for kept, seconds in zip((alone, whole), times, strict=True):
                    kept[name] += [slowest(seconds)] if i >= 3 else []
    base = {kind: statistics.median(times["BF16"]) for kind, times in (("alone", alone), ("whole", whole))}
    rows = []
    for name, way in known.items():
        row: dict[str, Any] = {"payload": name, "tokens": tokens, "width": width, "experts": experts, "chosen": most}
        row["bfloat16_bytes"] = 2 * sum(way.sizes[0]) * width
        for kind, times in (("alone", alone), ("whole", whole)):
            row[kind] = {"seconds": statistics.median(times[name]), "quartiles": statistics.quantiles(times[name])}
            row[kind]["over_bfloat16"] = base[kind] / row[kind]["seconds"]
        if rank == 0:
            each = "; ".join(
                f"{kind} {1e6 * row[kind]['seconds']:.0f} us ({row[kind]['over_bfloat16']:.2f})"
                for kind in ("alone", "whole")
            )
            sys.stdout.write(f"{row['bfloat16_bytes'] / 2**20:.0f} MiB {shape} {name}: {each}\n")
            sys.stdout.flush()
        rows.append(row)
    return rows


def on_device(run: Callable[[], Any]) -> float:
    """Seconds between events, where all is launched before the first has come."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    distributed.barrier()
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - no public name
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def waited(run: Callable[[], Any]) -> float:
    """Seconds until all is done, the processor's part included."""
    distributed.barrier()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def slowest(seconds: float) -> float:
    """The longest that a rank took."""
    found = torch.tensor(seconds, device="cuda", dtype=torch.float64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return float(found)


def told(ranks: int, samples: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    return {
        "benchmark": "exchange",
        "device": f"{ranks} x {torch.cuda.get_device_name()}",
        "ranks": ranks,
        "samples": samples,
        "versions": {name: version(name) for name in ("lowbit-core", "lowbit-moe", "lowbit-kernels-cuda", "torch")},
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }


def main() -> None:
    """Start a process for every GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    ranks = torch.cuda.device_count()
    if ranks < 2:
        parser.error(f"needs two GPUs or more; here are {ranks}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(serve, (ranks, port, options.samples, str(options.json)), nprocs=ranks)


if __name__ == "__main__":
    main()
