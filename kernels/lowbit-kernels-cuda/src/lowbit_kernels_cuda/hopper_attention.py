"""Attention on Hopper of codes that `heads` rounded: int8 or e4m3 queries and keys, e4m3 weights and values.

Each 64 queries of 128 have four warps of their own, and one more warp brings codes. While scores of the next keys are
multiplied, so are weights of those before by their values; a softmax of one half runs beside the other's products.
Programs stay, and go from tile to tile, from the longest to the shortest; heads whose keys and values fit the cache
together are taken together.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from lowbit.attending import ONE
from lowbit.attention import TOKENS
from lowbit_kernels_cuda.fragments import four_bytes
from lowbit_kernels_cuda.heads import Rounded
from lowbit_kernels_cuda.hopper import described, load
from lowbit_kernels_cuda.hopper_bytes import REGISTERS
from lowbit_kernels_cuda.inputs import multiprocessors

KEYS = gl.constexpr(TOKENS)
SIDE = gl.constexpr(64)
# 1.5 * 2^23: integers up to 2^22, added to its bits, give floats that are as much larger.
_CENTRE = gl.constexpr(12582912.0)
_CENTRE_BITS = gl.constexpr(0x4B400000)
# Stands for the largest score where nothing is seen.
_LEAST = gl.constexpr(-(2.0**120))
# Blocks of values so many powers of two below the largest, or of zeros, count in sums alone: their weights are zeros in
# e4m3, and smaller ones would be in float32.
_APART = gl.constexpr(64.0)
_SHIFT = gl.constexpr(math.log2(ONE))
_LN2 = gl.constexpr(math.log(2))
# Bytes of keys and values that stay in the cache while all of their queries are taken.
_CACHE = 24 << 20


def attend(made: Rounded, out: Tensor, sums: Tensor, scale: float, *, causal: bool) -> None:
    """Write attention (B, H, S, D) of rounded heads, and the log of its sums (B, H, S), contiguous.

    The result is contiguous, or (B, S, H, D) transposed.
    """
    batch, heads, queries, d = out.shape
    keys, group = made.keys, batch * heads // len(made.k)
    tiles = batch * heads * triton.cdiv(queries, TOKENS)
    together = max(1, min(batch * heads, _CACHE // (2 * keys * d + 1) * group))
    kernel: Any = attention_wgmma
    kernel[(min(tiles, multiprocessors(out.device)),)](
        described(made.q.view(-1, d), 64, d),
        described(made.k.view(-1, d), TOKENS, d),
        described(made.v.view(-1, made.v.shape[2]), d, TOKENS),
        *(made.q_scale, made.k_scale, made.v_power, out, sums, scale * math.log2(math.e)),
        *(batch * heads, group, queries, keys, tiles, together, heads),
        TOKENS_FIRST=not out.is_contiguous(),
        CAUSAL=causal,
        INTEGER=made.q.dtype == torch.int8,
        D=d,
        STAGES=3 if d <= 128 else 2,
        num_warps=4,
    )


@gluon.jit(do_not_specialize=["queries", "keys", "tiles", "together", "each"])
def attention_wgmma(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_power,
    out,
    sums,
    factor,
    heads,
    group,
    queries,
    keys,
    tiles,
    together,
    each,
    TOKENS_FIRST: gl.constexpr,
    CAUSAL: gl.constexpr,
    INTEGER: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """`q`, `k` and `v` describe blocks (64, D), (128, D) and (D, 128) of all heads' codes, the rest is as `Rounded`."""
    KIND: gl.constexpr = gl.int8 if INTEGER else gl.float8e4nv
    of_q = gl.allocate_shared_memory(KIND, [2, SIDE, D], q.layout)
    of_k = gl.allocate_shared_memory(KIND, [STAGES, KEYS, D], k.layout)
    of_v = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, KEYS], v.layout)
    q_full, q_free = _barriers(2, 1), _barriers(2, 1)
    k_full, k_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    v_full, v_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    shared = of_q, of_k, of_v, q_full, q_free, k_full, k_free, v_full, v_free
    size = heads, group, queries, keys, tiles, together
    scales, to = (q_scale, k_scale, v_power, factor), (out, sums, each)
    gl.warp_specialize(
        [
            (_attend, (shared, scales, to, size, TOKENS_FIRST, CAUSAL, INTEGER, D, STAGES, 0)),
            (_attend, (shared, scales, to, size, TOKENS_FIRST, CAUSAL, INTEGER, D, STAGES, 1)),
            (_bring, (q, k, v, shared, size, CAUSAL, D, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def _tile(turn, size, CAUSAL: gl.constexpr):
    """Of a program's turn: whether there is a tile, its first query, head, and how many blocks of keys it sees."""
    heads, _, queries, keys, tiles, together = size
    # Programs take turns forth and back, so that none has the longest tile each time.
    at = gl.program_id(0)
    tile = turn * gl.num_programs(0) + gl.where(turn % 2 == 1, gl.num_programs(0) - 1 - at, at)
    along = gl.cdiv(queries, 2 * SIDE)
    first = tile // (together * along) * together
    within = tile % (together * along)
    high = gl.maximum(gl.minimum(heads - first, together), 1)
    row = (along - 1 - within // high) * 2 * SIDE
    blocks = gl.cdiv(keys, KEYS)
    if CAUSAL:
        # What no query sees is not read, but for one block, whose weights are all zeros.
        blocks = gl.maximum(gl.minimum(blocks, gl.cdiv(row + 2 * SIDE + keys - queries, KEYS)), 1)
    return tile < tiles, row, first + within % high, blocks


@gluon.jit
def _bring(q, k, v, shared, size, CAUSAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Codes of all tiles, as places become free; the last keys first."""
    of_q, of_k, of_v, q_full, q_free, k_full, k_free, v_full, v_free = shared
    _, group, queries, keys, tiles, _ = size
    q_rows, k_rows = gl.cdiv(queries, 2 * SIDE) * 2 * SIDE, gl.cdiv(keys, KEYS) * KEYS
    at, done = 0, 0
    for turn in range(gl.cdiv(tiles, gl.num_programs(0))):
        there, row, head, blocks = _tile(turn, size, CAUSAL)
        if there:
            of = head // group
            for half in gl.static_range(2):
                mbarrier.wait(q_free.index(half), done & 1 ^ 1)
                mbarrier.expect(q_full.index(half), q.block_type.nbytes)
                load(q, [head * q_rows + row + half * SIDE, 0], q_full.index(half), of_q.index(half))
            done += 1
            for i in range(blocks):
                token, place = (blocks - 1 - i) * KEYS, at % STAGES
                mbarrier.wait(k_free.index(place), at // STAGES & 1 ^ 1)
                mbarrier.expect(k_full.index(place), k.block_type.nbytes)
                load(k, [of * k_rows + token, 0], k_full.index(place), of_k.index(place))
                mbarrier.wait(v_free.index(place), at // STAGES & 1 ^ 1)
                mbarrier.expect(v_full.index(place), v.block_type.nbytes)
                load(v, [of * D, token], v_full.index(place), of_v.index(place))
                at += 1


@gluon.jit
def _attend(
    shared,
    scales,
    to,
    size,
    TOKENS_FIRST: gl.constexpr,
    CAUSAL: gl.constexpr,
    INTEGER: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    """Four warps' 64 queries of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    of_q, of_k, of_v, q_full, q_free, k_full, k_free, v_full, v_free = shared
    q_scale, k_scale, v_power, factor = scales
    _, group, queries, keys, tiles, _ = size
    all_blocks = gl.cdiv(keys, KEYS)
    at, done = 0, 0
    for turn in range(gl.cdiv(tiles, gl.num_programs(0))):
        there, row, head, blocks = _tile(turn, size, CAUSAL)
        if there:
            of_scales, of_powers = k_scale + head // group * all_blocks, v_power + head // group * all_blocks
            times = gl.load(q_scale + head * gl.cdiv(queries, 2 * SIDE) + row // (2 * SIDE)) * factor
            row += HALF * SIDE
            block = blocks - 1
            by, power = times * gl.load(of_scales + block), gl.load(of_powers + block)
            most = gl.full([SIDE], _LEAST, gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([SIDE], gl.float32, gl.SliceLayout(1, SCORES))
            acc = gl.zeros([SIDE, D], gl.float32, RESULT)
            queries_here = of_q.index(HALF)
            mbarrier.wait(q_full.index(HALF), done & 1)
            mbarrier.wait(k_full.index(at % STAGES), at // STAGES & 1)
            scores = _scores(queries_here, of_k.index(at % STAGES), SCORES, INTEGER)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_free.index(at % STAGES), count=1)
            # Of the last block, which may be seen in part; those before are seen whole, but for one block more where
            # queries do not end with a block of keys.
            p, most, total, less, unit = _softmax(
                scores, most, total, power, by, power, row, block, size, True, CAUSAL, INTEGER, SCORES
            )
            words = _words(p)
            for i in range(1, blocks):
                block = blocks - 1 - i
                by, power = times * gl.load(of_scales + block), gl.load(of_powers + block)
                following = (at + 1) % STAGES
                mbarrier.wait(k_full.index(following), (at + 1) // STAGES & 1)
                scores = _scores(queries_here, of_k.index(following), SCORES, INTEGER)
                mbarrier.wait(v_full.index(at % STAGES), at // STAGES & 1)
                acc = _add(words, of_v.index(at % STAGES), acc, RESULT)
                scores, words = warpgroup_mma_wait(1, deps=[scores, words])
                mbarrier.arrive(k_free.index(following), count=1)
                # Python's `and` of what is known and what is not is no constant.
                if CAUSAL:  # noqa: SIM102
                    if (i == 1) & ((keys - queries) % KEYS != 0):
                        scores = _hidden(scores, row, block, size, INTEGER, SCORES)
                p, most, total, less, unit = _softmax(
                    scores, most, total, unit, by, power, row, block, size, False, CAUSAL, INTEGER, SCORES
                )
                acc, words = warpgroup_mma_wait(0, deps=[acc, words])
                mbarrier.arrive(v_free.index(at % STAGES), count=1)
                acc *= gl.convert_layout(less, gl.SliceLayout(1, RESULT))[:, None]
                words = _words(p)
                at += 1
            mbarrier.arrive(q_free.index(HALF), count=1)
            mbarrier.wait(v_full.index(at % STAGES), at // STAGES & 1)
            acc = _add(words, of_v.index(at % STAGES), acc, RESULT)
            acc, words = warpgroup_mma_wait(0, deps=[acc, words])
            mbarrier.arrive(v_free.index(at % STAGES), count=1)
            at += 1
            done += 1
            _write(acc, most, total, unit, to, head, row, queries, TOKENS_FIRST, D, SCORES, RESULT)


@gluon.jit
def _scores(q, k, SCORES: gl.constexpr, INTEGER: gl.constexpr):
    """Products of codes, integers as floats that are `_CENTRE` larger; they are not waited for."""
    if INTEGER:
        start = gl.full([SIDE, KEYS], _CENTRE_BITS, gl.int32, SCORES)
    else:
        start = gl.zeros([SIDE, KEYS], gl.float32, SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), start, is_async=True)


@gluon.jit
def _add(words, v, acc, RESULT: gl.constexpr):
    """Add products of weights and values; they are not waited for, and the words are theirs until they are."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, RESULT, 4)
    x = gl.reshape(gl.permute(four_bytes(words), (0, 1, 2, 4, 3)), (SIDE, KEYS))
    return warpgroup_mma(gl.convert_layout(x, OPERAND, assert_trivial=True), v.permute((1, 0)), acc, is_async=True)


@gluon.jit
def _words(p):
    """Four e4m3 to a word: of the columns 16 a + 8 b + 2 t + c those of one a and t, c first.

    They are the columns of a lane, in the order in which `heads` has the tokens of values.
    """
    left, right = gl.split(gl.permute(gl.reshape(p, (SIDE, KEYS // 16, 2, 4, 2)), (0, 1, 3, 2, 4)))
    a, c = gl.split(left)
    b, d = gl.split(right)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f",
        [a, b, c, d],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _hidden(scores, row, block, size, INTEGER: gl.constexpr, SCORES: gl.constexpr):
    """Scores, as `_scores` gives them, with the least there is where a key is after its query."""
    _, _, queries, keys, _, _ = size
    rows = row + gl.arange(0, SIDE, gl.SliceLayout(1, SCORES)) + keys - queries
    columns = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    # The bits of a negative infinity.
    hidden = gl.full([SIDE, KEYS], -8388608, gl.int32, SCORES)
    hidden = hidden if INTEGER else hidden.to(gl.float32, bitcast=True)
    return gl.where(rows[:, None] >= columns[None, :], scores, hidden)


@gluon.jit
def _softmax(
    scores,
    most,
    total,
    unit,
    by,
    power,
    row,
    block,
    size,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    INTEGER: gl.constexpr,
    SCORES: gl.constexpr,
):
    """Weights of a block, the largest scores and sums so far, what results become less by, and their unit.

    Scores times `by` are powers of two, largest ones are rounded up to whole. Results are in units of 2^unit, the
    largest power of values so far: weights of a block with a smaller one are as much smaller.
    """
    down = by * _CENTRE if INTEGER else by * 0.0
    if MASK:
        keys = size[3]
        columns = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
        if CAUSAL:
            scores = _hidden(scores, row, block, size, INTEGER, SCORES)
        x = scores.to(gl.float32, bitcast=True)
        x = gl.where((columns < keys)[None, :], x, float("-inf"))
    else:
        x = scores.to(gl.float32, bitcast=True)
    now = gl.maximum(most, gl.ceil(gl.max(x, 1) * by - down))
    wider = gl.maximum(unit, power)
    apart = gl.minimum(wider - power, _APART)
    p = gl.exp2(x * by + (_SHIFT - apart - down - now)[:, None])
    total = total * gl.exp2(most - now) + gl.sum(p, 1) * gl.exp2(apart)
    return p, now, total, gl.exp2(most - now + unit - wider), wider


@gluon.jit
def _write(
    acc,
    most,
    total,
    unit,
    to,
    head,
    row,
    queries,
    TOKENS_FIRST: gl.constexpr,
    D: gl.constexpr,
    SCORES: gl.constexpr,
    RESULT: gl.constexpr,
):
    """Results over sums, zeros where nothing was seen, and the natural log of sums."""
    out, sums, each = to
    rows = row + gl.arange(0, SIDE, gl.SliceLayout(1, RESULT))
    less = gl.convert_layout(gl.where(total == 0, 0.0, gl.exp2(unit) / total), gl.SliceLayout(1, RESULT))
    if TOKENS_FIRST:
        at = ((head // each).to(gl.int64) * queries + rows) * each + head % each
    else:
        at = head.to(gl.int64) * queries + rows
    place = at[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, RESULT))[None, :]
    gl.store(out + place, (acc * less[:, None]).to(out.dtype.element_ty), (rows < queries)[:, None])
    rows = row + gl.arange(0, SIDE, gl.SliceLayout(1, SCORES))
    gl.store(sums + head * queries + rows, (most - _SHIFT + gl.log2(total)) * _LN2, rows < queries)
