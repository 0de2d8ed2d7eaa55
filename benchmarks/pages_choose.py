"""Tables of docs/choose.md, by the names of their markers: other pages' answers at a glance."""

from __future__ import annotations

import json
from collections.abc import Callable

from pages_advice import BINS, Ratio, Span, spans
from pages_decide import MACHINES, works
from pages_decide import SCHEMES as TIMED
from pages_results import ROOT, load, table

from lowbit_hf.schemes import SCHEMES

# What `--algorithm` takes, and the methods of docs/quality.md that it is: the fit is for schemes that round inputs.
METHODS = {
    "`rtn`": ("rtn",),
    "`gptq`": ("+ fit to inputs", "+ scale search"),
    "`gptq+learned`": ("GPTQ + learned",),
}
MODELS = ("lm-tiny", "moe-tiny")


def machines() -> list[str]:
    """Each machine's answer for linear layers, at the fewest tokens that were measured and at the most."""
    rows = []
    for machine in MACHINES.values():
        some = next(some for name, some, _ in works(machine) if name.startswith("linear layers"))
        few, many = (at(some, size(ratio.size for ratio in some)) for size in (min, max))
        rows.append([machine, *few, *many])
    return table(["machine", "a token at a time, 8 bits", "4 bits", "many tokens, 8 bits", "4 bits"], rows)


def at(some: list[Ratio], size: float) -> list[str]:
    """The answers at one size, for 8 bits and for 4."""
    span: Span = next(span for span in spans(some, BINS) if size in span.sizes)
    return [str(span.answers[bits]) if bits in span.answers else "" for bits in (8, 4)]


def schemes() -> list[str]:
    """Schemes whose time or quality was measured, by size: what they lose by each method, and who reads them."""
    rises = {
        (model, row["scheme"], row["method"]): row["rise"]
        for model in MODELS
        for row in load(f"quality-{model}-h100-2026-11-27")["rows"]
        if row["method"]
    }
    readers, vllm = (
        json.loads((ROOT / "docs/interop" / f"{name}.json").read_text(encoding="utf-8"))["rows"]["dense"]
        for name in ("readers", "vllm")
    )
    rows = []
    for name, chosen in sorted(SCHEMES.items(), key=lambda entry: -entry[1].bits_per_weight):
        losses = [loss(rises, name, methods) for methods in METHODS.values()]
        if name in TIMED.values() or any(losses):
            served = [vllm[name][column]["mark"] if column in vllm[name] else "" for column in ("vllm", "plugin")]
            marks = [readers[name]["transformers"]["mark"], *served]
            rows.append([f"`{name}`", f"{chosen.bits_per_weight:.2f}", *losses, *marks])
    return table(["scheme", "bits", *METHODS, "transformers", "vLLM, CPU", "with the plugin"], rows)


def loss(rises: dict[tuple[str, str, str], float], scheme: str, methods: tuple[str, ...]) -> str:
    """How much perplexity rises on each model by the first of the methods that was measured; nothing where none was."""
    for method in methods:
        found = [rises[model, scheme, method] for model in MODELS if (model, scheme, method) in rises]
        if found:
            return "; ".join(f"{100 * rise:+.1f} %" for rise in found)
    return ""


TABLES: dict[str, Callable[[], list[str]]] = {"choose-machine": machines, "choose-scheme": schemes}
