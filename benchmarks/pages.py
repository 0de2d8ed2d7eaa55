"""Write what docs/*.md have between markers, and the plots, from the JSON in benchmarks/.

    lowbit bench linear --peers --json benchmarks/bench-linear-h100-2026-11-28.json
    python benchmarks/pages.py

A marker names what follows it up to the next `<!-- end -->`; the text around is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pages_choose
import pages_decide
import pages_tables
import pages_topics
from pages_results import ROOT, points, runs
from pages_summary import summary
from performance_plots import plot, timed

from lowbit.bench.results import read_results

IMAGES = ROOT / "docs" / "images"
PAGES = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in ("attention", "choose", "performance", "pt2e", "quality", "serving", "should-i-quantize", "training")
)
MARKED = re.compile(r"<!-- (?P<name>[\w-]+), by benchmarks/pages\.py -->\n(?P<text>.*?)<!-- end -->", re.DOTALL)


def summaries() -> list[str]:
    """Every machine that `lowbit bench` measured, those with the most results first."""
    lines: list[str] = []
    for machine in sorted({point.machine for point in points()}, key=order):
        lines += [f"### {machine}", "", *summary(machine), ""]
    return lines[:-1]


def order(machine: str) -> tuple[int, str]:
    """Machines in the order of docs/should-i-quantize.md, others after them."""
    known = list(pages_decide.MACHINES.values())
    return known.index(machine) if machine in known else len(known), machine


TABLES: dict[str, Callable[[], list[str]]] = {
    "summary": summaries,
    **pages_tables.TABLES,
    **pages_topics.TABLES,
    **pages_decide.TABLES,
    **pages_choose.TABLES,
}


def main() -> None:
    """Write the pages and the plots anew."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    for old in IMAGES.glob("bench-*.svg"):
        old.unlink()
    for name, image in images(runs()).items():
        (IMAGES / name).write_text(image, encoding="utf-8")


def filled(text: str) -> str:
    """The page with what the JSON gives between its markers."""
    return MARKED.sub(fill, text)


def fill(found: re.Match[str]) -> str:
    """A marker, its lines and the end."""
    name = found["name"]
    return "\n".join([f"<!-- {name}, by benchmarks/pages.py -->", "", *TABLES[name](), "", "<!-- end -->"])


def images(files: Sequence[Path]) -> dict[str, str]:
    """The plots of these files, by name."""
    return {f"{file.stem}.svg": plot(results) for file in files if timed(results := read_results(file))}


if __name__ == "__main__":
    main()
