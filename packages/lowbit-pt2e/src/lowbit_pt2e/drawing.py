"""Pictures of exported graphs, those of loops and branches within them: as text for Graphviz, and as SVG.

A node's colour says how precise what it gives is. What is computed of constants alone and goes to one node only stands
within that node, as a small square of its own colour.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lowbit.errors import LowbitError
from lowbit.figures import count
from lowbit.format import Format
from lowbit.markup import Markup, element, join, plain
from lowbit_pt2e.graphs import Call, Region, place, regions
from lowbit_pt2e.layering import BELOW, Box, Segment, arrange

# Of Okabe and Ito's colours, which those see apart who see few; and what is read on them.
_KINDS: Final = {
    "wide": ("float32 and wider", "#56B4E9", "#000000"),
    "half": ("float16 and bfloat16", "#0072B2", "#FFFFFF"),
    "codes": ("8 bits", "#E69F00", "#000000"),
    "packed": ("packed, below 8 bits", "#009E73", "#000000"),
    "other": ("whole numbers and others", "#999999", "#000000"),
}
_LETTER: Final = 6.65
_WIDTH: Final = 192
_SIDE: Final = 10
# Letters that a box has room for.
_ROOM: Final = int((_WIDTH - 2 * _SIDE) / _LETTER)
_LINE: Final = 15
_SQUARE: Final = 9
_BY_ROW: Final = (_WIDTH - 2 * _SIDE) // (_SQUARE + 3)
_PAD: Final = 14
_BEYOND_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(eq=False)
class _Part:
    """A graph as it is drawn."""

    region: Region
    # Nodes that have boxes, each with those that stand within it; and those that nothing uses.
    boxes: dict[Node, list[Node]] = field(default_factory=dict)
    unused: list[Node] = field(default_factory=list)
    # Graphs whose first caller is here, and all their callers.
    inner: list[tuple[_Part, list[Call]]] = field(default_factory=list)


class _Plan:
    """What is drawn of a model, whichever way."""

    def __init__(self, model: nn.Module) -> None:
        found = regions(model)
        self.packed = _packed(found)
        parts = {region: _Part(region) for region in found}
        for region, part in parts.items():
            self._fill(part)
            if region.callers:
                parts[region.callers[0].region].inner.append((part, region.callers))
        self.whole = parts[found[0]]
        nodes = [(region, node) for region in found for node in region.nodes]
        self.number = {node: i for i, (_, node) in enumerate(nodes)}
        self.value = {node: _value(region, node) for region, node in nodes}
        self.kind = {node: "packed" if node in self.packed else kind_of(self.value[node]) for _, node in nodes}

    def _fill(self, part: _Part) -> None:
        region = part.region
        calling = {call.node for inner in regions_of(region) for call in inner.callers}
        held: set[Node] = set()
        home: dict[Node, Node] = {}
        for node in region.nodes:
            given = node.all_input_nodes
            if node.op in {"get_attr", "placeholder"}:
                constant = region.constant(node) is not None
                if constant or isinstance(_attribute(region, node), GraphModule):
                    held.add(node)
            elif node.op == "call_function" and given and not node.is_impure() and node not in calling:
                held.update([node] if all(each in held for each in given) else [])
        for node in reversed(region.nodes):
            users = {home.get(user, user) for user in node.users}
            given = node.op == "placeholder" and bool(region.callers)
            if not users and (given or node.op == "get_attr"):
                part.unused.insert(0, node)
            elif len(users) == 1 and node in held:
                home[node] = users.pop()
        skipped = set(part.unused)
        part.boxes = {node: [] for node in region.nodes if node not in home and node not in skipped}
        for node in region.nodes:
            if node in home:
                part.boxes[home[node]].append(node)

    def words(self, node: Node) -> list[str]:
        """All that is told of a node, line by line."""
        lines = [node.name, operator_of(node), told(self.value[node]), place(node)]
        return [_BEYOND_XML.sub("\ufffd", line) for line in lines if line]


def to_dot(model: nn.Module) -> str:
    """An exported graph in Graphviz's language, with those of its loops and branches, coloured by precision.

    `dot -Tpdf` and others draw it.

    Raises:
        GraphError: `model` is none that was exported.
    """
    plan = _Plan(model)
    lines = [
        "digraph {",
        "  compound=true; rankdir=TB;",
        '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=10];',
        '  edge [color="#666666", arrowsize=0.6];',
        *_dot(plan, plan.whole, "  "),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _dot(plan: _Plan, part: _Part, indent: str) -> Iterator[str]:
    where = {each: node for node, within in part.boxes.items() for each in (node, *within)}
    for node, within in part.boxes.items():
        _, fill, ink = _KINDS[plan.kind[node]]
        label = [node.name, operator_of(node), told(plan.value[node])]
        label += [f"{each.name}: {told(plan.value[each]) or operator_of(each)}" for each in within]
        yield (
            f"{indent}n{plan.number[node]} [label={_quoted(line for line in label if line)}, "
            f'tooltip={_quoted(plan.words(node))}, fillcolor="{fill}", fontcolor="{ink}"];'
        )
    for inner, callers in part.inner:
        name = f"cluster_{plan.number[inner.region.nodes[0]]}"
        yield f"{indent}subgraph {name} {{"
        yield f"{indent}  label={_quoted([inner.region.name])}; style=rounded;"
        yield from _dot(plan, inner, indent + "  ")
        yield f"{indent}}}"
        head = plan.number[next(iter(inner.boxes))]
        for call in callers:
            yield f"{indent}n{plan.number[call.node]} -> n{head} [lhead={name}, style=dashed];"
    for node in part.boxes:
        users = dict.fromkeys(where[user] for user in node.users)
        yield from (f"{indent}n{plan.number[node]} -> n{plan.number[user]};" for user in users)


def _quoted(lines: Iterable[str]) -> str:
    """Lines as a string of Graphviz, which knows escapes with a letter, and HTML's characters by name."""
    escaped = (
        line.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;").replace("\n", "\\n") for line in lines
    )
    return '"' + "\\n".join(escaped) + '"'


def to_svg(model: nn.Module) -> str:
    """An exported graph as a picture that needs no other file, for light and dark, coloured by precision.

    Graphs of loops and branches are frames beside what comes after the node that runs them. Where the pointer rests on
    a node, its operator, its value and its place in the program are told.

    Raises:
        GraphError: `model` is none that was exported.
    """
    return picture(model, (), alone=True) + "\n"


def picture(model: nn.Module, marked: Collection[tuple[str, str]], *, alone: bool) -> Markup:
    """The picture, with nodes marked that are named by graph and name; `alone`, or for a page that has `style`.

    A node's box, or the one that it stands within, has the id that `anchors` tells.
    """
    plan = _Plan(model)
    sheet = _Sheet(plan, plan.whole, set(marked))
    legend = _legend(plan, marked=bool(marked))
    width = max(sheet.width, 230) + 2 * _PAD
    down = _PAD + len(legend) * 18 + _PAD
    height = down + sheet.height + _PAD
    drawn = sheet.draw((width - sheet.width) / 2, down)
    for call, frame in sheet.far:
        box = sheet.boxes[call.node]
        start, end = box.x + box.width / 2, frame.x + frame.width / 2
        path = f"M{start:.1f} {box.y + box.height:.1f}L{end:.1f} {frame.y:.1f}"
        drawn.append(element("path", d=path, class_="edge runs"))
    texts = [
        element("title", f"Graph of {count(len(plan.number), 'node')}"),
        *([element("style", style())] if alone else []),
        element("rect", width=width, height=height, class_="ground"),
    ]
    return element(
        "svg",
        *texts,
        *(line(_PAD, _PAD + 18 * i) for i, line in enumerate(legend)),
        *drawn,
        xmlns="http://www.w3.org/2000/svg" if alone else None,
        viewBox=f"0 0 {width:.1f} {height:.1f}",
        width=width,
        height=height,
        class_="graph",
        role="img",
    )


def anchors(model: nn.Module) -> dict[tuple[str, str], str]:
    """By graph and name, the id of the box in `picture` that a node is, or stands within; those that have one."""
    plan = _Plan(model)
    found: dict[tuple[str, str], str] = {}
    parts = [plan.whole]
    for part in parts:
        parts += [inner for inner, _ in part.inner]
        for node, within in part.boxes.items():
            found |= {(part.region.name, each.name): f"node-{plan.number[node]}" for each in (node, *within)}
    return found


class _Sheet:
    """Where everything of a graph, and of those within it, is."""

    def __init__(self, plan: _Plan, part: _Part, marked: set[tuple[str, str]]) -> None:
        self.plan, self.part, self.marked = plan, part, marked
        self.boxes = {node: Box(_WIDTH, _height(within)) for node, within in part.boxes.items()}
        where = {each: node for node, within in part.boxes.items() for each in (node, *within)}
        edges = [
            (box, self.boxes[user])
            for node, box in self.boxes.items()
            for user in dict.fromkeys(where[user] for user in node.users)
        ]
        self.frames: list[tuple[Box, _Sheet]] = []
        # Calls from other graphs than the one that a frame is in.
        self.far: list[tuple[Call, Box]] = []
        framed: dict[Node, list[Box]] = {}
        for inner, callers in part.inner:
            sheet = _Sheet(plan, inner, marked)
            frame = Box(sheet.width + 2 * _PAD, sheet.height + 2 * _PAD + _LINE)
            self.frames.append((frame, sheet))
            last = max((call.node for call in callers if call.node in self.boxes), key=plan.number.__getitem__)
            framed.setdefault(last, []).append(frame)
            edges += [(self.boxes[call.node], frame) for call in callers if call.node in self.boxes]
            self.far += [(call, frame) for call in callers if call.node not in self.boxes] + sheet.far
        given = {node for node in self.boxes if node.op in {"get_attr", "placeholder"}}
        late = set(given)
        for node in self.boxes:
            if node.op == "call_function" and node.all_input_nodes and node not in framed:
                late.update([node] if all(where.get(each) in late for each in node.all_input_nodes) else [])
        order = [each for node, box in self.boxes.items() for each in (box, *framed.get(node, ()))]
        width, height, self.segments = arrange(order, edges, {self.boxes[node] for node in late - _flowing(late)})
        self.unused = _unused_rows(len(part.unused))
        self.width, self.height = max(width, _WIDTH), height + self.unused * _LINE
        self.shift = (self.width - width) / 2
        for frame, sheet in self.frames:
            self.boxes |= sheet.boxes
            del frame

    def draw(self, x: float, y: float) -> list[Markup]:
        """All of it, from a left upper corner on; boxes are then where they are on the whole sheet."""
        drawn: list[Markup] = []
        if self.part.unused:
            drawn.append(element("text", "not used:", x=x, y=y + 9, class_="soft"))
            drawn += self._squares(self.part.unused, x + 70, y + 1)
        x, y = x + self.shift, y + self.unused * _LINE
        lines = list(_lines(self.segments, {frame for frame, _ in self.frames}, x, y))
        for frame, sheet in self.frames:
            frame.x, frame.y = frame.x + x, frame.y + y
            drawn += [
                element("rect", x=frame.x, y=frame.y, width=frame.width, height=frame.height, rx=6, class_="frame"),
                element(
                    "text",
                    _short(sheet.part.region.name.rpartition(".")[2], int((frame.width - 2 * _SIDE) / _LETTER)),
                    x=frame.x + _SIDE,
                    y=frame.y + _LINE,
                    class_="soft",
                ),
                *sheet.draw(frame.x + _PAD, frame.y + _PAD + _LINE),
            ]
        for node, within in self.part.boxes.items():
            box = self.boxes[node]
            box.x, box.y = box.x + x, box.y + y
            drawn.append(self._node(node, within, box))
        return lines + drawn

    def _node(self, node: Node, within: list[Node], box: Box) -> Markup:
        kind, name = self.plan.kind[node], self.part.region.name
        marked = any((name, each.name) in self.marked for each in (node, *within))
        texts = (node.name, operator_of(node), told(self.plan.value[node]))
        return element(
            "g",
            element("title", "\n".join(self.plan.words(node))),
            element("rect", x=box.x, y=box.y, width=box.width, height=box.height, rx=4, class_="box"),
            element("rect", x=box.x, y=box.y, width=5, height=box.height, class_="stripe"),
            *(
                element("text", _short(text), x=box.x + _SIDE, y=box.y + _LINE * (i + 1), class_=None if i else "name")
                for i, text in enumerate(texts)
            ),
            *self._squares(within, box.x + _SIDE, box.y + 3 * _LINE + 6),
            id=f"node-{self.plan.number[node]}",
            class_=f"node {kind}{' marked' if marked else ''}",
        )

    def _squares(self, nodes: list[Node], x: float, y: float) -> Iterator[Markup]:
        for i, node in enumerate(nodes):
            yield element(
                "rect",
                element("title", "\n".join(self.plan.words(node))),
                x=x + i % _BY_ROW * (_SQUARE + 3),
                y=y + i // _BY_ROW * _LINE,
                width=_SQUARE,
                height=_SQUARE,
                class_=f"within {self.plan.kind[node]}",
            )


def _height(within: list[Node]) -> float:
    return 3 * _LINE + 6 + _LINE * -(-len(within) // _BY_ROW)
