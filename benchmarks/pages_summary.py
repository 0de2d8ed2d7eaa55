"""What `lowbit bench` measured, machine by machine: a line for each kind of case, beside baselines and others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pages_results import BENCHMARKS, NO, Point, link, mean, newest, points, spread, table, times

from lowbit.bench.results import headlines, read_results

# What cases of a benchmark are told apart by; the other words and numbers of a case are its shape.
KINDS = {
    "attention": ("step", "scheme"),
    "cast": ("op", "blocks along"),
    "experts": ("recipe",),
    "ffn": ("recipe",),
    "gptq": ("step", "choices"),
    "llama3": ("step",),
    "optimizer": ("bits",),
    "pad": ("op",),
    "wgrad": ("recipe",),
}
# Where what stands beside the candidate is lowbit's, too, in other formats.
OURS = ("llama3",)
HEADER = ("", "cases", "over baseline", "at worst", "fastest other", "over it", "at worst", "of ceiling")


@dataclass(frozen=True, slots=True)
class Pair:
    """Lowbit's time of a case, and what it is held against."""

    ours: Point
    ratio: float
    other: str = ""


def summary(machine: str) -> list[str]:
    """The lines of one machine: a table a benchmark, and its runs."""
    here = [point for point in points() if point.machine == machine]
    lines: list[str] = []
    for benchmark in dict.fromkeys(sorted(point.benchmark for point in here)):
        found = [point for point in here if point.benchmark == benchmark]
        names = dict.fromkeys(p.name for p in found if p.role == "baseline")
        lines += [f"#### `{benchmark}`, over {', or '.join(names)}", ""]
        if rows := list(kinds(found)):
            lines += [*table(HEADER, rows), ""]
        lines += [*map(run, dict.fromkeys(point.stem for point in found)), ""]
    return lines[:-1]


def kinds(found: Sequence[Point]) -> Iterator[tuple[str, ...]]:
    """A row for each kind of case."""
    based, beside = over_baseline(found), over_others(found)
    groups: dict[str, list[Pair]] = {}
    for pair in based:
        groups.setdefault(kind(pair.ours), []).append(pair)
    for label, pairs in groups.items():
        others = [pair for pair in beside if kind(pair.ours) == label]
        names = ", ".join(dict.fromkeys(pair.other for pair in others))
        reach = spread([pair.ours.of_ceiling for pair in pairs])
        yield (label, str(len(pairs)), *typical(pairs), names, *typical(others), reach)


def kind(point: Point) -> str:
    """What a case belongs to: `INT4_G128`, `causal prefill, INT8_FP8`."""
    told = {name: point.case.get(name, "") for name in names_of(point)}
    words = [f"{value} bits" if name == "bits" else str(value) for name, value in told.items() if value != ""]
    words += [point.name] if point.benchmark in OURS else []
    return ", ".join([*words, *(["drawn shapes"] if point.drawn else [])])


def typical(pairs: Sequence[Pair]) -> tuple[str, str]:
    """The geometric mean, and the least with its shape."""
    if not pairs:
        return "", ""
    worst = min(pairs, key=lambda pair: pair.ratio)
    least = "" if len(pairs) == 1 else f"{marked(worst.ratio)} ({shape(worst.ours)})"
    return marked(mean([pair.ratio for pair in pairs])), least


def marked(ratio: float) -> str:
    """A ratio, bold where lowbit is slower."""
    return f"**{times(ratio)}**" if ratio < NO else times(ratio)


def shape(point: Point) -> str:
    """What a case has beside its kind: `16x8192x8192`; of casts `MXFP8 4096x14336`."""
    rest = [value for name, value in point.case.items() if name not in names_of(point)]
    lengths = "x".join(str(value) for value in rest if isinstance(value, int))
    return " ".join(filter(None, [*(value for value in rest if isinstance(value, str)), lengths]))


def names_of(point: Point) -> tuple[str, ...]:
    """What tells kinds of its benchmark apart."""
    return KINDS.get(point.benchmark, ("format",))


def is_ours(point: Point) -> bool:
    """Whether it is a time of lowbit's that is held against others."""
    return point.role == "candidate" or (point.role == "peer" and point.benchmark in OURS)


def over_baseline(found: Iterable[Point]) -> list[Pair]:
    """Of every case the newest time of lowbit's."""
    ours = newest(filter(is_ours, found))
    return [Pair(point, point.speedup) for point in ours if point.speedup is not None]


def over_others(found: Sequence[Point]) -> list[Pair]:
    """Of every case that others were timed in, in the newest such run, the fastest of them over lowbit."""
    peers: dict[tuple[str, str], list[Point]] = {}
    for point in found:
        if point.role == "peer" and not is_ours(point) and not point.name.startswith("lowbit"):
            peers.setdefault((point.stem, json.dumps(point.case)), []).append(point)
    beside = [p for p in found if p.role == "candidate" and (p.stem, json.dumps(p.case)) in peers]
    pairs = []
    for ours in newest(beside):
        best = min(peers[ours.stem, json.dumps(ours.case)], key=lambda point: point.seconds)
        pairs.append(Pair(ours, best.seconds / ours.seconds, best.name))
    return pairs


def run(stem: str) -> str:
    """Where a table comes from: the JSON, its drawing, what the machine can do at best, and who was not there."""
    results = read_results(BENCHMARKS / f"{stem}.json")
    _, _, ceilings = headlines(results)
    told = [f"torch {results['environment']['versions']['torch']}", ceilings]
    absent = dict.fromkeys(each["name"] for row in results["rows"] for each in row["contenders"] if "refusal" in each)
    if results["shapes_seed"] is not None:
        told.append(f"shapes drawn by seed {results['shapes_seed']}")
    if absent:
        told.append(f"not there: {', '.join(absent)}")
    return f"- {link(stem)} ([drawn](images/{stem}.svg)): {'; '.join(told)}."
