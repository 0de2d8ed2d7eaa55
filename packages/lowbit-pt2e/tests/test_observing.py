"""Scales that data tell: what a prepared graph gives, what it remembers, and the numbers of the converted one."""

from __future__ import annotations

import copy

import pytest
import torch
from test_passes import Nested
from torch import nn
from torch._higher_order_ops.map import map as map_rows

import lowbit
from lowbit import Activation, Recipe, Rule
from lowbit.numerics import choose_scale
from lowbit.observer import AbsMax, Percentile
from lowbit_pt2e import GraphError, convert, fold_norms, prepare

LINEAR = torch.ops.lowbit.linear.default


def exported(model, *inputs):
    with torch.no_grad():
        return torch.export.export(model, inputs).module()


def sqnr(exact, found):
    return float(10 * (exact.square().sum() / (found - exact).square().sum()).log10())


class Model(nn.Module):
    """Two layers that take the same value, and one of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96, bias=False), nn.Linear(96, 32)
        self.eval()

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


BATCHES = [torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(3)]
FORMATS = [
    *(("INT8_ROW", "static:INT8_TENSOR"), ("INT8_ROW", "static:INT8_TENSOR_ASYM"), ("INT4_G32", "static:INT8_TENSOR")),
    *(("FP8_ROW", "static:FP8_TENSOR"), ("NVFP4", "local:NVFP4")),
]


@pytest.mark.parametrize(("weight", "activation"), FORMATS)
def test_a_converted_graph_gives_what_a_model_gives_with_scales_of_the_same_data(weight, activation):
    model = Model()
    graph = exported(model, BATCHES[0])
    prepared = prepare(graph, Recipe((Rule.of("*", weight, activation=activation),)))
    assert len(prepared.observers) == 2
    inputs = {name: [] for name in ("gate", "up", "down")}
    for name, kept in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
    with torch.no_grad():
        for batch in BATCHES:
            assert torch.equal(prepared(batch), model(batch))
    seen = {name: torch.cat([each.flatten() for each in parts]) for name, parts in inputs.items()}
    report = convert(prepared, (BATCHES[0],))
    assert len(report.changed) == 3
    how = Activation.parse(activation)
    for name, values in seen.items():
        layer = model.get_submodule(name)
        scales = choose_scale(torch.stack((values.min(), values.max())).view(1, 2), how.format.with_block(1, 0))
        quantized = lowbit.quantize(layer.weight.detach(), weight)
        local = how.scaling == "local"
        layer.weight = nn.Parameter(
            lowbit.QuantizedTensor.from_parts(
                *(quantized.qdata, quantized.scales, quantized.format),
                k=quantized.shape[1],
                dtype=torch.float32,
                activation=how,
                act_scale=scales.tensor_scale if local else scales.scale.to(torch.float32),
                act_zero=None if local else scales.zero,
            ),
            requires_grad=False,
        )
    with torch.no_grad():
        for batch in BATCHES:
            assert torch.equal(prepared.model(batch), model(batch))


def test_observers_are_chosen():
    graph = exported(Model(), BATCHES[0])
    recipe = Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR"),))
    for kind, least in ((AbsMax, 25), (lambda: Percentile(99.0), 15)):
        prepared = prepare(copy.deepcopy(graph), recipe, observer=kind)
        with torch.no_grad():
            prepared(BATCHES[0])
        assert {type(each) for each in prepared.observers} == {AbsMax if kind is AbsMax else Percentile}
        convert(prepared)
        with torch.no_grad():
            assert least < sqnr(graph(BATCHES[0]), prepared.model(BATCHES[0])) < 45


def test_loops_and_branches_run_as_they_do_and_are_observed_each_time():
    torch.manual_seed(0)
    model, x = Nested().eval(), torch.randn(3, 4)
    graph = exported(model, x)
    with torch.no_grad():
        wanted = graph(x)
    prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR"),)), carry=False)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), wanted, rtol=1e-6, atol=1e-6)
    seen = []

    def part(i, v):
        seen.append((i, v))
        return model.norms[i](model.layers[i](v)).tanh()

    with torch.no_grad():
        v = x
        for _ in range(2):
            carry = v
            for row in (v, -v):
                carry = part(0, carry) if row.sum() > 0 else carry - 1
                carry = part(1, carry)
            v = part(2, carry)
    seen.append((0.5, v))
    ranges = sorted((float(each.low), float(each.high)) for each in prepared.observers)
    wanted_ranges = [torch.cat([v.flatten() for i, v in seen if i == which]) for which in (0, 1, 2, 0.5)]
    expected = sorted((float(each.min()), float(each.max())) for each in wanted_ranges)
    torch.testing.assert_close(torch.tensor(ranges), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    convert(prepared)
    with torch.no_grad():
        assert sqnr(wanted, prepared.model(x)) > 25


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return map_rows(lambda row: self.linear(row).relu(), x)


class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return torch.while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, self.linear(v)), (torch.tensor(0), x))[1]


@pytest.mark.parametrize(("kind", "shape", "least"), [(Mapped, (3, 2, 8), 35), (Looped, (6, 5), 35)])
def test_layers_of_maps_and_loops_stay_near(kind, shape, least):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(shape)
    graph = exported(model, x)
    with torch.no_grad():
        wanted = graph(x)
        recipe = Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),))
        prepared = prepare(graph, recipe, carry=False)
        torch.testing.assert_close(prepared(x), wanted)
        convert(prepared)
        assert sqnr(wanted, prepared.model(x)) > least


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.one, self.two, (x,))


def test_a_layer_that_never_ran_is_named_and_nothing_is_changed():
    x = torch.ones(2, 8)
    graph = exported(Skipped(), x)
    prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR"),)))
    before = [each.code for each in graph.modules() if isinstance(each, torch.fx.GraphModule)]
    with torch.no_grad():
        prepared(x)
    with pytest.raises(
        GraphError, match=r"the input of linear, by two.weight, has no scale: no data reached it.*self.two"
    ):
        convert(prepared)
    assert [each.code for each in graph.modules() if isinstance(each, torch.fx.GraphModule)] == before
    with torch.no_grad():
        prepared(-x)
        prepared(torch.full((2, 8), torch.nan))
    with pytest.raises(GraphError, match="has seen a NaN or an infinity"):
        convert(prepared)


def test_inputs_are_seen_as_layers_take_them():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            y = x.relu()
            y[:, 0] = 50.0
            return self.linear(y)

    model, x = Written(), torch.randn(4, 8)
    graph = exported(model, x)
    prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR"),))).eval()
    with torch.no_grad():
        wanted = graph(x)
        prepared(x)
        (seen,) = prepared.observers
        assert float(seen.high) == 50
        convert(prepared)
        assert sqnr(wanted, prepared.model(x)) > 30


def test_a_graph_that_was_changed_meanwhile_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    graph = exported(model, torch.randn(2, 8))
    prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR"),)))
    prepared(torch.randn(2, 8))
    fold_norms(graph)
    with pytest.raises(GraphError, match="the graph was changed after it was prepared"):
        convert(prepared)
