"""Convolutions of graphs by a recipe: the numbers of a model whose weights and inputs the core rounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Recipe, Rule
from lowbit_pt2e import GraphError, convert, prepare, quantize_layers
from lowbit_pt2e.codes import DECODE, ENCODE

CONVOLUTIONS = {
    "1d": (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "2d in groups": (nn.Conv2d(8, 12, (3, 1), stride=2, groups=4), (2, 8, 9, 7)),
    "2d, padded alike": (nn.Conv2d(4, 6, 3, dilation=2, padding="same", bias=False), (2, 4, 8, 8)),
    "3d": (nn.Conv3d(2, 4, 3), (1, 2, 5, 5, 5)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3, stride=2), (2, 6, 5)),
    "transposed 2d in groups": (nn.ConvTranspose2d(8, 12, 3, groups=4, padding=1), (2, 8, 5, 6)),
    "without a batch": (nn.Conv2d(4, 6, 3), (4, 8, 8)),
}


def exported(model, *inputs, decomposed=False):
    with torch.no_grad():
        program = torch.export.export(model.eval(), inputs)
        return (program.run_decompositions() if decomposed else program).module()


def drawn(shape, seed, outliers=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.where(torch.rand(shape, generator=generator) < 0.01, 30.0, 1.0) if outliers else x


def rounded_weight(layer, spec):
    """The weight whose output channels are rounded, by the core, each with all that it sums."""
    weight = layer.weight.detach()
    if not layer.transposed:
        return lowbit.quantize(weight.flatten(1), spec).dequantize().view(weight.shape)
    ins, outs = weight.shape[0] // layer.groups, weight.shape[1]
    found = torch.empty_like(weight)
    for group in range(layer.groups):
        for channel in range(outs):
            part = weight[group * ins : (group + 1) * ins, channel]
            row = lowbit.quantize(part.reshape(1, -1), spec).dequantize()
            found[group * ins : (group + 1) * ins, channel] = row.view(part.shape)
    return found


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("spec", "decomposed"), [("INT8_ROW", False), ("int4:1x*:float32", True), ("e4m3fn:1x*:e8m0", False)]
)
def test_weights_are_rounded_by_output_channel(name, spec, decomposed):
    layer, shape = CONVOLUTIONS[name]
    x = drawn(shape, 0, outliers=True)
    graph = exported(layer, x, decomposed=decomposed)
    report = quantize_layers(graph, Recipe((Rule.of("*", spec),)), (x,))
    assert [each.reason for each in report.findings] == [None]
    exact = torch.func.functional_call(layer, {"weight": rounded_weight(layer, spec)}, (x,))
    assert torch.equal(graph(x), exact)
    assert max(held.nbytes for held in graph.buffers()) <= layer.weight.numel()
    assert "weight" not in dict(graph.named_parameters())


@pytest.mark.parametrize("spec", ["INT8_TENSOR", "INT8_TENSOR_ASYM", "FP8_TENSOR", "uint8:*x*:float32:zero=uint8"])
@pytest.mark.parametrize("name", ["2d in groups", "transposed 1d"])
def test_inputs_are_rounded_by_the_scale_that_data_told(name, spec):
    layer, shape = CONVOLUTIONS[name]
    batches = [drawn(shape, i, outliers=True) for i in range(3)]
    graph = exported(layer, batches[0])
    prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation=f"static:{spec}"),)))
    for batch in batches:
        assert torch.equal(prepared(batch), layer(batch))
    convert(prepared)
    seen = torch.stack(batches).flatten()
    for x in (batches[0], 3 * batches[1]):
        # The core's own rounding, by the scale of all that was seen.
        both = lowbit.quantize(torch.stack((seen.min(), seen.max())).view(1, 2), spec)
        rounded = lowbit.quantize(x.flatten(1), spec, both.scale, both.zero).dequantize().view(shape)
        weight = rounded_weight(layer, "INT8_ROW")
        assert torch.equal(graph(x), torch.func.functional_call(layer, {"weight": weight}, (rounded,)))


def test_inputs_are_rounded_as_they_come_by_one_scale():
    layer, shape = CONVOLUTIONS["2d in groups"]
    x = drawn(shape, 0)
    graph = exported(layer, x)
    quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW", activation="dynamic:INT8_TENSOR_ASYM"),)))
    for batch in (x, 100 * drawn(shape, 1)):
        rounded = lowbit.quantize(batch.flatten(1), "INT8_TENSOR_ASYM").dequantize().view(shape)
        exact = torch.func.functional_call(layer, {"weight": rounded_weight(layer, "INT8_ROW")}, (rounded,))
        assert torch.equal(graph(batch), exact)


def test_inputs_that_would_have_a_scale_each_row_are_refused():
    layer, shape = CONVOLUTIONS["2d in groups"]
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(192, 4))
    x = drawn(shape, 0)
    graph = exported(model, x)
    exact = graph(x)
    report = quantize_layers(graph, Recipe((Rule.of("0.*", "INT8_ROW", activation="dynamic:INT8_ROW"),)))
    assert [each.reason.split(":")[0] for each in report.findings] == ["a convolution", "no rule matches its weight"]
    assert "INT8_TENSOR_ASYM" in report.findings[0].reason
    assert torch.equal(graph(x), exact)


def test_layers_may_be_chosen_by_their_nodes():
    x = drawn((2, 4, 6, 6), 0)
    graph = exported(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 4)), x)
    recipe = Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR"),))

    def convolves(node):
        return node.target is torch.ops.aten.conv2d.default

    prepared = prepare(graph, recipe, where=convolves)
    assert len(prepared.observers) == 1
    prepared(x)
    report = convert(prepared)
    assert [(each.node, each.reason) for each in report.findings] == [("conv2d", None), ("linear", "`where` leaves it")]
    assert "2.weight" in dict(graph.named_parameters())


class Residual(nn.Module):
    """Sums of a convolution and of what was before, of two convolutions, and in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third, self.aside = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x = self.first(x).relu()
        y = self.second(x)
        y += x
        y = y.relu()
        return self.third(y) + self.aside(y)


def test_what_convolutions_are_added_to_is_rounded_once_for_all_that_take_it():
    model, x = Residual().eval(), drawn((2, 4, 6, 6), 0)
    graph = exported(model, x)
    prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),)))
    # The inputs of all layers, of which two take one, and one of the two sums' operands.
    assert len(prepared.observers) == 4
    prepared(x)
    convert(prepared)

    def seen(value):
        both = lowbit.quantize(torch.stack((value.min(), value.max())).view(1, 2), "INT8_TENSOR_ASYM")
        return both.scale, both.zero

    def rounded(value, like):
        return lowbit.quantize(value.flatten(1), "INT8_TENSOR_ASYM", *seen(like)).dequantize().view(value.shape)

    def layer(module, value):
        return torch.func.functional_call(module, {"weight": rounded_weight(module, "INT8_ROW")}, (value,))

    # Scales are of the values of the float model.
    one = model.first(x).relu()
    two = (model.second(one) + one).relu()
    kept = rounded(layer(model.first, rounded(x, x)).relu(), one)
    last = rounded((layer(model.second, kept) + kept).relu(), two)
    third = rounded(layer(model.third, last), model.third(two))
    assert torch.equal(graph(x), third + layer(model.aside, last))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(ENCODE) == targets.count(DECODE) == 6


def test_a_convolution_that_never_ran_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.one, lambda v: v.clone(), (x,))

    graph = exported(Model(), torch.ones(1, 2, 3, 3))
    prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR"),)))
    prepared(-torch.ones(1, 2, 3, 3))
    with pytest.raises(GraphError, match=r"the input of conv2d, by one\.weight, has no scale.*test_convolutions\.py"):
        convert(prepared)
