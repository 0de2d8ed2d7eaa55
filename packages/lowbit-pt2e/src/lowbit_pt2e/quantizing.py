"""Layers of exported graphs with weights in formats of a recipe, and inputs rounded as it says."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from lowbit import QuantizedTensor, Recipe, RecipeError, Rule, quantize
from lowbit.format import Format
from lowbit.numerics import Scales
from lowbit_pt2e.carrying import Carried, Carry
from lowbit_pt2e.codes import DECODE, ENCODE, numbers, refuses
from lowbit_pt2e.graphs import Editor, Region, regions, untold
from lowbit_pt2e.layers import CONVOLUTIONS, IN_PLACE, LINEARS, Convolution, Linear, layer_of
from lowbit_pt2e.passes import Match, Report, run_passes

_aten: Any = torch.ops.aten
_lowbit: Any = torch.ops.lowbit
_LINEAR, _DEQUANTIZE, _QUANTIZE = (each.default for each in (_lowbit.linear, _lowbit.dequantize, _lowbit.quantize))

LAYERS = {*LINEARS, *CONVOLUTIONS}
SUMS = (_aten.add.Tensor, _aten.add_.Tensor)


Where = Callable[[Node], bool]
"""Whether a layer's node is for a recipe."""


def quantize_layers(
    model: nn.Module, recipe: Recipe, inputs: tuple[Any, ...] | None = None, *, where: Where | None = None
) -> Report:
    """Give layers of an exported `model` the weights that `recipe` says, in every graph, in place.

    A rule's name is that of the parameter, its modules are classes of the module that the layer comes from (which are
    not known within loops and branches), its activation dynamic or none. A linear layer becomes one `lowbit::linear`,
    which any installed backend's kernel runs, and `lowbit.lower` replaces by one; its weight, codes and scales.
    Products with constants are layers, however they are written. A convolution takes what its weight's codes stand for,
    whose rows are output channels, and inputs that are rounded by one scale. Constants of several layers are kept once.
    `where` is asked of each layer's node whether it is for the recipe; without it, all are. With example `inputs`, the
    report says how far outputs moved.

    Raises:
        RecipeError: a rule matches no weight of a layer, or its activation has stored scales; nothing is changed
            then.
        FormatError: a weight does not fit its format; nothing is changed then.
        GraphError: `model` is none that was exported.
    """
    for rule in recipe.rules:
        if rule.activation is not None and rule.activation.scaling != "dynamic":
            raise RecipeError(
                f"rule {rule.match!r} rounds inputs by stored scales ({rule.activation}), which data tell: "
                "prepare(model, recipe), run what it gives on some, and convert that"
            )
    return put_weights(model, recipe, wanted(model, recipe, where), {}, inputs, {})


Layer = Linear | Convolution
Key = tuple[str, int, Rule]
"""A weight by its name, whether or in how many groups it is turned, and the rule that decides it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a recipe says of a model's layers."""

    regions: list[Region]
    # Each with its graph, its node and the rule that gives it a format.
    layers: list[tuple[Region, Node, Layer, Rule]]
    weights: Mapping[Key, QuantizedTensor]
    where: Where | None


def wanted(model: nn.Module, recipe: Recipe, where: Where | None = None) -> Wanted:
    """The layers that `recipe` quantizes, and their weights.

    Raises:
        RecipeError: a rule matches no weight of a layer.
        FormatError: a weight does not fit its format.
        GraphError: `model` is none that was exported.
    """
    everywhere = regions(model)
    nodes = [(region, node) for region in everywhere for node in region.nodes if node.target in LAYERS]
    found = [(region, node, layer_of(region, node)) for region, node in nodes]
    layers = [(region, node, layer) for region, node, layer in found if not isinstance(layer, str)]
    known = [(layer.name, _classes(node)) for _, node, layer in layers]
    unused = [rule.match for rule in recipe.rules if not any(rule.matches(*each) for each in known)]
    if unused:
        raise RecipeError(
            f"rules {', '.join(map(repr, unused))} match no weight of a layer; there are "
            f"{', '.join(dict.fromkeys(name for name, _ in known)) or 'none'}"
        )
    asked: list[tuple[Region, Node, Layer, Rule]] = []
    weights: dict[Key, QuantizedTensor] = {}
    for (region, node, layer), each in zip(layers, known, strict=True):
        rule = recipe.resolve(*each)
        if rule is None or rule.weight is None or _misfit(layer, rule) or (where is not None and not where(node)):
            continue
        asked.append((region, node, layer, rule))
        if rule.activation is not None and isinstance(layer, Linear):
            # Refuses a format that does not fit the layer's inputs.
            rule.activation.format.scale_shape((1, layer.weight.shape[1]))
        if (layer.name, layer.turned, rule) not in weights:
            weights[layer.name, layer.turned, rule] = quantize(layer.weight.detach(), rule.weight)
    return Wanted(everywhere, asked, weights, where)


def put_weights(
    model: nn.Module,
    recipe: Recipe,
    asked: Wanted,
    scales: Mapping[Node, Scales],
    inputs: tuple[Any, ...] | None,
    carries: Mapping[Carried, tuple[float, int]],
) -> Report:
    """Put what is asked into a model's graphs, with the scales of inputs of layers' nodes where activations store some.

    `carries`: scales and zero points of values that loops carry in codes.

    Raises:
        GraphError: as `run_passes`.
    """
    passes = (Carry(carries), _RoundSums(asked, scales), _QuantizeLayers(recipe, asked, scales))
    return run_passes(model, passes, inputs)


def _misfit(layer: Layer, rule: Rule) -> str | None:
    """Why a layer's inputs are not rounded as a rule says."""
    if rule.activation is None or isinstance(layer, Linear):
        return None
    reason = refuses(rule.activation)
    return reason and f"a convolution: {reason}"


def sums(asked: Wanted) -> Iterator[tuple[Region, Node, int, Rule]]:
    """Sums that a convolution with static inputs ends in: what they add to it is rounded, too, as its inputs are.

    With each, which of its operands that is.
    """
    convolved = {
        node: rule
        for _, node, layer, rule in asked.layers
        if isinstance(layer, Convolution) and rule.activation and rule.activation.scaling == "static"
    }
    for region in dict.fromkeys(region for region, *_ in asked.layers):
        for node in region.nodes:
            if node.target not in SUMS or node.kwargs or not all(isinstance(each, Node) for each in node.args):
                continue
            both: Any = node.args
            known = [each.meta["val"] for each in both]
            alike = both[0] is not both[1] and known[0].shape == known[1].shape and known[0].dtype == known[1].dtype
            # What is written to stays what it is.
            may = (0,) if node.target is _aten.add_.Tensor else (0, 1)
            ends = [i for i in may if alike and both[i] in convolved and len(both[i].users) == 1]
            if ends:
                # Of two convolutions the later one ends in it.
                last = max(ends, key=lambda i: region.nodes.index(both[i]))
                yield region, node, 1 - last, convolved[both[last]]


class _RoundSums:
    """What is added to a convolution's output."""

    name = "round what convolutions are added to"
    adds = (ENCODE, DECODE)

    def __init__(self, asked: Wanted, scales: Mapping[Node, Scales]) -> None:
        self.found, self.scales = list(sums(asked)), scales

    def matches(self, region: Region) -> Iterator[Match]:
        """Sums."""
        for where, node, at, rule in self.found:
            if where.module is region.module:
                yield Match(node, untold(node), partial(self._put, region, node, at, rule))

    def _put(self, region: Region, node: Node, at: int, rule: Any) -> None:
        args = list(node.args)
        args[at] = _rounded(Editor(region, node, node, stays=True), args[at], rule, self.scales[node])
        node.args = tuple(args)


def _rounded(edit: Editor, x: Any, rule: Any, scales: Scales) -> Node:
    """A value rounded by scales that are known."""
    how = numbers(scales)
    codes = edit.call(ENCODE, x, *how, str(rule.activation.format))
    return edit.call(DECODE, codes, *how, x.meta["val"].dtype)


class _QuantizeLayers:
    """A layer with a weight that a rule names."""

    name = "quantize layers"
    adds = (
        *(_LINEAR, ENCODE, DECODE, _QUANTIZE, _DEQUANTIZE, operator.getitem),
        *(_aten.flatten.using_ints, _aten.view_as.default, *IN_PLACE),
    )

    def __init__(self, recipe: Recipe, asked: Wanted, scales: Mapping[Node, Scales]) -> None:
        self.recipe, self.asked, self.scales = recipe, asked, scales

    def matches(self, region: Region) -> Iterator[Match]:
        """Linear layers, products with constants, and convolutions."""
        for node in region.nodes:
            if node.target not in LAYERS:
                continue
            layer, rule, refusal = layer_of(region, node), None, None
            if isinstance(layer, str):
                refusal = layer
            else:
                rule = self.recipe.resolve(layer.name, _classes(node))
                if rule is None:
                    refusal = "no rule matches its weight"
                elif rule.weight is None:
                    refusal = f"rule {rule.match!r} keeps its weight"
                elif self.asked.where is not None and not self.asked.where(node):
                    refusal = "`where` leaves it"
                else:
                    refusal = _misfit(layer, rule) or untold(node)
            yield Match(node, refusal, partial(self._put, region, node, layer, rule))

    def _put(self, region: Region, node: Node, layer: Any, rule: Any) -> None:
        weight, convolves = self.asked.weights[layer.name, layer.turned, rule], isinstance(layer, Convolution)
        edit = Editor(region, node, node, stays=convolves)
        stem = layer.name.replace(".", "_") + ("_turned" if layer.turned else "")
        # Graphs hold e8m0 scales as bytes: see `lowbit.ops`.
        scale = weight.scale if weight.scale_bits is None else weight.scale_bits
        parts: dict[str, Tensor | None] = {
            "qdata": weight.qdata,
            "scale": scale,
            "zero": weight.zero,
            "tensor_scale": weight.tensor_scale,
        }
        found = self.scales.get(node)
        if not convolves:
            parts |= _stored(rule, found)
        held = [None if part is None else edit.constant(f"{stem}_{name}", part) for name, part in parts.items()]
        if not convolves:
            activation = "" if rule.activation is None else str(rule.activation)
            made = edit.call(_LINEAR, layer.x, *held, None, layer.added, str(rule.weight), activation)
            node.replace_all_uses_with(made)
            return
        x = layer.x
        if found is not None:
            x = _rounded(edit, x, rule, found)
        elif rule.activation is not None:
            x = _rounded_as_it_comes(edit, x, rule.activation.format, rule.activation.mode)
        rows = edit.call(_DEQUANTIZE, *held, str(rule.weight), layer.weight.shape[1], layer.weight.dtype)
        node.args = (x, layer.in_place(rows, edit), *node.args[2:])


def _stored(rule: Any, scales: Scales | None) -> dict[str, Tensor | None]:
    """What a linear layer stores of its inputs' scales, if some are known."""
    if scales is None:
        return {"act_scale": None, "act_zero": None}
    if rule.activation.scaling == "local":
        # That of the tensor alone.
        return {"act_scale": scales.tensor_scale, "act_zero": None}
    return {"act_scale": scales.scale.to(torch.float32), "act_zero": scales.zero}


def _rounded_as_it_comes(edit: Editor, x: Any, fmt: Format, mode: str) -> Node:
    """A value rounded by a scale that it has when it comes."""
    # A matrix: of more dimensions each last two would have a scale.
    rows = edit.call(_aten.flatten.using_ints, x, 1)
    parts = edit.call(_QUANTIZE, rows, None, None, None, str(fmt), mode, "nearest", 0)
    codes, scale, *zero = (edit.call(operator.getitem, parts, i) for i in range(2 + (fmt.zero is not None)))
    known = rows.meta["val"]
    value = edit.call(_DEQUANTIZE, codes, scale, *(zero or [None]), None, str(fmt), known.shape[-1], known.dtype)
    return edit.call(_aten.view_as.default, value, x)


def _classes(node: Node) -> list[str]:
    """Names of the classes of the module that a node comes from; none where that is not known."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    kinds = [kind for _, kind in stack.values()]
    if not kinds:
        return []
    kind = kinds[-1]
    return [kind.rpartition(".")[2]] if isinstance(kind, str) else [each.__name__ for each in kind.__mro__]
