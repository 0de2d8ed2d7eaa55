"""Scales of blocks and division by them, for every format: what kernels are compiled for, and functions they share.

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
from lowbit_kernels_cuda.codes import decode, encode_float, field_of, from_float32, in_steps, to_float32

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


@dataclass(frozen=True, slots=True, eq=False)
class Spec:
    """A format, and how its scales are chosen, in the numbers that kernels are compiled for.

    There is one of a kind, see `spec`: a launch finds its kernel by what it is, not by all that it says.
    """

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
                scale = quotient(amax, SPEC.divisor, 1 / SPEC.divisor, 1)
                scale = scale * by if TENSOR == "amax" else quotient(scale, tensor_scale, by, 2)
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
def quotient(x, by, inverse, CORRECTIONS: tl.constexpr):
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
    zero = SPEC.element.min - round_to_even(_within(tl.div_rn(low, scale)))
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
def code_of(x, SPEC: tl.constexpr):
    """The nearest codes of int8 or e4m3, as bytes of some type, to numbers over the scale of their largest."""
    ELEMENT: tl.constexpr = SPEC.element
    if ELEMENT.kind == "int":
        # A quotient is less than the largest code and a half, and so is its negative. Around 1.5 * 2^23 float32 has
        # integers alone, whose last bits are those of what was added.
        code = (tl.minimum(x, ELEMENT.max) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif SPEC.convert != "":
        code = x.to(tl.float8e4nv)
    else:
        code = encode_float(x, 0.0, ELEMENT, False).to(tl.uint8)
    return code


@triton.jit
def nearest_code(x, by, SPEC: tl.constexpr):
    """`code_of` of `x / by`, where `by` is the scale of the largest x."""
    CORRECTIONS: tl.constexpr = 2 if SPEC.fused else -1
    return code_of(divide(x, divisor_of(by, SPEC, CORRECTIONS), SPEC, CORRECTIONS), SPEC)


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
        field = field_of(kept, ELEMENT)
        steps, value = in_steps(kept, field, ELEMENT)
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
def _within(x):
    return tl.minimum(tl.maximum(x, -65536.0), 65536.0)


@triton.jit
def round_to_even(x):
    """Integers nearest to |x| of up to 2^22: beyond 1.5 * 2^23, float32 has no others."""
    return (x + 12582912.0) - 12582912.0
