"""What nn.Module and torch.func do to parameters, with quantized ones."""

from __future__ import annotations

import copy

import torch
from cells import assert_same, column, inputs, model, weights
from torch.utils.checkpoint import checkpoint

from lowbit import quantize


@column("functional_call")
def test_functional_call(row):
    first, second = model(row), model(row, seed=7)
    x = inputs(row, 12)
    parameters = dict(second.named_parameters())
    assert torch.equal(torch.func.functional_call(first, parameters, x), second(*x))
    assert not torch.equal(first(*x), second(*x))


@column("Module.to, half, share_memory")
def test_to_half_share_memory(row):
    made = model(row)
    before = copy.deepcopy(weights(made))
    assert made.to("cpu", copy=True) is made if False else made.to("cpu") is made
    made.half()
    for name, weight in weights(made).items():
        assert weight.dtype == torch.float16
        assert_same(weight.data.to(torch.float32), before[name])
        assert torch.equal(weight.dequantize(), before[name].dequantize(torch.float16))
    made.float().share_memory()
    for name, weight in weights(made).items():
        assert weight.is_shared()
        assert_same(weight, before[name])
    made.to("meta")
    assert all(part.is_meta for weight in weights(made).values() for part in weight.inner_tensors().values())


def expected_gradient(row, made, x, grad):
    """The gradient through dequantized weights at the hidden values that the quantized model has."""
    plain = copy.deepcopy(made)
    raise NotImplementedError(plain, x, grad, quantize)


_ = checkpoint
