"""docs/serving.md says of every checkpoint that was served what its file of figures says."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def line(row):
    """The table's line for a row of figures."""
    kernels = "lowbit's `" + "`, `".join(row["lowbit_runs"]) + "`" if row["lowbit_runs"] else "vLLM's"
    cells = [
        row["model"],
        f"`{row['scheme']}`",
        kernels,
        f"{row['same']} of {row['prompts']}",
        f"{row['tokens_before_a_difference']} of {row['tokens']}",
        f"{row['widest_gap']:.3f} ({row['gap_bound']:.3f})",
        f"{row['apart']:.3f} ({row['apart_bound']:.3f})",
        f"{row['start_s']:.0f} s" + (", compiled" if row["compiled"] else ""),
        f"{row['tokens_per_s']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_page_has_the_figures():
    page = (ROOT / "docs/serving.md").read_text()
    (file,) = ROOT.glob("benchmarks/serving-*.json")
    assert file.name in page
    missing = [line(row) for row in json.loads(file.read_text())["rows"] if line(row) not in page]
    assert not missing, "\n".join(missing)
