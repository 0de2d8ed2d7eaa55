"""Plain-text tables: aligned columns, alike names folded into one, sizes in binary units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod


def align(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Aligned lines, a heading first; columns without a cell are left out."""
    if not rows:
        return []
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    lines = [{column: column for column in columns}, *rows]
    return ["  ".join(f"{line[column]:{widths[column]}}" for column in columns).rstrip() for line in lines]


def fold(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ in whole-number parts only, written once and counted: `layers.{0..5}.mlp.weight`, 6."""
    folded = [tuple(frozenset([int(p)]) if _is_number(p) else p for p in name.split(".")) for name in names]
    for position in reversed(range(max(map(len, folded), default=0))):
        merged: dict[tuple[frozenset[int] | str | None, ...], set[int]] = {}
        for parts in folded:
            here = parts[position] if position < len(parts) else ""
            numbers = here if isinstance(here, frozenset) else None
            key = parts if numbers is None else (*parts[:position], None, *parts[position + 1 :])
            merged.setdefault(key, set()).update(numbers or ())
        folded = [
            tuple(frozenset(numbers) if part is None else part for part in key) for key, numbers in merged.items()
        ]
    return [
        (
            ".".join(part if isinstance(part, str) else _numbers(part) for part in parts),
            prod(len(part) for part in parts if not isinstance(part, str)),
        )
        for parts in folded
    ]


def _is_number(part: str) -> bool:
    # Longer ones are no counts, and Python refuses to convert those of 4300 digits.
    return part.isascii() and part.isdecimal() and len(part) < 19 and (part == "0" or part[0] != "0")


def _numbers(numbers: frozenset[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    text = ",".join("..".join(map(str, run)) for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def size(count: float) -> str:
    """Bytes as text, such as `1.5 MiB`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.4g} {units[0]}"
