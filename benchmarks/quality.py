"""What each algorithm is worth: perplexity of small trained models under every scheme, as docs/quality.md tables it.

    lowbit synthesize integration_tests/models/lm-tiny --from integration_tests/models/calibration.txt -o own.jsonl \
        --samples 384
    python benchmarks/quality.py integration_tests/models/lm-tiny --own own.jsonl --device cuda -o quality.json
    python benchmarks/quality.py --table quality.json

Calibrated on one text and evaluated on another. A difference from rounding to nearest has a 95 % interval, by
bootstrap over windows of the text that both were evaluated on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import Recipe, Rule
from lowbit.report import environment
from lowbit_algos import Method, calibrate_
from lowbit_algos.gptq import Options
from lowbit_hf import load
from lowbit_hf.evaluate import split_windows, tokenize
from lowbit_hf.schemes import scheme
from lowbit_hf.texts import Calibration

ROOT = Path(__file__).parents[1]
CALIBRATION = ROOT / "integration_tests" / "models" / "calibration.txt"
TEXT = ROOT / "packages" / "lowbit-hf" / "src" / "lowbit_hf" / "data" / "text.txt"
CONTEXT = 512
SCHEMES = (
    *("W8A8", "W8A8_STATIC", "W4A16", "W4A16_G32", "W3A16", "W2A16_G32", "MXFP8", "MXFP6A16", "MXFP4A16", "MXFP4"),
    *("MXFP4A16 floor", "NVFP4A16", "NVFP4", "W4AFP8"),
)
METHODS = {
    "rtn": Method(rounding="nearest"),
    "GPTQ": Method(options=Options(act_order=False, scale_search=False), refit=False),
    "+ act-order": Method(options=Options(scale_search=False), refit=False),
    "+ scale search": Method(refit=False),
    "+ fit to inputs": Method(),
    "AWQ": Method.of("awq"),
    "AWQ + GPTQ": Method.of("awq+gptq"),
    "SmoothQuant": Method.of("smoothquant"),
    "SmoothQuant + GPTQ": Method.of("smoothquant+gptq"),
    "rotation": Method(rotation=True, rounding="nearest"),
    "rotation + GPTQ": Method.of("rotation+gptq"),
    "learned": Method.of("learned"),
    "GPTQ + learned": Method.of("gptq+learned"),
    "AWQ + GPTQ + learned": Method.of("awq+gptq+learned"),
    "SmoothQuant + GPTQ + learned": Method.of("smoothquant+gptq+learned"),
    "GPTQ + distilled": Method.of("gptq+distilled"),
    "GPTQ + learned + distilled": Method.of("gptq+learned+distilled"),
    "the same, own text too": Method.of("gptq+learned+distilled"),
    "and SmoothQuant": Method.of("smoothquant+gptq+learned+distilled"),
}
OWN = ("the same, own text too", "and SmoothQuant")
# Not offered by schemes: e8m0 scales rounded down, as others' figures for MXFP4 are.
FLOOR = {
    "rtn": Method(rounding="nearest", mode="floor"),
    "GPTQ": Method(options=Options(act_order=False, scale_search=False), refit=False, mode="floor"),
    "+ act-order": Method(options=Options(scale_search=False), refit=False, mode="floor"),
}
# Left out where inputs stay as they are, and where they do not.
WITH_INPUTS = (
    "+ fit to inputs",
    "SmoothQuant",
    "SmoothQuant + GPTQ",
    "SmoothQuant + GPTQ + learned",
    "and SmoothQuant",
)
WITHOUT = ("AWQ", "AWQ + GPTQ", "AWQ + GPTQ + learned")


def losses(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Mean `-log p` of each window's tokens, float64 (windows,)."""
    device, found = next(model.parameters()).device, []
    with torch.inference_mode():
        for batch in windows.split(16):
            ids = batch.to(device)
            logs = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            found.append(-logs.gather(-1, ids[:, 1:, None]).squeeze(-1).double().mean(-1).cpu())
    return torch.cat(found)


def interval(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """95 % interval of the ratio of perplexities, less 1, over windows drawn again and again."""
    drawn = torch.randint(len(ours), (2000, len(ours)), generator=torch.Generator().manual_seed(0))
    low, high = (ours - theirs)[drawn].mean(1).expm1().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def recipe_of(name: str) -> Recipe:
    """What `lowbit quantize --to` does, for the two models here."""
    chosen = scheme(name)
    kept = tuple(Rule(match, None) for match in ("lm_head.weight", "re:.*mlp.gate.weight"))
    low = tuple(
        Rule(match, chosen.weight_format(torch.bfloat16), chosen.activation)
        for match in ("re:.*_proj.weight", "re:.*experts.*_proj")
    )
    return Recipe((*kept, *low))


def fitting(recipe: Recipe, names: set[str]) -> Recipe:
    """The rules that match anything."""
    return Recipe(tuple(rule for rule in recipe.rules if any(rule.matches(name) for name in names)))


def measured(
    folder: Path, schemes: list[str], methods: list[str], device: str, own: Path | None
) -> Iterator[dict[str, Any]]:
    """A row for each scheme and method; `own` is text that the model wrote."""
    windows = split_windows(tokenize(folder, TEXT), CONTEXT)
    batches = Calibration((CALIBRATION,), 128, CONTEXT).windows(folder).to(device).split(8)
    more = () if own is None else Calibration((CALIBRATION, own), 512, CONTEXT).windows(folder).to(device).split(8)
    base = losses(load(folder, device=device), windows)
    yield {"scheme": "bfloat16", "method": "", "perplexity": float(base.mean().exp())}
    for name in schemes:
        nearest = base
        plain, _, floor = name.partition(" ")
        left_out = (*(WITH_INPUTS if scheme(plain).activation is None else WITHOUT), *(() if more else OWN))
        for method, how in (FLOOR if floor else METHODS).items():
            if method in left_out or method not in {"rtn", *methods}:
                continue
            model, start = load(folder, device=device), time.monotonic()
            recipe = fitting(recipe_of(plain), {key for key, _ in model.named_parameters()})
            texts = more if method in OWN else batches
            calibrate_(model, recipe, ({"input_ids": batch, "use_cache": False} for batch in texts), how)
            seconds, found = time.monotonic() - start, losses(model, windows)
            nearest = found if method == "rtn" else nearest
            low, high = interval(found, nearest)
            yield {
                "scheme": name,
                "method": method,
                "perplexity": float(found.mean().exp()),
                "rise": float((found.mean() - base.mean()).expm1()),
                "against_rtn": [low, high],
                "seconds": seconds,
            }


def table(files: list[Path]) -> str:
    """The rises of perplexity as Markdown, one table a model, and the share of rtn's that the best recovers."""
    parts = []
    for file in files:
        told = json.loads(file.read_text())
        rows = {(row["scheme"], row["method"]): row for row in told["rows"]}
        methods = [method for method in METHODS if any(m == method for _, m in rows)]
        lines = [
            f"### {told['model']}",
            "",
            f"| | {' | '.join(methods)} | best recovers |",
            "|---" * (len(methods) + 2) + "|",
        ]
        for name in dict.fromkeys(name for name, method in rows if method):
            found = {method: rows[name, method]["rise"] for method in methods if (name, method) in rows}
            cells = [f"{100 * found[m]:+.2f} %" if m in found else "" for m in methods]
            best = 1 - min(found.values()) / found["rtn"] if found["rtn"] > 0 else 0.0
            lines.append(f"| {name} | {' | '.join(cells)} | {100 * best:.0f} % |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Measure a model, or table what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scheme", action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--own", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    if given.table:
        sys.stdout.write(table(given.table) + "\n")
        return
    rows = []
    for row in measured(
        given.model, given.scheme or list(SCHEMES), given.method or list(METHODS), given.device, given.own
    ):
        rows.append(row)
        sys.stderr.write(json.dumps(row) + "\n")
        told = {"model": given.model.name, "environment": environment(), "rows": rows}
        if given.out is not None:
            given.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
