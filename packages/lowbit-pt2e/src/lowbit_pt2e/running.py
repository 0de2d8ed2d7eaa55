"""Graphs run node by node, those of loops and branches as often as the data has them run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

Told = Callable[[GraphModule, Node, Any], None]


class Watching(Interpreter):
    """Runs a graph node by node, and those that it calls.

    `before` is told each node's graph, the node, and the values of all that ran; `after`, in their place, its own.
    `instead` is told what `before` is, and gives what the node takes in the place of other nodes' values.
    """

    def __init__(
        self,
        graph: GraphModule,
        *,
        before: Told | None = None,
        after: Told | None = None,
        instead: Callable[[GraphModule, Node, dict[Node, Any]], dict[Node, Any]] | None = None,
    ) -> None:
        super().__init__(graph)
        self.watched, self.before, self.after, self.instead = graph, before, after, instead

    def run_node(self, n: Node) -> Any:
        """Run one, and tell of it."""
        if self.before is not None:
            self.before(self.watched, n, self.env)
        value = super().run_node(n)
        if self.after is not None:
            self.after(self.watched, n, value)
        return value

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[Any, Any]:
        """What a node is given."""
        others = {} if self.instead is None else self.instead(self.watched, n, self.env)
        if not others:
            return super().fetch_args_kwargs_from_env(n)
        given: Any = map_arg((n.args, n.kwargs), lambda node: others.get(node, self.env[node]))
        return given

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator; of one that takes graphs, run these."""
        if not isinstance(target, torch._ops.HigherOrderOperator) or target.name() not in _CONTROL:  # noqa: SLF001 # pyright: ignore - no public name
            return super().call_function(target, args, kwargs)
        return _CONTROL[target.name()](self._run, *args)

    def _run(self, graph: GraphModule, *inputs: Any) -> tuple[Any, ...]:
        inner = Watching(graph, before=self.before, after=self.after, instead=self.instead)
        given = inner.run(*inputs, enable_io_processing=False)
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


def _with_grad(run: Any, enabled: bool, graph: GraphModule, *operands: Any) -> tuple[Any, ...]:  # noqa: FBT001 - as the operator has it
    with torch.set_grad_enabled(enabled):
        return run(graph, *operands)


def _with_autocast(
    run: Any,
    device: str,
    dtype: Any,
    enabled: bool,  # noqa: FBT001 - as above
    cached: Any,
    graph: GraphModule,
    *operands: Any,
) -> tuple[Any, ...]:
    with torch.autocast(device, dtype, enabled, cached):
        return run(graph, *operands)


def _stacked(rows: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(torch.stack(each) for each in zip(*rows, strict=True))


_CONTROL: dict[str, Callable[..., tuple[Any, ...]]] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "scan": _scan,
    "map_impl": _map,
    "invoke_subgraph": _invoke,
    "wrap_with_set_grad_enabled": _with_grad,
    "wrap_with_autocast": _with_autocast,
}
