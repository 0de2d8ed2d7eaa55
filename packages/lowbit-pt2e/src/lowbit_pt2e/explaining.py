"""What became of one node: what it is now, by which scales it rounds, and what each pass said of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from lowbit import Activation
from lowbit_pt2e import onednn_ops as ops
from lowbit_pt2e.codes import DECODE, ENCODE
from lowbit_pt2e.drawing import arguments, operator_of
from lowbit_pt2e.folding import NormAfter, NormBefore
from lowbit_pt2e.graphs import WAS, GraphError, Region, place, regions
from lowbit_pt2e.layers import layer_of
from lowbit_pt2e.passes import Finding, Report
from lowbit_pt2e.quantizing import LAYERS

_lowbit: Any = torch.ops.lowbit
_LINEAR, _DEQUANTIZE, _QUANTIZE = (each.default for each in (_lowbit.linear, _lowbit.dequantize, _lowbit.quantize))
# What is put beside a node and not in its place.
_ROUNDINGS = (ENCODE, DECODE, _QUANTIZE, _DEQUANTIZE)
_ONEDNN = (ops.CONVOLUTION, ops.CONVOLUTION_SUM, ops.LINEAR)
# What says of a layer no more than that a norm stays beside it.
_FOLDS = (NormAfter.name, NormBefore.name)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a value of a node is rounded."""

    # Such as input, weight, output.
    what: str
    format: str
    # The least and the greatest; None: it has them when it comes.
    scale: tuple[float, float] | None
    # None: there are none.
    zero: tuple[int, int] | None
    # Where the scales come from.
    origin: str

    def __str__(self) -> str:
        """On one line."""
        parts = [self.format]
        if self.scale is not None:
            parts.append(f"scale {_range(self.scale)}")
        if self.zero is not None:
            parts.append(f"zero point {_range(self.zero)}")
        return f"{self.what}: {', '.join(parts)}, {self.origin}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is known of one node."""

    # The graph it is in; the whole has no name.
    graph: str
    # Its name now; None: it is in the graph no more.
    node: str | None
    # The node before passes whose value it gives; None: no other.
    was: str | None
    # What was asked for, if it is neither of these: the node that this one was made for.
    made_for: str | None
    operator: str
    # Of a tensor.
    dtype: torch.dtype | None
    shape: tuple[Any, ...] | None
    source: str
    roundings: tuple[Rounding, ...]
    # What passes said, in the order of the reports.
    findings: tuple[Finding, ...]
    # Why it is a layer in floating point still; None: it is none.
    left: str | None

    def __str__(self) -> str:
        """Some lines to read."""
        place_now = f" in {self.graph}" if self.graph else ""
        if self.node is None:
            lines = [f"{self.made_for}{place_now} is in the graph no more"]
        else:
            dtype = str(self.dtype).removeprefix("torch.")
            value = "" if self.dtype is None else f", gives {dtype} [{', '.join(map(str, self.shape or ()))}]"
            stands = f", in the place of {self.was}" if self.was is not None else ""
            made = f", made for {self.made_for}" if self.made_for is not None else ""
            lines = [f"{self.node}{place_now}{stands}{made}: {self.operator}{value}"]
        lines += [f"  {self.source}"] if self.source else []
        lines += [f"  {each}" for each in self.roundings]
        for each in self.findings:
            name = "" if each.node == self.node else f" {each.node}"
            lines.append(f"  {each.name}:{name} {'was changed' if each.reason is None else f'was left, {each.reason}'}")
        lines += [f"  in floating point still: {self.left}"] if self.left else []
        return "\n".join(lines)


def explain(model: nn.Module, node_name: str, *reports: Report) -> Explanation:
    """What became of a node, which is named as it is in the graph of `model`, or as it was before passes changed that.

    A node of a loop or a branch may be named with its graph, `while_loop_body_graph_0.linear`. `reports` are those of
    the passes so far, in their order.

    Raises:
        GraphError: no node is or was of that name, or those of several inner graphs are; the message has what is near.
            Or `model` is none that was exported.
    """
    found = regions(model)
    findings = [each for report in reports for each in report.findings]
    graph, _, name = node_name.rpartition(".")
    inner = [region for region in found if region.name == graph or not graph]
    at = _find(inner, name, [each for each in findings if each.graph == graph or not graph])
    if at is None:
        gone = [each for each in findings if each.node == name and (each.graph == graph or not graph)]
        if not gone:
            raise GraphError(_unknown(found, findings, node_name))
        where = gone[0].graph
        alike = tuple(each for each in gone if each.graph == where)
        return Explanation(where, None, None, name, "", None, None, gone[0].source, (), alike, None)
    region, node = at
    value = node.meta.get("val")
    held = region.constant(node) if value is None and node.op == "get_attr" else value
    tensor = held if isinstance(held, Tensor) else None
    before = node.meta.get(WAS, node.name)
    said = _said(region, node, name, findings)
    return Explanation(
        region.name,
        node.name,
        None if before == node.name else before,
        None if name in {node.name, before} else name,
        operator_of(node),
        None if tensor is None else tensor.dtype,
        None if tensor is None else tuple(tensor.shape),
        place(node),
        tuple(_roundings(region, node)),
        said,
        _left(region, node, said, reports),
    )


def _find(found: list[Region], name: str, findings: list[Finding]) -> tuple[Region, Node] | None:
    """The node that has a name, or stands for the one that had it, or was made or exported in its place."""
    nodes = [(region, node) for region in found for node in region.nodes]
    made = _made(name, findings)
    stages = (
        [(region, node) for region, node in nodes if node.name == name],
        [(region, node) for region, node in nodes if node.meta.get(WAS) == name],
        [(region, node) for region, node in nodes if (region.name, node.name) in made],
        [(region, node) for region, node in nodes if name in _exported(node) and node.target not in _ROUNDINGS],
    )
    for ways in stages:
        if ways:
            where = list(dict.fromkeys(region for region, _ in ways))
            if len(where) > 1 and where[0].name:
                named = ", ".join(f"{region.name}.{name}" for region in where)
                raise GraphError(f"several graphs have a {name}; name one of {named}")
            # The last of them gives what the one before gave; others lead to it.
            return [each for each in ways if each[0] is where[0]][-1]
    return None


def _made(name: str, findings: Sequence[Finding]) -> set[tuple[str, str]]:
    """Graphs and names of what was made for a node, and in turn for that."""
    made: set[tuple[str, str]] = set()
    for each in findings:
        if each.node == name or (each.graph, each.node) in made:
            made |= {(each.graph, new) for new in each.made}
    return made


def _exported(node: Node) -> list[str]:
    """Names of exported nodes that a node says it comes from."""
    return [str(getattr(each, "name", "")) for each in node.meta.get("from_node") or ()]


def _said(region: Region, node: Node, name: str, findings: list[Finding]) -> tuple[Finding, ...]:
    """What passes said of a node, and of those that it was before."""
    names = {name, node.name, node.meta.get(WAS), *_exported(node)}
    here = [each for each in findings if each.graph == region.name]
    for each in reversed(here):
        if names.intersection(each.made):
            names.add(each.node)
    return tuple(each for each in here if each.node in names)


def _left(region: Region, node: Node, said: Sequence[Finding], reports: Sequence[Report]) -> str | None:
    refusals = [
        each.reason for each in said if each.node == node.name and each.reason is not None and each.name not in _FOLDS
    ]
    if node.target not in {*LAYERS, _LINEAR}:
        return None
    if refusals:
        return refusals[-1]
    if node.target is _LINEAR:
        return None
    layer = layer_of(region, node)
    if isinstance(layer, str) and _rows(node) is None:
        return layer
    if not any(each.name not in _FOLDS for report in reports for each in report.findings):
        return "no report is of a pass that quantizes layers"
    return "no pass that lowers it has run" if _rows(node) is not None else "no pass spoke of it"


def _unknown(found: list[Region], findings: list[Finding], name: str) -> str:
    known: dict[str, None] = {}
    for region in found:
        stem = f"{region.name}." if region.name else ""
        for node in region.nodes:
            known |= {f"{stem}{each}": None for each in (node.name, node.meta.get(WAS)) if each is not None}
    known |= {f"{each.graph}.{each.node}".lstrip("."): None for each in findings}
    last = [each for each in known if "." in each and each.rpartition(".")[2] == name.rpartition(".")[2]]
    near = get_close_matches(name, known) or last or list(known)[:3]
    return f"no node of the graph is or was {name!r}; there are {', '.join(near)} and others"


def _roundings(region: Region, node: Node) -> Iterator[Rounding]:
    """How a node's values are rounded."""
    given = arguments(node)
    if node.target is ENCODE:
        yield _by_numbers("input", str(given["format"]), given["scale"], given["zero"], _observed(given["x"]))
    elif node.target is DECODE:
        codes: Any = given["codes"]
        yield _by_numbers("input", _dtype(codes), given["scale"], given["zero"], f"codes that {codes.name} gives")
    elif node.target is _QUANTIZE:
        yield Rounding("input", str(given["format"]), None, None, "scales that each input has when it comes")
    elif node.target in {_LINEAR, _DEQUANTIZE}:
        if node.target is _LINEAR:
            yield from _activation(region, given)
        yield _stored(region, given)
    elif node.target in _ONEDNN:
        yield from _onednn(region, node)
    elif node.target in LAYERS:
        yield from (rounding for each in node.all_input_nodes for rounding in _taken(region, each))


def _taken(region: Region, node: Node) -> Iterator[Rounding]:
    """How a layer's operand was rounded."""
    if node.target is DECODE:
        codes: Any = node.args[0]
        encoded = [each for each in _roundings(region, codes) if codes.target is ENCODE]
        yield from encoded or _roundings(region, node)
    else:
        rows = _dequantized(node)
        yield from () if rows is None else _roundings(region, rows)


def _rows(layer: Node) -> Node | None:
    """What decodes a layer's weight, or its input."""
    found = [rows for each in layer.all_input_nodes if (rows := _dequantized(each)) is not None]
    return found[-1] if found else None


def _dequantized(node: Node) -> Node | None:
    """What decodes a value, but for views and turns."""
    while node.target is not _DEQUANTIZE:
        schema: Any = getattr(node.target, "_schema", None)
        if schema is None or not schema.name.startswith("aten::") or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return node


def _activation(region: Region, given: dict[str, Any]) -> Iterator[Rounding]:
    activation, x = given["activation"], given["x"]
    if not activation:
        return
    how = Activation.parse(activation)
    scale, zero = (region.constant(given[name]) for name in ("act_scale", "act_zero"))
    if scale is None:
        yield Rounding("input", str(activation), None, None, "scales that each input has when it comes")
    else:
        local = " for the whole, and others when it comes" if how.scaling == "local" else ""
        yield Rounding("input", str(activation), _ends(scale), _whole(zero), _observed(x) + local)


def _stored(region: Region, given: dict[str, Any]) -> Rounding:
    codes, fmt = given["qdata"], str(given["format"])
    scale, zero = (region.constant(given[name]) for name in ("scale", "zero"))
    if region.constant(codes) is None:
        return Rounding("input", fmt, None, None, "scales that each input has when it comes")
    # Graphs hold scales that are powers of two as bytes.
    ends = None if scale is None or not scale.is_floating_point() else _ends(scale)
    return Rounding("weight", fmt, ends, _whole(zero), f"stored in {region.path(codes)}")


def _onednn(region: Region, node: Node) -> Iterator[Rounding]:
    """How a layer of oneDNN rounds; operators name alike arguments differently, and have them in one order."""
    given = arguments(node)
    args: Any = node.args
    x, x_scale, x_zero, packed, w_scale, _ = args[:6]
    yield _by_numbers("input", _dtype(x), x_scale, x_zero, _observed(x))
    scale = region.constant(w_scale)
    codes = packed.args[0]
    where = region.path(codes) if region.constant(codes) is not None else packed.name
    yield Rounding("weight", _dtype(packed), None if scale is None else _ends(scale), None, f"stored in {where}")
    if node.target is ops.CONVOLUTION_SUM:
        other = given["other"]
        yield _by_numbers("sum", _dtype(other), given["other_scale"], given["other_zero"], _observed(other))
        yield _by_numbers("output", "uint8", given["scale"], given["zero"], "as data told of it")
    elif given["output_dtype"] == torch.uint8:
        out = given["output_scale"], given["output_zero_point"]
        yield _by_numbers("output", "uint8", *out, "as data told of it")


def _observed(x: Node) -> str:
    rounded: Any = x.args[0] if x.target is ENCODE else x
    return f"as data told of {rounded.name}"


def _by_numbers(what: str, fmt: str, scale: Any, zero: Any, origin: str) -> Rounding:
    one, other = float(scale), int(zero)
    return Rounding(what, fmt, (one, one), (other, other), origin)


def _dtype(node: Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _ends(scale: Tensor) -> tuple[float, float]:
    wide = scale.detach().float()
    return float(wide.min()), float(wide.max())


def _whole(zero: Tensor | None) -> tuple[int, int] | None:
    return None if zero is None or zero.is_floating_point() else (int(zero.min()), int(zero.max()))


def _range(ends: tuple[float, float]) -> str:
    low, high = (f"{end:.4g}" for end in ends)
    return low if low == high else f"{low} to {high}"
