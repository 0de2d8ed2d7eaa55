"""Layers and models that are observed first and converted later, to whatever the statistics serve."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit as lb
from lowbit import FormatError, LowbitError, QuantizedTensor, Recipe, Rule
from lowbit.observer import AbsMax, Histogram, MinMax, PerChannelAbsMax
from lowbit_algos import ObservedLinear, observe

K, N = 64, 32
WAYS = {
    "int8": ("INT8_ROW", "static:INT8_TENSOR"),
    "int8 asymmetric": ("INT8_ROW", "static:INT8_TENSOR_ASYM"),
    "fp8": ("FP8_TENSOR", "static:FP8_TENSOR"),
    "nvfp4": ("NVFP4", "local:NVFP4"),
    "weight only": ("INT4_G32", None),
    "dynamic": ("INT8_ROW", "dynamic:INT8_ROW"),
}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(K, N)


def inputs(seed, shift=0.7):
    return torch.randn(50, K, generator=torch.Generator().manual_seed(seed)) + shift


def observed(layer, **observers):
    found = ObservedLinear(layer, **observers)
    for seed in range(3):
        assert torch.equal(found(inputs(seed)), layer(inputs(seed)))
    return found


@pytest.mark.parametrize("way", list(WAYS))
def test_one_class_serves_every_format(layer, way):
    fmt, activation = WAYS[way]
    plain, found = copy.deepcopy(layer), observed(layer, input=MinMax())
    converted = found.convert(fmt, activation)
    assert converted is layer
    q, x = layer.weight, torch.cat([inputs(seed) for seed in range(3)])
    assert isinstance(q, QuantizedTensor)
    assert (str(q.format), q.activation and str(q.activation)) == (
        str(lb.Format.parse(fmt)),
        activation and str(lb.Activation.parse(activation)),
    )
    low, high, amax = float(x.min()), float(x.max()), float(x.abs().max())
    expected = {"int8": amax / 127.5, "int8 asymmetric": (high - low) / 255, "fp8": amax / 448}
    if way in expected:
        assert float(q.act_scale) == pytest.approx(expected[way], rel=1e-6)
    error = (layer(inputs(9)) - plain(inputs(9))).norm() / plain(inputs(9)).norm()
    assert float(error.detach()) < {"nvfp4": 0.15, "weight only": 0.15, "fp8": 0.05}.get(way, 0.03)


def test_statistics_serve_several_formats(layer):
    found = observed(layer, input=Histogram(), weight=AbsMax(), output=MinMax())
    eight, four = copy.deepcopy(found), copy.deepcopy(found)
    eight.convert("INT8_TENSOR", "static:INT8_TENSOR")
    four.convert("int4:*x*:float32", "static:int4:*x*:float32")
    # Fewer steps are worth more of the range being cut off.
    ranges = [
        float(f.linear.weight.act_scale) * (2**f.linear.weight.activation.format.element.bits - 1)
        for f in (eight, four)
    ]
    assert ranges[1] < ranges[0]
    y = torch.cat([layer(inputs(seed)) for seed in range(3)])
    assert float(found.output.high) == float(y.detach().max())


def test_a_weights_observer_says_its_scale(layer):
    rows = observed(copy.deepcopy(layer), weight=PerChannelAbsMax(N)).convert("FP8_ROW")
    assert torch.equal(rows.weight.scale, lb.quantize(layer.weight, "FP8_ROW").scale)
    assert torch.equal(rows.weight.dequantize(), lb.quantize(layer.weight, "FP8_ROW").dequantize())
    whole = observed(copy.deepcopy(layer), weight=AbsMax()).convert("NVFP4")
    assert torch.equal(whole.weight.dequantize(), lb.quantize(layer.weight, "NVFP4").dequantize())
    with pytest.raises(FormatError, match="needed is torch.bfloat16 of shape"):
        observed(copy.deepcopy(layer), weight=AbsMax()).convert("INT4_G32")


def test_statistics_are_saved_and_go_on_elsewhere(layer):
    first, again = (
        observed(layer, input=MinMax(), output=AbsMax()),
        ObservedLinear(copy.deepcopy(layer), input=MinMax(), output=AbsMax()),
    )
    again.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"linear.weight", "linear.bias", "input.low", "input.high", "output.amax"}
    other = again.convert("INT8_ROW", "static:INT8_TENSOR_ASYM").weight
    mine = first.convert("INT8_ROW", "static:INT8_TENSOR_ASYM").weight
    assert torch.equal(mine.act_scale, other.act_scale)
    assert torch.equal(mine.act_zero, other.act_zero)


def test_what_was_not_observed_is_told(layer):
    with pytest.raises(LowbitError, match="the input of the layer was not observed"):
        ObservedLinear(layer).convert("INT8_ROW", "static:INT8_TENSOR")
    with pytest.raises(FormatError, match="MinMax has seen no values"):
        ObservedLinear(layer, input=MinMax()).convert("INT8_ROW", "static:INT8_TENSOR")
    assert not isinstance(layer.weight, QuantizedTensor)


class Loud(nn.Linear):
    def forward(self, x):
        return super().forward(x * 3) + 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Loud(K, K), nn.ReLU(), nn.Linear(K, N))


RECIPE = Recipe(
    (
        Rule.of("0.weight", "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),
        Rule.of("2.weight", "INT8_ROW", activation="dynamic:INT8_ROW"),
    )
)


def test_a_model_is_observed_by_hooks_and_stays_what_it_is(model):
    calls, plain = [], copy.deepcopy(model)
    model[0].register_forward_hook(lambda *_: calls.append(1))
    with observe(model, RECIPE) as observation:
        for seed in range(3):
            assert torch.equal(model(inputs(seed)), plain(inputs(seed)))
    assert len(calls) == 3
    x = 3 * torch.cat([inputs(seed) for seed in range(3)])
    # What the weight is multiplied with, which is not what its module is given.
    assert float(observation.of("0.weight").high) == float(x.max())
    model(inputs(99) * 100)
    assert float(observation.of("0.weight").high) == float(x.max())
    module = model[0]
    observation.convert_(model)
    assert model[0] is module
    assert isinstance(module.weight, QuantizedTensor)
    assert float(module.weight.act_scale) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-6)
    calls.clear()
    error = (model(inputs(9)) - plain(inputs(9))).norm() / plain(inputs(9)).norm()
    assert calls
    assert float(error.detach()) < 0.03


def test_an_observations_statistics_are_its_state(model):
    observation = observe(model, RECIPE)
    model(inputs(0))
    other = observe(copy.deepcopy(model), RECIPE)
    other.load_state_dict(observation.state_dict())
    assert torch.equal(other.of("2.weight").low, observation.of("2.weight").low)
    assert not any("observ" in name or "inputs" in name for name in model.state_dict())


def test_a_model_that_raises_is_not_watched_for_ever(model):
    observation = observe(model, RECIPE)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 3))
    before = float(observation.of("0.weight").high)
    torch.nn.functional.linear(torch.full((1, K), 1e6), model[0].weight)
    assert float(observation.of("0.weight").high) == before


def test_a_model_that_never_ran_is_told_and_left(model):
    plain = copy.deepcopy(model.state_dict())
    observation = observe(model, RECIPE)
    with pytest.raises(FormatError, match="has seen no values"):
        observation.convert_(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.values(), strict=True))
