"""Graphs on oneDNN's operators: the numbers of the graph that was converted, and what becomes of its nodes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit import Recipe, Rule
from lowbit_pt2e import convert, fold_norms, lower_to_onednn, prepare, quantize_layers
from lowbit_pt2e.codes import ENCODE
from lowbit_pt2e.onednn_ops import CONVOLUTION, CONVOLUTION_SUM, LINEAR, MAX_POOL

STATIC = "static:INT8_TENSOR_ASYM"
FLOAT = {"aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.linear.default"}


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.where(torch.rand(shape, generator=generator) < 0.01, 8.0, 1.0)


def converted(model, x, activation=STATIC, dynamic=None):
    torch.manual_seed(0)
    with torch.no_grad():
        graph = torch.export.export(model.eval(), (x,), dynamic_shapes=dynamic).module()
        fold_norms(graph)
        prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation=activation),)))
        prepared(x)
        convert(prepared)
    return graph


def lowered(graph, x, **how):
    """What the graph gives, before and after, and the report."""
    with torch.no_grad():
        before = graph(x.clone())
        report = lower_to_onednn(graph, **how)
        return before, graph(x.clone()), report


def operators(graph):
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def sqnr(exact, found):
    return float(10 * (exact.square().sum() / (found - exact).square().sum()).log10())


class Layers(nn.Module):
    """One layer after another, with what is between."""

    def __init__(self, first, between, second):
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def convolutions(between):
    torch.manual_seed(0)
    return Layers(nn.Conv2d(8, 16, 3, padding=1), between, nn.Conv2d(16, 8, 1))


def linears(between):
    torch.manual_seed(0)
    return Layers(nn.Linear(32, 64), between, nn.Linear(64, 16))


def gelu_by_tanh(x):
    return functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("activation", [STATIC, "static:INT8_TENSOR"])
@pytest.mark.parametrize(
    ("kind", "between", "name"),
    [
        (convolutions, nn.Identity(), "none"),
        (convolutions, nn.ReLU(inplace=True), "relu"),
        (convolutions, nn.ReLU6(), "hardtanh"),
        (convolutions, nn.Hardswish(), "hardswish"),
        (convolutions, nn.SiLU(), "swish"),
        (convolutions, nn.GELU(), None),
        (convolutions, nn.Tanh(), None),
        (linears, nn.ReLU(), "relu"),
        (linears, nn.GELU(), "gelu"),
        (linears, gelu_by_tanh, "gelu"),
        (linears, nn.SiLU(), "swish"),
        (linears, nn.Dropout(), "none"),
    ],
)
def test_a_layer_takes_the_activation_and_the_rounding_that_follow(kind, between, name, activation):
    x = drawn(2, 8, 10, 10) if kind is convolutions else drawn(2, 5, 32)
    graph = converted(kind(between), x, activation)
    before, after, report = lowered(graph, x)
    assert not report.refused
    target = CONVOLUTION if kind is convolutions else LINEAR
    first, second = (node for node in graph.graph.nodes if node.target is target)
    assert sum(node.target is ENCODE for node in graph.graph.nodes) == 1 + (name is None)
    if name is not None:
        assert name in first.args
        assert (first.meta["val"].dtype, second.meta["val"].dtype) == (torch.uint8, torch.float32)
    # Roundings of a step's middle may go the other way.
    assert sqnr(before, after) > 60


class Residual(nn.Module):
    """A stem with a pool, sums with what was before and with another convolution, and a concatenation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.pool, self.relu = nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True)
        self.one, self.two, self.three = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.aside, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 8, 1)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = self.two(self.relu(self.one(x)))
        y += x
        y = self.relu(y)
        z = self.relu(self.three(y) + self.aside(y))
        z = self.last(torch.cat((y, z), 1)).relu()
        return self.head(torch.flatten(z, 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_codes_go_from_layer_to_layer(dynamic):
    x = drawn(2, 3, 16, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = converted(Residual(), x, dynamic={"x": {0: batch}} if dynamic else None)
    before, after, report = lowered(graph, x)
    assert not report.refused
    found = operators(graph)
    assert (found[str(CONVOLUTION)], found[str(CONVOLUTION_SUM)], found[str(LINEAR)]) == (4, 2, 1)
    # What comes in is rounded; all else stays codes to the end.
    assert (found[str(ENCODE)], found[str(MAX_POOL)], found["aten.cat.default"]) == (1, 1, 1)
    assert not {*FLOAT, "aten.add.Tensor", "aten.relu.default", "lowbit_pt2e.decode.default"} & set(found)
    assert sqnr(before, after) > 50
    if dynamic:
        more = drawn(5, 3, 16, 16, seed=1)
        with torch.no_grad():
            assert torch.equal(graph(more)[:2], graph(more[:2]))


def test_what_is_added_to_is_not_written():
    torch.manual_seed(0)
    model, x = Residual(), drawn(2, 3, 16, 16)
    graph = converted(model, x)
    lower_to_onednn(graph)
    kept = [node.args[6] for node in graph.graph.nodes if node.target is CONVOLUTION_SUM]
    assert len(kept) == 2

    class Run(torch.fx.Interpreter):
        def run_node(self, n):
            held = [self.env[each].clone() for each in kept if each in self.env]
            value = super().run_node(n)
            assert all(torch.equal(a, self.env[b]) for a, b in zip(held, kept, strict=False))
            return value

    with torch.no_grad():
        Run(graph, garbage_collect_values=False).run(x)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(6, 8, 3, padding=1), drawn(2, 6, 20)),
        (nn.Conv2d(8, 16, (3, 1), stride=(2, 1), padding="valid", groups=4), drawn(2, 8, 12, 9)),
        (nn.Conv2d(8, 8, 3, padding="same", dilation=2, bias=False), drawn(2, 8, 12, 9)),
        (nn.Conv3d(4, 8, 3, stride=2), drawn(1, 4, 7, 7, 7)),
        (nn.Conv2d(16, 16, 3, groups=16), drawn(2, 16, 8, 8)),
        (nn.Linear(24, 7, bias=False), drawn(3, 24)),
        (nn.Linear(24, 7), drawn(2, 3, 4, 24)),
    ],
)
def test_layers_of_all_kinds_give_what_they_gave(layer, x):
    graph = converted(layer, x)
    before, after, report = lowered(graph, x)
    assert len(report.changed) > 0
    assert not report.refused
    assert not FLOAT & set(operators(graph))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("model", "x", "rule", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 3), drawn(1, 4, 5, 5), ("INT8_ROW", STATIC), "no transposed convolutions"),
        (nn.Conv2d(4, 4, 2, padding="same"), drawn(1, 4, 5, 5), ("INT8_ROW", STATIC), "pads one side more"),
        (nn.Conv2d(4, 4, 3), drawn(4, 5, 5), ("INT8_ROW", STATIC), "has no batch"),
        (nn.Conv2d(4, 4, 3), drawn(1, 4, 5, 5), ("INT8_ROW", None), "not rounded to 8-bit integers"),
        (nn.Conv2d(4, 4, 3), drawn(1, 4, 5, 5), ("FP8_ROW", STATIC), "weights in INT8_ROW; this is e4m3fn"),
        (nn.Conv2d(4, 4, 3), drawn(1, 4, 5, 5), ("INT8_ROW", "static:FP8_TENSOR"), "not rounded to 8-bit integers"),
        (nn.Linear(32, 4), drawn(2, 32), ("INT4_G32", STATIC), "weights in INT8_ROW; this is int4"),
        (nn.Linear(32, 4), drawn(2, 32), ("INT8_ROW", "dynamic:INT8_ROW"), "rounded as they come"),
        (nn.Linear(32, 4), drawn(2, 32), ("INT8_ROW", None), "stay as they are"),
        (nn.Linear(32, 4), drawn(2, 32), ("FP8_ROW", "static:FP8_TENSOR"), "weights in INT8_ROW"),
        (nn.Linear(32, 4).bfloat16(), drawn(2, 32).bfloat16(), ("INT8_ROW", STATIC), "of float32"),
    ],
)
def test_what_onednn_does_not_have_stays_and_says_why(model, x, rule, reason):
    spec, activation = rule
    with torch.no_grad():
        graph = torch.export.export(model.eval(), (x,)).module()
        recipe = Recipe((Rule.of("*", spec, activation=activation),))
        if activation is not None and activation.startswith("static"):
            prepared = prepare(graph, recipe)
            prepared(x)
            convert(prepared)
        else:
            quantize_layers(graph, recipe)
    before, after, report = lowered(graph, x)
    assert any(reason in each.reason for each in report.refused)
    assert torch.equal(before, after)


def test_values_that_are_read_after_they_are_written_stay_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.one(x)
            part = y[:1]
            y.relu_()
            return self.two(y) + part

    x = drawn(2, 4, 5, 5)
    graph = converted(Model(), x)
    before, after, report = lowered(graph, x)
    assert "is used elsewhere" in next(each.reason for each in report.refused)
    assert sqnr(before, after) > 60


def test_views_of_what_is_written_are_rounded_where_they_were():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            y = self.one(x)
            turned = y.transpose(2, 3)
            y.neg_()
            return self.two(turned)

    x = drawn(2, 8, 5, 5)
    graph = converted(Model(), x)
    before, after, report = lowered(graph, x)
    assert "changed in place" in next(each.reason for each in report.refused)
    assert sqnr(before, after) > 60


def test_layers_of_one_input_are_one():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16, bias=False), nn.Linear(32, 16)
            self.gate, self.out = nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x):
            q, k, v = (
                part(x).view(2, -1, 4, part.out_features // 4).transpose(1, 2) for part in (self.q, self.k, self.v)
            )
            y = functional.scaled_dot_product_attention(q[..., :4], k, v).transpose(1, 2).reshape(2, -1, 16)
            return self.out(torch.cat((y, y), -1) * self.gate(x).relu())

    x = drawn(2, 7, 32)
    graph = converted(Attention(), x)
    before, after, report = lowered(graph, x)
    assert not report.refused
    # The gate has an activation of its own.
    assert operators(graph)[str(LINEAR)] == 3
    widths = [node.meta["val"].shape[-1] for node in graph.graph.nodes if node.target is LINEAR]
    assert sorted(widths) == [8, 32, 64]
    assert sqnr(before, after) > 60


class Later(nn.Module):
    """Programs that write to values between their uses; what they give is that of their order."""

    def __init__(self, program):
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.one, self.two, self.three = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.register_buffer("state", torch.zeros(2, 8, 6, 6))

    def forward(self, x):
        return self.program(self, x)


def between(model, x):
    y = model.one(x).relu()
    first = model.two(y)
    y[:, :4] = 0
    return first + model.two(y).tanh()


def before_the_view(model, x):
    y = model.one(x).relu()
    turned = y.permute(0, 1, 3, 2)
    y.add_(1.0)
    return model.two(turned) + y


def into_a_buffer(model, x):
    model.state.add_(model.one(x))
    return model.state * 1.0


def into_an_input(model, x):
    x.add_(model.one(x))
    return model.two(x)


def through_views(model, x):
    y = model.one(x)
    return model.two(y.relu().view(2, 8, 6, 6)).view(2, -1)


@pytest.mark.parametrize("program", [between, before_the_view, into_a_buffer, into_an_input, through_views])
def test_what_is_written_between_uses_is_written_between_them(program):
    model, x = Later(program), drawn(2, 8, 6, 6)
    graph = converted(model, x)

    def run(one):
        """What it gives, and what it leaves in its input and in the buffer that it writes to."""
        state, given = one.get_buffer("state") if program is into_a_buffer else torch.zeros(()), x.clone()
        state.zero_()
        return one(given), given, state.clone() + 1

    with torch.no_grad():
        exact = run(model)
        found = run(graph)
        assert all(sqnr(*pair) > 30 for pair in zip(exact, found, strict=True))
        lower_to_onednn(graph)
        assert all(sqnr(*pair) > 50 for pair in zip(found, run(graph), strict=True))


def test_sums_of_other_dtypes_stay_theirs():
    model = Later(lambda model, x: model.one(x) + (x * 9).long())
    x = drawn(2, 8, 6, 6)
    graph = converted(model, x)
    with torch.no_grad():
        assert sqnr(model(x), graph(x)) > 40
    doubles = Later(lambda model, x: model.one(x).add_(x.double()))
    graph = converted(doubles, x)
    before, after, report = lowered(graph, x)
    assert after.dtype == before.dtype == torch.float32
    assert "another dtype" in next(each.reason for each in report.refused)


def test_pools_of_other_codes_stay():
    x = drawn(2, 8, 10, 10)
    graph = converted(convolutions(nn.MaxPool2d(2)), x, "static:FP8_TENSOR")
    before, after, report = lowered(graph, x)
    assert torch.equal(before, after)
    assert len(report.refused) == 2


def test_pools_and_moves_of_codes_are_those_of_values():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            y = functional.max_pool2d(self.one(x), (3, 2), stride=(2, 1), padding=1)
            y = self.two(y[:, :, 1:].transpose(2, 3).contiguous())
            return self.head(y.permute(0, 2, 3, 1).reshape(-1, 8))

    x = drawn(2, 4, 12, 12)
    graph = converted(Model(), x)
    with torch.no_grad():
        report = lower_to_onednn(graph, (x,))
    assert report.differences["roundings where values are made"].largest == 0
    assert operators(graph)[str(ENCODE)] == 1
    assert not report.refused


def test_layers_in_loops_are_lowered():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.again, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            step = torch.tensor(0)
            _, x = torch.while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, self.again(v).relu()), (step, x))
            return self.head(x)

    x = drawn(4, 32)
    graph = converted(Model(), x)
    kept = lower_to_onednn(copy.deepcopy(graph))
    assert sum(each.name == "layers of oneDNN" for each in kept.changed) == 1
    assert "in a loop or a branch" in next(each.reason for each in kept.refused)
    before, after, report = lowered(graph, x, inner=True)
    assert sum(each.name == "layers of oneDNN" for each in report.changed) == 2
    inner = [node for part in graph.children() if hasattr(part, "graph") for node in part.graph.nodes]
    assert sum(node.target is LINEAR for node in inner) == 1
    assert sqnr(before, after) > 60
