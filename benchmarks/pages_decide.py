"""Tables of docs/should-i-quantize.md, by the names of their markers: what was measured, judged by pages_advice.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pages_advice import BINS, Ratio, Span, bin_of, sizes_of, spans, yes_for
from pages_results import BENCHMARKS, Point, age, link, load, machine_of, mean, newest, points, spread, table, times

import lowbit
from lowbit_hf.schemes import scheme

# What `lowbit quantize --to` takes for what was measured; other formats are for recipes.
SCHEMES = {
    "INT8_ROW/INT8_ROW": "W8A8",
    "FP8_ROW/FP8_ROW": "FP8_DYNAMIC",
    "FP8_128x128/FP8_1x128": "FP8_BLOCK",
    "MXFP8/MXFP8": "MXFP8",
    "MXFP8": "MXFP8A16",
    "INT4_G128": "W4A16",
    "INT4_G128/INT8_ROW": "W4A8",
    "INT4_G128/FP8_ROW": "W4AFP8",
    "MXFP4": "MXFP4A16",
    "NVFP4": "NVFP4A16",
    "NVFP4/NVFP4": "NVFP4",
}
# What files call models, and pages.
MODELS = {"qwen3-8b": "Qwen3-8B", "llama-1b": "Llama-3.2-1B", "8 layers": "8 layers of Llama-3-8B"}
GRAPHS = {"resnet50": "ResNet-50", "bert-base": "BERT-base", "vit-b/16": "ViT-B/16"}


def bits_of(form: str) -> int | None:
    """8 or 4, the first number in the name of a format, scheme or recipe; None for others, which have no column."""
    first = next((int(letter) for letter in form if letter.isdecimal()), None)
    return first if first in {4, 8} else None


def measured(machine: str, benchmark: str) -> list[Point]:
    """The newest points of lowbit's own, of shapes that somebody chose."""
    return newest(
        p for p in points() if (p.machine, p.benchmark, p.role) == (machine, benchmark, "candidate") and not p.drawn
    )


def ratios(machine: str, benchmark: str, size: str, key: str, **case: Any) -> list[Ratio]:
    """The points of a benchmark; a case has its size and its scheme under these names."""
    found = []
    for point in measured(machine, benchmark):
        if not point.matches(**case) or point.speedup is None or (bits := bits_of(form := point.case[key])) is None:
            continue
        rows = point.case[size] / point.case["experts"] if benchmark == "grouped" else point.case[size]
        name = str(SCHEMES.get(form, form) if benchmark in {"linear", "grouped"} else form)
        shape = str([value for name, value in point.case.items() if name not in {size, key}])
        found.append(Ratio(rows, name.replace("/", " by "), bits, point.speedup, point.stem, shape))
    return found


def works(machine: str) -> list[tuple[str, list[Ratio], Sequence[float]]]:
    """What was measured on a machine: its name, the points, and which sizes are one."""
    found: list[tuple[str, list[Ratio], Sequence[float]]] = [*models(machine), *exported(machine)]
    linear = [ratio for ratio in ratios(machine, "linear", "m", "format") if ratio.scheme in SCHEMES.values()]
    experts = ratios(machine, "grouped", "m", "format")
    found += [("linear layers: tokens at a time", linear, BINS), ("experts: rows for each", experts, BINS)]
    attention = [p.case for p in measured(machine, "attention") if p.case["step"] != "decode"]
    for step, rounded in dict.fromkeys((case["step"], case["scheme"]) for case in attention):
        some = ratios(machine, "attention", "s", "scheme", step=step, scheme=rounded)
        found.append((f"attention, {step}, `{rounded}`: tokens", some, ()))
    one = ratios(machine, "attention", "s", "scheme", step="decode")
    named = {f"cache {getattr(lowbit, name)}": name for name in ("FP8_ROW", "INT8_ROW")}
    cached = [replace(ratio, scheme=named[ratio.scheme]) for ratio in one if ratio.scheme in named]
    found.append(("attention of one token: keys", [ratio for ratio in one if ratio.scheme not in named], ()))
    found.append(("attention of one token over a cache of codes: keys", cached, ()))
    for columns in (128, 4096):
        some = ratios(machine, "bags", "rows each", "format", columns=columns)
        found.append((f"embedding bags, {columns} columns: rows", some, ()))
    found += [
        ("training a feed-forward layer: tokens", ratios(machine, "ffn", "m", "recipe"), ()),
        ("training experts: tokens", ratios(machine, "experts", "m", "recipe"), ()),
        ("a step of AdamW: parameters", optimizer(machine), ()),
        ("tokens to another GPU's experts: MiB of bfloat16", exchange(machine), ()),
    ]
    return [work for work in found if work[1]]


def decoded() -> list[str]:
    """All runs of whole models, the oldest first."""
    return [file.stem for file in sorted(BENCHMARKS.glob("decoding-*.json"), key=age)]


def models(machine: str) -> list[tuple[str, list[Ratio], Sequence[float]]]:
    """Whole models, the head in bfloat16 counted in: by sequences that get a token each, and by tokens of a prompt."""
    newest_of: dict[tuple[str, str, float], Ratio] = {}
    for stem in decoded():
        told = load(stem)
        if machine_of((told.get("environment") or told["machine"])["device"], stem) != machine:
            continue
        name = told.get("shape") or told.get("model") or f"{told['layers']} layers"
        for model in told["models"]:
            scheme = model["model"]
            for size, work, ratio in steps(told, model):
                if scheme != "bfloat16" and (bits := bits_of(scheme)) is not None:
                    words = f"{MODELS.get(name, name)}'s shape, {work}"
                    newest_of[words, scheme, size] = Ratio(size, scheme, bits, ratio, stem)
    names = dict.fromkeys(words for words, _, _ in newest_of)
    return [(name, [each for (words, _, _), each in newest_of.items() if words == name], ()) for name in names]


def steps(told: dict[str, Any], model: dict[str, Any]) -> Iterator[tuple[float, str, float]]:
    """Of one model of a run: how many, of what, and how many times as fast."""
    for batch in model.get("batches", ()):
        count, ratio = batch.get("tokens", 1), batch["with_head"]["over_bfloat16"]
        yield (batch["batch"], "decoding: sequences", ratio) if count == 1 else (count, "a prompt: tokens", ratio)
    if "decode" in model:
        yield 1, "decoding: sequences", model["decode"]["with_head"]["over_bfloat16"]
        yield told["prompt"], "a prompt: tokens", model["prefill"]["with_head"]["over_bfloat16"]


def exported(machine: str) -> list[tuple[str, list[Ratio], Sequence[float]]]:
    """Exported graphs in int8, over float32 compiled: by images or texts at once."""
    stem = max(BENCHMARKS.glob("graphs-*.json"), key=age).stem
    told = load(stem)
    if machine_of(told["environment"]["device"], stem) != machine:
        return []
    found: dict[str, list[Ratio]] = {}
    for row in told["rows"]:
        name, _, batch = row["model"].partition(" x ")
        if row["contender"].startswith("lowbit"):
            scheme = "dynamic int8" if row["contender"].endswith("dynamic") else "static int8"
            ratio = Ratio(float(batch or 1), scheme, 8, row["over_fp32"], stem)
            found.setdefault(f"{GRAPHS[name]} exported, over float32: at once", []).append(ratio)
    return [(name, some, ()) for name, some in found.items()]


def optimizer(machine: str) -> list[Ratio]:
    """AdamW with states of 8 and 4 bits."""
    return [
        Ratio(p.case["parameters"], f"AdamW(bits={p.case['bits']})", p.case["bits"], p.speedup, p.stem)
        for p in measured(machine, "optimizer")
        if p.speedup is not None
    ]


def exchange(machine: str) -> list[Ratio]:
    """Rows that travel between GPUs in few bits."""
    stem = max(BENCHMARKS.glob("exchange-*.json"), key=age).stem
    told = load(stem)
    if machine_of(told["device"], stem) != machine:
        return []
    rows = [row for row in told["rows"] if row["payload"] != "BF16"]
    return [
        Ratio(row["bfloat16_bytes"] / 2**20, row["payload"], 8, row["alone"]["over_bfloat16"], stem) for row in rows
    ]


def decisions(machine: str) -> list[str]:
    """One machine's answers: a row for each work and range of sizes."""
    rows = []
    for name, some, bins in works(machine):
        for span in spans(some, bins):
            cells = [str(span.answers[bits]) if bits in span.answers else "" for bits in (8, 4)]
            rows.append([name, sizes_of(span), *cells])
    return table(["work", "how many", "8 bits", "4 bits"], rows)


def schemes(machine: str, benchmark: str) -> list[str]:
    """Every scheme by size: the mean and the range over shapes, and for which sizes the verdict is yes."""
    some = ratios(machine, benchmark, "m", "format")
    ends = sorted({bin_of(ratio.size, BINS) for ratio in some})
    heads = [sizes_of(Span(tuple(sorted({r.size for r in some if bin_of(r.size, BINS) == end})))) for end in ends]
    rows = []
    for name in sorted({ratio.scheme for ratio in some}, key=lambda name: (-(bits_of(name) or 8), name)):
        of = [ratio for ratio in some if ratio.scheme == name]
        cells = [cell([ratio.value for ratio in of if bin_of(ratio.size, BINS) == end]) for end in ends]
        rows.append([f"`{name}`", *cells, yes_for(of, BINS)])
    return table(["", *heads, "yes for"], rows)


def cell(values: Sequence[float]) -> str:
    """`1.54 (1.02 to 1.84)`, or one number."""
    reach = spread(values) if values else ""
    return f"{times(mean(values))} ({reach})" if " to " in reach else reach


def costs() -> list[str]:
    """What schemes cost: bits, the rise of perplexity, and the SQNR of a product, the least that was measured."""
    rises = {
        (name, row["scheme"], row["method"]): row["rise"]
        for name in ("lm-tiny", "moe-tiny")
        for row in load(f"quality-{name}-h100-2026-11-27")["rows"]
        if row["method"]
    }
    rows = []
    for form, name in SCHEMES.items():
        chosen = scheme(name)
        gptq = "+ scale search" if chosen.activation is None else "+ fit to inputs"
        cells = []
        for model in ("lm-tiny", "moe-tiny"):
            found = [rises.get((model, name, method)) for method in ("rtn", gptq)]
            cells.append("; ".join("-" if rise is None else f"{100 * rise:+.1f} %" for rise in found))
        here = [p for p in points() if p.role == "candidate" and p.benchmark == "linear" and p.case["format"] == form]
        sqnr = [
            min(p.sqnr for p in here if p.sqnr is not None),
            min(p.outliers for p in here if p.outliers is not None),
        ]
        bits = chosen.weight_format(torch.bfloat16).bits_per_element((4096, 4096))
        rows.append([f"`{name}`", f"{bits / 16:.0%}", *cells, *(f"{value:.0f}" for value in sqnr)])
    header = ["weights, of bfloat16", "lm-tiny: nearest; GPTQ", "moe-tiny: nearest; GPTQ", "SQNR, dB", "with outliers"]
    return table(["scheme", *header], rows)


def bags() -> list[str]:
    """Bags over bfloat16, and over PyTorch's own of as many bits."""
    here = newest(p for p in points() if p.benchmark == "bags")
    formats = dict.fromkeys(p.case["format"] for p in here)
    rows = []
    for machine in dict.fromkeys(p.machine for p in here):
        for each, columns in dict.fromkeys((p.case["rows each"], p.case["columns"]) for p in here):
            cells = []
            for form in formats:
                of = [
                    p
                    for p in here
                    if p.machine == machine and p.matches(**{"rows each": each, "columns": columns, "format": form})
                ]
                ours = next(p for p in of if p.role == "candidate")
                peer = min((p.seconds for p in of if p.role == "peer"), default=None)
                cells.append(f"{times(ours.speedup)} ({'-' if peer is None else times(peer / ours.seconds)})")
            rows.append([machine, f"{each} of {columns}", *cells])
    return table(["", "rows of columns", *formats], rows)


def sources(machine: str) -> list[str]:
    """The JSON that a machine's answers come from, what is missing, and what bfloat16 is there beside float32."""
    stems = sorted({ratio.stem for _, some, _ in works(machine) for ratio in some})
    here = {ratio.scheme for ratio in ratios(machine, "linear", "m", "format")}
    missing = [f"`{name}`" for name in SCHEMES.values() if name not in here]
    return [
        f"From {', '.join(link(stem, stem.removeprefix('bench-')[:-11]) for stem in stems)}.",
        *(["", f"Linear layers were not measured here by {', '.join(missing)}."] if missing else []),
        *emulated(machine),
    ]


def example() -> list[str]:
    """What the table of an H200 says of one sequence of 4096 tokens, and of each token after it."""
    some = next(some for name, some, _ in works(MACHINES["h200"]) if name.startswith("linear layers"))
    lines = []
    for words, size in (("Reading the 4096 tokens, linear layers", 4096), ("Each token after them", 1)):
        span = next(span for span in spans(some, BINS) if span.sizes[0] <= size <= span.sizes[-1])
        told = [f"{bits} bits {each}" for bits, each in span.answers.items()]
        lines.append(f"- {words}: {'; '.join(told)}.")
    return lines


def emulated(machine: str) -> list[str]:
    """A warning where bfloat16 is no fair baseline of many tokens, for the machine is faster in float32."""
    base = [p for p in points() if (p.machine, p.benchmark, p.role) == (machine, "linear", "baseline")]
    most = max(base, key=lambda p: p.case["m"], default=None)
    if most is None or (best := load(most.stem)["ceilings"]).get("dtype") != "float32":
        return []
    rates = most.flops / most.seconds, best["flops_per_s"]
    low, high = (f"{rate / 1e9:.0f}" for rate in rates)
    text = f"**bfloat16 is slow here**: at {most.case['m']} tokens it reaches {low} GFLOP/s, a float32 product {high}."
    return ["", f"{text} Over float32 the gains at many tokens are {times(rates[1] / rates[0])} times smaller."]


MACHINES = {
    "h200": "NVIDIA H200",
    "h100": "NVIDIA H100",
    "xeon-amx": "Intel Xeon, AVX-512 and AMX",
    "xeon-avx512": "Intel Xeon, AVX-512, AMX left aside",
    "epyc-avx2": "AMD EPYC, AVX2",
}
TABLES: dict[str, Callable[[], list[str]]] = {"costs": costs, "example": example, "bags": bags}
for _key, _machine in MACHINES.items():
    TABLES[f"decide-{_key}"] = partial(decisions, _machine)
    TABLES[f"sources-{_key}"] = partial(sources, _machine)
    TABLES[f"linear-schemes-{_key}"] = partial(schemes, _machine, "linear")
for _key in ("h200", "h100"):
    TABLES[f"grouped-schemes-{_key}"] = partial(schemes, MACHINES[_key], "grouped")
