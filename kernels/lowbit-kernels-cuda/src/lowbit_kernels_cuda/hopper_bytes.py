"""4-bit integers by e4m3 inputs on Hopper: codes become e4m3 in registers, the first operand of its tensor cores.

An integer up to 8 is an e4m3 by its bits alone, times 2^-9: a subnormal, or the number after them. Products of a group
of columns leave the tensor cores for float32 sums, where they meet the group's scale.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from lowbit_kernels_cuda.codes import to_float32
from lowbit_kernels_cuda.fragments import byte_values, byte_words
from lowbit_kernels_cuda.hopper import inputs_of, lanes, load, put, write
from lowbit_kernels_cuda.programs import program_of

# What sums are multiplied by in the end.
UNIT = gl.constexpr(2.0**9)
# Of each thread of the second four warps.
REGISTERS = gl.constexpr(232)


@gluon.jit(do_not_specialize=["m"])
def linear_wgmma_bytes(
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
    m,
    n,
    k,
    SPEC: gl.constexpr,
    GROUP: gl.constexpr,
    AFTER: gl.constexpr,
    EXPERTS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    DEPTH: gl.constexpr,
    BAND: gl.constexpr,
    num_warps: gl.constexpr,
):
    """As `linear_wgmma`, of e4m3 `x`; `scale` as packed, but not in words. COLUMNS are a group, or a part of one.

    Of 128 ROWS each half has four warps of its own, which wait for nobody but the warp that brings inputs: while one
    half's products run, the other's codes become e4m3 and its sums meet their scales.
    """
    COUNT: gl.constexpr = triton.next_power_of_2(EXPERTS + 1)
    index = gl.arange(0, COUNT, gl.BlockedLayout([1], [32], [num_warps], [0]))
    row, expert, begin, routed, end = program_of(gl.program_id(0), index, offs, m, n, EXPERTS, ROWS, TOKENS, BAND)
    # Python's `and` of what is known and what is not is no constant.
    if EXPERTS != 0:  # noqa: SIM102
        if begin >= end:
            return
    split = gl.program_id(1)
    steps = gl.cdiv(k, COLUMNS)
    each = gl.cdiv(steps, SPLITS)
    first, last = split * each, gl.minimum(split * each + each, steps)
    if EXPERTS != 0:
        last = gl.where(begin < routed, last, first)

    inputs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TOKENS, COLUMNS], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    shared = inputs, full, free
    given = x_scale, x_step, scale, zero, sums, tensor_scale, tensor_row, tensor_expert, bias, out, parts, count
    place = row, expert, begin, routed, end, split, m, n
    of = words[0], shared, given, place, first, last, k
    gl.warp_specialize(
        [
            (_multiply, (of, SPEC, GROUP, AFTER, TOKENS, COLUMNS, SPLITS, STAGES, DEPTH, 0)),
            (_multiply, (of, SPEC, GROUP, AFTER, TOKENS, COLUMNS, SPLITS, STAGES, DEPTH, 1)),
            (_bring, (x, shared, begin, first, last, k, COLUMNS, STAGES, DEPTH)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _bring(x, shared, token, first, last, k, COLUMNS: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr):
    """Inputs of all steps, as places become free; beyond the last, zeros."""
    inputs, full, free = shared
    inputs_are_there()
    for at in range(gl.cdiv(last - first, DEPTH) * DEPTH):
        mbarrier.wait(free.index(at % STAGES), at // STAGES & 1 ^ 1)
        step = first + at
        mbarrier.expect(full.index(at % STAGES), x.block_type.nbytes)
        column = step * COLUMNS if step < last else k
        load(x, [token, column], full.index(at % STAGES), inputs.index(at % STAGES))


@gluon.jit
def inputs_are_there():
    """The kernel before rounds the inputs, and this one may start while it does."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def next_may_start():
    """What rounds the next product's inputs may start."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _multiply(
    of,
    SPEC: gl.constexpr,
    GROUP: gl.constexpr,
    AFTER: gl.constexpr,
    TOKENS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    DEPTH: gl.constexpr,
    PART: gl.constexpr,
):
    """Four warps' 64 rows, half of a program's. Words and scales are read DEPTH steps ahead."""
    WIDE: gl.constexpr = COLUMNS // 64
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    words, shared, given, place, first, last, k = of
    inputs, full, free = shared
    x_scale, x_step, scale, zero, sums, tensor_scale, tensor_row, tensor_expert, bias, out, parts, count = given
    block, expert, begin, routed, end, split, m, n = place
    row = block * 2 + PART
    high, tiles, spans = gl.cdiv(n, 16), gl.cdiv(k, 64), gl.cdiv(k, GROUP) if GROUP else 1
    kept = ()
    for i in gl.static_range(DEPTH):
        kept = kept + (_words(words, row, expert, first + i, high, tiles, WIDE),)
    rows = gl.minimum(row * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA)), n - 1)
    of_rows = scale + (expert * high + rows // 16).to(gl.int64) * (spans * 16) + rows % 8 * 2 + rows // 8 % 2
    factors = ()
    for i in gl.static_range(DEPTH):
        factors = factors + (_factors(of_rows, first + i, spans, COLUMNS, GROUP),)
    acc = gl.zeros([64, TOKENS], gl.float32, MMA)
    held = byte_words(kept[0])
    for base in range(0, last - first, DEPTH):
        for u in gl.static_range(DEPTH):
            at = base + u
            kept = put(kept, u, _words(words, row, expert, first + at + DEPTH, high, tiles, WIDE))
            a = gl.convert_layout(byte_values(held, 4, WIDE), OPERAND, assert_trivial=True)
            b = inputs_of(inputs, full, at, STAGES)
            if GROUP != 0:
                new = warpgroup_mma(a, b, gl.zeros([64, TOKENS], gl.float32, MMA), use_acc=False, is_async=True)
            else:
                new = warpgroup_mma(a, b, acc, is_async=True)
            times = factors[u]
            factors = put(factors, u, _factors(of_rows, first + at + DEPTH, spans, COLUMNS, GROUP))
            following = byte_words(kept[(u + 1) % DEPTH])
            # The operand's own registers, as words, are kept until products are done with them.
            done = warpgroup_mma_wait(0, deps=(new,) + held)
            new = done[0]
            mbarrier.arrive(free.index(at % STAGES), count=1)
            if GROUP != 0:
                acc += new * to_float32(times)[:, None]
            else:
                acc = new
            held = following
    inputs_are_there()
    next_may_start()
    write(
        *(acc, x_scale, x_step, scale, zero, sums, tensor_scale, tensor_row, tensor_expert, bias, out, parts, count),
        *(row, expert, begin, routed, end, split, gl.program_id(0) * 2 + PART, m, n),
        *(SPEC, AFTER * UNIT, GROUP, 64, TOKENS, SPLITS, MMA, 4),
    )


@gluon.jit
def _words(words, row, expert, step, high, tiles, WIDE: gl.constexpr):
    """A lane's words of a step."""
    return lanes(words, row, expert, step, high, tiles, tiles, 32, 4, 64, 4, WIDE, 4)


@gluon.jit
def _factors(of_rows, step, spans, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """Scales of a step, as they are stored; without GROUP there is one of each row."""
    return gl.load(of_rows + gl.minimum(step * COLUMNS // GROUP, spans - 1) * 16 if GROUP != 0 else of_rows)
