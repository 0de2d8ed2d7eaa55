"""A linear layer whose weight alone is in low precision, for few tokens: a lane multiplies what it reads.

Every tensor of the kernel has one element for each lane of the program, which is how Triton has registers by name;
products are `mma.m16n8k16` of 16 rows of the weight by 8 tokens. Warps take parts of K in turn; each group's products
are summed in float32 before they meet its scale, so that codes are multiplied exactly.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels_cuda.codes import from_float32, to_float32
from lowbit_kernels_cuda.fragments import factors, halves, operand, points, read, registers

_REGISTERS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")


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
        codes, inputs, given, zeros = (), (), (), ()
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
                    given = given + factors(scale, place, SPEC, PER, THREADS)
                    if SPEC.zero:
                        zeros = zeros + points(zero, place, PER, THREADS)
            for j in tl.static_range(TOKENS):
                inputs = inputs + _read_inputs(x, tl.minimum(token + j * 8 + row, m - 1), begin + i, lane, tiles, k, EVEN)
        sums, sums_x = totals, totals_x
        for step in tl.static_range(4 * AHEAD):
            totals, sums, sums_x = _step(
                *(codes, inputs, given, zeros, totals, sums, sums_x, step),
                *(SPEC, PARTS, GROUP, BF16, LINES, TEXT, WARPS, TALL, TOKENS, SPAN, PER),
            )
        if GROUP == 0:
            totals, totals_x = sums, sums_x
    if GROUP == 0:
        scaled, none = (), tl.zeros([THREADS], tl.float32)
        for r in tl.static_range(TALL):
            place = tl.minimum(tile + r, last) * 8 + row
            one, two = factors(scale, place, SPEC, 1, THREADS)
            for j in tl.static_range(TOKENS):
                new = totals[r * TOKENS + j]
                if SPEC.zero:
                    z = points(zero, place, 1, THREADS)
                    new = _shifted(new, z[0] + SPEC.element.min, z[1] + SPEC.element.min, totals_x[j])
                scaled = scaled + (_scaled(new, one, two, (none, none, none, none)),)
        totals = scaled
    _write(totals, tensor_scale, tensor_row, bias, out, tile, token, m, n, SPEC, WARPS, TALL, TOKENS)


@triton.jit
def _step(
    codes,
    inputs,
    given,
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
        a = operand(codes, (TILE * TALL + r) * SPEC.element.bits, STEP % 4, SPEC, PARTS, BF16, LINES, TEXT)
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
            one, two = given[AT + r * 2 * PER], given[AT + r * 2 * PER + PER]
            for j in tl.static_range(TOKENS):
                new = added[r * TOKENS + j]
                if SPEC.zero:
                    one_z, two_z = zeros[AT + r * 2 * PER] + SPEC.element.min, zeros[AT + r * 2 * PER + PER] + SPEC.element.min
                    new = _shifted(new, one_z, two_z, added_x[j])
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
        found = found + registers(read(words[p], place, PARTS[p]), PARTS[p], THREADS)
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
def _mma(a, b, c, FIRST: tl.constexpr, BF16: tl.constexpr, TEXT: tl.constexpr, WARPS: tl.constexpr):
    """`mma.m16n8k16` of four registers, two of inputs, and four to which the products are added unless it is the FIRST."""
    if TEXT.mma != "":
        kinds: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        of = [a[0], a[1], a[2], a[3], b[0], b[1]]
        if FIRST:
            d = tl.inline_asm_elementwise(TEXT.first, "=f,=f,=f,=f,r,r,r,r,r,r", of, kinds, True, 1)
        else:
            of = of + [c[0], c[1], c[2], c[3]]
            d = tl.inline_asm_elementwise(TEXT.mma, _REGISTERS, of, kinds, True, 1)
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
    a, b = halves(first, BF16)
    c, d = halves(second, BF16)
    both = tl.join(tl.reshape(tl.join(a, b), (WARPS, 8, 8)), tl.reshape(tl.join(c, d), (WARPS, 8, 8)))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (WARPS, 8, 16))


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
