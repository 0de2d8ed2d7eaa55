"""Norms of running statistics folded into the convolution or linear layer before them, or the linear layer after.

A norm in eval mode is `y = x a + c` for each channel, `a = weight / sqrt(variance + eps)`, `c = bias - mean a`. A layer
before it becomes one with `W a` and `b a + c`; a linear layer after it, one with `W a` along its columns and `b + W c`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from lowbit_pt2e.graphs import WAS, Editor, Region, untold
from lowbit_pt2e.layers import CONVOLUTIONS, LINEARS, TURNS, Linear, geometry, linear_of
from lowbit_pt2e.passes import Match, Report, run_passes

_aten: Any = torch.ops.aten

# Where arguments stand: whether it trains, and eps; of some the first of several results is what they give.
_NORMS: dict[Any, tuple[int | None, int]] = {
    _aten.batch_norm.default: (5, 7),
    _aten.native_batch_norm.default: (5, 7),
    _aten._native_batch_norm_legit.default: (5, 7),  # noqa: SLF001 - operators' names
    _aten._native_batch_norm_legit_no_training.default: (None, 6),  # noqa: SLF001
}
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)  # noqa: SLF001


def fold_norms(model: nn.Module, inputs: tuple[Any, ...] | None = None) -> Report:
    """Fold norms of running statistics into the layers beside them, in every graph of an exported `model`, in place.

    What cannot be folded, because results would differ, is left, and the report says why. With example `inputs` it also
    says how far outputs moved.

    Raises:
        GraphError: `model` is none that was exported.
    """
    return run_passes(model, (NormAfter(), NormBefore()), inputs)


@dataclass(frozen=True, slots=True)
class _Norm:
    """What a norm does to each channel (C,), in float64."""

    scale: Tensor
    shift: Tensor


class NormAfter:
    """A convolution or linear layer, and the norm of its output channels."""

    name = "fold the norm after a layer"
    adds = (*CONVOLUTIONS, _aten.linear.default)

    def matches(self, region: Region) -> Iterator[Match]:
        """Norms whose input, but for turns and views, is a layer's output."""
        for node in region.nodes:
            layer, way = _up(node.args[0]) if node.target in _NORMS else (None, [])
            if layer is None or layer.target not in {*CONVOLUTIONS, *LINEARS}:
                continue
            norm = _norm(region, node)
            refusal = norm if isinstance(norm, str) else _shared([layer, *way]) or untold(layer)
            if layer.target in CONVOLUTIONS:
                refusal = refusal or _convolution_misfit(region, layer, way)
                x, held, old = layer.args[0], *map(region.constant, (*layer.args, None)[1:3])
            else:
                linear = linear_of(region, layer)
                refusal = refusal or (linear if isinstance(linear, str) else _linear_misfit(layer, way))
                x, held, old = (None,) * 3 if isinstance(linear, str) else (linear.x, linear.weight, linear.bias)
            parts: Any = None
            if refusal is None and isinstance(norm, _Norm) and held is not None:
                parts = _like(_scaled(held, norm.scale, layer), held), _moved(old, norm, held)
                refusal = _overflow(parts, (held, old))
            yield Match(node, refusal, partial(self._fold, region, node, layer, way, x, parts))

    def _fold(self, region: Region, norm: Node, layer: Node, way: list[Node], x: Any, parts: Any) -> None:
        edit = Editor(region, layer, layer)
        weight, bias = _constants(edit, parts)
        if layer.target in CONVOLUTIONS:
            made = edit.call(layer.target, x, weight, bias, *layer.args[3:], **layer.kwargs)  # pyright: ignore[reportArgumentType] - an operator
        else:
            made = edit.call(_aten.linear.default, x, weight, bias)
        layer.replace_all_uses_with(made)
        region.module.graph.erase_node(layer)
        # What the norm took is now what it gave; what was before that, nothing that was.
        for each in (*way, made):
            each.meta[WAS] = None
        (*way, made)[0].meta[WAS] = _result(norm).name
        _leave_out(region, norm)


class NormBefore:
    """A norm, and the linear layer that alone takes what it gives."""

    name = "fold the norm before a linear layer"
    adds = (_aten.linear.default,)

    def matches(self, region: Region) -> Iterator[Match]:
        """Linear layers whose input, but for turns and views, is a norm's output."""
        for node in region.nodes:
            given: Any = node.args[node.target is _aten.addmm.default] if node.target in LINEARS else None
            found, way = _up(given)
            if found is None or found.target not in _NORMS:
                continue
            norm, linear = _norm(region, found), linear_of(region, node)
            refusal = next((each for each in (norm, linear) if isinstance(each, str)), None) or untold(node)
            if refusal is None and _back(given.meta["val"].dim() - 1, way) != 1:
                refusal = "the layer sums over another dimension than the norm's channels"
            refusal = refusal or _shared([_result(found), *way])
            if refusal is None and region.changes(found.args[0]):  # pyright: ignore[reportArgumentType] - a node
                refusal = "what the norm takes is changed in place, and the layer would take it later"
            parts: Any = None
            if refusal is None and isinstance(norm, _Norm) and isinstance(linear, Linear):
                wide = linear.weight.detach().double()
                total = wide @ norm.shift + (0 if linear.bias is None else linear.bias.detach().double())
                weight = _like(wide * norm.scale, linear.weight)
                parts = weight, _like(total, linear.weight if linear.bias is None else linear.bias)
                refusal = _overflow(parts, (linear.weight, linear.bias))
            yield Match(node, refusal, partial(self._fold, region, found, node, way, linear, parts))

    def _fold(self, region: Region, norm: Node, node: Node, way: list[Node], linear: Any, parts: Any) -> None:
        edit = Editor(region, node, node)
        weight, bias = _constants(edit, parts)
        node.replace_all_uses_with(edit.call(_aten.linear.default, linear.x, weight, bias))
        region.module.graph.erase_node(node)
        for each in way:
            each.meta[WAS] = None
        _leave_out(region, norm)


def frozen(node: Node, *, freeze: bool = False) -> bool:
    """Whether a node is no norm that normalizes by the statistics of each batch; `freeze` makes it so."""
    trains, _ = _NORMS.get(node.target, (None, 0))
    if trains is not None and node.args[trains] and freeze:
        node.args = (*node.args[:trains], False, *node.args[trains + 1 :])
    return trains is None or not node.args[trains]


def _constants(edit: Editor, parts: tuple[Tensor, Tensor]) -> tuple[Node, Node]:
    """The weight and the bias of the layer that is new."""
    weight, bias = parts
    return edit.constant(f"{edit.like.name}_weight", weight), edit.constant(f"{edit.like.name}_bias", bias)


def _norm(region: Region, node: Node) -> _Norm | str:
    """What a norm does, or why that is not known before it runs."""
    trains, eps = _NORMS[node.target]
    if isinstance(node.meta.get("val"), (tuple, list)) and [each.args[1] for each in _users(node)] != [0]:
        return "its statistics are used, too, or what it gives is not"
    if trains is not None and node.args[trains]:
        return "it normalizes by the statistics of each batch; export the model in eval mode"
    weight, bias, mean, variance = node.args[1:5]
    if mean is None or variance is None:
        return "it keeps no statistics"
    parts = [None if each is None else region.constant(each) for each in (weight, bias, mean, variance)]
    names = ("weight", "bias", "mean", "variance")
    for name, each, part in zip(names, (weight, bias, mean, variance), parts, strict=True):
        if each is not None and part is None:
            return f"its {name} is computed or changed in the graph"
    wide = [None if part is None else part.detach().double() for part in parts]
    assert wide[2] is not None
    assert wide[3] is not None
    scale = (wide[3] + node.args[eps]).rsqrt()  # pyright: ignore[reportOperatorIssue] - a number
    scale = scale if wide[0] is None else scale * wide[0]
    shift = -wide[2] * scale
    return _Norm(scale, shift if wide[1] is None else shift + wide[1])


def _convolution_misfit(region: Region, layer: Node, way: list[Node]) -> str | None:
    """Why a norm of dim 1, behind `way`, is not one of a convolution's channels, or its constants are none."""
    weight, bias = (*layer.args, None)[1:3]
    held = region.constant(weight)
    if held is None or (bias is not None and region.constant(bias) is None):
        return "its layer's weight or bias is computed or changed in the graph"
    if way:
        return f"{way[0].name} lies between it and a convolution"
    if layer.meta["val"].dim() != held.dim():
        return "its layer's output has no batch, so that dim 1 is no channel"
    return None


def _linear_misfit(layer: Node, way: list[Node]) -> str | None:
    """Why a norm of dim 1, behind `way`, is not one of a linear layer's channels."""
    last = layer.meta["val"].dim() - 1
    dim = _back(1, way)
    if dim == last:
        return None
    where = "a dimension that a view made" if dim is None else f"dim {dim}"
    return f"it normalizes {where} of its layer's output, whose channels are dim {last}"


def _up(node: Any) -> tuple[Node | None, list[Node]]:
    """What a value was before turns and views, and these, the last first; a norm that has several results is itself."""
    way: list[Node] = []
    while isinstance(node, Node) and node.target in {*TURNS, *_VIEWS}:
        way.append(node)
        node = node.args[0]
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    return (node if isinstance(node, Node) else None), way


def _back(dim: int, way: list[Node]) -> int | None:
    """Which dimension it was before `way`; None if it was none."""
    for node in way:
        source: Any = node.args[0]
        before, after, given = source.meta["val"].shape, node.meta["val"].shape, node.args[1:]
        if node.target in _VIEWS:
            # The last one stays where it is as long.
            if dim != len(after) - 1 or before[-1] != after[-1]:
                return None
            dim = len(before) - 1
            continue
        order: Any = list(range(len(after)))
        if node.target is _aten.permute.default:
            order = given[0]
        else:
            one, other = given or (0, len(after) - 1)
            order[one], order[other] = order[other], order[one]
        dim = int(order[dim]) % len(after)
    return dim


def _shared(nodes: list[Node]) -> str | None:
    """Who else uses one of these, which one alone may."""
    for node in nodes:
        users = _users(node)
        if len(users) > 1:
            return f"{node.name} is used by {' and '.join(each.name for each in users)}"
    return None


def _users(node: Node) -> list[Node]:
    """Who uses a node, but for those that nothing comes of."""
    return sorted(each for each in node.users if each.users or each.is_impure())


def _result(norm: Node) -> Node:
    """What of a norm's results is the normalized value."""
    if not isinstance(norm.meta["val"], (tuple, list)):
        return norm
    return next(each for each in norm.users if each.target is operator.getitem and each.args[1] == 0)


def _leave_out(region: Region, norm: Node) -> None:
    result = _result(norm)
    result.replace_all_uses_with(norm.args[0])  # pyright: ignore[reportArgumentType] - a node
    for each in (*[user for user in norm.users if not user.users], norm):
        region.module.graph.erase_node(each)


def _scaled(weight: Tensor, scale: Tensor, layer: Node) -> Tensor:
    """A layer's weight with its output channels scaled, in float64."""
    wide = weight.detach().double()
    if layer.target not in CONVOLUTIONS:
        return wide * scale[:, None]
    transposed, groups = geometry(layer)[-2:]
    windows = (1,) * (weight.dim() - 2)
    if not transposed:
        return wide * scale.view(-1, 1, *windows)
    # (I, O / groups, ..), of group after group.
    parts = wide.view(groups, -1, *weight.shape[1:]) * scale.view(groups, 1, -1, *windows)
    return parts.view(weight.shape)


def _moved(bias: Tensor | None, norm: _Norm, weight: Tensor) -> Tensor:
    if bias is None:
        return _like(norm.shift, weight)
    return _like(bias.detach().double() * norm.scale + norm.shift, bias)


def _like(value: Tensor, old: Tensor) -> Tensor:
    """`value` of the dtype and the kind of `old`."""
    value = value.detach().to(old.dtype)
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def _overflow(parts: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor | None]) -> str | None:
    """Whether what was finite is not any more."""
    for part, before in zip(parts, old, strict=True):
        if (before is None or bool(before.isfinite().all())) and not bool(part.isfinite().all()):
            return f"folded parameters would be too large for {part.dtype}"
    return None
