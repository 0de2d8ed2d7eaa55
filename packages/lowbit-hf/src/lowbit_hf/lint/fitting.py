"""Which row of a runtime's table a config group fits, and what it lacks for the nearest one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowbit_hf.lint.arguments import Arguments, Group
from lowbit_hf.lint.table import Needs, Part, Row, Runtime

# What makes a scheme another one weighs more than a setting of it.
_IDENTITY, _INPUTS, _FORMAT, _SETTING = 100, 10, 2, 1


@dataclass(frozen=True, slots=True)
class Misfit:
    """One thing that keeps a config group from a row."""

    # Below the group's key.
    path: str
    given: object
    needed: str
    weight: int


def fit(runtime: Runtime, group: Group, part: Part) -> tuple[Row | None, list[Misfit]]:
    """The first row that takes the group; or the nearest one and what it lacks; or none where nothing is near."""
    nearest: tuple[Row | None, list[Misfit]] = (None, [])
    for row in runtime.rows:
        if part not in row.parts:
            continue
        lacking = list(_misfits(row, group))
        if not lacking:
            return row, []
        if not row.refusal and (nearest[0] is None or _sum(lacking) < _sum(nearest[1])):
            nearest = (row, lacking)
    return nearest if _sum(nearest[1]) < _IDENTITY else (None, nearest[1])


def _sum(misfits: list[Misfit]) -> int:
    return sum(misfit.weight for misfit in misfits)


def _misfits(row: Row, group: Group) -> Iterator[Misfit]:
    assert group.weights is not None
    if group.format not in row.formats:
        yield Misfit("format", group.format, _either(row.formats), _FORMAT)
    yield from _lacking("weights", group.weights, row.weights)
    if row.inputs == "any":
        return
    if row.inputs is None:
        if group.inputs is not None:
            yield Misfit("input_activations", _say(group.inputs), "null", _INPUTS)
    elif group.inputs is None:
        yield Misfit("input_activations", None, f"{row.inputs.bits[0]}-bit {row.inputs.kind}", _INPUTS)
    else:
        yield from _lacking("input_activations", group.inputs, row.inputs)


def _lacking(part: str, given: Arguments, needs: Needs) -> Iterator[Misfit]:
    identity = _IDENTITY if part == "weights" else _INPUTS
    if given.num_bits not in needs.bits:
        yield Misfit(f"{part}.num_bits", given.num_bits, _either(needs.bits), identity)
    if given.type != needs.kind:
        yield Misfit(f"{part}.type", given.type, repr(needs.kind), identity)
    if needs.strategies and given.strategy not in needs.strategies:
        yield Misfit(f"{part}.strategy", given.strategy, _either(needs.strategies), _SETTING)
    elif needs.groups and given.group_size not in needs.groups:
        yield Misfit(f"{part}.group_size", given.group_size, _either(needs.groups), _SETTING)
    if needs.symmetric is not None and given.symmetric != needs.symmetric:
        yield Misfit(f"{part}.symmetric", given.symmetric, str(needs.symmetric).lower(), _SETTING)
    if needs.dynamic and given.dynamic not in needs.dynamic:
        yield Misfit(f"{part}.dynamic", given.dynamic, _either(needs.dynamic), _SETTING)
    if needs.scale_dtype is not None and given.scale_dtype != needs.scale_dtype:
        yield Misfit(f"{part}.scale_dtype", given.scale_dtype, repr(needs.scale_dtype), _SETTING)


def _say(arguments: Arguments) -> str:
    return f"{arguments.num_bits}-bit {arguments.type}"


def _either(values: tuple[object, ...]) -> str:
    return " or ".join("null" if value is None else repr(value) for value in values)
