"""Factors on channels: where they may go, which are chosen, and that they change nothing but what rounding costs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit as lb
from lowbit import Recipe, Rule
from lowbit_algos import Method, calibrate_
from lowbit_algos.folds import find_folds
from lowbit_algos.inputs import Input
from lowbit_algos.smooth import _factors
from lowbit_algos.walk import Walk

K, HEAD = 64, 16


class Attention(nn.Module):
    """Four query heads over two heads of keys and values."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, K), nn.Linear(K, K // 2), nn.Linear(K, K // 2)
        self.out = nn.Linear(K, K)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(K), nn.RMSNorm(K), nn.LayerNorm(K)
        self.attention = Attention()
        self.gate_up, self.down = nn.Linear(K, 192, bias=False), nn.Linear(96, K)
        self.plain1, self.plain2 = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        # This norm's output goes on as it is too, and nothing passes through tanh.
        y = self.norm3(x)
        return y + self.plain2(torch.tanh(self.plain1(y)))


class Model(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.embed = nn.Embedding(50, K)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model():
    """Norms with a few channels much larger than others, made up for in the weights behind them."""
    torch.manual_seed(0)
    model = Model().eval()
    for block in model.blocks:
        for p in block.parameters():
            if p.dim() == 1:
                p.data += torch.randn(p.shape) * 0.1
        block.norm1.weight.data[:3] *= 50
        block.norm2.weight.data[5:8] *= 50
        for weight in (block.attention.q, block.attention.k, block.attention.v):
            weight.weight.data[:, :3] /= 50
        block.gate_up.weight.data[:, 5:8] /= 50
    return model


@pytest.fixture
def batches():
    return list(torch.randint(50, (6, 8, 16), generator=torch.Generator().manual_seed(1)))


def linears(block):
    return {name: -1 for name, p in block.named_parameters() if p.dim() == 2}


def test_folds_are_found_from_what_a_block_computes(model):
    block, x = model.blocks[0], torch.randn(2, 16, K)
    before = copy.deepcopy(block.state_dict())
    with torch.no_grad():
        found = {f.producer.parameters[0][0]: f for f in find_folds(block, linears(block), lambda: block(x))}
    assert {name: set(fold.consumers) for name, fold in found.items()} == {
        "norm1.weight": {"attention.q.weight", "attention.k.weight", "attention.v.weight"},
        "norm2.weight": {"gate_up.weight"},
        "attention.v.weight": {"attention.out.weight"},
        "gate_up.weight": {"down.weight"},
    }
    heads = torch.arange(K // 2).view(2, HEAD).repeat_interleave(2, 0).flatten()
    assert torch.equal(found["attention.v.weight"].consumers["attention.out.weight"], heads)
    assert torch.equal(found["gate_up.weight"].consumers["down.weight"], torch.arange(96))
    assert (found["gate_up.weight"].producer.outputs, found["gate_up.weight"].producer.channels) == (192, 96)
    assert found["norm1.weight"].producer.parameters == (("norm1.weight", 0), ("norm1.bias", 0))
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), before.values(), strict=True))


def rise(model, plain, batches):
    """Relative error of the outputs."""
    with torch.no_grad():
        a, b = (torch.cat([m(batch) for batch in batches]) for m in (model, plain))
    return float((a - b).norm() / b.norm())


W8A8 = Recipe((Rule.of("blocks.*", "INT8_ROW", activation="dynamic:INT8_ROW", modules="Linear"),))
W8A8_STATIC = Recipe((Rule.of("blocks.*", "INT8_ROW", activation="static:INT8_TENSOR", modules="Linear"),))
W4 = Recipe((Rule.of("blocks.*", "INT4_G32", modules="Linear"),))


@pytest.mark.parametrize("recipe", [W8A8, W8A8_STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("pre_scale", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_smoothquant_mends_what_outliers_cost(model, batches, recipe, pre_scale, alpha):
    plain, nearest = copy.deepcopy(model), copy.deepcopy(model)
    calibrate_(nearest, recipe, batches[:4], Method(rounding="nearest"))
    method = Method(rounding="nearest", smoothing="smoothquant", pre_scale=pre_scale, alpha=alpha)
    calibrate_(model, recipe, batches[:4], method)
    assert rise(model, plain, batches[4:]) < 0.5 * rise(nearest, plain, batches[4:])
    held = [p.pre_scale is not None for p in model.parameters() if isinstance(p, lb.QuantizedTensor)]
    assert pre_scale or not any(held)
    # Of factors that are searched, only those that gain clearly stay.
    assert alpha is None or any(held) == pre_scale


@pytest.mark.parametrize("rounding", ["nearest", "clipped", "gptq"])
def test_awq_is_better_than_without_on_other_data(model, batches, rounding):
    plain, without = copy.deepcopy(model), copy.deepcopy(model)
    calibrate_(without, W4, batches[:4], Method(rounding=rounding))
    calibrate_(model, W4, batches[:4], Method(rounding=rounding, smoothing="awq"))
    assert rise(model, plain, batches[4:]) < 0.9 * rise(without, plain, batches[4:])


def test_clipping_alone_is_better_than_nearest(model, batches):
    plain, nearest = copy.deepcopy(model), copy.deepcopy(model)
    calibrate_(nearest, W4, batches[:4], Method(rounding="nearest"))
    calibrate_(model, W4, batches[:4], Method(rounding="clipped"))
    assert rise(model, plain, batches[4:]) < rise(nearest, plain, batches[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_change_nothing_before_rounding(model, batches, dtype):
    model.to(dtype)
    plain = copy.deepcopy(model)
    # Sixteen bits and more: what is left is what smoothing did.
    recipe = Recipe((Rule.of("blocks.*", "e4m3fn:1x1:float32", modules="Linear"),))
    calibrate_(plain, recipe, batches[:4], Method(rounding="nearest"))
    changed = copy.deepcopy(plain)
    calibrate_(
        model, recipe, batches[:4], Method(rounding="nearest", smoothing="smoothquant", alpha=0.5, pre_scale=False)
    )
    assert rise(model, changed, batches[4:]) < (1e-4 if dtype == torch.float32 else 3e-2)
    assert not torch.equal(model.blocks[0].norm1.weight, changed.blocks[0].norm1.weight)


def test_factors_are_smoothquants_equation():
    inputs, weights = torch.tensor([4.0, 0.0, 1e30, 9.0]), torch.tensor([0.25, 1.0, 1e-30, 0.0])
    found = _factors(inputs, weights, 0.5, "smoothquant")
    # A channel without inputs or without weights stays; no factor leaves what a dtype can hold.
    assert found.tolist() == [4.0, 1.0, pytest.approx(1e5), 1.0]
    centred = _factors(torch.tensor([1.0, 4.0]), torch.ones(2), 1.0, "awq")
    assert centred.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("pre_scale", [True, False])
@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        (W4, Method(smoothing="awq")),
        (W8A8_STATIC, Method(smoothing="smoothquant", static="minmax", activation_aware=False, alpha=0.5)),
    ],
    ids=["awq", "static"],
)
def test_one_look_at_inputs_tells_what_a_second_would(model, batches, recipe, method, pre_scale, monkeypatch):
    method = replace(method, pre_scale=pre_scale)
    again, rounded, looks = copy.deepcopy(model), [], []
    solve, observe = Walk.round, Walk.observe

    def seen(self, prefix, block, originals, targets, inputs, pre_scales):
        rounded.append({name: copy.deepcopy(found) for name, found in inputs.items()})
        return solve(self, prefix, block, originals, targets, inputs, pre_scales)

    def looked(*args, **kwargs):
        looks.append(1)
        return observe(*args, **kwargs)

    monkeypatch.setattr(Walk, "round", seen)
    monkeypatch.setattr(Walk, "observe", looked)
    calibrate_(model, recipe, batches[:4], method)
    monkeypatch.setattr(Input, "divide", lambda *_: False)
    calibrate_(again, recipe, batches[:4], method)
    count = len(model.blocks)
    assert len(looks) == count + 2 * count
    # Later blocks may be fed something else, where rounding turned.
    for name, one in rounded[0].items():
        two = rounded[count][name]
        most = float(two.hessian.hessian.amax())
        torch.testing.assert_close(one.hessian.hessian, two.hessian.hessian, rtol=0, atol=1e-5 * most)
        torch.testing.assert_close(one.sample, two.sample, rtol=1e-4, atol=1e-5)
        for a, b in zip(one.channels.buffers(), two.channels.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(*(x.range.buffers() if x.range else () for x in (one, two)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_method_is_never_written_to(model, batches):
    method = Method(smoothing="smoothquant")
    before = copy.deepcopy(method)
    calibrate_(model, W8A8, batches[:2], method)
    assert method == before


def test_a_failed_run_takes_its_factors_back(model, batches):
    before = copy.deepcopy(model.state_dict())
    model.blocks[1].norm2.weight.data[0] = before["blocks.1.norm2.weight"][0] = torch.inf
    with pytest.raises(lb.LowbitError):
        calibrate_(model, W8A8, batches[:2], Method(smoothing="smoothquant"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
