"""Codes, scales and zero points of a packed weight as tensor cores take them: Triton functions that kernels share.

All work on tensors with one element for each lane that reads a part of a tile of `lowbit_kernels_cuda.weights`.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import struct
from dataclasses import dataclass

import triton
import triton.language as tl

from lowbit.element import Element
from lowbit_kernels_cuda.codes import split_planes


@dataclass(frozen=True, slots=True)
class Text:
    """PTX of what Triton has no words for, by type of the inputs; all empty for Triton's interpreter."""

    add: str = ""
    mul: str = ""
    # Bits of a number under a mask, among those of another; and flipped by those of another.
    merge: str = ""
    flip: str = ""
    # Fused multiply-adds with the two numbers of each of `lines`.
    line: tuple[str, ...] = ()


def lines(element: Element, bf16: bool) -> tuple[tuple[float, float], ...]:  # noqa: FBT001 - a constant of a kernel
    """What the 16-bit floats that codes are placed in are multiplied by, and what is added then; exact.

    Two for 8-bit integers in bfloat16, which has seven bits for them: of the high four bits and of the low four.
    """
    if element.kind == "float":
        return ((2.0 ** ((127 if bf16 else 15) - element.bias), -0.0),)
    # Signed codes are packed as if the least were 0.
    least = element.min if element.signed else 0.0
    if element.bits == 8 and bf16:
        return (16.0, least - 16 * 128.0), (1.0, -128.0)
    return ((1.0, least - (128.0 if bf16 else 1024.0)),)


def text(element: Element, bf16: bool) -> Text:  # noqa: FBT001 - a constant of a kernel
    """The PTX for a GPU."""
    kind = "bf16" if bf16 else "f16"

    def twice(value: float) -> int:
        packed = struct.pack("<f", value)[2:] * 2 if bf16 else struct.pack("<2e", value, value)
        return int.from_bytes(packed, "little")

    def line(by: float, plus: float) -> str:
        numbers = f"mov.b32 by, {twice(by)}; mov.b32 plus, {twice(plus)};"
        return f"{{ .reg .b32 by, plus; {numbers} fma.rn.{kind}x2 $0, $1, by, plus; }}"

    return Text(
        # Before compute capability 9.0 bfloat16 has fused multiply-adds alone.
        f"{{ .reg .b32 one; mov.b32 one, {twice(1.0)}; fma.rn.{kind}x2 $0, $1, one, $2; }}",
        f"{{ .reg .b32 none; mov.b32 none, {twice(-0.0)}; fma.rn.{kind}x2 $0, $1, $2, none; }}",
        "lop3.b32 $0, $1, $2, $3, 0xEA;",
        "lop3.b32 $0, $1, $2, $3, 0x6A;",
        tuple(line(*each) for each in lines(element, bf16)),
    )


@triton.jit
def registers(x, COUNT: tl.constexpr, THREADS: tl.constexpr):
    """Columns of (THREADS, COUNT), each a tensor."""
    columns = split_planes(x, THREADS, COUNT, COUNT)
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.reshape(columns[i], (THREADS,)),)
    return found


@triton.jit
def _field(
    words,
    PAIR: tl.constexpr,
    PART: tl.constexpr,
    AT: tl.constexpr,
    PARTS: tl.constexpr,
    bits,
    TEXT: tl.constexpr,
):
    """`bits` with the two codes of a pair, from their part at bit AT on, as the lowest of its halves."""
    SIZE: tl.constexpr = PARTS[PART]
    SHIFT: tl.constexpr = SIZE * (PAIR % (16 // SIZE)) - AT
    # Parts before are as many words as they are bits.
    word = words[AT + PAIR // (16 // SIZE)]
    word = word >> SHIFT if SHIFT > 0 else word << -SHIFT
    pair = _merge(word, (((1 << SIZE) - 1) << AT) * 0x10001, bits, TEXT)
    if len(PARTS) > PART + 1:
        pair = _field(words, PAIR, PART + 1, AT + SIZE, PARTS, pair, TEXT)
    return pair


@triton.jit
def _float_bits(
    words,
    PAIR: tl.constexpr,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    BF16: tl.constexpr,
    TEXT: tl.constexpr,
):
    """Fields of floats as those of 16-bit ones, whose subnormals are the element's once biases are made equal."""
    BITS: tl.constexpr = SPEC.element.bits
    TO: tl.constexpr = (7 if BF16 else 10) - SPEC.element.mantissa
    if BITS == 4 and SPEC.element.exponent == 2:
        bits = _arranged_e2m1(words[PAIR // 4], PAIR % 4, TO, TEXT)
    elif BITS == 8 and SPEC.element.exponent == 4:
        bits = _arranged_e4m3(words[PAIR // 2], PAIR % 2, TO, TEXT)
    else:
        WHOLE: tl.constexpr = len(PARTS) == 1
        AT: tl.constexpr = BITS * (PAIR % (16 // BITS)) if WHOLE else 0
        word = words[PAIR * BITS // 16] if WHOLE else _field(words, PAIR, 0, 0, PARTS, 0, TEXT)
        size = word << (TO - AT) if TO > AT else word >> (AT - TO)
        size = size & ((((1 << (BITS - 1)) - 1) << TO) * 0x10001)
        bits = _merge(word << (16 - BITS - AT), -0x7FFF8000, size, TEXT)
    return bits


@triton.jit
def _arranged_e2m1(word, CODE: tl.constexpr, TO: tl.constexpr, TEXT: tl.constexpr):
    """As `_float_bits`, of one of the four codes of a word whose bits are where `weights` has them."""
    if CODE < 3:
        if TO == 6:
            # A bfloat16's places, 0x81C0.
            bits = (word << (3 * CODE)) & -0x7E3F7E40
        else:
            size = (word << (3 * CODE + TO - 6)) & (0x70007 << TO)
            bits = _merge(word << (3 * CODE), -0x7FFF8000, size, TEXT)
    else:
        size = _merge(word >> (10 - TO), 0x30003 << TO, (word >> (11 - TO)) & (0x40004 << TO), TEXT)
        bits = _merge(word << 1, -0x7FFF8000, size, TEXT)
    return bits


@triton.jit
def _arranged_e4m3(word, CODE: tl.constexpr, TO: tl.constexpr, TEXT: tl.constexpr):
    """The same, of one of two codes."""
    if CODE == 0:
        if TO == 4:
            # A bfloat16's places, 0x87F0.
            bits = word & -0x780F7810
        else:
            bits = _merge(word, -0x7FFF8000, (word << (TO - 4)) & (0x7F007F << TO), TEXT)
    else:
        high = (word >> (8 - TO)) & (0x700070 << TO)
        if TO == 4:
            bits = _merge(word << 4, -0x7F0F7F10, high, TEXT)
        else:
            bits = _merge(word << 4, -0x7FFF8000, _merge(word << TO, 0xF000F << TO, high, TEXT), TEXT)
    return bits


@triton.jit
def _merge(word, MASK: tl.constexpr, bits, TEXT: tl.constexpr):
    """`word & MASK | bits`, in one instruction."""
    if TEXT.merge != "":
        value = tl.inline_asm_elementwise(TEXT.merge, "=r,r,r,r", [word, MASK, bits], tl.int32, True, 1)
    else:
        value = word & MASK | bits
    return value


@triton.jit
def _flip(word, MASK: tl.constexpr, BITS: tl.constexpr, TEXT: tl.constexpr):
    """`word & MASK ^ BITS`, in one instruction, which has room for one number that is known."""
    if TEXT.flip != "":
        value = tl.inline_asm_elementwise(TEXT.flip, "=r,r,r,r", [word, MASK, BITS], tl.int32, True, 1)
    else:
        value = (word & MASK) ^ BITS
    return value


@triton.jit
def operand(
    words,
    PRODUCT: tl.constexpr,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    BF16: tl.constexpr,
    LINES: tl.constexpr,
    TEXT: tl.constexpr,
):
    """The four registers of the first operand of a product, pairs of 16-bit floats, of a lane's words; all exact.

    Without LINES, integers above their offset, or floats that scales make up for.
    """
    found = ()
    for a in tl.static_range(4):
        if len(LINES) == 2 and SPEC.element.min < 0:
            # Seven bits above 128, less 128 or, without the eighth, 256: what their sum is for codes above the least.
            word = words[PRODUCT * 2 + a // 2] >> (8 * (a % 2))
            less = _flip(word, 0x800080, -0x3C7F3C80, TEXT)
            value = sum_of(_merge(word, 0x7F007F, 0x43004300, TEXT), less, BF16, TEXT)
        elif len(LINES) == 2:
            word = words[PRODUCT * 2 + a // 2]
            high = _merge(word >> (8 * (a % 2) + 4), 0x000F000F, 0x43004300, TEXT)
            low = _merge(word >> (8 * (a % 2)), 0x000F000F, 0x43004300, TEXT)
            value = sum_of(_line(high, 0, BF16, LINES, TEXT), _line(low, 1, BF16, LINES, TEXT), BF16, TEXT)
        else:
            if SPEC.element.kind == "float":
                value = _float_bits(words, PRODUCT * 4 + a, SPEC, PARTS, BF16, TEXT)
            else:
                # In the lowest bits of a bfloat16 from 128 on, or of a float16 from 1024 on.
                value = _field(words, PRODUCT * 4 + a, 0, 0, PARTS, 0x43004300 if BF16 else 0x64006400, TEXT)
            if len(LINES) > 0:
                value = _line(value, 0, BF16, LINES, TEXT)
        found = found + (value,)
    return found


@triton.jit
def _line(x, AT: tl.constexpr, BF16: tl.constexpr, LINES: tl.constexpr, TEXT: tl.constexpr):
    """Of two 16-bit floats, what the numbers of a line make of them."""
    if TEXT.add != "":
        value = tl.inline_asm_elementwise(TEXT.line[AT], "=r,r", [x], tl.int32, True, 1)
    else:
        low, high = halves(x, BF16)
        value = _pair(low * LINES[AT][0] + LINES[AT][1], high * LINES[AT][0] + LINES[AT][1], BF16)
    return value


@triton.jit
def sum_of(x, y, BF16: tl.constexpr, TEXT: tl.constexpr):
    """Sums of the 16-bit floats in two integers, which are ones themselves."""
    if TEXT.add != "":
        value = tl.inline_asm_elementwise(TEXT.add, "=r,r,r", [x, y], tl.int32, True, 1)
    else:
        a, b = halves(x, BF16)
        c, d = halves(y, BF16)
        value = _pair(a + c, b + d, BF16)
    return value


@triton.jit
def product_of(x, y, BF16: tl.constexpr, TEXT: tl.constexpr):
    """Products of the 16-bit floats in two integers, rounded."""
    if TEXT.add != "":
        value = tl.inline_asm_elementwise(TEXT.mul, "=r,r,r", [x, y], tl.int32, True, 1)
    else:
        a, b = halves(x, BF16)
        c, d = halves(y, BF16)
        value = _pair(_round(a * c, BF16), _round(b * d, BF16), BF16)
    return value


@triton.jit
def _round(x, BF16: tl.constexpr):
    """Float32 of finite `x` rounded to a 16-bit float."""
    if BF16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def halves(x, BF16: tl.constexpr):
    """Float32 of the two 16-bit floats in an integer."""
    if BF16:
        low = (x << 16).to(tl.float32, bitcast=True)
        high = (x & -0x10000).to(tl.float32, bitcast=True)
    else:
        low = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _pair(low, high, BF16: tl.constexpr):
    """Undo `halves` of what needs no rounding."""
    if BF16:
        value = (low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF | high.to(tl.int32, bitcast=True) & -0x10000
    else:
        low = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        value = low | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return value


@triton.jit
def factors(scale, place, SPEC: tl.constexpr, LIFT: tl.constexpr, PER: tl.constexpr, THREADS: tl.constexpr):
    """Float32 scales: PER of row g, then PER of row g + 8; `scale` points to words of at most 32 bits.

    They are packed LIFT powers of two larger.
    """
    ELEMENT: tl.constexpr = SPEC.scale
    WORDS: tl.constexpr = 2 * PER * ELEMENT.bits // scale.dtype.element_ty.primitive_bitwidth
    words = registers(read(scale, place, WORDS), WORDS, THREADS)
    found = ()
    for i in tl.static_range(2 * PER):
        word = words[i * WORDS // (2 * PER)].to(tl.int32)
        if ELEMENT.bits == 32:
            value = word.to(tl.float32, bitcast=True)
        elif ELEMENT.bits == 16:
            low, high = halves(word, ELEMENT.mantissa == 7)
            value = low if i % 2 == 0 else high
        else:
            value = byte_scale(word, i % (2 * PER // WORDS), ELEMENT) * 2.0**-LIFT
        found = found + (value,)
    return found


@triton.jit
def byte_scale(word, BYTE: tl.constexpr, ELEMENT: tl.constexpr):
    """Float32 of an 8-bit scale; negative ones and ones that are no numbers are refused when a weight is packed."""
    FIELD: tl.constexpr = 8 if ELEMENT.powers_of_two else 7
    SHIFT: tl.constexpr = 23 - ELEMENT.mantissa - 8 * BYTE
    word = word << SHIFT if SHIFT > 0 else word >> -SHIFT
    word = word & (((1 << FIELD) - 1) << (23 - ELEMENT.mantissa))
    if ELEMENT.powers_of_two:
        # 2^-127 is a subnormal.
        value = tl.maximum(word, 0x400000).to(tl.float32, bitcast=True)
    else:
        value = word.to(tl.float32, bitcast=True) * 2.0 ** (127 - ELEMENT.bias)
    return value


@triton.jit
def points(zero, place, PER: tl.constexpr, THREADS: tl.constexpr):
    """Float32 zero points, in codes above the least, as `factors`; `zero` points to words of two."""
    words = registers(read(zero, place, PER), PER, THREADS)
    found = ()
    for i in tl.static_range(2 * PER):
        code = words[i // 2] & 0xFFFF if i % 2 == 0 else (words[i // 2] >> 16) & 0xFFFF
        found = found + (code.to(tl.float32),)
    return found


@triton.jit
def read(pointer, place, SIZE: tl.constexpr):
    """(threads, SIZE) that follow one another from SIZE times `place` on; read once, so not to be kept."""
    return tl.load(pointer + place[:, None] * SIZE + tl.arange(0, SIZE)[None, :], eviction_policy="evict_first")


@triton.jit
def less_pairs(words, PER: tl.constexpr, BF16: tl.constexpr):
    """What codes and their offset are above: pairs, negative, PER of rows g, then PER of rows g + 8."""
    found = ()
    for i in tl.static_range(2 * PER):
        code = words[i // 2] & 0xFFFF if i % 2 == 0 else (words[i // 2] >> 16) & 0xFFFF
        found = found + ((code | (code << 16)) | (-0x3CFF3D00 if BF16 else -0x1BFF1C00),)
    return found


@triton.jit
def scale_pairs(words, SPEC: tl.constexpr, LIFT: tl.constexpr, PER: tl.constexpr, BF16: tl.constexpr):
    """Scales as packed, and `lifts` has them, twice in an integer: PER of rows g, then PER of rows g + 8."""
    ELEMENT: tl.constexpr = SPEC.scale
    COUNT: tl.constexpr = len(words)
    found = ()
    for i in tl.static_range(2 * PER):
        word = words[i * COUNT // (2 * PER)]
        byte = (word >> (8 * (i % (2 * PER // COUNT)))) & 0xFF if ELEMENT.bits == 8 else word
        if ELEMENT.bits == 16:
            pair = (word & 0xFFFF if i % 2 == 0 else (word >> 16) & 0xFFFF) * 0x10001
        elif ELEMENT.powers_of_two:
            if LIFT == 0:
                # 2^-127 is a subnormal.
                pair = tl.maximum(byte << 7, 0x40) * 0x10001
            else:
                pair = byte * 0x800080
        elif LIFT != 0 and BF16:
            pair = byte * 0x100010 + 0x70007000
        else:
            if LIFT != 0:
                value = ((byte << 20) + ((127 - 10) << 23)).to(tl.float32, bitcast=True)
            else:
                value = byte_scale(word, i % (2 * PER // COUNT), ELEMENT)
            if BF16:
                half = (value.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
            else:
                half = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            pair = half * 0x10001
        found = found + (pair,)
    return found


@triton.jit
def values(
    codes,
    less,
    times,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    BF16: tl.constexpr,
    LINES: tl.constexpr,
    TEXT: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """16-bit floats (rows, columns) of the codes of TALL by WIDE tiles, a lane after another.

    `less` is added to codes, and they are multiplied by `times`: pairs as of `less_pairs` and `scale_pairs`, or none.
    """
    products = ()
    for s in tl.static_range(4):
        r = operand(codes, s, SPEC, PARTS, BF16, LINES, TEXT)
        if len(less) > 0:
            r = _of_pairs(r, less, s, 0, BF16, TEXT)
        if len(times) > 0:
            r = _of_pairs(r, times, s, 1, BF16, TEXT)
        # Halves, rows, and columns beyond 8, from the left.
        top = tl.join(_floats(r[0], BF16, TEXT), _floats(r[1], BF16, TEXT))
        products = products + (tl.join(top, tl.join(_floats(r[2], BF16, TEXT), _floats(r[3], BF16, TEXT))),)
    value = tl.join(tl.join(products[0], products[1]), tl.join(products[2], products[3]))
    value = tl.reshape(value, (TALL, WIDE, 8, 4, 2, 2, 2, 2, 2))
    value = tl.permute(value, (0, 5, 2, 1, 8, 7, 6, 3, 4))
    return tl.reshape(value, (TALL * 16, WIDE * 64))


@triton.jit
def _of_pairs(r, by, S: tl.constexpr, TIMES: tl.constexpr, BF16: tl.constexpr, TEXT: tl.constexpr):
    """The registers of product S plus, or TIMES, those of their rows and columns."""
    PER: tl.constexpr = len(by) // 2
    found = ()
    for a in tl.static_range(4):
        other = by[a % 2 * PER + S * PER // 4]
        found = found + (product_of(r[a], other, BF16, TEXT) if TIMES else sum_of(r[a], other, BF16, TEXT),)
    return found


@triton.jit
def _floats(pair, BF16: tl.constexpr, TEXT: tl.constexpr):
    """Both numbers of a pair; in float32 for Triton's interpreter."""
    if TEXT.add == "":
        low, high = halves(pair, BF16)
    else:
        kind: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        low, high = pair.to(tl.int16).to(kind, bitcast=True), (pair >> 16).to(tl.int16).to(kind, bitcast=True)
    return tl.join(low, high)


@triton.jit
def byte_words(codes):
    """E4m3, in units of 2^-9, of a lane's words of signed 4-bit integers: of 16 columns rows g, then rows g + 8."""
    found = ()
    for i in tl.static_range(4):
        found = found + _e4m3_of_int4(codes[i])
    return found


@triton.jit
def byte_values(words, TALL: tl.constexpr, WIDE: tl.constexpr):
    """E4m3 (rows, columns) of what `byte_words` gave of TALL by WIDE tiles.

    As tensor cores for 8-bit floats take them, in whose first operand a lane has four columns side by side, and again
    16 beyond; of a weight packed as `weights.side_by_side` has it.
    """
    products = ()
    for q in tl.static_range(2):
        # Bytes, rows, and columns beyond 16, from the left.
        first = tl.join(four_bytes(words[4 * q]), four_bytes(words[4 * q + 1]))
        second = tl.join(four_bytes(words[4 * q + 2]), four_bytes(words[4 * q + 3]))
        products = products + (tl.join(first, second),)
    value = tl.reshape(tl.join(products[0], products[1]), (TALL, WIDE, 8, 4, 2, 2, 2, 2, 2))
    value = tl.permute(value, (0, 6, 2, 1, 8, 7, 3, 5, 4))
    return tl.reshape(value, (TALL * 16, WIDE * 64))


@triton.jit
def _e4m3_of_int4(word):
    """Four e4m3 of rows g, and of rows g + 8, of a word of codes, which are 8 above what they stand for.

    Of v below 0, the low bits are 7 - (-1 - v), to be flipped.
    """
    less = (~word >> 3) & 0x01010101
    top = ((word & 0x07070707) ^ (less * 7)) + less * 0x81
    less = (~word >> 7) & 0x01010101
    return top, (((word >> 4) & 0x07070707) ^ (less * 7)) + less * 0x81


@triton.jit
def four_bytes(word):
    """The e4m3 in a word, (.., low bit of the byte's number, high bit)."""
    a, b = word.to(tl.int8).to(tl.float8e4nv, bitcast=True), (word >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    c = (word >> 16).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    d = (word >> 24).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    return tl.join(tl.join(a, b), tl.join(c, d))
