"""What is drawn of a run's speedups: which length is the x axis, which cases share a plot, and which a line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from lowbit.bench.outcomes import Outcome, Told, in_line

# Lines that one plot may have, and ways to draw them that tell fixed lengths apart.
MOST_LINES: Final = 12
DASHES: Final = (None, "7 3", "2 2.5", "9 3 2 3", "14 4", "5 2 1 2 1 2")
# Contenders that have a colour of their own.
_KINDS: Final = 8
_SHAPE: Final = re.compile(r"\d{1,9}(x\d{1,9})+")
_TIMES: Final = " \N{MULTIPLICATION SIGN} "


@dataclass(frozen=True, slots=True)
class Line:
    """A contender at fixed other lengths, by rising place on the x axis."""

    # Index of the contender's colour; None: that of all others.
    kind: int | None
    # Index of the fixed lengths among those of `Curves`.
    fixed: int
    points: tuple[tuple[float, Outcome], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """Cases of the same words that share a plot."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """Every line of a run."""

    # What the x axis counts.
    axis: str
    # Whether the points of a line differ in nothing but that, so that they may be joined.
    joined: bool
    # The other lengths that vary, once each combination; empty where titles tell them.
    fixed: tuple[str, ...]
    panels: tuple[Panel, ...]


def kinds(outcomes: Sequence[Outcome]) -> dict[str, int | None]:
    """Colours of contenders by name: lowbit has the first, then the others, and baselines that of all the rest."""
    found: dict[str, int | None] = dict.fromkeys((each.name for each in outcomes if each.role == "candidate"), 0)
    others = dict.fromkeys(each.name for each in outcomes if each.role == "peer" and each.name not in found)
    found |= {name: i if i < _KINDS else None for i, name in enumerate(others, 1)}
    return dict.fromkeys(each.name for each in outcomes if each.role == "baseline") | found


def curves(outcomes: Sequence[Outcome]) -> Curves:
    """The lines of candidates and peers along that length which most of their cases differ in alone.

    Where no two cases differ in one length alone, the axis is the product of all that vary, and nothing is joined.
    """
    drawn = [each for each in outcomes if each.speedup is not None and each.role in {"candidate", "peer"}]
    names, joined = _axis([each.case for each in drawn])
    varying = _varying([each.case for each in drawn], names)
    fixed = list(dict.fromkeys(_part(each.case, varying) for each in drawn))
    panels = _panels(drawn, varying, apart=False)
    if apart := len(fixed) > len(DASHES) or any(len(lines) > MOST_LINES for lines in panels.values()):
        panels = _panels(drawn, varying, apart=True)
    colours = kinds(outcomes)

    def line(name: str, others: str, points: Sequence[Outcome]) -> Line:
        placed = ((prod(lengths(each.case)[name] for name in names), each) for each in points)
        index = 0 if apart else fixed.index(others)
        return Line(colours[name], index, tuple(sorted(placed, key=lambda point: point[0])))

    shown = (
        Panel(title, tuple(line(*key, points) for key, points in lines.items())) for title, lines in panels.items()
    )
    return Curves(_TIMES.join(names), joined, () if apart else tuple(fixed), tuple(shown))


def lengths(case: Told) -> dict[str, float]:
    """The lengths of a case by name; a shape such as `16x256` is the number of its elements."""
    found: dict[str, float] = {}
    for name, value in case.items():
        if isinstance(value, str):
            length = prod(map(int, value.split("x"))) if _SHAPE.fullmatch(value) else 0
        else:
            length = value
        if length > 0:
            found[name] = length
    return found


def _axis(cases: Sequence[Told]) -> tuple[tuple[str, ...], bool]:
    """The lengths whose product is the x axis, and whether points that differ in it alone may be joined."""
    sizes = [lengths(case) for case in cases]
    common = [name for name in sizes[0] if all(name in each for each in sizes)] if sizes else []
    best = max(common, key=lambda name: _on_lines(cases, name), default=None)
    if best is not None and _on_lines(cases, best)[0]:
        return (best,), True
    varying = [name for name in common if len({each[name] for each in sizes}) > 1]
    return tuple(varying or common[:1]), False


def _on_lines(cases: Sequence[Told], name: str) -> tuple[int, int]:
    """How many cases differ from another in one length alone, and how many such lengths there are."""
    lines: dict[frozenset[tuple[str, str | float]], set[str | float]] = {}
    for case in cases:
        lines.setdefault(frozenset((key, value) for key, value in case.items() if key != name), set()).add(case[name])
    along = [places for places in lines.values() if len(places) > 1]
    return sum(map(len, along)), len(set().union(*along))


def _varying(cases: Sequence[Told], names: Sequence[str]) -> set[str]:
    """Names of lengths, but of those on the x axis, that not all cases have alike."""
    told = {name for case in cases for name in lengths(case)} - set(names)
    return {name for name in told if len({case.get(name) for case in cases}) > 1}


def _part(case: Told, names: set[str]) -> str:
    return in_line({name: value for name, value in case.items() if name in names and name in lengths(case)})


def _panels(
    drawn: Sequence[Outcome], varying: set[str], *, apart: bool
) -> dict[str, dict[tuple[str, str], list[Outcome]]]:
    """Outcomes by the title of their plot, there by contender and fixed lengths; `apart`: titles have these, too."""
    panels: dict[str, dict[tuple[str, str], list[Outcome]]] = {}
    for each in drawn:
        others = _part(each.case, varying)
        words = in_line({name: value for name, value in each.case.items() if name not in lengths(each.case)})
        title = ", ".join(filter(None, [words, others if apart else ""]))
        panels.setdefault(title, {}).setdefault((each.name, others), []).append(each)
    return panels
