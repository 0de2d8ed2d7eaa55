"""Boxes of a graph in rows, each below all that it follows; no two lie on one another, and lines run between them."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

BESIDE: Final = 16
"""Between boxes of a row."""
BELOW: Final = 30
"""Between rows."""
_SWEEPS: Final = 8
# A line that passes rows by is better straight than near to the boxes at its ends.
_STRAIGHT: Final = 8.0


@dataclass(eq=False, slots=True)
class Box:
    """What is placed: its size, and, once it is, its left upper corner."""

    width: float
    height: float
    x: float = 0
    y: float = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a line: down from (x, y) to where the row ends, and over to (to_x, to_y), the top of the next."""

    source: Box
    # Where the line ends; None: it goes on.
    target: Box | None
    x: float
    y: float
    row_ends: float
    to_x: float
    to_y: float


@dataclass(eq=False, slots=True)
class _Spot:
    """A box, or, where there is none, a row's place that a line goes through."""

    box: Box | None
    width: float
    x: float = 0
    above: list[_Spot] = field(default_factory=list)
    below: list[_Spot] = field(default_factory=list)


def arrange(
    boxes: Sequence[Box], edges: Sequence[tuple[Box, Box]], late: Collection[Box]
) -> tuple[float, float, list[Segment]]:
    """Place boxes, which come in an order that edges follow; width and height of all, and the lines of the edges.

    Those of `late` stand just above the first that follows them. All lines from a box are one until they part.
    """
    if not boxes:
        return 0, 0, []
    level = _levels(boxes, edges, late)
    rows, origin = _spots(boxes, edges, level)
    rows = _ordered(rows)
    _place(rows)
    left = min(spot.x - spot.width / 2 for row in rows for spot in row)
    right = max(spot.x + spot.width / 2 for row in rows for spot in row)
    segments: list[Segment] = []
    top = 0.0
    for row in rows:
        height = max((spot.box.height for spot in row if spot.box is not None), default=0)
        for spot in row:
            spot.x -= left
            if spot.box is not None:
                spot.box.x, spot.box.y = spot.x - spot.width / 2, top
        # Spots of the rows below are moved when it is their turn.
        for spot in row:
            start = top if spot.box is None else top + spot.box.height
            segments += [
                Segment(origin[spot], to.box, spot.x, start, top + height, to.x - left, top + height + BELOW)
                for to in spot.below
            ]
        top += height + BELOW
    return right - left, top - BELOW, segments


def _levels(boxes: Sequence[Box], edges: Sequence[tuple[Box, Box]], late: Collection[Box]) -> dict[Box, int]:
    """The row of each box: as many rows down as the longest way to it is long."""
    before: dict[Box, list[Box]] = {box: [] for box in boxes}
    after: dict[Box, list[Box]] = {box: [] for box in boxes}
    for one, other in edges:
        before[other].append(one)
        after[one].append(other)
    level: dict[Box, int] = {}
    for box in boxes:
        level[box] = max((level[each] + 1 for each in before[box]), default=0)
    for box in reversed(boxes):
        if box in late and after[box]:
            level[box] = min(level[each] for each in after[box]) - 1
    return level


def _spots(
    boxes: Sequence[Box], edges: Sequence[tuple[Box, Box]], level: dict[Box, int]
) -> tuple[list[list[_Spot]], dict[_Spot, Box]]:
    """Rows of spots that are joined to those of the next row only, and the box that each one's lines come from."""
    rows: list[list[_Spot]] = [[] for _ in range(max(level.values()) + 1)]
    spots = {box: _Spot(box, box.width) for box in boxes}
    origin = {spot: box for box, spot in spots.items()}
    for box, spot in spots.items():
        rows[level[box]].append(spot)
    ways: dict[Box, list[_Spot]] = {box: [spots[box]] for box in boxes}
    for one, other in dict.fromkeys(edges):
        way = ways[one]
        while len(way) < level[other] - level[one]:
            through = _Spot(None, 2)
            rows[level[one] + len(way)].append(through)
            way[-1].below.append(through)
            through.above.append(way[-1])
            origin[through] = one
            way.append(through)
        last = way[level[other] - level[one] - 1]
        last.below.append(spots[other])
        spots[other].above.append(last)
    return rows, origin


def _ordered(rows: list[list[_Spot]]) -> list[list[_Spot]]:
    """Rows in the order in which the fewest lines cross, of those that barycenters lead to."""
    rows = [list(row) for row in rows]
    best, fewest = [list(row) for row in rows], _crossings(rows)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        down = sweep % 2 == 0
        at = {spot: float(i) for row in rows for i, spot in enumerate(row)}
        for row in rows if down else reversed(rows):
            mean = {spot: _mean(spot.above if down else spot.below, at, at[spot]) for spot in row}
            row.sort(key=mean.__getitem__)
            at.update((spot, float(i)) for i, spot in enumerate(row))
        crossed = _crossings(rows)
        if crossed < fewest:
            best, fewest = [list(row) for row in rows], crossed
    return best


def _mean(spots: Sequence[_Spot], at: dict[_Spot, float], otherwise: float) -> float:
    return sum(at[each] for each in spots) / len(spots) if spots else otherwise


def _crossings(rows: list[list[_Spot]]) -> int:
    total = 0
    for row, following in pairwise(rows):
        at = {spot: i for i, spot in enumerate(following)}
        seen: list[int] = []
        for spot in row:
            ends = sorted(at[each] for each in spot.below)
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def _place(rows: list[list[_Spot]]) -> None:
    """Centres of spots in their order, near to those of what they are joined to."""
    for row in rows:
        _spread(row, [(0.0, 1.0)] * len(row))
    for sweep in range(_SWEEPS):
        # The last looks both ways.
        last, down = sweep == _SWEEPS - 1, sweep % 2 == 0
        for row in rows if down or last else reversed(rows):
            wanted: list[tuple[float, float]] = []
            for spot in row:
                near = [*(spot.above if down or last else ()), *(spot.below if not down or last else ())]
                weights = [_STRAIGHT if spot.box is None and each.box is None else 1.0 for each in near]
                total = sum(weights)
                mean = sum(w * each.x for w, each in zip(weights, near, strict=True)) / total if near else spot.x
                wanted.append((mean, total or 0.1))
            _spread(row, wanted)


def _spread(row: list[_Spot], wanted: Sequence[tuple[float, float]]) -> None:
    """Put spots where the squares of what they are off from wanted places, by weights, are least, in their order."""
    offsets = [0.0]
    for one, other in pairwise(row):
        offsets.append(offsets[-1] + (one.width + other.width) / 2 + BESIDE)
    # Runs of spots that touch: their place, their weight, and how many they are.
    runs: list[tuple[float, float, int]] = []
    for (place, weight), offset in zip(wanted, offsets, strict=True):
        run = (place - offset, weight, 1)
        while runs and runs[-1][0] >= run[0]:
            at, more, count = runs.pop()
            run = ((at * more + run[0] * run[1]) / (more + run[1]), more + run[1], count + run[2])
        runs.append(run)
    places = [at for at, _, count in runs for _ in range(count)]
    for spot, at, offset in zip(row, places, offsets, strict=True):
        spot.x = at + offset
