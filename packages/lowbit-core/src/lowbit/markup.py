"""HTML put together so that nothing gets into it unescaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_VOID: Final = {"meta", "wbr"}


class Markup(str):
    """HTML that stands as it is; any other text is escaped where an element takes it in.

    What is made of it by an f-string or by `+` is a plain string again, so that nothing is trusted by accident.
    """

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element; attributes that are None are left out, and `class_` and `data_x` are written class and data-x."""
    listed = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    end = "" if tag in _VOID else f"</{tag}>"
    return Markup(f"<{tag}{listed}>{join(children)}{end}")


def join(children: Iterable[str]) -> Markup:
    """The children one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else _escape(child) for child in children))


def code(name: str) -> Markup:
    """A dotted name, or several, which a narrow column may break after each dot."""
    pieces = re.split(r"(?<=[.,/])", name)
    broken = [part for piece in pieces if piece for part in (element("wbr"), piece)]
    return element("code", *broken[1:])


def plain(source: str) -> Markup:
    """What stands in a style or script element, which HTML does not unescape."""
    assert "</" not in source
    return Markup(source)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; numbers are set right."""

    title: str
    cells: Sequence[str]
    numeric: bool = False
    # What the title means, shown where the pointer rests on it.
    hint: str | None = None


def table(label: str, *columns: Column, sortable: bool = False) -> Markup:
    """A table that scrolls by itself where it is too wide; columns after the first without any text are left out."""
    shown = [columns[0], *(column for column in columns[1:] if any(column.cells))]
    sides = ["n" if column.numeric else None for column in shown]
    head = [
        element("th", column.title, scope="col", class_=side, title=column.hint)
        for column, side in zip(shown, sides, strict=True)
    ]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", class_=sides[0]),
            *(element("td", cell, class_=side) for cell, side in zip(row[1:], sides[1:], strict=True)),
        )
        for row in zip(*(column.cells for column in shown), strict=True)
    ]
    return element(
        "div",
        element(
            "table",
            element("thead", element("tr", *head)),
            element("tbody", *body),
            class_="sortable" if sortable else None,
        ),
        class_="scroll",
        # Only what has the focus can be scrolled from the keyboard.
        role="region",
        tabindex=0,
        aria_label=label,
    )


def _text(value: str | float) -> str:
    # A tenth of a pixel is finer than any screen.
    return value if isinstance(value, str) else f"{round(value, 1):.12g}"


def _escape(text: str) -> str:
    # A lone surrogate, as a file name that is not UTF-8 has, could not be written to the page's file.
    return html.escape(text.encode(errors="replace").decode())
