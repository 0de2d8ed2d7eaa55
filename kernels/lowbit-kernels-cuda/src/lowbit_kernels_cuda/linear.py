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
from lowbit_kernels_cuda.scaling import from_float32, scale_value, split_planes, to_float32

_REGISTERS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")


@dataclass(frozen=True, slots=True)
class Text:
    """PTX of what Triton has no words for, by type of the inputs; all empty for Triton's interpreter."""

    mma: str = ""
    add: str = ""
    mul: str = ""
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
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        f"add.rn.{kind}x2 $0, $1, $2;",
        f"mul.rn.{kind}x2 $0, $1, $2;",
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
    WARPS: tl.constexpr,
    TALL: tl.constexpr,
    TOKENS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """`out` (M, N) of `x` (M, K / 2) int32 pairs; TALL times 16 rows by TOKENS times 8 tokens a program.

    `scale` and `zero` (K / group, N), `words` as of `pack_tiles`; AHEAD tiles of 64 columns are read before they are
    multiplied.
    """
    THREADS: tl.constexpr = 32 * WARPS
    t = tl.arange(0, THREADS)
    warp, row, lane = t // 32, t % 32 // 4, t % 4
    tile, token = tl.program_id(0) * TALL, tl.program_id(1) * (TOKENS * 8)
    tiles = tl.cdiv(k, 64)
    totals = _zeros(TALL * TOKENS, THREADS)
    for first in range(0, tiles, WARPS * AHEAD):
        codes, inputs = (), ()
        for i in tl.static_range(AHEAD):
            at = first + i * WARPS + warp
            for r in tl.static_range(TALL):
                place = ((tile + r).to(tl.int64) * tiles + at) * 32 + t % 32
                codes = codes + _read_words(words, place, at < tiles, PARTS, THREADS)
            for j in tl.static_range(TOKENS):
                inputs = inputs + _read_inputs(x, token + j * 8 + row, at, lane, m, k, THREADS)
        WORDS: tl.constexpr = SPEC.element.bits
        for i in tl.static_range(AHEAD):
            at = first + i * WARPS + warp
            sums, inputs_sums = _zeros(TALL * TOKENS, THREADS), _zeros(TOKENS, THREADS)
            for s in tl.static_range(4):
                added, inputs_added = (), ()
                for r in tl.static_range(TALL):
                    a = _operand(codes, (i * TALL + r) * WORDS, s, SPEC, PARTS, BF16, LINES, TEXT)
                    if GROUP == 16:
                        # A lane's columns of a product are those of one group; its scale and a code make a 16-bit float.
                        group = at * 4 + s // 2 * 2 + lane // 2
                        there = (at < tiles) & (group * 16 < k)
                        one = _scale(scale, group, (tile + r) * 16 + row, n, there, SPEC)
                        two = _scale(scale, group, (tile + r) * 16 + row + 8, n, there, SPEC)
                        one, two = _pair(one, one, BF16), _pair(two, two, BF16)
                        a = (
                            _product(a[0], one, BF16, TEXT),
                            _product(a[1], two, BF16, TEXT),
                            _product(a[2], one, BF16, TEXT),
                            _product(a[3], two, BF16, TEXT),
                        )
                    for j in tl.static_range(TOKENS):
                        added = added + (
                            _mma(a, inputs, (i * TOKENS + j) * 8 + 2 * s, sums[r * TOKENS + j], BF16, TEXT, WARPS),
                        )
                sums = added
                if SPEC.zero:
                    ones = tl.full([THREADS], 0x3F803F80 if BF16 else 0x3C003C00, tl.int32)
                    for j in tl.static_range(TOKENS):
                        a = ones, ones, ones, ones
                        inputs_added = inputs_added + (
                            _mma(a, inputs, (i * TOKENS + j) * 8 + 2 * s, inputs_sums[j], BF16, TEXT, WARPS),
                        )
                    inputs_sums = inputs_added
                if (GROUP == 32 and s % 2 == 1) or (GROUP != 32 and s == 3):
                    group = 0 if GROUP == 0 else (at * 64 + s // 2 * 32) // GROUP
                    there = at < tiles
                    if GROUP == 32:
                        there = there & (at * 64 + s // 2 * 32 < k)
                    scaled = ()
                    for r in tl.static_range(TALL):
                        one, two = 1.0, 1.0
                        if GROUP != 16:
                            one = _scale(scale, group, (tile + r) * 16 + row, n, there, SPEC)
                            two = _scale(scale, group, (tile + r) * 16 + row + 8, n, there, SPEC)
                        for j in tl.static_range(TOKENS):
                            new, old = sums[r * TOKENS + j], totals[r * TOKENS + j]
                            if SPEC.zero:
                                p = _zero(zero, group, (tile + r) * 16 + row, n, there, SPEC)
                                q = _zero(zero, group, (tile + r) * 16 + row + 8, n, there, SPEC)
                                sum_ = inputs_sums[j]
                                new = (
                                    new[0] - p * sum_[0],
                                    new[1] - p * sum_[1],
                                    new[2] - q * sum_[2],
                                    new[3] - q * sum_[3],
                                )
                            if GROUP == 16:
                                new = new[0] + old[0], new[1] + old[1], new[2] + old[2], new[3] + old[3]
                            else:
                                new = (
                                    tl.fma(new[0], one, old[0]),
                                    tl.fma(new[1], one, old[1]),
                                    tl.fma(new[2], two, old[2]),
                                    tl.fma(new[3], two, old[3]),
                                )
                            scaled = scaled + (new,)
                    totals, sums = scaled, _zeros(TALL * TOKENS, THREADS)
                    inputs_sums = _zeros(TOKENS, THREADS)
    _write(totals, tensor_scale, tensor_row, bias, out, tile, token, m, n, SPEC, WARPS, TALL, TOKENS)


@triton.jit
def _zeros(COUNT: tl.constexpr, THREADS: tl.constexpr):
    all_ = ()
    for _ in tl.static_range(COUNT):
        z = tl.zeros([THREADS], tl.float32)
        all_ = all_ + ((z, z, z, z),)
    return all_


@triton.jit
def _read_words(words, place, there, PARTS: tl.constexpr, THREADS: tl.constexpr):
    """A lane's words of all parts of a tile, one after another."""
    found = ()
    for p in tl.static_range(len(PARTS)):
        found = found + _read_part(words[p], place, there, PARTS[p], THREADS)
    return found


@triton.jit
def _read_part(words, place, there, SIZE: tl.constexpr, THREADS: tl.constexpr):
    at = words + place[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return _registers(tl.load(at, there[:, None], 0, eviction_policy="evict_first"), SIZE, THREADS)


@triton.jit
def _read_inputs(x, token, at, lane, m, k, THREADS: tl.constexpr):
    """A lane's eight pairs of inputs for a tile of 64 columns: two a product."""
    found = ()
    for half in tl.static_range(2):
        column = at * 64 + 32 * half + 8 * lane
        place = x + (token.to(tl.int64) * (k // 2) + column // 2)[:, None] + tl.arange(0, 4)[None, :]
        found = found + _registers(tl.load(place, ((token < m) & (column < k))[:, None], 0), 4, THREADS)
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
    """The four registers of the first operand of a product, pairs of 16-bit floats, of a lane's words."""
    found = ()
    for a in tl.static_range(4):
        pair = _field(words, FIRST, PRODUCT * 4 + a, 0, PARTS)
        found = found + (_values(pair, SPEC, BF16, LINES, TEXT),)
    return found


@triton.jit
def _field(words, FIRST: tl.constexpr, PAIR: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """The two codes of a pair, each in its half of an integer."""
    SIZE: tl.constexpr = PARTS[PART]
    PER: tl.constexpr = 16 // SIZE
    MASK: tl.constexpr = ((1 << SIZE) - 1) * 0x10001
    codes = (words[FIRST + PAIR // PER] >> (SIZE * (PAIR % PER))) & MASK
    if PART + 1 < len(PARTS):
        codes |= _field(words, FIRST + SIZE, PAIR, PART + 1, PARTS) << SIZE
    return codes


@triton.jit
def _values(pair, SPEC: tl.constexpr, BF16: tl.constexpr, LINES: tl.constexpr, TEXT: tl.constexpr):
    """Values of two codes as 16-bit floats, each in its half; every one is exact."""
    ELEMENT: tl.constexpr = SPEC.element
    BITS: tl.constexpr = ELEMENT.bits
    if ELEMENT.kind == "float":
        # The fields as those of a 16-bit float, whose subnormals are the element's once biases are made equal.
        SIZE: tl.constexpr = ((1 << (BITS - 1)) - 1) * 0x10001
        SHIFT: tl.constexpr = (7 if BF16 else 10) - ELEMENT.mantissa
        placed = ((pair & SIZE) << SHIFT) | ((pair << (16 - BITS)) & -0x7FFF8000)
        values = _line(placed, 0, BF16, LINES, TEXT)
    elif len(LINES) == 2:
        high = _line(((pair >> 4) & 0x000F000F) | 0x43004300, 0, BF16, LINES, TEXT)
        low = _line((pair & 0x000F000F) | 0x43004300, 1, BF16, LINES, TEXT)
        values = _sum(high, low, BF16, TEXT)
    else:
        # In the lowest bits of a bfloat16 from 128 on, or of a float16 from 1024 on.
        values = _line(pair | (0x43004300 if BF16 else 0x64006400), 0, BF16, LINES, TEXT)
    return values


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
def _product(x, y, BF16: tl.constexpr, TEXT: tl.constexpr):
    if TEXT.mma != "":
        value = tl.inline_asm_elementwise(TEXT.mul, "=r,r,r", [x, y], tl.int32, True, 1)
    else:
        a, b = _halves(x, BF16)
        c, d = _halves(y, BF16)
        value = _pair(a * c, b * d, BF16)
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
def _mma(a, inputs, FIRST: tl.constexpr, c, BF16: tl.constexpr, TEXT: tl.constexpr, WARPS: tl.constexpr):
    """`mma.m16n8k16` of four registers, two of the inputs' from FIRST on, and four to which the products are added."""
    b0, b1 = inputs[FIRST], inputs[FIRST + 1]
    if TEXT.mma != "":
        kinds: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        given = [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]]
        d = tl.inline_asm_elementwise(TEXT.mma, _REGISTERS, given, kinds, True, 1)
    else:
        tokens = _matrix(b0, b1, BF16, WARPS)[:, None, :, :]
        top = tl.sum(_matrix(a[0], a[2], BF16, WARPS)[:, :, None, :] * tokens, 3)
        bottom = tl.sum(_matrix(a[1], a[3], BF16, WARPS)[:, :, None, :] * tokens, 3)
        d0, d1 = tl.split(tl.reshape(top, (WARPS * 32, 2)))
        d2, d3 = tl.split(tl.reshape(bottom, (WARPS * 32, 2)))
        d = c[0] + d0, c[1] + d1, c[2] + d2, c[3] + d3
    return d


@triton.jit
def _matrix(first, second, BF16: tl.constexpr, WARPS: tl.constexpr):
    """Float32 (WARPS, 8, 16) of a register that holds columns 0 to 7, and one of columns 8 to 15."""
    a, b = _halves(first, BF16)
    c, d = _halves(second, BF16)
    halves = tl.join(tl.reshape(tl.join(a, b), (WARPS, 8, 8)), tl.reshape(tl.join(c, d), (WARPS, 8, 8)))
    return tl.reshape(tl.permute(halves, (0, 1, 3, 2)), (WARPS, 8, 16))


@triton.jit
def _scale(scale, group, row, n, there, SPEC: tl.constexpr):
    """Float32 scales of a group of rows."""
    stored = tl.load(scale + group * n + row, there & (row < n), 0)
    return scale_value(stored, 1.0, SPEC)


@triton.jit
def _zero(zero, group, row, n, there, SPEC: tl.constexpr):
    """Float32 zero points of a group of rows."""
    found = tl.load(zero + group * n + row, there & (row < n), 0).to(tl.int32)
    if SPEC.signed_zero:
        found = (found << 24) >> 24
    return found.to(tl.float32)


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
