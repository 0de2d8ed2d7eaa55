"""The tables of docs/performance.md, by the names of their markers, for pages.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pages_results import Point, link, load, newest, points, spread, table, times

H100, H200 = "NVIDIA H100", "NVIDIA H200"
ROWS, INTS = "FP8_ROW/FP8_ROW", "INT8_ROW/INT8_ROW"
BLOCKS, W4A8 = "FP8_128x128/FP8_1x128", "INT4_G128/FP8_ROW"
# Format, N, K.
Line = tuple[str, int, int]


def found(benchmark: str, name: str = "lowbit", *, machine: str = "", stem: str = "", **case: Any) -> Point | None:
    """The newest point of a case, of a machine or of one run."""
    some = (
        point
        for point in points()
        if point.benchmark == benchmark
        and point.name == name
        and (point.machine == machine or point.stem == stem)
        and point.matches(**case)
    )
    last = newest(some)
    assert len(last) <= 1, f"{benchmark}, {name}, {case}: {len(last)} cases"
    return last[0] if last else None


def over(point: Point | None) -> str:
    """How many times as fast as the baseline."""
    return "" if point is None else times(point.speedup)


def by(form: str) -> str:
    """`INT4_G128 by FP8_ROW`, or a weight's format alone."""
    return form.replace("/", " by ")


def tokens(lines: Sequence[tuple[str, Line]], ms: Sequence[int], **where: str) -> list[str]:
    """`linear`, over the baseline: contenders and weights by tokens."""
    rows = []
    for name, (form, n, k) in lines:
        cells = [over(found("linear", name, format=form, m=m, n=n, k=k, **where)) for m in ms]
        who = "" if name == "lowbit" else f"; {name}"
        rows.append([f"{by(form)}, {n}x{k}{who}", *cells])
    return table(["weight by input, N x K", *(f"M={m}" if m == ms[0] else str(m) for m in ms)], rows)


def linear_h100() -> list[str]:
    """Weights alone in low precision."""
    lines = [
        *(("INT4_G128", n, k) for n, k in ((4096, 4096), (8192, 8192), (14336, 4096), (28672, 8192))),
        *(("MXFP4", 14336, 4096), ("NVFP4", 14336, 4096), ("INT8_ROW", 8192, 8192)),
        *(("FP8_ROW", 8192, 8192), ("FP8_ROW", 28672, 8192)),
        *((form, 8192, 8192) for form in ("int2:1x128:bfloat16", "int3:1x128:bfloat16", "MXFP8")),
    ]
    return tokens([("lowbit", line) for line in lines], [1, 16, 64, 256, 1024, 4096], machine=H100)


def rounded_h100() -> list[str]:
    """Both operands in low precision."""
    lines = [
        (form, *shape)
        for form in (ROWS, BLOCKS, INTS, W4A8, "MXFP8/MXFP8", "MXFP4/FP8_ROW", "NVFP4/NVFP4")
        for shape in ((8192, 8192), (14336, 4096), (28672, 8192))
    ]
    return tokens([("lowbit", line) for line in lines], [1, 16, 64, 256, 1024, 4096], machine=H100)


def rounded_h200() -> list[str]:
    """Both operands in low precision, others beside."""
    lines: list[tuple[str, Line]] = []
    for form, names in {
        ROWS: ("lowbit", "torchao, compiled", "torch scaled_mm"),
        INTS: ("lowbit",),
        BLOCKS: ("lowbit", "deep_gemm", "torch scaled_mm"),
        W4A8: ("lowbit", "mslk"),
        "MXFP4/FP8_ROW": ("lowbit",),
        "MXFP8/MXFP8": ("lowbit",),
    }.items():
        for n, k in ((8192, 8192), (14336, 4096)):
            lines += [
                (name, (form, n, k))
                for name in names
                if any(p.machine == H200 and p.name == name and p.matches(format=form, n=n, k=k) for p in points())
            ]
    return tokens(lines, [1, 16, 32, 64, 128, 256, 1024, 4096, 8192], machine=H200)


def linear_xeon() -> list[str]:
    """With AMX and without, in two runs."""
    rows = []
    for form, name in (
        ("INT4_G128/INT8_ROW", "lowbit"),
        *((INTS, name) for name in ("lowbit", "oneDNN qlinear")),
        *(("INT4_G128", name) for name in ("lowbit", "torch int4pack")),
        ("MXFP4", "lowbit"),
        ("FP8_ROW", "lowbit"),
    ):
        for stem, isa in (("no-amx", "without AMX"), ("amx", "with it")):
            where = f"bench-linear-xeon-{stem}-2026-11-29"
            cells = [over(found("linear", name, stem=where, format=form, m=m)) for m in (1, 4, 16, 64, 512)]
            rows.append([f"{by(form)}{'' if name == 'lowbit' else f'; {name}'}", isa, *cells])
    return table(["weight by input", "", "M=1", "4", "16", "64", "512"], rows)


def linear_epyc() -> list[str]:
    """Milliseconds with AVX2."""
    rows = []
    for form in ("INT4_G128", "MXFP4", "INT8_ROW", "INT4_G128/INT8_ROW", INTS):
        for name in ("lowbit", "bfloat16", "torch int4pack", "oneDNN qlinear"):
            cells = [found("linear", name, machine="AMD EPYC, AVX2", format=form, m=m) for m in (1, 16, 256)]
            if any(cells):
                rows.append([by(form), name, *("" if p is None else f"{1e3 * p.seconds:.3g}" for p in cells)])
    return table(["weight by input", "", "M=1, ms", "16", "256"], rows)


def grouped_h100() -> list[str]:
    """Packed experts."""
    formats = ["INT4_G128", "MXFP4", "NVFP4", "FP8_ROW"]
    rows = [
        [f"{m}, {n}x{k}", *(over(found("grouped", machine=H100, format=f, m=m, n=n, k=k)) for f in formats)]
        for m, n, k in ((128, 2048, 768), (2048, 2048, 768), (128, 1536, 2048), (2048, 1536, 2048), (16384, 1536, 2048))
    ]
    return table(["rows, N x K", *formats], rows)


def grouped_h200() -> list[str]:
    """Experts whose inputs are rounded, others beside."""
    shapes = [(16384, 8192, 5120, 4), (65536, 2048, 7168, 8), (65536, 8192, 5120, 4), (16384, 2048, 7168, 8)]
    shapes += [(16384, 1536, 2048, 128), (8192, 1536, 2048, 128)]
    rows = []
    for form, name in (
        *((ROWS, name) for name in ("lowbit", "mslk", "torch scaled_grouped_mm")),
        *((INTS, "lowbit"), (W4A8, "lowbit"), ("INT4_G128", "lowbit")),
    ):
        cells = [found("grouped", name, machine=H200, format=form, m=m, n=n, k=k, experts=e) for m, n, k, e in shapes]
        rows.append([f"{by(form)}{'' if name == 'lowbit' else f'; {name}'}", *map(over, cells)])
    return table(["rows, experts of N x K", *(f"{m}, {e} of {n}x{k}" for m, n, k, e in shapes)], rows)


def decoding(*stems: str) -> Callable[[], list[str]]:
    """Whole models: tokens a second, and over bfloat16."""

    def lines() -> list[str]:
        rows = []
        for stem in stems:
            plain, low = load(stem)["models"]
            for base, each in zip(plain["batches"], low["batches"], strict=True):
                count = each.get("tokens", 1)
                step = f"{each['batch']} x {count} tokens" if count > 1 else f"{each['batch']}"
                speed = f"{base['with_head']['tokens_per_s']:,.0f}"
                timed = [each["with_head"], each["without_head"]]
                cells = [f"{one['tokens_per_s']:,.0f} ({times(one['over_bfloat16'])})" for one in timed]
                rows.append([step, low["model"], speed, *cells, link(stem, "run")])
        return table(["sequences", "", "bfloat16, tokens/s", "tokens/s (over it)", "without the head", ""], rows)

    return lines


def decoding_epyc() -> list[str]:
    """A whole model on a CPU."""
    rows = []
    for each in load("decoding-llama-1b-epyc-zen3-2026-11-29")["models"]:
        cells = [each[work][head] for work in ("decode", "prefill") for head in ("with_head", "without_head")]
        base = each["model"] == "bfloat16"
        ratios = ["" if base else f" ({times(cell['over_bfloat16'])})" for cell in cells]
        words = [f"{cell['tokens_per_s']:.2g}{ratio}" for cell, ratio in zip(cells, ratios, strict=True)]
        rows.append([each["model"], *words])
    return table(
        ["tokens a second (over bfloat16)", "decoding", "without the head", "a prompt of 512", "without the head"], rows
    )


def casts_h100() -> list[str]:
    """Shares of the fastest copy's rate, over three shapes."""
    stem = "bench-cast-h100-2026-11-27"
    here = [p for p in points() if p.stem == stem]
    rows = []
    for form in dict.fromkeys(p.case["format"] for p in here):

        def of(op: str, along: str = "rows", name: str = "lowbit", form: str = form) -> dict[str, Point]:
            case = {"op": op, "format": form, "blocks along": along}
            return {p.case["shape"]: p for p in here if p.name == name and p.matches(**case)}

        given, both, blocked = of("quantize, tensor scale given"), "rows and columns", of("quantize_blocked")
        plain, twice = given or of("quantize"), of("quantize_both", both, "two casts")
        shares = [of("quantize"), given, of("quantize", "columns"), of("quantize_both", both)]
        gains = [twice[shape].seconds / p.seconds for shape, p in of("quantize_both", both).items() if shape in twice]
        tiles = [100 * (p.seconds / plain[shape].seconds - 1) for shape, p in blocked.items()]
        rows.append(
            [
                form,
                *(spread([p.of_ceiling for p in found.values()]) if found else "" for found in shares),
                spread(gains) if gains else "",
                f"{max(tiles):+.0f} %" if tiles else "",
            ]
        )
    header = ["rows", "tensor scale given", "columns", "both at once", "over two casts", "scales in tiles, at most"]
    return table(["", *header], rows)


def streaming() -> list[str]:
    """From disk to disk."""
    rows = []
    for each in load("streaming-epyc-zen4-2026-11-23")["results"]:
        speeds = [run["mb_per_s"] for run in each["runs"]]
        rows.append(
            [
                each["scheme"],
                f"{each['mb_per_s']:.0f} MB/s ({min(speeds):.0f} to {max(speeds):.0f})",
                f"{each['copy_mb_per_s']:.0f} MB/s",
                f"{each['peak_mib_above_import']:.0f} MiB",
            ]
        )
    return table(["scheme", "input a second", "plain copy in the same run", "peak memory above import"], rows)


def dispatch() -> list[str]:
    """What a call costs beside its kernel, the worst of all modes; the second half of the rows is bound."""
    told = load("dispatch-epyc-zen4-2026-11-23")["rows"]
    halves = told[: len(told) // 2], told[len(told) // 2 :]
    rows = []
    for op in dict.fromkeys(row["op"] for row in told):
        added = [max(row["added_us"] for row in half if row["op"] == op) for half in halves]
        bare = max(row["any_subclass_us"] for row in told if row["op"] == op)
        rows.append([op, *(f"{value:.1f} us" for value in (*added, bare))])
    return table(["op", "canonical weight", "bound, packed weight", "any tensor subclass, for comparison"], rows)


def gptq_epyc() -> list[str]:
    """The error of a layer's output and the time, on a CPU."""
    told = [row for row in load("gptq-epyc-zen4-2026-11-23")["rows"] if row["n"] == 4096]
    rows = []
    for form in dict.fromkeys(row["format"] for row in told):
        of = {row["algorithm"]: row for row in told if row["format"] == form}
        nearest = f"{100 * of['round to nearest']['error']:.3g} %"
        better = [of[algorithm] for algorithm in ("GPTQ", "GPTQ, act-order", "GPTQ, act-order and scale search")]
        rows.append([form, nearest, *(f"{100 * each['error']:.3g} %, {each['seconds']:.1f} s" for each in better)])
    return table(["format", "round to nearest: error", "GPTQ: error, time", "and act-order", "and scale search"], rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    "streaming": streaming,
    "linear-h100": linear_h100,
    "grouped-h100": grouped_h100,
    "decoding-h100": decoding("decoding-h100-2026-11-28"),
    "rounded-h100": rounded_h100,
    "rounded-h200": rounded_h200,
    "grouped-h200": grouped_h200,
    "decoding-h200": decoding("decoding-qwen3-8b-h200-2026-11-29", "decoding-qwen3-8b-steps-h200-2026-11-29"),
    "casts-h100": casts_h100,
    "linear-epyc": linear_epyc,
    "linear-xeon": linear_xeon,
    "decoding-epyc": decoding_epyc,
    "dispatch": dispatch,
    "gptq-epyc": gptq_epyc,
}
