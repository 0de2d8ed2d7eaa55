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


# Four float32 to the bytes of an int32, on hardware that converts to 8-bit floats; infinities become the largest number.
_FLOAT8 = (
    "{{ .reg .b16 low, high; cvt.rn.satfinite.{0}.f32 low, $2, $1; "
    "cvt.rn.satfinite.{0}.f32 high, $4, $3; mov.b32 $0, {{low, high}}; }}"
)


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
    # Whether the hardware converts to bfloat16, and whether `tl.fma` rounds once.
    native: bool
    fused: bool
    # PTX that converts to four codes at once, or "".
    convert: str


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
        convert=_FLOAT8.format({"e4m3fn": "e4m3x2", "e5m2": "e5m2x2"}[element.name])
        if native and element.name in {"e4m3fn", "e5m2"}
        else "",
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
def scale_of_amax(amax, tensor_scale, SPEC: tl.constexpr, TENSOR: tl.constexpr):
    """Of the float32 largest magnitudes of blocks: scales as stored (`raw`), and float32 `scale * tensor_scale`.

    `tensor_scale` is read where the format has one. TENSOR is "rows" if it is a tensor, "amax" if a power of two.
    """
    if SPEC.scale.powers_of_two:
        bits = amax.to(tl.int32, bitcast=True)
        code = (bits >> 23) - SPEC.top + ((bits & 0x7FFFFF) > SPEC.bound).to(tl.int32)
        stored = tl.where(bits < 0x7F800000, tl.minimum(tl.maximum(code, 0), 254), 255).to(tl.uint8)
        scale = scale_value(stored, tensor_scale, SPEC)
    else:
        # Of tensor scales that are far from both ends, so are scales that are not at one of theirs.
        if SPEC.tensor and SPEC.fused and TENSOR != "rows":
            if (tensor_scale > 2.0**-100) & (tensor_scale < 2.0**100):
                by = tl.div_rn(1.0, tensor_scale)
                scale = _quotient(amax, SPEC.divisor, 1 / SPEC.divisor, 1)
                scale = scale * by if TENSOR == "amax" else _quotient(scale, tensor_scale, by, 2)
            else:
                scale = tl.div_rn(tl.div_rn(amax, SPEC.divisor), tensor_scale)
        else:
            scale = tl.div_rn(amax, SPEC.divisor)
            if SPEC.tensor:
                scale = tl.div_rn(scale, tensor_scale)
        stored, scale = _store_scale(scale, SPEC)
        if SPEC.tensor:
            scale *= tensor_scale
    return stored, scale


@triton.jit
def _quotient(x, by, inverse, CORRECTIONS: tl.constexpr):
    """`x / by` of positive numbers, given the nearest to `1 / by`: as `divide`, where no remainder is subnormal."""
    value = x * inverse
    for _ in tl.static_range(CORRECTIONS):
        value = tl.fma(tl.fma(value, -by, x), inverse, value)
    return value


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
    stored, scale = _store_scale(tl.div_rn(high, SPEC.divisor) - tl.div_rn(low, SPEC.divisor), SPEC)
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
def divisor_of(scale, SPEC: tl.constexpr, FAST: tl.constexpr, SHORT: tl.constexpr):
    """What `divide` takes in the place of a scale, three tensors.

    Of a power of two, the reciprocal, which is exact; otherwise, if FAST, `-p`, `scale * p` and `-1 / (scale * p)` with
    the power of two `p` that makes the second at least 1 and less than 2, or as large as can be.
    """
    # Those of 2^127 and 2^-127 are 2^-127, a subnormal, and 2^127.
    bits = scale.to(tl.int32, bitcast=True)
    power = tl.maximum((254 << 23) - (bits & 0x7F800000), 0x400000)
    if SPEC.scale.powers_of_two:
        by = tl.where(bits < 0x7F800000, power, 0x7FC00000).to(tl.float32, bitcast=True)
        by = by, by, by
    elif FAST:
        power = power.to(tl.float32, bitcast=True)
        near = scale * power
        # Some ulps are as good where one correction is enough.
        by = -power, near, _reciprocal(-near) if SHORT else tl.div_rn(-1.0, near)
    else:
        by = scale, scale, scale
    return by


@triton.jit
def _reciprocal(x):
    """1 / x within an ulp, on a GPU."""
    return tl.inline_asm_elementwise("rcp.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def divide(x, by, SPEC: tl.constexpr, FAST: tl.constexpr, SHORT: tl.constexpr):
    """IEEE `x / scale`, where `by` is `divisor_of(scale)`.

    If FAST, a first quotient is corrected by its remainder, twice; once where scales have 16 or fewer bits of mantissa
    (SHORT), as no quotient of theirs is then near the middle of two numbers. Quotients below 2^-126 keep no more than
    their sign and that they are small, and those of infinities are NaN. The signs are such that zeros keep theirs.

    Source: Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", theorem 8.2.
    """
    if SPEC.scale.powers_of_two:
        value = x * by[0]
    elif FAST:
        x = x * by[0]
        value = x * by[2]
        value = tl.fma(tl.fma(value, by[1], x), by[2], value)
        if not SHORT:
            value = tl.fma(tl.fma(value, by[1], x), by[2], value)
    else:
        value = tl.div_rn(x, by[0])
    return value


@triton.jit
def encode(x, ok, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes of float32 `x` in units of the scale, in the lowest bits of an int32 whose others mean nothing.

    `ok` is 0 where x is NaN and 1 elsewhere, in float32. `zero` is read where the format has zero points, `noise` where
    rounding is stochastic. See `Element.encode`.
    """
    if SPEC.element.kind == "float":
        ELEMENT: tl.constexpr = SPEC.element
        code = encode_float(x, ok, noise, ELEMENT, STOCHASTIC)
    else:
        value = x
        if STOCHASTIC:
            value = tl.floor(x)
            value += (x - value > noise).to(tl.float32)
        # Float32 has no numbers but integers around 1.5 * 2^23, and the integers' two's complement in its lowest bits.
        value += 12582912.0
        if SPEC.zero:
            value += zero
        # Of a number and a NaN, these are the number.
        value = tl.maximum(value, 12582912.0 + SPEC.element.min * ok)
        value = tl.minimum(value, 12582912.0 + SPEC.element.max * ok)
        code = value.to(tl.int32, bitcast=True)
    return code


@triton.jit
def encode_float(x, ok, noise, ELEMENT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """As `encode`, in a float element of at most 8 bits; the other bits of the codes are 0."""
    bits = x.to(tl.int32, bitcast=True)
    SIGN: tl.constexpr = 1 << (ELEMENT.bits - 1)
    if ELEMENT.bits - ELEMENT.mantissa == 3 and not STOCHASTIC:
        # Codes grow with numbers half as fast from 2 on and again from 4 on: of three lines, the lowest at a number.
        STEPS: tl.constexpr = 1 << ELEMENT.mantissa
        size = tl.abs(x)
        first = tl.fma(size, STEPS, 12582912.0)
        second = tl.fma(size, STEPS / 2, 12582912.0 + STEPS)
        third = tl.fma(size, STEPS / 4, 12582912.0 + 2 * STEPS)
        # Of a number and a NaN, these are the number.
        steps = tl.minimum(tl.minimum(first, second), tl.minimum(third, 12582912.0 + (SIGN - 1) * ok))
        code = steps.to(tl.int32, bitcast=True) & (SIGN - 1)
        code |= (bits >> (32 - ELEMENT.bits)) & tl.where(ok > 0, SIGN, 0)
    else:
        size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), ELEMENT.max)
        field = _field(size, ELEMENT)
        if STOCHASTIC:
            exact = size * ((254 + ELEMENT.mantissa - field) << 23).to(tl.float32, bitcast=True)
            floor = tl.floor(exact)
            steps = floor.to(tl.int32) + (exact - floor > noise).to(tl.int32)
        else:
            steps, _ = _round(size, field, ELEMENT)
        # A carry out of the steps ends up in the exponent by itself.
        steps += (field - (128 - ELEMENT.bias)) << ELEMENT.mantissa
        steps |= (bits >> (32 - ELEMENT.bits)) & SIGN
        NAN: tl.constexpr = SIGN - 1 if ELEMENT.has_nan else 0
        code = tl.where(ok > 0, steps, NAN)
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
def split_planes(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr):
    """Of a tile (ROWS, COLUMNS), a tuple of PLANES (1, 2, 4 or 8) tiles: the columns that are 0, 1... modulo PLANES."""
    if PLANES == 1:
        planes = (x,)
    elif PLANES == 2:
        planes = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    else:
        even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
        even = split_planes(even, ROWS, COLUMNS // 2, PLANES // 2)
        odd = split_planes(odd, ROWS, COLUMNS // 2, PLANES // 2)
        planes = (even[0], odd[0])
        for i in tl.static_range(1, PLANES // 2):
            planes = planes + (even[i], odd[i])
    return planes


@triton.jit
def encode_planes(x, ok, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr, PLANES: tl.constexpr):
    """Codes (`encode`) of tuples of PLANES tiles, one after another in the bits of a tuple of words.

    One word, an int32 or where that is too short an int64; three of int32 for 96 bits.
    """
    BITS: tl.constexpr = SPEC.element.bits
    if SPEC.convert != "" and not STOCHASTIC:
        # Rather than conversions one by one, of whose codes a ptxas loses some that are used twice.
        words = (tl.inline_asm_elementwise(SPEC.convert, "=r,f,f,f,f", [x[0], x[1], x[2], x[3]], tl.int32, True, 1),)
    else:
        # Codes to an integer; all, or one of two halves.
        COUNT: tl.constexpr = PLANES // 2 if BITS * PLANES >= 64 else PLANES
        for i in tl.static_range(PLANES):
            code = encode(x[i], ok[i], zero, noise[i], SPEC, STOCHASTIC)
            if i % COUNT < COUNT - 1 or BITS * COUNT != 32:
                code &= (1 << BITS) - 1
            if BITS * COUNT > 32:
                code = code.to(tl.int64)
            if i == 0:
                word = code
            elif i == COUNT:
                first, word = word, code
            else:
                word |= code << (BITS * (i % COUNT))
        if BITS * PLANES == 96:
            words = first.to(tl.int32), ((first >> 32) | (word << 16)).to(tl.int32), (word >> 16).to(tl.int32)
        elif BITS * PLANES == 64:
            words = ((word.to(tl.int64) << 32) | first.to(tl.uint32, bitcast=True).to(tl.int64),)
        else:
            words = (word,)
    return words


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
def uniform(seed, starts, COLUMNS: tl.constexpr, PLANES: tl.constexpr, ALIGNED: tl.constexpr):
    """`lowbit.philox.uniform` of elements at `starts + column`, int64 (ROWS, 1): a tuple as of `split_planes`.

    Where all `starts` are multiples of 4 (ALIGNED), each counter is used for four elements, otherwise for one.
    """
    first = starts + tl.arange(0, COLUMNS // PLANES)[None, :] * PLANES
    numbers = ()
    for i in tl.static_range(PLANES // 4):
        if ALIGNED:
            a, b, c, d = _philox(seed, (first + 4 * i) >> 2)
            numbers = numbers + (_fraction(a), _fraction(b), _fraction(c), _fraction(d))
        else:
            for j in tl.static_range(4):
                at = first + (4 * i + j)
                a, b, c, d = _philox(seed, at >> 2)
                lane = at & 3
                word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
                numbers = numbers + (_fraction(word),)
    return numbers


@triton.jit
def _philox(seed, counter):
    low = counter.to(tl.int32)
    none = tl.zeros_like(low)
    return tl.philox(seed, low, (counter >> 32).to(tl.int32), none, none)


@triton.jit
def _fraction(word):
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _store_scale(scale, SPEC: tl.constexpr):
    """Float32 scales as stored, and the float32 of that: 1 for 0 (a block of zeros), NaN where not finite.

    No less than the smallest.
    """
    # As integers, whose order is the same: a float32 subnormal is no constant that every Triton takes.
    bits = scale.to(tl.int32, bitcast=True)
    number = magnitude(scale) < 0x7F800000
    bits = tl.where(scale == 0, 0x3F800000, tl.minimum(tl.maximum(bits, SPEC.least), SPEC.most))
    if SPEC.scale.bits == 8:
        # Conversions of the hardware are for what nothing but a store reads: a ptxas loses codes that are used twice.
        ELEMENT: tl.constexpr = SPEC.scale
        kept = bits.to(tl.float32, bitcast=True)
        field = _field(kept, ELEMENT)
        steps, value = _round(kept, field, ELEMENT)
        steps += (field - (128 - ELEMENT.bias)) << ELEMENT.mantissa
        stored = tl.where(number, steps, (1 << (ELEMENT.bits - 1)) - 1).to(tl.uint8)
        value = tl.where(number, value, float("nan"))
    else:
        value = tl.where(number, bits, 0x7FC00000).to(tl.float32, bitcast=True)
        if SPEC.scale.name == "float16":
            stored = value.to(tl.float16)
        elif SPEC.scale.name == "bfloat16":
            stored = from_float32(value, tl.int16, SPEC)
        else:
            stored = value
        value = to_float32(stored)
    return stored, value


@triton.jit
def _field(size, ELEMENT: tl.constexpr):
    """Field of the exponent of float32 `size`, no lower than that of the element's subnormals."""
    return tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 128 - ELEMENT.bias)


@triton.jit
def _round(size, field, ELEMENT: tl.constexpr):
    """Float32 `size`, of that `_field`, in the element's steps of its binade, and the float32 that this is."""
    # Float32 numbers from here on are as far apart as the element's around x: the sum rounds as it does.
    shifter = (field + (23 - ELEMENT.mantissa)) << 23
    total = size + shifter.to(tl.float32, bitcast=True)
    return total.to(tl.int32, bitcast=True) - shifter, total - shifter.to(tl.float32, bitcast=True)


@triton.jit
def _within(x):
    return tl.minimum(tl.maximum(x, -65536.0), 65536.0)


@triton.jit
def _round_to_even(x):
    """Integers nearest to |x| of up to 2^22: beyond 1.5 * 2^23, float32 has no others."""
    return (x + 12582912.0) - 12582912.0
