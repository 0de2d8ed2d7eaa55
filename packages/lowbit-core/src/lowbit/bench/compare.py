"""`lowbit bench compare A B`: what became faster, slower or less accurate from one file of results to another."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

from lowbit.bench.inputs import KINDS
from lowbit.bench.outcomes import Missing, Outcome, Run, in_line, read_run
from lowbit.bench.results import in_words
from lowbit.command import DONE, PROBLEM
from lowbit.errors import LowbitError
from lowbit.table import align

# dB that an SQNR may fall by.
_FALL: Final = 1.0
# The median of n normal values has a standard error of 0.93 interquartile ranges over sqrt(n); three of them.
_ERRORS: Final = 2.8
# Of the median of a file's spreads.
_USUAL: Final = 3

_T = TypeVar("_T", Outcome, Missing)

Key = tuple[frozenset[tuple[str, str | float]], str, str, int]
"""A case, a role, a contender's name, and how many of these came before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A contender in a case in both runs."""

    a: Outcome
    b: Outcome
    # B's over A's of what is compared; None: nothing can be, and `reason` says why.
    ratio: float | None
    reason: str
    # By how much more than 1 the ratio or its inverse may be for noise alone.
    noise: float
    # The most, in dB, that an SQNR of A is above that of B; None: none was measured in both.
    fall: float | None

    @property
    def slower(self) -> bool:
        """Whether B takes longer than noise explains."""
        return self.ratio is not None and self.ratio > 1 + self.noise

    @property
    def faster(self) -> bool:
        """Whether A takes longer than noise explains."""
        return self.ratio is not None and self.ratio < 1 / (1 + self.noise)

    @property
    def worse(self) -> bool:
        """Whether B is less accurate."""
        return self.fall is not None and self.fall > _FALL

    @property
    def verdict(self) -> str:
        """All of that in words."""
        speed = "slower" if self.slower else "faster" if self.faster else "same"
        speed = speed if self.ratio is not None else f"not compared: {self.reason}"
        return f"{speed}, SQNR {self.fall:.1f} dB lower" if self.worse else speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs of one benchmark, A and B."""

    a: Run
    b: Run
    # Why times over the baseline's of the same file are compared; "": times are.
    why: str
    pairs: tuple[Pair, ...]
    # What was timed in one of them only.
    only_a: tuple[Outcome, ...]
    only_b: tuple[Outcome, ...]
    # Of what A timed, that which B has a reason for not having timed.
    lost: tuple[Missing, ...]

    @property
    def ours(self) -> list[Pair]:
        """Rows of candidates."""
        return [pair for pair in self.pairs if pair.a.role == "candidate"]

    @property
    def failed(self) -> list[Missing]:
        """Candidates that A timed and that raised in B."""
        return [each for each in self.lost if each.role == "candidate" and each.failed]

    @property
    def bad(self) -> bool:
        """Whether a candidate is slower, less accurate, or failed."""
        return bool(self.failed) or any(pair.slower or pair.worse for pair in self.ours)


def compare(a: Run, b: Run) -> Comparison:
    """Rows of the same case, role and contender beside one another: times, and accuracy on each kind of inputs.

    Where devices or clocks differ, compared is a row's time over that of the baseline of the same case and file. B is
    slower where the ratio of what is compared, B's over A's, is above 1 + noise, with

        noise = sqrt(sum of spread^2)
        own = (third quartile - first quartile) / median * max(1, 2.8 / sqrt(samples))
        spread = max(own, 3 * median of `own` over all that was timed in the same file)

    summed over the times in the ratio: two of them, or four with the baselines'. 2.8 / sqrt(samples) interquartile
    ranges are three standard errors of a median of normal samples, which counts where there are fewer than eight; and
    samples that lie close by chance do not make a row more certain than the others. Where `benchmarks` has one
    bfloat16 product timed twice, this calls 1 pair in 20 different on GPUs, and 1 in 10 on shared processors.

    Raises:
        LowbitError: the benchmarks differ, or no row can be compared.
    """
    if a.benchmark != b.benchmark:
        raise LowbitError(
            f"{a.source} is of the benchmark {a.benchmark}, {b.source} of {b.benchmark}; compare two runs of one"
        )
    ours, theirs = _by_key(a.outcomes), _by_key(b.outcomes)
    why, usual = _why(a, b), (_usual(a), _usual(b))
    pairs = tuple(_pair(each, theirs[key], usual, over=bool(why)) for key, each in ours.items() if key in theirs)
    if not pairs:
        raise LowbitError(f"{a.source} and {b.source} have no case and contender in common; run both on the same cases")
    if all(pair.ratio is None for pair in pairs):
        raise LowbitError(
            f"no row of {a.source} and {b.source} can be compared: {why}, and no row but the baseline's is beside the "
            "same baseline in both"
        )
    missing = _by_key(b.missing)
    return Comparison(
        a=a,
        b=b,
        why=why,
        pairs=pairs,
        only_a=tuple(each for key, each in ours.items() if key not in theirs),
        only_b=tuple(each for key, each in theirs.items() if key not in ours),
        lost=tuple(each for key, each in missing.items() if key in ours),
    )


def main(argv: list[str]) -> int:
    """Compare two files of `lowbit bench NAME --json FILE`, the older one first."""
    parser = argparse.ArgumentParser(
        "lowbit bench compare",
        description=main.__doc__,
        epilog="Leaves with 1 where a candidate of B is slower than noise explains, lost more than 1 dB of SQNR, or "
        "fails. Where devices or clocks differ, times over the baseline's are compared.",
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="results")
    parser.add_argument("b", type=Path, metavar="B.json", help="results to hold against them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        found = compare(read_run(options.a), read_run(options.b))
    except LowbitError as error:
        parser.error(str(error))
    sys.stdout.write(f"{json.dumps(_plain(found), indent=1) if options.json else render(found)}\n")
    return PROBLEM if found.bad else DONE


def render(found: Comparison) -> str:
    """A comparison as text: what is compared, a table, rows that one of them lacks, and a line that sums it up."""
    heads = [f"{letter}: {run.source}: {run.device}, {run.date}" for letter, run in (("A", found.a), ("B", found.b))]
    heads.append(f"compared: times over the baseline's, for {found.why}" if found.why else "compared: times")
    names = list(dict.fromkeys(name for pair in found.pairs for name in pair.a.case))
    rows = align([_cells(pair, names, over=bool(found.why)) for pair in found.pairs])
    lone = [*_lone("A", found.only_a), *_lone("B", found.only_b)]
    lone += [
        f"{'FAILED' if each.failed else 'not'} in B: {each.name}, {in_line(each.case)}: {each.reason}"
        for each in found.lost
    ]
    return "\n".join([*heads, "", *rows, *lone, "", summary(found)])


def summary(found: Comparison) -> str:
    """A line: how many rows of candidates became slower, faster, less accurate."""
    ours = found.ours
    counts = {
        "slower": sum(pair.slower for pair in ours),
        "faster": sum(pair.faster for pair in ours),
        "less accurate": sum(pair.worse for pair in ours),
    }
    more = {"failed": len(found.failed), "not compared": sum(pair.ratio is None for pair in ours)}
    told = [f"{number} {word}" for word, number in (counts | {k: n for k, n in more.items() if n}).items()]
    names = ", ".join(dict.fromkeys(pair.a.name for pair in ours)) or "candidates"
    return f"{len(ours)} row{'s' * (len(ours) != 1)} of {names} in both: {', '.join(told)}"


def _pair(a: Outcome, b: Outcome, usual: tuple[float, float], *, over: bool) -> Pair:
    measured = [(a, usual[0]), (b, usual[1])]
    ratio, reason = b.seconds / a.seconds, ""
    if over:
        ratio, reason = _over_baselines(a, b)
        measured += [
            (each.baseline, common) for each, common in measured if ratio is not None and each.baseline is not None
        ]
    falls = [a.sqnr[kind] - b.sqnr[kind] for kind in KINDS if kind in a.sqnr and kind in b.sqnr]
    noise = math.hypot(*(_spread(each, common) for each, common in measured))
    return Pair(a=a, b=b, ratio=ratio, reason=reason, noise=noise, fall=max(falls, default=None))


def _over_baselines(a: Outcome, b: Outcome) -> tuple[float | None, str]:
    """The ratio of times over baselines, or why there is none."""
    if a.role == "baseline":
        return None, "it is the baseline"
    if a.speedup is None or b.speedup is None or a.baseline is None or b.baseline is None:
        return None, f"{'A' if a.speedup is None else 'B'} has no baseline"
    if a.baseline.name != b.baseline.name:
        return None, f"the baselines are {a.baseline.name} and {b.baseline.name}"
    return a.speedup / b.speedup, ""


def _spread(each: Outcome, usual: float = 0) -> float:
    return max((each.high - each.low) / each.seconds * max(1, _ERRORS / math.sqrt(each.samples)), usual)


def _usual(run: Run) -> float:
    """The least that a spread of this run counts for."""
    return _USUAL * median(map(_spread, run.outcomes)) if run.outcomes else 0


def _why(a: Run, b: Run) -> str:
    """Why times cannot be compared as they are; "" if they can."""
    if a.device != b.device:
        return f"the devices differ: {a.device}, and {b.device}"
    # What nvidia-smi tells of the temperature says nothing of speed.
    names = [name for name in {**a.clocks, **b.clocks} if not name.startswith("temperature")]
    told = [
        f"{name} {a.clocks.get(name, 'unknown')} and {b.clocks.get(name, 'unknown')}"
        for name in names
        if a.clocks.get(name) != b.clocks.get(name)
    ]
    return f"the clocks differ: {', '.join(told)}" if told else ""


def _key_of(each: Outcome | Missing, before: int = 0) -> Key:
    return frozenset(each.case.items()), each.role, each.name, before


def _by_key(found: Sequence[_T]) -> dict[Key, _T]:
    seen: Counter[Key] = Counter()
    keyed: dict[Key, _T] = {}
    for each in found:
        plain = _key_of(each)
        keyed[_key_of(each, seen[plain])] = each
        seen[plain] += 1
    return keyed


def _cells(pair: Pair, names: Sequence[str], *, over: bool) -> dict[str, str]:
    cells = {
        name: f"{value:.12g}" if isinstance(value := pair.a.case.get(name, ""), float | int) else value
        for name in names
    }
    cells |= {"by": pair.a.name, "A": in_words(pair.a.seconds), "B": in_words(pair.b.seconds)}
    if over:
        cells |= {
            f"{letter} over baseline": "" if each.speedup is None else f"{each.speedup:.3g}"
            for letter, each in (("A", pair.a), ("B", pair.b))
        }
    return cells | {
        "B/A": "" if pair.ratio is None else f"{pair.ratio:.3f}",
        "noise": "" if pair.ratio is None else f"{100 * pair.noise:.2g}%",
        "verdict": pair.verdict,
    }


def _lone(letter: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line for each case of which one file alone has contenders."""
    cases: dict[str, list[str]] = {}
    for each in outcomes:
        cases.setdefault(in_line(each.case), []).append(each.name)
    return (f"only in {letter}: {case}: {'; '.join(names)}" for case, names in cases.items())


def _plain(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON has it."""

    def row(pair: Pair) -> dict[str, Any]:
        both = {"seconds": (pair.a.seconds, pair.b.seconds), "speedup": (pair.a.speedup, pair.b.speedup)}
        told = {"case": pair.a.case, "role": pair.a.role, "name": pair.a.name} | both
        judged = {"ratio": pair.ratio, "noise": pair.noise, "fall": pair.fall, "verdict": pair.verdict}
        return told | {"sqnr": (pair.a.sqnr, pair.b.sqnr)} | judged

    def lone(each: Outcome) -> dict[str, Any]:
        return {"case": each.case, "role": each.role, "name": each.name}

    return {
        "benchmark": found.a.benchmark,
        "files": (found.a.source, found.b.source),
        "compared": "speedup" if found.why else "seconds",
        "why": found.why,
        "rows": [row(pair) for pair in found.pairs],
        "only_a": [lone(each) for each in found.only_a],
        "only_b": [lone(each) for each in found.only_b],
        "failed": [{"case": each.case, "name": each.name, "reason": each.reason} for each in found.failed],
        "summary": summary(found),
    }
