"""Layers of exported graphs: products and convolutions with constants, in whatever operators they were written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lowbit_pt2e.graphs import Editor, Region

_aten: Any = torch.ops.aten

LINEARS = (_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default)
"""Operators that a product with a constant may be."""
CONVOLUTIONS: dict[Any, bool] = {
    _aten.conv1d.default: False,
    _aten.conv2d.default: False,
    _aten.conv3d.default: False,
    _aten.conv1d.padding: False,
    _aten.conv2d.padding: False,
    _aten.conv3d.padding: False,
    _aten.conv_transpose1d.default: True,
    _aten.conv_transpose2d.input: True,
    _aten.conv_transpose3d.input: True,
    _aten.convolution.default: False,
}
"""Operators that convolve, and whether they are transposed, if that is no argument."""
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
    # Whether the operator takes (K, N).
    across: bool
    bias: Tensor | None
    # The node that is the bias.
    added: Node | None

    def given(self, node: Node) -> Node:
        """What a layer's node takes as its weight."""
        return node.args[1 + (node.target is _aten.addmm.default)]  # pyright: ignore[reportReturnType] - a node

    def rows(self, weight: Tensor) -> Tensor:
        """What it takes, as a matrix (N, K); `back` is the way back."""
        return weight.T if self.across else weight

    def back(self, rows: Tensor) -> Tensor:
        """The way back."""
        return rows.T if self.across else rows


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution with a constant, which as a matrix has a row of its own for each output channel."""

    x: Node
    # (O, I / groups * ..), and as the operator takes it.
    weight: Tensor
    shape: tuple[int, ...]
    name: str
    # The groups of a transposed one, whose weight is (I, O / groups, ..); 0: it is none.
    turned: int
    bias: Tensor | None
    added: Node | None

    def given(self, node: Node) -> Node:
        """What a layer's node takes as its weight."""
        return node.args[1]  # pyright: ignore[reportReturnType] - a node

    def rows(self, weight: Tensor) -> Tensor:
        """What it takes, as the matrix; `back` is the way back."""
        if self.turned:
            weight = weight.unflatten(0, (self.turned, -1)).transpose(1, 2).flatten(0, 1)
        return weight.flatten(1)

    def back(self, rows: Tensor) -> Tensor:
        """The way back."""
        for target, *args in self._way_back():
            rows = target(rows, *args)
        return rows

    def in_place(self, rows: Node, edit: Editor) -> Node:
        """The way back, of a node."""
        for target, *args in self._way_back():
            rows = edit.call(target, rows, *args)
        return rows

    def _way_back(self) -> list[tuple[Any, ...]]:
        view, turn, reshape = IN_PLACE
        if not self.turned:
            return [(view, list(self.shape))]
        ins, outs, *window = self.shape
        parts = [self.turned, outs, ins // self.turned, *window]
        return [(view, parts), (turn, 1, 2), (reshape, list(self.shape))]


IN_PLACE = (_aten.view.default, _aten.transpose.int, _aten.reshape.default)
"""Operators that `Convolution.in_place` adds."""


def layer_of(region: Region, node: Node) -> Linear | Convolution | str:
    """A layer's constants, or why it has none."""
    return convolution_of(region, node) if node.target in CONVOLUTIONS else linear_of(region, node)


def convolution_of(region: Region, node: Node) -> Convolution | str:
    """A convolution's constants, or why it has none."""
    x, weight, bias = (*node.args, None)[:3]
    held, added = region.constant(weight), region.constant(bias)
    if held is None or not isinstance(x, Node):
        return "its layer's weight is computed or changed in the graph"
    if not held.is_floating_point():
        return f"its layer's weight is {held.dtype}"
    if bias is not None and added is None:
        return "its layer's bias is computed or changed in the graph"
    transposed, groups = geometry(node)[-2:]
    name = region.path(weight)  # pyright: ignore[reportArgumentType] - a node, if a constant
    layer = Convolution(x, held, tuple(held.shape), name, groups * transposed, added, bias)  # pyright: ignore[reportArgumentType] - as above
    return replace(layer, weight=layer.rows(held))


def geometry(node: Node) -> tuple[Any, Any, Any, bool, int]:
    """Stride, padding, dilation, whether it is transposed, and groups, of a convolution."""
    named: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    schema: Any = node.target
    names = [argument.name for argument in schema._schema.arguments]  # noqa: SLF001 - no public name
    named |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    transposed = bool(named.get("transposed", CONVOLUTIONS[node.target]))
    return named["stride"], named["padding"], named["dilation"], transposed, named["groups"]


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
    across = node.target is not _aten.linear.default
    return Linear(x, held, region.path(origin), turned, across, added, bias)  # pyright: ignore[reportArgumentType] - a node, if a constant


def _matrix(region: Region, node: Any) -> tuple[Tensor | None, Any]:
    """A constant (K, N), or what turns one, and the node that is it."""
    held = region.constant(node)
    if held is None and isinstance(node, Node) and node.target in TURNS:
        node, turn = node.args[0], node
        inner = region.constant(node)
        held = None if inner is None else turn.target(inner, *turn.args[1:])  # pyright: ignore[reportCallIssue] - an operator
    return (held if held is not None and held.dim() == 2 else None), node
