"""4-bit weights as e4m3: against what the reference says they stand for, and when floats have no factor of their row."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.packing import unpack
from lowbit_kernels_cuda.expanded import expand, row_factors
from lowbit_kernels_cuda.lifts import is_lifted, lift
from lowbit_kernels_cuda.linear import pack

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def spread(n: int, k: int) -> torch.Tensor:
    """Numbers whose groups of 32 are up to 2^8 apart, with groups and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, k, generator=generator)
    x *= torch.exp2(torch.randint(-4, 5, (n, k // 16), generator=generator)).repeat_interleave(16, 1)
    x[3, 32:64], x[5] = 0, 0
    return x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), [(40, 384), (16, 1536)])
@pytest.mark.parametrize(
    "fmt", ["MXFP4", "e2m1:1x64:e8m0", "int4:1x*:bfloat16", "int4:1x128:float16", "int4:1x384:float32"]
)
def test_bytes_times_factors_are_the_weight(fmt, n, k, device):
    q = lowbit.quantize(spread(n, k).to(device), fmt, activation="dynamic:FP8_ROW")
    words, scale, *factors = pack(q)
    by = lift(q.format) if is_lifted(scale, q.format) else 0
    codes, rows = expand(words, scale, factors[0] if factors else None, q.format, n, k, by)
    assert bool(factors) == (q.format.element.kind == "float")
    each = rows.repeat_interleave(k // len(rows), 0).T
    assert torch.equal(codes.float() * each, q.dequantize().float())


@pytest.mark.parametrize(("exponent", "exact"), [(-11, True), (-12, False)])
def test_scales_too_far_apart_have_no_factor(exponent, exact):
    x = torch.ones(2, 64)
    x[1, 32:] = 6 * 2.0**exponent
    x[1, :32] = 6
    q = lowbit.quantize(x, "MXFP4")
    codes = unpack(q.qdata.view(torch.uint8), q.format.element, 64)
    found = row_factors(q.scale, codes)
    assert (found is not None) == exact
    # Of a group that is all zeros the scale does not matter.
    codes[1, 32:] = 0
    assert row_factors(q.scale, codes) is not None
