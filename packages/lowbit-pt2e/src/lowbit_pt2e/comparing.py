"""Where a changed graph departs from the one that it was made of, node by node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lowbit.table import align
from lowbit_pt2e.codes import DECODE
from lowbit_pt2e.graphs import CODES, WAS, place, regions
from lowbit_pt2e.passes import Difference, copied, difference, unchanged
from lowbit_pt2e.running import Watching


@dataclass(frozen=True, slots=True)
class Compared:
    """What one node gives, beside the one that it stands for."""

    graph: str
    # Names of the node, and of the one before.
    node: str
    was: str
    operator: str
    difference: Difference
    source: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All nodes that two graphs have in common, in the order in which they first ran."""

    rows: tuple[Compared, ...]

    def __str__(self) -> str:
        """A line for each."""
        rows = [
            {
                "graph": row.graph or "-",
                "node": row.node,
                "operator": row.operator,
                "SQNR, dB": f"{row.difference.sqnr:.1f}",
                "largest difference": f"{row.difference.largest:.3g}",
            }
            for row in self.rows
        ]
        return "\n".join(align(rows)) if rows else "no node is in both graphs"


def compare(before: nn.Module, after: nn.Module, *inputs: Any) -> Comparison:
    """What nodes of `after` give for `inputs` beside those of `before`, the exported graph that it was before passes.

    A node stands for the one of its name, or the one in whose place a pass put it; codes for what they are of. Of a
    loop, all rounds are taken together, as many as both ran.

    Raises:
        GraphError: one of them is no graph that was exported.
    """
    wanted = _values(before, inputs)
    rows: list[Compared] = []
    for (graph, was), (node, all_found) in _values(after, inputs).items():
        all_exact = wanted.get((graph, was), (node, []))[1]
        rounds = min(len(all_exact), len(all_found))
        exact, found = all_exact[:rounds], all_found[:rounds]
        if rounds and node.op == "call_function" and [one.shape for one in exact] == [one.shape for one in found]:
            how = difference(exact, found)
            rows.append(Compared(graph, node.name, was, str(node.target), how, place(node)))
    return Comparison(tuple(rows))


def _values(model: nn.Module, inputs: tuple[Any, ...]) -> dict[tuple[str, str], tuple[Node, list[Tensor]]]:
    """Floating-point tensors that nodes give, round by round, by graph and the name of what each stands for."""
    found = regions(model)
    names = {region.module: region.name for region in found}
    values: dict[tuple[str, str], tuple[Node, list[Tensor]]] = {}

    def take(graph: GraphModule, node: Node, value: Any) -> None:
        was = node.meta.get(WAS, node.name)
        if CODES in node.meta:
            value = DECODE(value, *node.meta[CODES], torch.float32)
        if was is not None and isinstance(value, Tensor) and value.is_floating_point():
            values.setdefault((names[graph], was), (node, []))[1].append(value.detach().clone())

    with torch.no_grad(), unchanged(model):
        Watching(found[0].module, after=take).run(*copied(inputs))
    return values
