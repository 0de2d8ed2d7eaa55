"""Trained models as quantized ones: the same codes, the same scales, and the same results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor, RecipeError
from lowbit_moe import RECIPES, convert_, linear, to_serving

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Experts(nn.Module):
    """Experts as transformers has them, transposed or not, whose products are of plain tensors."""

    def __init__(self, *, is_transposed):
        super().__init__()
        torch.manual_seed(0)
        gate_up, down = torch.randn(4, 128, 64) / 8, torch.randn(4, 64, 64) / 8
        self.is_transposed, self.act_fn = is_transposed, nn.functional.silu
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(part.mT.contiguous() if is_transposed else part) for part in (gate_up, down)
        )

    def forward(self, x, chosen, weights):
        out = torch.zeros_like(x)
        for e in range(4):
            gate_up, down = (
                part[e].mT if self.is_transposed else part[e] for part in (self.gate_up_proj, self.down_proj)
            )
            gate, up = nn.functional.linear(x, gate_up).chunk(2, -1)
            each = nn.functional.linear(self.act_fn(gate) * up, down)
            out += each * (weights * (chosen == e)).sum(1, keepdim=True)
        return out


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128, bias=False), nn.Linear(128, 10))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "BF16"])
def test_what_is_served_is_what_was_trained_bit_for_bit(recipe):
    """In float32 both multiply decoded values in the same order; NVFP4 keeps the first and the last layer."""
    m, x = model(), torch.randn(33, 128)
    x[3] *= 100
    convert_(m, recipe)
    m(x).square().mean().backward()
    with torch.no_grad():
        for p in m.parameters():
            p.sub_(0.1 * p.grad)
        wanted = m(x)
    named = [name for name, _ in m.named_parameters()]
    assert to_serving(m) is m
    with torch.no_grad():
        assert torch.equal(m(x), wanted)
    assert [name for name, _ in m.named_parameters()] == named
    assert [type(part) for part in m] == [nn.Linear, nn.GELU, nn.Linear, nn.Linear]
    kept = recipe == "NVFP4"
    assert [isinstance(part.weight, QuantizedTensor) for part in m[::2]] == [not kept, True]
    assert isinstance(m[3].weight, QuantizedTensor) != kept


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["FP8_TENSOR", "FP8_ROW", "FP8_BLOCK"])
def test_on_a_gpu_both_are_products_of_the_same_codes_by_the_same_kernel(recipe):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 256)).to("cuda", torch.bfloat16)
    x = torch.randn(700, 512, device="cuda", dtype=torch.bfloat16)
    convert_(m, recipe)
    with torch.no_grad():
        wanted = m(x)
        lowbit.bind(to_serving(m))
        # By rows some kernels sum in another order for few tokens: a bfloat16 may turn.
        torch.testing.assert_close(m(x), wanted, rtol=2**-7, atol=2**-7)
        assert float((m(x) != wanted).float().mean()) < 0.01


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_have_the_codes_that_training_multiplied_by(is_transposed):
    m = Experts(is_transposed=is_transposed)
    x, weights = torch.randn(20, 64), torch.rand(20, 2)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(20)])
    convert_(m, "MXFP8")
    with torch.no_grad():
        wanted = m(x, chosen, weights)
    plain = copy.deepcopy(m)
    to_serving(m)
    for name in ("gate_up_proj", "down_proj"):
        q, weight = getattr(m, name), getattr(plain, name)
        right = lowbit.quantize(weight.detach(), "MXFP8", axis=-2 if is_transposed else -1, mode="rceil")
        assert all(map(torch.equal, q.inner_tensors().values(), right.inner_tensors().values()))
        assert str(q.activation) == f"dynamic:{lowbit.MXFP8}@rceil"
        # A loop over experts, which the class's own forward is, reads them one by one.
        with torch.no_grad():
            setattr(plain, name, nn.Parameter(q.dequantize()))
    with torch.no_grad():
        values = Experts.forward(plain, x, chosen, weights)
    # Inputs are rounded too in training: 28 dB each, and three of them follow one another.
    assert 10 * torch.log10(values.square().sum() / (values - wanted).square().sum()) > 24


def test_what_others_read_and_what_is_shared():
    m = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40, bias=False))
    m[2].weight = m[0].weight
    convert_(m, "MXFP8")
    ids = torch.arange(12)
    with torch.no_grad():
        wanted = m(ids)
        to_serving(m)
        assert torch.equal(m(ids), wanted)
    assert not isinstance(m[0].weight, QuantizedTensor)
    assert isinstance(m[2].weight, QuantizedTensor)
    # Engines choose scales of inputs by "even".
    other = to_serving(nn.Sequential(nn.Linear(64, 64)), "MXFP8", mode="even")
    assert str(other[0].weight.activation) == f"dynamic:{lowbit.MXFP8}"
    x = torch.randn(9, 64)
    x[:, 0] = 450.0
    layer = nn.Linear(64, 64)
    assert not torch.equal(
        to_serving(nn.Sequential(copy.deepcopy(layer)), "MXFP8", mode="floor")(x), linear(x, layer.weight, layer.bias)
    )


def test_what_cannot_be_served_is_refused_and_stays():
    m = model()
    with pytest.raises(RecipeError, match="no module of the model rounds its products"):
        to_serving(m)
    convert_(m, "BF16")
    with pytest.raises(RecipeError, match="no module of the model rounds its products"):
        to_serving(m)
    assert type(m[0]) is not nn.Linear
    odd = nn.Sequential(nn.Linear(64, 100), nn.Linear(100, 64))
    convert_(odd, "MXFP8")
    with pytest.raises(RecipeError, match="1 can be trained so, but not stored: last dimension 100"):
        to_serving(odd)
    assert not any(isinstance(p, QuantizedTensor) for p in odd.parameters())
