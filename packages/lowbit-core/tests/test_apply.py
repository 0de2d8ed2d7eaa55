from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from lowbit.activation import Activation
from lowbit.apply import dequantize_, quantize_
from lowbit.bind import bind
from lowbit.errors import FormatError, RecipeError
from lowbit.format import INT8_ROW, MXFP4
from lowbit.packed import PackedTensor
from lowbit.plan import plan
from lowbit.recipe import Recipe, Rule
from lowbit.tensor import QuantizedTensor, quantize


def _int8_row(block):
    """One float32 scale `amax / 127.5` a row; every step rounded to float32."""
    scale = np.float32(np.abs(block).max()) / np.float32(127.5)
    return np.clip(np.rint(block / scale), -128, 127) * scale


def _int4(block):
    """One bfloat16 scale `amax / 7.5` a group."""
    scale = (np.float32(np.abs(block).max()) / np.float32(7.5)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.clip(np.rint(block / scale), -8, 7) * scale


def _mxfp4(block):
    """A power of two a block: the exponent of amax rounded to e2m1's two significant bits, less that of 6."""
    mantissa, exponent = math.frexp(float(np.abs(block).max()))
    if round(mantissa * 4) == 4:
        exponent += 1
    scale = np.float32(2.0 ** (exponent - 1 - 2))
    scaled = np.clip(block / scale, -6, 6)
    return scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale


FORMATS = {"INT8_ROW": (_int8_row, None), "INT4_G32": (_int4, 32), "MXFP4": (_mxfp4, 32)}


def rounded(parameter, fmt, k_axis=-1):
    """What quantizing along `k_axis` must leave of each value, worked out block by block in numpy."""
    block, group = FORMATS[fmt]
    x = np.moveaxis(parameter.detach().to(torch.float32).numpy(), k_axis, -1)
    group = group or x.shape[-1]
    blocks = x.reshape(-1, group)
    values = np.stack([block(one) for one in blocks]).reshape(x.shape)
    return torch.from_numpy(np.moveaxis(values, -1, k_axis).copy()).to(parameter.dtype)


def noise(*shape, seed=0):
    # Rows and columns of very different size, so that blocks along the wrong axis give other values.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for dim in range(-2, 0):
        x = x * torch.linspace(0.1, 3, shape[dim]).reshape([-1 if d == dim else 1 for d in range(-len(shape), 0)])
    return nn.Parameter(x)


class Experts(nn.Module):
    """Fused experts as (E, N, K) and as (E, K, N), and a table under a name of its own beside a `weight`."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = noise(3, 32, 64, seed=1)
        self.down_proj = noise(3, 64, 32, seed=2)
        self.weight = noise(32, 64, seed=3)
        self.codebook = noise(64, 96, seed=4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(64, 32), "experts": Experts()}) for _ in range(2))
        self.lstm = nn.LSTM(64, 32)
        self.convs = nn.ParameterList([noise(4, 32, 3, 3, seed=5), noise(32, 64, seed=6)])
        self.lm_head = nn.Linear(64, 96, bias=False)
        self.lm_head.weight = self.embed.weight


def parameters(model):
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("name", "k_axis"),
    [
        ("layers.0.q.weight", -1),
        ("layers.1.experts.gate_up_proj", -1),
        ("layers.1.experts.gate_up_proj", -2),
        ("layers.0.experts.down_proj", -1),
        ("layers.0.experts.down_proj", 1),
        ("layers.0.experts.codebook", -1),
        ("layers.0.experts.codebook", 0),
        ("lstm.weight_ih_l0", -1),
        ("convs.0", 1),
        ("convs.1", -1),
    ],
)
def test_the_named_parameter_and_no_other_takes_the_rounded_values(model, name, k_axis, fmt):
    before = parameters(model)
    values = {other: parameter.detach().clone() for other, parameter in before.items()}
    quantize_(model, Recipe((Rule.of(name, fmt, k_axis=k_axis),)))
    after = parameters(model)
    assert isinstance(after[name], QuantizedTensor)
    assert isinstance(after[name], nn.Parameter)
    assert not after[name].requires_grad
    assert torch.equal(after[name].dequantize(), rounded(before[name], fmt, k_axis))
    for other, parameter in after.items():
        if other != name:
            assert parameter is before[other]
            assert parameter.requires_grad
            assert torch.equal(parameter, values[other])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_round_from_the_dtype_the_model_has(model, dtype):
    model.to(dtype)
    weight = model.layers[0].q.weight
    quantize_(model, Recipe((Rule.of("layers.0.q.weight", "INT8_ROW"),)))
    result = model.layers[0].q.weight
    assert result.dtype == dtype
    assert torch.equal(result.dequantize(), rounded(weight, "INT8_ROW"))


def test_a_keeping_rule_before_a_catch_all_keeps(model):
    kept, weight = (layer.q.weight for layer in model.layers)
    rules = Rule.of("layers.0.q.weight", None), Rule.of("re:layers.*q.weight", "INT8_ROW")
    quantize_(model, Recipe(rules))
    assert model.layers[0].q.weight is kept
    assert torch.equal(model.layers[1].q.weight.dequantize(), rounded(weight, "INT8_ROW"))


def test_of_two_regular_expressions_the_first_decides(model):
    first, second = (layer.q.weight for layer in model.layers)
    rules = Rule.of(r"re:layers\.0\..*weight", "INT4_G32", modules="Linear"), Rule.of("re:.*q.*weight", "MXFP4")
    quantize_(model, Recipe(rules))
    assert torch.equal(model.layers[0].q.weight.dequantize(), rounded(first, "INT4_G32"))
    assert torch.equal(model.layers[1].q.weight.dequantize(), rounded(second, "MXFP4"))


def test_a_tied_tensor_is_quantized_once_and_stays_tied(model, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return quantize(*args, **kwargs)

    monkeypatch.setattr("lowbit.apply.quantize", counted)
    weight = model.embed.weight
    activation = Activation(INT8_ROW)
    result = quantize_(model, Recipe((Rule("lm_head.weight", INT8_ROW, activation),)))
    assert len(calls) == 1
    assert model.embed.weight is model.lm_head.weight
    assert model.embed.weight.activation == activation
    assert torch.equal(model.embed.weight.dequantize(), rounded(weight, "INT8_ROW"))
    assert result.bytes_before - result.bytes_after == weight.nbytes - model.embed.weight.stored_bytes


def test_an_embedding_of_its_own_carries_no_activation():
    table = nn.Sequential(nn.Embedding(8, 32))
    quantize_(table, Recipe((Rule("0.weight", INT8_ROW, Activation(INT8_ROW)),)))
    assert table[0].weight.activation is None


def test_a_module_reached_by_two_paths_is_quantized_once():
    inner = nn.Linear(32, 32, bias=False)
    model = nn.ModuleDict({"a": inner, "b": nn.ModuleDict({"c": inner})})
    quantize_(model, Recipe((Rule.of("*", "MXFP4"),)))
    assert model["a"] is model["b"]["c"] is inner
    assert isinstance(inner.weight, QuantizedTensor)


def test_a_quantized_model_computes_with_the_rounded_weights(model):
    weight, table = model.layers[0].q.weight, model.embed.weight
    quantize_(model, Recipe((Rule.of("layers.0.q.weight", "MXFP4"), Rule.of("embed.weight", "INT4_G32"))))
    ids = torch.arange(0, 96, 5)
    looked_up = rounded(table, "INT4_G32")[ids]
    assert torch.equal(model.embed(ids), looked_up)
    expected = looked_up.double() @ rounded(weight, "MXFP4").double().T + model.layers[0].q.bias.double()
    # 64 products in float32 err by less than 64 ulp of the sum of their magnitudes.
    bound = 64 * 2.0**-24 * (looked_up.abs().double() @ rounded(weight, "MXFP4").abs().double().T + 1)
    assert ((model.layers[0].q(looked_up).double() - expected).abs() <= bound).all()


def test_the_plan_returned_is_the_one_foretold_and_is_kept_to(model):
    recipe = Recipe((Rule.of("*experts.*_proj", "NVFP4"), Rule.of("*q.weight", "UINT4_G128")))
    with pytest.raises(RecipeError, match="k=64"):
        quantize_(model, recipe)
    recipe = Recipe((Rule.of("*experts.*_proj", "NVFP4"), Rule.of("*q.weight", "uint4:1x32:bfloat16:zero=uint4")))
    foretold = plan(model, recipe)
    assert quantize_(model, recipe) == foretold
    sizes = [p.stored_bytes if isinstance(p, QuantizedTensor) else p.nbytes for p in model.parameters()]
    assert sum(sizes) == foretold.bytes_after


def test_the_scale_mode_reaches_the_arithmetic():
    # amax 7 rounds to 8 = 2 * 4 at e2m1's precision: `even` takes scale 2 and gives 8, `floor` saturates at 6.
    for mode, value in (("even", 8.0), ("floor", 6.0)):
        layer = nn.Linear(32, 1, bias=False)
        nn.init.constant_(layer.weight, 7.0)
        quantize_(layer, Recipe((Rule.of("weight", "MXFP4"),)), mode=mode)
        assert torch.equal(layer.weight.dequantize(), torch.full((1, 32), value))


def _unchanged(model, before):
    after = parameters(model)
    return after.keys() == before.keys() and all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_before_anything_changes(model, bad):
    with torch.no_grad():
        model.layers[1].q.weight[3, 5:7] = bad
    before = parameters(model)
    with pytest.raises(
        FormatError, match=r"'layers\.1\.q\.weight' holds 2 values that are NaN or beyond float32; repair"
    ):
        quantize_(model, Recipe((Rule.of("*q.weight", "INT8_ROW"),)))
    assert _unchanged(model, before)


def test_a_float64_beyond_float32_is_not_finite():
    layer = nn.Linear(32, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[0, 0] = 1e300
    with pytest.raises(FormatError, match="'weight' holds 1 values"):
        quantize_(layer, Recipe((Rule.of("weight", "INT8_ROW"),)))


def test_a_weight_that_is_not_finite_may_be_kept(model):
    with torch.no_grad():
        model.layers[1].q.weight[3, 5] = math.nan
    quantize_(model, Recipe((Rule.of("layers.1.q.weight", None), Rule.of("*q.weight", "INT8_ROW"))))
    assert isinstance(model.layers[0].q.weight, QuantizedTensor)


def test_a_failure_while_quantizing_leaves_the_model_as_it_was(model, monkeypatch):
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return quantize(*args, **kwargs)

    monkeypatch.setattr("lowbit.apply.quantize", failing)
    before = parameters(model)
    with pytest.raises(MemoryError):
        quantize_(model, Recipe((Rule.of("*q.weight", "INT8_ROW"),)))
    assert _unchanged(model, before)


class Stubborn(nn.Linear):
    """A layer that will not take a quantized weight."""

    def __setattr__(self, name, value):
        if isinstance(value, QuantizedTensor):
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def test_a_failure_while_swapping_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(32, 32), nn.Embedding(4, 32), Stubborn(32, 32), nn.Linear(32, 32))
    model[3].weight = model[0].weight
    before = parameters(model)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, Recipe((Rule.of("*.weight", "INT8_ROW"),)))
    assert _unchanged(model, before)


def test_a_recipe_that_does_not_fit_changes_nothing(model):
    before = parameters(model)
    with pytest.raises(RecipeError, match="matches no parameter"):
        quantize_(model, Recipe((Rule.of("*q.weight", "INT8_ROW"), Rule.of("nothing", None))))
    with pytest.raises(RecipeError, match="coverage is"):
        quantize_(model, Recipe((Rule.of("*q.weight", "INT8_ROW"),)), min_coverage=0.9)
    with pytest.raises(FormatError, match="scale mode 'up' is unknown"):
        quantize_(model, Recipe((Rule.of("*q.weight", "MXFP4"),)), mode="up")
    assert _unchanged(model, before)


def test_meta_parameters_are_planned_but_not_quantized():
    with torch.device("meta"):
        model = Model()
    recipe = Recipe((Rule.of("*q.weight", "INT8_ROW"),))
    assert plan(model, recipe).bits_per_weight == 8 + 32 / 64
    with pytest.raises(RecipeError, match=r"'layers\.0\.q\.weight' is on the meta device, where it has no values"):
        quantize_(model, recipe)


@pytest.mark.parametrize("spec", ["static:int8:*x*:float32", "local:NVFP4"])
def test_activations_that_need_calibration_are_refused(model, spec):
    before = parameters(model)
    with pytest.raises(RecipeError, match=r"is to have (static|local) activations .* calibration data; use dynamic"):
        quantize_(model, Recipe((Rule.of("*q.weight", "INT8_ROW", activation=spec),)))
    assert _unchanged(model, before)


def test_dequantize_puts_plain_parameters_back(model):
    model.to(torch.bfloat16)
    before = parameters(model)
    rules = (
        Rule.of("*down_proj", "MXFP4", k_axis=1),
        Rule.of("embed.weight", "INT8_ROW"),
        Rule.of("*q.weight", "INT4_G32"),
    )
    quantize_(model, Recipe(rules))
    low = {name: p for name, p in parameters(model).items() if isinstance(p, QuantizedTensor)}
    dequantize_(model)
    after = parameters(model)
    assert low.keys() == {n for n in before if n.endswith(("down_proj", "q.weight", "embed.weight", "lm_head.weight"))}
    for name, parameter in after.items():
        assert type(parameter) is nn.Parameter
        if name in low:
            assert parameter.dtype == torch.bfloat16
            assert parameter.is_contiguous()
            assert torch.equal(parameter, low[name].dequantize())
        else:
            assert parameter is before[name]
    assert torch.equal(after["layers.0.experts.down_proj"], rounded(before["layers.0.experts.down_proj"], "MXFP4", 1))
    assert model.embed.weight is model.lm_head.weight


@pytest.mark.parametrize("axis", [-1, 0])
def test_dequantize_multiplies_a_pre_scale_into_the_weight(axis):
    x = noise(64, 32, seed=7).detach()
    plain = quantize(x, MXFP4, axis=axis)
    factors = torch.linspace(0.25, 4, 32 if axis == -1 else 64)
    smoothed = QuantizedTensor.from_parts(
        plain.qdata, plain.scales, MXFP4, k=len(factors), dtype=plain.dtype, axis=axis, pre_scale=factors
    )
    owner = nn.ParameterDict({"w": nn.Parameter(smoothed, requires_grad=False)})
    dequantize_(owner)
    shape = (1, 32) if axis == -1 else (64, 1)
    expected = plain.dequantize().double() * factors.double().reshape(shape)
    assert torch.equal(owner["w"].detach(), expected.to(torch.float32))


def test_dequantize_reaches_through_binding():
    layer = nn.Linear(32, 4, bias=False)
    weight = layer.weight
    spec = "dynamic:INT8_ROW_ASYM"
    quantize_(layer, Recipe((Rule.of("weight", "INT8_ROW_ASYM", activation=spec),)))
    values = layer.weight.dequantize()
    bind(layer)
    assert isinstance(layer.weight, PackedTensor)
    dequantize_(layer)
    assert torch.equal(layer.weight, values)
    # Half a step of a range of 255 steps, and rounding in float32.
    step = (weight.max(1).values.clamp_min(0) - weight.min(1).values.clamp_max(0)) / 255
    assert ((layer.weight - weight).abs() <= step[:, None] * 0.5001).all()
