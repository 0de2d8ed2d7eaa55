"""A linear layer whose weight alone is in low precision, for few tokens: codes meet tensor cores in registers.

Weights are packed by `lowbit_kernels_cuda.weights`, so that a lane reads what it multiplies and nothing is moved between
lanes. Every tensor of the kernel has one element for each lane of the program, which is how Triton has registers by
name; products are `mma.m16n8k16` of 16 rows of the weight by 8 tokens. Warps take parts of K in turn; each group's
products are summed in float32 before they meet its scale, so that codes are multiplied exactly.
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
from lowbit_kernels_cuda.codes import from_float32, split_planes, to_float32

_REGISTERS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")


@dataclass(frozen=True, slots=True)
class Text:
    """PTX of what Triton has no words for, by type of the inputs; all empty for Triton's interpreter."""

    mma: str = ""
    # As `mma`, of sums that are still 0.
    first: str = ""
    add: str = ""
    # Bits of a number under a mask, among those of another.
    merge: str = ""
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

    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, "
    return Text(
        mma + "{$10, $11, $12, $13};",
        f"{{ .reg .f32 z; mov.f32 z, 0f00000000; {mma} {{z, z, z, z}}; }}",
        f"add.rn.{kind}x2 $0, $1, $2;",
        "lop3.b32 $0, $1, $2, $3, 0xEA;",
        tuple(line(*each) for each in lines(element, bf16)),
    )


@triton.jit
def linear_tiles(
    x,
    words,
    scale,
    zero,
    tensor_scale,
    tensor_row,
    bias,
    out,
    m,
    n,
    k,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    LINES: tl.constexpr,
    TEXT: tl.constexpr,
    EVEN: tl.constexpr,
    WARPS: tl.constexpr,
    TALL: tl.constexpr,
    TOKENS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """`out` (M, N) of `x` (M, K / 2) int32 pairs; TALL times 16 rows by TOKENS times 8 tokens a program.

    `words`, `scale` and `zero` as packed by `lowbit_kernels_cuda.weights`. A warp reads AHEAD tiles of 64 columns, one
    after another, before it multiplies them; EVEN if K is 64 times a number.
    """
    THREADS: tl.constexpr = 32 * WARPS
    # Tiles that have one scale, or scales of one tile.
    SPAN: tl.constexpr = AHEAD if GROUP % (64 * AHEAD) == 0 else 1
    PER: tl.constexpr = 1 if GROUP == 0 or GROUP >= 64 else 64 // GROUP
    t = tl.arange(0, THREADS)
    warp, row, lane = t // 32, t % 32 // 4, t % 4
    tile, token = tl.program_id(0) * TALL, tl.program_id(1) * (TOKENS * 8)
    tiles = tl.cdiv(k, 64)
    scales = 1 if GROUP == 0 else tl.cdiv(k, GROUP * PER)
    last = tl.cdiv(n, 16) - 1
    totals, totals_x = _zeros(TALL * TOKENS, THREADS), _zeros(TOKENS, THREADS)
    for first in range(0, tiles, WARPS * AHEAD):
        begin = first + warp * AHEAD
        codes, inputs, factors, zeros = (), (), (), ()
        for i in tl.static_range(AHEAD):
            # Beyond the last column inputs are 0, so that any weight will do.
            at = tl.minimum(begin + i, tiles - 1)
            for r in tl.static_range(TALL):
                above = tl.minimum(tile + r, last)
                place = (above.to(tl.int64) * tiles + at) * 32 + t % 32
                codes = codes + _read_words(words, place, PARTS, THREADS)
                if GROUP != 0 and i % SPAN == 0:
                    group = at if GROUP <= 64 else at * 64 // GROUP
                    place = (above * scales + group) * 8 + row
                    factors = factors + _factors(scale, place, SPEC, PER, THREADS)
                    if SPEC.zero:
                        zeros = zeros + _points(zero, place, SPEC, PER, THREADS)
            for j in tl.static_range(TOKENS):
                inputs = inputs + _read_inputs(x, tl.minimum(token + j * 8 + row, m - 1), begin + i, lane, tiles, k, EVEN)
        sums, sums_x = totals, totals_x
        for step in tl.static_range(4 * AHEAD):
            totals, sums, sums_x = _step(
                *(codes, inputs, factors, zeros, totals, sums, sums_x, step),
                *(SPEC, PARTS, GROUP, BF16, LINES, TEXT, WARPS, TALL, TOKENS, SPAN, PER),
            )
        if GROUP == 0:
            totals, totals_x = sums, sums_x
    if GROUP == 0:
        scaled, none = (), tl.zeros([THREADS], tl.float32)
        for r in tl.static_range(TALL):
            place = tl.minimum(tile + r, last) * 8 + row
            one, two = _factors(scale, place, SPEC, 1, THREADS)
            for j in tl.static_range(TOKENS):
                new = totals[r * TOKENS + j]
                if SPEC.zero:
                    points = _points(zero, place, SPEC, 1, THREADS)
                    new = _shifted(new, points[0], points[1], totals_x[j])
                scaled = scaled + (_scaled(new, one, two, (none, none, none, none)),)
        totals = scaled
    _write(totals, tensor_scale, tensor_row, bias, out, tile, token, m, n, SPEC, WARPS, TALL, TOKENS)


@triton.jit
def _step(
    codes,
    inputs,
    factors,
    zeros,
    totals,
    sums,
    sums_x,
    STEP: tl.constexpr,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    LINES: tl.constexpr,
    TEXT: tl.constexpr,
    WARPS: tl.constexpr,
    TALL: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    PER: tl.constexpr,
):
    """The products of 16 columns; after the last of a group, its scale."""
    TILE: tl.constexpr = STEP // 4
    PRODUCTS: tl.constexpr = 4 * SPAN // PER
    FIRST: tl.constexpr = GROUP != 0 and STEP % PRODUCTS == 0
    LAST: tl.constexpr = GROUP != 0 and (STEP + 1) % PRODUCTS == 0
    added, added_x = (), () if SPEC.zero else sums_x
    for r in tl.static_range(TALL):
        a = _operand(codes, (TILE * TALL + r) * SPEC.element.bits, STEP % 4, SPEC, PARTS, BF16, LINES, TEXT)
        for j in tl.static_range(TOKENS):
            b = inputs[(TILE * TOKENS + j) * 8 + STEP % 4 * 2], inputs[(TILE * TOKENS + j) * 8 + STEP % 4 * 2 + 1]
            added = added + (_mma(a, b, sums[r * TOKENS + j], FIRST, BF16, TEXT, WARPS),)
    if SPEC.zero:
        one = tl.full([32 * WARPS], 0x3F803F80 if BF16 else 0x3C003C00, tl.int32)
        for j in tl.static_range(TOKENS):
            b = inputs[(TILE * TOKENS + j) * 8 + STEP % 4 * 2], inputs[(TILE * TOKENS + j) * 8 + STEP % 4 * 2 + 1]
            added_x = added_x + (_mma((one, one, one, one), b, sums_x[j], FIRST, BF16, TEXT, WARPS),)
    if LAST:
        AT: tl.constexpr = TILE // SPAN * TALL * 2 * PER + STEP % 4 * PER // 4
        scaled = ()
        for r in tl.static_range(TALL):
            one, two = factors[AT + r * 2 * PER], factors[AT + r * 2 * PER + PER]
            for j in tl.static_range(TOKENS):
                new = added[r * TOKENS + j]
                if SPEC.zero:
                    new = _shifted(new, zeros[AT + r * 2 * PER], zeros[AT + r * 2 * PER + PER], added_x[j])
                scaled = scaled + (_scaled(new, one, two, totals[r * TOKENS + j]),)
        totals = scaled
    return totals, added, added_x


@triton.jit
def _zeros(COUNT: tl.constexpr, THREADS: tl.constexpr):
    all_ = ()
    for _ in tl.static_range(COUNT):
        z = tl.zeros([THREADS], tl.float32)
        all_ = all_ + ((z, z, z, z),)
    return all_


@triton.jit
def _read_words(words, place, PARTS: tl.constexpr, THREADS: tl.constexpr):
    """A lane's words of all parts of a tile, one after another."""
    found = ()
    for p in tl.static_range(len(PARTS)):
        found = found + _registers(_read(words[p], place, PARTS[p]), PARTS[p], THREADS)
    return found


@triton.jit
def _read(pointer, place, SIZE: tl.constexpr):
    """(threads, SIZE) that follow one another from SIZE times `place` on; read once, so not to be kept."""
    return tl.load(pointer + place[:, None] * SIZE + tl.arange(0, SIZE)[None, :], eviction_policy="evict_first")


@triton.jit
def _factors(scale, place, SPEC: tl.constexpr, PER: tl.constexpr, THREADS: tl.constexpr):
    """Float32 scales: PER of row g, then PER of row g + 8; `scale` points to words of at most 32 bits."""
    ELEMENT: tl.constexpr = SPEC.scale
    WORDS: tl.constexpr = 2 * PER * ELEMENT.bits // scale.dtype.element_ty.primitive_bitwidth
    words = _registers(_read(scale, place, WORDS), WORDS, THREADS)
    found = ()
    for i in tl.static_range(2 * PER):
        word = words[i * WORDS // (2 * PER)].to(tl.int32)
        if ELEMENT.bits == 32:
            value = word.to(tl.float32, bitcast=True)
        elif ELEMENT.bits == 16:
            low, high = _halves(word, ELEMENT.mantissa == 7)
            value = low if i % 2 == 0 else high
        else:
            value = _byte_scale(word, i % (2 * PER // WORDS), ELEMENT)
        found = found + (value,)
    return found


@triton.jit
def _byte_scale(word, BYTE: tl.constexpr, ELEMENT: tl.constexpr):
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
def _points(zero, place, SPEC: tl.constexpr, PER: tl.constexpr, THREADS: tl.constexpr):
    """Float32 zero points, as `_factors`."""
    WORDS: tl.constexpr = 16 * PER // zero.dtype.element_ty.primitive_bitwidth
    words = _registers(_read(zero, place, WORDS), WORDS, THREADS)
    found = ()
    for i in tl.static_range(2 * PER):
        code = words[i * WORDS // (2 * PER)].to(tl.int32) << (24 - 8 * (i % (2 * PER // WORDS)))
        code = code >> 24 if SPEC.signed_zero else (code >> 24) & 0xFF
        found = found + (code.to(tl.float32),)
    return found


@triton.jit
def _read_inputs(x, token, at, lane, tiles, k, EVEN: tl.constexpr):
    """A lane's eight pairs of inputs for a tile of 64 columns: two a product."""
    found = ()
    place = x + token.to(tl.int64) * (k // 2) + at * 32 + lane
    for i in tl.static_range(8):
        there = at < tiles if EVEN else at * 32 + lane + 4 * i < k // 2
        found = found + (tl.load(place + 4 * i, there, 0),)
    return found


@triton.jit
def _registers(x, COUNT: tl.constexpr, THREADS: tl.constexpr):
    """Columns of (THREADS, COUNT), each a tensor."""
    columns = split_planes(x, THREADS, COUNT, COUNT)
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.reshape(columns[i], (THREADS,)),)
    return found


@triton.jit
def _operand(
    words,
    FIRST: tl.constexpr,
    PRODUCT: tl.constexpr,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    BF16: tl.constexpr,
    LINES: tl.constexpr,
    TEXT: tl.constexpr,
):
    """The four registers of the first operand of a product, pairs of 16-bit floats, of a lane's words; all exact."""
    found = ()
    for a in tl.static_range(4):
        if SPEC.element.kind == "float":
            value = _line(_float_bits(words, FIRST, PRODUCT * 4 + a, SPEC, PARTS, BF16, TEXT), 0, BF16, LINES, TEXT)
        elif len(LINES) == 2:
            word = words[FIRST + PRODUCT * 2 + a // 2]
            high = _merge(word >> (8 * (a % 2) + 4), 0x000F000F, 0x43004300, TEXT)
            low = _merge(word >> (8 * (a % 2)), 0x000F000F, 0x43004300, TEXT)
            value = _sum(_line(high, 0, BF16, LINES, TEXT), _line(low, 1, BF16, LINES, TEXT), BF16, TEXT)
        else:
            # In the lowest bits of a bfloat16 from 128 on, or of a float16 from 1024 on.
            base = 0x43004300 if BF16 else 0x64006400
            value = _line(_field(words, FIRST, PRODUCT * 4 + a, 0, 0, PARTS, base, TEXT), 0, BF16, LINES, TEXT)
        found = found + (value,)
    return found


@triton.jit
def _field(
    words, FIRST: tl.constexpr, PAIR: tl.constexpr, PART: tl.constexpr, AT: tl.constexpr, PARTS: tl.constexpr, bits, TEXT: tl.constexpr
):
    """`bits` with the two codes of a pair, from their part at bit AT on, as the lowest of its halves."""
    SIZE: tl.constexpr = PARTS[PART]
    SHIFT: tl.constexpr = SIZE * (PAIR % (16 // SIZE)) - AT
    # Parts before are as many words as they are bits.
    word = words[FIRST + AT + PAIR // (16 // SIZE)]
    word = word >> SHIFT if SHIFT > 0 else word << -SHIFT
    pair = _merge(word, (((1 << SIZE) - 1) << AT) * 0x10001, bits, TEXT)
    if PART + 1 < len(PARTS):
        pair = _field(words, FIRST, PAIR, PART + 1, AT + SIZE, PARTS, pair, TEXT)
    return pair


@triton.jit
def _float_bits(
    words,
    FIRST: tl.constexpr,
    PAIR: tl.constexpr,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    BF16: tl.constexpr,
    TEXT: tl.constexpr,
):
    """Fields of floats as those of 16-bit ones, whose subnormals are the element's once biases are made equal."""
    BITS: tl.constexpr = SPEC.element.bits
    if len(PARTS) == 1:
        word = words[FIRST + PAIR * BITS // 16]
        AT: tl.constexpr = BITS * (PAIR % (16 // BITS))
    else:
        word = _field(words, FIRST, PAIR, 0, 0, PARTS, 0, TEXT)
        AT: tl.constexpr = 0
    TO: tl.constexpr = (7 if BF16 else 10) - SPEC.element.mantissa
    size = word << (TO - AT) if TO > AT else word >> (AT - TO)
    size = size & ((((1 << (BITS - 1)) - 1) << TO) * 0x10001)
    return _merge(word << (16 - BITS - AT), -0x7FFF8000, size, TEXT)


@triton.jit
def _merge(word, MASK: tl.constexpr, bits, TEXT: tl.constexpr):
    """`word & MASK | bits`, in one instruction."""
    if TEXT.merge != "":
        value = tl.inline_asm_elementwise(TEXT.merge, "=r,r,r,r", [word, MASK, bits], tl.int32, True, 1)
    else:
        value = word & MASK | bits
    return value


@triton.jit
def _line(x, AT: tl.constexpr, BF16: tl.constexpr, LINES: tl.constexpr, TEXT: tl.constexpr):
    """Of two 16-bit floats, what the numbers of a line make of them."""
    if TEXT.mma != "":
        value = tl.inline_asm_elementwise(TEXT.line[AT], "=r,r", [x], tl.int32, True, 1)
    else:
        low, high = _halves(x, BF16)
        value = _pair(low * LINES[AT][0] + LINES[AT][1], high * LINES[AT][0] + LINES[AT][1], BF16)
    return value


@triton.jit
def _sum(x, y, BF16: tl.constexpr, TEXT: tl.constexpr):
    if TEXT.mma != "":
        value = tl.inline_asm_elementwise(TEXT.add, "=r,r,r", [x, y], tl.int32, True, 1)
    else:
        a, b = _halves(x, BF16)
        c, d = _halves(y, BF16)
        value = _pair(a + c, b + d, BF16)
    return value


@triton.jit
def _halves(x, BF16: tl.constexpr):
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
    """Undo `_halves` of what needs no rounding."""
    if BF16:
        value = (low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF | high.to(tl.int32, bitcast=True) & -0x10000
    else:
        low = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        value = low | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return value


@triton.jit
def _mma(a, b, c, FIRST: tl.constexpr, BF16: tl.constexpr, TEXT: tl.constexpr, WARPS: tl.constexpr):
    """`mma.m16n8k16` of four registers, two of inputs, and four to which the products are added unless it is the FIRST."""
    if TEXT.mma != "":
        kinds: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        given = [a[0], a[1], a[2], a[3], b[0], b[1]]
        if FIRST:
            d = tl.inline_asm_elementwise(TEXT.first, "=f,=f,=f,=f,r,r,r,r,r,r", given, kinds, True, 1)
        else:
            given = given + [c[0], c[1], c[2], c[3]]
            d = tl.inline_asm_elementwise(TEXT.mma, _REGISTERS, given, kinds, True, 1)
    else:
        tokens = _matrix(b[0], b[1], BF16, WARPS)[:, None, :, :]
        top = tl.sum(_matrix(a[0], a[2], BF16, WARPS)[:, :, None, :] * tokens, 3)
        bottom = tl.sum(_matrix(a[1], a[3], BF16, WARPS)[:, :, None, :] * tokens, 3)
        d0, d1 = tl.split(tl.reshape(top, (WARPS * 32, 2)))
        d2, d3 = tl.split(tl.reshape(bottom, (WARPS * 32, 2)))
        d = (d0, d1, d2, d3) if FIRST else (c[0] + d0, c[1] + d1, c[2] + d2, c[3] + d3)
    return d


@triton.jit
def _matrix(first, second, BF16: tl.constexpr, WARPS: tl.constexpr):
    """Float32 (WARPS, 8, 16) of a register that holds columns 0 to 7, and one of columns 8 to 15."""
    a, b = _halves(first, BF16)
    c, d = _halves(second, BF16)
    halves = tl.join(tl.reshape(tl.join(a, b), (WARPS, 8, 8)), tl.reshape(tl.join(c, d), (WARPS, 8, 8)))
    return tl.reshape(tl.permute(halves, (0, 1, 3, 2)), (WARPS, 8, 16))


@triton.jit
def _scaled(new, one, two, old):
    """Products of rows g and g + 8 times their scales, and what there was."""
    return (
        tl.fma(new[0], one, old[0]),
        tl.fma(new[1], one, old[1]),
        tl.fma(new[2], two, old[2]),
        tl.fma(new[3], two, old[3]),
    )


@triton.jit
def _shifted(new, one, two, sum_x):
    """Products of rows g and g + 8 less their zero points times the sums of inputs."""
    return new[0] - one * sum_x[0], new[1] - one * sum_x[1], new[2] - two * sum_x[2], new[3] - two * sum_x[3]


@triton.jit
def _write(
    totals,
    tensor_scale,
    tensor_row,
    bias,
    out,
    tile,
    token,
    m,
    n,
    SPEC: tl.constexpr,
    WARPS: tl.constexpr,
    TALL: tl.constexpr,
    TOKENS: tl.constexpr,
):
    lane, i = tl.arange(0, 32)[:, None], tl.arange(0, 4)[None, :]
    for r in tl.static_range(TALL):
        row = (tile + r) * 16 + lane // 4 + 8 * (i % 2)
        for j in tl.static_range(TOKENS):
            q = totals[r * TOKENS + j]
            parts = tl.join(tl.join(q[0], q[1]), tl.join(q[2], q[3]))
            value = tl.sum(tl.reshape(parts, (WARPS, 32, 4)), 0)
            if tensor_scale is not None:
                value *= tl.load(tensor_scale + row * tensor_row, row < n, 0.0)
            if bias is not None:
                value += to_float32(tl.load(bias + row, row < n, 0))
            t = token + j * 8 + lane % 4 * 2 + i // 2
            place = out + t.to(tl.int64) * n + row
            tl.store(place, from_float32(value, out.dtype.element_ty, SPEC), (t < m) & (row < n))
