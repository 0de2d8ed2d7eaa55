"""What the reference arithmetic accepts and refuses, and where it gives the same bits: compiled, again, in chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._inductor.codegen.cpp import DTYPE_TO_CPP

from lowbit.element import E8M0
from lowbit.errors import FormatError
from lowbit.format import (
    INT4_G32,
    INT8_ROW,
    INT8_ROW_ASYM,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    UINT4_G128,
    Format,
    FP8_128x128,
)
from lowbit.numerics import Scales, check_scales, choose_scale, decode, encode, scale_for_amax
from lowbit.packing import unpack
from lowbit.philox import uniform
from lowbit.testing import FORMAT_GRID, sample, shapes

MODES = ("floor", "ceil", "even", "rceil")
MX = (MXFP8, MXFP8_E5M2, MXFP6_E2M3, MXFP6_E3M2, MXFP4, MXINT8)

each_format = pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)


def raw(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.uint8)


def all_parts(x: Tensor, fmt: Format) -> list[Tensor]:
    """Bytes of everything that quantizing gives."""
    scales = choose_scale(x, fmt)
    parts = (encode(x, fmt, scales), scales.scale, scales.zero, scales.tensor_scale)
    return [raw(part) for part in parts if part is not None]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@each_format
def test_every_float_type_and_stride_reads_as_plain_float32(fmt):
    for shape in shapes(fmt):
        x = sample(shape)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert_same(all_parts(x.to(dtype), fmt), all_parts(x.to(dtype).to(torch.float32), fmt))
            # Transposed, with a stride, or expanded; and never written to.
            for view in (
                x.mT.contiguous().mT if x.dim() > 1 else x,
                torch.stack([x, x], -1)[..., 0],
                x[:1].expand(shape),
            ):
                typed = view.to(dtype) if view.is_contiguous() else torch.empty_like(view, dtype=dtype).copy_(view)
                before = typed.clone()
                assert_same(all_parts(typed, fmt), all_parts(typed.contiguous(), fmt))
                assert torch.equal(typed, before)


@each_format
def test_decode_rounds_once_to_the_wanted_type(fmt):
    for shape in shapes(fmt):
        x = sample(shape) * 100
        scales = choose_scale(x, fmt)
        data = encode(x, fmt, scales)
        values = decode(data, fmt, scales, shape[-1])
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert torch.equal(decode(data, fmt, scales, shape[-1], dtype), values.to(dtype))


@each_format
def test_empty_tensors_come_back_empty(fmt):
    for full in shapes(fmt):
        for dim in range(len(full)):
            shape = (*full[:dim], 0, *full[dim + 1 :])
            x = torch.empty(shape, dtype=torch.bfloat16)
            scales = choose_scale(x, fmt)
            check_scales(scales, fmt, shape)
            assert decode(encode(x, fmt, scales, rounding="stochastic"), fmt, scales, shape[-1]).shape == shape


def test_a_block_larger_than_the_tensor_takes_no_room():
    huge = Format.parse("int8:100000000x100000000:float32")
    x = sample((3, 5))
    assert_same(all_parts(x, huge), all_parts(x, Format.parse("int8:*x*:float32")))


@each_format
def test_scales_for_given_magnitudes_are_those_of_the_blocks(fmt):
    if fmt.zero is None and len(fmt.block) == 2:
        x = sample((200, 256 if fmt.block[-1] in {0, 16, 32, 128} else 24))
        rows, columns = fmt.block_of(tuple(x.shape))[-2:]
        amax = torch.stack([torch.stack([b.abs().max() for b in band.split(columns, 1)]) for band in x.split(rows)])
        for mode in MODES:
            found, wanted = scale_for_amax(amax, fmt, mode=mode), choose_scale(x, fmt, mode=mode)
            assert torch.equal(raw(found.scale), raw(wanted.scale))


def exponents(rows: int = 64) -> Tensor:
    """Blocks of every magnitude, a zero one, and ones with a NaN and an infinity.

    None reaches 2^127: rounded up, that has no float32 to decode to.
    """
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(rows, 128, generator=generator).clamp(-3.9, 3.9)
    x = torch.ldexp(x, torch.randint(-149, 125, (rows, 4), generator=generator).repeat_interleave(32, 1))
    x[0, 0], x[1, 40], x[2, :32] = torch.nan, torch.inf, 0
    return x


def chain(x: Tensor, cases: list[tuple[Format, str]]) -> list[tuple[Tensor, ...]]:
    """Scales, codes, values, and codes of those values under the same scales."""
    results = []
    for fmt, mode in cases:
        scales = choose_scale(x, fmt, mode=mode)
        data = encode(x, fmt, scales)
        values = decode(data, fmt, scales, x.shape[-1])
        tensors = () if scales.tensor_scale is None else (scales.tensor_scale,)
        results.append((scales.scale, data, values, encode(values, fmt, scales), *tensors))
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", MX, ids=str)
def test_given_scales_are_idempotent_bit_for_bit(fmt, mode):
    for x in (exponents(), exponents().to(torch.bfloat16)):
        [(scale, data, values, again)] = chain(x, [(fmt, mode)])
        copy = Scales(scale.view(torch.uint8).clone().view(torch.float8_e8m0fnu))
        assert torch.equal(raw(encode(x, fmt, copy)), raw(data))
        finite = ~torch.isnan(values)
        assert (~finite).sum() == 64
        first, second = (raw(unpack(part, fmt.element, 128))[finite] for part in (data, again))
        assert torch.equal(first, second)
        assert bool(torch.isnan(decode(again, fmt, copy, 128)[~finite]).all())


def check_compiled(cases: list[tuple[Format, str]]) -> None:
    x = exponents(8)
    compiled = torch.compile(chain, fullgraph=True, dynamic=False)(x, cases)
    for found, wanted in zip(compiled, chain(x, cases), strict=True):
        for part, other in zip(found, wanted, strict=True):
            assert part.dtype == other.dtype
            assert_equal_but_for_nan(part, other)


def assert_equal_but_for_nan(found: Tensor, wanted: Tensor) -> None:
    """The same bits, except that any NaN equals any other."""
    nan = torch.isnan(wanted.to(torch.float32))
    assert torch.equal(torch.isnan(found.to(torch.float32)), nan)
    assert torch.equal(*(raw(part).view(*part.shape, -1)[~nan] for part in (found, wanted)))


# Compiled callers use the opaque operators, which run on every torch; this compiles the arithmetic inside them.
inductor_knows_e8m0 = pytest.mark.skipif(
    torch.float8_e8m0fnu not in DTYPE_TO_CPP, reason="this torch's inductor has no C++ type for float8_e8m0fnu"
)


@inductor_knows_e8m0
def test_compiled_code_gives_the_same_bits():
    check_compiled([(MXFP8, "floor"), (MXFP6_E2M3, "ceil"), (MXFP4, "even"), (MXINT8, "rceil")])


@inductor_knows_e8m0
@pytest.mark.slow
@pytest.mark.parametrize("fmt", [*MX, NVFP4, INT4_G32], ids=str)
def test_compiled_code_gives_the_same_bits_in_every_mode(fmt):
    check_compiled([(fmt, mode) for mode in (MODES if fmt.scale is E8M0 else MODES[:1])])


@each_format
def test_stochastic_rounding_draws_by_canonical_index(fmt):
    """The same bits from one call as from calls on pieces that pass their offset; other bits under another seed."""
    for shape in shapes(fmt):
        x = sample(shape)
        scales, options = choose_scale(x, fmt), {"rounding": "stochastic", "seed": 7}
        whole = encode(x, fmt, scales, **options)
        assert torch.equal(raw(encode(x.clone(), fmt, scales, **options)), raw(whole))
        if x.numel() > 100 and fmt.element.bits > 1:
            assert not torch.equal(raw(encode(x, fmt, scales, rounding="stochastic", seed=8)), raw(whole))
        block = fmt.block_for(len(shape))
        if len(shape) > 1 and block[0] == 1:
            cut = Scales(*(p if p is None or p.shape[0] == 1 else p[1:] for p in parts_of(scales)))
            rest = encode(x[1:], fmt, cut, **options, offset=x[0].numel())
            assert torch.equal(raw(rest), raw(whole[1:]))


def parts_of(scales: Scales) -> tuple[Tensor | None, ...]:
    return scales.scale, scales.zero, scales.tensor_scale


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, NVFP4, MXINT8], ids=str)
def test_stochastic_codes_are_those_of_the_element_under_philox_noise(fmt):
    x = sample((6, 64))
    scales = choose_scale(x, fmt)
    total = scales.scale.to(torch.float32) * (1 if scales.tensor_scale is None else scales.tensor_scale)
    scaled = x / total.repeat_interleave(fmt.block[-1], 1)
    expected = fmt.element.encode(scaled, uniform(x.numel(), 99, offset=5).view(x.shape))
    data = encode(x, fmt, scales, rounding="stochastic", seed=99, offset=5)
    assert torch.equal(raw(unpack(data, fmt.element, 64)), raw(expected))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4, INT4_G32, UINT4_G128, INT8_ROW_ASYM, FP8_128x128], ids=str)
def test_stochastic_rounding_is_unbiased(fmt):
    x = sample((2, 128), seed=4)
    scales, draws = choose_scale(x, fmt, mode="rceil"), 400
    kept = torch.stack(
        [decode(encode(x, fmt, scales, rounding="stochastic", seed=s), fmt, scales, 128) for s in range(draws)]
    ).to(torch.float64)
    low, high = kept.amin(0), kept.amax(0)
    # Some values are codes and some nearly so; the others were met on both sides of the way between two codes.
    fraction = (x - low) / (high - low)
    between = (fraction > 0.05) & (fraction < 0.95)
    assert float(between.to(torch.float64).mean()) > 0.7
    deviation = ((high - x) * (x - low) / draws).sqrt()
    score = ((kept.mean(0) - x) / deviation)[between]
    assert float(score.abs().max()) < 5
    # The mean score of n values has a standard deviation of 1 / sqrt(n).
    assert abs(float(score.mean())) < 4 / math.sqrt(score.numel())


def scales_of(fmt: Format, **changes: Tensor | None) -> Scales:
    chosen = choose_scale(sample((4, 128)), fmt)
    parts = {"scale": chosen.scale, "zero": chosen.zero, "tensor_scale": chosen.tensor_scale}
    return Scales(**(parts | changes))


@pytest.mark.parametrize(
    ("fmt", "changes", "message"),
    [
        (
            MXFP4,
            {"scale": torch.ones(4, 4)},
            r"scale is torch.float32 of shape \(4, 4\).*float8_e8m0fnu of shape \(4, 4\)",
        ),
        (MXFP4, {"scale": torch.ones(4, 1).to(torch.float8_e8m0fnu)}, r"shape \(4, 1\).*of shape \(4, 4\)"),
        (INT8_ROW, {"scale": torch.ones(4)}, r"shape \(4,\).*of shape \(4, 1\)"),
        (INT8_ROW, {"zero": torch.ones(4, 1, dtype=torch.int8)}, "has no zero points"),
        (UINT4_G128, {"zero": None}, "needs zero points"),
        (UINT4_G128, {"zero": torch.zeros(4, 1)}, "zero is torch.float32.*torch.uint8"),
        (UINT4_G128, {"zero": torch.zeros(4, 2, dtype=torch.uint8)}, r"zero is .*\(4, 2\).*\(4, 1\)"),
        (NVFP4, {"tensor_scale": None}, "needs tensor scale"),
        (INT8_ROW, {"tensor_scale": torch.ones(1, 1)}, "has no tensor scale"),
        *(
            (NVFP4, {"tensor_scale": bad}, r"torch.float32 of shape \(1, 1\) \(one a matrix\) or \(4, 1\)")
            for bad in (torch.ones(()), torch.ones(1), torch.ones(1, 128), torch.ones(2, 1), torch.ones(1, 1).double())
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(fmt, changes, message):
    x, scales = sample((4, 128)), scales_of(fmt, **changes)
    data = encode(x, fmt, scales_of(fmt))
    for call in (lambda: encode(x, fmt, scales), lambda: decode(data, fmt, scales, 128)):
        with pytest.raises(FormatError, match=message):
            call()


def test_a_tensor_scale_does_not_split_a_block():
    fmt = Format.parse("e2m1:16x16:e4m3fn:tensor")
    scale = torch.ones(2, 2).to(torch.float8_e4m3fn)
    encode(sample((32, 32)), fmt, Scales(scale, None, torch.ones(2, 1)))
    with pytest.raises(FormatError, match=r"\(2, 1\) \(one a row of blocks\)"):
        encode(sample((32, 32)), fmt, Scales(scale, None, torch.ones(32, 1)))


@pytest.mark.parametrize("fmt", [INT4_G32, MXFP6_E2M3, MXFP8, INT8_ROW], ids=str)
def test_data_that_does_not_fit_is_refused(fmt):
    x = sample((4, 128))
    scales = choose_scale(x, fmt)
    data = encode(x, fmt, scales)
    for bad, k in ((data, 96), (data, 160), (data[:, :-1], 128), (data.to(torch.int32), 128), (data[:2], 128)):
        with pytest.raises(FormatError, match=r"(data|scale) is torch.* needed is torch"):
            decode(bad, fmt, scales, k)


def test_calls_that_mean_nothing_are_refused():
    x = sample((4, 128))
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        for call in (lambda v: choose_scale(v, INT8_ROW), lambda v: encode(v, INT8_ROW, choose_scale(x, INT8_ROW))):
            with pytest.raises(FormatError, match=f"tensors are quantized, not {dtype}"):
                call(x.to(dtype))
    for fmt in (MXFP4, INT8_ROW, INT8_ROW_ASYM):
        with pytest.raises(FormatError, match=r"scale mode 'round' is unknown; use one of floor, ceil, even, rceil"):
            choose_scale(x, fmt, mode="round")
        with pytest.raises(FormatError, match=r"rounding 'up' is unknown; use one of nearest, stochastic"):
            encode(x, fmt, choose_scale(x, fmt), rounding="up")
    with pytest.raises(FormatError, match=r"has no tensor scale, and one was given"):
        choose_scale(x, INT8_ROW, tensor_scale=torch.ones(1, 1))
    with pytest.raises(FormatError, match="not a multiple of block 32"):
        choose_scale(x[:, :100], MXFP4)
    with pytest.raises(FormatError, match="0 dimensions is too small"):
        choose_scale(torch.tensor(1.0), INT8_ROW)
