"""What a recipe will do to a model, resolved and checked before anything is touched.

A plan has a row for every parameter: the rule that won it, the format it gets, bytes before and after, the kernel that
would run it on this machine, or why it is left as it is. Whatever cannot be done as the recipe says is an error, and
all such problems are told at once. Only names, shapes and dtypes are looked at, so models on the meta device and
checkpoints that were never loaded plan alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from math import prod
from typing import Final, Literal

import torch
from torch import Tensor, nn

from lowbit import backends
from lowbit.activation import Activation
from lowbit.errors import FormatError, NoKernelError, RecipeError
from lowbit.format import FORMATS, Format
from lowbit.numerics import data_shape, total_bytes
from lowbit.packed import PackedTensor
from lowbit.recipe import Recipe, Rule
from lowbit.table import align, fold, size
from lowbit.tensor import QuantizedTensor

_QUANTIZABLE: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Modules that look rows up in a table, which have nothing to round, and their ops.
_TABLES = {"Embedding": "embedding", "EmbeddingBag": "embedding_bag"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One name of a parameter, and what a plan needs to know of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    # Class names of the module that owns it, most derived first; () where unknown.
    modules: tuple[str, ...] = ()
    # The first name of the same tensor, where this is not the first.
    tied: str | None = None
    # Format and bytes of one that is quantized already.
    format: Format | None = None
    stored_bytes: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes it takes now."""
        return prod(self.shape) * self.dtype.itemsize if self.stored_bytes is None else self.stored_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """What happens to one parameter name, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    # `tied`: another name of the tensor of row `tied`, which carries the bytes and is what gets quantized.
    action: Literal["quantize", "keep", "tied"]
    # Match of the rule that decided it.
    rule: str | None
    # What it holds afterwards; None: plain values.
    format: Format | None
    activation: Activation | None
    k_axis: int
    bytes_before: int
    bytes_after: int
    # Name of the kernel that would run it; None where it stays plain, or no kernel runs it.
    kernel: str | None
    tied: str | None
    # Why it is kept, to what it is tied, or why no kernel runs it.
    reason: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Every parameter's row, in the model's order, and the totals; tied tensors count once."""

    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters now."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters once the plan is carried out."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def coverage(self) -> float:
        """Share of today's parameter bytes that will be, or already are, low-bit."""
        return sum(row.bytes_before for row in self.rows if row.format is not None) / max(self.bytes_before, 1)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits that a value of the quantized parameters takes, scales and zero points included."""
        rows = [row for row in self.rows if row.action == "quantize"]
        return 8 * sum(row.bytes_after for row in rows) / max(sum(prod(row.shape) for row in rows), 1)

    def to_json(self) -> str:
        """Totals and rows as JSON, formats as spec strings."""
        totals = ("bytes_before", "bytes_after", "coverage", "bits_per_weight")
        rows = [
            asdict(row)
            | {
                "dtype": _dtype(row),
                "format": None if row.format is None else str(row.format),
                "activation": None if row.activation is None else str(row.activation),
            }
            for row in self.rows
        ]
        return json.dumps({name: getattr(self, name) for name in totals} | {"parameters": rows}, indent=2)

    def __str__(self) -> str:
        """A table of what is quantized, the totals, and what is left with the reason; alike layers in one line."""
        kept = {row.name for row in self.rows if row.action == "keep"}
        left = [row for row in self.rows if kept.intersection((row.name, row.tied))]
        low = [row for row in self.rows if not kept.intersection((row.name, row.tied))]
        count = sum(row.action == "quantize" for row in low)
        totals = (
            f"{count} of {count + len(kept)} parameters become low-bit: coverage {self.coverage:.1%} of "
            f"{size(self.bytes_before)}, {self.bits_per_weight:.4g} bits per weight; "
            f"all parameters {size(self.bytes_before)} -> {size(self.bytes_after)}"
        )
        lines = [*align([_cells(*folded) for folded in _fold_rows(low)]), "", totals]
        if left:
            cells = [
                {"left as they are": name, "size": size(row.bytes_before * times), "because": row.reason or ""}
                for row, name, times in _fold_rows(left)
            ]
            lines += ["", *align(cells)]
        return "\n".join(lines)


def parameters_of(model: nn.Module) -> list[Parameter]:
    """Every name of every parameter of `model` (which may be on meta), tied ones under each of their names."""
    first: dict[int, str] = {}
    listed: list[Parameter] = []
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owner = type(model.get_submodule(name.rpartition(".")[0]))
        known = first.setdefault(id(tensor), name)
        fmt, stored = _held(tensor)
        classes = tuple(cls.__name__ for cls in owner.__mro__[:-1])
        tied = None if known == name else known
        listed.append(Parameter(name, tuple(tensor.shape), tensor.dtype, classes, tied, fmt, stored))
    return listed


def _held(tensor: Tensor) -> tuple[Format | None, int | None]:
    if isinstance(tensor, QuantizedTensor):
        return tensor.format, tensor.stored_bytes
    if isinstance(tensor, PackedTensor):
        return Format.parse(tensor.description.layout.format), total_bytes(tensor.parts)
    return None, None


def plan(
    parameters: nn.Module | Iterable[Parameter],
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    min_coverage: float = 0.0,
) -> Plan:
    """What `recipe` will do, kernels being those that a bound model would run on `device`; touches nothing.

    All names of a tied tensor are one decision: the rule that wins any of them holds for all. A pattern that quantizes
    passes over 0-D and 1-D parameters (biases, norms); an exact name means what it names.

    Raises:
        RecipeError: a rule matches nothing or only what earlier rules take, rules disagree about a tied tensor, a
            parameter does not fit the format its rule gives it, nothing is quantized, or coverage is below
            `min_coverage`; one message lists every problem.
    """
    if not 0 <= min_coverage <= 1:
        raise RecipeError(f"min_coverage is {min_coverage}; needed is a share of the bytes, from 0 to 1")
    listed = parameters_of(parameters) if isinstance(parameters, nn.Module) else list(parameters)
    winners = {p.name: next((rule for rule in recipe.rules if _speaks_of(rule, p)), None) for p in listed}
    problems = list(_idle_rules(recipe, listed, winners))
    misfits: dict[str, list[str]] = {}
    rows: dict[str, Row] = {}
    groups: dict[str, list[Parameter]] = {}
    kind = torch.device(device).type
    for parameter in listed:
        groups.setdefault(parameter.tied or parameter.name, []).append(parameter)
    for group in groups.values():
        rule, misfit = _decide(group, winners)
        if misfit is not None:
            misfits.setdefault(misfit, []).append(group[0].name)
        rows |= _rows(group, rule, fits=misfit is None, device=kind)
    result = Plan(tuple(rows[p.name] for p in listed))
    for text, names in misfits.items():
        alike = [repr(name) for name, _ in fold(names)]
        problems.append(f"{', '.join(alike)}{' each' if len(alike) > 1 else ''} {text}")
    if result.coverage < min_coverage:
        problems.append(_shortfall(result, min_coverage))
    if not problems and all(row.action != "quantize" for row in result.rows):
        problems.append(f"no rule quantizes anything; the model has {_some(list(rows))}")
    if problems:
        raise RecipeError("the recipe does not fit; nothing was changed:\n" + "\n".join(f"- {p}" for p in problems))
    return result


def _speaks_of(rule: Rule, parameter: Parameter) -> bool:
    """Whether a rule matches a parameter; a pattern that quantizes means weights, not the biases it happens to name."""
    means = rule.weight is None or rule.exact or len(parameter.shape) > 1
    return means and rule.matches(parameter.name, parameter.modules)


def _decide(group: Sequence[Parameter], winners: Mapping[str, Rule | None]) -> tuple[Rule | None, str | None]:
    """The rule for a tensor of several names, and what is wrong with it."""
    won = [(p.name, rule) for p in group if (rule := winners[p.name]) is not None]
    if not won:
        return None, None
    name, rule = won[0]
    for other, rival in won[1:]:
        if _outcome(rival) != _outcome(rule):
            return rule, (
                f"is tied: rule {rule.match!r} says {_outcome(rule)} for {name!r}, but rule {rival.match!r} says "
                f"{_outcome(rival)} for {other!r}, the same tensor; let one rule decide both names"
            )
    return rule, _misfit(group, rule)


def _outcome(rule: Rule) -> str:
    if rule.weight is None:
        return "keep"
    activation = "" if rule.activation is None else f" x {rule.activation}"
    return f"{rule.weight}{activation} along k_axis={rule.k_axis}"


def _misfit(group: Sequence[Parameter], rule: Rule) -> str | None:
    """Why the rule's formats cannot hold the tensor, worded to follow its name."""
    if rule.weight is None:
        return None
    first, by = group[0], f"rule {rule.match!r} gives it {rule.weight}"
    rank = len(first.shape)
    keep = "keep it by an earlier rule without a format, or narrow this one by modules"
    if first.format is not None:
        return f"is quantized already, to {first.format}, and {by}; dequantize it first, or {keep}"
    if first.dtype not in _QUANTIZABLE:
        return f"is {first.dtype}, and {by}; only float32, float16, bfloat16 and float64 are quantized; {keep}"
    if rank < 2:
        return f"is {rank}-D, and {by}, which needs rows and columns; {keep}"
    if not -rank <= rule.k_axis < rank:
        return f"is {rank}-D, and rule {rule.match!r} wants k_axis={rule.k_axis}; needed is {-rank} to {rank - 1}"
    return _axis_misfit(group, rule, rule.weight, by)


def _axis_misfit(group: Sequence[Parameter], rule: Rule, weight: Format, by: str) -> str | None:
    first = group[0]
    canonical = _canonical(first.shape, rule.k_axis)
    if rule.k_axis not in {-1, len(canonical) - 1} and any(_sums_last(p) for p in group):
        return f"is used along its last dim, and rule {rule.match!r} wants k_axis={rule.k_axis}; leave k_axis at -1"
    misfit = _shape_misfit(first, rule, weight, canonical, by)
    if misfit is None and rule.activation is not None:
        by = f"rule {rule.match!r} rounds its input to {rule.activation.format}"
        if any(_convolves(p) for p in group):
            why = rule.activation.convolution_misfit
            return None if why is None else f"is the weight of a convolution, and {by}: {why}"
        if any(_op(p) not in _TABLES.values() for p in group):
            misfit = _shape_misfit(first, rule, rule.activation.format, (1, canonical[-1]), by)
    return misfit


def _shape_misfit(parameter: Parameter, rule: Rule, fmt: Format, canonical: tuple[int, ...], by: str) -> str | None:
    try:
        fmt.scale_shape(canonical)
    except FormatError as error:
        k, group = canonical[-1], fmt.block[-1]
        if len(fmt.block) > len(canonical) or not group or k % group == 0:
            return f"has shape {parameter.shape}, and {by}: {error}"
        row = "INT8_ROW" if fmt.element.kind == "int" else "FP8_ROW"
        return (
            f"has k={k} (k_axis={rule.k_axis} of shape {parameter.shape}), not a multiple of block {group}, and {by}; "
            f"use {row} or pad{_other_axis(parameter, canonical[:-1], group)}"
        )
    return None


def _other_axis(parameter: Parameter, rest: tuple[int, ...], group: int) -> str:
    if _sums_last(parameter) or rest[-1] % group:
        return ""
    return f", or set k_axis to the dim of size {rest[-1]} if that is the one summed over"


def _sums_last(parameter: Parameter) -> bool:
    """Whether what the parameter is says where its columns are."""
    return parameter.name.rpartition(".")[2] == "weight" and not {"Linear", *_TABLES}.isdisjoint(parameter.modules)


def _rows(group: Sequence[Parameter], rule: Rule | None, *, fits: bool, device: str) -> dict[str, Row]:
    """A row for each name of one tensor, the first name's carrying the bytes."""
    first = group[0]
    fmt = rule.weight if rule is not None and fits else None
    k_axis = rule.k_axis if rule is not None and fmt is not None else -1
    after = first.bytes if fmt is None else _stored_bytes(_canonical(first.shape, k_axis), fmt)
    why = "no rule matches" if rule is None else f"{'kept by' if fits else 'does not fit'} rule {rule.match!r}"
    if first.format is not None:
        why += f" (it is {_name(first.format)} already)"
    # What is packed for one kernel another cannot read, so a weight of two uses stays unpacked.
    packs = len({_op(parameter) for parameter in group}) == 1
    rows: dict[str, Row] = {}
    for parameter in group:
        op = _op(parameter)
        # A table is indexed by its input, and has nothing to round.
        activation = None if rule is None or fmt is None or op in _TABLES.values() else rule.activation
        tied = None if parameter is first else first.name
        kernel, reason = None, why
        if fmt is not None:
            n, k = _canonical(parameter.shape, k_axis)[-2:]
            call = backends.Call(op, fmt, activation, device, parameter.dtype, n, k)
            kernel, reason = _kernel(call, parameter, packs=packs)
        rows[parameter.name] = Row(
            parameter.name,
            parameter.shape,
            parameter.dtype,
            "tied" if tied else "keep" if fmt is None else "quantize",
            None if rule is None else rule.match,
            fmt or first.format,
            activation,
            k_axis,
            0 if tied else first.bytes,
            0 if tied else after,
            kernel,
            tied,
            f"tied to {tied!r}" + (f"; {reason}" if reason else "") if tied else reason,
        )
    return rows


def _convolves(parameter: Parameter) -> bool:
    """Whether conv1d or conv2d uses the parameter."""
    return not {"Conv1d", "Conv2d"}.isdisjoint(parameter.modules)


def _op(parameter: Parameter) -> str:
    """The op of lowbit's own that uses the parameter; empty if none does."""
    for module, op in _TABLES.items():
        if module in parameter.modules:
            return op
    if len(parameter.shape) > 3 or "_ConvNd" in parameter.modules:
        return ""
    return "grouped_mm" if len(parameter.shape) == 3 else "linear"


def _kernel(call: backends.Call, parameter: Parameter, *, packs: bool) -> tuple[str | None, str | None]:
    """The kernel's name, or None and why there is none."""
    if _convolves(parameter):
        return None, "PyTorch's own convolution runs it, of dequantized values; there are no kernels to choose from"
    if not call.op:
        owner = parameter.modules[0] if parameter.modules else f"{len(parameter.shape)}-dimensional"
        return None, f"no operator takes {owner} weights; dequantize before use"
    try:
        return backends.select(call, bound=packs).kernel.name, None
    except NoKernelError as error:
        return None, str(error).splitlines()[0].rstrip(":")


def _canonical(shape: tuple[int, ...], k_axis: int) -> tuple[int, ...]:
    axis = k_axis % len(shape)
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])


def _stored_bytes(canonical: tuple[int, ...], fmt: Format) -> int:
    scale = fmt.scale.storage.itemsize + (0 if fmt.zero is None else fmt.zero.code_dtype.itemsize)
    tensor = 4 * prod(canonical[:-2]) if fmt.tensor_scale else 0
    data = prod(data_shape(canonical, fmt)) * fmt.element.storage.itemsize
    return data + prod(fmt.scale_shape(canonical)) * scale + tensor


def _idle_rules(recipe: Recipe, listed: Sequence[Parameter], winners: Mapping[str, Rule | None]) -> Iterator[str]:
    """What is wrong with each rule that won nothing."""
    won = {id(rule) for rule in winners.values()}
    for rule in recipe.rules:
        if id(rule) in won:
            continue
        named = [p for p in listed if rule.matches_name(p.name)]
        matched = [p for p in named if _speaks_of(rule, p)]
        vectors = [p for p in named if rule.matches(p.name, p.modules)]
        if vectors and not matched:
            yield (
                f"rule {rule.match!r} matches vectors only, such as {vectors[0].name!r}, and a pattern quantizes "
                "tensors of two or more dimensions"
            )
        elif matched:
            takers = dict.fromkeys(repr(taker.match) for p in matched if (taker := winners[p.name]) is not None)
            yield (
                f"rule {rule.match!r} never wins: {', '.join(takers)} before it takes all of the {len(matched)} it "
                "matches; move it up, or drop it"
            )
        elif named:
            classes = dict.fromkeys(p.modules[0] if p.modules else "an unknown class" for p in named)
            yield (
                f"rule {rule.match!r} is for modules of class {', '.join(rule.modules or ())}, but what it names, such "
                f"as {named[0].name!r}, belongs to {', '.join(classes)}"
            )
        else:
            yield f"rule {rule.match!r} matches no parameter; {_near(rule.match, [p.name for p in listed])}"


def _near(match: str, names: Sequence[str]) -> str:
    """Names that hold a part spelled much like a part of `match`, or that as a whole are much like it."""
    parts: dict[str, str] = {}
    alike: dict[str, str] = {}
    for name in names:
        for part in name.split("."):
            parts.setdefault(part, name)
        # Comparing one layer's names for all keeps this quick on models of many thousand experts.
        alike.setdefault(re.sub(r"\d+", "0", name), name)
    words = [word for word in re.findall(r"[A-Za-z_]\w*", match.removeprefix("re:")) if word not in parts]
    near = [parts[part] for word in words for part in get_close_matches(word, list(parts), n=1)]
    near = near or [alike[key] for key in get_close_matches(re.sub(r"\d+", "0", match), alike, cutoff=0.5)]
    return f"near it are {', '.join(map(repr, dict.fromkeys(near)))}" if near else f"the model has {_some(names)}"


def _some(names: Sequence[str]) -> str:
    few = ", ".join(map(repr, names[:3]))
    return f"{len(names)} parameter{'' if len(names) == 1 else 's'}" + (f", such as {few}" if few else "")


def _shortfall(result: Plan, min_coverage: float) -> str:
    left = [
        (name, count * row.bytes_before, row.reason) for row, name, count in _fold_rows(result.rows) if not row.format
    ]
    left.sort(key=lambda entry: -entry[1])
    largest = "; ".join(f"{name!r} ({size(count)}: {reason})" for name, count, reason in left[:5] if count)
    return (
        f"coverage is {result.coverage:.2%} of {size(result.bytes_before)}, below the {min_coverage:.2%} asked for; "
        f"the largest parameters left are {largest}"
    )


def _fold_rows(rows: Iterable[Row]) -> Iterator[tuple[Row, str, int]]:
    """Rows that say the same of names alike: one of them, the folded name, how many it stands for."""
    alike: dict[Row, list[Row]] = {}
    for row in rows:
        alike.setdefault(replace(row, name=""), []).append(row)
    for same in alike.values():
        for name, count in fold(row.name for row in same):
            yield same[0], name, count


def _cells(row: Row, name: str, count: int) -> dict[str, str]:
    assert row.format is not None
    return {
        "parameter": name,
        "count": str(count),
        "shape": "x".join(map(str, row.shape)),
        "dtype": _dtype(row),
        "rule": row.rule or "",
        "format": _name(row.format) + ("" if row.k_axis == -1 else f" k_axis={row.k_axis}"),
        "activation": "" if row.activation is None else f"{row.activation.scaling} {_name(row.activation.format)}",
        "before": size(row.bytes_before * count),
        "after": size(row.bytes_after * count),
        "kernel": row.kernel or "",
        "note": row.reason or "",
    }


def _name(fmt: Format) -> str:
    return next((name for name, known in FORMATS.items() if known == fmt), str(fmt))


def _dtype(row: Row) -> str:
    return str(row.dtype).removeprefix("torch.")
