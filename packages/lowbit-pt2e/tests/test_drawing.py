"""Pictures of graphs: every node once, in the colour of its precision, on no other; and the page of a comparison."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest
import torch
from test_passes import Nested
from torch import nn

from lowbit import Recipe, Rule
from lowbit_pt2e import (
    Compared,
    Comparison,
    Difference,
    GraphError,
    compare,
    convert,
    fold_norms,
    lower_to_onednn,
    prepare,
    quantize_layers,
)
from lowbit_pt2e.drawing import kind_of, to_dot, to_svg
from lowbit_pt2e.graphs import regions
from lowbit_pt2e.showing import to_html

SVG = "{http://www.w3.org/2000/svg}"
KINDS = {"wide", "half", "codes", "packed", "other"}


def exported(model, *inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs).module()


class Residual(nn.Module):
    """A sum of what convolutions give, a pool, and two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.three, self.wide, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.one(x).relu()
        x = self.three((x + self.norm(self.two(x))).relu())
        return self.head(self.wide(x.mean((2, 3))).relu())


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def lowered(*rules):
    """The graph before, and after passes."""
    graph = exported(Residual(), X)
    before = copy.deepcopy(graph)
    fold_norms(graph)
    recipe = Recipe((*rules, Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR_ASYM")))
    with torch.no_grad():
        prepared = prepare(graph, recipe)
        prepared(X)
        convert(prepared)
    lower_to_onednn(graph)
    return before, graph


class Picture:
    """What an SVG shows."""

    def __init__(self, source):
        self.root = ET.fromstring(source)
        self.boxes, self.within, self.inside = {}, {}, []
        for group in self.root.iter(f"{SVG}g"):
            if "node" in (group.get("class") or "").split():
                lines = group.findtext(f"{SVG}title").split("\n")
                kind = KINDS.intersection(group.get("class").split()).pop()
                rect = next(each for each in group if each.get("class") == "box")
                self.boxes[self._key(lines, group)] = (lines, kind, self._sides(rect))
        for rect in self.root.iter(f"{SVG}rect"):
            title = rect.findtext(f"{SVG}title")
            if title is not None:
                self.inside.append((title.split("\n"), KINDS.intersection(rect.get("class").split()).pop()))
        self.frames = [self._sides(each) for each in self.root.iter(f"{SVG}rect") if each.get("class") == "frame"]

    def _key(self, lines, group):
        assert group.get("id") not in self.within
        self.within[group.get("id")] = lines[0]
        return group.get("id")

    @staticmethod
    def _sides(rect):
        x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        return x, y, x + width, y + height

    def kinds(self):
        return {lines[0]: kind for lines, kind, _ in self.boxes.values()}

    def names(self):
        return Counter([lines[0] for lines, _, _ in self.boxes.values()] + [lines[0] for lines, _ in self.inside])


def names(graph):
    return Counter(node.name for region in regions(graph) for node in region.nodes)


def apart(one, other):
    # Numbers are written to a tenth.
    return one[2] <= other[0] + 0.2 or other[2] <= one[0] + 0.2 or one[3] <= other[1] + 0.2 or other[3] <= one[1] + 0.2


def holds(outer, inner):
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


GRAPHS = {
    "float": lambda: exported(Residual(), X),
    "lowered": lambda: lowered()[1],
    "nested": lambda: exported(Nested(), torch.randn(3, 4)),
    "alone": lambda: exported(nn.Identity(), torch.randn(2)),
}


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_every_node_is_there_once_and_on_no_other(make):
    graph = make()
    picture = Picture(to_svg(graph))
    assert picture.names() == names(graph)
    sides = [each for *_, each in picture.boxes.values()]
    assert all(apart(*pair) for pair in combinations(sides, 2))
    assert all(
        holds(one, other) or holds(other, one) or apart(one, other) for one, other in combinations(picture.frames, 2)
    )
    assert all(holds(frame, box) or apart(frame, box) for frame in picture.frames for box in sides)
    width, height = float(picture.root.get("width")), float(picture.root.get("height"))
    assert all(holds((0, 0, width, height), box) for box in (*sides, *picture.frames))
    assert picture.root.get("role") == "img"
    total = sum(names(graph).values())
    assert picture.root.findtext(f"{SVG}title").replace("\N{NO-BREAK SPACE}", " ") == f"Graph of {total} nodes"


def test_a_picture_needs_nothing_and_is_the_same_each_time():
    graph = GRAPHS["nested"]()
    source = to_svg(graph)
    assert source == to_svg(graph) == to_svg(copy.deepcopy(graph))
    assert not re.search(r"\bhref|url\(|@import|<script|<image", source)
    assert source.count("http") == 1
    assert "prefers-color-scheme: dark" in source


def test_colours_tell_the_precision_of_what_was_lowered():
    _, graph = lowered(Rule.of("wide.weight", None))
    picture = Picture(to_svg(graph))
    kinds = picture.kinds()
    by_operator = {lines[1]: kind for lines, kind, _ in picture.boxes.values()}
    assert kinds["qconv_pointwise_default"] == by_operator["lowbit_pt2e.convolution_sum"] == "codes"
    assert by_operator["lowbit_pt2e.encode"] == "codes"
    # The one that a rule keeps, and the last one, which gives floats of codes.
    assert by_operator["aten.linear"] == by_operator["onednn.qlinear_pointwise"] == "wide"
    assert kinds["x"] == kinds["output"] == "wide"
    inside = {lines[1]: kind for lines, kind in picture.inside}
    assert inside["onednn.qconv_prepack"] == inside["one_weight_codes"] == "codes"
    assert (inside["one.bias"], inside["one_weight_zeros"]) == ("wide", "other")
    legend = [each.text for each in picture.root.iter(f"{SVG}text")]
    assert {"float32 and wider", "8 bits", "whole numbers and others"} <= set(legend)
    assert "packed, below 8 bits" not in legend


def test_packed_weights_are_known_by_who_takes_them_in_loops_too():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            x = self.linear(x)
            return torch.while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, self.linear(v)), (torch.tensor(0), x))[1]

    graph = exported(Looped(), torch.randn(2, 32))
    quantize_layers(graph, Recipe((Rule.of("*", "INT4_G32"),)))
    picture = Picture(to_svg(graph))
    assert picture.names() == names(graph)
    drawn = [(lines[0], kind) for lines, kind in picture.inside] + list(picture.kinds().items())
    packed = [name for name, kind in drawn if kind == "packed"]
    # The one of both layers, and what the loop is given.
    assert "linear_weight_qdata" in packed
    (inner,) = (region for region in regions(graph) if "body" in region.name)
    (layer,) = (node for node in inner.nodes if node.target is torch.ops.lowbit.linear.default)
    assert layer.args[1].name in packed
    assert layer.args[2].name not in packed


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((torch.empty(2, dtype=dtype), "wide") for dtype in (torch.float32, torch.float64)),
        *((torch.empty(2, dtype=dtype), "half") for dtype in (torch.float16, torch.bfloat16)),
        *((torch.empty(2, dtype=dtype), "codes") for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn)),
        *((torch.empty(2, dtype=dtype), "packed") for dtype in (torch.float4_e2m1fn_x2, torch.uint4)),
        *((torch.empty(2, dtype=dtype), "other") for dtype in (torch.int32, torch.int64, torch.bool)),
        ((3, torch.empty(2, dtype=torch.int8)), "codes"),
        (3, "other"),
        (None, "other"),
    ],
)
def test_kinds_of_values(value, kind):
    assert kind_of(value) == kind


def test_graphs_of_loops_and_branches_lie_in_frames():
    graph = GRAPHS["nested"]()
    picture = Picture(to_svg(graph))
    found = regions(graph)
    assert len(picture.frames) == len(found) - 1 == 5
    # A branch is in the scan, that in the body of the loop.
    boxes = {lines[0]: sides for lines, _, sides in picture.boxes.values()}
    depth = {name: sum(holds(frame, sides) for frame in picture.frames) for name, sides in boxes.items()}
    assert (depth["while_loop"], depth["lt"], depth["scan"], depth["cond"], depth["sub"]) == (0, 1, 1, 2, 3)
    runs = [each for each in picture.root.iter(f"{SVG}path") if each.get("class") == "edge runs"]
    # One of a loop, one of the scan, one of the branch; and the legend's.
    assert len(runs) == 4


class Named(nn.Module):
    def forward(self, x):
        y = x * 2 if '<&"' < "\\" else x  # noqa: PLR0133
        return torch.where(y < 3, y, x)


def test_what_has_a_meaning_in_markup_is_escaped():
    graph = exported(Named(), torch.randn(3))
    node = next(node for node in graph.graph.nodes if node.op == "call_function")
    node.meta["stack_trace"] = 'File "a<b>&\'.py", line 1, in forward\n    y = "</title><script>" + \x1b\x00 "\\N"'
    picture = Picture(to_svg(graph))
    line = next(lines[-1] for lines, *_ in picture.boxes.values() if lines[0] == node.name)
    assert line == 'from File "a<b>&\'.py", line 1, in forward: y = "</title><script>" + \ufffd\ufffd "\\N"'
    assert picture.names() == names(graph)
    dot = to_dot(graph)
    assert r"File \"a<b>&amp;" in dot
    assert r"\"\\N\"" in dot
    _, statements = parsed(dot)
    assert len(statements) == len(picture.boxes)


def parsed(dot):
    """Clusters, and nodes with their attributes, of text in Graphviz's language; its quotes and braces are checked."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', dot)
    assert bare.count('"') % 2 == 0
    assert bare.count("{") == bare.count("}")
    assert bare.count("[") == bare.count("]")
    nodes = re.findall(r'^ *(n\d+) \[label="((?:[^"\\]|\\.)*)", .*fillcolor="(#\w{6})"', dot, re.MULTILINE)
    return re.findall(r"subgraph (\w+)", dot), nodes


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_text_for_graphviz_has_every_node_and_every_edge(make):
    graph = make()
    dot = to_dot(graph)
    assert dot == to_dot(copy.deepcopy(graph))
    clusters, nodes = parsed(dot)
    found = regions(graph)
    assert len(clusters) == len(found) - 1
    picture = Picture(to_svg(graph))
    assert Counter(label.split(r"\n")[0] for _, label, _ in nodes) == Counter(
        lines[0] for lines, *_ in picture.boxes.values()
    )
    ids = {number for number, *_ in nodes}
    assert len(ids) == len(nodes)
    edges = re.findall(r"(n\d+) -> (n\d+)( \[lhead=(\w+))?", dot)
    assert all({one, other} <= ids for one, other, *_ in edges)
    assert {name for *_, name in edges if name} == set(clusters)
    given = [color for _, label, color in nodes if r"\nplaceholder\nfloat32" in label]
    assert given
    assert set(given) == {"#56B4E9"}


def test_hundreds_of_nodes_are_drawn():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(60))

        def forward(self, x, mask):
            for i, layer in enumerate(self.layers):
                x = x + layer(x).relu() * mask if i % 3 else layer(x).masked_fill(mask > i, 0.0)
            return x

    picture = Picture(to_svg(exported(Deep(), torch.randn(2, 4), torch.randn(2, 4))))
    sides = [each for *_, each in picture.boxes.values()]
    assert len(sides) > 200
    assert all(apart(*pair) for pair in combinations(sides, 2))


def test_what_was_not_exported_is_refused():
    for draw in (to_dot, to_svg, lambda model: to_html(Comparison(()), model)):
        with pytest.raises(GraphError, match="a Residual is no exported graph"):
            draw(Residual())


class Page(HTMLParser):
    """The rows of a page's table, and which elements it has."""

    def __init__(self, source):
        super().__init__()
        self.rows, self.elements, self.ids, self.links, self._cell = [], [], [], [], False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.elements.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")


def test_a_comparison_is_a_page_with_its_table_and_graph():
    before, after = lowered()
    comparison = compare(before, after, X)
    source = to_html(comparison, after)
    page = Page(source)
    heading, *rows = page.rows
    assert heading[:4] == ["Node", "SQNR, dB", "Error", "Largest difference"]
    assert [row[0].removesuffix(" worst") for row in rows] == [row.node for row in comparison.rows]
    for row, each in zip(rows, comparison.rows, strict=True):
        assert float(row[1]) == pytest.approx(each.difference.sqnr, abs=0.051)
        assert float(row[3]) == pytest.approx(each.difference.largest, rel=0.01)
        assert row[4] == each.operator.removesuffix(".default")
        assert re.match(r"test_drawing.py:\d+ ", row[-1])
    worst = min(comparison.rows, key=lambda row: row.difference.sqnr)
    assert [row[0] for row in rows if row[0].endswith(" worst")] == [f"{worst.node} worst"]
    # Nodes' names lead to their boxes.
    assert len(page.links) == len(rows)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert source.count(" marked") == 2
    assert len(set(page.ids)) == len(page.ids)
    assert page.elements.count("svg") == 1 + len(rows)


def test_a_page_asks_for_nothing_and_runs_nothing_but_its_own():
    before, after = lowered()
    source = to_html(compare(before, after, X), after)
    assert not re.search(r"""\b(?:src|on\w+)\s*=|href="[^#]|url\(|@import|https?:""", source)
    assert " style=" not in source
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', source)[1])
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy


def test_numbers_that_are_not_finite_and_hostile_names_are_shown():
    hostile = "\"'></script><img src=x>"
    graph = exported(nn.ReLU(), torch.randn(2))
    values = [float("inf"), float("nan"), -float("inf"), 20.0]
    rows = tuple(
        Compared(hostile, f"relu{hostile}", "relu", hostile, Difference(1.0, value), f"{hostile} {value}")
        for value in values
    )
    source = to_html(Comparison(rows), graph)
    assert "<img" not in source
    page = Page(source)
    assert [row[1] for row in page.rows[1:]] == ["∞", "\N{EN DASH}", "\N{MINUS SIGN}∞", "20.0"]
    assert not re.search(r'width="(?:nan|inf)', source)
    # What cannot be told is worst.
    assert [row[0].endswith("worst") for row in page.rows[1:]] == [False, True, False, False]
    assert page.links == []
    empty = Page(to_html(Comparison(()), graph))
    assert empty.rows == []
