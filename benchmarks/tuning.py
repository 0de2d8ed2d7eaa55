"""What programs of products with packed weights cost on a GPU: the data by which lowbit-kernels-cuda plans them.

    python benchmarks/tuning.py --out kernels/lowbit-kernels-cuda/src/lowbit_kernels_cuda/data/plans-9.0.json

compiles every kind of program for every format in parallel (minutes), times each on matrices and numbers of tokens that
are known, beside torch's product in bfloat16, in CUDA graphs of rotated weights, and fits what `plans.Cost` says of it.
--raw keeps the times; --fit takes them from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import lowbit
from lowbit.format import Format
from lowbit_kernels_cuda import linear, plans
from lowbit_kernels_cuda.lifts import lift
from lowbit_kernels_cuda.plans import Cost, Kind, Plan

FORMATS = (
    "INT4_G128",
    "UINT4_G128",
    "MXFP4",
    "NVFP4",
    "INT8_ROW",
    "FP8_ROW",
    "MXFP8",
    "FP8_128x128",
    "int2:1x128:bfloat16",
    "int3:1x128:bfloat16",
)
SHAPES = (
    (4096, 4096),
    (14336, 4096),
    (8192, 8192),
    (1024, 4096),
    (28672, 8192),
    (6144, 4096),
    (4096, 14336),
    (2048, 2048),
    (28672, 4096),
    (1024, 1024),
)
TOKENS = (1, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096)
# More than the second-level cache holds.
ROTATED = 160 << 20


def main() -> None:
    """Time what is asked for, fit it, and write the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raw", type=Path, help="keep the times there")
    parser.add_argument("--fit", type=Path, help="fit these times, and measure nothing")
    parser.add_argument("--processes", type=int, default=15)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile is not None:
        compile_part(options.compile, options.processes)
        return
    if options.fit:
        raw = json.loads(options.fit.read_text())
    else:
        # Triton keeps what it compiled on disk.
        command = [sys.executable, __file__, "--out", options.out, "--processes", str(options.processes), "--compile"]
        started = [subprocess.Popen([*command, str(part)]) for part in range(options.processes)]
        if sum(process.wait() for process in started):
            sys.exit("compiling failed; see above")
        raw = measure(options.raw)
    options.out.write_text(json.dumps(fit(raw), indent=1) + "\n")


def kinds(fmt: Format, tokens: int) -> list[Kind]:
    """Kinds of programs for so many tokens that are worth timing."""
    how = constants(fmt)
    exact = plans.exactness(how, tokens)
    columns = plans.columns(how) if exact else 128
    found: list[Kind] = []
    for block in plans.blocks_for(tokens):
        if block <= 32:
            wide = (columns,) if exact else (columns, 256)
            found += [Kind(64, block, each, 4, stages, exact) for each in wide for stages in (3, 4)]
            if exact:
                found += [Kind(64, block, columns, 4, stages, exact, unroll=2) for stages in (3, 4)]
        elif block == 64:
            found += [Kind(64, 64, columns, 4, 3, exact), Kind(128, 64, columns, 4 if exact else 8, 3, exact)]
            found.append(Kind(64 if exact else 128, 64, columns, 4 if exact else 8, 3, exact, unroll=2))
        elif block == 128:
            found.append(Kind(128, 128, columns if exact else 64, 8, 3, exact))
        if not plans.needs_exactness(how) and block >= 64 and torch.cuda.get_device_capability()[0] == 9:
            found += [Kind(rows, block, 64, rows // 16, 4, depth=2 if block == 256 else 4) for rows in (64, 128)]
    return found


def constants(fmt: Format) -> dict[str, Any]:
    """What kernels for a format are compiled for, as weights of it mostly are packed."""
    return linear.constants(fmt, torch.bfloat16, torch.device("cuda", 0), lifted=bool(lift(fmt)))


def every_plan(fmt: Format, m: int, n: int, k: int) -> list[Plan]:
    """Plans to time: parts of K while programs are few."""
    return [
        Plan(kind, splits)
        for kind in kinds(fmt, m)
        for splits in plans.splits_for(kind, k)
        if splits == 1 or triton.cdiv(n, kind.rows) * triton.cdiv(m, kind.tokens) * splits <= 8 * 132
    ]


def compile_part(part: int, parts: int) -> None:
    """Compile one of several parts of all kernels, by running them."""
    n, k = 4096, 4096
    jobs = [
        job
        for spec in FORMATS
        for job in dict.fromkeys((spec, plan) for m in TOKENS for plan in every_plan(Format.parse(spec), m, n, 1 << 20))
    ]
    weights: dict[str, Any] = {}
    for spec, plan in jobs[part::parts]:
        if spec not in weights:
            weights[spec] = packed(spec, n, k, 1)
        x = torch.randn(plan.kind.tokens, k, dtype=torch.bfloat16, device="cuda")
        caller(x, spec, weights[spec], plan)[0]()
    torch.cuda.synchronize()


def packed(spec: str, n: int, k: int, copies: int) -> tuple[list[tuple[Tensor, ...]], tuple[str, ...], tuple[int, int]]:
    """Copies of a packed weight, what is beside its codes, and its shape."""
    q = lowbit.quantize(torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / k**0.5, spec)
    parts = linear.pack(q)
    return [tuple(part.clone() for part in parts) for _ in range(copies)], tuple(q.inner_tensors())[1:], (n, k)


def caller(x: Tensor, spec: str, weight: Any, plan: Plan) -> list[Callable[[], Tensor]]:
    """The product with each copy of the weight by one plan."""
    copies, names, shape = weight
    return [
        lambda parts=parts: linear.product(x, parts, names, spec, "", shape, None, None, plan=plan) for parts in copies
    ]


def seconds(calls: list[Callable[[], Tensor]]) -> float:
    """The median time of one call, in a graph of all."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e-3)
    return sorted(times)[2]


def measure(path: Path | None) -> dict[str, Any]:
    """Times of every plan, and of torch in bfloat16."""
    raw: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "plain": [],
        "rows": [],
    }
    busy = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for n, k in SHAPES:
        began = time.monotonic()
        copies = max(2, min(24, ROTATED // (2 * n * k) + 1))
        plain = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
        inputs = [torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for m in TOKENS]
        for x in inputs:
            # Clocks are those of work.
            torch.mm(busy, busy)
            time_of = seconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in plain])
            raw["plain"].append({"m": len(x), "n": n, "k": k, "seconds": time_of})
        del plain
        for spec in FORMATS:
            fmt = Format.parse(spec)
            size = n * k * fmt.bits_per_element((n, k)) / 8
            weight = packed(spec, n, k, max(2, min(24, int(ROTATED // size) + 1)))
            for x in inputs:
                for _ in range(3):
                    torch.mm(busy, busy)
                wanted = None
                for plan in every_plan(fmt, len(x), n, k):
                    calls = caller(x, spec, weight, plan)
                    found = calls[0]()
                    wanted = found if wanted is None else wanted
                    if float((found - wanted).float().abs().max()) > 0.02 * float(wanted.float().abs().max()):
                        sys.exit(f"{spec} {len(x)} x {n} x {k} by {plan} is not what the first plan gives")
                    row = {"format": spec, "m": len(x), "n": n, "k": k, "seconds": seconds(calls)}
                    raw["rows"].append(row | {"splits": plan.splits, "kind": asdict(plan.kind)})
            del weight
        sys.stderr.write(f"{n} x {k}: {time.monotonic() - began:.0f} s\n")
        if path:
            path.write_text(json.dumps(raw))
    return raw


def fit(raw: dict[str, Any]) -> dict[str, Any]:
    """The data file: torch's times, and for each format the kinds of programs and what they cost."""
    groups: dict[tuple[str, Kind], list[dict[str, Any]]] = defaultdict(list)
    for row in raw["rows"]:
        groups[row["format"], Kind(**row["kind"])].append(row)
    formats: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (spec, kind), rows in groups.items():
        costs = [costs_of(kind, rows, resident, raw["multiprocessors"]) for resident in range(1, 9)]
        # More at once only where it explains more.
        error, cost = min(costs, key=lambda each: each[0] * 1.02 ** each[1].resident)
        formats[spec].append({"kind": asdict(kind), "cost": asdict(cost), "error": round(error, 3)})
    tokens = sorted({row["m"] for row in raw["plain"]})
    plain: dict[str, list[float]] = defaultdict(list)
    for row in sorted(raw["plain"], key=lambda row: row["m"]):
        plain[f"{row['n']}x{row['k']}"].append(round(row["seconds"] * 1e6, 2))
    told = {key: raw[key] for key in ("device", "multiprocessors")}
    return told | {"tokens": tokens, "plain": dict(plain), "formats": dict(formats)}


def costs_of(kind: Kind, rows: list[dict[str, Any]], resident: int, multiprocessors: int) -> tuple[float, Cost]:
    """The root mean square of relative errors, and the costs, with so many programs at a time on a multiprocessor."""
    terms = []
    for row in rows:
        one = plans.terms(
            Plan(kind, row["splits"]),
            triton.cdiv(row["m"], kind.tokens),
            *(row["m"], row["n"], row["k"], resident, multiprocessors),
        )
        terms.append(torch.tensor(one, dtype=torch.float64) / row["seconds"] / 1e6)
    matrix = torch.stack(terms)
    kept = list(range(matrix.shape[1]))
    while True:
        # What would be less than nothing is nothing.
        found = torch.linalg.lstsq(
            matrix[:, kept], torch.ones(len(rows), 1, dtype=torch.float64), driver="gelsd"
        ).solution[:, 0]
        if bool((found >= 0).all()):
            break
        kept.pop(int(found.argmin()))
    values = torch.zeros(matrix.shape[1], dtype=torch.float64)
    values[kept] = found
    error = float((matrix @ values - 1).square().mean().sqrt())
    numbers = [round(value, 4) for value in values.tolist()]
    start, split, part, each, beyond, *steps = numbers
    return error, Cost(resident, start, split, part, each, beyond, tuple(steps))


if __name__ == "__main__":
    main()
