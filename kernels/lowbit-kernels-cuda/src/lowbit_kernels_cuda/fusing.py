"""A pass over a compiled graph: products that share inputs run together, which are rounded once, where they are made.

What makes them may be an RMS norm, with the sum before it, or a gated activation, `silu(gate) * up`: one kernel reads
what these read and writes codes, rather than 16-bit floats that are read again to be rounded.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from lowbit.activation import Activation
from lowbit.format import Format
from lowbit_kernels_cuda.inputs import LONGEST
from lowbit_kernels_cuda.linear import Weight
from lowbit_kernels_cuda.sharing import shares
from lowbit_kernels_cuda.weights import parts

_ops: Any = torch.ops
_aten, _ours = _ops.aten, _ops.lowbit_cuda
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Product:
    """How inputs of a product are rounded."""

    module: str
    format: str
    activation: str
    act_scale: Node | None
    act_zero: Node | None
    expands: bool


@dataclass(frozen=True, slots=True)
class _Made:
    """What makes inputs: arguments of `rounded`, and the sum that it makes besides."""

    producer: str
    x: Node
    more: Node | None = None
    weight: Node | None = None
    eps: float = 0.0
    total: Node | None = None


def fuse(graph: Graph) -> None:
    """Change a graph of aten operators in which products are `lowbit_cuda.linear`."""
    shared: dict[tuple[Node, _Product], list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_ours.linear.default):
        if (product := _product(node)) is not None:
            shared.setdefault((_input([node]), product), []).append(node)
    for (x, product), nodes in shared.items():
        made = (_gated(nodes) or _normed(nodes, product)) if product.activation else None
        if made is None and len(nodes) == 1:
            continue
        inputs: tuple[Any, Any, Any] = x, None, None
        if product.activation:
            inputs = _round(graph, product, nodes, made or _Made("", x))
        for several in _alike_in_kind(nodes):
            if product.activation or len(several) > 1:
                _together(graph, product, several, inputs)
    graph.eliminate_dead_code()


def _product(node: Node) -> _Product | None:
    """How the inputs of a product are rounded, if at all, and others may share them."""
    given: Any = node.args
    module, x, tensors, names, spec, activation, shape, bias, offs, values = given
    if module not in {"linear", "byte_linear"} or offs is not None or values is not None or "pre_scale" in names:
        return None
    if activation and not shares(Activation.parse(activation)):
        return None
    if _value(x).dtype not in _HALF or shape[-1] > LONGEST:
        return None
    fmt, expands, count = Format.parse(spec), False, 0
    if module == "linear":
        count = len(parts(fmt.element.bits))
        of_bias = None if bias is None else _value(bias)
        expands = bool(activation) and Weight(tensors, names, fmt, *shape).expands(of_bias, _value(x).dtype)
    named = dict(zip(names, tensors[count:], strict=False))
    return _Product(module, spec, activation, named.get("act_scale"), named.get("act_zero"), expands)


def _alike_in_kind(nodes: list[Node]) -> list[list[Node]]:
    """Products that may run together, where the first of them is: whose weights have parts of the same kinds."""
    found: dict[Any, list[Node]] = {}
    for node in nodes:
        given: Any = node.args
        _, _, tensors, names, *_, bias, _, _ = given
        kinds = tuple((_value(part).dtype, _value(part).numel() > 1) for part in tensors)
        # What is computed in between, a weight or a bias, is not there yet.
        early = all(map(_is_given, [*tensors, *([] if bias is None else [bias])]))
        found.setdefault((tuple(names), kinds, bias is None, early or node), []).append(node)
    return list(found.values())


def _gated(nodes: list[Node]) -> _Made | None:
    """`silu(gate) * up`, as torch.compile has it, that nothing but these products reads."""
    for activated, up in _factors(nodes):
        divided = _called(_narrowed(activated, nodes), _aten.div.Tensor)
        if divided is None:
            continue
        wide, below = divided.args
        added = _called(below, _aten.add.Tensor, _aten.add.Scalar)
        exponential = _called(added and added.args[0], _aten.exp.default)
        negated = _called(exponential and exponential.args[0], _aten.neg.default)
        gate = _widened(wide)
        if gate and added and negated and added.args[1] == 1 and negated.args[0] is wide and _alike(gate, up):
            return _Made("silu", gate, up)
    return None


def _normed(nodes: list[Node], of: _Product) -> _Made | None:
    """`weight * (x * rsqrt(mean(x ** 2) + eps))`, as torch.compile has it, that nothing but these products reads."""
    for weight, normed in _factors(nodes):
        product = _called(_narrowed(normed, nodes), _aten.mul.Tensor)
        root = _called(product and product.args[1], _aten.rsqrt.default)
        added = _called(root and root.args[0], _aten.add.Tensor, _aten.add.Scalar)
        mean = _called(added and added.args[0], _aten.mean.dim)
        power = _called(mean and mean.args[0], _aten.pow.Tensor_Scalar)
        if not (product and added and mean and power):
            continue
        x, eps = _widened(product.args[0]), added.args[1]
        right = power.args == (product.args[0], 2) and isinstance(eps, float) and mean.args[2:] == (True,)
        if x is None or not right or mean.args[1] not in ([-1], [_value(x).dim() - 1]):
            continue
        if _value(weight).shape != _value(x).shape[-1:] or _value(weight).dtype != _value(x).dtype:
            continue
        total = _called(x, _aten.add.Tensor)
        # What the kernel needs besides is there before the sum, whose place it takes.
        given = all(part is None or _is_given(part) for part in (weight, of.act_scale, of.act_zero))
        if total and not total.kwargs and _alike(*total.args) and given:
            return _Made("norm", total.args[0], total.args[1], weight, eps, total)
        return _Made("norm", x, None, weight, eps)
    return None


def _input(nodes: list[Node]) -> Node:
    """What products share."""
    found: Any = nodes[0].args[1]
    return found


def _is_given(node: Node) -> bool:
    """Whether a node is there before all that is computed."""
    return node.op in {"placeholder", "get_attr"}


def _factors(nodes: list[Node]) -> list[tuple[Node, Node]]:
    """Both orders of what the inputs of these products, which nothing else reads, are the product of."""
    x: Any = _input(nodes)
    if not _called(x, _aten.mul.Tensor) or set(x.users) != set(nodes):
        return []
    a, b = x.args
    return [(a, b), (b, a)] if isinstance(a, Node) and isinstance(b, Node) else []


def _called(node: Any, *targets: Any) -> Any:
    """The node, if it calls one of these, or None."""
    return node if isinstance(node, Node) and node.op == "call_function" and node.target in targets else None


def _narrowed(node: Any, nodes: list[Node]) -> Node | None:
    """What is rounded to the type of these products' inputs."""
    narrow = _called(node, _ops.prims.convert_element_type.default)
    return narrow.args[0] if narrow and narrow.args[1] == _value(_input(nodes)).dtype else None


def _widened(node: Any) -> Node | None:
    """The 16-bit floats that a node has as float32."""
    wide = _called(node, _ops.prims.convert_element_type.default)
    return wide.args[0] if wide and wide.args[1] == torch.float32 and _value(wide.args[0]).dtype in _HALF else None


def _alike(a: Any, b: Any) -> bool:
    """Whether two nodes are 16-bit floats of one type and shape."""
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return False
    first, other = _value(a), _value(b)
    return first.dtype in _HALF and (first.dtype, first.shape) == (other.dtype, other.shape)


def _value(node: Any) -> Any:
    return node.meta["val"]


def _round(graph: Graph, product: _Product, nodes: list[Node], made: _Made) -> tuple[Node, Node, Node]:
    """What products of a kind are multiplied with: values, scales and zero points."""
    with graph.inserting_before(made.total or nodes[0]):
        inputs = _call(
            graph,
            *(_ours.rounded.default, product.module, made.x, product.format, product.activation),
            *(product.act_scale, product.act_zero, product.expands, made.producer, made.more, made.weight, made.eps),
        )
        values, scale, zero, total = (_call(graph, operator.getitem, inputs, i) for i in range(4))
    if made.total is not None:
        made.total.replace_all_uses_with(total)
    return values, scale, zero


def _together(graph: Graph, product: _Product, nodes: list[Node], inputs: tuple[Any, Any, Any]) -> None:
    """Put one operator in the place of products."""
    tensors: list[Node] = []
    given: Any = nodes[0].args
    _, x, _, names, _, _, (_, k), *_ = given
    for node in nodes:
        of_node: Any = node.args
        tensors += of_node[2]
    shapes, biases = zip(*((node.args[6], node.args[7]) for node in nodes), strict=True)
    with graph.inserting_before(nodes[0]):
        found = _call(
            graph,
            *(_ours.linears.default, product.module, *inputs, tensors, names, product.format, product.activation),
            *([n for n, _ in shapes], k, list(biases), product.expands, _value(x).dtype),
        )
        for i, node in enumerate(nodes):
            out = _call(graph, operator.getitem, found, i)
            # Its arguments in eager mode were others.
            out.meta = {name: value for name, value in node.meta.items() if name != "eager_input_vals"}
            node.replace_all_uses_with(out)
    for node in nodes:
        graph.erase_node(node)


def _call(graph: Graph, target: Any, *given: Any) -> Node:
    """A call whose value is known as those of others in the graph are."""
    node = graph.call_function(target, given)
    known = map_arg(given, _value)
    mode = detect_fake_mode(known)
    assert mode is not None
    with mode:
        node.meta["val"] = target(*known)
    return node
