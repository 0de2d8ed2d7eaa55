"""Scales and codes as kernels compute them, number by number, against the reference."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import triton
import triton.language as tl

from lowbit.element import E8M0
from lowbit.numerics import ScaleMode, scale_for_amax, total_scale
from lowbit.testing import FORMAT_GRID
from lowbit_kernels_cuda.codes import decode, encode_planes
from lowbit_kernels_cuda.scaling import raw, scale_of_amax, spec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SYMMETRIC = {(fmt.element.name, fmt.scale.name): fmt for fmt in FORMAT_GRID if not fmt.zero}.values()
CODES = {fmt.element.name: fmt for fmt in FORMAT_GRID if not fmt.zero}.values()


@triton.jit
def scales(amax, stored, total, tensor_scale, SPEC: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    s, t = scale_of_amax(tl.load(amax + i), tensor_scale, SPEC, "matrix")
    tl.store(stored + i, s)
    tl.store(total + i, t)


@triton.jit
def codes(x, noise, word, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)[None, :]
    planes, noises, sound = (), (), ()
    for j in tl.static_range(8):
        v = tl.load(x + 8 * i + j)
        planes, noises = planes + (v,), noises + (tl.load(noise + 8 * i + j),)
        sound = sound + ((v == v).to(tl.float32),)
    words = encode_planes(planes, sound, 0.0, noises, SPEC, STOCHASTIC, 8, -1)
    COUNT: tl.constexpr = 2 if SPEC.element.bits == 8 else 1
    for j in tl.static_range(COUNT):
        tl.store(word + COUNT * i + j, words[j])


@triton.jit
def values(code, value, SPEC: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    ELEMENT: tl.constexpr = SPEC.element
    tl.store(value + i, decode(tl.load(code + i), ELEMENT))


def numbers(count, generator):
    """Float32 of every exponent, with mantissas on, beside and between the ties of short ones; zeros and what is not finite."""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 2.0**-149, 2.0**-126, 1.0, 6.0, 448.0])
    bits = torch.randint(-(2**31), 2**31, (count - len(special),), generator=generator).to(torch.int32)
    kept = torch.tensor([0xFF800000, 0xFFC00000, 0xFFF00000, 0xFFFC0000, 0xFFFFFFFF]).to(torch.int32)
    bits &= kept[torch.randint(len(kept), bits.shape, generator=generator)]
    bits += torch.randint(-1, 2, bits.shape, generator=generator).to(torch.int32)
    # As many of a size that small floats tell apart.
    near = torch.randn(count // 2, generator=generator) * 2.0 ** torch.randint(
        -9, 9, (count // 2,), generator=generator
    )
    x = bits.view(torch.float32)
    x[: count // 2] = near.half().float()
    return torch.cat((special, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", SYMMETRIC, ids=lambda fmt: str(fmt).replace(":", " "))
def test_the_scale_of_every_amax_is_the_references(fmt, device):
    amax = numbers(4096, torch.Generator().manual_seed(0)).abs()
    tensor_scale = torch.tensor(0.75) if fmt.tensor_scale else None
    for mode in get_args(ScaleMode) if fmt.scale is E8M0 else ("even",):
        wanted = scale_for_amax(amax, fmt, mode=mode, tensor_scale=tensor_scale)
        stored = torch.empty_like(wanted.scale, device=device)
        total = torch.empty_like(amax, device=device)
        given = spec(fmt, mode, None if device == "cpu" else torch.device("cuda"))
        scales[(4,)](amax.to(device), raw(stored), total, 0.75, SPEC=given, N=1024, enable_fp_fusion=False)
        assert torch.equal(stored.cpu().float().nan_to_num(-1), wanted.scale.float().nan_to_num(-1)), mode
        assert torch.equal(total.cpu().nan_to_num(-1), total_scale(wanted).nan_to_num(-1)), mode


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", CODES, ids=lambda fmt: fmt.element.name)
@pytest.mark.parametrize("stochastic", [False, True])
def test_every_number_has_the_references_code_and_that_its_value(fmt, stochastic, device):
    generator = torch.Generator().manual_seed(1)
    x, element = numbers(8192, generator), fmt.element
    noise = torch.randint(2**24, x.shape, generator=generator) * 2.0**-24
    given = spec(fmt, device=None if device == "cpu" else torch.device("cuda"))
    x, noise = x.to(device), noise.to(device)
    if not element.has_nan:
        # All of a word are of one block, NaN or none.
        x = x.view(-1, 8).where(~x.isnan().view(-1, 8).any(1, keepdim=True), torch.nan).view(-1)
    words = 8 // (32 // element.bits) if 32 % element.bits == 0 and element.bits == 8 else 1
    word = torch.empty(len(x) // 8 * words, dtype=torch.int64, device=device)
    codes[(8,)](x, noise, word, SPEC=given, STOCHASTIC=stochastic, N=128, enable_fp_fusion=False)
    places = torch.arange(8 // words, device=device) * element.bits
    mask = (1 << element.bits) - 1
    code = (word.unsqueeze(-1) >> places & mask).to(torch.uint8).view(-1)
    value = torch.empty_like(x)
    values[(8,)](code, value, SPEC=given, N=1024, enable_fp_fusion=False)
    wanted = element.encode(x.cpu(), noise.cpu() if stochastic else None)
    # One NaN is as good as another.
    number = ~x.cpu().isnan()
    assert torch.equal(code.cpu()[number], wanted.view(torch.uint8)[number] & mask)
    assert torch.equal(value.cpu().nan_to_num(-1), element.decode(wanted).nan_to_num(-1))
