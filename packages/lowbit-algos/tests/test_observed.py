"""Layers and models that are observed first and converted later, to whatever the statistics serve."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit as lb
from lowbit import FormatError, LowbitError, QuantizedTensor, Recipe, RecipeError, Rule
from lowbit.observer import AbsMax, Histogram, MinMax, PerChannelAbsMax, PerChannelMinMax
from lowbit_algos import Method, ObservedLinear, calibrate_, observe
from lowbit_algos.watch import Watch

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


class Doubling1d(nn.Conv1d):
    """A subclass with a way of its own, which its observer must not lose."""

    def forward(self, x):
        return super().forward(x) * 2


CONVS = {
    "1d": (lambda: Doubling1d(8, 6, 3, padding=2), (4, 8, 11), "int8:1x*x*:float32"),
    "2d": (lambda: nn.Conv2d(8, 6, 3, padding="same", groups=2), (4, 8, 7, 6), "int8:1x*x*x*:float32"),
    "2d circular": (
        lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"),
        (4, 8, 7, 6),
        "int8:1x*x*x*:float32",
    ),
}


def images(shape, seed):
    """Values about 0.7, one in all of them an outlier."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.7
    x.view(-1)[seed] = 9
    return x


def in_integers(layer, x, plain, scale, zero):
    """What a layer whose weight was `plain` makes of x, rounded under a scale and zero point by hand, in float64."""
    values = (np.clip(np.rint(x.numpy() / scale) + zero, -128, 127) - zero).astype(np.float64)
    w = plain.numpy()
    w_scale = np.abs(w).reshape(len(w), -1).max(1).reshape(-1, *(1,) * (w.ndim - 1)) / np.float32(127.5)
    codes = np.clip(np.rint(w / w_scale), -128, 127).astype(np.float64)
    exact = copy.deepcopy(layer).double()
    exact.weight = nn.Parameter(torch.from_numpy(codes))
    exact.bias = None
    scales = torch.from_numpy(np.float64(scale) * w_scale.astype(np.float64)).flatten()
    scales = scales.reshape(-1, *(1,) * (w.ndim - 2))
    times = 2 if isinstance(layer, Doubling1d) else 1
    return exact(torch.from_numpy(values)) * scales + times * layer.bias.double().reshape(scales.shape)


@pytest.mark.parametrize("kind", list(CONVS))
@pytest.mark.parametrize("by", ["module", "hooks"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_convolutions_run_on_what_was_observed(kind, by, asymmetric):
    torch.manual_seed(0)
    make, shape, fmt = CONVS[kind]
    layer = make()
    plain = layer.weight.detach().clone()
    seen = [images(shape, seed) for seed in range(3)]
    activation = "static:INT8_TENSOR_ASYM" if asymmetric else "static:INT8_TENSOR"
    if by == "module":
        found = ObservedLinear(layer, input=MinMax(), weight=PerChannelAbsMax(6), output=MinMax())
        assert all(torch.equal(found(x), layer(x)) for x in seen)
        assert float(found.output.high) == max(float(layer(x).detach().max()) for x in seen)
        assert found.convert(fmt, activation) is layer
    else:
        model = nn.Sequential(layer)
        with observe(model, Recipe((Rule.of("0.weight", fmt, activation=activation),))) as observation:
            for x in seen:
                model(x)
        observation.convert_(model)
        assert model[0] is layer
    q, x = layer.weight, torch.cat(seen)
    assert isinstance(q, QuantizedTensor)
    low, high = (np.float32(end) for end in (x.min(), x.max()))
    scale, zero = np.float32(high / np.float32(127.5)), 0
    if asymmetric:
        scale = high / np.float32(255) - low / np.float32(255)
        zero = int(-128 - np.rint(low / scale))
        assert int(q.act_zero) == zero != 0
    assert float(q.act_scale) == float(scale)
    x = images(shape, 9)
    wanted = in_integers(layer, x, plain, scale, zero)
    # The sum is exact, and rounded to float32 once; doubling rounds nothing.
    bound = 2.0**-24 * wanted.abs() + 2.0**-40
    assert ((layer(x).double() - wanted).abs() <= bound).all()


def test_a_convolutions_channels_are_told_apart():
    layer = nn.Conv2d(8, 6, 3)
    one = ObservedLinear(layer, input=PerChannelMinMax(8), weight=PerChannelAbsMax(6), output=PerChannelMinMax(6))
    x = images((4, 8, 7, 6), 1)
    y = one(x)
    # One image, without a batch.
    one(x[0] * 2)
    assert torch.equal(one.input.high, torch.maximum(x.amax((0, 2, 3)), 2 * x[0].amax((1, 2))))
    assert torch.equal(one.output.low, torch.minimum(y.amin((0, 2, 3)), layer(x[0] * 2).amin((1, 2))))
    assert torch.equal(one.weight.amax, layer.weight.abs().amax((1, 2, 3)))


def test_a_convolutions_weight_takes_what_its_format_allows():
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 6, 3)

    def converted(fmt, observer=None, **options):
        return ObservedLinear(copy.deepcopy(plain), weight=observer).convert(fmt, **options).weight

    weight = plain.weight
    # One in all, one a channel of the output, groups of the input's channels, a tensor scale above those.
    whole = converted("int8:*x*x*x*:float32", AbsMax())
    assert torch.equal(whole.dequantize(), lb.quantize(weight, "int8:*x*x*x*:float32").dequantize())
    for axis in (-1, 1):
        each = converted("int8:1x*x*x*:float32", PerChannelAbsMax(6), axis=axis)
        assert torch.equal(each.dequantize(), lb.quantize(weight, "int8:1x*x*x*:float32").dequantize())
    groups = converted("INT4_G32", axis=1)
    assert groups.scale.shape == (6, 3, 3, 2)
    block = weight[2, 32:, 1, 0]
    # Half a step, and what rounding the scale to bfloat16 takes from the largest.
    assert ((groups.dequantize()[2, 32:, 1, 0] - block).abs() <= block.abs().max() / 7.5 * (0.5 + 7.5 * 2.0**-8)).all()
    nvfp4 = converted("NVFP4", AbsMax(), axis=1)
    assert float(nvfp4.tensor_scale) == float(lb.quantize(weight.flatten(1), "NVFP4").tensor_scale)
    with pytest.raises(FormatError, match="last dimension 3 .* is not a multiple of block 32"):
        converted("INT4_G32")
    with pytest.raises(FormatError, match="scale is torch.float32 of shape"):
        converted("INT8_ROW", PerChannelAbsMax(6))
    with pytest.raises(LowbitError, match="axis 0 tells the rows of a weight apart"):
        converted("int8:*x*x*:float32", axis=0)


def test_an_embedding_is_rounded_by_what_was_observed():
    torch.manual_seed(0)
    table, ids = nn.Embedding(20, 32), torch.tensor([[3, 19], [0, 3]])
    found = ObservedLinear(table, weight=PerChannelAbsMax(20), output=PerChannelMinMax(32))
    plain = table.weight.detach().clone()
    y = found(ids)
    assert torch.equal(found.output.high, y.amax((0, 1)))
    assert found.convert("INT8_ROW") is table
    scale = plain.abs().amax(1, keepdim=True) / 127.5
    assert torch.equal(table(ids), ((plain / scale).round().clamp(-128, 127) * scale)[ids])


def test_what_a_layer_cannot_do_is_told_and_nothing_changes():
    conv, table = nn.Conv1d(32, 4, 3), nn.Embedding(8, 32)
    with pytest.raises(LowbitError, match="an embedding's input is indices"):
        ObservedLinear(table, input=MinMax())
    with pytest.raises(LowbitError, match="an embedding's input is indices"):
        ObservedLinear(table).convert("INT8_ROW", "dynamic:INT8_ROW")
    with pytest.raises(LowbitError, match="a ConvTranspose1d was given"):
        ObservedLinear(nn.ConvTranspose1d(4, 4, 3))
    for activation in ("dynamic:INT8_ROW", "dynamic:MXFP8", "local:NVFP4"):
        with pytest.raises(LowbitError, match="rounded under one scale a tensor"):
            ObservedLinear(conv, input=MinMax()).convert("INT8_ROW", activation)
        model = nn.Sequential(nn.Conv1d(32, 4, 16), nn.Linear(32, 4))
        rules = (Rule.of("*.weight", "INT8_ROW", activation=activation),)
        with pytest.raises(RecipeError, match=r"'0.weight' is the weight of a convolution, .*one scale a tensor"):
            observe(model, Recipe(rules))
    assert not any(isinstance(layer.weight, QuantizedTensor) for layer in (conv, table))


class Vision(nn.Module):
    """A table, a convolution whose three dims are no stack of experts, called by position and name, and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.patch, self.head = nn.Embedding(20, 32), nn.Conv1d(32, 16, 3), nn.Linear(16, 4)

    def forward(self, ids):
        x = self.embed(ids).mT
        return self.head(F.conv1d(weight=self.patch.weight, input=x, bias=self.patch.bias).mT)


def test_a_model_of_all_kinds_is_observed_by_hooks():
    torch.manual_seed(0)
    model = Vision()
    plain, ids = copy.deepcopy(model), torch.arange(20).reshape(2, 10)
    recipe = Recipe(
        (
            Rule.of("embed.weight", "INT8_ROW", activation="static:INT8_TENSOR"),
            Rule.of("*.weight", "INT8_TENSOR", activation="static:INT8_TENSOR_ASYM"),
        )
    )
    with observe(model, recipe) as observation:
        assert torch.equal(model(ids), plain(ids))
    assert set(observation.inputs) == {"patch/weight", "head/weight"}
    x = plain.embed.weight.detach()
    assert (float(observation.of("patch.weight").low), float(observation.of("patch.weight").high)) == (
        float(x.min()),
        float(x.max()),
    )
    observation.convert_(model)
    assert model.embed.weight.activation is None
    assert float(model.patch.weight.act_scale) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-6)
    error = (model(ids) - plain(ids)).norm() / plain(ids).norm()
    assert 0 < float(error.detach()) < 0.03


def test_only_those_who_ask_are_told_of_convolutions():
    model, seen = Vision(), {True: [], False: []}
    parameters = {"patch": model.patch.weight, "head": model.head.weight}
    for convolutions, products in seen.items():
        with Watch(parameters, products.append, convolutions=convolutions):
            model(torch.arange(20)[None])
    assert [product.name for product in seen[False]] == ["head"]
    patch, head = seen[True]
    assert (patch.name, patch.ends, head.name) == ("patch", None, "head")
    assert torch.equal(patch.x, model.embed.weight.T[None])


def test_algorithms_do_not_take_a_convolution_for_a_product():
    torch.manual_seed(0)
    model = Vision()
    with pytest.raises(LowbitError, match="no product with patch.weight was seen"):
        calibrate_(
            model, Recipe((Rule.of("patch.weight", "INT8_TENSOR"),)), [torch.arange(20)[None]], Method.of("gptq")
        )
    assert not isinstance(model.patch.weight, QuantizedTensor)
    calibrate_(model, Recipe((Rule.of("head.weight", "INT8_ROW"),)), [torch.arange(20)[None]], Method.of("gptq"))
    assert isinstance(model.head.weight, QuantizedTensor)
