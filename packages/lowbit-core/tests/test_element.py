"""Elements against ml_dtypes, NumPy and plain arithmetic: every code, every bfloat16, and hard float32 values."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.element import BFLOAT16, E2M1, E4M3FN, E8M0, ELEMENTS, FLOAT32, INT1, INT4, INT8, element
from lowbit.errors import FormatError

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
INTEGERS = {name: getattr(ml_dtypes, name) for name in ("int1", "int2", "int4", "uint1", "uint2", "uint4")}
# What a format may store codes in: all but e8m0 and the wide floats.
CODES = [e for e in ELEMENTS.values() if e.kind == "int" or (e.bits <= 8 and e is not E8M0)]
LATTICE = 2**24

each_element = pytest.mark.parametrize("e", ELEMENTS.values(), ids=lambda e: e.name)
each_code = pytest.mark.parametrize("e", CODES, ids=lambda e: e.name)


def bits_of(codes: Tensor) -> np.ndarray:
    """Codes as unsigned integers of the element's width in bytes."""
    return codes.contiguous().view(torch.uint8).numpy().view(f"u{codes.dtype.itemsize}")


def all_codes(e) -> Tensor:
    """Every code of an element of at most 16 bits; a sample of float32's."""
    if e.kind == "int":
        return torch.arange(int(e.min), int(e.max) + 1).to(e.code_dtype)
    if e.bits <= 8:
        return torch.arange(2**e.bits, dtype=torch.uint8).view(e.storage)
    if e.bits == 16:
        return torch.arange(2**16).to(torch.uint16).view(e.storage)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)).view(torch.float32)


def value_of(e, code: int) -> float:
    """The value of an integer or e8m0 code, by definition."""
    if e is E8M0:
        return math.nan if code == 255 else 2.0 ** (code - 127)
    return code - 2**e.bits if e.min < 0 and code >= 2 ** (e.bits - 1) else code


def every_bfloat16() -> Tensor:
    return torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).to(torch.float32)


def hard_values(e) -> Tensor:
    """Float32 ties and their neighbours, subnormals of both types, values around the ends, random bit patterns."""
    rng = np.random.default_rng(e.bits)
    grid = e.decode(all_codes(e)).to(torch.float64)
    grid = grid[torch.isfinite(grid)].sort().values
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).numpy().astype(np.float32)
    bound = np.float32(max(e.max, -e.min))
    with np.errstate(over="ignore"):
        parts = [
            *(points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, -np.float32(np.inf))),
            rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32),
            (rng.standard_normal(20_000) * (bound / 3)).astype(np.float32),
            (rng.uniform(-4, 4, 20_000) * e.smallest).astype(np.float32),
            np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45], np.float32),
            bound * np.array([1, 1.01, 1.06, 1.13, 1.3, 2, -1, -1.01, -1.06, -1.13, -1.3, -2], np.float32),
        ]
    return torch.from_numpy(np.concatenate(parts))


def oracle_codes(e, x: Tensor) -> np.ndarray:
    """The code of each x that is not NaN, as `bits_of` gives it."""
    if e is E8M0:
        return np.array([nearest_power(v) for v in x.to(torch.float64).tolist()], np.uint8)
    clamped = np.clip(x.numpy(), np.float32(e.min), np.float32(e.max))
    if e.kind == "int":
        return np.rint(clamped.astype(np.float64)).astype(np.int64).astype(np.uint8)
    return clamped.astype(FLOATS[e.name]).view(f"u{e.storage.itemsize}")


def nearest_power(value: float) -> int:
    """The e8m0 code of the power of two nearest to `value`, ties up."""
    if not 0 <= value < math.inf:
        return 255
    mantissa, exponent = math.frexp(max(value, 2.0**-127))
    return min(exponent - 1 + (mantissa >= 0.75) + 127, 254)


@each_element
def test_every_code_decodes_to_its_value(e):
    codes = all_codes(e)
    stored = bits_of(codes)
    if e.name in FLOATS:
        expected = stored.view(FLOATS[e.name]).astype(np.float32)
    elif e.name in INTEGERS:
        expected = stored.view(INTEGERS[e.name]).astype(np.float32)
    else:
        expected = np.array([value_of(e, int(c) & (2**e.bits - 1)) for c in stored], np.float32)
    values = e.decode(codes)
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), expected)
    np.testing.assert_array_equal(np.signbit(values.numpy()), np.signbit(expected))


@each_element
def test_codes_of_every_bfloat16_and_of_hard_float32_values(e):
    x = torch.cat([every_bfloat16(), hard_values(e)])
    codes = e.encode(x)
    assert codes.dtype == e.code_dtype
    nan = torch.isnan(x)
    # Codes and not values: the sign of zero is kept, and what saturates is the last finite code.
    np.testing.assert_array_equal(bits_of(codes[~nan]), oracle_codes(e, x[~nan]))
    lost = e.decode(codes)[nan]
    assert bool(torch.isnan(lost).all() if e.has_nan else (lost == 0).all())


@each_element
def test_values_of_codes_encode_to_those_codes(e):
    codes = all_codes(e)
    values = e.decode(codes)
    finite = torch.isfinite(values)
    np.testing.assert_array_equal(bits_of(e.encode(values)[finite]), bits_of(codes[finite]))


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
def test_ranges_are_those_of_ml_dtypes(name):
    e = ELEMENTS[name]
    info = ml_dtypes.iinfo(INTEGERS[name]) if e.kind == "int" else ml_dtypes.finfo(FLOATS[name])
    assert (e.min, e.max) == (float(info.min), float(info.max))
    if e.kind == "float":
        assert e.smallest == float(info.smallest_subnormal)
        assert (e.exponent, e.mantissa) == (info.nexp, info.nmant)


def test_facts_of_elements():
    for e in ELEMENTS.values():
        assert e.signed == (e.min < 0)
        assert e.packed == (e.bits < 8)
        assert element(e.name) is e
        if e is not INT1:  # has no positive value
            assert e.max_exponent == math.floor(math.log2(e.max))
    assert E8M0.smallest == E8M0.min == 2.0**-127
    assert INT4.smallest == 1
    with pytest.raises(FormatError, match=r"'e9m9'.*e2m1"):
        element("e9m9")


@each_code
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read_as_float32(e, dtype):
    x = torch.linspace(-9, 9, 72).reshape(8, 9).to(dtype)
    for view in (x, x.t(), x[::2, 1:6], x[:0]):
        plain = view.to(torch.float32).contiguous()
        for noise in (None, torch.rand(plain.shape)):
            np.testing.assert_array_equal(bits_of(e.encode(view, noise)), bits_of(e.encode(plain, noise)))


def neighbours(e, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two float64 values that clamped x rounds to, and the share of the way from the first to the second it is.

    Floats round in magnitude, integers down or up.
    """
    x = np.clip(x.astype(np.float64), e.min, e.max)
    if e.kind == "int":
        return np.floor(x), np.ceil(x), x - np.floor(x)
    grid = np.arange(2 ** (e.bits - 1), dtype=np.uint8).view(FLOATS[e.name]).astype(np.float64)
    grid = grid[np.isfinite(grid)]
    index = np.searchsorted(grid, np.abs(x), side="right") - 1
    low, high = grid[index], grid[np.minimum(index + 1, len(grid) - 1)]
    step = np.where(high > low, high - low, 1)
    return np.copysign(low, x), np.copysign(high, x), (np.abs(x) - low) / step


def spread(e, count: int) -> Tensor:
    """Random float32 values over the range and a little past it, among them small and subnormal ones."""
    rng = np.random.default_rng(3)
    wide = rng.uniform(1.2 * e.min - 0.1, 1.2 * e.max + 0.1, count)
    return torch.from_numpy(np.concatenate([wide, wide * 2.0 ** -rng.integers(0, 12, count)]).astype(np.float32))


@each_code
def test_stochastic_rounding_goes_up_with_the_fraction_it_covers(e):
    x = torch.cat([spread(e, 50_000), torch.tensor([e.max, e.min, torch.inf, -torch.inf])])
    # On a grid of 2^-20 of the smallest step, x minus its floor is exact in float32, as in the oracle.
    x = torch.where(x.abs() < 8 * e.smallest, (x / e.smallest * 2**20).round() * (e.smallest * 2.0**-20), x)
    noise = torch.from_numpy(np.random.default_rng(4).integers(0, LATTICE, len(x)) / LATTICE).to(torch.float32)
    low, high, fraction = neighbours(e, x.numpy())
    expected = np.where(fraction > noise.numpy(), high, low)
    values = e.decode(e.encode(x, noise)).numpy()
    np.testing.assert_array_equal(values, expected)
    if e.kind == "float":
        np.testing.assert_array_equal(np.signbit(values), np.signbit(x.numpy()))


@each_code
def test_mean_over_all_noise_is_x_to_within_the_stated_bound(e):
    x = spread(e, 50_000)
    x = x[(x >= e.min) & (x <= e.max)]
    low, high, fraction = neighbours(e, x.numpy())
    # Rounding up is monotone in noise. So if noise below f - 2^-24 rounds up and noise above f + 2^-24 down, the share
    # of the 2^24 noise values that round up is f to within 2^-24.
    for index, expected in (
        (np.ceil(fraction * LATTICE) - 2, high),
        (np.floor(fraction * LATTICE) + 1, low),
    ):
        inside = (index >= 0) & (index < LATTICE)
        noise = torch.from_numpy(index[inside] / LATTICE).to(torch.float32)
        np.testing.assert_array_equal(e.decode(e.encode(x[inside], noise)).numpy(), expected[inside])


@each_code
def test_stochastic_rounding_is_unbiased(e):
    targets = torch.tensor([0.3, 0.77, 0.015]) * e.max if e is not INT1 else torch.tensor([-0.3, -0.77, -0.015])
    count = 2**17
    noise = torch.rand(count, generator=torch.Generator().manual_seed(11))
    for target in targets:
        low, high, fraction = neighbours(e, target.reshape(1).numpy())
        values = e.decode(e.encode(target.expand(count), noise)).to(torch.float64)
        assert set(values.unique().tolist()) <= {float(low[0]), float(high[0])}
        deviation = float(abs(high[0] - low[0]) * math.sqrt(fraction[0] * (1 - fraction[0]) / count))
        # Four and a half standard errors: one in 150,000 by chance, and the seed is fixed.
        assert abs(float(values.mean()) - float(target)) <= 4.5 * deviation + 1e-12 * e.max


@each_code
def test_nan_rounds_stochastically_as_it_does_to_nearest(e):
    nan = torch.full((4,), torch.nan)
    values = e.decode(e.encode(nan, torch.tensor([0.0, 0.25, 0.5, 1 - 2.0**-24])))
    assert bool(torch.isnan(values).all() if e.has_nan else (values == 0).all())


@pytest.mark.parametrize("e", [E8M0, BFLOAT16, FLOAT32], ids=lambda e: e.name)
def test_elements_that_hold_no_codes_refuse_noise(e):
    with pytest.raises(FormatError, match=f"stochastic rounding to {e.name}"):
        e.encode(torch.ones(2), torch.zeros(2))


@pytest.mark.parametrize("e", [INT8, E4M3FN, E2M1], ids=lambda e: e.name)
def test_encode_leaves_its_input_alone(e):
    x = torch.tensor([1.4, -700.0, torch.nan, 0.2])
    before = x.clone()
    e.encode(x)
    e.encode(x, torch.rand(4))
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))
