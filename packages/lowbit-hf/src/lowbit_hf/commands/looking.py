"""`lowbit inspect`, `lowbit diff` and `lowbit schemes`: what there is."""

from __future__ import annotations

from dataclasses import asdict
from math import inf, isnan
from typing import Annotated, Any

import typer

from lowbit.command import DONE, PROBLEM
from lowbit.table import align, fold, size
from lowbit_hf.commands.options import AsJson, Model
from lowbit_hf.commands.running import say, say_json, subcommand
from lowbit_hf.hub import find_model
from lowbit_hf.progress import Meter
from lowbit_hf.schemes import ALIASES, SCHEMES


@subcommand("inspect", "lowbit inspect ./Qwen3-8B-W4A16")
def inspect(model: Model, as_json: AsJson = False) -> int:  # noqa: FBT002
    """Show what a checkpoint holds: every tensor's shape, format and bytes; alike layers in one line."""
    from lowbit_hf.difference import Weights  # noqa: PLC0415

    weights = Weights(find_model(model))
    rows = weights.describe()
    weights.close()
    if as_json:
        say_json(rows)
        return DONE
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["stored"]), []).append(row)
    cells = []
    for (shape, stored), alike in groups.items():
        total = sum(row["bytes"] for row in alike) / len(alike)
        for name, count in fold(row["name"] for row in alike):
            cells.append(
                {"tensor": name, "shape": "x".join(map(str, shape)), "stored": stored, "size": size(total * count)}
            )
    say("\n".join(align(cells)))
    say(f"\n{len(rows)} tensors, {size(sum(row['bytes'] for row in rows))}")
    return DONE


@subcommand("diff", "lowbit diff ./Qwen3-8B ./Qwen3-8B-W4A16")
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="the original")],
    b: Annotated[str, typer.Argument(metavar="B", help="what became of it")],
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Compare two checkpoints tensor by tensor, straight from disk, by SQNR (20 dB: the error is 10 % of the signal).

    Leaves with 1 if a tensor is in only one of them.
    """
    from lowbit_hf.difference import Weights, compare  # noqa: PLC0415

    first, second = find_model(a), find_model(b)
    weights = Weights(first)
    weights.close()
    with Meter("diff", len(weights.names)) as meter:
        found = compare(first, second, advance=lambda _: meter.advance(1))
    lost = bool(found.only_a or found.only_b)
    if as_json:
        told = asdict(found)
        say_json({"tensors": told.pop("differences"), **told})
        return PROBLEM if lost else DONE
    # A NaN is a difference too, and the worst.
    changed = sorted((d for d in found.differences if d.largest != 0), key=lambda d: -inf if isnan(d.sqnr) else d.sqnr)
    cells = [
        {
            "tensor": d.name,
            "A": d.stored_a,
            "B": d.stored_b,
            "SQNR dB": f"{d.sqnr:.2f}",
            "largest error": f"{d.largest:.3g}",
        }
        for d in changed
    ]
    say("\n".join(align(cells)))
    say(f"{chr(10) if cells else ''}{len(changed)} tensors differ, {len(found.differences) - len(changed)} are equal")
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            say(f"only in {side}: {', '.join(name for name, _ in fold(names))}")
    for side, names in (("A", found.caches_a), ("B", found.caches_b)):
        if names:
            say(f"for a key-value cache of few bits, in {side} alone: {', '.join(name for name, _ in fold(names))}")
    return PROBLEM if lost else DONE


@subcommand("schemes", "lowbit schemes --json")
def schemes(as_json: AsJson = False) -> int:  # noqa: FBT002
    """List the schemes that --to takes, with bits per weight; schemes of integers in groups also take _G and a size."""
    rows = [
        {
            "scheme": entry.name,
            "bits per weight": f"{entry.bits_per_weight:.3f}",
            "weights": str(entry.weight),
            "inputs": "as they are" if entry.activation is None else str(entry.activation),
            "file format": entry.file_format,
            "calibration": "needed" if entry.needs_data else "",
        }
        for entry in SCHEMES.values()
    ]
    if as_json:
        say_json(rows)
    else:
        say("\n".join(align(rows)))
        say("\nother names: " + ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items()))
    return DONE
