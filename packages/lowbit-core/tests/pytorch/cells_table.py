"""Write the table of docs/pytorch.md from docs/cells/*.json, the outcomes that `nox -s cells` and `nox -s cuda` record.

python packages/lowbit-core/tests/pytorch/cells_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

from cells import KINDS

DOCS = Path(__file__).parents[4] / "docs"
PAGE = DOCS / "pytorch.md"
BEGIN, END = "<!-- from docs/cells by cells_table.py -->\n", "<!-- to here -->\n"
COLUMNS = {
    "torch.compile": "`torch.compile`",
    "torch.export": "`torch.export`",
    "AOTInductor": "AOTInductor",
    "FSDP2": "FSDP2",
    "DTensor column and row parallel": "DTensor, column and row parallel",
    "distributed.checkpoint": "`torch.distributed.checkpoint`",
    "CUDA graphs": "CUDA graphs",
    "functional_call": "`torch.func.functional_call`",
    "Module.to, half, share_memory": "`Module.to`, `half`, `share_memory`",
    "gradient through frozen weights": "gradient through frozen weights",
    "activation checkpointing": "activation checkpointing",
    "inference_mode and not": "`torch.inference_mode` and not",
}
MARKS = {"passed": "✓", "refused": "raises"}


def runs():
    """What each machine and torch recorded."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((DOCS / "cells").glob("*.json"))]


def table(recorded):
    """The table, and where each of its rows ran."""
    kinds = [kind for kind, *_ in KINDS]
    lines = ["| | " + " | ".join(kinds) + " | ran on |", "|---" * (len(kinds) + 2) + "|"]
    for column, title in COLUMNS.items():
        ran = [run for run in recorded if column in run["cells"]]
        cells = [cell([run["cells"][column] for run in ran], kind) for kind in kinds]
        where = ", ".join(f"{run['torch']} {run['device']}" for run in ran)
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {where} |")
    return "\n".join(lines) + "\n"


def cell(outcomes, kind):
    """How a format fared in 2-D and in 3-D, wherever it ran."""
    marks = [{MARKS[outcome[f"{kind}-{rank}d"]] for outcome in outcomes} for rank in (2, 3)]
    told = [" or ".join(sorted(mark)) for mark in marks]
    return told[0] if told[0] == told[1] else f"2-D {told[0]}, 3-D {told[1]}"


def page(text, recorded):
    """The page with this table in it."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table(recorded) + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), runs()), encoding="utf-8")
