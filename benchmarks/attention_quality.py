"""What 8-bit attention costs small trained models: perplexity by each scheme, as docs/attention.md tables it.

    python benchmarks/attention_quality.py integration_tests/models/{lm,moe}-tiny -o attention.json

By the reference, on the text that `lowbit eval` takes. The rise over attention in bfloat16 has a 95 % interval, by
bootstrap over windows of 512 tokens, the models' context.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quality import CONTEXT, TEXT, interval, losses

from lowbit.attention import SCHEMES
from lowbit.report import environment
from lowbit_hf import load
from lowbit_hf.attention import round_attention
from lowbit_hf.evaluate import split_windows, tokenize


def measured(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """A row for attention as the model has it, and for each scheme."""
    windows = split_windows(tokenize(folder, TEXT), CONTEXT)
    model = load(folder, device=device)
    base = losses(model, windows)
    yield {"model": folder.name, "scheme": "bfloat16", "perplexity": float(base.mean().exp())}
    for name, scheme in SCHEMES.items():
        round_attention(model, scheme)
        found = losses(model, windows)
        yield {
            "model": folder.name,
            "scheme": name,
            "perplexity": float(found.mean().exp()),
            "rise": float((found.mean() - base.mean()).expm1()),
            "interval": interval(found, base),
        }


def main() -> None:
    """Measure the models, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for folder in given.models:
        for row in measured(folder, given.device):
            rows.append(row)
            sys.stderr.write(json.dumps(row) + "\n")
    given.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
