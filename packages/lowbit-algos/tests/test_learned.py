"""Learned rounding, and weights fitted to rounded inputs, against float64 and on data that was not learned from."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit as lb
from lowbit import LowbitError, QuantizedTensor, Recipe, RecipeError, Rule
from lowbit.activation import Activation
from lowbit.observer import Hessian, PerChannelMinMax
from lowbit_algos import Method, calibrate_
from lowbit_algos.gptq import Options
from lowbit_algos.inputs import Input, Lost, rounded_input
from lowbit_algos.learned import _Learning, _Round, used
from lowbit_algos.moments import Moments, fit, moments_of
from lowbit_algos.rounding import output_sqnr

K = 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(K), nn.Linear(K, 128), nn.Linear(128, K)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def made():
    torch.manual_seed(0)
    return Model().eval().requires_grad_(requires_grad=False)


def inputs(count, seed, alone=0.3):
    """Channels that tell of one another, but for what each has `alone`."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K // 4, K, generator=torch.Generator().manual_seed(9))
    return [
        torch.randn(64, K // 4, generator=generator) @ mix + alone * torch.randn(64, K, generator=generator)
        for _ in range(count)
    ]


def batches():
    """Few, for each takes a while to learn from."""
    return torch.cat(inputs(32, 1, alone=1)).split(256)


NEAREST = Method(rounding="nearest")
LEARNED = Method(rounding="nearest", learned=40)
FORMATS = [
    ("INT4_G32", None),
    ("uint4:1x32:bfloat16:zero=uint4", None),
    ("int2:1x32:bfloat16", None),
    ("MXFP4", None),
    ("MXFP4", "dynamic:MXFP4"),
    ("NVFP4", "local:NVFP4"),
    ("INT8_ROW", "static:INT8_TENSOR"),
]


@pytest.mark.parametrize(("fmt", "activation"), FORMATS)
def test_learning_lowers_the_error_on_other_data(fmt, activation):
    recipe = Recipe((Rule.of("*", fmt, activation=activation, modules="Linear"),))
    plain, other = made(), torch.cat(inputs(16, 2, alone=1))
    wanted = plain(other)

    def error(method):
        model = made()
        calibrate_(model, recipe, batches(), method)
        return model, float((model(other) - wanted).square().mean())

    (_, solved), (model, found) = error(NEAREST), error(LEARNED)
    assert found < 0.97 * solved
    if fmt in {"INT4_G32", "NVFP4"}:
        again, same = error(LEARNED)
        assert same == found
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert not isinstance(a, QuantizedTensor) or torch.equal(a.qdata, b.qdata)


@pytest.mark.parametrize("fmt", ["INT4_G32", "UINT4_G128", "int3:1x*:float32", "NVFP4", "MXFP4", "MXFP6_E2M3", "MXFP8"])
def test_it_starts_where_it_was(fmt):
    """Also where weights were not rounded to nearest."""
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    q = lb.quantize(w + 0.2 * w.abs().mean() * torch.randn(32, 128, generator=torch.Generator().manual_seed(4)), fmt)
    learning = _Learning(q, w)
    assert torch.equal(used(learning.quantized()), used(q))
    assert torch.equal(learning.value().detach(), used(q))


def test_gradients_of_scales_are_those_of_rounding_held_still():
    """Finite differences in float64, with codes less what they round held where they are."""
    generator = torch.Generator().manual_seed(0)
    q = lb.quantize(torch.randn(8, K, generator=generator), "INT4_G32")
    # Some beyond the range, where only the scale moves them.
    values = (1.5 * torch.randn(8, K, generator=generator)).requires_grad_()
    scale = q.scales.scale.float().clone().requires_grad_()
    grad = torch.randn(8, K, generator=generator)
    _Round.apply(values, scale, q).backward(grad)
    x = values.detach().double().view(8, -1, 32) / scale.detach().double()[..., None]
    inside = (x >= -8) & (x <= 7)
    held = torch.where(inside, x.round() - x, x.round().clamp(-8, 7))
    wanted = (grad.double().view(8, -1, 32) * held).sum(-1)
    assert bool((~inside).any())
    torch.testing.assert_close(scale.grad.double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(values.grad, grad)


@pytest.mark.parametrize(("fmt", "moves"), [("INT4_G32", True), ("NVFP4", False), ("MXFP4", False)])
def test_scales_of_few_bits_stay(fmt, moves):
    recipe = Recipe((Rule.of("*", fmt, modules="Linear"),))
    scales = []
    for method in (NEAREST, replace(LEARNED, learned=10)):
        model = made()
        calibrate_(model, recipe, batches(), method)
        scales.append(model.blocks[0].up.weight.scale.view(torch.uint8))
    assert torch.equal(*scales) != moves


def test_what_is_no_better_is_not_kept(monkeypatch):
    """Steps that go with the gradient make it worse."""
    monkeypatch.setattr(_Learning, "step", _backwards(_Learning.step))
    recipe, kept = Recipe((Rule.of("*", "INT4_G32", modules="Linear"),)), []
    for method in (NEAREST, replace(LEARNED, learned=10)):
        model = made()
        calibrate_(model, recipe, batches(), method)
        kept.append(model.blocks[0].up.weight.qdata)
    assert torch.equal(*kept)


def _backwards(step):
    def turned(self, rate):
        self._scale.requires_grad_(requires_grad=False)
        self._learns_scale = False
        step(self, -rate)

    return turned


def test_learning_in_one_pass_is_refused():
    with pytest.raises(RecipeError, match="in sequence"):
        Method.of("gptq+learned", sequential=False)


# Weights fitted to rounded inputs


def seen(rows, activation, ends=None):
    q = rounded_input(rows, activation)
    count = None if ends is None else len(ends)
    found = Input(["w"], Hessian(rows.shape[1], count), PerChannelMinMax(rows.shape[1]), None)
    found.lost = Lost(found.hessian.hessian)
    found.hessian.update(q, ends)
    found.lost.update(rows, q, ends)
    return found, q


A4 = Activation(lb.Format.parse("MXFP4"))


def test_the_fit_is_the_least_squares_solution():
    x, w = torch.cat(inputs(64, 1)), torch.randn(16, K, generator=torch.Generator().manual_seed(2))
    found, q = seen(x, A4)
    moments, _ = moments_of(found, None)
    best = torch.linalg.lstsq(q.double(), x.double() @ w.double().T).solution.T
    change = fit(w, moments, -1, 1e-9).double() - w
    # A little less than all of it, and nothing else.
    share = (change * (best - w)).sum() / (best - w).square().sum()
    assert 0.9 < share < 1
    assert float((change - share * (best - w)).norm() / change.norm()) < 1e-3


def test_it_helps_on_other_inputs_and_chance_is_not_believed():
    w, other = torch.randn(16, K, generator=torch.Generator().manual_seed(2)), torch.cat(inputs(16, 5))
    q = rounded_input(other, A4)

    def error(weight):
        return float((q @ weight.T - other @ w.T).square().mean())

    for count in (1, 2, 4, 64):
        moments, _ = moments_of(seen(torch.cat(inputs(count, 1))[: 64 * count + 1], A4)[0], None)
        fitted = fit(w, moments, -1, 0.01)
        assert error(fitted) <= error(w)
    assert error(fitted) < 0.8 * error(w)
    few, _ = moments_of(seen(inputs(1, 1)[0], A4)[0], None)
    assert torch.equal(fit(w, few, -1, 0.01), w)
    # Noise tells nothing of noise.
    noise = torch.randn(4096, K, generator=torch.Generator().manual_seed(6)).sign() * torch.rand(
        4096, K, generator=torch.Generator().manual_seed(7)
    )
    moments, _ = moments_of(seen(noise, Activation(lb.Format.parse("INT8_ROW")))[0], None)
    assert float((fit(w, moments, -1, 0.01) - w).norm() / w.norm()) < 2e-3


@pytest.mark.parametrize(("below", "fails"), [(0.03, False), (2.0, True)])
def test_a_hessian_that_rounding_made_indefinite_is_damped_more(below, fails):
    x, w = torch.cat(inputs(64, 1)), torch.randn(16, K, generator=torch.Generator().manual_seed(2))
    moments, _ = moments_of(seen(x, A4)[0], None)
    mean = moments.hessian.diagonal().mean()
    # Its least eigenvalue is brought to where asked for.
    least = torch.linalg.eigvalsh(moments.hessian)[0]
    hessian = moments.hessian - (least + below * mean) * torch.eye(K)
    if fails:
        with pytest.raises(LowbitError, match="not positive definite, not even with 1 of"):
            fit(w, replace(moments, hessian=hessian), -1, 0.01)
        return
    assert int(torch.linalg.cholesky_ex(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K)).info)
    assert bool(fit(w, replace(moments, hessian=hessian), -1, 0.01).isfinite().all())


def test_experts_are_fitted_one_by_one():
    rows, w = torch.cat(inputs(12, 1)), torch.randn(3, 16, K, generator=torch.Generator().manual_seed(2))
    ends = torch.tensor([200, 500, 768])
    stacked, _ = moments_of(seen(rows, A4, ends)[0], 0)
    fitted = fit(w.mT.contiguous(), stacked, 1, 0.01)
    for e, (a, b) in enumerate([(0, 200), (200, 500), (500, 768)]):
        alone, _ = moments_of(seen(rows[a:b], A4)[0], None)
        torch.testing.assert_close(fitted[e].mT, fit(w[e], alone, -1, 0.01), rtol=1e-4, atol=1e-5)


def test_starved_experts_are_given_of_the_mean_of_all_that_is_known():
    rows, ends = torch.cat(inputs(12, 1)), torch.tensor([10, 10, 768])
    found, _ = seen(rows, A4, ends)
    moments, starved = moments_of(found, 100)
    assert starved == (0, 1)
    assert moments.tokens == (100, 100, 758)
    for given, own in (
        (moments.hessian, found.hessian.hessian),
        (moments.cross, found.lost.cross),
        (moments.squares, found.lost.squares),
    ):
        mean = own.sum(0) / 768
        torch.testing.assert_close(given, torch.stack([own[0] + 90 * mean, own[1] + 100 * mean, own[2]]))


def test_output_sqnr_is_that_of_the_outputs():
    x, w = torch.cat(inputs(64, 1)), torch.randn(16, K, generator=torch.Generator().manual_seed(2))
    found, q = seen(x, A4)
    moments, _ = moments_of(found, None)
    for weight in (w, fit(w, moments, -1, 0.01)):
        rounded = lb.quantize(weight, "MXFP4")
        outputs, noise = x @ w.T, x @ w.T - q @ rounded.dequantize().T
        direct = 10 * torch.log10(outputs.square().sum() / noise.square().sum())
        assert output_sqnr(w, rounded, moments, -1) == pytest.approx(float(direct), abs=0.3)
    plain = Moments(x.T @ x, (len(x),))
    noise = x @ w.T - x @ rounded.dequantize().T
    direct = 10 * torch.log10((x @ w.T).square().sum() / noise.square().sum())
    assert output_sqnr(w, rounded, plain, -1) == pytest.approx(float(direct), abs=1e-3)


def test_a_model_is_better_for_it():
    recipe = Recipe((Rule.of("*", "MXFP4", activation="dynamic:MXFP4", modules="Linear"),))
    plain, other = made(), torch.cat(inputs(8, 2))
    errors = []
    for refit in (False, True):
        model = copy.deepcopy(plain)
        calibrate_(model, recipe, inputs(16, 1), Method(refit=refit, options=Options()))
        errors.append(float((model(other) - plain(other)).square().mean()))
    assert errors[1] < 0.9 * errors[0]
