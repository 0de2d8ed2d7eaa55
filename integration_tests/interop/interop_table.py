"""Who reads what lowbit writes: every scheme, by every reader, and what keeps the others from it.

`LOWBIT_INTEROP=1 pytest integration_tests/interop -n 0` records docs/interop/readers.json, the session
`serving` records docs/interop/vllm.json, and `python integration_tests/interop/interop_table.py` makes docs/interop.md of both.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "interop.md"
READERS, VLLM = DOCS / "interop/readers.json", DOCS / "interop/vllm.json"
BEGIN, END = "<!-- from docs/interop by interop_table.py -->\n", "<!-- to here -->\n"
MODELS = {"dense": "Linear layers", "experts": "Mixtures of experts"}
VLLM_COLUMNS = {"vllm": "vLLM, CPU", "plugin": "with the plugin"}


def page(text, readers, vllm):
    """The page with these tables in it."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + tables(readers, vllm) + END + after


def tables(readers, vllm):
    """A table for each kind of model, and the reasons that their cells name by number."""
    reasons = {}
    parts = []
    for model, title in MODELS.items():
        rows = readers["rows"][model]
        columns = list(next(iter(rows.values())))
        lines = [
            f"| {title} | " + " | ".join([*columns, *VLLM_COLUMNS.values()]) + " |",
            "|---" * (len(columns) + len(VLLM_COLUMNS) + 1) + "|",
        ]
        for scheme, cells in rows.items():
            served = vllm["rows"].get(model, {}).get(scheme, {})
            told = [cell(cells[column], reasons) for column in columns]
            told += [cell(served[column], reasons) if column in served else "" for column in VLLM_COLUMNS]
            lines.append(f"| `{scheme}` | " + " | ".join(told) + " |")
        parts.append("\n".join(lines))
    listed = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    versions = ", ".join(f"{name} {version}" for name, version in (readers["versions"] | vllm["versions"]).items())
    return "\n\n".join(["", *parts, f"Ran with {versions}. The numbers:", listed, ""])


def cell(outcome, reasons):
    """What a reader makes of it: a mark, and the number of the reason why it is no better."""
    mark, why = outcome["mark"], outcome.get("why")
    return mark if why is None else f"{mark} ({reasons.setdefault(plainly(why), len(reasons) + 1)})".strip()


def plainly(error):
    """An error's reason in one line, without what is of this model alone."""
    text = " ".join(str(error).split())
    text = text.partition("cannot be written as ")[2].partition(": ")[2] or text
    text = re.sub(
        r"^it is [^,]*, and |, none of which is .*|, not \S*( with \S* inputs)?$|, and these are rounded.*", "", text
    )
    text = re.sub(r"(model\.layers\.|num_bits=)\d+", r"\1N", text)
    text = re.sub(r"torch\.Size\(\[[\d, ]*\]\)|\(\d+(, \d+)*,?\)", "(...)", text)
    return text[:160]


if __name__ == "__main__":
    recorded = [json.loads(path.read_text(encoding="utf-8")) for path in (READERS, VLLM)]
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), *recorded), encoding="utf-8")
