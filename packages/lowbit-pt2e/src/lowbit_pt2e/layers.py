"""Products of exported graphs with constants, in whatever operators they were written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lowbit_pt2e.graphs import Region

_aten: Any = torch.ops.aten

LINEARS = (_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default)
"""Operators that a product with a constant may be."""
TURNS = (_aten.t.default, _aten.transpose.int, _aten.permute.default)
"""Operators that exchange dimensions."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with a constant: `x @ weight.T + bias`."""

    x: Node
    weight: Tensor
    # The name of the attribute that it is, or, if `turned`, is the transpose of.
    name: str
    turned: bool
    bias: Tensor | None
    # The node that is the bias.
    added: Node | None


def linear_of(region: Region, node: Node) -> Linear | str:
    """A layer's constants, or why it has none."""
    origin: Any
    if node.target is _aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
        held, origin = region.constant(weight), weight
    else:
        if any(value != 1 for value in node.kwargs.values()):
            return "its layer scales what it adds"
        bias, x, weight = node.args if node.target is _aten.addmm.default else (None, *node.args)
        held, origin = _matrix(region, weight)
        held = None if held is None else held.T
    if held is None or held.dim() != 2 or not isinstance(x, Node):
        return "its layer's weight is computed or changed in the graph"
    if not held.is_floating_point():
        return f"its layer's weight is {held.dtype}"
    added = region.constant(bias)
    if bias is not None and (added is None or added.dim() != 1):
        return "its layer's bias is computed or changed in the graph"
    attribute = region.constant(origin)
    turned = attribute is not None and (attribute.shape, attribute.stride()) != (held.shape, held.stride())
    return Linear(x, held, region.path(origin), turned, added, bias)  # pyright: ignore[reportArgumentType] - a node, if a constant


def _matrix(region: Region, node: Any) -> tuple[Tensor | None, Any]:
    """A constant (K, N), or what turns one, and the node that is it."""
    held = region.constant(node)
    if held is None and isinstance(node, Node) and node.target in TURNS:
        node, turn = node.args[0], node
        inner = region.constant(node)
        held = None if inner is None else turn.target(inner, *turn.args[1:])  # pyright: ignore[reportCallIssue] - an operator
    return (held if held is not None and held.dim() == 2 else None), node
