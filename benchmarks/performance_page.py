"""Write the plots and tables of "Kernels, measured" in docs/performance.md from benchmarks/bench-*.json.

    lowbit bench linear --peers --json benchmarks/bench-linear-h100-2026-11-28.json
    python benchmarks/performance_page.py

A row of a table is a case: lowbit beside its baseline and beside the fastest of the other libraries; or the baseline
beside those, of what lowbit does not have yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import exp, log
from pathlib import Path
from typing import Any

from performance_plots import fastest, measure, plot, seed, subject, timed

from lowbit.bench.results import decibels, headlines, in_words, notes, read_results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- from benchmarks/bench-*.json by performance_page.py -->\n", "<!-- to here -->\n"
NOTHING = "No results are committed yet.\n"


def main() -> None:
    """Write the page and its plots anew."""
    files = sorted(ROOT.glob("benchmarks/bench-*.json"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), files), encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    for old in IMAGES.glob("bench-*.svg"):
        old.unlink()
    for name, image in images(files).items():
        (IMAGES / name).write_text(image, encoding="utf-8")


def images(files: Sequence[Path]) -> dict[str, str]:
    """The plots of these files, by name."""
    return {image_of(file): plot(results) for file in files if timed(results := read_results(file))}


def image_of(file: Path) -> str:
    """The name of a file's plot."""
    return f"{file.stem}.svg"


def page(text: str, files: Sequence[Path]) -> str:
    """The page with the plots and tables of these files in it."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + ("\n" + ("\n".join(map(section, files)) or NOTHING) + "\n") + END + after


def section(file: Path) -> str:
    """The plot of one file, its sum, a table to unfold, and the machine."""
    results = read_results(file)
    device, versions, ceilings = headlines(results)
    lines = [f"### `{results['benchmark']}` on {results['environment']['device']}{seed(results)}", ""]
    if timed(results):
        lines += [f"![{results['benchmark']}: {measure(results)}]({IMAGES.name}/{image_of(file)})", ""]
    lines += [f"- {line}" for line in [*sums(results), *notes(results)]]
    if timed(results):
        lines += ["", *table(results)]
    lines += ["", f"{device}; {versions}; {ceilings}.", ""]
    return "\n".join([*lines, f"Source: [{file.name}](../benchmarks/{file.name}).", ""])


def table(results: dict[str, Any]) -> list[str]:
    """Every case, as HTML: not every Markdown has tables in what is unfolded."""
    rows = list(map(cells, timed(results)))
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    lines = ["".join(f"<th>{escape(column)}</th>" for column in columns)]
    lines += ["".join(f"<td>{escape(row[column])}</td>" for column in columns) for row in rows]
    lines = ["<table>", *(f"<tr>{line}</tr>" for line in lines), "</table>"]
    return ["<details>", f"<summary>Every case: {len(rows)}</summary>", *lines, "</details>"]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A case's row of the table."""
    ours, theirs = subject(row), fastest(row, "peer")
    base = ours["role"] == "baseline"
    return {name: str(value) for name, value in row["case"].items()} | {
        "kernel": (ours["name"] if base else ours["kernel"]) or "",
        "time": in_words(ours["seconds"]),
        "over baseline": "" if base else ratio(ours["speedup"]),
        "of ceiling": f"{100 * ours['of_ceiling']:.3g} %",
        "SQNR, dB": decibels(ours["sqnr"], "normal", "exact"),
        "with outliers": decibels(ours["sqnr"], "outliers", "exact"),
        "fastest other": "" if theirs is None else theirs["name"],
        "its SQNR, dB": "" if theirs is None else decibels(theirs["sqnr"], "normal", "exact"),
        "over it": "" if theirs is None else ratio(theirs["seconds"] / ours["seconds"]),
    }


def sums(results: dict[str, Any]) -> list[str]:
    """Geometric means of the ratios, and the least of each."""
    pairs = [(fastest(row, "candidate"), fastest(row, "peer")) for row in timed(results)]
    if not all(ours for ours, _ in pairs):
        return []
    ratios = {
        "the baseline": [ours["speedup"] for ours, _ in pairs if ours["speedup"] is not None],
        "the fastest other": [other["seconds"] / ours["seconds"] for ours, other in pairs if other is not None],
    }
    return [
        f"over {name}: {ratio(exp(sum(map(log, found)) / len(found)))} (geometric mean), {ratio(min(found))} at worst"
        for name, found in ratios.items()
        if found
    ]


def ratio(number: float | None) -> str:
    """A ratio with three digits."""
    return "" if number is None else f"{number:.3g}"


if __name__ == "__main__":
    main()
