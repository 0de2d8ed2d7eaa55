"""Scales of inputs that data tell: a graph that watches what its layers are given, loops and branches too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from lowbit import Activation, FormatError, Recipe
from lowbit.numerics import Scales
from lowbit.observer import MinMax, Observer
from lowbit_pt2e.graphs import GraphError, Region, source
from lowbit_pt2e.layers import Linear
from lowbit_pt2e.passes import Report
from lowbit_pt2e.quantizing import Wanted, put_weights, wanted


class Prepared(nn.Module):
    """An exported graph that gives what it gave, and remembers what goes into layers whose activations store scales.

    Made by `prepare`; `convert` takes it. It runs node by node, the graphs of loops and branches too, as often as the
    data has them run. Layers that take the same value share an observer.
    """

    def __init__(self, model: GraphModule, recipe: Recipe, asked: Wanted, observer: Callable[[], Observer]) -> None:
        super().__init__()
        self.model, self.recipe, self.asked = model, recipe, asked
        self.observers = nn.ModuleList()
        # By graph and node that is the input, which layers take alike.
        self.places: dict[tuple[GraphModule, Node], int] = {}
        for region, _, layer, rule in asked.layers:
            if rule.activation is None or rule.activation.scaling == "dynamic":
                continue
            key = (region.module, layer.x)
            if key not in self.places:
                self.places[key] = len(self.observers)
                self.observers.append(observer())

    def forward(self, *inputs: Any) -> Any:
        """What the graph gives."""
        return _Watching(self.model, self).run(*inputs)

    def take(self, graph: GraphModule, node: Node, value: Tensor) -> None:
        """Note a value, if a layer takes it whose scale is asked for."""
        place = self.places.get((graph, node))
        if place is not None:
            observer: Any = self.observers[place]
            observer.update(value)

    def scales(self, region: Region, node: Node, layer: Linear, activation: Activation) -> Scales:
        """The scales of a layer's input.

        Raises:
            GraphError: it never ran, or was given a NaN or an infinity.
        """
        observer: Any = self.observers[self.places[region.module, layer.x]]
        try:
            return observer.qparams(activation.format)
        except FormatError as error:
            raise GraphError(
                f"the input of {node.name}, by {layer.name}, has no scale: {error}{source(node)}"
            ) from error


def prepare(model: nn.Module, recipe: Recipe, *, observer: Callable[[], Observer] = MinMax) -> Prepared:
    """An exported `model` that watches inputs of linear layers whose activations, by `recipe`, store scales.

    Run it on data that is like what will come, then `convert` it. `observer` makes what remembers: see
    `lowbit.observer`. The graph given is the one that is run, and is changed only by `convert`.

    Raises:
        RecipeError: a rule matches no weight of a linear layer.
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
        GraphError: a layer's input was never seen, or was not finite; the message names the layer, and nothing is
            changed.
    """
    found: dict[Node, Scales] = {}
    for region, node, layer, rule in prepared.asked.layers:
        if rule.activation is not None and rule.activation.scaling != "dynamic":
            found[node] = prepared.scales(region, node, layer, rule.activation)
    return put_weights(prepared.model, prepared.recipe, prepared.asked, found, inputs)


class _Watching(Interpreter):
    """Runs a graph node by node, and those that it calls."""

    def __init__(self, graph: GraphModule, prepared: Prepared) -> None:
        super().__init__(graph)
        self.watched, self.prepared = graph, prepared

    def run_node(self, n: Node) -> Any:
        """Run one, and note what it gives."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.prepared.take(self.watched, n, value)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator; of one that takes graphs, run these."""
        if not isinstance(target, torch._ops.HigherOrderOperator) or target.name() not in _CONTROL:  # noqa: SLF001 # pyright: ignore - no public name
            return super().call_function(target, args, kwargs)
        return _CONTROL[target.name()](self._run, *args)

    def _run(self, graph: GraphModule, *inputs: Any) -> tuple[Any, ...]:
        given = _Watching(graph, self.prepared).run(*inputs, enable_io_processing=False)
        return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def _cond(run: Any, taken: Any, yes: GraphModule, no: GraphModule, operands: Any) -> tuple[Any, ...]:
    return run(yes if taken else no, *operands)


def _while_loop(run: Any, goes_on: GraphModule, body: GraphModule, carried: Any, given: Any) -> tuple[Any, ...]:
    carried = tuple(carried)
    while bool(run(goes_on, *carried, *given)[0]):
        carried = run(body, *carried, *given)
    return carried


def _scan(run: Any, step: GraphModule, first: Any, rows: Any, given: Any) -> tuple[Any, ...]:
    carried, made = tuple(first), []
    for each in zip(*rows, strict=True):
        out = run(step, *carried, *each, *given)
        carried = out[: len(carried)]
        made.append(out[len(carried) :])
    return *carried, *_stacked(made)


def _map(run: Any, step: GraphModule, rows: Any, given: Any) -> tuple[Any, ...]:
    return _stacked([run(step, *each, *given) for each in zip(*rows, strict=True)])


def _invoke(run: Any, graph: GraphModule, name: Any, *operands: Any) -> tuple[Any, ...]:
    del name
    return run(graph, *operands)


def _stacked(rows: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(torch.stack(each) for each in zip(*rows, strict=True))


_CONTROL: dict[str, Callable[..., tuple[Any, ...]]] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "scan": _scan,
    "map_impl": _map,
    "invoke_subgraph": _invoke,
}
