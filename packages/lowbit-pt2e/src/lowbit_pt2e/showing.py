"""A comparison of two graphs as a page of HTML: one file, no requests, and nothing that names could run."""

from __future__ import annotations

import math
import re
from statistics import median
from typing import Final

from torch import nn

from lowbit.figures import NBSP, count, decibels, error, error_share, fixed, percent
from lowbit.markup import Column, Markup, code, element, table
from lowbit.page import document, section
from lowbit_pt2e.comparing import Compared, Comparison
from lowbit_pt2e.drawing import anchors, picture, style

_WORST: Final = 10
# Of a bar.
_LONG: Final = 96
_PLACE: Final = re.compile(r'from File "(?P<path>.*?)", line (?P<line>\d+), in [^:]*(?:: (?P<code>.*))?$', re.DOTALL)
_STYLE: Final = """
.drawing { overflow: auto; max-height: 90vh; border: 1px solid var(--rule); border-radius: 0.5rem; }
.drawing svg { display: block; margin: 0 auto; }
.n svg { display: inline-block; margin-left: 0.5rem; vertical-align: -0.0625rem; }
tbody th a { color: var(--accent); }
.at { white-space: nowrap; }
"""


def to_html(comparison: Comparison, model: nn.Module) -> str:
    """How far nodes of `model`, the changed graph of a comparison, depart: a table as they ran, and the graph.

    The page needs no other file and asks for none, in light and dark, for screens from a phone's up.

    Raises:
        GraphError: `model` is none that was exported.
    """
    rows = comparison.rows
    worst = _worst(rows)
    marked = [(rows[i].graph, rows[i].node) for i in worst]
    drawing = element(
        "div",
        picture(model, marked, alone=False),
        class_="drawing",
        # Only what has the focus can be scrolled from the keyboard.
        role="region",
        tabindex=0,
        aria_label="Graph",
    )
    title = "Where a graph departs"
    parts = [
        element("header", element("h1", title), element("p", _summary(rows))),
        section("Nodes", _intro(rows, worst), _table(rows, worst, anchors(model)) if rows else Markup()),
        section("Graph", element("p", "Where the pointer rests on a node, all of it is told."), drawing),
    ]
    return document(title, parts, _STYLE + style())


def _worst(rows: tuple[Compared, ...]) -> list[int]:
    """Which rows depart furthest, by SQNR: a tenth of those that depart, at least one and not too many."""
    apart = [i for i, row in enumerate(rows) if row.difference.sqnr != math.inf]
    apart.sort(key=lambda i: -math.inf if math.isnan(rows[i].difference.sqnr) else rows[i].difference.sqnr)
    return apart[: min(_WORST, -(-len(apart) // 10))]


def _summary(rows: tuple[Compared, ...]) -> str:
    if not rows:
        return "No node is in both graphs."
    middle = median(row.difference.sqnr for row in rows)
    return f"{count(len(rows), 'node')} beside what they stand for; of the median one {error(middle)}."


def _intro(rows: tuple[Compared, ...], worst: list[int]) -> Markup:
    if not worst:
        return element("p", "Nothing departs." if rows else "")
    row = rows[worst[0]]
    return element(
        "p",
        "In the order in which they ran. SQNR is how large values are against the error in them: higher is better, and "
        f"each 6{NBSP}dB more halve the error. Least is that of ",
        code(row.node),
        f", {decibels(row.difference.sqnr)}.",
    )


def _table(rows: tuple[Compared, ...], worst: list[int], anchors: dict[tuple[str, str], str]) -> Markup:
    finite = [row.difference.sqnr for row in rows if math.isfinite(row.difference.sqnr)]
    most = max([*finite, 1.0])
    nodes: list[str] = []
    for i, row in enumerate(rows):
        name, anchor = code(row.node), anchors.get((row.graph, row.node))
        linked = name if anchor is None else element("a", name, href=f"#{anchor}")
        mark = [" ", element("span", "worst", class_="marked")] if i in worst else []
        nodes.append(element("span", linked, *mark))
    return table(
        "Nodes",
        Column("Node", nodes),
        Column("SQNR, dB", [_bar(row, most, marked=i in worst) for i, row in enumerate(rows)], numeric=True),
        Column("Error", [percent(error_share(row.difference.sqnr)) for row in rows], numeric=True),
        Column("Largest difference", [f"{row.difference.largest:.3g}" for row in rows], numeric=True),
        Column("Operator", [code(row.operator.removesuffix(".default")) for row in rows]),
        Column("In the place of", [code(row.was) if row.was != row.node else "" for row in rows]),
        Column("In graph", [code(row.graph) if row.graph else "" for row in rows]),
        Column("From", [_source(row.source) for row in rows]),
        sortable=True,
    )


def _bar(row: Compared, most: float, *, marked: bool) -> Markup:
    sqnr = row.difference.sqnr
    long = _LONG if sqnr == math.inf else _LONG * max(sqnr, 0) / most if math.isfinite(sqnr) else 0
    # Even the least has something to see.
    bar = element("rect", width=max(long, 2), height=10, class_="bar marked" if marked else "bar")
    drawn = element("svg", bar, viewBox=f"0 0 {_LONG} 10", width=_LONG, height=10, aria_hidden="true")
    return element("span", fixed(sqnr, 1), drawn)


def _source(source: str) -> Markup:
    """The file's name, the line and what stands there; all of it where the pointer rests on it."""
    found = _PLACE.match(source)
    if found is None:
        return element("span", source)
    name = found["path"].replace("\\", "/").rpartition("/")[2]
    words = element("code", found["code"]) if found["code"] else ""
    return element("span", f"{name}:{found['line']} ", words, title=source, class_="at")
