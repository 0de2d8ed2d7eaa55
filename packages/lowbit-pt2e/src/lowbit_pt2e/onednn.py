"""Quantized layers of exported graphs by oneDNN's operators, which torch has on processors, in codes between layers.

Values that are rounded to int8 become uint8, which is what oneDNN's convolutions take: codes and zero points are 128
more, and stand for the same numbers. Roundings move to where values are made, before pools, views and concatenations;
a layer then takes what follows it, a sum, an activation and a rounding, into itself. What loops carry stays int8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from lowbit.activation import Activation
from lowbit.format import WHOLE, Format
from lowbit_pt2e import onednn_ops as ops
from lowbit_pt2e.codes import DECODE, ENCODE, refuses
from lowbit_pt2e.graphs import CODES, Editor, Region, origin, untold
from lowbit_pt2e.layers import CONVOLUTIONS, geometry
from lowbit_pt2e.passes import Match, Report, run_passes

_aten: Any = torch.ops.aten
_lowbit: Any = torch.ops.lowbit
_LINEAR, _DEQUANTIZE = _lowbit.linear.default, _lowbit.dequantize.default
_UNSIGNED = "uint8:*x*:float32:zero=uint8"
_INTEGERS = (torch.uint8, torch.int8)

# What writes to its first argument, and what gives the same instead.
_IN_PLACE: dict[Any, Any] = {
    _aten.add_.Tensor: _aten.add.Tensor,
    _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.relu_.default: _aten.relu.default,
    _aten.silu_.default: _aten.silu.default,
    _aten.hardswish_.default: _aten.hardswish.default,
    _aten.hardsigmoid_.default: _aten.hardsigmoid.default,
    _aten.hardtanh_.default: _aten.hardtanh.default,
    _aten.sigmoid_.default: _aten.sigmoid.default,
}
_DROPOUTS = (_aten.dropout.default, _aten.dropout_.default)
# What moves numbers and does not change them.
_MOVES = (
    *(_aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten._unsafe_view.default),  # noqa: SLF001
    *(_aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.contiguous.default, _aten.clone.default),
    *(_aten.squeeze.dim, _aten.unsqueeze.default, _aten.slice.Tensor, _aten.select.int, _aten.expand.default),
)
_POOL = _aten.max_pool2d.default


def lower_to_onednn(model: nn.Module, inputs: tuple[Any, ...] | None = None, *, inner: bool = False) -> Report:
    """Run layers of an exported `model` whose weights and inputs are int8 by oneDNN's operators, in place.

    These are convolutions and linear layers with weights in INT8_ROW and static inputs of one scale, as `convert` makes
    them. Sums, activations and roundings that follow are taken into them, so that what goes from one layer to the next
    are codes where layers alone take it. A layer that stays as it is has its reason in the report. Weights are packed
    within the graph: compile it with Inductor's `freezing`, which does so once. Layers in loops and branches stay
    unless `inner` ones are wanted, too: Inductor of torch 2.15 does not compile these operators there. What
    convolutions give has channels last. With example `inputs` the report has how far outputs moved.

    Raises:
        GraphError: `model` is none that was exported.
    """
    ops.register()
    passes = (
        *(_Functional(), _Split(inner=inner), _Same(), _Unsigned(), _Early(), _Same()),
        *(_Together(inner=inner), _Fuse(inner=inner)),
    )
    return run_passes(model, passes, inputs)


class _Functional:
    """Operators that write to what nothing reads any more, dropout that drops nothing, and views of one layout."""

    name = "values that are not written"
    adds = ()

    def matches(self, region: Region) -> Iterator[Match]:
        """Such operators."""
        for node in region.nodes:
            if node.target in _DROPOUTS and not node.args[2]:
                yield Match(node, None, partial(_leave_out, region, node))
            elif node.target is _aten.view.default and not region.changes(node):
                # Of what has channels last later.
                yield Match(node, None, partial(setattr, node, "target", _aten.reshape.default))
            elif node.target in _IN_PLACE:
                yield Match(node, _read_later(region, node), partial(setattr, node, "target", _IN_PLACE[node.target]))


def _leave_out(region: Region, node: Node) -> None:
    node.replace_all_uses_with(node.args[0])  # pyright: ignore[reportArgumentType] - a node
    # It could draw random numbers, so that it would stay.
    region.module.graph.erase_node(node)


def _read_later(region: Region, node: Node) -> str | None:
    """Why what a node writes to is more than its argument."""
    x: Any = node.args[0]
    given = [each.meta.get("val") for each in node.all_input_nodes]
    if any(isinstance(each, Tensor) and each.dtype != x.meta["val"].dtype for each in given):
        return "its result would have another dtype"
    if x.op != "call_function" or origin(x) is not x:
        return f"it writes to {x.name}, which is not the graph's own"
    order = region.nodes
    others = [each for each in x.users if each is not node]
    if any(order.index(each) > order.index(node) or origin(each) is x for each in others):
        return f"it writes to {x.name}, which is used elsewhere"
    return None


class _Split:
    """`lowbit::linear` of int8: its input's rounding, apart."""

    name = "roundings apart from layers"
    adds = (ENCODE, DECODE, _DEQUANTIZE, _aten.linear.default)

    def __init__(self, *, inner: bool) -> None:
        self.inner = inner

    def matches(self, region: Region) -> Iterator[Match]:
        """Quantized linear layers."""
        for node in region.nodes:
            if node.target is _LINEAR:
                refusal = _inner(region, wanted=self.inner) or _linear_misfit(region, node) or untold(node)
                yield Match(node, refusal, partial(self._put, region, node))

    def _put(self, region: Region, node: Node) -> None:
        x, *weight, act_scale, act_zero, _, bias, fmt, activation = _arguments(node)
        edit, known = Editor(region, node, node), Editor(region, node, node, stays=True)
        scale, zero = (region.constant(each) for each in (act_scale, act_zero))
        how = float(scale), 0 if zero is None else int(zero)  # pyright: ignore[reportArgumentType] - a constant
        codes = known.call(ENCODE, x, *how, str(Activation.parse(activation).format))
        value = known.call(DECODE, codes, *how, torch.float32)
        rows = known.call(_DEQUANTIZE, *weight, fmt, x.meta["val"].shape[-1], torch.float32)
        node.replace_all_uses_with(edit.call(_aten.linear.default, value, rows, bias))


def _inner(region: Region, *, wanted: bool) -> str | None:
    """Why a graph's layers stay."""
    return None if wanted or not region.callers else "it is in a loop or a branch, where Inductor cannot compile it"


def _arguments(node: Node) -> list[Any]:
    """Those of `lowbit::linear`."""
    return [*node.args, *(None,) * (11 - len(node.args))]


def _linear_misfit(region: Region, node: Node) -> str | None:
    x, qdata, _, _, _, act_scale, act_zero, pre_scale, _, fmt, activation = _arguments(node)
    if not activation:
        return "its inputs stay as they are"
    how = Activation.parse(activation)
    if how.scaling != "static":
        return f"its inputs are rounded as they come ({activation}), and oneDNN's scales are known before"
    if pre_scale is not None:
        return "its inputs are scaled by columns"
    constants = [each is None or region.constant(each) is not None for each in (qdata, act_scale, act_zero)]
    if not all(constants):
        return "its codes or scales are computed or changed in the graph"
    return _misfit(how.format, fmt, x)


def _misfit(inputs: Format | None, weight: str, x: Node) -> str | None:
    """Why oneDNN does not take a weight's format, or inputs'; None of these: they are not rounded."""
    fmt = Format.parse(weight)
    plain = fmt.zero is None and not fmt.tensor_scale and fmt.scale.name == "float32"
    if fmt.element.name != "int8" or fmt.block != (1, WHOLE) or not plain:
        return f"oneDNN has weights in INT8_ROW; this is {weight}"
    if x.meta["val"].dtype != torch.float32:
        return f"oneDNN's layers are of float32 here; this one is of {x.meta['val'].dtype}"
    if inputs is None:
        return "its inputs are not rounded to 8-bit integers by a scale that is known"
    if inputs.element.kind != "int" or refuses(Activation(inputs, "static")):
        return f"oneDNN has inputs in INT8_TENSOR and INT8_TENSOR_ASYM; these are {inputs}"
    return None


class _Unsigned:
    """Codes that are signed."""

    name = "codes without a sign"
    adds = (ENCODE, DECODE)

    def matches(self, region: Region) -> Iterator[Match]:
        """Roundings to int8 that nothing but values are made of: loops carry others."""
        for node in region.nodes:
            alone = all(each.target is DECODE for each in node.users)
            if node.target is ENCODE and alone and node.meta["val"].dtype == torch.int8:
                yield Match(node, untold(node), partial(self._put, region, node))

    def _put(self, region: Region, node: Node) -> None:
        x, scale, zero, _ = node.args
        zero += 128  # pyright: ignore[reportOperatorIssue] - a number
        codes = Editor(region, node, node).call(ENCODE, x, scale, zero, _UNSIGNED)
        for user in list(node.users):
            made = Editor(region, user, user).call(DECODE, codes, scale, zero, user.args[3])
            user.replace_all_uses_with(made)


class _Early:
    """A rounding of what was only moved, pooled or put side by side."""

    name = "roundings where values are made"
    adds = (ENCODE, *_MOVES, _aten.cat.default, ops.MAX_POOL)

    def matches(self, region: Region) -> Iterator[Match]:
        """Such values that nothing uses but roundings of one scale; from the last to the first."""
        for node in reversed(region.nodes):
            users = list(node.users)
            rounds = [each for each in users if each.target is ENCODE and each.args[1:] == users[0].args[1:]]
            if users and len(rounds) == len(users) and _moves(node, rounds[0]):
                written = any(region.changes(each) for each in (node, *node.all_input_nodes))
                refusal = f"what {node.name} takes is changed in place" if written else untold(node)
                yield Match(node, refusal, partial(self._put, region, node, rounds))

    def _put(self, region: Region, node: Node, rounds: list[Node]) -> None:
        edit, how = Editor(region, node, node, stays=True), rounds[0].args[1:]
        if node.target is _aten.cat.default:
            parts: Any = node.args[0]
            codes = [edit.call(ENCODE, each, *how) for each in parts]
            made = edit.call(_aten.cat.default, codes, *node.args[1:], **node.kwargs)
        else:
            target: Any = ops.MAX_POOL if node.target is _POOL else node.target
            made = edit.call(target, edit.call(ENCODE, node.args[0], *how), *node.args[1:], **node.kwargs)
        for each in rounds:
            each.replace_all_uses_with(made)
            region.module.graph.erase_node(each)
        # It uses what comes before it no more, which may be next.
        region.module.graph.erase_node(node)


def _moves(node: Node, rounds: Node) -> bool:
    if node.target is _POOL:
        # Neither dilated nor with windows beyond the end.
        return len(node.args) < 5 and not node.kwargs and rounds.meta["val"].dtype in _INTEGERS
    return node.target in _MOVES or node.target is _aten.cat.default


class _Same:
    """Roundings of one value by one scale, values of the same codes, and roundings of what such codes stand for."""

    name = "one rounding of a value"
    adds = ()

    def matches(self, region: Region) -> Iterator[Match]:
        """All but the first."""
        first: dict[tuple[Any, ...], Node] = {}
        for node in region.nodes:
            if node.target in {ENCODE, DECODE}:
                x: Any = node.args[0]
                if region.changes(x):
                    # One before and one after are not the same.
                    continue
                known: Any = first.setdefault((node.target, *node.args), node)
                if node.target is ENCODE and x.target is DECODE and x.args[1:3] == node.args[1:3]:
                    known = x.args[0] if x.args[0].meta["val"].dtype == node.meta["val"].dtype else known
                if known is not node:
                    yield Match(node, None, partial(node.replace_all_uses_with, known))


@dataclass(slots=True)
class _Chain:
    """What a layer takes into itself: nodes that follow it, each used by the next alone."""

    # The last of them that gives values.
    last: Node
    # What is added, as codes' value.
    other: Node | None = None
    activation: ops.Activation = ops.NONE
    # The rounding of what comes out.
    rounds: Node | None = None


class _Together:
    """Linear layers of one input, as queries, keys and values are, that nothing is taken into."""

    name = "layers of one input together"
    adds = (_DEQUANTIZE, _aten.linear.default, _aten.slice.Tensor)

    def __init__(self, *, inner: bool) -> None:
        self.inner = inner

    def matches(self, region: Region) -> Iterator[Match]:
        """Such layers, by the first."""
        groups: dict[Any, list[Node]] = {}
        for node in region.nodes:
            rows = _rows(node) if node.target is _aten.linear.default else None
            may = rows is not None and not _inner(region, wanted=self.inner) and not untold(node)
            if rows is None or not may or _refusal(region, node, rows):
                continue
            chain = _chain(region, node)
            if chain.last is node and chain.rounds is None:
                groups.setdefault(node.args[0], []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                yield Match(nodes[0], None, partial(self._put, region, nodes))

    def _put(self, region: Region, nodes: list[Node]) -> None:
        edit, decoded = Editor(region, nodes[0], nodes[0], stays=True), [_rows(node) for node in nodes]
        codes, scales = (
            torch.cat([region.constant(rows.args[i]) for rows in decoded])  # pyright: ignore[reportArgumentType, reportCallIssue, reportOptionalMemberAccess] - constants
            for i in (0, 1)
        )
        first: Any = decoded[0]
        held = (edit.constant(f"{first.args[0]}_{name}", part) for name, part in (("all", codes), ("scale", scales)))
        rows = edit.call(_DEQUANTIZE, *held, *first.args[2:])
        counts = [node.meta["val"].shape[-1] for node in nodes]
        given = [region.constant((*node.args, None)[2]) for node in nodes]
        bias = None
        if any(each is not None for each in given):
            parts = [
                scales.new_zeros(n) if each is None else each.detach() for n, each in zip(counts, given, strict=True)
            ]
            bias = edit.constant(f"{first.args[0]}_bias", torch.cat(parts))
        out, start = edit.call(_aten.linear.default, nodes[0].args[0], rows, bias), 0
        for node, count in zip(nodes, counts, strict=True):
            part = Editor(region, nodes[0], node).call(_aten.slice.Tensor, out, -1, start, start + count)
            node.replace_all_uses_with(part)
            start += count
        for node in nodes:
            region.module.graph.erase_node(node)


class _Fuse:
    """A layer of decoded inputs and weights."""

    name = "layers of oneDNN"
    adds = ops.LAYERS

    def __init__(self, *, inner: bool) -> None:
        self.inner = inner

    def matches(self, region: Region) -> Iterator[Match]:
        """Convolutions and linear layers with weights of codes."""
        for node in region.nodes:
            rows = _rows(node)
            if rows is not None:
                refusal = _inner(region, wanted=self.inner) or _refusal(region, node, rows) or untold(node)
                yield Match(node, refusal, partial(self._put, region, node))

    def _put(self, region: Region, node: Node) -> None:
        chain, rows = _chain(region, node), _rows(node)
        assert rows is not None
        end = chain.last if chain.rounds is None else chain.rounds
        edit = Editor(region, end, chain.last)
        value: Any = node.args[0]
        codes, x_scale, x_zero, _ = value.args
        held, scale = (region.constant(each) for each in rows.args[:2])
        assert held is not None
        assert scale is not None
        stem = str(rows.args[0]).removesuffix("_qdata")
        zeros = torch.zeros(len(held), dtype=torch.int32, device=held.device)
        constants = edit.constant(f"{stem}_scales", scale.reshape(-1)), edit.constant(f"{stem}_zeros", zeros)
        bias: Any = (*node.args, None)[2]
        out: tuple[Any, ...] = (1.0, 0, torch.float32)
        if chain.rounds is not None:
            out = *chain.rounds.args[1:3], chain.rounds.meta["val"].dtype
        given = _shape(codes)
        if node.target in CONVOLUTIONS:
            # A view of an operator's result, of which the weight's own shape is left.
            shape: Any = node.args[1].meta["val"].shape  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue] - a node
            window: Any = _window(node)
            weight = edit.constant(f"{stem}_codes", held.view(shape))
            packed = edit.call(ops.PACK_CONVOLUTION, weight, constants[0], x_scale, x_zero, *window, given)
            taken = codes, x_scale, x_zero, packed, *constants
            if chain.other is None:
                made = edit.call(ops.CONVOLUTION, *taken, bias, *window, *out, *chain.activation)
            else:
                added = chain.other.args[:3]
                made = edit.call(ops.CONVOLUTION_SUM, *taken, *added, bias, *window, *out[:2], chain.activation[0])
        else:
            packed = edit.call(ops.PACK_LINEAR, edit.constant(f"{stem}_codes", held), given)
            made = edit.call(ops.LINEAR, codes, x_scale, x_zero, packed, *constants, bias, *out, *chain.activation)
        end.replace_all_uses_with(made)
        if chain.rounds is not None:
            made.meta[CODES] = out[:2]


def _refusal(region: Region, node: Node, rows: Node) -> str | None:
    """Why a layer of decoded codes is none of oneDNN's."""
    x: Any = node.args[0]
    codes = x.args[0].meta["val"].dtype if x.target is DECODE else None
    inputs = Format.parse(_UNSIGNED) if codes in _INTEGERS else None
    reason = _misfit(inputs, str(rows.args[4]), node)
    if reason is None and codes == torch.int8 and node.target in CONVOLUTIONS:
        reason = "a loop carries its input as int8, and oneDNN's convolutions take uint8"
    if reason is None and any(region.constant(each) is None for each in rows.args[:2]):
        reason = "its weight's codes are computed or changed in the graph"
    bias: Any = (*node.args, None)[2]
    if reason is None and bias is not None and region.constant(bias) is None:
        reason = "its bias is computed or changed in the graph"
    if reason is None and node.target in CONVOLUTIONS:
        stride = _window(node)
        reason = stride if isinstance(stride, str) else None
    return reason


def _rows(node: Node) -> Node | None:
    """The node that decodes a layer's weight, if there is one."""
    weight: Any = node.args[1] if node.target in {*CONVOLUTIONS, _aten.linear.default} else None
    while isinstance(weight, Node) and weight.target in _MOVES:
        weight = weight.args[0]
    return weight if isinstance(weight, Node) and weight.target is _DEQUANTIZE else None


def _shape(codes: Node) -> list[int] | None:
    """The shape of a layer's input, by which weights are packed; None: it is not known before."""
    shape = list(codes.meta["val"].shape)
    return shape if all(isinstance(each, int) for each in shape) else None


def _window(node: Node) -> tuple[list[int], list[int], list[int], int] | str:
    """Stride, padding, dilation and groups of a convolution, or why oneDNN has none such."""
    stride, padding, dilation, transposed, groups = geometry(node)
    shape = node.args[1].meta["val"].shape  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue] - a node
    if transposed:
        return "oneDNN's operators have no transposed convolutions"
    if node.meta["val"].dim() != len(shape):
        return "its input has no batch"
    dims = len(shape) - 2
    stride, dilation = (_each(given, dims) for given in (stride, dilation))
    if padding == "valid":
        padding = 0
    elif padding == "same":
        beyond = [by * (length - 1) for by, length in zip(dilation, shape[2:], strict=True)]
        if any(each % 2 for each in beyond):
            return "it pads one side more than the other"
        padding = [each // 2 for each in beyond]
    return stride, _each(padding, dims), dilation, groups


def _each(given: Any, dims: int) -> list[int]:
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * dims if len(numbers) == 1 else numbers


def _chain(region: Region, node: Node) -> _Chain:
    """What a layer can take into itself."""
    alone, chain = _Chain(node), _Chain(node)
    convolves = node.target in CONVOLUTIONS
    if convolves and node.meta["val"].dim() == 4 and (total := _only(node)) is not None:
        other = _added(region, total, node)
        if other is not None:
            chain.last, chain.other = total, other
    if (after := _only(chain.last)) is not None:
        found = ops.activation_of(after, convolves=convolves, added=chain.other is not None)
        if found is not None:
            chain.last, chain.activation = after, found
    users = list(chain.last.users)
    gives = _INTEGERS[:1] if convolves else _INTEGERS
    if len(users) == 1 and users[0].target is ENCODE and users[0].meta["val"].dtype in gives:
        chain.rounds = users[0]
    if chain.other is not None and chain.rounds is None:
        # Sums are made where what is added lies, in its codes.
        return alone
    return chain


def _only(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _added(region: Region, total: Node, node: Node) -> Node | None:
    """The decoded value that a sum adds to a node, if it does."""
    if total.target is not _aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return None
    other: Any = total.args[1] if total.args[0] is node else total.args[0]
    if not isinstance(other, Node) or other is node or other.target is not DECODE:
        return None
    codes: Any = other.args[0]
    alike = codes.meta["val"].dtype == torch.uint8 and other.meta["val"].shape == node.meta["val"].shape
    return other if alike and not region.changes(codes) else None
