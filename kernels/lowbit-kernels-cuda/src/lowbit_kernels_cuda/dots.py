"""A linear layer whose weight alone is in low precision: codes become the first operand of products in registers.

`tl.dot` of rows of the weight by tokens; the order of `lowbit_kernels_cuda.weights` is that of the operand, so that
Triton moves nothing between lanes. Where a scale times a code need not be a 16-bit float, each group's products are
summed in float32 before they meet its scale, unless tokens are many.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels_cuda.codes import from_float32, to_float32
from lowbit_kernels_cuda.fragments import factors, less_pairs, points, read, registers, scale_pairs, values
from lowbit_kernels_cuda.programs import program_of


@triton.jit(do_not_specialize=["m"])
def linear_dots(
    x,
    x_scale,
    x_step,
    words,
    scale,
    zero,
    sums,
    tensor_scale,
    tensor_row,
    tensor_expert,
    bias,
    out,
    parts,
    count,
    offs,
    others,
    m,
    n,
    k,
    SPEC: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    LINES: tl.constexpr,
    TEXT: tl.constexpr,
    LIFT: tl.constexpr,
    AFTER: tl.constexpr,
    EXPERTS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    BAND: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """`out` (M, N) of `x` (M, K); ROWS rows of the weight by TOKENS tokens a program, COLUMNS columns at a time.

    `words`, `scale` and `zero` as packed by `lowbit_kernels_cuda.weights`; `sums` of the inputs of a group. Programs of
    the same rows and tokens take SPLITS parts of K: all write theirs to `parts`, and the last, by `count`, adds them in
    order. EXACT if scales are of sums rather than of codes. `x_scale`, if any, are float32 scales of inputs, `x_step`
    (0 or 1) from token to token; with SPAN, (M, K / SPAN) of as many columns, whole steps. With EXPERTS, the weight is
    (EXPERTS, N, K), and `offs` ends the tokens of each; those beyond the last become zeros. OVERLAPS: this
    may start while the kernel before rounds the inputs. Who does what: `program_of`.

    `others`: of weights of as many columns that the same inputs meet, too, results, numbers of rows, scales, zero
    points, tensor scales, biases and words. Programs of one follow those of another, and so do their `parts`.
    """
    program, before = tl.program_id(0), 0
    if len(others) > 0:
        which, first, end, above = 0, 0, tl.cdiv(n, ROWS) * tl.cdiv(m, TOKENS), n
        for i in tl.static_range(len(others[1])):
            beyond, rows_of = tl.program_id(0) >= end, others[1][i]
            which, first, before = which + beyond, tl.where(beyond, end, first), tl.where(beyond, above, before)
            end, above = end + tl.cdiv(rows_of, ROWS) * tl.cdiv(m, TOKENS), above + rows_of
        program -= first
        out, n, scale = _pick(which, out, others[0]), _pick(which, n, others[1]), _pick(which, scale, others[2])
        if zero is not None:
            zero = _pick(which, zero, others[3])
        if tensor_scale is not None:
            tensor_scale = _pick(which, tensor_scale, others[4])
        if bias is not None:
            bias = _pick(which, bias, others[5])
        chosen = ()
        for p in tl.static_range(len(words)):
            chosen = chosen + (_pick(which, words[p], others[6 + p]),)
        words = chosen
        if SPLITS > 1:
            parts += SPLITS * m.to(tl.int64) * before
    index = tl.arange(0, triton.next_power_of_2(EXPERTS + 1))
    row, expert, begin, routed, end = program_of(program, index, offs, m, n, EXPERTS, ROWS, TOKENS, BAND)
    # Python's `and` of what is known and what is not is no constant.
    if EXPERTS != 0:  # noqa: SIM102
        if begin >= end:
            return
    split = tl.program_id(1)
    TALL: tl.constexpr = ROWS // 16
    WIDE: tl.constexpr = COLUMNS // 64
    LANES: tl.constexpr = TALL * WIDE * 32
    steps = tl.cdiv(k, COLUMNS)
    each = tl.cdiv(steps, SPLITS)
    first, last = split * each, tl.minimum(split * each + each, steps)
    if EXPERTS != 0:
        last = tl.where(begin < routed, last, first)
    tiles, high = tl.cdiv(k, 64), tl.cdiv(n, 16)
    lanes = tl.arange(0, LANES)
    tile = (expert * high + tl.minimum(row * TALL + lanes // (WIDE * 32), high - 1)).to(tl.int64) * tiles
    lane = lanes % (WIDE * 32)
    tokens = begin + tl.arange(0, TOKENS)
    # In the place of tokens that are not there others are read, each once or twice (one for all keeps the same memory
    # busy), but none if tokens are few.
    WRAPPED: tl.constexpr = TOKENS > 32
    inputs = x + (tokens % m if WRAPPED else tokens).to(tl.int64)[None, :] * k
    given = (tokens < end)[None, :]
    column = tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    for step in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        at = step * WIDE + lane // 32
        place = inputs + (step * COLUMNS + column)[:, None]
        if EVEN:
            b = tl.load(place) if WRAPPED else tl.load(place, given, 0.0)
        else:
            within = (step * COLUMNS + column < k)[:, None]
            b = tl.load(place, within if WRAPPED else given & within, 0.0)
        codes = _read_words(words, (tile + step * WIDE) * 32 + lane, at < tiles, EVEN, PARTS, LANES)
        less, times = (), ()
        if GROUP != 0:
            PER: tl.constexpr = 64 // GROUP if GROUP < 64 else 1
            # Scales of the lane's own rows, which are those that it has codes of.
            span = tl.minimum(at, tiles - 1) if GROUP <= 64 else tl.minimum(at, tiles - 1) * 64 // GROUP
            place = (tile // tiles * tl.cdiv(k, GROUP * PER) + span) * 8 + lane % 32 // 4
            if SPEC.zero and sums is None:
                less = less_pairs(registers(read(zero, place, PER), PER, LANES), PER, BF16)
            if not EXACT:
                COUNT: tl.constexpr = 2 * PER * SPEC.scale.bits // scale.dtype.element_ty.primitive_bitwidth
                times = scale_pairs(registers(read(scale, place, COUNT), COUNT, LANES), SPEC, LIFT, PER, BF16)
        a = values(codes, less, times, SPEC, PARTS, BF16, LINES, TEXT, TALL, WIDE)
        of_tokens = 1.0
        if SPAN:
            of_tokens = tl.load(x_scale + tokens % m * tl.cdiv(k, SPAN) + step * COLUMNS // SPAN)[None, :]
        if EXACT:
            spans = tl.cdiv(k, GROUP * PER)
            place = _place(row, expert, step if PER > 1 else step * COLUMNS // GROUP, high, spans, TALL)
            f = factors(scale, place, SPEC, LIFT, PER, TALL * 8)
            for p in tl.static_range(PER):
                group = a if PER == 1 else tl.where((column // GROUP == p)[None, :], a, 0.0)
                new = tl.dot(group, b, input_precision="ieee")
                if sums is not None:
                    z = _of_rows(points(zero, place, PER, TALL * 8), p, TALL) + SPEC.element.min
                    WIDTH: tl.constexpr = min(GROUP, COLUMNS)
                    s = tl.load(sums + tl.minimum(tokens, m - 1) * tl.cdiv(k, WIDTH) + step * (COLUMNS // WIDTH) + p)
                    new -= z * s[None, :]
                acc += new * (_of_rows(f, p, TALL) * of_tokens)
        elif SPAN:
            acc += tl.dot(a, b, input_precision="ieee") * of_tokens
        else:
            acc = _settled(tl.dot(a, b, acc, input_precision="ieee"), TEXT)
    if OVERLAPS:
        # What rounds the next product's inputs may start, and wait for what is written here.
        tl.extra.cuda.gdc_launch_dependents()
    _write(
        *(acc, None if SPAN else x_scale, x_step, scale, zero, sums, tensor_scale, tensor_row, tensor_expert, bias),
        *(out, parts, count, row, expert, tokens, routed, end, split, m, n, high),
        *(SPEC, LIFT, AFTER, GROUP, ROWS, TOKENS, SPLITS),
    )


@triton.jit
def _pick(which, own, others):
    """What the weight number `which` has, of the first and others."""
    for i in tl.static_range(len(others)):
        own = tl.where(which == i + 1, others[i], own)
    return own


@triton.jit
def _read_words(words, place, there, EVEN: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):
    """A lane's words of all parts of a tile, one after another."""
    found = ()
    for p in tl.static_range(len(PARTS)):
        pointer = words[p] + place[:, None] * PARTS[p] + tl.arange(0, PARTS[p])[None, :]
        word = tl.load(pointer) if EVEN else tl.load(pointer, there[:, None], 0)
        found = found + registers(word, PARTS[p], LANES)
    return found


@triton.jit
def _settled(acc, TEXT: tl.constexpr):
    """Sums, once they are there.

    Else Triton (3.6) leaves products running while the next step's operand is written to the registers that they read.
    """
    if TEXT.add != "":
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], tl.float32, True, 1)
    return acc


@triton.jit
def _place(row, expert, span, high, spans, TALL: tl.constexpr):
    """Where the scales of a span of a program's rows are."""
    i = tl.arange(0, TALL * 8)
    return ((expert * high + tl.minimum(row * TALL + i // 8, high - 1)) * spans + span) * 8 + i % 8


@triton.jit
def _of_rows(found, P: tl.constexpr, TALL: tl.constexpr):
    """(rows, 1) of the number P of rows g, and of rows g + 8."""
    value = tl.reshape(tl.join(found[P], found[len(found) // 2 + P]), (TALL, 8, 2))
    return tl.reshape(tl.permute(value, (0, 2, 1)), (TALL * 16, 1))


@triton.jit
def _write(
    acc,
    x_scale,
    x_step,
    scale,
    zero,
    sums,
    tensor_scale,
    tensor_row,
    tensor_expert,
    bias,
    out,
    parts,
    count,
    row,
    expert,
    tokens,
    routed,
    end,
    split,
    m,
    n,
    high,
    SPEC: tl.constexpr,
    LIFT: tl.constexpr,
    AFTER: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    rows = row * ROWS + tl.arange(0, ROWS)
    place = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    there = (tokens < end)[None, :] & (rows < n)[:, None]
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
        at = _place(row, expert, 0, high, 1, TALL)
        if SPEC.zero:
            z = _of_rows(points(zero, at, 1, TALL * 8), 0, TALL) + SPEC.element.min
            acc -= z * tl.load(sums + tokens, tokens < routed, 0.0)[None, :]
        acc *= _of_rows(factors(scale, at, SPEC, LIFT, 1, TALL * 8), 0, TALL)
    if x_scale is not None:
        acc *= tl.load(x_scale + tokens * x_step, tokens < routed, 0.0)[None, :]
    if AFTER != 1:
        acc *= AFTER
    if tensor_scale is not None:
        acc *= tl.load(tensor_scale + expert * tensor_expert + rows * tensor_row, rows < n, 0.0)[:, None]
    if bias is not None:
        acc += to_float32(tl.load(bias + rows, rows < n, 0))[:, None]
    tl.store(out + place, from_float32(acc, out.dtype.element_ty, SPEC), there)
