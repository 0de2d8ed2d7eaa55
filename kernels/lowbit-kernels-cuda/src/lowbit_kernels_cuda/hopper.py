"""`linear_dots` on Hopper, for many tokens: one step's products run while the codes of the next become an operand.

Triton itself waits for products before it writes the operand of the next, or, if it does not, writes what they read. In
Gluon a lane keeps the words of DEPTH steps, two operands take turns, and inputs come by the tensor memory accelerator.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lowbit_kernels_cuda.codes import from_float32, split_planes, to_float32
from lowbit_kernels_cuda.fragments import byte_scale, less_pairs, scale_pairs, values
from lowbit_kernels_cuda.programs import program_of

# Later Tritons have other names.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_KINDS = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.int8: gl.int8,
    torch.int16: gl.int16,
}


def described(x: Tensor, tokens: int, columns: int) -> TensorDescriptor:
    """Inputs (M, K) for the tensor memory accelerator, in blocks of (tokens, columns)."""
    kind = _KINDS[x.dtype]
    return TensorDescriptor.from_tensor(
        x, [tokens, columns], gl.NVMMASharedLayout.get_default_for([tokens, columns], kind)
    )


@gluon.constexpr_function
def lanes_of(tall, wide, warps):
    """The layout of a tensor with an element for each lane of TALL by WIDE tiles, those of rows among warps in turn."""
    below = 32 * wide
    registers = [[32 << i] for i in range(wide.bit_length() - 1)]
    registers += [[below * warps << i] for i in range((tall // warps).bit_length() - 1)]
    among = [[below << i] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[1], [2], [4], [8], [16]], among, [], [below * tall])


@gluon.constexpr_function
def words_of(tall, wide, warps, words):
    """The same with WORDS each, side by side in a lane."""
    one = lanes_of(tall, wide, warps)
    beside = [[0, 1 << i] for i in range(words.bit_length() - 1)]
    more = [[[base[0], 0] for base in bases] for bases in (one.reg_bases, one.lane_bases, one.warp_bases)]
    return gl.DistributedLinearLayout(beside + more[0], more[1], more[2], [], [one.shape[0], words])


@gluon.jit(do_not_specialize=["m"])
def linear_wgmma(
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
    PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    BF16: gl.constexpr,
    LINES: gl.constexpr,
    TEXT: gl.constexpr,
    LIFT: gl.constexpr,
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
    """As `linear_dots`; `x` describes blocks (TOKENS, COLUMNS). Words are read DEPTH steps ahead, an even number."""
    KIND: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    TALL: gl.constexpr = ROWS // 16
    WIDE: gl.constexpr = COLUMNS // 64
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
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

    inputs = gl.allocate_shared_memory(KIND, [STAGES, TOKENS, COLUMNS], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES - 1):
        fetch(x, inputs, full, begin, first, i, last, k, COLUMNS, STAGES, DEPTH)
    kept = ()
    for i in gl.static_range(DEPTH):
        kept = kept + (
            _read(words, scale, zero, row, expert, first + i, n, k, SPEC, PARTS, GROUP, TALL, WIDE, num_warps),
        )
    acc = gl.zeros([ROWS, TOKENS], gl.float32, MMA)
    even = _operand(kept[0], SPEC, PARTS, GROUP, BF16, LINES, TEXT, LIFT, TALL, WIDE, OPERAND)
    odd = gl.zeros([ROWS, COLUMNS], KIND, OPERAND)
    more = _read(words, scale, zero, row, expert, first + DEPTH, n, k, SPEC, PARTS, GROUP, TALL, WIDE, num_warps)
    kept = put(kept, 0, more)
    for base in range(0, last - first, DEPTH):
        for u in gl.static_range(DEPTH):
            at = base + u
            b = inputs_of(inputs, full, at, STAGES)
            # Products of the step before are done once those of this one are the only ones left.
            if u % 2 == 0:
                acc = warpgroup_mma(even, b, acc, is_async=True)
                acc, odd = warpgroup_mma_wait(1, deps=[acc, odd])
            else:
                acc = warpgroup_mma(odd, b, acc, is_async=True)
                acc, even = warpgroup_mma_wait(1, deps=[acc, even])
            # All warps are then done with its inputs.
            barrier()
            fetch(x, inputs, full, begin, first, at + STAGES - 1, last, k, COLUMNS, STAGES, DEPTH)
            a = _operand(kept[(u + 1) % DEPTH], SPEC, PARTS, GROUP, BF16, LINES, TEXT, LIFT, TALL, WIDE, OPERAND)
            if u % 2 == 0:
                odd = a
            else:
                even = a
            ahead = first + at + 1 + DEPTH
            more = _read(words, scale, zero, row, expert, ahead, n, k, SPEC, PARTS, GROUP, TALL, WIDE, num_warps)
            kept = put(kept, (u + 1) % DEPTH, more)
    acc, odd = warpgroup_mma_wait(0, deps=[acc, odd])
    write(
        *(acc, x_scale, x_step, scale, zero, sums, tensor_scale, tensor_row, tensor_expert, bias, out, parts, count),
        *(row, expert, begin, routed, end, split, gl.program_id(0), m, n),
        *(SPEC, AFTER, GROUP, ROWS, TOKENS, SPLITS, MMA, num_warps),
    )


@gluon.jit
def inputs_of(inputs, full, at, STAGES: gl.constexpr):
    """Inputs of the step `at`, once they are there."""
    mbarrier.wait(full.index(at % STAGES), at // STAGES & 1)
    return inputs.index(at % STAGES).permute((1, 0))


@gluon.jit
def fetch(x, inputs, full, token, first, at, last, k, COLUMNS: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr):
    """Inputs of a step `at` from the first; beyond the last, zeros, and none beyond those that are waited for."""
    step = first + at
    waited = at < gl.cdiv(last - first, DEPTH) * DEPTH
    column = step * COLUMNS if step < last else k
    mbarrier.expect(full.index(at % STAGES), x.block_type.nbytes, pred=waited)
    load(x, [token, column], full.index(at % STAGES), inputs.index(at % STAGES), pred=waited)


@gluon.jit
def put(all_, AT: gl.constexpr, one):
    """The tuple with another in the place AT."""
    found = ()
    for i in gl.static_range(len(all_)):
        found = found + ((one,) if i == AT else (all_[i],))
    return found


@gluon.jit
def columns_of(acc, WIDE: gl.constexpr, PART: gl.constexpr):
    """Sums of four warps of WIDE columns, the PART-th such of all."""
    TIMES: gl.constexpr = acc.shape[1] // WIDE
    for _ in gl.static_range(TIMES.bit_length() - 1):
        halves = gl.split(gl.permute(gl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))
        acc = halves[PART * 2 * WIDE // acc.shape[1] % 2]
    return gl.convert_layout(acc, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32]), assert_trivial=True)


@gluon.jit
def keep(value, place):
    """Put a block where its warps write it from, once what was there two blocks before has left."""
    tma.store_wait(pendings=1)
    place.store(value)


@gluon.jit
def send(place, described, top, left):
    """Write a block that was kept, as far as it is within what is described, while its warps go on."""
    fence_async_shared()
    store(described, [top, left], place)


@gluon.jit
def _read(
    words,
    scale,
    zero,
    row,
    expert,
    step,
    n,
    k,
    SPEC: gl.constexpr,
    PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    TALL: gl.constexpr,
    WIDE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """A lane's words of all parts of a step, and of scales and zero points of its rows."""
    high, tiles = gl.cdiv(n, 16), gl.cdiv(k, 64)
    codes, scales, zeros = (), (), ()
    for p in gl.static_range(len(PARTS)):
        codes = codes + lanes(words[p], row, expert, step, high, tiles, tiles, 32, PARTS[p], 64, TALL, WIDE, WARPS)
    if GROUP != 0:
        PER: gl.constexpr = 64 // GROUP if GROUP < 64 else 1
        COUNT: gl.constexpr = 2 * PER * SPEC.scale.bits // scale.dtype.element_ty.primitive_bitwidth
        spans = gl.cdiv(k, GROUP * PER)
        scales = lanes(scale, row, expert, step, high, tiles, spans, 8, COUNT, GROUP * PER, TALL, WIDE, WARPS)
        if zero is not None:
            zeros = lanes(zero, row, expert, step, high, tiles, spans, 8, PER, GROUP * PER, TALL, WIDE, WARPS)
    return codes, scales, zeros


@gluon.jit
def lanes(
    pointer,
    row,
    expert,
    step,
    high,
    tiles,
    spans,
    READERS: gl.constexpr,
    SIZE: gl.constexpr,
    SPAN: gl.constexpr,
    TALL: gl.constexpr,
    WIDE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """SIZE words of each lane, of (tiles of rows, spans of SPAN columns, READERS) with SIZE words each."""
    LAYOUT: gl.constexpr = words_of(TALL, WIDE, WARPS, SIZE)
    i = gl.arange(0, TALL * WIDE * 32, gl.SliceLayout(1, LAYOUT))
    tile = (expert * high + gl.minimum(row * TALL + i // (WIDE * 32), high - 1)).to(gl.int64) * spans
    span = gl.minimum(step * WIDE + i // 32 % WIDE, tiles - 1) * 64 // SPAN
    place = (tile + span) * READERS + i % 32 // (32 // READERS)
    word = gl.load(pointer + place[:, None] * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, LAYOUT))[None, :])
    planes = split_planes(word, TALL * WIDE * 32, SIZE, SIZE)
    ONE: gl.constexpr = lanes_of(TALL, WIDE, WARPS)
    found = ()
    for j in gl.static_range(SIZE):
        found = found + (gl.convert_layout(gl.reshape(planes[j], (TALL * WIDE * 32,)), ONE, assert_trivial=True),)
    return found


@gluon.jit
def _operand(
    kept,
    SPEC: gl.constexpr,
    PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    BF16: gl.constexpr,
    LINES: gl.constexpr,
    TEXT: gl.constexpr,
    LIFT: gl.constexpr,
    TALL: gl.constexpr,
    WIDE: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """The first operand of a step, of what `_read` gave."""
    codes, scales, zeros = kept
    PER: gl.constexpr = 64 // GROUP if GROUP > 0 and GROUP < 64 else 1
    less = less_pairs(zeros, PER, BF16) if len(zeros) > 0 else ()
    times = scale_pairs(scales, SPEC, LIFT, PER, BF16) if GROUP != 0 else ()
    a = values(codes, less, times, SPEC, PARTS, BF16, LINES, TEXT, TALL, WIDE)
    return gl.convert_layout(a, OPERAND, assert_trivial=True)


@gluon.jit
def write(
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
    begin,
    routed,
    end,
    split,
    ticket,
    m,
    n,
    SPEC: gl.constexpr,
    AFTER: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SPLITS: gl.constexpr,
    MMA: gl.constexpr,
    num_warps: gl.constexpr,
):
    """As `dots._write`, of sums in the layout MMA; without GROUP, `scale` is one of its own for every row."""
    rows = row * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    tokens = begin + gl.arange(0, TOKENS, gl.SliceLayout(0, MMA))
    place = tokens.to(gl.int64)[None, :] * n + rows[:, None]
    there = (tokens < end)[None, :] & (rows < n)[:, None]
    if SPLITS > 1:
        whole = m.to(gl.int64) * n
        gl.store(parts + split * whole + place, acc, there)
        # Everyone's part is there before one says so.
        barrier()
        ticket = count + ticket
        if gl.atomic_add(ticket, 1, sem="acq_rel") < SPLITS - 1:
            return
        gl.store(ticket, 0)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, MMA)
        for i in gl.static_range(SPLITS):
            acc += gl.load(parts + i * whole + place, there, 0.0, cache_modifier=".cg")
    if GROUP == 0:
        high = gl.cdiv(n, 16)
        at = (expert * high + gl.minimum(rows // 16, high - 1)) * 16 + rows % 8 * 2 + rows // 8 % 2
        if SPEC.zero:
            z = gl.load(zero + at).to(gl.float32) + SPEC.element.min
            acc -= z[:, None] * gl.load(sums + tokens, tokens < routed, 0.0)[None, :]
        stored = gl.load(scale + at)
        acc *= (byte_scale(stored.to(gl.int32), 0, SPEC.scale) if SPEC.scale.bits == 8 else to_float32(stored))[:, None]
    if x_scale is not None:
        acc *= gl.load(x_scale + tokens * x_step, tokens < routed, 0.0)[None, :]
    if AFTER != 1:
        acc *= AFTER
    if tensor_scale is not None:
        acc *= gl.load(tensor_scale + expert * tensor_expert + rows * tensor_row, rows < n, 0.0)[:, None]
    if bias is not None:
        acc += to_float32(gl.load(bias + rows, rows < n, 0))[:, None]
    value = from_float32(acc, out.dtype.element_ty, SPEC)
    # Rows of the weight side by side, as they are in the result.
    FLAT: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, num_warps], [0, 1])
    rows = row * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, FLAT))
    tokens = begin + gl.arange(0, TOKENS, gl.SliceLayout(0, FLAT))
    place = tokens.to(gl.int64)[None, :] * n + rows[:, None]
    gl.store(out + place, gl.convert_layout(value, FLAT), (tokens < end)[None, :] & (rows < n)[:, None])
