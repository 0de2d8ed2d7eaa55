"""Scales of inputs that data tell: a graph that watches what its layers are given, loops and branches too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from lowbit import Activation, FormatError, Recipe
from lowbit.numerics import Scales
from lowbit.observer import MinMax, Observer
from lowbit_pt2e.graphs import GraphError, Region, source
from lowbit_pt2e.passes import Report
from lowbit_pt2e.quantizing import Wanted, put_weights, sums, wanted
from lowbit_pt2e.running import Watching


class Prepared(nn.Module):
    """An exported graph that gives what it gave, and remembers what goes into layers whose activations store scales.

    Made by `prepare`; `convert` takes it. It runs node by node, the graphs of loops and branches too, as often as the
    data has them run. Layers that take the same value share an observer.
    """

    def __init__(self, model: GraphModule, recipe: Recipe, asked: Wanted, observer: Callable[[], Observer]) -> None:
        super().__init__()
        self.model, self.recipe, self.asked = model, recipe, asked
        self.observers = nn.ModuleList()
        # By graph and input, which layers take alike; and by layer.
        shared: dict[tuple[GraphModule, Node], int] = {}
        self.places: dict[tuple[GraphModule, Node], tuple[Node, int]] = {}
        for region, node, x, _ in _observed(asked):
            if (region.module, x) not in shared:
                shared[region.module, x] = len(self.observers)
                self.observers.append(observer())
            self.places[region.module, node] = x, shared[region.module, x]

    def forward(self, *inputs: Any) -> Any:
        """What the graph gives."""
        return Watching(self.model, before=self.take).run(*inputs)

    def train(self, mode: bool = True) -> Prepared:  # noqa: FBT001, FBT002 - nn.Module's
        """Nothing changes: exported graphs are in the mode that they were exported in."""
        self.training = mode
        return self

    def take(self, graph: GraphModule, node: Node, values: Any) -> None:
        """Note what a layer is about to take, if its scale is asked for."""
        if (graph, node) in self.places:
            x, place = self.places[graph, node]
            observer: Any = self.observers[place]
            observer.update(values[x])

    def scales(self, region: Region, node: Node, activation: Activation) -> Scales:
        """The scales of what a layer or a sum takes.

        Raises:
            GraphError: it never ran, or was given a NaN or an infinity.
        """
        observer: Any = self.observers[self.places[region.module, node][1]]
        try:
            return observer.qparams(activation.format)
        except FormatError as error:
            layer = next((layer for _, each, layer, _ in self.asked.layers if each is node), None)
            by = f", by {layer.name}," if layer else ""
            raise GraphError(f"the input of {node.name}{by} has no scale: {error}{source(node)}") from error


def _observed(asked: Wanted) -> Iterator[tuple[Region, Node, Node, Activation]]:
    """Nodes that take values by stored scales, and these values."""
    for region, node, layer, rule in asked.layers:
        if rule.activation is not None and rule.activation.scaling != "dynamic":
            yield region, node, layer.x, rule.activation
    for region, node, at, rule in sums(asked):
        assert rule.activation is not None
        yield region, node, node.args[at], rule.activation  # pyright: ignore[reportReturnType] - a node


def prepare(model: nn.Module, recipe: Recipe, *, observer: Callable[[], Observer] = MinMax) -> Prepared:
    """An exported `model` that watches inputs of layers whose activations, by `recipe`, store scales.

    What is added to the output of such a convolution is watched, too.

    Run it on data that is like what will come, then `convert` it. `observer` makes what remembers: see
    `lowbit.observer`. The graph given is the one that is run, and is changed only by `convert`.

    Raises:
        RecipeError: a rule matches no weight of a layer.
        FormatError: a weight does not fit its format.
        GraphError: `model` is none that was exported.
    """
    asked = wanted(model, recipe)
    assert isinstance(model, GraphModule)
    return Prepared(model, recipe, asked, observer)


def convert(prepared: Prepared, inputs: tuple[Any, ...] | None = None) -> Report:
    """Give the graph of `prepared` the weights that its recipe says, and inputs the scales that data told, in place.

    It is `prepared.model` then; see `quantize_layers` for what becomes of layers.

    Raises:
        GraphError: a layer's input was never seen, or was not finite; the message names the layer. Or the graph was
            changed since. Nothing is changed then.
    """
    found: dict[Node, Scales] = {}
    if any(node not in region.module.graph.nodes for region, node, _, _ in prepared.asked.layers):
        raise GraphError("the graph was changed after it was prepared; prepare it once more, after other passes")
    for region, node, _, activation in _observed(prepared.asked):
        found[node] = prepared.scales(region, node, activation)
    return put_weights(prepared.model, prepared.recipe, prepared.asked, found, inputs)
