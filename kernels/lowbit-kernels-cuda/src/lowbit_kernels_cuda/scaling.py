"""Scales of blocks, codes of elements and back, and packing, for every format: Triton functions that kernels share.

All give the bits of `lowbit.numerics`. Integers do what hardware may not have (8-bit floats before compute capability
8.9) or what Triton's interpreter rounds otherwise (bfloat16); a `Spec` says when a compiled kernel has it natively.

Kernels that use them are launched with `enable_fp_fusion=False`.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import struct
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

# Four float32 to the bytes of an int32, on hardware that converts to 8-bit floats; infinities become the largest.
_FLOAT8 = (
    "{{ .reg .b16 low, high; cvt.rn.satfinite.{0}.f32 low, $2, $1; "
    "cvt.rn.satfinite.{0}.f32 high, $4, $3; mov.b32 $0, {{low, high}}; }}"
)
# Of elements, the conversion to one of as many bits of mantissa, whose numbers are so many times as large.
_CONVERSIONS = {
    "e4m3fn": ("e4m3x2", 1.0),
    "e5m2": ("e5m2x2", 1.0),
    "e2m3": ("e4m3x2", 2.0**-6),
    "e3m2": ("e5m2x2", 2.0**-12),
}


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
    # PTX that converts to four codes at once, or "", and what numbers are multiplied by before.
    convert: str
    unit: float
    # PTX of words of four and of eight codes of quotients as by `divide` without corrections, or none.
    near: tuple[str, ...]


@lru_cache(maxsize=1024)
def spec(fmt: Format, mode: ScaleMode = DEFAULT_MODE, device: torch.device | None = None) -> Spec:
    """What kernels on `device` (None: Triton's interpreter) are compiled for."""
    element, whole = fmt.element, exponent_and_mantissa(fmt.element.max * fmt.scale.max if fmt.tensor_scale else 1.0)
    fused = device is not None
    native = device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    convert, unit_of_codes = "", 1.0
    if native and element.name in _CONVERSIONS and (element.bits == 8 or fmt.scale.powers_of_two):
        name, unit_of_codes = _CONVERSIONS[element.name]
        convert = _FLOAT8.format(name)
    # The middle of two numbers times a scale is a bfloat16 then.
    near = fused and element.name == "e2m1" and (fmt.scale.powers_of_two or fmt.scale.name == "e4m3fn")
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
        fused=fused,
        convert=convert,
        unit=unit_of_codes,
        near=(_lines(4), _lines(8)) if near else (),
    )


def _lines(count: int) -> str:
    """PTX of a word of `count` e2m1 codes of as many float32: as by `_around_lines`, two at a time in float16.

    Around 1.5 * 2^10, float16 has integers alone.
    """
    numbers = {"one": 1536, "two": 1538, "three": 1540, "last": 1543, "by_2": 2, "by_1": 1, "by_half": 0.5}
    lines = [f".reg .b32 x, a, b, c, word, signs, {', '.join(numbers)};"]
    lines += [f"mov.b32 {name}, {_half(number)};" for name, number in numbers.items()]
    lines += ["mov.b32 word, 0;", "mov.b32 signs, 0;"]
    for i in range(count // 2):
        lines += [
            # One of the first half of the codes, and one of the second.
            f"cvt.rn.f16x2.f32 x, ${1 + i + count // 2}, ${1 + i};",
            "and.b32 a, x, 0x7FFF7FFF;",
            "fma.rn.f16x2 b, a, by_2, one;",
            "fma.rn.f16x2 c, a, by_1, two;",
            "min.f16x2 b, b, c;",
            "fma.rn.f16x2 c, a, by_half, three;",
            # Of a number and a NaN, the number.
            "min.f16x2 c, c, last;",
            "min.f16x2 b, b, c;",
            f"shl.b32 b, b, {4 * i};",
            "add.u32 word, word, b;",
            "and.b32 x, x, 0x80008000;",
            f"shr.u32 x, x, {12 - 4 * i};",
            "or.b32 signs, signs, x;",
        ]
    start = sum(_half(numbers["one"]) << (4 * i) for i in range(count // 2)) % (1 << 32)
    lines += [f"sub.u32 word, word, {start};", "or.b32 word, word, signs;"]
    if count == 4:
        lines += ["shr.u32 x, word, 8;", "or.b32 word, word, x;", "and.b32 word, word, 0xFFFF;"]
    return f"{{ {' '.join([*lines, 'mov.b32 $0, word;'])} }}"


def _half(value: float) -> int:
    """Two float16 of a value in the bits of an integer."""
    return int.from_bytes(struct.pack("<2e", value, value), "little")


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
def divisor_of(scale, SPEC: tl.constexpr, CORRECTIONS: tl.constexpr):
    """What `divide` takes in the place of a scale, three tensors.

    Of a power of two, the reciprocal, which is exact, in units of `convert`. Otherwise, if there are any CORRECTIONS,
    `-p`, `scale * p` and `-1 / (scale * p)`, nearly; the power of two `p` makes the second at least 1 and less than 2,
    or as large as can be.
    """
    # Those of 2^127 and 2^-127 are 2^-127, a subnormal, and 2^127.
    bits = scale.to(tl.int32, bitcast=True)
    power = tl.maximum((254 << 23) - (bits & 0x7F800000), 0x400000)
    if SPEC.scale.powers_of_two:
        by = tl.where(bits < 0x7F800000, power, 0x7FC00000).to(tl.float32, bitcast=True)
        if CORRECTIONS >= 0:
            by *= SPEC.unit
        by = by, by, by
    elif CORRECTIONS >= 0:
        power = power.to(tl.float32, bitcast=True)
        near = scale * power
        inverse = _reciprocal(near)
        if CORRECTIONS > 1:
            inverse = tl.fma(tl.fma(-near, inverse, 1.0), inverse, inverse)
        by = -power, near, -inverse
    else:
        by = scale, scale, scale
    return by


@triton.jit
def _reciprocal(x):
    """1 / x within an ulp, on a GPU."""
    return tl.inline_asm_elementwise("rcp.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def divide(x, by, SPEC: tl.constexpr, CORRECTIONS: tl.constexpr):
    """IEEE `x / scale`, where `by` is `divisor_of(scale)`.

    A first quotient is corrected by its remainder, twice, as by the hardware's own division (which -1 stands for); once
    where scales have 16 or fewer bits of mantissa: no quotient of theirs is near the middle of two numbers. Quotients
    below 2^-126 keep no more than their sign and that they are small, and those of infinities are NaN. The signs here
    are such that zeros keep theirs.

    Not at all, if no more is asked than on which side of the middle of two codes quotients are, or that they are
    there: of 16-bit numbers and scales of a few bits, others are so far from it that they are no float16's neighbours.

    Source: Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", theorem 8.2.
    """
    if SPEC.scale.powers_of_two:
        value = x * by[0]
    elif CORRECTIONS >= 0:
        x = x * by[0]
        value = x * by[2]
        for _ in tl.static_range(CORRECTIONS):
            value = tl.fma(tl.fma(value, by[1], x), by[2], value)
    else:
        value = tl.div_rn(x, by[0])
    return value


@triton.jit
def encode_float(x, noise, ELEMENT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes, as int32, of float32 `x` in a float element; `noise` is read where STOCHASTIC. See `Element.encode`."""
    bits = x.to(tl.int32, bitcast=True)
    SIGN: tl.constexpr = 1 << (ELEMENT.bits - 1)
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
    return tl.where(x == x, steps, NAN)


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
    """Of a tile (ROWS, COLUMNS), PLANES (a power of two) tiles: the columns that are 0, 1... modulo PLANES."""
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
def encode_planes(
    x, sound, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr, PLANES: tl.constexpr, CORRECTIONS: tl.constexpr
):
    """Codes of float32 `x` of `divide`, tuples of PLANES tiles, one after another in the bits of words.

    A word is an int32, full where runs of codes end on its last bit; if PLANES codes are no such run, one word holds
    them, an int64 if need be. `sound` is 0 where x is NaN and 1 elsewhere, in float32, read for elements without a NaN;
    `zero` is read where the format has zero points, `noise` where rounding is stochastic. See `Element.encode`.
    """
    BITS: tl.constexpr = SPEC.element.bits
    words = ()
    if SPEC.convert != "" and not STOCHASTIC and (BITS == 8 or CORRECTIONS >= 0):
        for i in tl.static_range(0, PLANES, 4):
            # Rather than conversions one by one, of whose codes a ptxas loses some that are used twice.
            of = [x[i], x[i + 1], x[i + 2], x[i + 3]]
            word = tl.inline_asm_elementwise(SPEC.convert, "=r,f,f,f,f", of, tl.int32, True, 1)
            words = words + (word if BITS == 8 else _six_bits(word, sound[i]),)
        if BITS == 6 and PLANES == 16:
            a, b, c, d = words
            words = a | (b << 24), (b >> 8) | (c << 16), (c >> 16) | (d << 8)
    elif BITS == 6 and PLANES == 16:
        first = _word(x, sound, zero, noise, SPEC, STOCHASTIC, 0, 8)
        second = _word(x, sound, zero, noise, SPEC, STOCHASTIC, 8, 8)
        words = first.to(tl.int32), ((first >> 32) | (second << 16)).to(tl.int32), (second >> 16).to(tl.int32)
    elif CORRECTIONS == 0 and PLANES == 4:
        of = [x[0], x[1], x[2], x[3]]
        word = tl.inline_asm_elementwise(SPEC.near[0], "=r,f,f,f,f", of, tl.int32, True, 1)
        words = (tl.where(sound[0] > 0, word, 0),)
    elif CORRECTIONS == 0:
        for i in tl.static_range(0, PLANES, 8):
            of = [x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5], x[i + 6], x[i + 7]]
            word = tl.inline_asm_elementwise(SPEC.near[1], "=r,f,f,f,f,f,f,f,f", of, tl.int32, True, 1)
            words = words + (tl.where(sound[i] > 0, word, 0),)
    else:
        COUNT: tl.constexpr = min(PLANES, 32 // BITS) if 32 % BITS == 0 else PLANES
        for i in tl.static_range(0, PLANES, COUNT):
            words = words + (_word(x, sound, zero, noise, SPEC, STOCHASTIC, i, COUNT),)
    return words


@triton.jit
def _six_bits(word, sound):
    """Side by side, four 6-bit codes of 8-bit ones that differ in the place of the sign and may be one too large."""
    word = ((word & 0x3F3F3F3F) - ((word >> 5) & 0x01010101)) | ((word >> 2) & 0x20202020)
    word = (word & 0x003F003F) | ((word >> 2) & 0x0FC00FC0)
    word = (word & 0xFFF) | ((word >> 4) & 0xFFF000)
    return tl.where(sound > 0, word, 0)


@triton.jit
def _word(
    x, sound, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr
):
    """COUNT codes, from plane FIRST on."""
    ELEMENT: tl.constexpr = SPEC.element
    BITS: tl.constexpr = ELEMENT.bits
    INTEGER: tl.constexpr = ELEMENT.kind == "int"
    LINES: tl.constexpr = not INTEGER and BITS - ELEMENT.mantissa == 3 and not STOCHASTIC
    # What is added to signed integers so that none is negative; its bit is their sign's.
    OFFSET: tl.constexpr = 1 << (BITS - 1) if INTEGER and ELEMENT.signed else 0
    SIGN: tl.constexpr = 1 << (BITS - 1)
    TYPE: tl.constexpr = tl.int32 if BITS * COUNT <= 32 else tl.int64
    for i in tl.static_range(COUNT):
        v = x[FIRST + i]
        if INTEGER:
            number = _around_integer(v, sound[FIRST + i], zero, noise[FIRST + i], SPEC, STOCHASTIC, OFFSET)
        elif LINES:
            number = _around_lines(v, sound[FIRST + i], ELEMENT)
        else:
            number = encode_float(v, noise[FIRST + i], ELEMENT, STOCHASTIC)
        number = number.to(TYPE) << (BITS * i)
        if i == 0:
            word = number
        else:
            word += number
        if LINES:
            # Bits that land where the codes have their sign.
            sign = v.to(tl.int32, bitcast=True)
            if BITS * (i + 1) <= 32:
                sign = sign >> (32 - BITS * (i + 1))
            sign = sign.to(TYPE)
            if BITS * (i + 1) > 32:
                sign = sign << (BITS * (i + 1) - 32)
            sign &= _repeated(SIGN, BITS, i, i + 1, COUNT)
            if i == 0:
                signs = sign
            else:
                signs |= sign
    if INTEGER or LINES:
        # Their sum starts with that of 1.5 * 2^23 in every place.
        word -= _repeated(0x4B400000, BITS, 0, COUNT, COUNT)
    if OFFSET:
        word ^= _repeated(OFFSET, BITS, 0, COUNT, COUNT)
    if LINES:
        word |= tl.where(sound[FIRST] > 0, signs, 0)
    return word


@triton.constexpr_function
def _repeated(number, bits, first, end, count):
    """The sum of a number in places from `first` to `end` of a word of `count`, as the integer that it is."""
    width = 32 if bits * count <= 32 else 64
    total = sum(number << (bits * i) for i in range(first, end)) % (1 << width)
    return total - (1 << width) if total >> (width - 1) else total


@triton.jit
def _around_integer(x, sound, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr, OFFSET: tl.constexpr):
    """Bits of float32 1.5 * 2^23 + OFFSET + x as an integer of the element: float32 has no others around there."""
    if STOCHASTIC:
        floor = tl.floor(x)
        x = floor + (x - floor > noise).to(tl.float32)
    if OFFSET == 1:
        # An odd number would change which of two as near is even.
        value = (x + 12582912.0) + 1.0
    else:
        value = x + (12582912.0 + OFFSET)
    if SPEC.zero:
        value += zero
    # Of a number and a NaN, these are the number.
    value = tl.maximum(value, (12582912.0 + OFFSET) + SPEC.element.min * sound)
    value = tl.minimum(value, (12582912.0 + OFFSET) + SPEC.element.max * sound)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _around_lines(x, sound, ELEMENT: tl.constexpr):
    """Bits of float32 1.5 * 2^23 + the code of |x| in an element with two bits of exponent.

    Codes grow with numbers, half as fast from 2 on and again from 4 on: of three lines, the lowest at a number.
    """
    STEPS: tl.constexpr = 1 << ELEMENT.mantissa
    size = tl.abs(x)
    first = tl.fma(size, STEPS, 12582912.0)
    second = tl.fma(size, STEPS / 2, 12582912.0 + STEPS)
    third = tl.fma(size, STEPS / 4, 12582912.0 + 2 * STEPS)
    # Of a number and a NaN, these are the number.
    last = tl.minimum(third, 12582912.0 + (4 * STEPS - 1) * sound)
    return tl.minimum(tl.minimum(first, second), last).to(tl.int32, bitcast=True)


@triton.jit
def join_planes(
    x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr
):
    """Undo `split_planes`: the tile (ROWS, COLUMNS) of PLANES tiles, each STEP-th of a tuple from FIRST on."""
    if PLANES == 1:
        tile = tl.reshape(x[FIRST], (ROWS, COLUMNS))
    else:
        even = join_planes(x, ROWS, COLUMNS // 2, PLANES // 2, FIRST, 2 * STEP)
        odd = join_planes(x, ROWS, COLUMNS // 2, PLANES // 2, FIRST + STEP, 2 * STEP)
        tile = tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))
    return tile


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
