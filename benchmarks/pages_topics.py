"""The tables of docs/attention.md, pt2e.md, quality.md, serving.md and training.md, by the names of their markers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pages_results import BENCHMARKS, load, table, times
from pages_tables import H200, found, over

from lowbit import FP8_ROW, INT8_ROW

TRAINED = ("FP8_TENSOR", "FP8_ROW", "FP8_ROW_WGRAD_BF16", "FP8_BLOCK", "MXFP8", "NVFP4")
EXPERTS = {
    "16384 tokens of 4 experts, 8192x5120": {"m": 16384, "n": 8192, "k": 5120, "experts": 4},
    "65536 tokens of 8 experts, 2048x7168": {"m": 65536, "n": 2048, "k": 7168, "experts": 8},
}
LAYERS = {
    "feed-forward layer of Llama-3-8B, 16384 tokens": {"m": 16384, "k": 4096, "between": 14336},
    "8192 tokens, 2880 columns, 8192 between": {"m": 8192, "k": 2880, "between": 8192},
}


def attention() -> list[str]:
    """Over cuDNN, and operations a second, where codes run."""
    schemes, rows = ("INT8_FP8", "INT8_FP8_ROTATED", "FP8_HEAD"), []
    for s in (4096, 8192, 16384, 32768):
        for heads in ("32/32", "32/8"):
            for step in ("causal prefill", "causal prefill + RoPE", "prefill"):
                cells = [
                    found("attention", machine=H200, step=step, heads=heads, s=s, scheme=scheme) for scheme in schemes
                ]
                words = ["" if p is None else f"{over(p)} ({p.flops / p.seconds / 1e12:.0f})" for p in cells]
                rows.append([str(s), heads.partition("/")[2], step, *words])
    return table(["tokens", "heads of keys", "", *(f"`{scheme}`" for scheme in schemes)], rows)


def decode() -> list[str]:
    """One token over a cache of codes: microseconds, and over cuDNN."""
    rows = []
    for heads in ("32/32", "32/8"):
        case: dict[str, Any] = {"machine": H200, "step": "decode", "heads": heads, "s": 32768}
        base = found("attention", "torch cuDNN", **case, scheme="INT8_FP8")
        assert base is not None
        cells = [f"{1e6 * base.seconds:.1f}"]
        for form in (FP8_ROW, INT8_ROW):
            point = found("attention", **case, scheme=f"cache {form}")
            assert point is not None
            cells.append(f"{1e6 * point.seconds:.1f} ({over(point)}; {point.of_ceiling:.2f})")
        rows.append([heads.partition("/")[2], *cells])
    return table(["heads of keys", "cuDNN in bfloat16", "`FP8_ROW`", "`INT8_ROW`"], rows)


def llama3() -> list[str]:
    """A model: milliseconds of bfloat16, then each over it, and the most memory in GiB."""
    stems = [f"bench-llama3{of}-h200-2026-11-30" for of in ("", "-16384", "-32768")]
    measured = [row for stem in stems for row in load(stem)["rows"]]
    names = list(dict.fromkeys(each["name"] for row in measured for each in row["contenders"]))
    base = next(name for name in names if name.startswith("bfloat16"))
    names.remove(base)
    rows = []
    for step in ("prefill", "decode"):
        for row in measured:
            if row["case"]["step"] == step:
                of = {each["name"]: each for each in row["contenders"]}
                cells = [
                    f"{times(of[name]['speedup'])} ({of[name]['peak_bytes'] / 2**30:.1f})" if name in of else ""
                    for name in names
                ]
                plain = f"{1e3 * of[base]['seconds']:.1f} ({of[base]['peak_bytes'] / 2**30:.1f})"
                rows.append([step, str(row["case"]["s"]), plain, *cells])
    # What linear layers are, beside the attention of the first.
    heads = [f"`{name.removeprefix(f'{names[0]} ')}`" for name in names]
    return table(["", "tokens", base, *heads], rows)


def perplexities() -> list[str]:
    """A trained model's perplexity and the rise over bfloat16, in the cases of `lowbit bench llama3`."""
    (row,) = (row for row in load("quality-llama3-lm-tiny-xeon-2026-11-30")["rows"] if row["case"]["step"] == "prefill")
    base = next(each["perplexity"] for each in row["contenders"] if each["role"] == "baseline")
    rows = [
        [f"`{each['name']}`", f"{each['perplexity']:.3f}", f"{100 * (each['perplexity'] / base - 1):+.2f} %"]
        for each in row["contenders"]
        if each["role"] != "baseline"
    ]
    return table(["", f"perplexity ({base:.3f} in bfloat16)", "rise"], rows)


def graphs() -> list[str]:
    """Exported graphs on a CPU: milliseconds, and over float32."""
    told = load("graphs-xeon-2026-11-30")["rows"]
    names = {"resnet50": "ResNet-50, 1 image", "resnet50 x 16": "ResNet-50, 16 images"}
    names |= {"bert-base": "BERT-base, 128 tokens", "vit-b/16": "ViT-B/16, 1 image"}
    rows = []
    for model in dict.fromkeys(row["model"] for row in told):
        of = {row["contender"]: row for row in told if row["model"] == model}
        cells = [f"{1e3 * of['fp32']['seconds']:.1f}"]
        for name in ("lowbit", "lowbit dynamic", "torchao"):
            row = of.get(name)
            cells.append("" if row is None else f"{1e3 * row['seconds']:.1f} ({times(row['over_fp32'])})")
        rows.append([names[model], *cells, times(of["torchao"]["seconds"] / of["lowbit"]["seconds"])])
    return table(
        [
            *("", "float32", "static, oneDNN", "dynamic, lowbit's kernels"),
            *("torchao 0.18, X86InductorQuantizer", "static over torchao"),
        ],
        rows,
    )


def training() -> list[str]:
    """Layers, experts and wgrad by recipe."""
    rows = []

    def row(label: str, benchmark: str, case: dict[str, Any], names: dict[str, str]) -> None:
        """Times of the baseline, and what each recipe's contender is over it."""
        cells = {
            recipe: found(benchmark, names.get(recipe, names.get("", "")), machine=H200, recipe=recipe, **case)
            for recipe in TRAINED
        }
        base = found(benchmark, "bfloat16", machine=H200, recipe="FP8_ROW", **case)
        took = "" if base is None or "" not in names else f"{1e3 * base.seconds:.1f}"
        rows.append([label, took, *(over(cells[recipe]) for recipe in TRAINED)])

    ours = {"": "lowbit"}
    first, second = LAYERS.items()
    row(first[0], "ffn", first[1], ours)
    row(
        "torchao 0.18 there",
        "ffn",
        first[1],
        {"FP8_TENSOR": "torchao float8 tensorwise", "FP8_ROW": "torchao float8 rowwise"},
    )
    row(second[0], "ffn", second[1], ours)
    for benchmark, label in (("experts", "{}, uneven groups"), ("wgrad", "their wgrad alone, rounded already: {}")):
        for words, case in EXPERTS.items():
            row(label.format(words), benchmark, case, ours)
    emulated = [f"{recipe}, emulated" if recipe in {"MXFP8", "NVFP4"} else recipe for recipe in TRAINED]
    return table(["", "bfloat16, ms", *emulated], rows)


def optimizer() -> list[str]:
    """A step of AdamW."""
    lines = {
        "torch AdamW, fused": (8, "torch AdamW, fused"),
        "8 bits, parameters by chance": (8, "lowbit"),
        "8 bits, to nearest": (8, "lowbit, parameters to nearest"),
        "4 bits, parameters by chance": (4, "lowbit"),
        "4 bits, to nearest": (4, "lowbit, parameters to nearest"),
        "torchao 0.18, 8 bits": (8, "torchao AdamW8bit"),
        "torchao 0.18, 4 bits": (4, "torchao AdamW4bit"),
    }
    rows = []
    for label, (bits, name) in lines.items():
        point = found("optimizer", name, machine=H200, bits=bits)
        assert point is not None, label
        rows.append([label, f"{1e3 * point.seconds:.3g}", over(point), f"{point.of_ceiling:.2f}"])
    return table(["", "ms", "over torch, fused", "of a copy's bandwidth"], rows)


def exchange() -> list[str]:
    """Tokens on their way between two GPUs."""
    told = load("exchange-h200-2026-11-29")["rows"]
    shape = ("tokens", "width", "experts", "chosen")
    rows = []
    for key in dict.fromkeys(tuple(row[name] for name in shape) for row in told):
        of = {row["payload"]: row for row in told if tuple(row[name] for name in shape) == key}
        alone = {name: row["alone"] for name, row in of.items()}
        low = [f"{1e6 * alone[p]['seconds']:.0f} ({times(alone[p]['over_bfloat16'])})" for p in ("MXFP8", "FP8_ROW")]
        mib = of["BF16"]["bfloat16_bytes"] / 2**20
        rows.append([", ".join(map(str, key)), f"{mib:.0f}", f"{1e6 * alone['BF16']['seconds']:.0f}", *low])
    return table(["tokens, width, experts, chosen", "MiB of bfloat16", "bfloat16", "MXFP8", "FP8_ROW"], rows)


def losses() -> list[str]:
    """What recipes end at; percentages over the mean of both seeds of BF16."""
    recipes, rows = ("FP8_ROW", "MXFP8", "NVFP4"), []
    for label, model in (("dense", "dense"), ("experts", "moe")):
        ends: dict[str, list[float]] = {}
        for run in load(f"training-{model}-long-h200-2026-11-29")["runs"]:
            ends.setdefault(run["recipe"], []).append(run["losses"][-1][1])
        base = mean_of(ends["BF16"])
        cells = [f"{words(ends[recipe])} ({100 * (mean_of(ends[recipe]) / base - 1):+.2f} %)" for recipe in recipes]
        rows.append([label, words(ends["BF16"]), *cells])
    return table(["", "BF16, another seed", *recipes], rows)


def mean_of(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def words(values: list[float]) -> str:
    """Losses, with four decimals."""
    return ", ".join(f"{value:.4f}" for value in values)


def serving() -> list[str]:
    """Answers of vLLM beside lowbit's."""
    rows = []
    for row in load("serving-xeon-2026-11-27")["rows"]:
        kernels = ", ".join(f"`{op}`" for op in row["lowbit_runs"])
        rows.append(
            [
                row["model"],
                f"`{row['scheme']}`",
                f"lowbit's {kernels}" if kernels else "vLLM's",
                f"{row['same']} of {row['prompts']}",
                f"{row['tokens_before_a_difference']} of {row['tokens']}",
                f"{row['widest_gap']:.3f} ({row['gap_bound']:.3f})",
                f"{row['apart']:.3f} ({row['apart_bound']:.3f})",
                f"{row['start_s']:.0f} s{', compiled' if row['compiled'] else ''}",
                f"{row['tokens_per_s']:.0f}",
            ]
        )
    return table(
        [
            *("model", "scheme", "kernels", "prompts answered alike", "tokens before a difference"),
            *("preference at a difference (bound)", "log-probabilities apart, root mean square (bound)"),
            *("start", "tokens/s"),
        ],
        rows,
    )


def quality() -> list[str]:
    """Perplexity by scheme and method."""
    from quality import table as by_scheme  # importing it takes seconds

    files = [BENCHMARKS / f"quality-{name}-h100-2026-11-27.json" for name in ("lm-tiny", "moe-tiny")]
    return by_scheme(files).split("\n")


TABLES: dict[str, Callable[[], list[str]]] = {
    "attention-h200": attention,
    "attention-cached-h200": decode,
    "llama3-h200": llama3,
    "llama3-lm-tiny": perplexities,
    "graphs": graphs,
    "training-h200": training,
    "optimizer-h200": optimizer,
    "exchange-h200": exchange,
    "training-losses": losses,
    "serving": serving,
    "quality": quality,
}
