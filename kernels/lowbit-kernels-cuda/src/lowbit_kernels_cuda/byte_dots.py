"""Products of inputs and weights that both have 8-bit codes, as they are stored: int8 by int8, e4m3 by e4m3.

Codes meet in tensor cores, integers exactly; scales, and zero points of either side, meet sums of them. Of 8-bit floats
tensor cores keep 13 bits or so below the largest of what they add up.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels_cuda.codes import from_float32, to_float32
from lowbit_kernels_cuda.programs import program_of


@triton.jit(do_not_specialize=["m"])
def byte_dots(
    x,
    x_scale,
    x_zero,
    x_sum,
    w,
    w_scale,
    w_zero,
    w_sum,
    bias,
    out,
    parts,
    count,
    offs,
    m,
    n,
    k,
    tall,
    SPEC: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    INTEGER: tl.constexpr,
    EXPERTS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    BAND: tl.constexpr,
    TILED: tl.constexpr,
    IMPRECISE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """`out` (M, N) of codes `x` (M, K) and `w` (N, K); a program has ROWS of N by TOKENS.

    Float32 scales: `x_scale` (M,), or one if SHARED, and `w_scale` of every `tall` rows; with GROUP, of as many columns
    side by side: (M, K / GROUP) and (N / tall, K / GROUP). Integers may have `x_zero` (M,) or one, with `w_sum` (N,) of
    codes, and `w_zero` (N,) with `x_sum` (M,) of codes less their zero points. TILED: `x` and `w` describe blocks for
    the tensor memory accelerator. SWAP: weights are the first operand, of which tensor cores take more at once than of
    the second. IMPRECISE: columns after which sums of floats leave the tensor cores; None: all of them. Parts of K,
    experts and OVERLAPS as in `linear_dots`.
    """
    index = tl.arange(0, triton.next_power_of_2(EXPERTS + 1))
    row, expert, begin, routed, end = program_of(tl.program_id(0), index, offs, m, n, EXPERTS, ROWS, TOKENS, BAND)
    # Python's `and` of what is known and what is not is no constant.
    if EXPERTS != 0:  # noqa: SIM102
        if begin >= end:
            return
    split = tl.program_id(1)
    steps = tl.cdiv(k, COLUMNS)
    each = tl.cdiv(steps, SPLITS)
    first, last = split * each, tl.minimum(split * each + each, steps)
    if EXPERTS != 0:
        last = tl.where(begin < routed, last, first)
    rows = row * ROWS + tl.arange(0, ROWS)
    tokens = begin + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    # In the place of rows and tokens that are not there others are read.
    near, seen = expert * n + tl.minimum(rows, n - 1), tokens % m
    weights, inputs = w, x
    if not TILED:
        weights = w + near.to(tl.int64)[:, None] * k + column[None, :]
        inputs = x + seen.to(tl.int64)[:, None] * k + column[None, :]
    acc = tl.zeros([ROWS, TOKENS] if SWAP else [TOKENS, ROWS], tl.int32 if INTEGER else tl.float32)
    groups = tl.cdiv(k, GROUP) if GROUP else 1
    of_rows = w_scale + (expert * tl.cdiv(n, tall) + tl.minimum(rows, n - 1) // tall) * groups
    of_tokens = x_scale + seen * groups
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    if GROUP:
        # A part of K may begin beyond its end.
        begins = tl.minimum(first * COLUMNS // GROUP, groups - 1)
        f, s = tl.load(of_rows + begins), tl.load(of_tokens + begins)
    for step in tl.range(first, last, num_stages=STAGES):
        at = step * COLUMNS
        if TILED:
            a, b = w.load([expert * n + row * ROWS, at]), x.load([begin, at])
        elif EVEN:
            a, b = tl.load(weights + at), tl.load(inputs + at)
        else:
            a = tl.load(weights + at, (at + column < k)[None, :], 0)
            b = tl.load(inputs + at, (at + column < k)[None, :], 0)
        if not INTEGER and not TILED:
            a, b = a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
        left, right = (a, b.T) if SWAP else (b, a.T)
        if GROUP:
            times = f[:, None] * s[None, :] if SWAP else s[:, None] * f[None, :]
            # Asked for a step before: the loop waits for what it reads itself.
            following = tl.minimum((at + COLUMNS) // GROUP, groups - 1)
            f, s = tl.load(of_rows + following), tl.load(of_tokens + following)
            acc += tl.dot(left, right) * times
        elif INTEGER:
            acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(left, right, acc, max_num_imprecise_acc=IMPRECISE)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    _write(
        *(acc.T if SWAP else acc, x_scale, x_zero, x_sum, w_scale, w_zero, w_sum, bias, out, parts, count),
        *(rows, tokens, expert, routed, end, split, m, n, tall, SPEC, SHARED, GROUP, SPLITS),
    )


@triton.jit
def _write(
    acc,
    x_scale,
    x_zero,
    x_sum,
    w_scale,
    w_zero,
    w_sum,
    bias,
    out,
    parts,
    count,
    rows,
    tokens,
    expert,
    routed,
    end,
    split,
    m,
    n,
    tall,
    SPEC: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Sums (tokens, rows), of all parts of K once all are there, with scales and zero points."""
    place = tokens.to(tl.int64)[:, None] * n + rows[None, :]
    within, given = rows < n, tokens < routed
    there = (tokens < end)[:, None] & within[None, :]
    if SPLITS > 1:
        whole = m.to(tl.int64) * n
        tl.store(parts + split * whole + place, acc, there)
        # Everyone's part is there before one says so.
        tl.debug_barrier()
        ticket = count + tl.program_id(0)
        if tl.atomic_add(ticket, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(ticket, 0)
        acc = tl.zeros_like(acc)
        for i in tl.static_range(SPLITS):
            acc += tl.load(parts + i * whole + place, there, 0, cache_modifier=".cg")
    of = expert * n + rows
    if x_zero is not None:
        z = tl.load(x_zero + (tokens * 0 if SHARED else tokens), given, 0).to(tl.int32)
        acc -= z[:, None] * tl.load(w_sum + of, within, 0)[None, :]
    if w_zero is not None:
        z = tl.load(w_zero + of, within, 0).to(tl.int32)
        acc -= tl.load(x_sum + tokens, given, 0)[:, None] * z[None, :]
    value = acc.to(tl.float32)
    if GROUP == 0:
        f = tl.load(w_scale + (expert * tl.cdiv(n, tall) + rows // tall), within, 0.0)
        s = tl.load(x_scale + (tokens * 0 if SHARED else tokens), given, 0.0)
        value *= s[:, None] * f[None, :]
    if bias is not None:
        value += to_float32(tl.load(bias + rows, within, 0))[None, :]
    tl.store(out + place, from_float32(value, out.dtype.element_ty, SPEC), there)
