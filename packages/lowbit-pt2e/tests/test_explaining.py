"""What is told of one node: its scales are those that data told, its reasons those of the passes."""

from __future__ import annotations

import pytest
import torch
from test_drawing import Residual, X, exported
from test_passes import Nested
from torch import nn

from lowbit import Recipe, Rule
from lowbit_pt2e import (
    Finding,
    GraphError,
    Report,
    convert,
    fold_norms,
    lower_to_onednn,
    prepare,
    quantize_layers,
)
from lowbit_pt2e.codes import DECODE, ENCODE
from lowbit_pt2e.explaining import explain
from lowbit_pt2e.running import Watching

STATIC = "static:INT8_TENSOR_ASYM"


def passed(*rules, lowers=True):
    """The graph after passes, their reports, and the ranges of values in between."""
    graph = exported(Residual(), X)
    reports = [fold_norms(graph)]
    seen = {}

    def see(_, node, value):
        if isinstance(value, torch.Tensor):
            seen[node.name] = min(float(value.min()), 0.0), max(float(value.max()), 0.0)

    with torch.no_grad():
        Watching(graph, after=see).run(X)
        prepared = prepare(graph, Recipe((*rules, Rule.of("*", "INT8_ROW", activation=STATIC))))
        prepared(X)
        reports.append(convert(prepared))
    if lowers:
        reports.append(lower_to_onednn(graph))
    return graph, reports, seen


def by_what(explanation):
    return {each.what: each for each in explanation.roundings}


def test_a_layer_tells_its_value_its_place_and_whose_scales_it_has():
    graph, reports, seen = passed(lowers=False)
    found = explain(graph, "conv2d", *reports)
    assert (found.node, found.was, found.operator) == ("conv2d", None, "aten.conv2d")
    assert (found.dtype, found.shape) == (torch.float32, (2, 8, 8, 8))
    assert found.source.endswith("x = self.one(x).relu()")
    rounding = by_what(found)
    low, high = seen["x"]
    assert rounding["input"].scale[0] == rounding["input"].scale[1] == pytest.approx((high - low) / 255, rel=1e-5)
    assert rounding["input"].zero[0] == pytest.approx(-128 - low / rounding["input"].scale[0], abs=0.51)
    assert rounding["input"].origin == "as data told of x"
    rows = Residual().one.weight.detach().flatten(1).abs().amax(1) / 127
    assert rounding["weight"].scale == pytest.approx((float(rows.min()), float(rows.max())), rel=0.02)
    assert rounding["weight"].origin == "stored in one_weight_qdata"
    assert [each.name for each in found.findings] == ["quantize layers"]
    assert found.left == "no pass that lowers it has run"


def test_roundings_tell_theirs():
    graph, reports, _ = passed(lowers=False)
    for node in graph.graph.nodes:
        if node.target not in {ENCODE, DECODE}:
            continue
        found = explain(graph, node.name, *reports)
        (rounding,) = found.roundings
        assert (rounding.scale[0], rounding.zero[0]) == (node.args[1], node.args[2])
        given = node.args[0].name
        told = f"as data told of {given}" if node.target is ENCODE else f"codes that {given} gives"
        assert rounding.origin == told
        assert found.left is None


def test_a_layer_is_found_by_the_norm_that_it_stands_for():
    graph, reports, _ = passed(lowers=False)
    found = explain(graph, "batch_norm", *reports)
    assert (found.was, found.operator) == ("batch_norm", "aten.conv2d")
    assert found == explain(graph, found.node, *reports)
    folded, *_, quantized = found.findings
    assert (folded.name, folded.node) == ("fold the norm after a layer", "batch_norm")
    assert (quantized.name, quantized.node, quantized.reason) == ("quantize layers", found.node, None)
    text = str(found)
    assert text.startswith(f"{found.node}, in the place of batch_norm: aten.conv2d, gives float32 [2, 8, 8, 8]\n")
    assert "  fold the norm after a layer: batch_norm was changed\n" in text


def test_a_layer_of_onednn_tells_scales_of_codes():
    graph, reports, seen = passed()
    found = explain(graph, "linear_1", *reports)
    assert found.operator == "onednn.qlinear_pointwise"
    rounding = by_what(found)
    low, high = seen["relu_2"]
    assert rounding["input"].scale[0] == pytest.approx((high - low) / 255, rel=1e-5)
    assert rounding["input"].zero == (0, 0)
    assert rounding["input"].format == "uint8"
    assert rounding["weight"].origin == "stored in head_weight_qdata"
    assert "output" not in rounding
    assert found.left is None
    # One that gives codes has the scale of the next one's input; a sum tells that of what it adds, too.
    inner = explain(graph, "qlinear_pointwise_default", *reports)
    assert by_what(inner)["output"].scale == rounding["input"].scale
    total = by_what(explain(graph, "convolution_sum_default", *reports))
    assert total.keys() == {"input", "weight", "sum", "output"}
    assert total["sum"].scale == by_what(explain(graph, "qconv_pointwise_default", *reports))["output"].scale


@pytest.mark.parametrize(
    ("rule", "node", "reason"),
    [
        (Rule.of("wide.weight", None), "linear", "rule 'wide.weight' keeps its weight"),
        (
            Rule.of("wide.weight", "INT8_ROW", activation="dynamic:INT8_ROW"),
            "linear",
            "its inputs are rounded as they come",
        ),
        (Rule.of("one.weight", "INT8_ROW"), "conv2d", "its inputs are not rounded"),
        (Rule.of("one.weight", "FP8_ROW", activation=STATIC), "conv2d", "oneDNN has weights in INT8_ROW; this is"),
    ],
)
def test_a_layer_that_was_not_lowered_tells_why(rule, node, reason):
    graph, reports, _ = passed(rule)
    found = explain(graph, node, *reports)
    assert found.left is not None
    assert found.left.startswith(reason)
    assert any(each.reason == found.left for each in found.findings)
    assert f"in floating point still: {found.left}" in str(found)


def test_a_layer_that_no_pass_spoke_of_tells_that():
    graph = exported(Residual(), X)
    assert explain(graph, "conv2d").left == "no report is of a pass that quantizes layers"
    assert explain(graph, "conv2d", fold_norms(graph)).left == "no report is of a pass that quantizes layers"

    class Computed(nn.Module):
        def forward(self, x):
            return nn.functional.linear(x, x * 2)

    graph = exported(Computed(), torch.randn(4, 4))
    assert explain(graph, "linear").left == "its layer's weight is computed or changed in the graph"


@pytest.mark.parametrize(
    ("weight", "activation", "told"),
    [
        ("INT4_G32", None, {"weight": True}),
        ("FP8_ROW", "dynamic:FP8_ROW", {"weight": True, "input": False}),
        ("MXFP4", None, {"weight": False}),
    ],
)
def test_a_quantized_layer_tells_its_formats(weight, activation, told):
    graph = exported(nn.Linear(64, 32), torch.randn(2, 64))
    report = quantize_layers(graph, Recipe((Rule.of("*", weight, activation=activation),)))
    found = explain(graph, "linear", report)
    assert found.operator == "lowbit.linear"
    assert {name: each.scale is not None for name, each in by_what(found).items()} == told
    assert f"{by_what(found)['weight'].format}, " in str(found)


def test_names_in_inner_graphs_are_told_apart():
    graph = exported(Nested(), torch.randn(3, 4))
    report = fold_norms(graph)
    with pytest.raises(
        GraphError, match="several graphs have a batch_norm; name one of while_loop_body_graph_0.batch_norm"
    ):
        explain(graph, "batch_norm", report)
    found = explain(graph, "while_loop_body_graph_0.batch_norm", report)
    assert (found.graph, found.was) == ("while_loop_body_graph_0", "batch_norm")
    assert len(found.findings) == 1
    assert str(found).startswith(f"{found.node} in while_loop_body_graph_0, in the place of batch_norm: aten.linear")
    # The whole graph's own comes first.
    assert explain(graph, "linear").graph == ""


def test_a_node_is_found_by_what_it_was_at_any_pass():
    graph, reports, _ = passed()
    found = explain(graph, "conv2d", *reports)
    assert found.operator == "onednn.qconv_pointwise"
    assert found.made_for == "conv2d"
    assert [each.name for each in found.findings if each.node == "conv2d"] == ["quantize layers", "layers of oneDNN"]
    total = explain(graph, "convolution_sum_default", *reports)
    assert total.findings[0].node == "batch_norm"
    assert explain(graph, "batch_norm", *reports).findings == total.findings


def test_a_layer_is_found_by_the_activation_that_it_took_into_itself():
    graph, reports, _ = passed()
    found = explain(graph, "relu_2", *reports)
    assert (found.operator, found.was) == ("onednn.qlinear_pointwise", "relu_2")
    assert ", in the place of relu_2: onednn.qlinear_pointwise" in str(found)


def test_what_is_gone_tells_what_was_said():
    graph = exported(Residual(), X)
    said = Finding("a pass", "", "norm", "a reason", "from File somewhere")
    found = explain(graph, "norm", Report((said,), {}))
    assert (found.node, found.findings) == (None, (said,))
    assert str(found) == "norm is in the graph no more\n  from File somewhere\n  a pass: norm was left, a reason"


def test_a_name_that_is_unknown_is_an_error_that_names_near_ones():
    graph, reports, _ = passed()
    with pytest.raises(GraphError, match="no node of the graph is or was 'batch_nrom'; there are batch_norm"):
        explain(graph, "batch_nrom", *reports)
    with pytest.raises(GraphError, match="no node of the graph is or was 'nowhere.x'; there are "):
        explain(graph, "nowhere.x", *reports)
    nested = exported(Nested(), torch.randn(3, 4))
    with pytest.raises(GraphError, match="there are while_loop_body_graph_0.linear"):
        explain(nested, "while_loop_body_graph_1.linear")
    with pytest.raises(GraphError, match="a Residual is no exported graph"):
        explain(Residual(), "x")
