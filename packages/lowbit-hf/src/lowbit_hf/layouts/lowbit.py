"""lowbit's own layout, for what no other one holds: any format, any input rounding, matrices and stacks, `pre_scale`.

A weight is stored as the plain tensors inside it, `PARAMETER:qdata`, `PARAMETER:scale` and so on, canonical as
`lowbit.tensor` has them: codes (N, K), K last, however the model keeps the parameter. The colon is there because
parameters of models may be called `scale`, but none has a colon in its name.

    qdata, scale, zero, tensor_scale   as the format says
    act_scale, act_zero                (1, 1): how inputs are rounded, where that is not dynamic
    pre_scale                          float32 (K,): what inputs are multiplied by first; ones stand for none
    columns                            int64 (): K, where rows of codes end in padding

`config.json` has `{"quant_method": "lowbit", "version": 1, "rules": [...]}`; of the rules, which are a recipe's, the
first that matches a parameter's name says what its codes mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.errors import CheckpointError, RecipeError
from lowbit.format import Format
from lowbit.numerics import Scales, data_shape
from lowbit.packing import unit
from lowbit.recipe import VERSION as RECIPE_VERSION
from lowbit.recipe import Recipe, Rule
from lowbit.tensor import INNER, QuantizedTensor, tail_of
from lowbit_hf.layouts.layout import Entry, Layout, Outline, Writer, take
from lowbit_hf.patterns import PREFIX, Pattern
from lowbit_hf.skeleton import Skeleton

VERSION = 1
"""Version of the layout; a config of a newer one is refused with the version that it needs."""

COLUMNS = "columns"
PARTS = (*INNER, COLUMNS)
"""Local names that a stored weight may have."""

_KEYS = {"quant_method", "version", "rules"}
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d*)(?=\.)")


class Lowbit(Layout):
    """Reads lowbit's layout."""

    method = "lowbit"
    marks = frozenset({"qdata"})
    parts = frozenset(PARTS)
    told = frozenset({COLUMNS, "pre_scale"})

    def __init__(self, quantization: Mapping[str, Any], skeleton: Skeleton | None) -> None:
        """Read a config."""
        super().__init__(quantization, skeleton)
        # How each rule of the recipe is asked: expressions are bounded in time, as globs are by what they are.
        self._rules = [
            (
                rule,
                Pattern(rule.match.removeprefix(PREFIX)).fits if rule.match.startswith(PREFIX) else rule.matches_name,
            )
            for rule in read_rules(quantization).rules
        ]

    def modules(self, names: Collection[str]) -> dict[str | None, list[str]]:
        """See `Layout`.

        Raises:
            CheckpointError: a weight is there twice, quantized and plain.
        """
        found = super().modules(names)
        if twice := sorted(set(found[None]).intersection(module for module in found if module is not None)):
            msg = f"{twice[0]!r} is stored twice, quantized and plain; the folder is damaged"
            raise CheckpointError(msg)
        return found

    def split(self, name: str) -> tuple[str, str]:
        """See `Layout`; a module is a parameter here."""
        parameter, colon, local = name.rpartition(":")
        return (parameter, local) if colon else (name, "")

    def weight_name(self, module: str) -> str:
        """See `Layout`."""
        return module

    def transposed(self, module: str) -> bool:
        """See `Layout`; experts that are stored as a stack may be (E, K, N) in the model."""
        owner = None if self.skeleton is None else self.skeleton.owner(module)
        if owner is None or self.skeleton is None or owner.stacked:
            return False
        return "Conv1D" in owner.classes or owner.name in self.skeleton.transposed

    def meaning(self, parameter: str) -> Rule | None:
        """The rule that says what a parameter's codes mean; None: none does."""
        return next((rule for rule, fits in self._rules if rule.modules is None and fits(parameter)), None)

    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """See `Layout`."""
        found = self.read(module, parts)
        given = None if found.tensor_scale is None else tuple(found.tensor_scale.shape)
        return Outline(
            tuple(found.shape), found.format, found.activation, found.dtype, found.pre_scale is not None, given
        )

    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """See `Layout`."""
        rule = self.meaning(module)
        if rule is None or rule.weight is None:
            msg = "it has quantized tensors, but no rule of quantization_config says what they mean"
            raise CheckpointError(msg)
        fmt, activation = rule.weight, rule.activation
        qdata, scale = _take(parts, "qdata"), _take(parts, "scale")
        if qdata.dim() < 2:
            msg = f"qdata has shape {tuple(qdata.shape)}; needed are rows of codes, (N, K) or stacks of those"
            raise CheckpointError(msg)
        act_scale, act_zero = _of_inputs(activation, parts)
        return QuantizedTensor.from_parts(
            qdata,
            Scales(scale, parts.get("zero"), parts.get("tensor_scale")),
            fmt,
            k=_columns(qdata, fmt, parts),
            dtype=self.dtype,
            activation=activation,
            act_scale=act_scale,
            act_zero=act_zero,
            pre_scale=_pre_scale(parts),
        )


class LowbitWriter(Writer):
    """Writes lowbit's layout, which holds every weight."""

    name = "lowbit"
    smoothed = True

    def refusal(self, outline: Outline) -> str | None:
        """See `Writer`."""
        del outline

    def module_of(self, weight: str) -> str:
        """See `Writer`."""
        return weight

    def join(self, module: str, local: str) -> str:
        """See `Writer`."""
        return f"{module}:{local}"

    def entries(self, outline: Outline) -> list[Entry]:
        """See `Writer`."""
        fmt, shape, activation = outline.format, outline.shape, outline.activation
        natural = fmt.scale_shape(shape)
        made: list[Entry] = [
            ("qdata", fmt.element.storage, data_shape(shape, fmt)),
            ("scale", fmt.scale.storage, natural),
        ]
        if fmt.zero is not None:
            made.append(("zero", fmt.zero.code_dtype, natural))
        if fmt.tensor_scale:
            made.append(("tensor_scale", torch.float32, outline.tensor_scale or (*shape[:-2], 1, 1)))
        if activation is not None and activation.scaling != "dynamic":
            made.append(("act_scale", torch.float32, (1, 1)))
            if activation.scaling == "static" and activation.format.zero is not None:
                made.append(("act_zero", activation.format.zero.code_dtype, (1, 1)))
        if outline.pre_scale:
            made.append(("pre_scale", torch.float32, shape[-1:]))
        if tail_of(fmt, shape[-1]):
            made.append((COLUMNS, torch.int64, ()))
        return made

    def tensors(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Writer`.

        Raises:
            CheckpointError: its inputs are to be rounded by a scale that it does not have.
        """
        stored = dict(weight.inner_tensors())
        k, activation = weight.canonical_shape[-1], weight.activation
        if activation is not None and activation.scaling != "dynamic" and weight.act_scale is None:
            msg = f"{activation} needs an input scale, and the weight has none; calibrate it first"
            raise CheckpointError(msg)
        for name in ("act_scale", "act_zero"):
            if name in stored:
                stored[name] = stored[name].reshape(1, 1)
        for name in ("act_scale", "pre_scale"):
            if name in stored:
                stored[name] = stored[name].to(torch.float32)
        if tail_of(weight.format, k):
            stored[COLUMNS] = torch.tensor(k)
        return stored

    def config(
        self, outlines: Mapping[str, Outline], ignored: Sequence[str], named: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `Writer`."""
        del ignored, named
        meanings = {name: (str(o.format), o.activation and str(o.activation)) for name, o in outlines.items()}
        return {"quant_method": self.name, "version": VERSION, "rules": _rules(meanings)}


def read_rules(quantization: Mapping[str, Any]) -> Recipe:
    """The rules of a `quantization_config`.

    Raises:
        CheckpointError: it is of a newer version, or malformed.
    """
    version = quantization.get("version")
    if type(version) is not int or version < 1:
        msg = f"quantization_config has version {version!r}; needed is a positive integer; the config is damaged"
        raise CheckpointError(msg)
    if version > VERSION:
        msg = (
            f"quantization_config is of lowbit's layout version {version}, and this lowbit-hf reads up to {VERSION}; "
            f"install one that reads version {version}: pip install --upgrade lowbit-hf"
        )
        raise CheckpointError(msg)
    if unknown := set(quantization) - _KEYS:
        msg = f"quantization_config has unknown keys {', '.join(sorted(unknown))}; known are {', '.join(sorted(_KEYS))}"
        raise CheckpointError(msg)
    try:
        return Recipe.from_json(json.dumps({"version": RECIPE_VERSION, "rules": quantization.get("rules")}))
    except RecipeError as error:
        msg = f"the rules of quantization_config cannot be read: {error}"
        raise CheckpointError(msg) from error


def _take(parts: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        msg = f"tensor {name!r} is missing; the weight has {', '.join(sorted(parts))}"
        raise CheckpointError(msg)
    return parts[name]


def _columns(qdata: Tensor, fmt: Format, parts: Mapping[str, Tensor]) -> int:
    """How many values a row of codes holds."""
    if COLUMNS in parts:
        return int(take(parts, COLUMNS, torch.int64, 0))
    codes, size = unit(fmt.element.bits) if fmt.element.packed else (1, 1)
    return qdata.shape[-1] * codes // size


def _of_inputs(activation: Activation | None, parts: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What rounds inputs: what the activation needs, and nothing else."""
    stored = activation is not None and activation.scaling != "dynamic"
    zero = activation.format.zero if activation is not None and activation.scaling == "static" else None
    for name, needed in (("act_scale", stored), ("act_zero", zero is not None)):
        if (name in parts) != needed:
            msg = f"{name} is {'missing' if needed else 'there'}, and inputs are {activation or 'not rounded'}"
            raise CheckpointError(msg)
    return (
        take(parts, "act_scale", torch.float32, 2) if stored else None,
        None if zero is None else take(parts, "act_zero", zero.code_dtype, 2),
    )


def _pre_scale(parts: Mapping[str, Tensor]) -> Tensor | None:
    """What inputs are multiplied by first.

    A run that smooths has to make room for factors before it knows whether a weight gets any.
    """
    if "pre_scale" not in parts:
        return None
    found = take(parts, "pre_scale", torch.float32, 1)
    return None if not found.is_meta and bool((found == 1).all()) else found


def _rules(meanings: Mapping[str, tuple[str, str | None]]) -> list[dict[str, str | None]]:
    """Rules for names, few and short: what most of them mean goes without a name."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name in sorted(meanings):
        groups.setdefault(meanings[name], []).append(name)
    if not groups:
        return []
    main, everything = max(groups, key=lambda meaning: len(groups[meaning])), _by_shape(meanings)
    made = [(m, meaning) for meaning in groups if meaning != main for m in _matches(groups[meaning], everything)]
    return [{"match": match, "weight": fmt, "activation": inputs} for match, (fmt, inputs) in [*made, ("*", main)]]


def _matches(names: Iterable[str], everything: Mapping[tuple[str, ...], list[list[str]]]) -> list[str]:
    """Patterns that, of everything, match just these names: those that differ in numbers alone are told together."""
    made: list[str] = []
    for shape, rows in _by_shape(names).items():
        columns = [set(column) for column in zip(*rows, strict=True)]
        if prod(map(len, columns)) != len(rows) or len(rows) == 1:
            # Numbers of one place go with some of another only.
            made += [_woven(shape, row) for row in rows]
            continue
        whole = [set(column) for column in zip(*everything[shape], strict=True)]
        numbers = [
            r"\d+" if c == w else f"({'|'.join(sorted(c, key=int))})" for c, w in zip(columns, whole, strict=True)
        ]
        made.append("re:" + _woven([re.escape(piece) for piece in shape], numbers))
    return made


def _by_shape(names: Iterable[str]) -> dict[tuple[str, ...], list[list[str]]]:
    """Numbers in names, by what stands around them."""
    found: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        found.setdefault(tuple(_NUMBER.split(name)), []).append(_NUMBER.findall(name))
    return found


def _woven(pieces: Sequence[str], between: Sequence[str]) -> str:
    return "".join(piece + number for piece, number in zip(pieces, [*between, ""], strict=True))
