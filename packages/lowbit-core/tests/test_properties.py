"""What holds for every format, shape and value: rounding, cutting, joining, reordering and storing, by hypothesis.

A run draws the same examples each time. `LOWBIT_EXAMPLES=500 pytest packages/lowbit-core/tests/test_properties.py` draws
that many for each property and format, other ones each time.
"""

from __future__ import annotations

import copy
import io
import os
from itertools import pairwise
from math import prod

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit import FormatError, QuantizedTensor, load, quantize, save
from lowbit.packing import unit, unpack
from lowbit.testing import FORMAT_GRID

EXAMPLES = os.environ.get("LOWBIT_EXAMPLES")
MODES = ("even", "floor", "ceil", "rceil")
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
# The largest value of a block may round up by a step, which is to stay inside float32.
HUGE = 2.0**126
NORMAL = 2.0**-126

each_format = pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
holds = settings(
    max_examples=int(EXAMPLES or 12),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# What is drawn.


def fits(fmt, rank):
    try:
        return bool(fmt.block_for(rank))
    except FormatError:
        return False


@st.composite
def shapes(draw, fmt):
    """A canonical shape that `fmt` takes: empty and single dims, whole groups, partial 2-D blocks, odd rows."""
    rank = draw(st.sampled_from([rank for rank in (2, 3, 1, 4) if fits(fmt, rank)]))
    block = fmt.block_for(rank)
    grouped = all(b == 1 for b in block[:-1])
    lengths = []
    for dim, b in enumerate(block):
        if b > 1 and grouped:
            lengths.append(b * draw(st.integers(0, 3)))
        elif b > 1:
            lengths.append(draw(st.integers(0, 2 * b + 1)))
        else:
            lengths.append(draw(st.integers(0, 20 if dim == rank - 1 else 4)))
    return tuple(lengths)


@st.composite
def values(draw, shape, dtype=torch.float32):
    """Finite values: a few drawn ones (zeros, subnormals, huge), normal ones of any size, halves of a power of two."""
    few = torch.tensor(draw(st.lists(st.floats(-HUGE, HUGE, width=32), min_size=1, max_size=6)))
    share = draw(st.sampled_from([0.02, 0.0, 0.5, 1.0]))
    exponent = draw(st.one_of(st.integers(-8, 8), st.integers(-150, 126)))
    halves = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = torch.randint(-3, 4, (*shape[:-1], 1), generator=generator)
    many = torch.ldexp((normal * 16).round() / 2 if halves else normal, exponent + spread)
    picks = few[torch.randint(len(few), shape, generator=generator)]
    mixed = torch.where(torch.rand(shape, generator=generator) < share, picks, many)
    limit = min(HUGE, torch.finfo(dtype).max)
    return mixed.clamp(-limit, limit).to(dtype)


def modes(fmt):
    return st.sampled_from(MODES if fmt.scale.name == "e8m0" else MODES[:1])


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def weights(draw, fmt):
    """A quantized tensor blocked along any axis and permuted, the block length of each of its dims, and that axis."""
    shape = draw(shapes(fmt))
    axis = draw(st.integers(0, len(shape) - 1))
    q = quantize(draw(values(shape, draw(dtypes))).movedim(-1, axis), fmt, axis=axis)
    block = list(fmt.block_for(len(shape)))
    block.insert(axis, block.pop())
    dims = draw(st.permutations(range(len(shape))))
    return q.permute(dims), [block[d] for d in dims], dims.index(axis)


# How results are compared.


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def check_values(result, expected):
    """The same values to the bit, the sign of zero and the dtype."""
    plain = result.dequantize() if isinstance(result, QuantizedTensor) else result
    assert (plain.shape, plain.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(plain), bits(expected))


def check_same(result, expected):
    """The same stored bytes, read the same way."""
    assert type(result) is QuantizedTensor
    assert result.storage_layout == expected.storage_layout
    assert result.shape == expected.shape
    assert result.inner_tensors().keys() == expected.inner_tensors().keys()
    for name, part in expected.inner_tensors().items():
        found = getattr(result, name)
        assert (found.dtype, found.shape) == (part.dtype, part.shape), name
        assert torch.equal(bits(found), bits(part)), name


def codes_of(q):
    """Values of the codes in canonical order, float64."""
    return q.format.element.decode(unpack(q.qdata, q.format.element, q.canonical_shape[-1])).to(torch.float64)


def spread_of(part, q):
    """What each value's block has of `part` (natural shape), in canonical order, float64."""
    part = part.to(torch.float32).to(torch.float64).expand(q.format.scale_shape(q.canonical_shape))
    for dim, (b, n) in enumerate(zip(q.format.block_of(q.canonical_shape), q.canonical_shape, strict=True)):
        part = part.repeat_interleave(b, dim).narrow(dim, 0, n)
    return part


def total_of(q):
    """Each value's `scale [* tensor_scale]`."""
    scale = spread_of(q.scale, q)
    return scale if q.tensor_scale is None else scale * spread_of(q.tensor_scale, q)


def block_max(x, q):
    """Largest value in each value's block of x, float64; x is canonical."""
    for dim, b in enumerate(q.format.block_of(q.canonical_shape)):
        if x.shape[dim]:
            x = torch.cat([part.amax(dim, keepdim=True).expand_as(part) for part in x.split(b, dim)], dim)
    return x


def grid_of(element):
    """The element's values in order, float64."""
    if element.kind == "int":
        return torch.arange(int(element.min), int(element.max) + 1, dtype=torch.float64)
    every = np.arange(2**element.bits, dtype=np.uint8).view(FLOATS[element.name]).astype(np.float64)
    return torch.from_numpy(np.unique(every[np.isfinite(every)]))


# Rounding.


@each_format
@holds
@given(data=st.data())
def test_quantizing_again_under_the_same_scales_changes_nothing(fmt, data):
    shape = data.draw(shapes(fmt))
    x = data.draw(values(shape, data.draw(dtypes)))
    q = quantize(x, fmt, mode=data.draw(modes(fmt)))
    v = q.dequantize(torch.float32)
    again = quantize(v, fmt, q.scale, q.zero, q.tensor_scale)
    check_values(again.dequantize(), v)
    # A step below float32's smallest value is one that several codes round to alike.
    held = total_of(q) * fmt.element.smallest >= 2.0**-148
    assert torch.equal(bits(codes_of(again))[held], bits(codes_of(q))[held])
    if x.dtype == torch.bfloat16:
        # Eight bits of mantissa still tell 256 codes apart: |code - zero| 2^-9 < 1/2.
        rounded = quantize(q.dequantize(), fmt, q.scale, q.zero, q.tensor_scale)
        held = total_of(q) * fmt.element.smallest >= NORMAL
        assert torch.equal(bits(codes_of(rounded))[held], bits(codes_of(q))[held])


@each_format
@holds
@given(data=st.data())
def test_quantizing_again_with_a_scale_of_its_own(fmt, data):
    """Values v = dequantize(q) choose scales anew. These are the old ones only where the largest code says so.

    e8m0, by the mode: `floor` and `even` put the block's largest code into [2^p, max], 2^p the leading power of max. Its
    exponent is p again and it needs no rounding, so all bits stay; but under `floor` an integer may saturate at min,
    -2^(p+1), which doubles the scale. `ceil` and `rceil` may round the largest code down to exactly half of what fits;
    the scale is then halved and every code doubled, which changes no value.

    Tensor scales: s t with s = e4m3fn(amax / 6 / t) keeps the largest code at 6 for s >= 2^-7, where rounding moves s by
    less than 1/6, and 6 s t / 6 / t is s. t may halve where the largest s was rounded down to 224; all s then double.
    Below 2^-7 a step of s is so wide that the largest code may be 4, and its scale 4/6 of what it was.

    Floats with a float32 scale: the largest code is max = 7 * 2^i, and RN(RN(7 s) / 7) may miss s by an ulp, since
    RN(7 s) is off by up to 4 ulp(s) and 4/7 > 1/2. That needs s = 4 modulo 8 ulps, so it happens once: the new s is 3 or
    5 and comes back. An ulp moves no code.

    Symmetric integers: s = amax / L with L = max + 1/2, so that amax becomes max or min = -(max + 1), and s turns into
    s max / L or s (max + 1) / L. That moves a code c by |c| / (2 max) or less: not to another one, but for -max, which
    may tie with min, and for min, which may return.

    Zero points: a block that reaches both min and max has the range max - min steps again. Float32 rounds four times on
    the way to s, a 16-bit scale hides that; zero and codes stay. A block may also miss max by one, as both ends of its
    range are rounded to whole steps; its scale then shrinks.
    """
    shape = data.draw(shapes(fmt))
    mode = data.draw(modes(fmt))
    q = quantize(data.draw(values(shape, data.draw(dtypes))), fmt, mode=mode)
    v = q.dequantize(torch.float32)
    again = quantize(v, fmt, mode=mode)
    element, codes, new = fmt.element, codes_of(q), codes_of(again)
    scale, fresh = spread_of(q.scale, q), spread_of(again.scale, q)
    if fmt.scale.name == "e8m0":
        kept = block_max(-codes, q) != 2.0 ** (element.max_exponent + 1)
        assert torch.equal(bits(again.dequantize())[kept], bits(v)[kept])
        if mode in {"floor", "even"}:
            assert torch.equal(fresh[kept], scale[kept])
            assert torch.equal(bits(new)[kept], bits(codes)[kept])
        if mode != "floor" or element.kind == "float":
            assert bool(kept.all())
        return
    if fmt.tensor_scale:
        kept = scale >= 2.0**-7
        assert torch.equal(bits(new)[kept], bits(codes)[kept])
        assert torch.equal(bits(again.dequantize())[kept], bits(v)[kept])
        return
    # Subnormal scales are rounded by more than their mantissa says, and a float16 scale may be too small for its block.
    smallest = {"float16": 2.0**-14}.get(fmt.scale.name, 2 * NORMAL)
    normal = (scale >= smallest) & (fresh >= smallest) & (scale < fmt.scale.max)
    if element.kind == "float":
        assert torch.equal(bits(new)[normal], bits(codes)[normal])
        assert bool(((fresh - scale).abs() <= 2.0**-23 * scale)[normal].all())
        third = quantize(again.dequantize(), fmt)
        assert torch.equal(bits(third.dequantize())[normal], bits(again.dequantize())[normal])
    elif fmt.zero is None:
        end = normal & (codes <= element.min + 1)
        assert torch.equal(new[normal & ~end], codes[normal & ~end])
        assert bool((new[end] <= element.min + 1).all())
    else:
        ends = normal & (block_max(codes, q) == element.max) & (block_max(-codes, q) == -element.min)
        assert bool(((fresh - scale).abs() <= (2.0**-22 * scale if fmt.scale.bits == 32 else 0 * scale))[ends].all())
        assert torch.equal(spread_of(again.zero, q)[ends], spread_of(q.zero, q)[ends])
        assert torch.equal(new[ends], codes[ends])


@each_format
@holds
@given(data=st.data())
def test_quantizing_is_monotone_under_one_scale(fmt, data):
    """x <= y in one place, so under one scale, gives values in that order."""
    shape = data.draw(shapes(fmt))
    q = quantize(data.draw(values(shape)), fmt, mode=data.draw(modes(fmt)))
    a, b = data.draw(values(shape)), data.draw(values(shape))
    # Neighbours among the codes, where the order is most easily lost.
    near = q.dequantize() + total_of(q).to(torch.float32) * fmt.element.smallest * a.sign() / 2
    for x, y in ((a, b), (near, near.nextafter(torch.tensor(torch.inf))), (near, near + near.abs() / 16)):
        low, high = (
            quantize(pick(x, y), fmt, q.scale, q.zero, q.tensor_scale).dequantize()
            for pick in (torch.minimum, torch.maximum)
        )
        assert bool((low <= high).all())


@each_format
@holds
@given(data=st.data())
def test_the_error_is_within_half_a_step_of_the_block(fmt, data):
    """|x - value| <= half the step of the element's grid around x, times the stored scale, in float64.

    Past the ends of the grid it is half the last step and what the scale falls short. Under e8m0 that is nothing for
    `ceil` and `rceil`, which reach amax, and less than 2^(p+1) - max - step / 2 scales for `floor`, which takes all up
    to 2^(p+1) for max. `even` stops half a step before 2^(p+1), so it saturates only in e4m3fn, whose grid stops a step
    before that. Other scales are `amax / L` or `(max(x, 0) - min(x, 0)) / L` rounded to nearest: they fall short by half
    an ulp of theirs, L times.
    """
    shape, mode = data.draw(shapes(fmt)), data.draw(modes(fmt))
    stored = data.draw(values(shape, data.draw(dtypes)))
    q = quantize(stored, fmt, mode=mode)
    x, element, total = stored.to(torch.float64), fmt.element, total_of(q)
    zero = 0 if q.zero is None else spread_of(q.zero, q)
    grid = grid_of(element)
    above = torch.searchsorted(grid, x / total + zero).clamp(1, len(grid) - 1)
    half = (grid[above] - grid[above - 1]) / 2 * total
    if fmt.scale.name == "e8m0":
        largest, step = grid[-1].item(), (grid[-1] - grid[-2]).item()
        power = 2.0 ** int(np.floor(np.log2(largest)) + 1)
        short = {"floor": power - largest - step / 2, "even": power - largest - step}.get(mode, 0.0) * total
    else:
        short = shortfall(x, q)
    error = (q.dequantize(torch.float32).to(torch.float64) - x).abs()
    # Float32 rounds the quotient and the product.
    assert bool((error <= half + short + 2.0**-23 * (x.abs() + half + short) + 2.0**-149).all())


def shortfall(x, q):
    """How far L stored scales of each block are from what they were to reach, after a check that they are the nearest."""
    element, s = q.format.element, q.format.scale
    if q.zero is None:
        reach, steps = block_max(x.abs(), q), element.max + 0.5 if element.kind == "int" else element.max
    else:
        reach, steps = block_max(x.clamp_min(0), q) + block_max((-x).clamp_min(0), q), element.max - element.min
    scale = spread_of(q.scale, q)
    tensor = total_of(q) / scale
    ideal = reach / steps / tensor
    exponent = (torch.frexp(ideal).exponent - 1).clamp(1 - s.bias, s.max_exponent)
    ulp = torch.ldexp(torch.ones_like(ideal), exponent - s.mantissa)
    off = (scale - ideal.clamp(s.smallest, s.max)).abs()
    # `reach / steps` is rounded to float32 first, a subnormal by more, and to no scale at all that is stored as 1.
    assert bool(((off <= ulp / 2 + 2.0**-22 * ideal) | (reach / steps < NORMAL)).all())
    assert bool((scale == 1)[reach == 0].all())
    return steps * ((ideal - scale) * tensor).clamp_min(0)


# Cuts, joins and orders.


def cut(dim, *bounds):
    return (slice(None),) * dim + (slice(*bounds),)


@each_format
@holds
@given(data=st.data())
def test_slicing_commutes_with_dequantizing_or_is_refused(fmt, data):
    q, blocks, _ = data.draw(weights(fmt))
    for _ in range(2):
        dim = data.draw(st.integers(0, q.dim() - 1))
        n, block = q.shape[dim], blocks[dim]
        multiple = st.sampled_from(range(0, n + 1, max(block, 8)))
        bound = st.one_of(st.none(), multiple, st.integers(-n - 1, n + 1))
        bounds = data.draw(bound), data.draw(bound), data.draw(st.sampled_from([1, 1, 2, 3]))
        start, end, step = slice(*bounds).indices(n)
        index = cut(dim, *bounds)
        if start >= end or block <= 1 or (step == 1 and start % block == 0 and (end % block == 0 or end == n)):
            check_values(q[index], q.dequantize()[index])
            q = q[index]
        else:
            with pytest.raises(FormatError, match="cuts through block"):
                q[index]


@each_format
@holds
@given(data=st.data())
def test_cat_of_slices_is_the_original(fmt, data):
    q, blocks, _ = data.draw(weights(fmt))
    dim = data.draw(st.integers(0, q.dim() - 1))
    n, step = q.shape[dim], max(blocks[dim], 1)
    cuts = sorted(data.draw(st.lists(st.integers(0, n // step).map(lambda i: i * step), max_size=4)))
    ends = [0, *cuts, n]
    sizes = [b - a for a, b in pairwise(ends)]
    size = step * data.draw(st.integers(1, n // step + 1))
    plain = q.dequantize()
    ways = [
        ([q[cut(dim, a, b)] for a, b in pairwise(ends)], plain.split(sizes, dim)),
        (q.split(sizes, dim), plain.split(sizes, dim)),
        (q.split(size, dim), plain.split(size, dim)),
    ]
    if blocks[dim] <= 1:
        count = data.draw(st.integers(1, n + 1))
        ways.append((q.chunk(count, dim), plain.chunk(count, dim)))
    for pieces, expected in ways:
        for piece, part in zip(pieces, expected, strict=True):
            check_values(piece, part)
        check_same(torch.cat(pieces, dim), q)


@each_format
@holds
@given(data=st.data())
def test_permute_and_its_inverse_is_identity(fmt, data):
    q, _, _ = data.draw(weights(fmt))
    dims = data.draw(st.permutations(range(q.dim())))
    moved = q.permute(dims)
    check_values(moved, q.dequantize().permute(dims))
    check_same(moved.permute([dims.index(d) for d in range(q.dim())]), q)
    a, b = data.draw(st.integers(-q.dim(), q.dim() - 1)), data.draw(st.integers(-q.dim(), q.dim() - 1))
    check_values(q.transpose(a, b), q.dequantize().transpose(a, b))
    check_same(q.transpose(a, b).transpose(a, b), q)


@each_format
@holds
@given(data=st.data())
def test_select_and_unbind_commute_with_dequantizing_or_are_refused(fmt, data):
    q, blocks, axis = data.draw(weights(fmt))
    dim = data.draw(st.integers(0, q.dim() - 1))
    n = q.shape[dim]
    if n == 0:
        return
    index = data.draw(st.integers(-n, n - 1))
    if dim == axis or blocks[dim] > 1:
        with pytest.raises(FormatError, match="takes one value out of block"):
            q.select(dim, index)
        return
    check_values(q.select(dim, index), q.dequantize().select(dim, index))
    for part, plain in zip(q.unbind(dim), q.dequantize().unbind(dim), strict=True):
        check_values(part, plain)


@each_format
@holds
@given(data=st.data())
def test_views_keep_values_and_lead_back(fmt, data):
    """Dims in front of every block come, go, split and merge; a row splits into runs of whole groups."""
    shape = data.draw(shapes(fmt))
    q = quantize(data.draw(values(shape, data.draw(dtypes))), fmt)
    block = fmt.block_for(len(shape))
    free = next(i for i, b in enumerate((*block[:-1], 0)) if b != 1)
    dim = data.draw(st.integers(0, free))
    views = [(*shape[:dim], 1, *shape[dim:]), (1, *shape), (prod(shape[:free]), *shape[free:])][: 3 if free else 2]
    run = unit(fmt.element.bits)[0] if fmt.element.packed else 1
    if fmt.block[:-1] == (1,) and block[-1] > 1 and block[-1] % run == 0 and not fmt.tensor_scale:
        views.append((*shape[:-1], shape[-1] // block[-1], block[-1]))
    check_values(q.unsqueeze(dim), q.dequantize().unsqueeze(dim))
    check_values(q.unsqueeze(dim).view(shape), q.dequantize())
    for other in views:
        moved = q.view(other)
        check_values(moved, q.dequantize().view(other))
        check_values(moved.view(shape), q.dequantize())
        for name in {"qdata", "scale", "zero"} & q.inner_tensors().keys():
            back, part = getattr(moved.view(shape), name), getattr(q, name)
            assert torch.equal(bits(back), bits(part)), name
            assert back.data_ptr() == part.data_ptr(), name


# Storage.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


@each_format
@holds
@given(data=st.data())
def test_storing_and_copying_are_exact(fmt, data, folder):
    q, blocks, _ = data.draw(weights(fmt))
    dim = data.draw(st.integers(0, q.dim() - 1))
    step = max(blocks[dim], 1)
    q = q[cut(dim, data.draw(st.integers(0, q.shape[dim] // step)) * step, None)]
    save({"weight": q, "tied": q, "plain": q.dequantize()}, folder / "weights.safetensors")
    loaded = load(folder / "weights.safetensors")
    check_same(loaded["weight"], q)
    assert loaded["tied"] is loaded["weight"]
    check_values(loaded["plain"], q.dequantize())
    pickled = io.BytesIO()
    torch.save(q, pickled)
    pickled.seek(0)
    check_same(torch.load(pickled, weights_only=True), q)
    check_same(copy.deepcopy(q), q)
