"""The reference arithmetic against NumPy, ml_dtypes and plain Python, block by block."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.element import Element
from lowbit.format import NVFP4, Format
from lowbit.numerics import Scales, choose_scale, decode, encode, tensor_scale_for_amax
from lowbit.packing import unpack
from lowbit.testing import FORMAT_GRID, sample, shapes

MODES = ("floor", "ceil", "even", "rceil")
FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}
# Largest value, its exponent, and mantissa bits (of an integer: those below its leading one).
POWERS = {"e4m3fn": (448, 8, 3), "e5m2": (57344, 15, 2), "e2m3": (7.5, 2, 3), "e3m2": (28, 4, 2), "e2m1": (6, 2, 1)}
POWERS |= {"int8": (127, 6, 6), "uint8": (255, 7, 7), "int4": (7, 2, 2)}
SPECS = ("e2m1:2x16:e4m3fn:tensor", "uint8:1x32:e8m0", "e5m2:*x*:float16", "uint3:3x4:e4m3fn:zero=uint8")
GRID = (*FORMAT_GRID, *map(Format.parse, SPECS))

each_format = pytest.mark.parametrize("fmt", GRID, ids=str)


def power_code(amax: float, element: str, mode: str) -> int:
    """The e8m0 code of a block, from the definition of each mode."""
    if not math.isfinite(amax) or amax == 0:
        return 0 if amax == 0 else 255
    largest, top, mantissa = POWERS[element]
    fraction, exponent = math.frexp(amax)
    low = exponent - 1 - top
    if mode == "ceil":
        low += fraction > 0.5
    elif mode == "even":
        # Rounding half to even to `mantissa` bits below the leading one reaches the next power of two, or not.
        low += round(fraction * 2 ** (mantissa + 1)) == 2 ** (mantissa + 1)
    elif mode == "rceil":
        low = next(e for e in itertools.count(low - 1) if amax <= largest * 2.0**e)
    return min(max(low, -127), 127) + 127


def stored(scale: np.float32, e: Element) -> np.float32:
    """A scale as its element holds it: 1 for 0, at least the smallest value, at most the largest, NaN if not finite."""
    if not np.isfinite(scale):
        return np.float32(np.nan)
    kept = np.float32(1) if scale == 0 else np.clip(scale, np.float32(e.smallest), np.float32(e.max))
    return kept.astype(FLOATS[e.name]).astype(np.float32)


def rounded(x: np.ndarray, e: Element) -> np.ndarray:
    """Float32 values of the codes of x."""
    clipped = np.clip(x, np.float32(e.min), np.float32(e.max))
    if e.kind == "int":
        return np.rint(np.where(np.isnan(clipped), 0, clipped)).astype(np.float32) + np.float32(
            0
        )  # integers have one 0
    return clipped.astype(FLOATS[e.name]).astype(np.float32)


def choose(block: np.ndarray, fmt: Format, mode: str, tensor: np.float32) -> tuple[np.float32, np.float32]:
    """Scale and zero point of one block; every operation rounds to float32."""
    e, amax = fmt.element, np.abs(block).max()
    if fmt.scale.name == "e8m0":
        code = power_code(float(amax), e.name, mode)
        return np.float32(np.nan if code == 255 else 2.0 ** (code - 127)), np.float32(0)
    if fmt.zero is None:
        largest = (2**e.bits - 1) / 2 if e.kind == "int" and e.signed else e.max
        return stored(amax / np.float32(largest) / tensor, fmt.scale), np.float32(0)
    steps = np.float32(2**e.bits - 1)
    low, high = np.minimum(block.min(), np.float32(0)), np.maximum(block.max(), np.float32(0))
    scale = stored(high / steps - low / steps, fmt.scale)
    return scale, np.clip(e.min - np.rint(low / scale), e.min, e.max).astype(np.float32)


def oracle(x: Tensor, fmt: Format, mode: str, tensor: Tensor | None) -> tuple[np.ndarray, ...]:
    """Float32 scale, zero, values of codes and values, block by block."""
    data, shape = x.to(torch.float32).numpy(), tuple(x.shape)
    sizes = [b or n for b, n in zip(fmt.block_for(len(shape)), shape, strict=True)]
    counts = [-(-n // b) for n, b in zip(shape, sizes, strict=True)]
    scale, zero = np.zeros(counts, np.float32), np.zeros(counts, np.float32)
    codes, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    tensors = np.ones(counts, np.float32) if tensor is None else np.broadcast_to(tensor.numpy(), counts)
    with np.errstate(all="ignore"):
        for index in np.ndindex(*counts):
            region = tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, sizes, strict=True))
            scale[index], zero[index] = choose(data[region], fmt, mode, tensors[index])
            total = scale[index] * tensors[index]
            scaled = data[region] / total
            if fmt.zero is None:
                codes[region] = rounded(scaled, fmt.element)
            else:
                codes[region] = np.clip(np.rint(scaled) + zero[index], fmt.element.min, fmt.element.max)
            values[region] = (codes[region] - zero[index]) * total
    return scale, zero, codes, values


def kinds(shape: tuple[int, ...]) -> list[Tensor]:
    """Ordinary and one-sided values, outliers, zeros of both signs, subnormals, huge values, whole numbers (ties)."""
    x = sample(shape, seed=5)
    outliers = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(6)) < 0.02, x * 1000, x)
    sided = [x.abs() + 3, -x.abs() - 3]
    return [x, *sided, outliers, x * -0.0, x * 2.0**-140, x * 2.0**118, (x * 4).round(), x.to(torch.bfloat16)]


def assert_bits(found: Tensor, wanted: np.ndarray) -> None:
    """Equal values with equal signs; any NaN equals any other."""
    np.testing.assert_array_equal(found.numpy(), wanted)
    np.testing.assert_array_equal(np.signbit(found.numpy())[~np.isnan(wanted)], np.signbit(wanted)[~np.isnan(wanted)])


def round_trip(x: Tensor, fmt: Format, scales: Scales) -> Tensor:
    return decode(encode(x, fmt, scales), fmt, scales, x.shape[-1])


@each_format
def test_every_step_is_that_of_the_oracle(fmt):
    """Scales, zero points, codes and values bit for bit, ranks 1 to 4, edge blocks among them."""
    for shape in shapes(fmt):
        for mode in MODES if fmt.scale.name == "e8m0" else MODES[:1]:
            for x in kinds(shape):
                found = choose_scale(x, fmt, mode=mode)
                scale, zero, codes, values = oracle(x, fmt, mode, found.tensor_scale)
                assert_bits(found.scale.to(torch.float32), scale)
                if found.zero is not None:
                    np.testing.assert_array_equal(found.zero.to(torch.float32).numpy(), zero)
                data = encode(x, fmt, found)
                assert_bits(fmt.element.decode(unpack(data, fmt.element, shape[-1])), codes)
                assert_bits(decode(data, fmt, found, shape[-1]), values)


@each_format
def test_every_value_goes_to_the_nearest_code(fmt):
    """No code of the format is nearer to x than the one chosen, but for the rounding of a division and a product."""
    every = torch.arange(2**fmt.element.bits)
    if fmt.element.kind == "float":
        every = fmt.element.decode(every.to(torch.uint8).view(fmt.element.storage))
        every = every[torch.isfinite(every)]
    elif fmt.element.signed:
        every = every - 2 ** (fmt.element.bits - 1)
    every = every.to(torch.float64).sort().values
    for shape in shapes(fmt)[:2]:
        for x in kinds(shape):
            x64, scales = x.to(torch.float64), choose_scale(x, fmt)
            error = (round_trip(x, fmt, scales).to(torch.float64) - x64).abs()
            scale = spread(scales.scale.to(torch.float64), fmt, shape)
            if scales.tensor_scale is not None:
                scale *= scales.tensor_scale
            zero = 0 if scales.zero is None else spread(scales.zero.to(torch.float64), fmt, shape)
            above = torch.searchsorted(every, x64 / scale + zero).clamp(1, len(every) - 1)
            below, above = ((every[index] - zero) * scale for index in (above - 1, above))
            nearest = torch.minimum((x64 - below).abs(), (above - x64).abs())
            assert bool((error <= nearest + 2.0**-22 * x64.abs() + 2.0**-149).all())


def spread(part: Tensor, fmt: Format, shape: tuple[int, ...]) -> Tensor:
    """Each block's entry, repeated over the block."""
    for dim, (b, n) in enumerate(zip(fmt.block_of(shape), shape, strict=True)):
        part = part.repeat_interleave(b, dim).narrow(dim, 0, n)
    return part


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("element", POWERS)
def test_power_of_two_scales_at_every_boundary(element, mode):
    rng = np.random.default_rng(1)
    mantissas = [1.0, 1.5, POWERS[element][0] / 2 ** POWERS[element][1], *(2 - 2.0**-j for j in range(2, 10))]
    edges = np.outer(np.exp2(np.arange(-149.0, 128)), mantissas).ravel().astype(np.float32)
    ends = np.array([0, np.inf, np.nan, np.finfo(np.float32).max, 1e-45], np.float32)
    random = rng.integers(0, 2**31, 3000, np.uint32).view(np.float32)
    beside = [np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))]
    amax = np.concatenate([edges, *beside, ends, random])
    with np.errstate(invalid="ignore"):  # signalling NaNs among the random bits
        x = amax[:, None] * rng.uniform(-1, 1, (len(amax), 32)).astype(np.float32)
        x[np.arange(len(amax)), rng.integers(0, 32, len(amax))] = np.copysign(amax, rng.uniform(-1, 1, len(amax)))
    fmt = Format.parse(f"{element}:1x32:e8m0")
    codes = choose_scale(torch.from_numpy(x), fmt, mode=mode).scale.view(torch.uint8).flatten().tolist()
    assert codes == [power_code(a, element, mode) for a in amax.tolist()]


@pytest.mark.parametrize("shape", [(8, 64), (3, 8, 64), (2, 3, 1, 32), (48,)])
def test_a_tensor_scale_is_the_least_power_of_two_that_fits(shape):
    limit = 6 * 448
    edges = [limit * 2.0**e * (1 + ulp * 2.0**-23) for e in (-100, -3, 0, 7, 110) for ulp in (-1, 0, 1)]
    for target in (*edges, 1.0, 1e-30, 3e38):
        x = sample(shape, seed=8)
        x = x / x.abs().amax(tuple(range(x.dim()))[-2:], keepdim=True) * target
        amax = x.abs().amax(tuple(range(x.dim()))[-2:], keepdim=True).to(torch.float64)
        t = choose_scale(x, NVFP4).tensor_scale
        assert t is not None
        assert (t.shape, t.dtype) == (amax.shape, torch.float32)
        assert all(math.frexp(v)[0] == 0.5 for v in t.flatten().tolist())
        assert bool((amax <= limit * t.to(torch.float64)).all())
        assert bool((amax > limit * t.to(torch.float64) / 2).all())
    ones = tensor_scale_for_amax(torch.tensor([0.0, torch.inf, torch.nan]), NVFP4)
    assert ones.tolist() == [1, 1, 1]
    assert tensor_scale_for_amax(torch.tensor([1e-45]), NVFP4).tolist() == [2.0**-126]


@pytest.mark.parametrize("values", [[0.0137], [2.0**-7], [0.001, 9.0, 2.0, 0.3, 1e-20, 5e4, 0.01, 1.0]], ids=len)
def test_a_given_tensor_scale_is_used_as_it_is(values):
    given = torch.tensor(values)[:, None]
    x = sample((8, 64), seed=9)
    scales = choose_scale(x, NVFP4, tensor_scale=given)
    assert scales.tensor_scale is given
    scale, _, _, expected = oracle(x, NVFP4, "even", given)
    assert_bits(scales.scale.to(torch.float32), scale)
    assert_bits(round_trip(x, NVFP4, scales), expected)


@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_a_bad_value_is_nan_and_its_neighbours_are_untouched(fmt, bad):
    for shape in shapes(fmt):
        x = sample(shape) * 2.0**-20
        x.view(-1)[-1] = 0
        spoiled = x.clone()
        spoiled.view(-1)[-1] = bad
        inside = torch.zeros(fmt.scale_shape(shape))
        inside.view(-1)[-1] = 1
        inside = spread(inside, fmt, shape) == 1
        # The bad block is small, so that it does not decide the tensor scale.
        x, spoiled = (torch.where(inside, v * 2.0**-6, v) for v in (x, spoiled))
        for dtype in (torch.float32, torch.bfloat16):
            clean, dirty = (round_trip(v.to(dtype), fmt, choose_scale(v.to(dtype), fmt)) for v in (x, spoiled))
            assert bool(torch.isnan(dirty[inside]).all())
            assert torch.equal(dirty[~inside], clean[~inside])
