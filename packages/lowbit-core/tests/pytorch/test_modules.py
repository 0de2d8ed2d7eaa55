"""What nn.Module, autograd and torch.func do with parameters, done with quantized ones."""

from __future__ import annotations

import copy

import torch
from cells import H, K, assert_same, column, inputs, model, weights
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

TOKENS = 12


@column("functional_call")
def test_functional_call(row):
    first, second = model(row), model(row, seed=7)
    x = inputs(row, TOKENS)
    assert torch.equal(torch.func.functional_call(first, dict(second.named_parameters()), x), second(*x))
    assert not torch.equal(first(*x), second(*x))


@column("Module.to, half, share_memory")
def test_to_half_share_memory(row):
    made = model(row)
    before = copy.deepcopy(weights(made))
    made.to(torch.float16)
    for name, weight in weights(made).items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight.dequantize(), before[name].dequantize(torch.float16))
    half = made(*(x.half() if x.is_floating_point() else x for x in inputs(row, TOKENS)))
    assert half.dtype == torch.float16
    made.float().half().float().share_memory()
    for name, weight in weights(made).items():
        assert weight.is_shared()
        assert_same(weight, before[name])
    made.to("meta")
    assert all(part.is_meta for weight in weights(made).values() for part in weight.inner_tensors().values())


class Adapted(nn.Module):
    """A frozen quantized model with a low-rank branch before it, which learns through it."""

    def __init__(self, frozen):
        super().__init__()
        torch.manual_seed(3)
        self.frozen, self.a, self.b = frozen, nn.Linear(K, 4, bias=False), nn.Linear(4, K, bias=False)

    def forward(self, x, *offs):
        return self.frozen(x + self.b(self.a(x)), *offs)


def learn(adapted, run, x, offs):
    """Output, and gradients of the tokens and the adapters; `run` calls the model."""
    x = x.clone().requires_grad_()
    out = run(adapted, x, *offs)
    out.square().sum().backward()
    return out.detach(), x.grad, adapted.a.weight.grad, adapted.b.weight.grad


def gradient(row, made, x, offs):
    """Of the squared sum to the tokens, by hand in float64: rounding an input counts as the identity."""
    expert = torch.searchsorted(offs[0], torch.arange(len(x)), right=True) if offs else None

    def back(grad, weight):
        values = weight.dequantize(torch.float64)
        return grad @ values if expert is None else torch.einsum("mn,mnk->mk", grad, values[expert])

    with torch.no_grad():
        hidden = (made.up(x) if row.rank == 2 else functional.grouped_mm(x, made.up.mT, offs=offs[0])).double()
        out = made(x, *offs).double()
    up, down = (made.up.weight, made.down.weight) if row.rank == 2 else (made.up, made.down)
    sigmoid = hidden.sigmoid()
    return back(back(2 * out, down) * (sigmoid + hidden * sigmoid * (1 - sigmoid)), up)


@column("gradient through frozen weights")
def test_gradient_through_frozen_weights(row):
    made, (x, *offs) = model(row), inputs(row, TOKENS)
    adapted = Adapted(made)
    nn.init.zeros_(adapted.b.weight)
    _, to_x, to_a, to_b = learn(adapted, lambda m, *args: m(*args), x, offs)
    wanted = gradient(row, made, x, offs)
    close = {"rtol": 0, "atol": 2 * (H + K) * 2.0**-24 * float(wanted.abs().max())}
    torch.testing.assert_close(to_x.double(), wanted, **close)
    torch.testing.assert_close(to_b.double(), wanted.T @ adapted.a(x).detach().double(), rtol=1e-4, atol=1e-4)
    assert not to_a.any()  # behind a zero
    assert all(weight.grad is None for weight in weights(made).values())


@column("activation checkpointing")
def test_activation_checkpointing(row):
    made, (x, *offs) = model(row), inputs(row, TOKENS)
    runs = (lambda m, *args: m(*args), lambda m, *args: checkpoint(m, *args, use_reentrant=False))
    for a, b in zip(*(learn(Adapted(made), run, x, offs) for run in runs), strict=True):
        assert torch.equal(a, b)


@column("inference_mode and not")
def test_inference_mode(row):
    made, x = model(row), inputs(row, TOKENS)
    wanted = made(*x)
    with torch.inference_mode():
        assert torch.equal(made(*x), wanted)
        inside = model(row)
        assert torch.equal(inside(*x), wanted)
    with torch.no_grad():
        assert torch.equal(inside(*x), wanted)
        assert torch.equal(made(*x), wanted)
