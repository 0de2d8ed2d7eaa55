"""The reference on an NVIDIA GPU gives the CPU's bits; run by `nox -s cuda`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowbit import FORMATS, bind, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch finds none on this machine"),
]


@pytest.fixture(scope="module")
def values() -> Tensor:
    """Normal values with outliers, zeros, subnormals, an infinity and a NaN."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[3] *= 100
    x[9] = 0
    x[10] *= 1e-38
    x[250, 7], x[251, 1] = torch.inf, torch.nan
    return x


@pytest.mark.parametrize("options", [{"mode": mode} for mode in ("floor", "ceil", "even", "rceil")] + [{"rounding": "stochastic", "seed": 3}])  # fmt: skip
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_gives_the_bits_of_the_cpu(name, options, values):
    here, there = quantize(values, name, **options), quantize(values.cuda(), name, **options).cpu()
    # What a NaN carries besides being one is the device's own.
    for part, other in zip(here.inner_tensors().values(), there.inner_tensors().values(), strict=True):
        finite = ~torch.isnan(part.to(torch.float32))
        assert torch.equal(finite, ~torch.isnan(other.to(torch.float32)))
        assert torch.equal(part.view(torch.uint8).view(*part.shape, -1)[finite], other.view(torch.uint8).view(*part.shape, -1)[finite])  # fmt: skip
    expected, found = here.dequantize(torch.float32), there.dequantize(torch.float32)
    assert torch.equal(expected.nan_to_num(nan=7.0), found.nan_to_num(nan=7.0))


@pytest.mark.parametrize("name", FORMATS)
def test_linear_multiplies_the_dequantized_weight(name, values):
    weight = quantize(values[:128].cuda(), name)
    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(functional.linear(x, weight), functional.linear(x, weight.dequantize()))


@pytest.mark.parametrize(
    ("name", "activation"),
    [("INT8_ROW", "INT8_ROW"), ("INT8_ROW", "INT8_ROW_ASYM"), ("MXFP8", "MXFP8"), ("FP8_ROW", "FP8_ROW")],
)
def test_rounded_inputs_multiply_as_on_the_cpu(name, activation, values):
    weight = quantize(values[:128], name, activation=f"dynamic:{activation}")
    x = torch.randn(8, 512, dtype=torch.bfloat16)
    there = functional.linear(x.cuda(), weight.cuda()).cpu()
    # Float32 sums of 512 terms may add up in another order; bfloat16 keeps 8 bits.
    torch.testing.assert_close(there, functional.linear(x, weight), rtol=2**-7, atol=2**-7)


def test_pinned_memory_compile_and_bind(values):
    weight = quantize(values[:128], "MXFP4")
    pinned = weight.pin_memory()
    assert pinned.is_pinned()
    model = torch.nn.Linear(512, 128, bias=False, device="cuda", dtype=torch.bfloat16)
    model.weight = torch.nn.Parameter(pinned.to("cuda", non_blocking=True), requires_grad=False)
    assert torch.equal(model.weight.dequantize().cpu(), weight.dequantize())
    bind(model)
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (1, 8, 33):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(compiled(x), model(x))
