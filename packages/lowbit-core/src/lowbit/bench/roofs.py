"""The part of a page of `lowbit bench` that shows rates under the ceilings that were measured beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lowbit.bench.charts import Ceiling, Dot, Trace, powers, roof
from lowbit.bench.curves import kinds
from lowbit.bench.outcomes import Outcome, Run
from lowbit.bench.results import rate
from lowbit.markup import Markup, element, join
from lowbit.plots import swatch


def roofline(run: Run, drawn: Sequence[Outcome]) -> Markup:
    """Those of a run's outcomes that are drawn, under its ceilings."""
    computing = [each for each in drawn if each.flops]
    told = _under_roof(run, computing) if computing else _under_copy(run, drawn)
    colours = kinds(run.outcomes)
    there = dict.fromkeys(each.name for each in computing or drawn)
    legend = element("ul", *(element("li", swatch(kind), name) for name, kind in colours.items() if name in there))
    return join([element("h3", "Roofline"), element("p", told[0]), element("div", legend, class_="legend"), told[1]])


def _under_roof(run: Run, computing: Sequence[Outcome]) -> tuple[str, Markup]:
    """Operations a second by operations a byte."""
    copy, product = f"copy {rate(run.bandwidth, 'B/s')}", f"{run.dtype} product {rate(run.compute, 'FLOP/s')}"
    ridge = run.compute / run.bandwidth
    x = powers("operations a byte", [ridge / 50, ridge * 10, *(each.flops / each.moved for each in computing)])
    y = powers("FLOP/s", [run.compute, *(each.flops / each.seconds for each in computing)])
    ceilings = [
        Ceiling(copy, ((start := max(x.low, y.low / run.bandwidth), start * run.bandwidth), (ridge, run.compute))),
        Ceiling(product, ((ridge, run.compute), (x.high, run.compute))),
    ]
    traces = _scattered(run, computing, lambda each: (each.flops / each.moved, each.flops / each.seconds))
    words = (
        "Operations a second by operations for each byte that must be moved. The roof is what was measured beside "
        f"them: the rate of a copy, and that of a product. Left of {ridge:.3g} operations a byte memory is the limit, "
        "right of it arithmetic; products of 8-bit operands can go beyond."
    )
    return words, roof(traces, x, y, ceilings, label="Operations a second by operations a byte, under ceilings")


def _under_copy(run: Run, drawn: Sequence[Outcome]) -> tuple[str, Markup]:
    """Bytes a second by bytes, of what computes nothing that is counted."""
    x = powers("bytes that must be moved", [each.moved for each in drawn])
    y = powers("B/s", [run.bandwidth, *(each.moved / each.seconds for each in drawn)])
    ceiling = Ceiling(f"copy {rate(run.bandwidth, 'B/s')}", ((x.low, run.bandwidth), (x.high, run.bandwidth)))
    traces = _scattered(run, drawn, lambda each: (each.moved, each.moved / each.seconds))
    words = (
        "No operations are counted here, so memory alone is the limit: bytes moved a second by the bytes that must be "
        "moved, under the rate of a copy that was measured beside them."
    )
    return words, roof(traces, x, y, [ceiling], label="Bytes a second by bytes that must be moved, under a copy's")


def _scattered(run: Run, drawn: Sequence[Outcome], place: Callable[[Outcome], tuple[float, float]]) -> list[Trace]:
    """Points of each contender, lowbit's above all others."""

    def dot(each: Outcome) -> Dot:
        least = max(each.moved / run.bandwidth, each.flops / run.compute)
        return Dot(*place(each), f"{each.words}, {100 * least / each.seconds:.3g} % of what the ceiling allows")

    traces = [
        Trace(kind, tuple(dot(each) for each in drawn if each.name == name), joined=False)
        for name, kind in kinds(run.outcomes).items()
    ]
    return sorted(traces, key=lambda trace: trace.kind == 0)
