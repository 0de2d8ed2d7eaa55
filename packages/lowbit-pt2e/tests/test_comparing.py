"""Where a quantized graph departs from the float one."""

from __future__ import annotations

import copy

import pytest
import torch
from test_observing import BATCHES, Looped, Model, exported, sqnr

from lowbit import Recipe, Rule, quantize
from lowbit_pt2e import GraphError, compare, fold_norms, quantize_layers
from lowbit_pt2e.passes import difference


def test_nodes_are_compared_with_those_that_they_stand_for():
    model, x = Model(), BATCHES[0]
    before = exported(model, x)
    after = copy.deepcopy(before)
    quantize_layers(after, Recipe((Rule.of("gate.weight", "INT4_G32"), Rule.of("down.weight", "INT8_ROW"))))
    comparison = compare(before, after, x)
    found = {row.was: row for row in comparison.rows}
    assert list(found) == ["linear", "sigmoid", "linear_1", "mul", "linear_2"]
    gate, up, down = found["linear"], found["linear_1"], found["linear_2"]
    assert (gate.operator, up.operator) == ("lowbit.linear.default", "aten.linear.default")
    assert up.difference.sqnr == float("inf")
    weight = quantize(model.gate.weight.detach(), "INT4_G32").dequantize()
    with torch.no_grad():
        rounded = torch.nn.functional.linear(x, weight, model.gate.bias)
        assert gate.difference.sqnr == pytest.approx(sqnr(model.gate(x), rounded), abs=1e-3)
    assert 10 < gate.difference.sqnr < down.difference.sqnr < 40
    assert "self.down(self.gate(x)" in down.source
    assert "lowbit.linear.default" in str(comparison)


def test_rounds_of_a_loop_are_taken_together():
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    before = exported(Looped(), x)
    after = copy.deepcopy(before)
    quantize_layers(after, Recipe((Rule.of("*", "INT8_ROW"),)))
    rows = [row for row in compare(before, after, x).rows if row.graph]
    (inner,) = (row for row in rows if row.operator == "lowbit.linear.default")
    assert inner.graph == "while_loop_body_graph_0"
    assert 30 < inner.difference.sqnr < 60


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.first = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)
        self.second, self.two = torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8)
        for norm in (self.first, self.second):
            norm.running_var.uniform_(2, 9)

    def forward(self, x):
        x = self.first(self.one(x).transpose(1, 2)).relu()
        return self.two(self.second(x).transpose(1, 2))


def test_folded_layers_stand_for_what_they_give():
    """Not for the layer before its norm, and turns between not for what they turned."""
    x = torch.randn(2, 3, 8)
    before = exported(Normed().eval(), x)
    after = copy.deepcopy(before)
    assert len(fold_norms(after).changed) == 2
    rows = {row.was: row for row in compare(before, after, x).rows}
    assert list(rows) == ["batch_norm", "relu", "linear_1"]
    assert all(row.difference.sqnr > 100 for row in rows.values())
    assert rows["batch_norm"].node == "transpose"
    # What stands for none is in no row, of two folded graphs neither.
    assert [row.was for row in compare(after, copy.deepcopy(after), x).rows] == list(rows)


def test_nothing_departs_from_itself():
    graph = exported(Model(), BATCHES[0])
    fold_norms(graph)
    comparison = compare(graph, copy.deepcopy(graph), BATCHES[0])
    assert comparison.rows
    assert all(row.difference.sqnr == float("inf") for row in comparison.rows)
    with pytest.raises(GraphError, match="a Model is no exported graph"):
        compare(graph, Model(), BATCHES[0])


class Counting(torch.nn.Module):
    """Changes its input and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x):
        x.mul_(2)
        self.count.add_(1)
        return self.linear(x) + self.count


def test_runs_leave_inputs_and_buffers_what_they_were():
    x = torch.randn(2, 4)
    kept = x.clone()
    graph = exported(Counting(), x.clone())
    comparison = compare(graph, copy.deepcopy(graph), x)
    assert all(row.difference.sqnr == float("inf") for row in comparison.rows)
    quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW"),)), (x,))
    assert torch.equal(x, kept)
    assert float(graph.count) == 0


def test_infinities_that_stay_do_not_differ():
    masked = torch.tensor([1.0, -torch.inf, torch.nan])
    assert difference([masked], [masked.clone()]).sqnr == float("inf")
    apart = difference([masked], [torch.tensor([1.0, 0.0, 0.0])])
    assert (apart.largest, apart.sqnr) == (float("inf"), -float("inf"))
    assert difference([], []).sqnr == float("inf")
