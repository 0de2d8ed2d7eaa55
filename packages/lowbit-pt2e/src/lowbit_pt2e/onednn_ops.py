"""Operators of oneDNN that torch has, what they lack for tracing, and two of lowbit's beside them.

`lowbit_pt2e::convolution_sum` is oneDNN's convolution that adds to codes, without writing to them; Inductor makes it
the one that writes where nothing reads them later. `lowbit_pt2e::max_pool` is a pool of codes, which torch has of
floats alone.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

_aten: Any = torch.ops.aten
_onednn: Any = torch.ops.onednn

_LIBRARY = torch.library.Library("lowbit_pt2e", "FRAGMENT")
_LIBRARY.define("max_pool(Tensor codes, int[] kernel_size, int[] stride=[], int[] padding=[0]) -> Tensor")
_LIBRARY.define(
    "convolution_sum(Tensor x, float x_scale, int x_zero, Tensor weight, Tensor w_scale, Tensor w_zero, Tensor other, "
    "float other_scale, int other_zero, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "float scale, int zero, str activation) -> Tensor"
)

MAX_POOL: Any = torch.ops.lowbit_pt2e.max_pool.default
CONVOLUTION_SUM: Any = torch.ops.lowbit_pt2e.convolution_sum.default
PACK_CONVOLUTION: Any = _onednn.qconv_prepack.default
PACK_LINEAR: Any = _onednn.qlinear_prepack.default
CONVOLUTION: Any = _onednn.qconv_pointwise.default
LINEAR: Any = _onednn.qlinear_pointwise.default
LAYERS = (PACK_CONVOLUTION, PACK_LINEAR, CONVOLUTION, CONVOLUTION_SUM, LINEAR)

Activation = tuple[str, list[Any], str]
"""An activation as oneDNN's operators take it: its name, its numbers, and how it is computed."""
NONE: Activation = ("none", [], "none")
_NAMES = {_aten.relu.default: "relu", _aten.hardswish.default: "hardswish", _aten.silu.default: "swish"}


def activation_of(node: Node, *, convolves: bool, added: bool) -> Activation | None:
    """The activation that a node is, if a layer takes it into itself; one that is `added` to takes but relu."""
    if added and node.target is not _aten.relu.default:
        return None
    if node.target is _aten.hardtanh.default:
        bounds: Any = node.args[1:]
        return ("hardtanh", [*bounds, *(-1.0, 1.0)[len(bounds) :]], "none")
    if node.target is _aten.gelu.default:
        how: Any = node.kwargs.get("approximate", "none")
        return None if convolves else ("gelu", [], how)
    name = _NAMES.get(node.target)
    return None if name is None else (name, [], "none")


def _max_pool(
    codes: Tensor, kernel_size: list[int], stride: list[int] | None = None, padding: list[int] | None = None
) -> Tensor:
    # Compilers join it to what is beside; codes below all others are what is beyond the edges.
    sides = kernel_size, stride or kernel_size, padding or [0]
    (tall, wide), (down, right), (above, left) = ((each[0], each[-1]) for each in sides)
    least = torch.iinfo(codes.dtype).min
    codes = torch.nn.functional.pad(codes, (left, left, above, above), value=least)
    rows, columns = (codes.shape[-2] - tall) // down + 1, (codes.shape[-1] - wide) // right + 1
    found = None
    for i, j in product(range(tall), range(wide)):
        part = codes[..., i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        found = part if found is None else torch.maximum(found, part)
    assert found is not None
    return found


def _convolution_sum_fake(*given: Any) -> Tensor:
    return torch.empty_like(given[6], memory_format=torch.channels_last)


def _convolution_sum(
    x: Tensor,
    x_scale: float,
    x_zero: int,
    weight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    other: Tensor,
    other_scale: float,
    other_zero: int,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: float,
    zero: int,
    activation: str,
) -> Tensor:
    total = torch.empty_like(other, memory_format=torch.channels_last).copy_(other)
    return _onednn.qconv2d_pointwise.binary(
        *(x, x_scale, x_zero, weight, w_scale, w_zero, total, bias, stride, padding, dilation, groups),
        *(scale, zero, torch.uint8, other_scale, other_zero, "sum", 1.0, activation, [], "none"),
    )


_LIBRARY.impl("max_pool", _max_pool, "CompositeImplicitAutograd")
torch.library.register_fake("lowbit_pt2e::convolution_sum", _convolution_sum_fake, lib=_LIBRARY)
# Packed weights have a dispatch key of their own.
for _key in ("CPU", "MkldnnCPU"):
    _LIBRARY.impl("convolution_sum", _convolution_sum, _key)


@cache
def register() -> None:
    """Tell torch's tracing of packed weights, and Inductor of sums; once."""
    for name in ("qconv_prepack", "qlinear_prepack"):
        # Some versions of torch tell of one or both themselves.
        with suppress(RuntimeError):
            torch.library.register_fake(f"onednn::{name}", _packed)
    from torch._inductor import lowering  # noqa: PLC0415 - takes seconds, and is of use where graphs are compiled

    in_place = lowering.lowerings.get(_onednn.qconv2d_pointwise.binary)
    if in_place is not None:
        lowering.register_lowering(CONVOLUTION_SUM, type_promotion_kind=None)(_lowered(in_place, lowering))


def _packed(weight: Tensor, *given: Any) -> Tensor:
    del given
    # As torch tells the strides of what oneDNN packs; matrices are turned.
    shape = weight.shape if weight.dim() > 2 else weight.shape[::-1]
    return weight.new_empty_strided(shape, (1, *(0,) * (weight.dim() - 1)))


def _lowered(in_place: Any, lowering: Any) -> Any:
    def lower(*args: Any) -> Any:
        x, x_scale, x_zero, weight, w_scale, w_zero, other, other_scale, other_zero, bias, *rest = args
        *window, scale, zero, activation = rest
        node = lowering.V.graph.current_node
        # What is a view, or an input, is not this graph's own to write to.
        own = isinstance(other.data, lowering.ir.StorageBox) and node.args[6].op == "call_function"
        if not (own and _used_last(node.args[6], node)):
            other = lowering.lowerings[_aten.clone.default](other)
        return in_place(
            *(x, x_scale, x_zero, weight, w_scale, w_zero, other, bias, *window, scale, zero, torch.uint8),
            *(other_scale, other_zero, "sum", 1.0, activation, [], "none"),
        )

    return lower


def _used_last(value: Node, node: Node) -> bool:
    """Whether nothing that runs after a node uses a value, nor a view of it."""
    order = {each: i for i, each in enumerate(node.graph.nodes)}
    # It reads what it takes while it writes.
    if node.args.count(value) > 1:
        return False
    for user in value.users:
        schema: Any = getattr(user.target, "_schema", None)
        views = schema is not None and any(each.alias_info for each in schema.returns)
        if user.op == "output" or views or order[user] > order[node]:
            return False
    return True
