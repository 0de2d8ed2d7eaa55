"""Products of e4m3 with scales of 128 columns on Hopper: sums of a group leave the tensor cores for float32 ones.

Each half of a program has four warps of its own, which take turns: while the products of one half run, the other's sums
meet their scales. One more warp brings both operands. Programs stay, and go from tile to tile.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from lowbit.format import FORMATS
from lowbit_kernels_cuda.codes import from_float32, to_float32
from lowbit_kernels_cuda.hopper import columns_of, described, keep, load, put, send
from lowbit_kernels_cuda.hopper_bytes import REGISTERS, inputs_are_there, next_may_start
from lowbit_kernels_cuda.inputs import multiprocessors
from lowbit_kernels_cuda.library import Side
from lowbit_kernels_cuda.scaling import raw, spec

# Columns, and rows of the second operand, that have one scale.
GROUP = gl.constexpr(128)


def of_blocks(left: Side, right: Side, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of tokens with scales of 128 columns (M, K / 128) by a weight with those of blocks of 128x128."""
    scales = left.scale, left.scale.shape[1], 1, right.scale, None, 0, None, 0
    return _upright(left, right, scales, bias, dtype)


def of_rows(left: Side, right: Side, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of tokens with a scale each, or one, by a weight whose rows have one each, or one."""
    steps = [int(side.scale.numel() > 1) for side in (left, right)]
    scales = left.scale, steps[0], 0, None, None, 0, right.scale, steps[1]
    return _upright(left, right, scales, bias, dtype)


def _upright(left: Side, right: Side, scales: tuple[Any, ...], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    m, n = len(left.codes), len(right.codes)
    tall = 64 if m <= 64 else 128
    wide = 64 if triton.cdiv(n, 64) * triton.cdiv(m, tall) <= multiprocessors(left.codes.device) else 128
    return _product(left.codes, right.codes, scales, bias, left.codes.new_empty(m, n, dtype=dtype), tall, wide)


def of_groups(left: Side, right: Side, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of tokens with a scale each, or one, by a weight with scales (K / 128, N) of its rows' columns."""
    m, n = len(left.codes), len(right.codes)
    scales = right.scale, 1, n, None, left.scale, int(left.scale.numel() > 1), None, 0
    out = left.codes.new_empty(m, n, dtype=dtype)
    return _product(right.codes, left.codes, scales, bias, out, 128, 256, turned=True)


def _product(
    a: Tensor,
    b: Tensor,
    scales: tuple[Any, ...],
    bias: Tensor | None,
    out: Tensor,
    tall: int,
    wide: int,
    *,
    turned: bool = False,
) -> Tensor:
    kernel: Any = blocks_wgmma
    tiles = triton.cdiv(len(a), tall) * triton.cdiv(len(b), wide)
    kernel[(min(tiles, multiprocessors(out.device)),)](
        *(described(a, tall, 128), described(b, wide, 128), *scales, None if bias is None else raw(bias)),
        *(described(raw(out), 64, min(64, wide // 2) if tall == 64 else 64), *out.shape, a.shape[1]),
        SPEC=spec(FORMATS["FP8_ROW"], device=out.device),
        TURNED=turned,
        TALL=tall,
        WIDE=wide,
        STAGES=4 if wide > 128 else 6,
        BAND=8,
        num_warps=4,
        launch_pdl=True,
    )
    return out


@gluon.jit(do_not_specialize=["m"])
def blocks_wgmma(
    a,
    b,
    a_scale,
    a_row,
    a_group,
    b_scale,
    x_scale,
    x_step,
    w_scale,
    w_step,
    bias,
    out,
    m,
    n,
    k,
    SPEC: gl.constexpr,
    TURNED: gl.constexpr,
    TALL: gl.constexpr,
    WIDE: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """`out` (M, N): products of e4m3 tokens (M, K) and rows of a weight (N, K), with float32 scales of 128 columns.

    `a` and `b` describe blocks of TALL, 64 or 128, and WIDE rows by 128 columns. Rows of `a`, tokens or, if TURNED, the
    weight's, have scales `a_scale`, `a_row` from row to row and `a_group` from group to group; 128 rows of `b` have one
    together, `b_scale` (N / 128, K / 128), if any. Tokens and rows of the weight have others of all columns, `x_scale`
    and `w_scale`, if any.
    """
    # What each half multiplies: 64 of 128 rows with all of the other operand, in parts, or all 64 with its half.
    HALF: gl.constexpr = WIDE // 2 if TALL == 64 or WIDE > 128 else WIDE
    first = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TALL, GROUP], a.layout)
    second = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, WIDE, GROUP], b.layout)
    done = gl.allocate_shared_memory(out.dtype, [4, out.block_shape[0], out.block_shape[1]], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    shared = first, second, full, free
    given = done, a_scale, a_row, a_group, b_scale, out
    whole = x_scale, x_step, w_scale, w_step, bias
    size = m, n, k
    gl.warp_specialize(
        [
            (_multiply, (shared, given, whole, size, SPEC, TURNED, TALL, WIDE, HALF, STAGES, BAND, 0)),
            (_multiply, (shared, given, whole, size, SPEC, TURNED, TALL, WIDE, HALF, STAGES, BAND, 1)),
            (_bring, (a, b, shared, size, TURNED, TALL, WIDE, STAGES, BAND)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _tiles(size, TURNED: gl.constexpr, TALL: gl.constexpr, WIDE: gl.constexpr):
    """How many tiles there are, down rows of the weight and along tokens."""
    m, n, _ = size
    return gl.cdiv(n, TALL if TURNED else WIDE), gl.cdiv(m, WIDE if TURNED else TALL)


@gluon.jit
def _tile(tile, size, TURNED: gl.constexpr, TALL: gl.constexpr, WIDE: gl.constexpr, BAND: gl.constexpr):
    """First rows of a tile's operands. The last block of tokens begins early rather than reach beyond the end."""
    TOKENS: gl.constexpr = WIDE if TURNED else TALL
    ROWS: gl.constexpr = TALL if TURNED else WIDE
    m, _, _ = size
    down, along = _tiles(size, TURNED, TALL, WIDE)
    band = tile // (BAND * along) * BAND
    tall = gl.minimum(down - band, BAND)
    within = tile % (BAND * along)
    row, token = (band + within % tall) * ROWS, within // tall * TOKENS
    token = gl.maximum(gl.minimum(token, m - TOKENS), 0)
    return row, token


@gluon.jit
def _bring(
    a,
    b,
    shared,
    size,
    TURNED: gl.constexpr,
    TALL: gl.constexpr,
    WIDE: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """Both operands of all steps of all tiles, as places become free."""
    first, second, full, free = shared
    down, along = _tiles(size, TURNED, TALL, WIDE)
    inputs_are_there()
    at = 0
    for tile in range(gl.program_id(0), down * along, gl.num_programs(0)):
        row, token = _tile(tile, size, TURNED, TALL, WIDE, BAND)
        top, left = (row, token) if TURNED else (token, row)
        for step in range(gl.cdiv(size[2], GROUP)):
            place = at % STAGES
            mbarrier.wait(free.index(place), at // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(place), a.block_type.nbytes + b.block_type.nbytes)
            load(a, [top, step * GROUP], full.index(place), first.index(place))
            load(b, [left, step * GROUP], full.index(place), second.index(place))
            at += 1


@gluon.jit
def _multiply(
    shared,
    given,
    whole,
    size,
    SPEC: gl.constexpr,
    TURNED: gl.constexpr,
    TALL: gl.constexpr,
    WIDE: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    PART: gl.constexpr,
):
    """Four warps' 64 rows of the first operand, by HALF rows of the second at a time."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    PARTS: gl.constexpr = WIDE // HALF if TALL > 64 else 1
    # The first rows of its own, of both operands.
    UPPER: gl.constexpr = PART * 64 if TALL > 64 else 0
    BESIDE: gl.constexpr = PART * HALF if TALL == 64 else 0
    first, second, full, free = shared
    done, a_scale, a_row, a_group, b_scale, out = given
    m, n, k = size
    down, along = _tiles(size, TURNED, TALL, WIDE)
    groups = gl.cdiv(k, GROUP)
    inputs_are_there()
    at = 0
    for tile in range(gl.program_id(0), down * along, gl.num_programs(0)):
        row, token = _tile(tile, size, TURNED, TALL, WIDE, BAND)
        top = row if TURNED else token
        rows = gl.minimum(top + UPPER + gl.arange(0, 64, gl.SliceLayout(1, MMA)), (n if TURNED else m) - 1)
        of_rows = a_scale + rows * a_row
        times, by, sums = gl.load(of_rows), (), ()
        for i in gl.static_range(PARTS):
            sums = sums + (gl.zeros([64, HALF], gl.float32, MMA),)
            by = by + (_of_block(b_scale, row + BESIDE + i * HALF, n, groups),)
        for step in range(groups):
            place = at % STAGES
            following = gl.minimum(step + 1, groups - 1)
            next_times = gl.load(of_rows + following * a_group)
            next_by = ()
            for i in gl.static_range(PARTS):
                next_by = next_by + (_of_block(b_scale, row + BESIDE + i * HALF, n, groups, following),)
            mbarrier.wait(full.index(place), at // STAGES & 1)
            left = first.index(place).slice(UPPER, 64)
            for i in gl.static_range(PARTS):
                right = second.index(place).slice(BESIDE + i * HALF, HALF).permute((1, 0))
                new = warpgroup_mma(left, right, gl.zeros([64, HALF], gl.float32, MMA), use_acc=False, is_async=True)
                new = warpgroup_mma_wait(0, deps=[new])
                if i == PARTS - 1:
                    mbarrier.arrive(free.index(place), count=1)
                each = times if b_scale is None else times * by[i]
                sums = put(sums, i, sums[i] + new * each[:, None])
            times, by = next_times, next_by
            at += 1
        # A part's columns are written side by side, those of SIDE at a time.
        SIDE: gl.constexpr = out.block_shape[0] if TURNED else out.block_shape[1]
        for i in gl.static_range(PARTS):
            for j in gl.static_range(HALF // SIDE):
                columns = columns_of(sums[i], SIDE, j)
                beside = BESIDE + i * HALF + j * SIDE
                place = done.index(PART * 2 + (i * (HALF // SIDE) + j) % 2)
                if TURNED:
                    value = _finished(columns, whole, token + beside, row + UPPER, m, n, 0, 1)
                    keep(from_float32(value, out.dtype, SPEC), place.permute((1, 0)))
                    send(place, out, token + beside, row + UPPER)
                else:
                    value = _finished(columns, whole, token + UPPER, row + beside, m, n, 1, 0)
                    keep(from_float32(value, out.dtype, SPEC), place)
                    send(place, out, token + UPPER, row + beside)
    tma.store_wait(pendings=0)
    next_may_start()


@gluon.jit
def _of_block(b_scale, row, n, groups, group=0):
    """The scale of a block of the second operand that a row is in."""
    return 1.0 if b_scale is None else gl.load(b_scale + gl.minimum(row, n - 1) // GROUP * groups + group)


@gluon.jit
def _finished(sums, whole, token, row, m, n, OF_TOKENS: gl.constexpr, OF_ROWS: gl.constexpr):
    """Sums with tokens and rows as these dimensions of the layout have them, times their scales, and the bias."""
    MMA: gl.constexpr = sums.type.layout
    x_scale, x_step, w_scale, w_step, bias = whole
    tokens = token + gl.arange(0, sums.shape[1 - OF_TOKENS], gl.SliceLayout(OF_TOKENS, MMA))
    rows = row + gl.arange(0, sums.shape[1 - OF_ROWS], gl.SliceLayout(OF_ROWS, MMA))
    if x_scale is not None:
        sums *= gl.expand_dims(gl.load(x_scale + tokens * x_step, tokens < m, 0.0), OF_TOKENS)
    if w_scale is not None:
        sums *= gl.expand_dims(gl.load(w_scale + rows * w_step, rows < n, 0.0), OF_ROWS)
    if bias is not None:
        sums += gl.expand_dims(to_float32(gl.load(bias + rows, rows < n, 0)), OF_ROWS)
    return sums
