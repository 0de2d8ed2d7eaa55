"""Linear layers of exported graphs with weights in formats of a recipe, and inputs rounded as it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from lowbit import QuantizedTensor, Recipe, RecipeError, Rule, quantize
from lowbit.numerics import Scales
from lowbit_pt2e.graphs import Editor, Region, regions, untold
from lowbit_pt2e.layers import LINEARS, Linear, linear_of
from lowbit_pt2e.passes import Match, Report, run_passes

_op: Any = torch.ops.lowbit.linear.default


def quantize_layers(model: nn.Module, recipe: Recipe, inputs: tuple[Any, ...] | None = None) -> Report:
    """Give linear layers of an exported `model` the weights that `recipe` says, in every graph, in place.

    A rule's name is that of the parameter, its modules are classes of the module that the layer comes from (which are
    not known within loops and branches), its activation dynamic or none. Each layer becomes one `lowbit::linear`, which
    any installed backend's kernel runs, and `lowbit.lower` replaces by one; its weight, codes and scales. Products with
    constants are layers, however they are written; constants of several layers are kept once. With example `inputs`,
    the report says how far outputs moved.

    Raises:
        RecipeError: a rule matches no weight of a linear layer, or its activation has stored scales; nothing is changed
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
    return put_weights(model, recipe, wanted(model, recipe), {}, inputs)


Key = tuple[str, bool, Rule]
"""A weight by its name, whether it is turned, and the rule that decides it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a recipe says of a model's layers."""

    # Each with its graph, its node and the rule that gives it a format.
    layers: list[tuple[Region, Node, Linear, Rule]]
    weights: dict[Key, QuantizedTensor]


def wanted(model: nn.Module, recipe: Recipe) -> Wanted:
    """The layers that `recipe` quantizes, and their weights.

    Raises:
        RecipeError: a rule matches no weight of a linear layer.
        FormatError: a weight does not fit its format.
        GraphError: `model` is none that was exported.
    """
    nodes = [(region, node) for region in regions(model) for node in region.nodes if node.target in LINEARS]
    found = [(region, node, linear_of(region, node)) for region, node in nodes]
    layers = [(region, node, layer) for region, node, layer in found if isinstance(layer, Linear)]
    known = [(layer.name, _classes(node)) for _, node, layer in layers]
    unused = [rule.match for rule in recipe.rules if not any(rule.matches(*each) for each in known)]
    if unused:
        raise RecipeError(
            f"rules {', '.join(map(repr, unused))} match no weight of a linear layer; there are "
            f"{', '.join(dict.fromkeys(name for name, _ in known)) or 'none'}"
        )
    asked: list[tuple[Region, Node, Linear, Rule]] = []
    weights: dict[Key, QuantizedTensor] = {}
    for (region, node, layer), each in zip(layers, known, strict=True):
        rule = recipe.resolve(*each)
        if rule is None or rule.weight is None:
            continue
        asked.append((region, node, layer, rule))
        if rule.activation is not None:
            # Refuses a format that does not fit the layer's inputs.
            rule.activation.format.scale_shape((1, layer.weight.shape[1]))
        if (layer.name, layer.turned, rule) not in weights:
            weights[layer.name, layer.turned, rule] = quantize(layer.weight.detach(), rule.weight)
    return Wanted(asked, weights)


def put_weights(
    model: nn.Module, recipe: Recipe, asked: Wanted, scales: Mapping[Node, Scales], inputs: tuple[Any, ...] | None
) -> Report:
    """Put what is asked into a model's graphs, with the scales of inputs of layers' nodes where activations store some.

    Raises:
        GraphError: as `run_passes`.
    """
    return run_passes(model, (_QuantizeLayers(recipe, asked.weights, scales),), inputs)


class _QuantizeLayers:
    """A linear layer with a weight that a rule names."""

    name = "quantize linear layers"
    adds = (_op,)

    def __init__(self, recipe: Recipe, weights: Mapping[Key, QuantizedTensor], scales: Mapping[Node, Scales]) -> None:
        self.recipe, self.weights, self.scales = recipe, weights, scales

    def matches(self, region: Region) -> Iterator[Match]:
        """Linear layers, and products with constants."""
        for node in region.nodes:
            if node.target not in LINEARS:
                continue
            layer, rule, refusal = linear_of(region, node), None, None
            if isinstance(layer, str):
                refusal = layer
            else:
                rule = self.recipe.resolve(layer.name, _classes(node))
                if rule is None:
                    refusal = "no rule matches its weight"
                elif rule.weight is None:
                    refusal = f"rule {rule.match!r} keeps its weight"
                else:
                    refusal = untold(node)
            yield Match(node, refusal, partial(self._put, region, node, layer, rule))

    def _put(self, region: Region, node: Node, layer: Any, rule: Any) -> None:
        weight, edit = self.weights[layer.name, layer.turned, rule], Editor(region, node, node)
        stem = layer.name.replace(".", "_") + ("_turned" if layer.turned else "")
        # Graphs hold e8m0 scales as bytes: see `lowbit.ops`.
        scale = weight.scale if weight.scale_bits is None else weight.scale_bits
        parts: dict[str, Tensor | None] = {
            "qdata": weight.qdata,
            "scale": scale,
            "zero": weight.zero,
            "tensor_scale": weight.tensor_scale,
            "act_scale": None,
            "act_zero": None,
        }
        if (found := self.scales.get(node)) is not None:
            # Local scaling stores that of the tensor alone.
            local = rule.activation.scaling == "local"
            parts["act_scale"] = found.tensor_scale if local else found.scale.to(torch.float32)
            parts["act_zero"] = None if local else found.zero
        held = [None if part is None else edit.constant(f"{stem}_{name}", part) for name, part in parts.items()]
        activation = "" if rule.activation is None else str(rule.activation)
        made = edit.call(_op, layer.x, *held, None, layer.added, str(rule.weight), activation)
        node.replace_all_uses_with(made)


def _classes(node: Node) -> list[str]:
    """Names of the classes of the module that a node comes from; none where that is not known."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    kinds = [kind for _, kind in stack.values()]
    if not kinds:
        return []
    kind = kinds[-1]
    return [kind.rpartition(".")[2]] if isinstance(kind, str) else [each.__name__ for each in kind.__mro__]
