"""Scales of inputs that data tell: a graph that watches what its layers are given, loops and branches too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lowbit import Activation, FormatError, QuantizedTensor, Recipe
from lowbit.format import Format
from lowbit.numerics import Scales
from lowbit.observer import MinMax, Observer
from lowbit_pt2e.carrying import carried, edges
from lowbit_pt2e.codes import numbers, refuses
from lowbit_pt2e.graphs import GraphError, Region, source
from lowbit_pt2e.passes import Report
from lowbit_pt2e.quantizing import Key, Wanted, Where, put_weights, sums, wanted
from lowbit_pt2e.running import Watching


class Prepared(nn.Module):
    """An exported graph that gives what it gave, and remembers what goes into layers whose activations store scales.

    Made by `prepare`; `convert` takes it. It runs node by node, the graphs of loops and branches too, as often as the
    data has them run. Layers that take the same value share an observer, as all do that a loop makes of one.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, observer: Callable[[], Observer], *, carry: bool, where: Where | None
    ) -> None:
        super().__init__()
        asked = wanted(model, recipe, where)
        assert isinstance(model, GraphModule)
        self.model, self.recipe, self.asked = model, recipe, asked
        self.observer, self.carry, self.converted = observer, carry, False
        self.observers = nn.ModuleList()
        takers = list(_observed(asked))
        known = [((region.module, x), None if refuses(how) else how.format) for region, _, x, how in takers]
        self.carried = carried(asked.regions, known) if carry else []
        group = {value: each for each in self.carried for value in each.values}
        # Layers that take the same value, or one that loops carry, share an observer; by node, all that it takes.
        shared: dict[Any, int] = {}
        self.places: dict[tuple[GraphModule, Node], dict[Node, tuple[int, Format]]] = {}
        watched = [(region, node, x, how.format) for region, node, x, how in takers]
        for each in self.carried:
            watched += [(region, *edge, each.format) for region in asked.regions for edge in edges(region, each)]
        for region, node, x, fmt in watched:
            key = group.get((region.module, x), (region.module, x))
            if key not in shared:
                shared[key] = len(self.observers)
                self.observers.append(observer())
            self.places.setdefault((region.module, node), {})[x] = shared[key], fmt
        self.shared = shared
        # Which of these nodes ran: of what a branch is given more may be known than of the branch.
        self.ran: Tensor
        self.register_buffer("ran", torch.zeros(len(self.places), dtype=torch.bool))
        self.order = {place: i for i, place in enumerate(self.places)}

    def forward(self, *inputs: Any) -> Any:
        """What the graph gives."""
        return Watching(self.model, before=self.take).run(*inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """One of a graph of its own, that knows what this one does.

        Raises:
            GraphError: it was converted.
        """
        if self.converted:
            raise GraphError("what was converted is the graph, `model`; copy that")
        model, where = deepcopy(self.model, memo), self.asked.where
        found = type(self)(model, self.recipe, self.observer, carry=self.carry, where=where)
        found.load_state_dict(self.state_dict())
        return found

    def train(self, mode: bool = True) -> Prepared:  # noqa: FBT001, FBT002 - nn.Module's
        """Nothing changes: exported graphs are in the mode that they were exported in."""
        self.training = mode
        return self

    def take(self, graph: GraphModule, node: Node, values: Any) -> None:
        """Note what a layer is about to take, if its scale is asked for."""
        taken = self.places.get((graph, node), {})
        for x, (place, _) in taken.items():
            observer: Any = self.observers[place]
            observer.update(values[x])
        if taken:
            self.ran[self.order[graph, node]] = True

    def scales(self, region: Region, node: Node, x: Node, activation: Activation) -> Scales:
        """The scales of what a layer or a sum takes.

        Raises:
            GraphError: it never ran, or was given a NaN or an infinity.
        """
        place, _ = self.places[region.module, node][x]
        layer = next((layer for _, each, layer, _ in self.asked.layers if each is node), None)
        by = f", by {layer.name}," if layer else ""
        if not self.ran[self.order[region.module, node]]:
            raise GraphError(f"the input of {node.name}{by} has no scale: no data reached it{source(node)}")
        try:
            return self.scales_of(place, activation.format)
        except FormatError as error:
            raise GraphError(f"the input of {node.name}{by} has no scale: {error}{source(node)}") from error

    def scales_of(self, place: int, fmt: Format) -> Scales:
        """What an observer tells.

        Raises:
            FormatError: it has seen nothing, or a NaN or an infinity.
        """
        observer: Any = self.observers[place]
        return observer.qparams(fmt)

    def quantized(self) -> Mapping[Key, QuantizedTensor]:
        """The weights that are asked for."""
        return self.asked.weights


def _observed(asked: Wanted) -> Iterator[tuple[Region, Node, Node, Activation]]:
    """Nodes that take values by stored scales, and these values."""
    for region, node, layer, rule in asked.layers:
        if rule.activation is not None and rule.activation.scaling != "dynamic":
            yield region, node, layer.x, rule.activation
    for region, node, at, rule in sums(asked):
        assert rule.activation is not None
        yield region, node, node.args[at], rule.activation  # pyright: ignore[reportReturnType] - a node


def prepare(
    model: nn.Module,
    recipe: Recipe,
    *,
    observer: Callable[[], Observer] = MinMax,
    carry: bool = True,
    where: Where | None = None,
) -> Prepared:
    """An exported `model` that watches inputs of layers whose activations, by `recipe`, store scales.

    What is added to the output of such a convolution is watched, too.

    Run it on data that is like what will come, then `convert` it. `observer` makes what remembers: see
    `lowbit.observer`. With `carry`, what goes into loops and branches, around and out of them has one scale and goes as
    codes where a layer there takes it; otherwise it stays as it is, and each layer has its own scale. `where` is as for
    `quantize_layers`. The graph given is the one that is run, and is changed only by `convert`.

    Raises:
        RecipeError: a rule matches no weight of a layer.
        FormatError: a weight does not fit its format.
        GraphError: `model` is none that was exported.
    """
    return Prepared(model, recipe, observer, carry=carry, where=where)


def convert(prepared: Prepared, inputs: tuple[Any, ...] | None = None) -> Report:
    """Give the graph of `prepared` the weights that its recipe says, and inputs the scales that data told, in place.

    It is `prepared.model` then; see `quantize_layers` for what becomes of layers.

    Raises:
        GraphError: a layer's input was never seen, or was not finite; the message names the layer. Or the graph was
            changed or converted since. Nothing is changed then.
    """
    found: dict[Node, Scales] = {}
    if prepared.converted:
        raise GraphError("the graph was converted before; prepare another")
    if any(node not in region.module.graph.nodes for region, node, _, _ in prepared.asked.layers):
        raise GraphError("the graph was changed after it was prepared; prepare it once more, after other passes")
    for region, node, x, activation in _observed(prepared.asked):
        found[node] = prepared.scales(region, node, x, activation)
    carries = {each: numbers(prepared.scales_of(prepared.shared[each], each.format)) for each in prepared.carried}
    asked = replace(prepared.asked, weights=prepared.quantized())
    prepared.converted = True
    return put_weights(prepared.model, prepared.recipe, asked, found, inputs, carries)
