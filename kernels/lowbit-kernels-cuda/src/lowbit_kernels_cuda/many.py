"""A linear layer whose weight alone is in low precision, for many tokens: codes become the first operand in registers.

`tl.dot` of rows of the weight by tokens; the order of `lowbit_kernels_cuda.weights` is that of the operand, so that Triton
moves nothing between lanes. Where a scale times a code need not be a 16-bit float, and tokens are few, each group's
products are summed in float32 before they meet its scale.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels_cuda.codes import from_float32, to_float32
from lowbit_kernels_cuda.fragments import factors, halves, operand, points, read, registers, sum_of


@triton.jit
def linear_dots(
    x,
    words,
    scale,
    zero,
    sums,
    tensor_scale,
    tensor_row,
    bias,
    out,
    parts,
    count,
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
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    BAND: tl.constexpr,
):
    """`out` (M, N) of `x` (M, K); ROWS rows of the weight by TOKENS tokens a program, COLUMNS columns at a time.

    `words`, `scale` and `zero` as packed by `lowbit_kernels_cuda.weights`; `sums` of the inputs of a group. Programs of
    the same rows and tokens take SPLITS parts of K: all write theirs to `parts`, and the last, by `count`, adds them in
    order. EXACT if scales are of sums rather than of codes. Programs go down BAND blocks of rows, then along tokens.
    """
    rows_of, tokens_of = tl.cdiv(n, ROWS), tl.cdiv(m, TOKENS)
    program, split = tl.program_id(0), tl.program_id(1)
    band = program // (BAND * tokens_of) * BAND
    tall = tl.minimum(rows_of - band, BAND)
    row, token = band + program % (BAND * tokens_of) % tall, program % (BAND * tokens_of) // tall
    TALL: tl.constexpr = ROWS // 16
    WIDE: tl.constexpr = COLUMNS // 64
    LANES: tl.constexpr = TALL * WIDE * 32
    steps = tl.cdiv(k, COLUMNS)
    each = tl.cdiv(steps, SPLITS)
    first, last = split * each, tl.minimum(split * each + each, steps)
    tiles, high = tl.cdiv(k, 64), tl.cdiv(n, 16)
    lanes = tl.arange(0, LANES)
    tile = tl.minimum(row * TALL + lanes // (WIDE * 32), high - 1).to(tl.int64) * tiles
    lane = lanes % (WIDE * 32)
    tokens = token * TOKENS + tl.arange(0, TOKENS)
    inputs = x + tl.minimum(tokens, m - 1).to(tl.int64)[None, :] * k
    column = tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        at = step * WIDE + lane // 32
        if EVEN:
            there = None
            b = tl.load(inputs + (step * COLUMNS + column)[:, None])
        else:
            there = at < tiles
            b = tl.load(inputs + (step * COLUMNS + column)[:, None], (step * COLUMNS + column < k)[:, None], 0)
        codes = _read_words(words, (tile + step * WIDE) * 32 + lane, there, PARTS, LANES)
        PER: tl.constexpr = 64 // GROUP if 0 < GROUP and GROUP < 64 else 1
        less = ()
        if SPEC.zero and sums is None:
            less = _less(zero, tile // tiles, tl.minimum(at, tiles - 1), lane % 32 // 4, k, GROUP, PER, BF16, LANES)
        a = _values(codes, less, SPEC, PARTS, BF16, LINES, TEXT, TALL, WIDE, PER)
        if GROUP == 0:
            acc = _settled(tl.dot(a, b, acc, input_precision="ieee"), TEXT)
        else:
            place = _place(row, high, step, k, GROUP, TALL, WIDE)
            SPANS: tl.constexpr = WIDE * 64 // GROUP if WIDE * 64 > GROUP else 1
            f = _of_rows(factors(scale, place, SPEC, PER, TALL * SPANS // PER * 8), PER, TALL, SPANS // PER)
            if EXACT:
                new = tl.dot(a, b, input_precision="ieee")
                if sums is not None:
                    z = _of_rows(points(zero, place, 1, TALL * 8), 1, TALL, 1)
                    s = tl.load(sums + tl.minimum(tokens, m - 1) * tl.cdiv(k, GROUP) + step * COLUMNS // GROUP)
                    new -= (z + SPEC.element.min) * s[None, :]
                acc += new * f
            else:
                acc = _settled(tl.dot(_times(a, f, ROWS, COLUMNS), b, acc, input_precision="ieee"), TEXT)
    _write(
        *(acc, scale, zero, sums, tensor_scale, tensor_row, bias, out, parts, count, row, tokens, split, m, n, high),
        *(SPEC, GROUP, ROWS, TOKENS, SPLITS),
    )


@triton.jit
def _read_words(words, place, there, PARTS: tl.constexpr, LANES: tl.constexpr):
    """A lane's words of all parts of a tile, one after another."""
    found = ()
    for p in tl.static_range(len(PARTS)):
        pointer = words[p] + place[:, None] * PARTS[p] + tl.arange(0, PARTS[p])[None, :]
        word = tl.load(pointer) if there is None else tl.load(pointer, there[:, None], 0)
        found = found + registers(word, PARTS[p], LANES)
    return found


@triton.jit
def _settled(acc, TEXT: tl.constexpr):
    """Sums, once they are there.

    Else Triton (3.6) leaves products running while the next step's operand is written to the registers that they read.
    """
    if TEXT.mma != "":
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], tl.float32, True, 1)
    return acc


@triton.jit
def _less(zero, above, at, g, k, GROUP: tl.constexpr, PER: tl.constexpr, BF16: tl.constexpr, LANES: tl.constexpr):
    """Pairs of what codes are above, the offset and a zero point, negative: of rows g, then of g + 8, PER of each."""
    spans = tl.cdiv(k, GROUP * PER)
    place = (above * spans + (at if PER > 1 else at * 64 // GROUP)) * 8 + g
    words = registers(read(zero, place, PER), PER, LANES)
    found = ()
    for i in tl.static_range(2 * PER):
        code = words[i // 2] & 0xFFFF if i % 2 == 0 else (words[i // 2] >> 16) & 0xFFFF
        found = found + ((code | (code << 16)) | (-0x3CFF3D00 if BF16 else -0x1BFF1C00),)
    return found


@triton.jit
def _values(
    codes,
    less,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    BF16: tl.constexpr,
    LINES: tl.constexpr,
    TEXT: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    PER: tl.constexpr,
):
    """16-bit floats (rows, columns) of the codes of tiles."""
    products = ()
    for s in tl.static_range(4):
        r = operand(codes, 0, s, SPEC, PARTS, BF16, LINES, TEXT)
        if len(less) > 0:
            one, two = less[s * PER // 4], less[PER + s * PER // 4]
            r = sum_of(r[0], one, BF16, TEXT), sum_of(r[1], two, BF16, TEXT), sum_of(r[2], one, BF16, TEXT), sum_of(r[3], two, BF16, TEXT)
        # Halves, rows, and columns beyond 8, from the left.
        top = tl.join(_floats(r[0], BF16, TEXT), _floats(r[1], BF16, TEXT))
        products = products + (tl.join(top, tl.join(_floats(r[2], BF16, TEXT), _floats(r[3], BF16, TEXT))),)
    value = tl.join(tl.join(products[0], products[1]), tl.join(products[2], products[3]))
    value = tl.reshape(value, (TALL, WIDE, 8, 4, 2, 2, 2, 2, 2))
    value = tl.permute(value, (0, 5, 2, 1, 8, 7, 6, 3, 4))
    return tl.reshape(value, (TALL * 16, WIDE * 64))


@triton.jit
def _floats(pair, BF16: tl.constexpr, TEXT: tl.constexpr):
    """Both numbers of a pair; in float32 for Triton's interpreter."""
    if TEXT.mma == "":
        low, high = halves(pair, BF16)
    else:
        kind: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        low, high = pair.to(tl.int16).to(kind, bitcast=True), (pair >> 16).to(tl.int16).to(kind, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _place(row, high, step, k, GROUP: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Where the scales of a step's rows are."""
    SPAN: tl.constexpr = GROUP if GROUP > 64 else 64
    SPANS: tl.constexpr = WIDE * 64 // SPAN if WIDE * 64 > SPAN else 1
    spans = tl.cdiv(k, SPAN)
    i = tl.arange(0, TALL * SPANS * 8)
    above = tl.minimum(row * TALL + i // (SPANS * 8), high - 1)
    return (above * spans + tl.minimum(step * WIDE * 64 // SPAN + i // 8 % SPANS, spans - 1)) * 8 + i % 8


@triton.jit
def _of_rows(found, PER: tl.constexpr, TALL: tl.constexpr, SPANS: tl.constexpr):
    """(rows, groups) of PER numbers of row g, and PER of row g + 8, of each lane."""
    if PER == 1:
        value = tl.reshape(tl.join(found[0], found[1]), (TALL, SPANS, 8, 2, 1))
    elif PER == 2:
        value = tl.join(tl.join(found[0], found[2]), tl.join(found[1], found[3]))
        value = tl.reshape(value, (TALL, SPANS, 8, 2, 2))
    else:
        even = tl.join(tl.join(found[0], found[4]), tl.join(found[2], found[6]))
        odd = tl.join(tl.join(found[1], found[5]), tl.join(found[3], found[7]))
        value = tl.reshape(tl.join(even, odd), (TALL, SPANS, 8, 2, 4))
    return tl.reshape(tl.permute(value, (0, 3, 2, 1, 4)), (TALL * 16, SPANS * PER))


@triton.jit
def _times(a, by, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes (rows, columns) times numbers (rows, groups)."""
    each = tl.reshape(a, (ROWS, by.shape[1], COLUMNS // by.shape[1])) * by.to(a.dtype)[:, :, None]
    return tl.reshape(each, (ROWS, COLUMNS))


@triton.jit
def _write(
    acc,
    scale,
    zero,
    sums,
    tensor_scale,
    tensor_row,
    bias,
    out,
    parts,
    count,
    row,
    tokens,
    split,
    m,
    n,
    high,
    SPEC: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    rows = row * ROWS + tl.arange(0, ROWS)
    place = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    there = (tokens < m)[None, :] & (rows < n)[:, None]
    if SPLITS > 1:
        tl.store(parts + split * (m.to(tl.int64) * n) + place, acc, there)
        # Everyone's part is there before one says so.
        tl.debug_barrier()
        ticket = count + tl.program_id(0)
        if tl.atomic_add(ticket, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(ticket, 0)
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for i in tl.static_range(SPLITS):
            acc += tl.load(parts + i * (m.to(tl.int64) * n) + place, there, 0.0, cache_modifier=".cg")
    if GROUP == 0:
        TALL: tl.constexpr = ROWS // 16
        i = tl.arange(0, TALL * 8)
        at = tl.minimum(row * TALL + i // 8, high - 1) * 8 + i % 8
        if SPEC.zero:
            z = _of_rows(points(zero, at, 1, TALL * 8), 1, TALL, 1) + SPEC.element.min
            acc -= z * tl.load(sums + tl.minimum(tokens, m - 1))[None, :]
        acc *= _of_rows(factors(scale, at, SPEC, 1, TALL * 8), 1, TALL, 1)
    if tensor_scale is not None:
        acc *= tl.load(tensor_scale + rows * tensor_row, rows < n, 0.0)[:, None]
    if bias is not None:
        acc += to_float32(tl.load(bias + rows, rows < n, 0))[:, None]
    tl.store(out + place, from_float32(acc, out.dtype.element_ty, SPEC), there)
