"""Scales of blocks, codes of elements and back, and packing, for every format: Triton functions that kernels share.

All give the bits of `lowbit.numerics`. Integers do what hardware may not have (8-bit floats before compute capability
8.9) or what Triton's interpreter rounds otherwise (bfloat16); a `Spec` says when a compiled kernel has it natively.

Kernels that use them are launched with `enable_fp_fusion=False`.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.element import Element, exponent_and_mantissa
from lowbit.format import Format
from lowbit.numerics import DEFAULT_MODE, ScaleMode, amax_divisor, mantissa_bound
from lowbit.packing import unit


@dataclass(frozen=True, slots=True)
class Spec:
    """A format, and how its scales are chosen, in the numbers that kernels are compiled for; see `spec`."""

    element: Element
    scale: Element
    # Whether there are zero points, and whether these are signed.
    zero: bool
    signed_zero: bool
    tensor: bool
    # What amax, or the range of values with a zero point, is divided by.
    divisor: float
    # Exponent of the element's largest value, and the mantissa of amax beyond which an e8m0 scale is one larger.
    top: int
    bound: int
    # Bits, as float32, of the smallest and the largest scale.
    least: int
    most: int
    # As `top` and `bound`, of an amax of the whole matrix, for the tensor scale.
    tensor_top: int
    tensor_bound: int
    # Codes of the shortest run that ends on a byte boundary, and its bytes.
    run: int
    run_bytes: int
    # Whether the hardware converts to bfloat16 and 8-bit floats, and whether `tl.fma` rounds once.
    native: bool
    fused: bool


@lru_cache(maxsize=1024)
def spec(fmt: Format, mode: ScaleMode = DEFAULT_MODE, device: torch.device | None = None) -> Spec:
    """What kernels on `device` (None: Triton's interpreter) are compiled for."""
    element, whole = fmt.element, exponent_and_mantissa(fmt.element.max * fmt.scale.max if fmt.tensor_scale else 1.0)
    native = device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return Spec(
        element=element,
        scale=fmt.scale,
        zero=fmt.zero is not None,
        signed_zero=fmt.zero is not None and fmt.zero.signed,
        tensor=fmt.tensor_scale,
        divisor=element.max - element.min if fmt.zero is not None else amax_divisor(element),
        top=exponent_and_mantissa(element.max)[0],
        bound=mantissa_bound(element, mode),
        least=_bits(fmt.scale.smallest),
        most=_bits(fmt.scale.max),
        tensor_top=whole[0],
        tensor_bound=whole[1],
        run=unit(element.bits)[0],
        run_bytes=unit(element.bits)[1],
        native=native,
        fused=device is not None,
    )


def _bits(value: float) -> int:
    exponent, mantissa = exponent_and_mantissa(value)
    return ((exponent + 127) << 23) + mantissa


def raw(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it: bfloat16 and 8-bit numbers as integers of their bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


@triton.jit
def to_float32(x):
    """Float32 of what `raw` gave of a float32, float16 or bfloat16 tensor."""
    if x.dtype == tl.int16:
        value = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def from_float32(x, like: tl.constexpr, SPEC: tl.constexpr):
    """Float32 `x` rounded once to what a pointer of type `like`, to a `raw` tensor, takes."""
    if like != tl.int16:
        value = x.to(like)
    elif SPEC.native:
        value = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
    return value


@triton.jit
def ordered(x):
    """Int32 that orders as float32 `x` does; a NaN lies beyond the infinity of its sign."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(bits):
    """Float32 of what `ordered` gave."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """Int32 that orders as |x| does, a NaN above all; its bits are |x| in float32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of_amax(amax, tensor_scale, SPEC: tl.constexpr):
    """Of the float32 largest magnitudes of blocks: scales as stored (`raw`), and float32 `scale * tensor_scale`.

    `tensor_scale` is read where the format has one.
    """
    if SPEC.scale.powers_of_two:
        bits = amax.to(tl.int32, bitcast=True)
        code = (bits >> 23) - SPEC.top + ((bits & 0x7FFFFF) > SPEC.bound).to(tl.int32)
        stored = tl.where(bits < 0x7F800000, tl.minimum(tl.maximum(code, 0), 254), 255).to(tl.uint8)
    else:
        scale = tl.div_rn(amax, SPEC.divisor)
        if SPEC.tensor:
            scale = tl.div_rn(scale, tensor_scale)
        stored = _store_scale(scale, SPEC)
    return stored, scale_value(stored, tensor_scale, SPEC)


@triton.jit
def tensor_scale_of_amax(amax, SPEC: tl.constexpr):
    """Float32 tensor scales of the largest finite magnitudes (`magnitude`) in whole matrices."""
    exponent = (amax >> 23) - 127 - SPEC.tensor_top + ((amax & 0x7FFFFF) > SPEC.tensor_bound).to(tl.int32)
    scale = ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(amax > 0, scale, 1.0)


@triton.jit
def scale_of_range(low, high, SPEC: tl.constexpr):
    """Of the float32 smallest and largest values of blocks: scales as stored, their float32, and float32 zero points.

    A NaN among the values has to be in `low` or `high`.
    """
    low = tl.where(low > 0, 0.0, low)
    high = tl.where(high < 0, 0.0, high)
    stored = _store_scale(tl.div_rn(high, SPEC.divisor) - tl.div_rn(low, SPEC.divisor), SPEC)
    scale = scale_value(stored, 1.0, SPEC)
    zero = SPEC.element.min - _round_to_even(_within(tl.div_rn(low, scale)))
    zero = tl.minimum(tl.maximum(zero, SPEC.element.min), SPEC.element.max)
    return stored, scale, tl.where(scale == scale, zero, 0.0)


@triton.jit
def scale_value(stored, tensor_scale, SPEC: tl.constexpr):
    """Float32 `scale * tensor_scale` of scales as stored."""
    if SPEC.scale.powers_of_two:
        code = stored.to(tl.int32)
        # 2^-127 is a subnormal.
        bits = tl.where(code == 0, 0x400000, tl.where(code == 255, 0x7FC00000, code << 23))
        scale = bits.to(tl.float32, bitcast=True)
    elif SPEC.scale.bits == 8:
        ELEMENT: tl.constexpr = SPEC.scale
        scale = decode(stored, ELEMENT)
    else:
        scale = to_float32(stored)
    if SPEC.tensor:
        scale *= tensor_scale
    return scale


@triton.jit
def divisor_of(scale, SPEC: tl.constexpr):
    """What `divide` takes in the place of a scale: of a power of two, the reciprocal, which is exact."""
    by = scale
    if SPEC.scale.powers_of_two:
        bits = scale.to(tl.int32, bitcast=True)
        # Those of 2^127 and 2^-127 are 2^-127, a subnormal, and 2^127.
        inverse = tl.where(bits == 254 << 23, 0x400000, tl.where(bits == 0x400000, 254 << 23, (254 << 23) - bits))
        by = tl.where(bits < 0x7F800000, inverse, 0x7FC00000).to(tl.float32, bitcast=True)
    return by


@triton.jit
def divide(x, by, SPEC: tl.constexpr):
    """IEEE `x / scale`, where `by` is `divisor_of(scale)`."""
    if SPEC.scale.powers_of_two:
        value = x * by
    else:
        value = tl.div_rn(x, by)
    return value


@triton.jit
def divides_fast(scale, amax):
    """Whether `divide_fast` gives the codes that IEEE division does: in all blocks of these scales and amaxes (bits).

    Neither a quotient nor a remainder that a code depends on is then subnormal or infinite. NaN scales take anything.
    """
    size = magnitude(scale)
    near = (size > 67 << 23) & (size < 187 << 23) & (amax < 187 << 23)
    return tl.min((near | (amax >= 0x7F800000)).to(tl.int32)) == 1


@triton.jit
def divide_fast(x, scale, inverse):
    """`x / scale`, given IEEE `1 / scale`: a first quotient, within an ulp after one correction, exact after two.

    Source: Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", theorem 8.2.
    """
    quotient = x * inverse
    for _ in tl.static_range(2):
        # This sign of the remainder keeps that of a negative zero.
        beyond = tl.fma(quotient, scale, -x)
        quotient = tl.fma(-beyond, inverse, quotient)
    return quotient


@triton.jit
def encode(x, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes, in the lowest bits of a uint8, of float32 `x` in units of the scale; see `Element.encode`.

    `zero` is read where the format has zero points, `noise` where rounding is stochastic.
    """
    if SPEC.element.kind == "float":
        ELEMENT: tl.constexpr = SPEC.element
        NATIVE: tl.constexpr = SPEC.native
        code = encode_float(x, noise, ELEMENT, NATIVE, STOCHASTIC)
    else:
        # Beyond these bounds nothing but an end of the range is near, and within them float32 has every integer.
        value = _within(x)
        if STOCHASTIC:
            floor = tl.floor(value)
            value = floor + (value - floor > noise).to(tl.float32)
        else:
            value = _round_to_even(value)
        if SPEC.zero:
            value += zero
        value = tl.where(x == x, value, 0.0)
        value = tl.minimum(tl.maximum(value, SPEC.element.min), SPEC.element.max)
        code = (value.to(tl.int32) & ((1 << SPEC.element.bits) - 1)).to(tl.uint8)
    return code


@triton.jit
def encode_float(x, noise, ELEMENT: tl.constexpr, NATIVE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes as uint8 of float32 `x` in a float element of at most 8 bits."""
    # Triton's conversions saturate, infinities too.
    if NATIVE and not STOCHASTIC and ELEMENT.name == "e4m3fn":
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif NATIVE and not STOCHASTIC and ELEMENT.name == "e5m2":
        code = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), ELEMENT.max)
        # Field of the exponent, no lower than that of the element's subnormals.
        LOWEST: tl.constexpr = 128 - ELEMENT.bias
        field = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, LOWEST)
        if STOCHASTIC:
            exact = size * ((254 + ELEMENT.mantissa - field) << 23).to(tl.float32, bitcast=True)
            floor = tl.floor(exact)
            steps = floor.to(tl.int32) + (exact - floor > noise).to(tl.int32)
        else:
            # Float32 numbers from here on are as far apart as the element's around x: the sum rounds as it does.
            shifter = (field + (23 - ELEMENT.mantissa)) << 23
            steps = (size + shifter.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - shifter
        # A carry out of the steps ends up in the exponent by itself.
        steps += (field - LOWEST) << ELEMENT.mantissa
        steps |= (bits >> (32 - ELEMENT.bits)) & (1 << (ELEMENT.bits - 1))
        NAN: tl.constexpr = (1 << (ELEMENT.bits - 1)) - 1 if ELEMENT.has_nan else 0
        code = tl.where(x == x, steps, NAN).to(tl.uint8)
    return code


@triton.jit
def decode(code, ELEMENT: tl.constexpr):
    """Exact float32 values of uint8 codes whose other bits are 0."""
    code = code.to(tl.int32)
    if ELEMENT.kind == "int":
        if ELEMENT.signed:
            code = (code << (32 - ELEMENT.bits)) >> (32 - ELEMENT.bits)
        value = code.to(tl.float32)
    else:
        size = code & ((1 << (ELEMENT.bits - 1)) - 1)
        # The fields as those of a float32, whose subnormals are the element's once the biases are made equal.
        value = (size << (23 - ELEMENT.mantissa)).to(tl.float32, bitcast=True) * 2.0 ** (127 - ELEMENT.bias)
        bits = value.to(tl.int32, bitcast=True)
        if ELEMENT.name == "e4m3fn":
            bits = tl.where(size == 0x7F, 0x7FC00000, bits)
        if ELEMENT.name == "e5m2":
            bits = tl.where(size > 0x7C, 0x7FC00000, tl.where(size == 0x7C, 0x7F800000, bits))
        value = (bits | ((code >> (ELEMENT.bits - 1)) << 31)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def merge(codes, SPEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes (ROWS, COLUMNS) of less than a byte, each run of `SPEC.run` in the lowest bits of one integer."""
    BITS: tl.constexpr = SPEC.element.bits
    if SPEC.run_bytes == 1:
        word = codes
    elif SPEC.run_bytes <= 4:
        word = codes.to(tl.int32)
    else:
        word = codes.to(tl.int64)
    first, second = tl.split(tl.reshape(word, (ROWS, COLUMNS // 2, 2)))
    word = first | (second << BITS)
    if SPEC.run >= 4:
        first, second = tl.split(tl.reshape(word, (ROWS, COLUMNS // 4, 2)))
        word = first | (second << (2 * BITS))
    if SPEC.run >= 8:
        first, second = tl.split(tl.reshape(word, (ROWS, COLUMNS // 8, 2)))
        word = first | (second << (4 * BITS))
    return word


@triton.jit
def split_apart(word, SPEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Undo `merge`: codes (ROWS, COLUMNS) of integers that hold a run each."""
    BITS: tl.constexpr = SPEC.element.bits
    if SPEC.run >= 8:
        word = tl.reshape(tl.join(word, word >> (4 * BITS)), (ROWS, COLUMNS // 4))
    if SPEC.run >= 4:
        word = tl.reshape(tl.join(word, word >> (2 * BITS)), (ROWS, COLUMNS // 2))
    word = tl.reshape(tl.join(word, word >> BITS), (ROWS, COLUMNS))
    return (word & ((1 << BITS) - 1)).to(tl.uint8)


@triton.jit
def uniform(seed, starts, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """`lowbit.philox.uniform` (ROWS, COLUMNS) of elements at `starts + column`, int64 (ROWS, 1).

    Where all `starts` are multiples of 4 (ALIGNED), each counter is used for four elements, otherwise for one.
    """
    if ALIGNED:
        counter = (starts >> 2) + tl.arange(0, COLUMNS // 4)[None, :]
    else:
        counter = (starts + tl.arange(0, COLUMNS)[None, :]) >> 2
    low = counter.to(tl.int32)
    high = (counter >> 32).to(tl.int32)
    none = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, none, none)
    if ALIGNED:
        word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    else:
        lane = (starts + tl.arange(0, COLUMNS)[None, :]) & 3
        word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _store_scale(scale, SPEC: tl.constexpr):
    """Float32 scales as stored: 1 for 0 (a block of zeros), no less than the smallest, NaN where not finite."""
    # As integers, whose order is the same: a float32 subnormal is no constant that every Triton takes.
    bits = scale.to(tl.int32, bitcast=True)
    kept = tl.where(scale == 0, 0x3F800000, tl.minimum(tl.maximum(bits, SPEC.least), SPEC.most))
    kept = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, kept, 0x7FC00000).to(tl.float32, bitcast=True)
    if SPEC.scale.name == "float16":
        stored = kept.to(tl.float16)
    elif SPEC.scale.name == "bfloat16":
        stored = from_float32(kept, tl.int16, SPEC)
    elif SPEC.scale.bits == 8:
        ELEMENT: tl.constexpr = SPEC.scale
        NATIVE: tl.constexpr = SPEC.native
        stored = encode_float(kept, kept, ELEMENT, NATIVE, False)
    else:
        stored = kept
    return stored


@triton.jit
def _within(x):
    return tl.minimum(tl.maximum(x, -65536.0), 65536.0)


@triton.jit
def _round_to_even(x):
    """Integers nearest to |x| of up to 2^22: beyond 1.5 * 2^23, float32 has no others."""
    return (x + 12582912.0) - 12582912.0
