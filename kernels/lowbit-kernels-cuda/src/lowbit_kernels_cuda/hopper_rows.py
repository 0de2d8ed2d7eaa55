"""Products of 8-bit codes with scales of rows on Hopper, of many tokens: int8 by int8, e4m3 by e4m3.

Each half of a program's 128 tokens has four warps of its own, and one more warp brings both operands. Programs stay,
and go from tile to tile: what the next needs first comes while one is written, and while one half writes, the other
multiplies.
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
from lowbit_kernels_cuda.hopper import columns_of, described, keep, load, send
from lowbit_kernels_cuda.hopper_bytes import REGISTERS, inputs_are_there, next_may_start
from lowbit_kernels_cuda.inputs import multiprocessors
from lowbit_kernels_cuda.library import Side
from lowbit_kernels_cuda.scaling import raw, spec

# Tokens and rows of the weight of a tile, and columns at a time.
TOKENS = gl.constexpr(128)
ROWS = gl.constexpr(256)
COLUMNS = gl.constexpr(128)
# A half's tokens, and as many rows, which are written at once.
SIDE = gl.constexpr(64)
QUARTER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))


def of_rows(
    left: Side, right: Side, bias: Tensor | None, dtype: torch.dtype, offs: Tensor | None, tall: int, *, shared: bool
) -> Tensor:
    """Tokens times rows of a weight, `tall` of which have one scale; all tokens have one if `shared`."""
    experts = 0 if offs is None else len(offs)
    (m, k), n = left.codes.shape, len(right.codes) // (experts or 1)
    out = left.scale.new_empty(m, n, dtype=dtype)
    blocks = triton.cdiv(m, 128) if not experts else m // 128 + experts + 1
    kernel: Any = rows_wgmma
    kernel[(min(triton.cdiv(n, 256) * blocks, multiprocessors(out.device)),)](
        *(described(left.codes, 128, 128), left.scale, left.zero, left.sums),
        *(described(right.codes, 256, 128), right.scale, right.zero, right.sums),
        *(None if bias is None else raw(bias), raw(out), described(raw(out), 64, 64), offs, m, n, k, tall),
        SPEC=spec(FORMATS["FP8_ROW"], device=out.device),
        SHARED=shared,
        INTEGER=left.codes.dtype == torch.int8,
        EXPERTS=experts,
        STAGES=4,
        BAND=8,
        num_warps=4,
        launch_pdl=True,
    )
    return out


@gluon.jit(do_not_specialize=["m"])
def rows_wgmma(
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
    blocks,
    offs,
    m,
    n,
    k,
    tall,
    SPEC: gl.constexpr,
    SHARED: gl.constexpr,
    INTEGER: gl.constexpr,
    EXPERTS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """As `byte_dots`; `x`, `w` and `blocks` describe blocks of (128, 128), (256, 128), and of `out`, (64, 64)."""
    KIND: gl.constexpr = gl.int8 if INTEGER else gl.float8e4nv
    first = gl.allocate_shared_memory(KIND, [STAGES, TOKENS, COLUMNS], x.layout)
    second = gl.allocate_shared_memory(KIND, [STAGES, ROWS, COLUMNS], w.layout)
    done = gl.allocate_shared_memory(blocks.dtype, [4, SIDE, SIDE], blocks.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    shared = first, second, full, free
    scales, zeros, to = (x_scale, w_scale, tall), (x_zero, x_sum, w_zero, w_sum), (bias, out, blocks, done)
    size = offs, m, n, k
    gl.warp_specialize(
        [
            (_multiply, (shared, scales, zeros, to, size, SPEC, SHARED, INTEGER, EXPERTS, STAGES, BAND, 0)),
            (_multiply, (shared, scales, zeros, to, size, SPEC, SHARED, INTEGER, EXPERTS, STAGES, BAND, 1)),
            (_bring, (x, w, shared, size, EXPERTS, STAGES, BAND)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _most_tiles(size, EXPERTS: gl.constexpr):
    """At most how many tiles there are, whoever's the tokens are."""
    _, m, n, _ = size
    return gl.cdiv(n, ROWS) * (gl.cdiv(m, TOKENS) if EXPERTS == 0 else m // TOKENS + EXPERTS + 1)


@gluon.jit
def _span(expert, size, EXPERTS: gl.constexpr):
    """First token of an expert, and the one after its last. Who comes after the last expert has what is left."""
    offs, m, _, _ = size
    start, end = 0, m
    if EXPERTS != 0:
        start = gl.minimum(gl.load(offs + expert - 1, expert > 0, 0), m)
        end = gl.minimum(gl.load(offs + expert, expert < EXPERTS, m), m)
    return start, end


@gluon.jit
def _tile(tile, expert, before, size, EXPERTS: gl.constexpr, BAND: gl.constexpr):
    """The expert a tile is of, tiles before it, the tile's first row and token, and the end of the expert's tokens.

    What is then no tile has no tokens before the end.
    """
    _, m, n, _ = size
    down = gl.cdiv(n, ROWS)
    start, end = _span(expert, size, EXPERTS)
    if EXPERTS != 0:
        while (expert < EXPERTS) & (tile >= before + down * gl.cdiv(end - start, TOKENS)):
            before += down * gl.cdiv(end - start, TOKENS)
            expert += 1
            start, end = _span(expert, size, EXPERTS)
    along = gl.maximum(gl.cdiv(end - start, TOKENS), 1)
    at = tile - before
    band = at // (BAND * along) * BAND
    high = gl.maximum(gl.minimum(down - band, BAND), 1)
    within = at % (BAND * along)
    row, token = (band + within % high) * ROWS, start + within // high * TOKENS
    if EXPERTS == 0:
        # The last block begins early rather than reach beyond the end.
        token = gl.maximum(gl.minimum(token, m - TOKENS), 0)
    else:
        token = gl.where(at < down * gl.cdiv(end - start, TOKENS), token, end)
    return expert, before, row, token, end


@gluon.jit
def _steps(k, expert, EXPERTS: gl.constexpr):
    """How many columns at a time there are; of tokens that are nobody's none."""
    steps = gl.cdiv(k, COLUMNS)
    if EXPERTS != 0:
        steps = gl.where(expert < EXPERTS, steps, 0)
    return steps


@gluon.jit
def _bring(x, w, shared, size, EXPERTS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr):
    """Both operands of all steps of all tiles, as places become free."""
    first, second, full, free = shared
    _, _, n, k = size
    inputs_are_there()
    at, expert, before = 0, 0, 0
    for tile in range(gl.program_id(0), _most_tiles(size, EXPERTS), gl.num_programs(0)):
        expert, before, row, token, _ = _tile(tile, expert, before, size, EXPERTS, BAND)
        for step in range(_steps(k, expert, EXPERTS)):
            place = at % STAGES
            mbarrier.wait(free.index(place), at // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(place), x.block_type.nbytes + w.block_type.nbytes)
            load(x, [token, step * COLUMNS], full.index(place), first.index(place))
            load(w, [expert * n + row, step * COLUMNS], full.index(place), second.index(place))
            at += 1


@gluon.jit
def _multiply(
    shared,
    scales,
    zeros,
    to,
    size,
    SPEC: gl.constexpr,
    SHARED: gl.constexpr,
    INTEGER: gl.constexpr,
    EXPERTS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    HALF: gl.constexpr,
):
    """Four warps' 64 tokens of each tile."""
    # Of integers Triton issues no product of 256 rows.
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128 if INTEGER else ROWS, 32])
    KIND: gl.constexpr = gl.int32 if INTEGER else gl.float32
    first, second, full, free = shared
    _, _, n, k = size
    inputs_are_there()
    at, expert, before = 0, 0, 0
    for tile in range(gl.program_id(0), _most_tiles(size, EXPERTS), gl.num_programs(0)):
        expert, before, row, token, end = _tile(tile, expert, before, size, EXPERTS, BAND)
        steps = _steps(k, expert, EXPERTS)
        acc = gl.zeros([SIDE, ROWS], KIND, MMA)
        for step in range(steps):
            place = at % STAGES
            mbarrier.wait(full.index(place), at // STAGES & 1)
            left, right = first.index(place).slice(HALF * SIDE, SIDE), second.index(place).permute((1, 0))
            acc = warpgroup_mma(left, right, acc, is_async=True)
            # While these run, the place of those before is free.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(free.index((at + STAGES - 1) % STAGES), count=1, pred=step > 0)
            at += 1
        mine = token + HALF * SIDE
        # Asked for while the last products run.
        factors = _factors(scales, n, expert, row, mine, end, SHARED, EXPERTS)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((at + STAGES - 1) % STAGES), count=1, pred=steps > 0)
        _write(acc, factors, zeros, to, n, expert, row, mine, end, SPEC, SHARED, EXPERTS, HALF)
    tma.store_wait(pendings=0)
    next_may_start()


@gluon.jit
def _of(expert, row, token, end, EXPERTS: gl.constexpr, PART: gl.constexpr):
    """Whose rows a quarter of the weight's are, its rows, the tokens, and which of those are anybody's."""
    rows = row + PART * 64 + gl.arange(0, 64, gl.SliceLayout(0, QUARTER))
    tokens = token + gl.arange(0, SIDE, gl.SliceLayout(1, QUARTER))
    routed = tokens < end
    if EXPERTS != 0:
        routed = routed & (expert < EXPERTS)
        expert = gl.minimum(expert, EXPERTS - 1)
    return expert, rows, tokens, routed


@gluon.jit
def _factors(scales, n, expert, row, token, end, SHARED: gl.constexpr, EXPERTS: gl.constexpr):
    """Scales of four quarters of 256 rows, and of 64 tokens."""
    x_scale, w_scale, tall = scales
    found = ()
    for i in gl.static_range(4):
        of, rows, tokens, routed = _of(expert, row, token, end, EXPERTS, i)
        found = found + (gl.load(w_scale + (of * gl.cdiv(n, tall) + rows // tall), rows < n, 0.0),)
    return found + (gl.load(x_scale + (gl.zeros_like(tokens) if SHARED else tokens), routed, 0.0),)


@gluon.jit
def _write(
    acc,
    factors,
    zeros,
    to,
    n,
    expert,
    row,
    token,
    end,
    SPEC: gl.constexpr,
    SHARED: gl.constexpr,
    EXPERTS: gl.constexpr,
    HALF: gl.constexpr,
):
    """Sums of 64 tokens with their scales and zero points; zeros for those that are nobody's."""
    x_zero, x_sum, w_zero, w_sum = zeros
    bias, out, blocks, done = to
    for i in gl.static_range(4):
        sums = columns_of(acc, SIDE, i)
        of, rows, tokens, routed = _of(expert, row, token, end, EXPERTS, i)
        within, of = rows < n, of * n + rows
        if x_zero is not None:
            z = gl.load(x_zero + (gl.zeros_like(tokens) if SHARED else tokens), routed, 0).to(gl.int32)
            sums -= z[:, None] * gl.load(w_sum + of, within, 0)[None, :]
        if w_zero is not None:
            z = gl.load(w_zero + of, within, 0).to(gl.int32)
            sums -= gl.load(x_sum + tokens, routed, 0)[:, None] * z[None, :]
        value = sums.to(gl.float32) * factors[4][:, None] * factors[i][None, :]
        if bias is not None:
            value += to_float32(gl.load(bias + rows, within, 0))[None, :]
        place = done.index(HALF * 2 + i % 2)
        keep(from_float32(value, out.dtype.element_ty, SPEC), place)
        # Python's `or` of what is known and what is not is no constant.
        if EXPERTS == 0:  # noqa: SIM114
            send(place, blocks, token, row + i * SIDE)
        elif token + SIDE <= end:
            send(place, blocks, token, row + i * SIDE)
        else:
            _store(place, out, token, end, row + i * SIDE, n)


@gluon.jit
def _store(place, out, token, end, row, n):
    """Write a block that was kept up to the expert's last token: those beyond it are another's."""
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = row + gl.arange(0, SIDE, gl.SliceLayout(0, FLAT))
    tokens = token + gl.arange(0, SIDE, gl.SliceLayout(1, FLAT))
    at = tokens.to(gl.int64)[:, None] * n + rows[None, :]
    gl.store(out + at, place.load(FLAT), (tokens < end)[:, None] & (rows < n)[None, :])
