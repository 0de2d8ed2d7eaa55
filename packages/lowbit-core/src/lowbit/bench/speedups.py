"""The part of a page of `lowbit bench` that shows speedups by size, and the accuracy of the same cases beneath."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, fsum, log
from typing import Final

from lowbit.bench.charts import Axis, Dot, Trace, levels, lines, places, ratios, stack
from lowbit.bench.curves import DASHES, Curves, Line, Panel, curves, kinds
from lowbit.bench.inputs import EXACT, KINDS
from lowbit.bench.outcomes import Outcome, Run, in_line
from lowbit.figures import count
from lowbit.markup import Markup, element, join
from lowbit.plots import swatch

_INPUTS: Final = {"normal": "on normal inputs", "outliers": "with outliers"}
_ODD: Final = {EXACT: "results that are the same to the bit", -EXACT: "results that are not finite"}


def speedups(run: Run) -> Markup:
    """Plots of speedups over the baseline, accuracy beneath each, or why there are none."""
    found = curves(run.outcomes)
    if not found.panels:
        why = "neither lowbit nor another library was timed beside a baseline"
        return join([element("h3", "Speedup"), element("p", f"Nothing to draw: {why}.")])
    points = [point for panel in found.panels for line in panel.lines for point in line.points]
    every = [each for _, each in points]
    # All plots of a run have the same axes, so that they can be held against one another.
    fast = ratios("over baseline", [each.speedup for each in every if each.speedup is not None])
    accuracy = [value for each in every for kind in KINDS if (value := _finite(each, kind)) is not None]
    near = levels("SQNR, dB", accuracy) if accuracy else None
    sizes = sorted({x for x, _ in points})
    if len(sizes) > 1:
        x = places(found.axis, sizes)
        figures = [_figure(panel, x, fast, near, joined=found.joined) for panel in found.panels]
    else:
        figures = _stacked(found.panels, fast, near)
    parts = [
        element("h3", "Speedup, and what it costs"),
        element("p", _intro(every, found.axis if len(sizes) > 1 else "", accurate=near is not None)),
        _legend(run, found),
        element("div", *figures, class_="panels"),
        _undrawn(every),
    ]
    return join(parts)


def _intro(every: Sequence[Outcome], axis: str, *, accurate: bool) -> str:
    bases = "; ".join(dict.fromkeys(each.baseline.name for each in every if each.baseline is not None))
    by = f"by {axis}, both by their logarithm to base 2" if axis else "all at one size"
    words = f"How many times as fast as the baseline ({bases}), {by}. More is better; the grey rule is the baseline."
    if not accurate:
        return words
    return (
        f"{words} {'Beneath' if axis else 'Next'} is the accuracy of the same cases, the ratio of signal to "
        "quantization noise: filled on normal inputs, hollow with outliers among them. More is better there, too."
    )


def _legend(run: Run, found: Curves) -> Markup:
    """Contenders by marker, each with what its speedups come to, and lengths by dashes."""
    by: list[Markup] = []
    for name, kind in kinds(run.outcomes).items():
        fast = [each.speedup for each in run.outcomes if each.name == name and each.speedup is not None]
        if fast and any(each.name == name and each.role in {"candidate", "peer"} for each in run.outcomes):
            mean = f" {exp(fsum(map(log, fast)) / len(fast)):.3g}, {min(fast):.3g} at worst"
            by.append(element("li", swatch(kind), name, element("span", mean, class_="soft")))
    dashes = [element("li", _dash(i), text or "others") for i, text in enumerate(found.fixed) if len(found.fixed) > 1]
    title = element("span", "Geometric mean of the speedups, and the least", class_="soft")
    return element("div", title, *(element("ul", *entries) for entries in (by, dashes) if entries), class_="legend")


def _dash(index: int) -> Markup:
    drawn = element("path", d="M0 4H32", class_="curve", stroke_dasharray=DASHES[index])
    return element("svg", drawn, viewBox="0 0 32 8", class_="dash", aria_hidden="true")


def _figure(panel: Panel, x: Axis, fast: Axis, near: Axis | None, *, joined: bool) -> Markup:
    title = panel.title or "all cases"
    over = _fast(panel, joined=joined)
    plots = [lines(over, x, fast, label=f"Speedup over the baseline: {title}", height=220, mark=1.0)]
    if near is not None:
        plots.append(lines(_near(panel, joined=joined), x, near, label=f"SQNR: {title}", height=150))
    return element("figure", element("figcaption", title), *plots)


def _stacked(panels: Sequence[Panel], fast: Axis, near: Axis | None) -> list[Markup]:
    """Speedups one below the other, for what has but one size, and accuracy beside them."""
    over = [(panel.title or "all cases", _fast(panel, joined=False)) for panel in panels]
    figures = [element("figure", stack(over, fast, label="Speedup over the baseline", mark=1.0))]
    if near is not None:
        within = [(panel.title or "all cases", _near(panel, joined=False)) for panel in panels]
        figures.append(element("figure", stack(within, near, label="SQNR")))
    return figures


def _fast(panel: Panel, *, joined: bool) -> list[Trace]:
    return [
        Trace(
            line.kind,
            tuple(
                Dot(x, each.speedup, f"{each.words}, {each.speedup:.3g} over baseline")
                for x, each in line.points
                if each.speedup is not None
            ),
            line.fixed,
            joined,
        )
        for line in panel.lines
    ]


def _near(panel: Panel, *, joined: bool) -> list[Trace]:
    """Accuracy on each kind of inputs; hollow with outliers."""

    def dots(line: Line, kind: str) -> tuple[Dot, ...]:
        found = ((x, each, _finite(each, kind)) for x, each in line.points)
        return tuple(
            Dot(x, value, f"{each.by}, {in_line(each.case)}: {value:.1f} dB, {_INPUTS[kind]}")
            for x, each, value in found
            if value is not None
        )

    return [
        Trace(line.kind, dots(line, kind), line.fixed, joined, hollow=kind == "outliers")
        for kind in KINDS
        for line in panel.lines
    ]


def _finite(each: Outcome, kind: str) -> float | None:
    """An SQNR that can be drawn: neither that of the same bits nor that of what is not finite."""
    value = each.sqnr.get(kind)
    return None if value is None or abs(value) == EXACT else value


def _undrawn(every: Sequence[Outcome]) -> Markup:
    odd = [each.sqnr[kind] for each in every for kind in KINDS if kind in each.sqnr and _finite(each, kind) is None]
    told = [f"{count(odd.count(value), 'SQNR')} of {word}" for value, word in _ODD.items() if value in odd]
    return element("p", f"Not drawn: {', '.join(told)}.", class_="soft") if told else Markup()
