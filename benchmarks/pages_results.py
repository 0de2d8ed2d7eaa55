"""What benchmarks/*.json hold, for pages.py: the points of `lowbit bench`, the newest of each case, and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Any

from lowbit.bench.inputs import EXACT
from lowbit.bench.results import read_results

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# From where on a ratio of times is a gain, and below where a loss; between them is what runs differ by.
YES, NO = 1.05, 0.98
# Runs of one day in the order of the kernels that they measured.
ORDER = (
    "bench-attention-h200-2026-11-30",
    *("bench-linear-rounded-peers-h200-2026-11-29", "bench-linear-w4a8-few-h200-2026-11-29"),
    *("bench-linear-w4a8-many-h200-2026-11-29", "bench-linear-blocks-h200-2026-11-29"),
    *("bench-linear-rounded-few-h200-2026-11-29", "bench-linear-rows-h200-2026-11-29"),
    "bench-linear-rows-few-h200-2026-11-29",
    *("bench-grouped-peers-h200-2026-11-29", "bench-grouped-w4a8-h200-2026-11-29"),
    "bench-grouped-rows-h200-2026-11-29",
    *("bench-linear-xeon-amx-2026-11-29", "bench-linear-xeon-few-2026-11-29", "bench-linear-xeon-tables-2026-11-29"),
    *("decoding-qwen3-8b-h200-2026-11-29", "decoding-qwen3-8b-steps-h200-2026-11-29"),
)
# What the JSON does not tell of an Intel Xeon: what instructions it has, by what the file's name has.
ISA = {"no-amx": "AVX-512, AMX left aside", "xeon": "AVX-512 and AMX"}
MACHINES = {
    "NVIDIA H200": "NVIDIA H200",
    "NVIDIA H100 80GB HBM3": "NVIDIA H100",
    "2 x NVIDIA H200": "NVIDIA H200",
    "Intel(R) Xeon(R) Processor": "Intel Xeon",
    "AMD EPYC": "AMD EPYC",
}


@dataclass(frozen=True, slots=True)
class Point:
    """One contender's time of one case."""

    stem: str
    machine: str
    benchmark: str
    case: dict[str, Any]
    role: str
    name: str
    seconds: float
    flops: float
    # The baseline's time over this one, and the least time that the ceilings allow over this one.
    speedup: float | None
    of_ceiling: float
    sqnr: float | None
    outliers: float | None
    drawn: bool

    def matches(self, **case: Any) -> bool:
        """Whether the case has these values."""
        return all(self.case.get(name) == value for name, value in case.items())


@cache
def load(stem: str) -> dict[str, Any]:
    """A committed JSON."""
    return json.loads((BENCHMARKS / f"{stem}.json").read_text(encoding="utf-8"))


def link(stem: str, text: str = "") -> str:
    """A link to a committed JSON."""
    return f"[{text or stem}](../benchmarks/{stem}.json)"


def machine_of(device: str, stem: str) -> str:
    """A machine's name: `NVIDIA H200`, `Intel Xeon, AVX-512 and AMX`, `AMD EPYC, AVX2`."""
    name, *rest = device.split(", ")
    known = MACHINES.get(name, name)
    if "-xeon" in stem:
        return f"{known}, {next(words for part, words in ISA.items() if part in stem)}"
    return ", ".join([known, *(part for part in rest if part.startswith("AVX"))])


def points_of(file: Path) -> Iterator[Point]:
    """Everything that one run of `lowbit bench` has a time of."""
    results = read_results(file)
    for row in results["rows"]:
        for each in row["contenders"]:
            if "seconds" in each:
                normal, outliers = (each["sqnr"].get(kind, {}).get("exact") for kind in ("normal", "outliers"))
                yield Point(
                    file.stem,
                    machine_of(results["environment"]["device"], file.stem),
                    results["benchmark"],
                    row["case"],
                    each["role"],
                    each["name"],
                    each["seconds"],
                    row["flops"],
                    each["speedup"],
                    each["of_ceiling"],
                    normal if normal is None or abs(normal) != EXACT else None,
                    outliers if outliers is None or abs(outliers) != EXACT else None,
                    results["shapes_seed"] is not None,
                )


def runs() -> list[Path]:
    """All committed runs of `lowbit bench`, the oldest first."""
    return sorted(BENCHMARKS.glob("bench-*.json"), key=age)


def age(file: Path) -> tuple[str, int, str]:
    """What runs are sorted by: the date at the end of the name, then what is known of that day."""
    return file.stem[-10:], ORDER.index(file.stem) if file.stem in ORDER else len(ORDER), file.stem


@cache
def points() -> tuple[Point, ...]:
    """The points of all committed runs, the oldest run first."""
    return tuple(point for file in runs() for point in points_of(file))


def newest(found: Iterable[Point]) -> list[Point]:
    """Of points of the same case, machine and contender the last."""
    kept = {(p.machine, p.benchmark, p.name, json.dumps(p.case, sort_keys=True)): p for p in found}
    return list(kept.values())


def mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return exp(sum(map(log, ratios)) / len(ratios))


def times(ratio: float | None) -> str:
    """A ratio of times with two decimals, from 10 on with none, below 0.1 with two digits."""
    if ratio is None:
        return ""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def spread(values: Sequence[float]) -> str:
    """`0.97 to 1.01`, or one number."""
    low, high = times(min(values)), times(max(values))
    return low if low == high else f"{low} to {high}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]
