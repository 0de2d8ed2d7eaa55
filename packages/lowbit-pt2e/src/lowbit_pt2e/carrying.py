"""Values that go into loops and branches, around and out of them, as codes: one scale for all that a value becomes.

What a loop carries is one value to the graphs that it runs: the first one, what each round is given, what it gives, and
what comes out. Where a layer takes it by a scale that is stored, all of these have that scale, and codes are carried.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from lowbit.format import Format
from lowbit_pt2e.codes import DECODE, ENCODE
from lowbit_pt2e.graphs import META, WAS, Call, Editor, Region
from lowbit_pt2e.passes import Match

Value = tuple[GraphModule, Any]
"""A node, or a number, and the graph that it is in."""


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """Nodes of several graphs that are one value, and the format of its codes."""

    values: frozenset[Value]
    format: Format


def carried(regions: Sequence[Region], takers: Iterable[tuple[Value, Format | None]]) -> list[Carried]:
    """The values of loops and branches that layers take; `takers`: what each takes, and the format, None if not stored.

    A value is left where layers take it in two formats, or where one of its nodes is no floating-point tensor, is
    changed in place, or goes to or comes from a graph as rows, too.
    """
    # Each value with all that are the same, in one list for them.
    alike: dict[Value, list[Value]] = {}
    for one, other in (pair for region in regions for call in region.calls for pair in _pairs(call)):
        first, second = alike.setdefault(one, [one]), alike.setdefault(other, [other])
        if first is not second:
            first += second
            alike |= dict.fromkeys(second, first)
    formats: dict[int, set[Format | None]] = {}
    for value, fmt in takers:
        if value in alike:
            formats.setdefault(id(alike[value]), set()).add(fmt)
    by_module = {region.module: region for region in regions}
    both = {value for region in regions for value in _both(region)}
    found: list[Carried] = []
    for values in {id(each): each for each in alike.values()}.values():
        asked = formats.get(id(values), set())
        fmt = next(iter(asked), None)
        may = all(_may(by_module[module], node) and (module, node) not in both for module, node in values)
        if len(asked) == 1 and fmt is not None and may:
            found.append(Carried(frozenset(values), fmt))
    return found


def edges(region: Region, each: Carried) -> Iterator[tuple[Node, Node]]:
    """Nodes at which a value goes to another graph, and the nodes that it is there."""
    for call in region.calls:
        for given in dict.fromkeys(given for given, _ in _given(call)):
            if (region.module, given) in each.values:
                yield call.node, given
    for out in dict.fromkeys(out for _, out in _returned(region)):
        if (region.module, out) in each.values:
            yield region.nodes[-1], out


def _pairs(call: Call) -> Iterator[tuple[Value, Value]]:
    """Values that a call makes one."""
    outer = call.region.module
    for graph in call.graphs:
        for given, at in _given(call):
            yield (outer, given), (graph.module, graph.placeholders[at])
    results = {each.args[1]: each for each in call.node.users if each.target is operator.getitem}
    for i in range(call.returned):
        gives = [(graph.module, out) for graph in call.graphs for at, out in _returned(graph) if at == i]
        if call.carried:
            gives += [(graph.module, graph.placeholders[i]) for graph in call.graphs]
        if i in results:
            gives.append((outer, results[i]))
        for each in gives[1:]:
            yield gives[0], each


def _given(call: Call) -> list[tuple[Any, int]]:
    """What a call gives its graphs that is one value to them, and which of their placeholders it is."""
    return [(given, at) for at, given in enumerate(call.begun) if given is not None]


def _returned(region: Region) -> list[tuple[int, Any]]:
    """What a graph gives that is one value to who runs it, by place."""
    count = min((call.returned for call in region.callers if region in call.giving), default=0)
    return list(enumerate(region.outputs[:count]))


def _both(region: Region) -> Iterator[Value]:
    """Nodes that go to another graph, or to who runs this one, as a value and as rows."""
    for call in region.calls:
        whole = [given for given, _ in _given(call)]
        yield from ((region.module, each) for each in call.rows if each in whole)
    count = len(_returned(region))
    yield from ((region.module, each) for each in region.outputs[:count] if each in region.outputs[count:])


def _may(region: Region, node: Any) -> bool:
    if not isinstance(node, Node):
        return False
    value = node.meta.get("val")
    plain = isinstance(value, Tensor) and value.is_floating_point() and not region.changes(node)
    return plain and (_told(node) is not None or _passes(node))


def _passes(node: Node) -> bool:
    """Whether a node is only given on, if it is used."""
    return node.op == "placeholder" and all(each.op == "output" for each in node.users)


def _told(node: Node) -> Node | None:
    """A node that says where it is, or one that uses it: what a graph is given does not."""
    return next((each for each in (node, *node.users) if all(each.meta.get(name) is not None for name in META)), None)


class Carry:
    """A value that layers take by one scale, in all graphs that it goes through."""

    name = "carry codes"
    adds = (ENCODE, DECODE)

    def __init__(self, found: Mapping[Carried, tuple[float, int]]) -> None:
        # Each with its scale and zero point.
        self.found = found

    def matches(self, region: Region) -> Iterator[Match]:
        """Such values that a graph is given, makes or gives on."""
        for each, numbers in self.found.items():
            here = sorted(node for module, node in each.values if module is region.module)
            if here:
                yield Match(here[0], None, partial(_put, region, here, (*numbers, str(each.format))))


def _put(region: Region, here: list[Node], how: tuple[float, int, str]) -> None:
    comes = _comes(region)
    codes: dict[Node, Node] = {}
    for node in here:
        edit = Editor(region, _after(region, node), _told(node) or node, stays=True)
        if node not in comes:
            codes[node] = edit.call(ENCODE, node, *how)
            continue
        dtype, node.meta["val"] = node.meta["val"].dtype, edit.value(ENCODE, node.meta["val"], *how)
        value = node
        if not _passes(node):
            value = edit.call(DECODE, node, *how[:2], dtype)
            value.meta[WAS] = node.meta.get(WAS, node.name)
            node.replace_all_uses_with(value, delete_user_cb=partial(operator.is_not, value))
        codes[value] = node
    for call in region.calls:
        call.regive(codes)
        told = {each.args[1]: each.meta["val"] for each in call.node.users if each in here}
        known: Any = call.node.meta["val"]
        call.node.meta["val"] = type(known)(told.get(i, value) for i, value in enumerate(known))
    region.give({at: codes[out] for at, out in _returned(region) if out in codes})


def _comes(region: Region) -> set[Node]:
    """Nodes that come from other graphs as what they are there."""
    found = {region.placeholders[at] for call in region.callers for _, at in _given(call)}
    for call in region.calls:
        results = [each for each in call.node.users if each.target is operator.getitem]
        found |= {each for each in results if each.args[1] < call.returned}  # pyright: ignore[reportOperatorIssue] - a number
    return found


def _after(region: Region, node: Node) -> Node:
    """What runs next; of what a graph is given, after all of that."""
    nodes = region.nodes
    return nodes[nodes.index(region.placeholders[-1] if node.op == "placeholder" else node) + 1]
