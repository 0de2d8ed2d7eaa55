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
from lowbit_kernels_cuda.hopper import barrier, fetch, inputs_of, lanes, put, write
from lowbit_kernels_cuda.programs import program_of

# What sums are multiplied by in the end.
UNIT = gl.constexpr(2.0**9)


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

    Words are read DEPTH steps ahead.
    """
    TALL: gl.constexpr = ROWS // 16
    WIDE: gl.constexpr = COLUMNS // 64
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    COUNT: gl.constexpr = triton.next_power_of_2(EXPERTS + 1)
    index = gl.arange(0, COUNT, gl.BlockedLayout([1], [32], [num_warps], [0]))
    row, expert, begin, routed, end = program_of(index, offs, m, n, EXPERTS, ROWS, TOKENS, BAND)
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
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    high, tiles, spans = gl.cdiv(n, 16), gl.cdiv(k, 64), gl.cdiv(k, GROUP) if GROUP else 1
    kept = ()
    for i in gl.static_range(DEPTH):
        kept = kept + (_words(words[0], row, expert, first + i, high, tiles, TALL, WIDE, num_warps),)
    rows = gl.minimum(row * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, MMA)), n - 1)
    of_rows = scale + (expert * high + rows // 16).to(gl.int64) * (spans * 16) + rows % 8 * 2 + rows // 8 % 2
    factor = _factors(of_rows, first, spans, COLUMNS, GROUP)
    # The kernel before rounds the inputs, and this one may start while it does.
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    for i in gl.static_range(STAGES - 1):
        fetch(x, inputs, full, begin, first, i, last, k, COLUMNS, STAGES, DEPTH)
    acc = gl.zeros([ROWS, TOKENS], gl.float32, MMA)
    held = byte_words(kept[0])
    for base in range(0, last - first, DEPTH):
        for u in gl.static_range(DEPTH):
            at = base + u
            ahead = first + at + DEPTH
            kept = put(kept, u, _words(words[0], row, expert, ahead, high, tiles, TALL, WIDE, num_warps))
            a = gl.convert_layout(byte_values(held, TALL, WIDE), OPERAND, assert_trivial=True)
            b = inputs_of(inputs, full, at, STAGES)
            if GROUP != 0:
                new = warpgroup_mma(a, b, gl.zeros([ROWS, TOKENS], gl.float32, MMA), use_acc=False, is_async=True)
            else:
                new = warpgroup_mma(a, b, acc, is_async=True)
            times = factor
            factor = _factors(of_rows, first + at + 1, spans, COLUMNS, GROUP)
            following = byte_words(kept[(u + 1) % DEPTH])
            # The operand's own registers, as words, are kept until products are done with them.
            done = warpgroup_mma_wait(0, deps=(new,) + held)
            new = done[0]
            # All warps are then done with its inputs.
            barrier()
            fetch(x, inputs, full, begin, first, at + STAGES - 1, last, k, COLUMNS, STAGES, DEPTH)
            if GROUP != 0:
                acc += new * to_float32(times)[:, None]
            else:
                acc = new
            held = following
    write(
        *(acc, x_scale, x_step, scale, zero, sums, tensor_scale, tensor_row, tensor_expert, bias, out, parts, count),
        *(row, expert, begin, routed, end, split, m, n),
        *(SPEC, AFTER * UNIT, GROUP, ROWS, TOKENS, SPLITS, MMA, num_warps),
    )


@gluon.jit
def _words(words, row, expert, step, high, tiles, TALL: gl.constexpr, WIDE: gl.constexpr, WARPS: gl.constexpr):
    """A lane's words of a step."""
    return lanes(words, row, expert, step, high, tiles, tiles, 32, 4, 64, TALL, WIDE, WARPS)


@gluon.jit
def _factors(of_rows, step, spans, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """Scales of a step, as they are stored; without GROUP there is one of each row."""
    return gl.load(of_rows + gl.minimum(step * COLUMNS // GROUP, spans - 1) * 16 if GROUP != 0 else of_rows)
