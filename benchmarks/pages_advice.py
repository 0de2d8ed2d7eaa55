"""Rules of docs/should-i-quantize.md: what measured times say.

A point is a ratio: how many times as fast as bfloat16 (exported graphs: float32) a case is. The points of one scheme at
one size are of several shapes. Their verdict:

- *yes*: they are 1.05 or more in the geometric mean, and none is below 0.98;
- *no*: their mean is below 0.98, and none is 1.05 or more;
- *it depends*: some are 1.05 or more, others below 0.98;
- *no difference*: else.

Of the schemes of as many bits the fastest answers, by the shapes that all of them were measured at, where there are
any; schemes that were measured at fewer than half as many shapes as another are not asked. Sizes with the same answer
are one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pages_results import NO, YES, mean, spread

# Which sizes are one: tokens, or rows of each expert.
BINS = (1, 8, 32, 128, 512, 2048)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A measured point: a scheme at a size, over what it is held against."""

    size: float
    scheme: str
    bits: int
    value: float
    stem: str
    shape: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the points of one size, or of several, say."""

    verdict: str
    scheme: str
    means: tuple[float, ...]

    def __str__(self) -> str:
        reach = spread(self.means)
        named = f"{reach}, `{self.scheme}`" if self.scheme else reach
        return f"**{self.verdict}** {named}" if self.verdict == "yes" else f"{self.verdict}: {named}"


@dataclass(frozen=True, slots=True)
class Span:
    """Sizes that follow one another and have the same answers, by bits."""

    sizes: tuple[float, ...]
    answers: dict[int, Answer] = field(default_factory=dict)


def verdict(ratios: Sequence[float]) -> str:
    """yes, no, it depends, or no difference."""
    gains, losses = max(ratios) >= YES, min(ratios) < NO
    if gains and losses:
        return "it depends"
    if mean(ratios) >= YES:
        return "yes"
    return "no" if mean(ratios) < NO else "no difference"


def answer(ratios: Iterable[Ratio]) -> Answer | None:
    """Of the fastest scheme."""
    of: dict[str, dict[tuple[float, str], float]] = {}
    for ratio in ratios:
        of.setdefault(ratio.scheme, {})[ratio.size, ratio.shape] = ratio.value
    if not of:
        return None
    most = max(map(len, of.values()))
    asked = {name: cases for name, cases in of.items() if 2 * len(cases) >= most}
    common = set.intersection(*map(set, asked.values()))
    best = max(asked, key=lambda name: mean([asked[name][case] for case in common or asked[name]]))
    values = list(asked[best].values())
    found = verdict(values)
    return Answer(found, "" if found == "no difference" else best, (mean(values),))


def spans(ratios: Sequence[Ratio], bins: Sequence[float] = ()) -> list[Span]:
    """The answers by size, sizes of one bin together, and bins that follow one another with the same answers."""
    found: list[Span] = []
    groups: dict[float, list[Ratio]] = {}
    for ratio in sorted(ratios, key=lambda ratio: ratio.size):
        groups.setdefault(bin_of(ratio.size, bins), []).append(ratio)
    for group in groups.values():
        sizes = tuple(dict.fromkeys(ratio.size for ratio in group))
        given = {bits: answer(ratio for ratio in group if ratio.bits == bits) for bits in (8, 4)}
        answers = {bits: each for bits, each in given.items() if each is not None}
        if found and alike(found[-1].answers, answers):
            last = found.pop()
            sizes = last.sizes + sizes
            answers = {
                bits: Answer(each.verdict, each.scheme, last.answers[bits].means + each.means)
                for bits, each in answers.items()
            }
        found.append(Span(sizes, answers))
    return found


def bin_of(size: float, bins: Sequence[float]) -> float:
    """The end of the bin that a size is in; a size of its own where there are none."""
    return next((end for end in bins if size <= end), float("inf")) if bins else size


def alike(some: dict[int, Answer], others: dict[int, Answer]) -> bool:
    """Whether answers differ in nothing but how much is gained."""
    return {bits: (each.verdict, each.scheme) for bits, each in some.items()} == {
        bits: (each.verdict, each.scheme) for bits, each in others.items()
    }


def sizes_of(span: Span) -> str:
    """`1`, `9 to 32`."""
    ends = span.sizes[0], span.sizes[-1]
    low, high = (f"{size:,.0f}" if size < 1e6 else f"{size / 1e6:.0f} million" for size in ends)
    return low if low == high else f"{low} to {high}"


def yes_for(some: Sequence[Ratio], bins: Sequence[float]) -> str:
    """The sizes for which the answer is yes: `1 to 128; 4,096`."""
    found: list[tuple[float, ...]] = []
    last = ""
    for span in spans(some, bins):
        (each,) = span.answers.values()
        if each.verdict == "yes":
            found = [*found[:-1], found[-1] + span.sizes] if last == "yes" else [*found, span.sizes]
        last = each.verdict
    return "; ".join(sizes_of(Span(sizes)) for sizes in found) or "none"
