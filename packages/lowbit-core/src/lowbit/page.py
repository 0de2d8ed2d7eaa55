"""The report as a page of HTML: one file, no requests, nothing in it that the model's names could run."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Final

from lowbit.figures import NBSP, UNKNOWN, bytesize, count, decibels, duration, error, error_share, fixed, part, percent
from lowbit.markup import Column, Markup, code, element, join, plain, table
from lowbit.plots import Point, Span, bars, line, scatter, swatch
from lowbit.table import fold

if TYPE_CHECKING:
    from lowbit.report import Kept, Layer, Report

# Tables of more rows can be folded away, and of yet more are until they are asked for.
_SHORT: Final = 12
_FOLDED: Final = 60
# Kinds of layers that have a colour of their own.
_KINDS: Final = 8
_TOP: Final = 10
_TIMES: Final = "\N{MULTIPLICATION SIGN}"


def render(report: Report) -> str:
    """The whole page."""
    title = f"{report.title}, {report.scheme}: quantization report"
    return document(title, [each(report) for each in _SECTIONS])


def document(title: str, sections: Sequence[Markup], style: str = "") -> str:
    """A page of sections, in light and dark, that needs no other file and asks for none; `style`: rules of its own."""
    data = files("lowbit").joinpath("data")
    rules, script = (data.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    rules, script = plain(rules + style), plain(script)
    # This style and this script and nothing else, whatever else may have got into the page.
    policy = f"default-src 'none'; style-src {_digest(rules)}; script-src {_digest(script)}; base-uri 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", rules),
    )
    page = element("html", head, element("body", element("main", *sections), element("script", script)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def section(title: str, *content: str) -> Markup:
    """A part of a page, with its title."""
    return element("section", element("h2", title), *content)


def _foldable(rows: int, noun: str, content: Markup) -> Markup:
    """Content that can be folded away where it is long, and is so from the start where it is longer still."""
    if rows <= _SHORT:
        return content
    return element("details", element("summary", count(rows, noun)), content, open=None if rows > _FOLDED else "")


def _header(report: Report) -> Markup:
    before, after = report.bytes_before, report.bytes_after
    memory = [
        ("memory", report.peak_memory, report.planned_memory, report.max_memory),
        ("GPU memory", report.peak_gpu, report.planned_gpu, report.max_gpu),
    ]
    tiles = [
        ("Size", f"{bytesize(before)} → {bytesize(after)}", f"{before / max(after, 1):.3g} times smaller"),
        ("Bits per weight", f"{report.bits_per_weight:.4g}", "scales and zero points included"),
        ("Coverage", part(report.coverage), "of all bytes became low-bit"),
        ("Time", duration(report.seconds), f"for {count(len(report.layers), 'layer')}"),
    ]
    for name, peak, planned, allowed in memory:
        bounds = [
            f"{bytesize(bound)} {word}"
            for bound, word in ((planned, "planned"), (allowed, "allowed"))
            if bound is not None
        ]
        if peak is not None:
            tiles.append((f"Peak {name}", bytesize(peak), ", ".join(bounds)))
        elif bounds:
            tiles.append((f"{name[0].upper()}{name[1:]}", bounds[0], ", ".join(bounds[1:])))
    over = [
        element("p", f"More {name} was used than was allowed.", class_="warning")
        for name, peak, _, allowed in memory
        if peak is not None and allowed is not None and peak > allowed
    ]
    return element(
        "header",
        element("h1", report.title),
        element("p", "Quantized to ", element("strong", report.scheme), " by ", element("strong", report.algorithm)),
        *([] if report.kv_cache is None else [element("p", "Key-value cache: ", element("strong", report.kv_cache))]),
        element(
            "dl",
            *(
                element("div", element("dt", name), element("dd", value), element("dd", more))
                for name, value, more in tiles
            ),
            class_="tiles",
        ),
        *over,
    )


def _measure(report: Report) -> tuple[str, list[tuple[Layer, float]]]:
    """What layers are judged by, `output` or `weight`, and each judged layer's SQNR in dB, the worst first."""
    found = [(layer, layer.output_sqnr) for layer in report.layers if layer.output_sqnr is not None]
    what = "output" if found else "weight"
    judged = found or [(layer, layer.weight_sqnr) for layer in report.layers]
    # What is not even a number is worst of all.
    return what, sorted(judged, key=lambda pair: -math.inf if math.isnan(pair[1]) else pair[1])


def _terms(report: Report) -> Markup:
    terms = (*_sqnr_terms(report), *_size_terms(report), *_calibration_terms(report))
    return section("What the terms mean", element("dl", *terms, class_="terms"))


def _term(name: str, *text: str) -> Markup:
    return element("div", element("dt", name), element("dd", *text))


def _sqnr_terms(report: Report) -> Iterator[Markup]:
    what, judged = _measure(report)
    if judged:
        (worst, least), (_, median) = judged[0], judged[len(judged) // 2]
        yield _term(
            "SQNR",
            "Signal-to-quantization-noise ratio: how large values are against the error that rounding put into them. "
            f"The {what} of the median layer has SQNR {decibels(median)}: {error(median)}. The worst is ",
            code(worst.name),
            f" with SQNR {decibels(least)}: {error(least)}. Each 6{NBSP}dB more halves the error.",
        )
    if what == "output":
        weights = sorted(layer.weight_sqnr for layer, _ in judged)
        yield _term(
            "Weight and output",
            f"Weight SQNR, {decibels(weights[len(weights) // 2])} for the median layer, looks at the weights alone. "
            "Output SQNR looks at what they make of calibration inputs, which is what the model goes on with.",
        )
    if drawn := _drawn_blocks(report):
        last = drawn[-1]
        yield _term(
            "Cumulative SQNR",
            "The same of what a decoder block hands on, against the unquantized model, so that the errors of all "
            f"blocks before it count too. After block {last.x} it is {decibels(last.y)}: {error(last.y)}.",
        )


def _size_terms(report: Report) -> Iterator[Markup]:
    yield _term(
        "Bits per weight",
        f"What a quantized weight takes with its part of scales and zero points: {report.bits_per_weight:.4g}, so that "
        f"a thousand weights take {fixed(125 * report.bits_per_weight, 0)} bytes. In bfloat16 they take 2,000.",
    )
    yield _term(
        "Coverage",
        f"{part(report.coverage)} of the bytes of all parameters were in weights that are low-bit now; the rest is "
        "as it was.",
    )


def _calibration_terms(report: Report) -> Iterator[Markup]:
    for (channel, ratio), layers in _outliers(report)[:1]:
        yield _term(
            "Outlier channel",
            "An input channel much larger than the others, which makes steps coarse for all of them. The most extreme, "
            f"channel {channel} of ",
            code(layers[0].name),
            f", peaks at {fixed(ratio, 1)} times what the median channel peaks at.",
        )
    total = sum(len(experts.tokens) for experts in report.experts)
    if topped := sum(len(experts.topped) for experts in report.experts):
        yield _term(
            "Topped up",
            f"Rounding weighs errors by the inputs that an expert saw. {topped:,} of {count(total, 'expert')} saw too "
            "few tokens for that, and were sent more to be rounded by: those that came closest to being theirs.",
        )
    if few := sum(len(experts.fallback) for experts in report.experts):
        yield _term(
            "Shared Hessian",
            f"Rounding weighs errors by the inputs that an expert saw. {few:,} of {count(total, 'expert')} saw too few "
            "tokens for that, and what they lacked was made up by what all experts of their layer saw together.",
        )


def _drawn_blocks(report: Report) -> list[Point]:
    blocks = sorted(report.blocks, key=lambda block: block.index)
    return [
        Point(b.index, b.sqnr, f"{b.name}: {decibels(b.sqnr)}, error {percent(error_share(b.sqnr))}")
        for b in blocks
        if b.sqnr is not None and math.isfinite(b.sqnr)
    ]


def _block_plot(report: Report) -> Markup:
    points = _drawn_blocks(report)
    if not points:
        return Markup()
    first, last = points[0], points[-1]
    words = f"{decibels(first.y)} after block {first.x}, {decibels(last.y)} after block {last.x}"
    return section(
        "Error by depth",
        element("p", f"Cumulative SQNR at the output of each decoder block: {words}. Higher is better."),
        line(points, label=f"Cumulative SQNR by decoder block: {words}", x_label="decoder block"),
        _missing(len(report.blocks) - len(points), "block"),
    )


def _missing(number: int, noun: str) -> Markup:
    if not number:
        return Markup()
    return element("p", f"Not drawn: {count(number, noun)} without a finite SQNR.", class_="soft")


def _kind(name: str) -> str:
    parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdecimal()]
    return parts[-1] if parts else name


def _layer_plot(report: Report) -> Markup:
    judged = [layer for layer in report.layers if layer.output_sqnr is not None]
    # Layers in no block, the head above all, stand at the end.
    judged.sort(key=lambda layer: math.inf if layer.block is None else layer.block)
    common = Counter(_kind(layer.name) for layer in judged)
    kinds = {kind: i for i, (kind, _) in enumerate(common.most_common(_KINDS))}
    points = [
        Point(i, sqnr, _told(layer, sqnr), kinds.get(_kind(layer.name)))
        for i, layer in enumerate(judged)
        if (sqnr := layer.output_sqnr) is not None and math.isfinite(sqnr)
    ]
    if not points:
        return Markup()
    return section(
        "Error by layer",
        element("p", "Output SQNR of each layer, in the order of the decoder blocks. Higher is better."),
        _legend(points, kinds),
        scatter(
            points,
            _spans(judged),
            label=f"Output SQNR of {count(len(points), 'layer')} by decoder block",
            x_label="layers by decoder block",
        ),
        _missing(len(judged) - len(points), "layer"),
    )


def _spans(ordered: Sequence[Layer]) -> list[Span]:
    """The stretch of each block in a row of layers."""
    spans: list[Span] = []
    for block, same in groupby(ordered, key=lambda layer: layer.block):
        start = spans[-1].stop if spans else 0
        spans.append(Span("rest" if block is None else str(block), start, start + len(list(same))))
    return spans


def _told(layer: Layer, sqnr: float) -> str:
    return f"{layer.name}: {decibels(sqnr)}, error {percent(error_share(sqnr))}, {layer.format}"


def _legend(points: Sequence[Point], kinds: dict[str, int]) -> Markup:
    """Kinds by marker, each with its median."""
    entries: list[Markup] = []
    for name, kind in [*kinds.items(), ("other", None)]:
        if same := sorted(point.y for point in points if point.kind == kind):
            median = element("span", f" {decibels(same[len(same) // 2])}", class_="soft")
            entries.append(element("li", swatch(kind), name, median))
    title = element("span", "Kind of layer, and its median", class_="soft")
    return element("div", title, element("ul", *entries), class_="legend")


def _layer_columns(layers: Sequence[Layer]) -> dict[str, Column]:
    """The columns that tables of layers choose from, by short names."""

    def column(title: str, cell: Callable[[Layer], str], hint: str | None = None, *, numeric: bool = False) -> Column:
        return Column(title, [cell(layer) for layer in layers], numeric, hint)

    return {
        "name": column("Layer", lambda layer: code(layer.name)),
        "output": column("Output SQNR, dB", lambda layer: fixed(layer.output_sqnr, 1), numeric=True),
        "weight": column("Weight SQNR, dB", lambda layer: fixed(layer.weight_sqnr, 1), numeric=True),
        "bits": column("Bits", lambda layer: fixed(layer.bits, 3), "stored bits a weight", numeric=True),
        "format": column("Format", lambda layer: layer.format),
        "activation": column("Activation", lambda layer: layer.activation or "", "how its input is rounded"),
        "shape": column("Shape", lambda layer: f" {_TIMES} ".join(map(str, layer.shape)), numeric=True),
        "algorithm": column("Algorithm", lambda layer: layer.algorithm),
        "kernel": column("Kernel", lambda layer: layer.kernel or ""),
        "seconds": column("Time, s", lambda layer: fixed(layer.seconds, 1), numeric=True),
        "notes": column("Notes", lambda layer: "; ".join(layer.notes)),
    }


def _worst(report: Report) -> Markup:
    what, judged = _measure(report)
    worst = judged[:_TOP]
    if not worst:
        return Markup()
    columns = _layer_columns([layer for layer, _ in worst])
    shares = [UNKNOWN if math.isnan(sqnr) else percent(error_share(sqnr)) for _, sqnr in worst]
    share = Column("Error", shares, numeric=True, hint="size of the error against that of the signal")
    first, second = (columns[key] for key in (("output", "weight") if what == "output" else ("weight", "output")))
    rest = (columns[key] for key in ("bits", "format", "notes"))
    shown = table("Worst layers", columns["name"], first, share, second, *rest)
    return section(f"Worst {count(len(worst), 'layer')}", element("p", f"By {what} SQNR, the lowest first."), shown)


def _experts(report: Report) -> Markup:
    listed = report.experts
    if not listed:
        return Markup()
    few, topped = any(experts.fallback for experts in listed), any(experts.topped for experts in listed)
    legend = [" ", element("span", "Marked", class_="marked"), " experts used the shared Hessian."] if few else []
    shown = table(
        "Calibration tokens by expert",
        Column("Weight", [code(experts.name) for experts in listed]),
        Column("Tokens by expert", [bars(e.tokens, e.fallback, label=f"Tokens by expert of {e.name}") for e in listed]),
        Column("Fewest", [f"{min(experts.tokens, default=0):,}" for experts in listed], numeric=True),
        Column("Most", [f"{max(experts.tokens, default=0):,}" for experts in listed], numeric=True),
        *([Column("Topped up", [_brief(experts.topped) for experts in listed])] if topped else []),
        Column("Shared Hessian", [_brief(experts.fallback) for experts in listed]),
    )
    intro = element("p", "Calibration tokens that each expert saw, each row on a scale of its own.", *legend)
    return section("Experts", intro, _foldable(len(listed), "weight", shown))


def _brief(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHORT} more" if len(numbers) > _SHORT else ""
    return ", ".join(map(str, numbers[:_SHORT])) + more


def _outliers(report: Report) -> list[tuple[tuple[int, float], list[Layer]]]:
    """Outlier channels with the layers that have them, the largest first; layers of one input have the same."""
    found: dict[tuple[int | None, int, float], list[Layer]] = {}
    for layer in report.layers:
        for channel, ratio in layer.outliers:
            if math.isfinite(ratio):
                found.setdefault((layer.block, channel, ratio), []).append(layer)
    ordered = sorted(found.items(), key=lambda item: -item[0][2])
    return [((channel, ratio), layers) for (_, channel, ratio), layers in ordered]


def _outlier_table(report: Report) -> Markup:
    top = _outliers(report)[:_TOP]
    if not top:
        return Markup()
    shown = table(
        "Outlier channels",
        Column(
            "Layer", [join([code(layers[0].name), *(f", {_kind(o.name)}" for o in layers[1:])]) for _, layers in top]
        ),
        Column("Input channel", [str(channel) for (channel, _), _ in top], numeric=True),
        Column(
            f"{_TIMES} median",
            [fixed(ratio, 1) for (_, ratio), _ in top],
            numeric=True,
            hint="its amax over that of the median channel",
        ),
    )
    return section(
        "Outlier channels",
        element("p", "Input channels that peak highest against the median channel of their layer, over all layers."),
        shown,
    )


def _layer_table(report: Report) -> Markup:
    if not report.layers:
        return Markup()
    shown = table("All layers", *_layer_columns(report.layers).values(), sortable=True)
    return section("All layers", _foldable(len(report.layers), "layer", shown))


def _kernels(report: Report) -> Markup:
    uses = Counter(layer.kernel for layer in report.layers).most_common()
    if not uses:
        return Markup()
    shown = table(
        "Kernels",
        Column("Kernel", ["none that runs it" if kernel is None else code(kernel) for kernel, _ in uses]),
        Column("Layers", [f"{number:,}" for _, number in uses], numeric=True),
    )
    return section("Kernels", element("p", "What would run the layers on the machine that quantized them."), shown)


def _sizes(report: Report) -> Markup:
    by_format: dict[str, list[Layer]] = {}
    for layer in report.layers:
        by_format.setdefault(layer.format, []).append(layer)
    rows: list[tuple[str, int | None, float]] = [
        (name, len(layers), sum(prod(layer.shape) * layer.bits / 8 for layer in layers))
        for name, layers in by_format.items()
    ]
    rows.sort(key=lambda row: -row[2])
    if report.kept:
        rows.append(("kept as they are", len(report.kept), sum(kept.bytes for kept in report.kept)))
    rows += [("all, before", None, report.bytes_before), ("all, after", None, report.bytes_after)]
    shown = table(
        "Sizes",
        Column("Parameters", [name for name, _, _ in rows]),
        Column("Number", ["" if number is None else f"{number:,}" for _, number, _ in rows], numeric=True),
        Column("Size", [bytesize(taken) for _, _, taken in rows], numeric=True),
        Column("Of before", [part(taken / max(report.bytes_before, 1)) for *_, taken in rows], numeric=True),
    )
    return section("Sizes", shown)


def _kept(report: Report) -> Markup:
    alike: dict[tuple[int, str], list[Kept]] = {}
    for kept in report.kept:
        alike.setdefault((kept.bytes, kept.reason), []).append(kept)
    rows = [
        (name, number, number * taken, reason)
        for (taken, reason), same in alike.items()
        for name, number in fold(kept.name for kept in same)
    ]
    if not rows:
        return Markup()
    rows.sort(key=lambda row: -row[2])
    shown = table(
        "What was kept",
        Column("Parameter", [code(name) for name, *_ in rows]),
        Column("Number", [f"{number:,}" for _, number, *_ in rows], numeric=True),
        Column("Size", [bytesize(taken) for *_, taken, _ in rows], numeric=True),
        Column("Because", [reason for *_, reason in rows]),
    )
    return section("What was kept, and why", _foldable(len(rows), "row", shown))


def _pairs(title: str, pairs: dict[str, str]) -> Markup:
    if not pairs:
        return Markup()
    listed = (part for name, value in pairs.items() for part in (element("dt", name), element("dd", value)))
    return section(title, element("dl", *listed, class_="pairs"))


def _calibration(report: Report) -> Markup:
    return _pairs(
        "Calibration",
        {key: f"{item:.6g}" if isinstance(item, float) else str(item) for key, item in report.calibration.items()},
    )


def _environment(report: Report) -> Markup:
    return _pairs("Environment", dict(report.environment))


def _command(report: Report) -> Markup:
    if not report.command:
        return Markup()
    return section("Command", element("pre", element("code", report.command), tabindex=0))


_SECTIONS: Final = (
    _header,
    _terms,
    _block_plot,
    _layer_plot,
    _worst,
    _experts,
    _outlier_table,
    _layer_table,
    _kernels,
    _sizes,
    _kept,
    _calibration,
    _environment,
    _command,
)
