"""What loops carry and branches are given as codes: which nodes have them, by which scale, and how far results move."""

from __future__ import annotations

import pytest
import torch
from test_passes import Nested
from torch import nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan

from lowbit import Recipe, Rule
from lowbit_pt2e import convert, fold_norms, lower_to_onednn, prepare
from lowbit_pt2e.codes import DECODE, ENCODE
from lowbit_pt2e.graphs import regions

STATIC = Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),))


def exported(model, *inputs):
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs).module()


def sqnr(exact, found):
    with torch.no_grad():
        return float(10 * (exact.square().sum() / (found - exact).square().sum()).log10())


def carried(graph):
    """Dtypes of what every inner graph is given and gives, by its name."""
    found = {}
    for region in regions(graph)[1:]:
        values = [*region.placeholders, *region.outputs]
        name = region.name.rpartition(".")[2].split("_graph")[0].split("_combine")[0].removesuffix("_0")
        found[name] = [str(node.meta["val"].dtype).removeprefix("torch.") for node in values]
    return found


def quantized(model, *batches, recipe=STATIC, **how):
    graph = exported(model, *batches[0])
    fold_norms(graph)
    prepared = prepare(graph, recipe, **how)
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(prepared(*batch), model(*batch))
        convert(prepared)
    return graph, prepared


class Loop(nn.Module):
    """Linear layers on what a loop carries."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.again, self.last = nn.Linear(5, 5), nn.Linear(5, 8)

    def forward(self, x):
        def body(i, v):
            return i + 1, self.again(v)

        _, x = torch.while_loop(lambda i, v: (i < 3) & (v.sum() < 1e9), body, (torch.tensor(0), x))
        return self.last(x)


def test_a_loop_carries_codes():
    model, x = Loop(), torch.rand(64, 5, generator=torch.Generator().manual_seed(0)) - 0.5
    graph, prepared = quantized(model, (x,))
    # All that the loop makes of a value, and the layer behind it, have one scale.
    assert len(prepared.observers) == 1
    found = carried(graph)
    assert found["while_loop_body"][:2] == ["int64", "int8"]
    assert found["while_loop_body"][-2:] == ["int64", "int8"]
    assert found["while_loop_cond"][:2] == ["int64", "int8"]
    assert sqnr(model(x), graph(x)) >= 40
    with torch.no_grad():
        values = [x, one := model.again(x), two := model.again(one), model.again(two)]
    seen = torch.stack(values)
    (scale,) = {node.args[1] for part in regions(graph) for node in part.nodes if node.target in {ENCODE, DECODE}}
    assert scale == pytest.approx(float((seen.max() - seen.min()) / 255), rel=1e-5)
    before = graph(x)
    report = lower_to_onednn(graph, (x,), inner=True)
    assert sum(each.name == "layers of oneDNN" for each in report.changed) == 2
    # Codes come into the loop once, and the layers take them from it.
    inner = next(each for each in regions(graph) if "body" in each.name)
    assert [node.target for node in inner.nodes if node.target in {ENCODE, DECODE}] == []
    assert sqnr(before, graph(x)) > 60


def test_layers_may_have_scales_of_their_own():
    model, x = Loop(), torch.rand(64, 5, generator=torch.Generator().manual_seed(0)) - 0.5
    graph, prepared = quantized(model, (x,), carry=False)
    assert len(prepared.observers) == 2
    assert carried(graph)["while_loop_body"][:2] == ["int64", "float32"]
    assert sqnr(model(x), graph(x)) > 43


def test_codes_go_through_a_branch_within_a_scan_within_a_loop():
    torch.manual_seed(0)
    model = Nested()
    for norm in model.norms:
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 4)
    graph, _ = quantized(model.eval(), (x,), (-x,))
    found = carried(graph)
    # The loop's, the scan's and the branch's carry; rows and what a scan stacks are floats.
    assert found["while_loop_body"][1] == found["while_loop_body"][-1] == "int8"
    assert found["scan"][0] == found["scan"][-2] == "int8"
    assert found["scan"][-1] == "float32"
    assert found["true"][0] == found["true"][-1] == found["false"][0] == found["false"][-1] == "int8"
    for batch in (x, -x):
        assert sqnr(model(batch), graph(batch)) > 20


def test_a_loops_condition_is_quantized_where_it_is_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.again, self.stops = nn.Linear(5, 5), nn.Linear(5, 1)

        def forward(self, x):
            def goes_on(i, v):
                return (i < 3) & (self.stops(v).sum() < 1e9)

            return torch.while_loop(goes_on, lambda i, v: (i + 1, self.again(v)), (torch.tensor(0), x))[1]

    x = torch.rand(16, 5) - 0.5
    for rules, count in (("*", 2), ("again.*", 1)):
        recipe = Recipe((Rule.of(rules, "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),))
        graph, _ = quantized(Model().eval(), (x,), recipe=recipe)
        layers = [node for part in regions(graph) for node in part.nodes if "lowbit.linear" in str(node.target)]
        assert len(layers) == count
        with torch.no_grad():
            assert sqnr(Model()(x), graph(x)) > 35


def test_values_that_layers_take_by_two_formats_or_by_none_stay_floats():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            def body(i, v, w):
                return i + 1, (self.one(v) + self.two(v)).tanh(), w * 2

            _, x, w = torch.while_loop(lambda i, v, w: i < 2, body, (torch.tensor(0), x, x + 1))
            return x + w

    x = torch.randn(3, 8)
    recipe = Recipe(
        (
            Rule.of("one.*", "INT8_ROW", activation="static:INT8_TENSOR"),
            Rule.of("two.*", "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),
        )
    )
    graph, _ = quantized(Model(), (x,), recipe=recipe)
    assert carried(graph)["while_loop_body"][:3] == ["int64", "float32", "float32"]
    graph, _ = quantized(Model(), (x,))
    # What no layer takes stays as it is.
    assert carried(graph)["while_loop_body"][:3] == ["int64", "int8", "float32"]


def test_what_is_used_elsewhere_keeps_its_value():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one = nn.Linear(8, 8)

        def forward(self, x):
            def step(v, row):
                v = self.one(v + row)
                return self.one(v).tanh(), v

            last, rows = scan(step, x, torch.stack((x, x + 1)))
            made = map_rows(lambda row, y: self.one(y) + row, rows, x)
            return last, rows, made, x * 2

    x = torch.randn(3, 8)
    graph, _ = quantized(Model(), (x,))
    found = carried(graph)
    # In the scan no layer takes what is carried; in the map, what all rows are given.
    assert set(found["scan"]) - {"int8", "float32"} == set()
    assert found["body"][1] == "int8"
    assert found["body"][0] == found["body"][-1] == "float32"
    with torch.no_grad():
        for exact, value in zip(Model().eval()(x), graph(x), strict=True):
            assert sqnr(exact, value) > 25
