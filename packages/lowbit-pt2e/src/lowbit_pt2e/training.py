"""Training through rounding: an exported graph whose layers compute what the converted one will, and learn of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lowbit import QuantizedTensor, Recipe, Rule, quantize
from lowbit.format import Format
from lowbit.numerics import Scales, choose_scale
from lowbit.observer import MovingAverage, Observer
from lowbit_pt2e.folding import frozen
from lowbit_pt2e.graphs import GraphError, source
from lowbit_pt2e.layers import Linear, layer_of
from lowbit_pt2e.observing import Prepared
from lowbit_pt2e.quantizing import Key, Layer, Where
from lowbit_pt2e.running import Watching

# Of a scale, far below what any has: gradients of smaller ones are not finite.
_LEAST = 1e-12


class FakeQuantize(nn.Module):
    """Values rounded and given back: `(clamp(round(x / s) + z) - z) s`, with a learned scale `s`; z stays.

    Rounding is taken for nothing in backward: the gradient of x is that of the result where x is in range and 0
    elsewhere, that of s the sum of `round(x / s) - x / s`, or of the end that was met less z, over `sqrt(n most)`.
    While it observes, scales are what the observer tells, or those of each x where there is none.

    Source: Esser et al., "Learned step size quantization", ICLR 2020.
    """

    def __init__(self, fmt: Format, shape: tuple[int, ...], observer: Observer | None = None) -> None:
        super().__init__()
        self.format, self.observer, self.observing = fmt, observer, True
        self.scale = nn.Parameter(torch.ones(shape))
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(shape, dtype=torch.int32))

    def get_extra_state(self) -> dict[str, bool]:
        """Whether it observes, for state dicts."""
        return {"observing": self.observing}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """As it was when the state dict was made."""
        self.observing = state["observing"]

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape by one scale, or (R, K) by blocks of rows; rounded."""
        if not x.numel():
            return x
        scale = self._observed(x.detach()) if self.observing else self.positive()
        element, (low, high) = self.format.element, self._ends()
        blocks = x.float()
        if scale.numel() > 1:
            blocks, scale = blocks.unflatten(-1, (scale.shape[-1], -1)), scale.unsqueeze(-1)
        # A share of its gradient.
        share = (x.numel() / scale.numel() * element.max) ** -0.5
        scale = scale.detach() + (scale - scale.detach()) * share
        steps = (blocks / scale).clamp(low, high)
        nearest = steps.round() if element.kind == "int" else steps.to(element.storage).float()
        steps = steps + (nearest - steps).detach()
        return (steps * scale).view(x.shape).to(x.dtype)

    def positive(self) -> Tensor:
        """The scale, which training may have led below zero."""
        return self.scale.abs().clamp_min(_LEAST)

    def scales(self) -> Scales:
        """What the scale is now."""
        zero = None if self.format.zero is None else self.zero.to(self.format.zero.code_dtype)
        return Scales(self.positive().detach(), zero)

    def _ends(self) -> tuple[Any, Any]:
        element = self.format.element
        if element.kind != "int" or self.format.zero is None:
            return element.min, element.max
        zero = int(self.zero)
        return element.min - zero, element.max - zero

    def _observed(self, x: Tensor) -> Tensor:
        """The scale that x leads to, which is kept, and of which nothing is learned."""
        if self.observer is None:
            found = choose_scale(x.float(), self.format)
        else:
            self.observer.update(x)
            found = self.observer.qparams(self.format)
        with torch.no_grad():
            self.scale.copy_(found.scale.view_as(self.scale))
            if found.zero is not None:
                self.zero.copy_(found.zero.view_as(self.zero))
        return self.positive().detach()


def straight(x: Tensor, fmt: Format) -> Tensor:
    """x (.., K) rounded by scales of its own, as `lowbit.quantize` does, and taken for itself in backward."""
    return x + (quantize(x.detach(), fmt).dequantize() - x).detach()


class Learning(Prepared):
    """An exported graph whose layers' weights and inputs are rounded as a recipe says, to be trained.

    Made by `prepare_qat`; `convert` takes it. Parameters are the graph's, and scales.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, observer: Callable[[], Observer], *, carry: bool, where: Where | None
    ) -> None:
        super().__init__(model, recipe, observer, carry=carry, where=where)
        self.inputs = nn.ModuleList()
        # By observer and format.
        self.rounds: dict[tuple[int, Format], FakeQuantize] = {}
        for known in dict.fromkeys(known for taken in self.places.values() for known in taken.values()):
            if not known[1].tensor_scale:
                self.rounds[known] = FakeQuantize(known[1], (1, 1), self.observers[known[0]])  # pyright: ignore[reportArgumentType] - an observer
                self.inputs.append(self.rounds[known])
        # By node: the layer, its rule, and what rounds its weight, alike for all that share it.
        self.layers: dict[tuple[GraphModule, Node], tuple[Layer, Rule, FakeQuantize | None]] = {}
        self.weights = nn.ModuleList()
        learned: dict[Key, FakeQuantize | None] = {}
        for region, node, layer, rule in self.asked.layers:
            key, fmt = (layer.name, layer.turned, rule), rule.weight
            assert fmt is not None
            if key not in learned:
                plain = fmt.element.kind == "int" and fmt.scale.name == "float32" and fmt.zero is None
                one_row = len(fmt.block) == 2 and fmt.block[0] == 1 and not fmt.tensor_scale
                shape = fmt.scale_shape(tuple(layer.weight.shape))
                learned[key] = FakeQuantize(fmt, shape) if plain and one_row else None
                if (rounds := learned[key]) is not None:
                    self.weights.append(rounds)
            self.layers[region.module, node] = layer, rule, learned[key]

    def forward(self, *inputs: Any) -> Any:
        """What the graph gives, its layers' weights and inputs rounded."""
        return Watching(self.model, instead=self.rounded).run(*inputs)

    def rounded(self, graph: GraphModule, node: Node, values: dict[Node, Any]) -> dict[Node, Any]:
        """What a node takes in the place of values."""
        found: dict[Node, Any] = {}
        taken = self.places.get((graph, node), {})
        for x, (place, fmt) in taken.items():
            if fmt.tensor_scale:
                observer: Any = self.observers[place]
                observer.update(values[x].detach())
                found[x] = straight(values[x].reshape(-1, values[x].shape[-1]), fmt).view(values[x].shape)
            else:
                found[x] = self.rounds[place, fmt](values[x])
        if taken:
            self.ran[self.order[graph, node]] = True
        if (graph, node) in self.layers:
            layer, rule, rounds = self.layers[graph, node]
            if rule.activation is not None and rule.activation.scaling == "dynamic":
                x = values[layer.x]
                rows = x.reshape(-1, x.shape[-1]) if isinstance(layer, Linear) else x.flatten(1)
                found[layer.x] = straight(rows, rule.activation.format).view(x.shape)
            assert rule.weight is not None
            weight = layer.given(node)
            rows = layer.rows(values[weight])
            found[weight] = layer.back(straight(rows, rule.weight) if rounds is None else rounds(rows))
        return found

    def freeze_observers(self) -> None:
        """Leave scales to training, or as they are, from now on."""
        for each in self.modules():
            if isinstance(each, FakeQuantize):
                each.observing = False

    def freeze_norms(self) -> None:
        """Normalize by running statistics from now on, where the graph was exported in train mode."""
        for region in self.asked.regions:
            for node in region.nodes:
                frozen(node, freeze=True)

    def scales_of(self, place: int, fmt: Format) -> Scales:
        """As training left them."""
        if fmt.tensor_scale:
            return super().scales_of(place, fmt)
        return self.rounds[place, fmt].scales()

    def quantized(self) -> dict[Key, QuantizedTensor]:
        """Weights as training left them.

        Raises:
            GraphError: norms normalize by the statistics of each batch still.
        """
        for region in self.asked.regions:
            for node in region.nodes:
                if not frozen(node):
                    raise GraphError(
                        f"{node.name} normalizes by the statistics of each batch; freeze_norms() first{source(node)}"
                    )
        found: dict[Key, QuantizedTensor] = {}
        for region, node, _, rule in self.asked.layers:
            layer, rounds = layer_of(region, node), self.layers[region.module, node][2]
            assert not isinstance(layer, str)
            assert rule.weight is not None
            scale = None if rounds is None else rounds.scales().scale
            found[layer.name, layer.turned, rule] = quantize(layer.weight.detach(), rule.weight, scale)
        return found


def prepare_qat(
    model: nn.Module,
    recipe: Recipe,
    *,
    observer: Callable[[], Observer] = MovingAverage,
    carry: bool = True,
    where: Where | None = None,
) -> Learning:
    """An exported `model` to be trained with weights and inputs of layers rounded as `recipe` says.

    Train its parameters as any module's; scales are what observers tell until `freeze_observers()`, and learned from
    then on; `freeze_norms()` where the graph was exported in train mode, and `convert` in the end. Weights in integers
    with a float32 scale a row or group, and inputs with one scale, have learned scales, others those of their values.
    Scales want no weight decay. `carry` and `where` as of `prepare`. Norms are best folded before, by `fold_norms`.

    Raises:
        RecipeError: a rule matches no weight of a layer.
        FormatError: a weight does not fit its format.
        GraphError: `model` is none that was exported.
    """
    return Learning(model, recipe, observer, carry=carry, where=where)
