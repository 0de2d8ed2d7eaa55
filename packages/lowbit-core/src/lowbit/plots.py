"""The report's plots, as SVG: each is drawn twice, for wide and for narrow screens, at its own size of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lowbit.figures import error_share, fixed, percent
from lowbit.markup import Markup, element, join

# Widths of the drawings in units of the text's pixels: the page's own, and a phone's.
_WIDE: Final = 760
_NARROW: Final = 344
# Least distance of x ticks, which labels of four letters need.
_APART: Final = 36
# Markers about (0, 0): circle, square, diamond, triangle.
_MARKERS: Final = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-2.7-2.7h5.4v5.4h-5.4z",
    "M0-4L4 0L0 4L-4 0z",
    "M0-3.8L3.8 3H-3.8z",
)


@dataclass(frozen=True, slots=True)
class Point:
    """A value in dB at place `x`, and what is told of it where the pointer rests on it."""

    x: int
    y: float
    words: str
    # Index of its kind, which has a colour and a shape; None: the kind of all others.
    kind: int | None = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Places [start, stop) of the x axis that share a label."""

    label: str
    start: int
    stop: int


def line(points: Sequence[Point], *, label: str, x_label: str) -> Markup:
    """Values in dB by whole-number x, joined where one follows the other."""

    def draw(frame: _Frame) -> Iterable[Markup]:
        step = next(s for s in _steps() if frame.x(s) - frame.x(0) >= _APART)
        for x in range(math.ceil(points[0].x / step) * step, points[-1].x + 1, step):
            yield frame.x_tick(frame.x(x), str(x))
        path = ""
        for before, point in zip([None, *points], points, strict=False):
            joined = before is not None and point.x == before.x + 1
            path += f"{'L' if joined else 'M'}{frame.x(point.x):.1f} {frame.y(point.y):.1f}"
        yield element("path", d=path, class_="line")

    return _both(points, draw, label, x_label, (points[0].x - 0.5, points[-1].x + 0.5))


def scatter(points: Sequence[Point], spans: Sequence[Span], *, label: str, x_label: str) -> Markup:
    """Values in dB by place, the places grouped by labelled spans."""

    def draw(frame: _Frame) -> Iterable[Markup]:
        step = next(s for s in _steps() if frame.width * s / len(spans) >= _APART)
        free = -math.inf
        for i, span in enumerate(spans):
            start, stop = frame.x(span.start - 0.5), frame.x(span.stop - 0.5)
            if i % 2:
                yield element("rect", x=start, y=frame.top, width=stop - start, height=frame.height, class_="band")
            # The last may be of another kind, and spans of several lengths.
            if (i % step == 0 or i == len(spans) - 1) and (start + stop) / 2 >= free:
                yield frame.x_tick((start + stop) / 2, span.label)
                free = (start + stop) / 2 + _APART

    return _both(points, draw, label, x_label, (-0.5, spans[-1].stop - 0.5))


def swatch(kind: int | None) -> Markup:
    """The marker of a kind, for a legend."""
    return element("svg", marker(kind), viewBox="-5 -5 10 10", class_="swatch", aria_hidden="true")


def marker(kind: int | None, words: str | None = None, x: float = 0, y: float = 0) -> Markup:
    """The marker of a kind about (x, y), and what is told where the pointer rests on it."""
    return element(
        "path",
        *([] if words is None else [element("title", words)]),
        # The second four colours come in another order of shapes, so that like colours differ in shape.
        d=_MARKERS[0 if kind is None else (kind - kind // 4) % 4],
        class_="other" if kind is None else f"k{kind}",
        transform=f"translate({x:.1f} {y:.1f})",
    )


def bars(counts: Sequence[int], marked: Sequence[int], *, label: str) -> Markup:
    """Bars of experts' tokens, without axes; a stroke under `marked` ones, which may be too low for their colour."""
    width, height = max(2, min(14, 240 // max(len(counts), 1))), 28
    gap = 2 if width > 4 else 0.5
    most = max([*counts, 1])
    drawn: list[Markup] = []
    for i, count in enumerate(counts):
        few = i in marked
        # Even an expert that saw nothing has a stub to rest the pointer on.
        top = height - max(height * count / most, 1)
        outline = f"M{i * width} {top:.1f}h{width - gap}V{height}h{gap - width}z"
        stroke = f"M{i * width} {height + 2}h{width - gap}v3h{gap - width}z" if few else ""
        words = f"expert {i}: {count:,} tokens{', shared Hessian' if few else ''}"
        drawn.append(
            element("path", element("title", words), d=outline + stroke, class_="bar marked" if few else "bar")
        )
    total, deep = width * len(counts), height + 5
    return element(
        "svg", element("title", label), *drawn, viewBox=f"0 0 {total} {deep}", width=total, height=deep, role="img"
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a plot draws, in units of the viewBox, and what its axes span."""

    left: float
    top: float
    width: float
    height: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return self.left + self.width * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return self.top + self.height * (self.y_high - value) / (self.y_high - self.y_low)

    def x_tick(self, x: float, text: str) -> Markup:
        return element("text", text, x=x, y=self.top + self.height + 16, text_anchor="middle")


def _both(
    points: Sequence[Point],
    draw: Callable[[_Frame], Iterable[Markup]],
    label: str,
    x_label: str,
    x_range: tuple[float, float],
) -> Markup:
    return join(_plot(points, draw, label, x_label, x_range, width) for width in (_WIDE, _NARROW))


def _plot(
    points: Sequence[Point],
    draw: Callable[[_Frame], Iterable[Markup]],
    label: str,
    x_label: str,
    x_range: tuple[float, float],
    width: int,
) -> Markup:
    height, (low, high, step) = (300 if width == _WIDE else 240), _y_axis(points)
    frame = _Frame(34, 30, width - 34 - 52, height - 30 - 42, *x_range, low, high)
    right = frame.left + frame.width
    rules: list[Markup] = []
    for i in range(round((high - low) / step) + 1):
        value = low + i * step
        y = frame.y(value)
        rules += [
            element("path", d=f"M{frame.left} {y:.1f}H{right}", class_="rule"),
            element("text", fixed(value, 0), x=frame.left - 8, y=y + 4, text_anchor="end"),
            element("text", percent(error_share(value)), x=right + 8, y=y + 4, class_="soft"),
        ]
    axes = [
        element("text", "SQNR, dB", x=0, y=12, class_="axis"),
        element("text", "error", x=width, y=12, text_anchor="end", class_="axis"),
        element("text", x_label, x=frame.left + frame.width / 2, y=height - 6, text_anchor="middle", class_="axis"),
    ]
    marks = [marker(p.kind, p.words, frame.x(p.x), frame.y(p.y)) for p in points]
    return element(
        "svg",
        element("title", label),
        *rules,
        *draw(frame),
        *marks,
        *axes,
        viewBox=f"0 0 {width} {height}",
        class_="plot wide" if width == _WIDE else "plot narrow",
        role="img",
    )


def _y_axis(points: Sequence[Point]) -> tuple[float, float, float]:
    """Ends and step of an axis of round numbers that holds every point."""
    lowest, highest = min(p.y for p in points), max(p.y for p in points)
    step = next(s for s in _steps() if (highest - lowest) / s <= 4.5)
    low, high = math.floor(lowest / step) * step, math.ceil(highest / step) * step
    return low, high if high > low else low + step, step


def _steps() -> Iterable[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    return (digit * 10**power for power in range(308) for digit in (1, 2, 5))
