"""Pictures of exported graphs, those of loops and branches within them: as text for Graphviz, and as SVG.

A node's colour says how precise what it gives is. What is computed of constants alone and goes to one node only stands
within that node, as a small square of its own colour.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lowbit.errors import LowbitError
from lowbit.figures import count
from lowbit.format import Format
from lowbit.markup import Markup, element, plain
from lowbit_pt2e.graphs import Call, Region, place, regions
from lowbit_pt2e.layering import Box, Segment, arrange

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
_BELOW_8: Final = re.compile(r"torch\.(u?int|float)[1-7](?!\d)")
_TIMES: Final = "\N{MULTIPLICATION SIGN}"
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
        self.parts, self.whole = list(parts.values()), parts[found[0]]
        nodes = [(region, node) for region in found for node in region.nodes]
        self.number = {node: i for i, (_, node) in enumerate(nodes)}
        self.value = {node: _value(region, node) for region, node in nodes}
        self.kind = {node: "packed" if node in self.packed else kind_of(self.value[node]) for _, node in nodes}

    def _fill(self, part: _Part) -> None:
        region = part.region
        constants: set[Node] = set()
        graphs: set[Node] = set()
        home: dict[Node, Node] = {}
        for node in region.nodes:
            given = node.all_input_nodes
            if node.op in {"get_attr", "placeholder"}:
                constants.update([node] if region.constant(node) is not None else [])
                graphs.update([node] if isinstance(_attribute(region, node), GraphModule) else [])
            elif node.op == "call_function" and given and not node.is_impure() and constants.issuperset(given):
                constants.add(node)
        for node in reversed(region.nodes):
            users = {home.get(user, user) for user in node.users}
            given = node.op == "placeholder" and bool(region.callers)
            if not users and (given or node.op == "get_attr"):
                part.unused.insert(0, node)
            elif len(users) == 1 and (node in constants or node in graphs):
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
        # Fonts whose widths Graphviz knows have few letters.
        label = [line.replace(_TIMES, "x") for line in label]
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
        users = sorted({where[user] for user in node.users}, key=plan.number.__getitem__)
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
    width = max(sheet.width, 330) + 2 * _PAD
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
    for part in plan.parts:
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
            for user in sorted({where[user] for user in node.users}, key=plan.number.__getitem__)
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
        # What is given, and what is computed of constants alone, is wanted near to where it is used.
        fixed: set[Node] = set()
        for node in part.boxes:
            made = node.op == "call_function" and node not in framed
            if node.op == "get_attr" or (made and all(where.get(each) in fixed for each in node.all_input_nodes)):
                fixed.add(node)
        late = [box for node, box in self.boxes.items() if node in fixed or node.op == "placeholder"]
        order = [each for node, box in self.boxes.items() for each in (box, *framed.get(node, ()))]
        width, height, self.segments = arrange(order, edges, set(late))
        self.unused = -(-len(part.unused) // _BY_ROW) + bool(part.unused)
        self.width, self.height = max(width, _WIDTH), height + self.unused * _LINE
        self.shift = (self.width - width) / 2
        for _, sheet in self.frames:
            self.boxes |= sheet.boxes

    def draw(self, x: float, y: float) -> list[Markup]:
        """All of it, from a left upper corner on; boxes are then where they are on the whole sheet."""
        drawn: list[Markup] = []
        if self.part.unused:
            drawn.append(element("text", "not used:", x=x, y=y + 10, class_="soft"))
            drawn += self._squares(self.part.unused, x, y + _LINE)
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
            *self._squares(within, box.x + _SIDE, box.y + 3 * _LINE + 7),
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
    return 3 * _LINE + 8 + _LINE * -(-len(within) // _BY_ROW)


def _lines(segments: list[Segment], frames: set[Box], x: float, y: float) -> Iterator[Markup]:
    """A path for each box that lines come from, one for those that lead to graphs that it runs, and their heads."""
    paths: dict[tuple[Box, bool], str] = {}
    heads = ""
    for each in segments:
        start, ends, to = y + each.y, y + each.row_ends, y + each.to_y
        middle = (ends + to) / 2
        path = f"M{x + each.x:.1f} {start:.1f}" + (f"V{ends:.1f}" if ends > start else "")
        path += f"C{x + each.x:.1f} {middle:.1f} {x + each.to_x:.1f} {middle:.1f} {x + each.to_x:.1f} {to:.1f}"
        key = each.source, each.target in frames
        paths[key] = paths.get(key, "") + path
        if each.target is not None:
            heads += f"M{x + each.to_x:.1f} {to:.1f}l-3-6h6z"
    for (_, runs), path in paths.items():
        yield element("path", d=path, class_="edge runs" if runs else "edge")
    if heads:
        yield element("path", d=heads, class_="head")


def _legend(plan: _Plan, *, marked: bool) -> list[Callable[[float, float], Markup]]:
    """Lines of the legend, which draw themselves from a left upper corner on."""

    def line(kind: str | None, words: str) -> Callable[[float, float], Markup]:
        def draw(x: float, y: float) -> Markup:
            text = element("text", words, x=x + 22, y=y + 10)
            if kind is None:
                path = element("path", d=f"M{x:.1f} {y + 6:.1f}h16", class_="edge runs")
                return element("g", path, text)
            wide, tall = (_SQUARE, _SQUARE) if kind == "small" else (16, 12)
            sides = {"x": x, "y": y + (12 - tall) / 2, "width": wide, "height": tall}
            return element("g", element("rect", **sides, class_=f"within {kind}"), text)

        return draw

    used = set(plan.kind.values())
    lines = [line(kind, words) for kind, (words, *_) in _KINDS.items() if kind in used]
    if any(part.unused or any(part.boxes.values()) for part in plan.parts):
        lines.append(line("small", "constants, within the node that takes them"))
    if plan.whole.inner:
        lines.append(line(None, "runs the graph in a frame"))
    if marked:
        lines.append(line("worst", "among the worst"))
    return lines


def style() -> str:
    """The style of pictures, whose selectors meet nothing else on a page."""
    return plain(f"{_rules(_LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_rules(_DARK)}\n}}\n{_STYLE}")


def _rules(colors: dict[str, str]) -> str:
    # Not every program that shows SVG knows variables.
    rules = [
        (".ground", f"fill: {colors['page']}"),
        ("text", f"fill: {colors['text']}"),
        (".soft", f"fill: {colors['soft']}"),
        (".box, .graph .within", f"stroke: {colors['line']}"),
        (".edge, .graph .frame", f"stroke: {colors['line']}"),
        (".head", f"fill: {colors['line']}"),
        (".marked .box, .graph .worst", f"stroke: {colors['warning']}"),
        (".node:target .box", f"stroke: {colors['text']}"),
    ]
    return "\n".join(f".graph {selector} {{ {rule}; }}" for selector, rule in rules)


# Those of the report's page.
_LIGHT: Final = {"page": "#ffffff", "text": "#1b1f24", "soft": "#59616c", "line": "#767e89", "warning": "#b3261e"}
_DARK: Final = {"page": "#14171b", "text": "#e4e7eb", "soft": "#a3abb6", "line": "#8b939e", "warning": "#ff9c91"}
_MONOSPACE: Final = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace'
_STYLE: Final = "\n".join(
    [
        f".graph text {{ font: 11px {_MONOSPACE}; }}",
        ".graph .name { font-weight: 700; }",
        ".graph .frame, .graph .edge { fill: none; }",
        ".graph .runs { stroke-dasharray: 4 3; }",
        ".graph .box { fill-opacity: 0.2; }",
        ".graph .marked .box, .graph .node:target .box, .graph .worst { stroke-width: 3; }",
        ".graph .worst, .graph .small { fill: none; }",
        *(
            f".graph .{kind} .box, .graph .{kind} .stripe, .graph .within.{kind} {{ fill: {color}; }}"
            for kind, (_, color, _) in _KINDS.items()
        ),
    ]
)


def kind_of(value: Any) -> str:
    """How precise a value is; several are as their first tensor."""
    if isinstance(value, (tuple, list)):
        value = next((each for each in value if isinstance(each, Tensor)), None)
    if not isinstance(value, Tensor):
        return "other"
    if _BELOW_8.match(str(value.dtype)):
        return "packed"
    if value.is_floating_point() and value.dtype.itemsize > 1:
        return "wide" if value.dtype.itemsize > 2 else "half"
    return "codes" if value.is_floating_point() or value.dtype in {torch.int8, torch.uint8} else "other"


def told(value: Any) -> str:
    """What a value is, in a few words; nothing of what is none."""
    if isinstance(value, Tensor):
        shape = _TIMES.join(map(str, value.shape)) or "number"
        return f"{str(value.dtype).removeprefix('torch.')} {shape}"
    if isinstance(value, (tuple, list)):
        return count(len(value), "value")
    return "" if value is None else type(value).__name__


def operator_of(node: Node) -> str:
    """The name of what a node does; of an operator's only form, without it."""
    if node.op == "get_attr":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    target: Any = node.target
    name = str(target) if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
    return str(name).removesuffix(".default")


def _attribute(region: Region, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(region.module) if node.op == "get_attr" else None


def _value(region: Region, node: Node) -> Any:
    """An example of what a node gives."""
    if node.op == "output":
        given: Any = [each.meta.get("val") for each in node.all_input_nodes]
        return given[0] if len(given) == 1 else given
    if "val" in node.meta:
        return node.meta["val"]
    held = _attribute(region, node)
    return held if isinstance(held, Tensor) else None


def _packed(found: list[Region]) -> set[Node]:
    """Nodes whose bytes hold several numbers each, as the operators say that take them."""
    packed: set[Node] = set()
    for region in found:
        for node in region.nodes:
            given = arguments(node)
            codes, fmt = given.get("qdata"), given.get("format")
            if isinstance(codes, Node) and isinstance(fmt, str) and _bits(fmt) < 8:
                packed.update(_given(region, codes))
    return packed


def _given(region: Region, node: Node) -> Iterator[Node]:
    """A node, and what calls give for it."""
    yield node
    if node.op == "placeholder" and region.callers:
        for outer, each in region.given(node):
            if isinstance(each, Node):
                yield from _given(outer, each)


def _bits(fmt: str) -> int:
    try:
        return Format.parse(fmt).element.bits
    except LowbitError:
        return 8


def arguments(node: Node) -> dict[str, Any]:
    """What an operator is given, by its arguments' names."""
    schema: Any = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return {}
    names = [each.name for each in schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _short(text: str, room: int = _ROOM) -> str:
    """Text with its middle left out if there is no room for it: names end in what tells them apart."""
    text = _BEYOND_XML.sub("\ufffd", text)
    if len(text) <= room:
        return text
    end = (room - 1) // 2
    return f"{text[: room - 1 - end]}…{text[len(text) - end :]}"
