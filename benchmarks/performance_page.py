"""Write the tables of "Kernels on GPUs" in docs/performance.md from benchmarks/bench-*.json.

    lowbit bench linear --peers --json benchmarks/bench-linear-h100-2026-11-27.json
    python benchmarks/performance_page.py

A row of a table is a case: lowbit beside its baseline and beside the fastest of the other libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

from lowbit.bench.results import decibels, headlines, in_words, notes, read_results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- from benchmarks/bench-*.json by performance_page.py -->\n", "<!-- to here -->\n"
NOTHING = "No results are committed yet.\n"


def main() -> None:
    """Write the page anew."""
    PAGE.write_text(
        page(PAGE.read_text(encoding="utf-8"), sorted(ROOT.glob("benchmarks/bench-*.json"))), encoding="utf-8"
    )


def page(text: str, files: Sequence[Path]) -> str:
    """The page with the tables of these files in it."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + ("\n" + ("\n".join(map(section, files)) or NOTHING) + "\n") + END + after


def section(file: Path) -> str:
    """The machine, a table and its sum for one file."""
    results = read_results(file)
    rows = [told for row in results["rows"] if (told := cells(row)) is not None]
    device, versions, ceilings = headlines(results)
    drawn = "" if results["shapes_seed"] is None else f", shapes drawn by seed {results['shapes_seed']}"
    lines = [
        f"### `{results['benchmark']}` on {results['environment']['device']}{drawn}",
        "",
        f"{device}; {versions}; {ceilings}.",
        "",
    ]
    if rows:
        columns = [column for column in rows[0] if any(row[column] for row in rows)]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    lines += ["", *(f"- {line}" for line in [*sums(results["rows"]), *notes(results)]), ""]
    return "\n".join([*lines, f"Source: [{file.name}](../benchmarks/{file.name}).", ""])


def cells(row: dict[str, Any]) -> dict[str, str] | None:
    """A case's row of the table; None where lowbit has no time."""
    ours, theirs = candidate(row), best_peer(row)
    if ours is None:
        return None
    return {name: str(value) for name, value in row["case"].items()} | {
        "kernel": ours["kernel"] or "",
        "time": in_words(ours["seconds"]),
        "over baseline": ratio(ours["speedup"]),
        "of ceiling": f"{100 * ours['of_ceiling']:.3g} %",
        "SQNR, dB": decibels(ours["sqnr"], "normal", "exact"),
        "with outliers": decibels(ours["sqnr"], "outliers", "exact"),
        "fastest other": "" if theirs is None else theirs["name"],
        "its SQNR, dB": "" if theirs is None else decibels(theirs["sqnr"], "normal", "exact"),
        "over it": "" if theirs is None else ratio(theirs["seconds"] / ours["seconds"]),
    }


def sums(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Geometric means of the ratios, and the least of each."""
    timed = [(ours, best_peer(row)) for row in rows if (ours := candidate(row)) is not None]
    ratios = {
        "the baseline": [ours["speedup"] for ours, _ in timed if ours["speedup"] is not None],
        "the fastest other": [other["seconds"] / ours["seconds"] for ours, other in timed if other is not None],
    }
    return [
        f"over {name}: {ratio(exp(sum(map(log, found)) / len(found)))} (geometric mean), {ratio(min(found))} at worst"
        for name, found in ratios.items()
        if found
    ]


def candidate(row: dict[str, Any]) -> dict[str, Any] | None:
    """What lowbit did, if it was timed."""
    return next((each for each in row["contenders"] if each["role"] == "candidate" and "seconds" in each), None)


def best_peer(row: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest of the other libraries, if any was timed."""
    peers = [each for each in row["contenders"] if each["role"] == "peer" and "seconds" in each]
    return min(peers, key=lambda each: each["seconds"], default=None)


def ratio(number: float | None) -> str:
    """A ratio with three digits."""
    return "" if number is None else f"{number:.3g}"


if __name__ == "__main__":
    main()
