"""Linear layers of exported graphs with weights in formats of a recipe, and inputs that are rounded as they come."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from lowbit import QuantizedTensor, Recipe, RecipeError, Rule, quantize
from lowbit_pt2e.graphs import Editor, Region, regions
from lowbit_pt2e.layers import LINEARS, Linear, linear_of
from lowbit_pt2e.passes import Match, Report, run_passes

_op: Any = torch.ops.lowbit.linear.default


def quantize_layers(model: nn.Module, recipe: Recipe, inputs: tuple[Any, ...] | None = None) -> Report:
    """Give linear layers of an exported `model` the weights that `recipe` says, in every graph, in place.

    A rule's name is that of the parameter, its modules are classes of the module that the layer comes from, and its
    activation is weight-only or dynamic. Each layer becomes one `lowbit::linear`, which any installed backend's kernel
    runs, and `lowbit.lower` replaces by one; its weight, codes and scales. Products with constants are layers, however
    they are written; constants of several layers are kept once. With example `inputs`, the report says how far outputs
    moved.

    Raises:
        RecipeError: a rule matches no weight of a linear layer, or its activation has stored scales; nothing is changed
            then.
        FormatError: a weight does not fit its format; nothing is changed then.
        GraphError: `model` is none that was exported.
    """
    for rule in recipe.rules:
        if rule.activation is not None and rule.activation.scaling != "dynamic":
            raise RecipeError(
                f"rule {rule.match!r} rounds inputs by stored scales ({rule.activation}), which a graph has none of; "
                "needed is a dynamic activation, or none"
            )
    found = [(region, node) for region in regions(model) for node in region.nodes if node.target in LINEARS]
    layers = [(layer, _classes(node)) for region, node in found if isinstance(layer := linear_of(region, node), Linear)]
    unused = [
        rule.match for rule in recipe.rules if not any(rule.matches(layer.name, classes) for layer, classes in layers)
    ]
    if unused:
        raise RecipeError(
            f"rules {', '.join(map(repr, unused))} match no weight of a linear layer; there are "
            f"{', '.join(dict.fromkeys(layer.name for layer, _ in layers)) or 'none'}"
        )
    weights: dict[tuple[str, Rule], QuantizedTensor] = {}
    for layer, classes in layers:
        rule = recipe.resolve(layer.name, classes)
        if rule is not None and rule.weight is not None and (layer.name, rule) not in weights:
            weights[layer.name, rule] = quantize(layer.weight.detach(), rule.weight)
    return run_passes(model, (_QuantizeLayers(recipe, weights),), inputs)


class _QuantizeLayers:
    """A linear layer with a weight that a rule names."""

    name = "quantize linear layers"
    adds = (_op,)

    def __init__(self, recipe: Recipe, weights: dict[tuple[str, Rule], QuantizedTensor]) -> None:
        self.recipe, self.weights = recipe, weights
        # Of each weight its parts, as graphs hold them.
        self.parts: dict[tuple[str, Rule], list[Tensor | None]] = {}

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
            yield Match(node, refusal, partial(self._put, region, node, layer, rule))

    def _put(self, region: Region, node: Node, layer: Any, rule: Any) -> None:
        weight, edit = self.weights[layer.name, rule], Editor(region, node, node)
        key, stem = (layer.name, rule), layer.name.replace(".", "_")
        if key not in self.parts:
            # Graphs hold e8m0 scales as bytes: see `lowbit.ops`.
            scale = weight.scale if weight.scale_bits is None else weight.scale_bits
            self.parts[key] = [weight.qdata, scale, weight.zero, weight.tensor_scale]
        parts = [
            None if part is None else edit.constant(f"{stem}_{name}", part)
            for name, part in zip(("qdata", "scale", "zero", "tensor_scale"), self.parts[key], strict=True)
        ]
        activation = "" if rule.activation is None else str(rule.activation)
        made = edit.call(_op, layer.x, *parts, None, None, None, layer.added, str(rule.weight), activation)
        node.replace_all_uses_with(made)


def _classes(node: Node) -> list[str]:
    """Names of the classes of the module that a node comes from; none where that is not known."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    kinds = [kind for _, kind in stack.values()]
    if not kinds:
        return []
    kind = kinds[-1]
    return [kind.rpartition(".")[2]] if isinstance(kind, str) else [each.__name__ for each in kind.__mro__]
