"""What `lowbit bench scale` should take on more ranks, from what one rank took, and how near that was.

    python benchmarks/scaling.py predict ONE.json --ranks 2 --json PREDICTED.json
    python benchmarks/scaling.py judge PREDICTED.json TWO.json

A step takes as long as Python, which launches, or the GPU, whichever is slower: max(t, b + more), where one rank's took
t seconds, and its GPU was busy for b of them. `more` is what the GPUs of n ranks have to do besides:

    experts     (b - 4 x(1)) (load(n) - 1) + 4 (x(n) - x(1)) + start - codes (1 - 1/n)
    all-to-all  x(n) - x(1)
    dense       gathers and scatters of one layer, which nothing hides; and no less than those of all

x(n), an exchange of rows, is for each tensor that travels a start, the share (n - 1)/n of its bytes over the link, and
the rest by a copy. load(n) is the busiest rank's share of rows, of a router that prefers some, over the mean. A rank of
n rounds the weights of 1/n of the experts: `codes` is reading and writing those of all. A host has up to 8 GPUs; where
ranks are on several, the part of the bytes that leaves the host does so over a network.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.bench.results import read_results
from lowbit.format import Format
from lowbit_moe.bench.scale import LAYERS, ROWS, choose


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes a second in each direction of a GPU, and seconds."""

    # NVLink of an H200 as NCCL uses it: an exchange of 64 MiB, half of which leaves, took 61 us more than one of 16.
    link: float = 412e9
    # What such an exchange takes besides, and one of a single rank.
    start: float = 65e-6
    alone: float = 10e-6
    # A network card of 400 Gbit/s for each GPU, at the share that all-to-all reaches, and its start by ranks of hosts.
    network: float = 40e9
    hop: float = 10e-6
    per_host: int = 8


def predicted(results: dict[str, Any], ranks: int, machine: Machine) -> list[dict[str, Any]]:
    """Rows as `lowbit bench scale` has them, of seconds alone."""
    copy, found = results["ceilings"]["bytes_per_s"], []
    for row in results["rows"]:
        case = row["case"]
        if case["ranks"] != 1:
            sys.exit(f"a prediction begins with one rank's results; these are of {case['ranks']}")
        if case["experts"] % ranks:
            continue
        step, each = _STEPS[case["step"]], []
        for told in row["contenders"]:
            if "seconds" in told:
                gpu = step(told.get("busy_seconds", told["seconds"]), told["name"], case, ranks, copy, machine)
                each.append({"name": told["name"], "seconds": max(told["seconds"], gpu)})
        found.append({"case": case | {"ranks": ranks}, "contenders": each})
    return found


def _experts(busy: float, name: str, case: dict[str, Any], ranks: int, copy: float, machine: Machine) -> float:
    sizes = _parts(name, case["m"] * case["chosen"], case["k"])
    once, now = (4 * _exchange(sizes, n, copy, machine) for n in (1, ranks))
    rounded = 0 if name.startswith("BF16") else 4 * case["experts"] * 3 * case["k"] * case["between"] / copy
    return (busy - once) * _load(case, ranks) + now + machine.start - rounded * (1 - 1 / ranks)


def _moves(busy: float, name: str, case: dict[str, Any], ranks: int, copy: float, machine: Machine) -> float:
    sizes = _parts(name, case["m"] * case["chosen"], case["k"])
    return busy + _exchange(sizes, ranks, copy, machine) - _exchange(sizes, 1, copy, machine)


def _dense(busy: float, name: str, case: dict[str, Any], ranks: int, copy: float, machine: Machine) -> float:
    del copy
    numbers = 3 * case["k"] * case["between"]
    # Codes of a tensor's own rows serve columns, too; those of blocks of 32 do not. Gradients are in bfloat16.
    gathered = {"FP8_TENSOR by FP8_TENSOR": 1.0, "MXFP8 by MXFP8": 2 * 33 / 32}.get(name, 2.0) * numbers
    collective = [_over_links(bytes_, ranks, machine) for bytes_ in (gathered, gathered, 2 * numbers)]
    return max(busy, LAYERS * sum(collective)) + collective[0] + collective[2]


_STEPS = {"experts": _experts, "dense": _dense, "all-to-all": _moves}


def _parts(name: str, rows: int, k: int) -> list[float]:
    """Bytes of each tensor that travels."""
    payload = name.partition(" by ")[2]
    if payload == "BF16":
        return [2.0 * rows * k]
    fmt = Format.parse(ROWS if payload == "rows of e4m3" else payload)
    codes = rows * k * fmt.element.bits / 8
    return [codes, rows * k * fmt.bits_per_element((rows, k)) / 8 - codes]


def _exchange(sizes: list[float], ranks: int, copy: float, machine: Machine) -> float:
    """Seconds of an all-to-all of these tensors."""
    here = sum(2 * size / ranks / copy for size in sizes)
    if ranks == 1:
        return here + len(sizes) * machine.alone
    return here + sum(_over_links(size, ranks, machine) for size in sizes)


def _over_links(size: float, ranks: int, machine: Machine) -> float:
    """Seconds until bytes that all ranks share evenly are where they belong."""
    local = min(ranks, machine.per_host)
    within, beyond = (local - 1) / ranks, (ranks - local) / ranks
    hosts = -(-ranks // machine.per_host)
    return (
        machine.start
        + machine.hop * (hosts - 1).bit_length()
        + size * (within / machine.link + beyond / machine.network)
    )


def _load(case: dict[str, Any], ranks: int) -> float:
    """The most rows that a rank's experts get, over the mean."""
    chosen, _ = choose(case["m"], case["experts"], case["chosen"], torch.device("cpu"), seed=0)
    each = torch.bincount(chosen.flatten(), minlength=case["experts"]).view(ranks, -1).sum(1).double()
    return float(each.max() / each.mean())


def judged(prediction: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured over predicted seconds, and over what they are of one rank, of every contender that both have."""
    measured = {
        (json.dumps(row["case"], sort_keys=True), each["name"]): each["seconds"]
        for row in results["rows"]
        for each in row["contenders"]
        if "seconds" in each
    }
    rows = []
    for row in prediction["rows"]:
        for each in row["contenders"]:
            seconds = measured.get((json.dumps(row["case"], sort_keys=True), each["name"]))
            if seconds is not None:
                told = {"step": row["case"]["step"], "k": row["case"]["k"], "name": each["name"], "seconds": seconds}
                rows.append(told | {"predicted": each["seconds"], "over predicted": seconds / each["seconds"]})
    return rows


def main() -> None:
    """Predict, or judge a prediction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="what more ranks should take")
    predict.add_argument("one", type=Path)
    predict.add_argument("--ranks", type=int, nargs="+", required=True)
    predict.add_argument("--json", type=Path, required=True)
    judge = commands.add_parser("judge", help="how near it was")
    judge.add_argument("prediction", type=Path)
    judge.add_argument("measured", type=Path)
    given = parser.parse_args()
    if given.command == "predict":
        one, machine = read_results(given.one), Machine()
        rows = [row for ranks in given.ranks for row in predicted(one, ranks, machine)]
        told = {"benchmark": "scale, predicted", "from": given.one.name, "machine": asdict(machine), "rows": rows}
        given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        return
    for row in judged(json.loads(given.prediction.read_text(encoding="utf-8")), read_results(given.measured)):
        sys.stdout.write(
            f"{row['step']:<11} K={row['k']:<5} {row['name']:<25} {1e3 * row['seconds']:8.3f} ms, predicted "
            f"{1e3 * row['predicted']:8.3f}: {row['over predicted']:.2f}\n"
        )


if __name__ == "__main__":
    main()
