"""The plots of `lowbit bench`, as SVG: lines over a length, and points under what memory and arithmetic allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from lowbit.bench.curves import DASHES
from lowbit.markup import Markup, element, join
from lowbit.plots import marker

# Widths of drawings in units of the text's pixels: a plot that stands beside others or alone on a phone, and the page.
_NARROW, _WIDE = 344, 760
# Room for the labels of axes.
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 20, 24, 40
# Least distance of ticks along x, and most steps from tick to tick along y.
_APART, _STEPS = 40, 6
# Height of a title with its values below, and letters that there is room for.
_ROW, _LETTERS = 32, 52
_RAISED: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PREFIXES: Final = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True, slots=True)
class Dot:
    """A value at a place, and what is told of it where the pointer rests on it."""

    x: float
    y: float
    words: str


@dataclass(frozen=True, slots=True)
class Trace:
    """Dots of one contender, in order: in its colour, joined by a line of some dashes, filled or not."""

    kind: int | None
    dots: tuple[Dot, ...]
    dash: int = 0
    joined: bool = True
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis spans, by its ticks, and how it is told."""

    title: str
    ticks: tuple[tuple[float, str], ...]
    low: float
    high: float
    # Base of its logarithm; None: it has none.
    base: int | None = None

    def share(self, value: float) -> float:
        """Where a value is, from 0 at the low end to 1 at the high one."""
        low, high, at = (value if self.base is None else math.log(value) for value in (self.low, self.high, value))
        return (at - low) / (high - low)


def places(title: str, values: Iterable[float]) -> Axis:
    """An axis by the logarithm to base 2 that has its ticks where the values are."""
    at = sorted(set(values))
    # Half an octave on either side, so that no marker lies on an edge.
    low, high = at[0] / math.sqrt(2), at[-1] * math.sqrt(2)
    return Axis(title, tuple((value, short(value)) for value in at), low, high, base=2)


def ratios(title: str, values: Iterable[float]) -> Axis:
    """An axis by the logarithm to base 2 of round ratios that hold 1 and every value."""
    low, high = _ends([1.0, *values])
    between = next(found for found in _grids() if len(_spanned(found, low, high)) <= _STEPS + 1)
    ticks = _spanned(between, low, high)
    return Axis(title, tuple((tick, _ratio(tick)) for tick in ticks), ticks[0], ticks[-1], base=2)


def levels(title: str, values: Iterable[float]) -> Axis:
    """An axis of round numbers that holds every value."""
    low, high = _ends(values)
    step = next(s for s in _round() if (high - low) / s <= _STEPS - 2)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [i * step for i in range(first, max(last, first + 1) + 1)]
    return Axis(title, tuple((tick, f"{tick:g}".replace("-", "\N{MINUS SIGN}")) for tick in ticks), ticks[0], ticks[-1])


def powers(title: str, values: Iterable[float]) -> Axis:
    """An axis by the logarithm to base 10 of whole decades that hold every value."""
    low, high = _ends(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    # Of few decades there are ticks within, too.
    digits = (1, 2, 5) if last - first < 3 else (1,)
    step = -(-(last - first) // _STEPS)
    at = [digit * 10.0**i for i in range(first, last + 1, step) for digit in digits if i < last or digit == 1]
    return Axis(title, tuple((value, short(value)) for value in at), 10.0**first, 10.0**last, base=10)


def short(number: float) -> str:
    """A number in few letters: `4096`, `134 M`, `0.01`."""
    if number < 1e5:
        return f"{number:.4g}" if number < 1000 else f"{number:.0f}"
    power = min(int(math.log10(number)) // 3, len(_PREFIXES) - 1)
    number /= 1000**power
    return f"{number:{'.3g' if number < 999.5 else '.0f'}}\N{NO-BREAK SPACE}{_PREFIXES[power]}"


def _ratio(tick: float) -> str:
    """What a tick of `ratios` is called, in few letters."""
    if not 1e-3 < tick < 1e4:
        # Beyond, they are whole powers.
        return "2" + f"{math.log2(tick):.0f}".translate(_RAISED)
    return f"1/{1 / tick:.0f}" if tick < 0.25 and (1 / tick).is_integer() else f"{tick:.3g}"


def lines(traces: Sequence[Trace], x: Axis, y: Axis, *, label: str, height: int, mark: float | None = None) -> Markup:
    """Traces in a plot that is as wide as a phone; `mark`: the value along y that others are held against."""
    frame = _Frame(x, y, _NARROW, height)

    def drawn() -> Iterator[Markup]:
        if mark is not None:
            at = frame.down(mark)
            yield element("path", d=f"M{_LEFT} {at:.1f}H{frame.right}", class_="mark")
        for trace in traces:
            yield _trace(frame, trace)

    return _svg(frame, drawn(), label, "plot")


def stack(rows: Sequence[tuple[str, Sequence[Trace]]], x: Axis, *, label: str, mark: float | None = None) -> Markup:
    """Traces of several titles one below the other, by their values alone, in a plot as wide as a phone."""
    y = Axis("", (), float(len(rows)), 0.0)
    frame = _Frame(x, y, _NARROW, _TOP + _BOTTOM + _ROW * len(rows), left=_LEFT // 2 + 4)

    def drawn() -> Iterator[Markup]:
        for value, _ in x.ticks:
            at = frame.along(value)
            yield element("path", d=f"M{at:.1f} {_TOP}V{frame.bottom}", class_="mark" if value == mark else "rule")
        for i, (title, traces) in enumerate(rows):
            cut = title if len(title) <= _LETTERS else f"{title[: _LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
            yield element("text", element("title", title), cut, x=0, y=frame.down(i) + 12, class_="halo")
            for trace in traces:
                dots = tuple(Dot(dot.y, i + 0.7, dot.words) for dot in trace.dots)
                yield _trace(frame, Trace(trace.kind, dots, joined=False, hollow=trace.hollow))

    return _svg(frame, drawn(), label, "plot")


def roof(traces: Sequence[Trace], x: Axis, y: Axis, ceilings: Sequence[Ceiling], *, label: str) -> Markup:
    """Traces under ceilings, once for wide and once for narrow screens."""

    def drawn(frame: _Frame) -> Iterator[Markup]:
        for ceiling in ceilings:
            path = "L".join(f"{frame.along(at):.1f} {frame.down(value):.1f}" for at, value in ceiling.ends)
            yield element("path", d=f"M{path}", class_="roof")
        for trace in traces:
            yield _trace(frame, trace)
        for ceiling in ceilings:
            yield _named(frame, ceiling)

    frames = [(_Frame(x, y, _WIDE, 420), "plot wide"), (_Frame(x, y, _NARROW, 300), "plot narrow")]
    return join(_svg(frame, drawn(frame), label, name) for frame, name in frames)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A straight line that points stay below, and its name."""

    name: str
    ends: tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a plot draws, in units of the viewBox."""

    x: Axis
    y: Axis
    width: int
    height: int
    left: int = _LEFT

    @property
    def right(self) -> int:
        return self.width - _RIGHT

    @property
    def bottom(self) -> int:
        return self.height - _BOTTOM

    @property
    def sides(self) -> tuple[Callable[[float], float], Callable[[float], float]]:
        return self.along, self.down

    def along(self, value: float) -> float:
        return self.left + (self.right - self.left) * self.x.share(value)

    def down(self, value: float) -> float:
        return self.bottom - (self.bottom - _TOP) * self.y.share(value)


def _svg(frame: _Frame, drawn: Iterable[Markup], label: str, name: str) -> Markup:
    middle = (frame.left + frame.right) / 2
    return element(
        "svg",
        element("title", label),
        *_rules(frame),
        *drawn,
        element("text", frame.y.title, x=0, y=12, class_="axis"),
        element("text", frame.x.title, x=middle, y=frame.height - 6, text_anchor="middle", class_="axis"),
        viewBox=f"0 0 {frame.width} {frame.height}",
        class_=name,
        role="img",
    )


def _rules(frame: _Frame) -> Iterator[Markup]:
    """Ticks of both axes, with a rule for each of y; those of x that have room."""
    for value, text in frame.y.ticks:
        y = frame.down(value)
        yield element("path", d=f"M{_LEFT} {y:.1f}H{frame.right}", class_="rule")
        yield element("text", text, x=_LEFT - 6, y=y + 4, text_anchor="end")
    free = -math.inf
    for value, text in frame.x.ticks:
        x = frame.along(value)
        if x >= free:
            yield element("path", d=f"M{x:.1f} {frame.bottom}v4", class_="rule")
            yield element("text", text, x=x, y=frame.bottom + 19, text_anchor="middle")
            free = x + _APART


def _trace(frame: _Frame, trace: Trace) -> Markup:
    at = [(frame.along(dot.x), frame.down(dot.y)) for dot in trace.dots]
    path: list[Markup] = []
    if trace.joined and len(at) > 1:
        joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        path.append(element("path", d=f"M{joined}", class_="curve", stroke_dasharray=DASHES[trace.dash]))
    marks = (marker(trace.kind, dot.words, x, y) for dot, (x, y) in zip(trace.dots, at, strict=True))
    return element("g", *path, *marks, class_=f"{colour(trace.kind)}{' hollow' if trace.hollow else ''}")


def colour(kind: int | None) -> str:
    """The class of what is drawn in the colour of a kind."""
    return "c" if kind is None else f"c{kind}"


def _named(frame: _Frame, ceiling: Ceiling) -> Markup:
    """A ceiling's name: above its right end where it is level, otherwise beside its upper part."""
    (left, right), (low, high) = ([side(end[i]) for end in ceiling.ends] for i, side in enumerate(frame.sides))
    if low == high:
        return element("text", ceiling.name, x=right, y=high - 6, text_anchor="end", class_="halo")
    # Where the line is as far down as the name is.
    beside = right - 18 * (right - left) / (low - high)
    return element("text", ceiling.name, x=beside - 6, y=high + 16, text_anchor="end", class_="halo")


def _ends(values: Iterable[float]) -> tuple[float, float]:
    held = list(values)
    return min(held), max(held)


def _spanned(grid: Callable[[int], float], low: float, high: float) -> list[float]:
    """The points of a grid from the last that is not above `low` to the first that is not below `high`."""
    first = 0
    while grid(first) > low:
        first -= 1
    while grid(first + 1) <= low:
        first += 1
    last = first + 1
    while grid(last) < high:
        last += 1
    return [grid(i) for i in range(first, last + 1)]


def _grids() -> Iterator[Callable[[int], float]]:
    """Round ratios by their index, of which 0 is 1: quarters of octaves, halves, then 1, 2, 3, ... octaves."""
    for parts in (4, 2):
        yield lambda i, parts=parts: 2.0 ** (i // parts) * (1 + i % parts / parts)
    octaves = 1
    while True:
        yield lambda i, octaves=octaves: 2.0 ** (i * octaves)
        octaves += 1


def _round() -> Iterator[float]:
    """1, 2, 5, 10, 20, 50, ..."""
    return (digit * 10.0**power for power in range(308) for digit in (1, 2, 5))
