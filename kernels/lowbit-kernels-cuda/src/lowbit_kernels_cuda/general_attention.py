"""Attention of codes on any GPU: every scheme, mask and window, any channels, sequences of one length or of many.

A program has some queries of a head and goes through the keys that these may see, without those that no query sees.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.attending import ONE, Seen
from lowbit.attention import MODE, TOKENS, Scheme
from lowbit.format import WHOLE, Format
from lowbit_kernels_cuda.codes import encode_float, from_float32, to_float32
from lowbit_kernels_cuda.general_heads import Codes, Sequences, block_of, channels, matrix, rounded, sequence_of
from lowbit_kernels_cuda.scaling import raw, spec

BLOCK = tl.constexpr(TOKENS)
# Stands for the largest score where nothing is seen.
_LEAST = tl.constexpr(-(2.0**120))
_SHIFT = tl.constexpr(math.log2(ONE))
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
# What float16 of the bits of an e4m3 stand for, its sign and exponent moved to where they belong, is so much less.
_LIFT = 2.0**8
_E4M3 = Format.parse("e4m3fn:128x*:e8m0")


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries of a program, keys it takes at a time, and how it runs."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile(d: int, *, plain: bool, masked: bool, native: bool) -> Tile:
    """The tile for codes of so many channels and plain values or rounded: measured on Hopper; it fits all GPUs.

    Tensor cores that are not `native` take twice the bytes.
    """
    warps, stages = (4, 3) if d <= 128 else (8, 2)
    if plain:
        return Tile(128, 64, warps, stages)
    # Of a mask some blocks are in shared memory, too.
    return Tile(64, 64 if masked or (d > 128 and not native) else 128, warps, stages)


def attend(
    q: Tensor, k: Tensor, v: Tensor, of_q: Sequences, of_k: Sequences, seen: Seen, scale: float, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Attention like q, and the log of its sums (sequences, H, S), of sequences of one length (sequences, H, S, D).

    With `cu` q, k and v are (1, H, tokens, D), and their tokens those of all sequences.
    """
    (outer, heads, queries, d), wide = q.shape, channels(q.shape[3])
    # What is turned back is rounded after that.
    kind = torch.float32 if scheme.rotate_v else q.dtype
    shape = (outer, heads, queries, d) if of_q.cu is None else (outer, queries, heads, d)
    out = torch.empty(shape, dtype=kind, device=q.device)
    out = out if of_q.cu is None else out.transpose(1, 2)
    sums = torch.empty(q.shape[:3], device=q.device)
    made, integer = rounded(q, k, v, scheme, of_q, of_k), scheme.qk.element.kind == "int"
    # Of codes that are multiplied as bytes nothing is moved.
    native = spec(_E4M3, MODE, q.device).convert != ""
    how = tile(wide, plain=scheme.v is None, masked=seen.mask is not None, native=native)
    lift = 1.0 if native else _LIFT
    values, mask = made.v, seen.mask
    if mask is not None:
        mask = mask.expand(outer, heads, queries, k.shape[2])
    kernel: Any = attend_codes
    kernel[(of_q.blocks * (TOKENS // how.queries), heads)](
        *(raw(made.q.data), raw(made.k.data), raw(values.data if isinstance(values, Codes) else values)),
        *(made.q.scale, made.k.scale, values.scale if isinstance(values, Codes) else None),
        *(None if mask is None else raw(mask), raw(out), sums, of_q.cu, of_k.cu),
        scale * math.log2(math.e) * (1.0 if integer else lift * lift),
        *((0,) * 4 if mask is None else mask.stride()),
        *((0,) * 4 if isinstance(values, Codes) else values.stride()),
        *(*out.stride()[:3], *sums.stride()[:2]),
        *(of_q.count, of_q.tokens, of_k.tokens, of_k.blocks, heads // k.shape[1], seen.window),
        COUNT=of_q.places,
        WIDTH=d,
        D=wide,
        QUERIES=how.queries,
        KEYS=how.keys,
        INTEGER=integer,
        NATIVE=native,
        COMPILED=q.device.type != "cpu",
        LIFT=lift,
        SPEC=spec(_E4M3, MODE, q.device),
        Q_WHOLE=scheme.qk.block[0] == WHOLE,
        V_WHOLE=scheme.v is not None and scheme.v.block[0] == WHOLE,
        CAUSAL=seen.causal,
        WINDOW=seen.window > 0,
        num_warps=how.warps,
        num_stages=how.stages,
    )
    if scheme.rotate_v:
        out = (out @ matrix(d, d, q.device).T).to(q.dtype)
    return out, sums


@triton.jit(
    do_not_specialize=[
        "sums_sequence",
        "sums_head",
        "count",
        "queries_given",
        "keys_given",
        "k_blocks",
        "group",
        "window",
    ]
)
def attend_codes(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    mask,
    out,
    sums,
    cu_q,
    cu_k,
    factor,
    mask_sequence,
    mask_head,
    mask_query,
    mask_key,
    v_sequence,
    v_head,
    v_token,
    v_channel,
    out_sequence,
    out_head,
    out_token,
    sums_sequence,
    sums_head,
    count,
    queries_given,
    keys_given,
    k_blocks,
    group,
    window,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    COMPILED: tl.constexpr,
    LIFT: tl.constexpr,
    SPEC: tl.constexpr,
    Q_WHOLE: tl.constexpr,
    V_WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Codes and scales are as `general_heads` has them; without `v_scale`, `v` are values in 16 bits.

    NATIVE: tensor cores take e4m3, otherwise they get float16 of the same, LIFT times smaller. COMPILED: not
    interpreted, as bfloat16 cannot be.
    """
    PARTS: tl.constexpr = BLOCK // QUERIES
    # Of causal queries the last see most, and come first.
    turn, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    block, part = turn // PARTS, turn % PARTS
    sequence, start, queries, row = block_of(block, cu_q, count, queries_given, COUNT)
    row += part * QUERIES
    if row >= queries:
        return
    k_start, keys, k_first = sequence_of(sequence, cu_k, keys_given, COUNT)
    of = head // group
    rows, channel = row + tl.arange(0, QUERIES), tl.arange(0, D)
    q_blocks = tl.num_programs(0) // PARTS
    place = (head.to(tl.int64) * q_blocks + block) * BLOCK + part * QUERIES + tl.arange(0, QUERIES)
    query = tl.load(q + place[:, None] * D + channel[None, :])
    if Q_WHOLE:
        by = tl.load(q_scale + of * count + sequence) * tl.load(k_scale + of * count + sequence) * factor
    else:
        by = tl.load(q_scale + head * q_blocks + block) * factor
    # Keys of the sequence.
    k_place = (of.to(tl.int64) * k_blocks + k_first) * BLOCK
    k += k_place * D
    if v_scale is None:
        v += of.to(tl.int64) * v_head + k_start.to(tl.int64) * v_token
        if cu_k is None:
            v += sequence.to(tl.int64) * v_sequence
        v_row, v_column = v_token, v_channel
    else:
        v += of.to(tl.int64) * D * k_blocks * BLOCK + k_first * BLOCK
        v_row, v_column = 1, k_blocks.to(tl.int64) * BLOCK
    if mask is not None:
        mask += sequence.to(tl.int64) * mask_sequence + head.to(tl.int64) * mask_head
    # A query's own token among keys is as many further.
    shift = keys - queries
    last = tl.cdiv(keys, KEYS)
    whole = keys // KEYS
    first, begin = 0, 0
    if CAUSAL:
        last = tl.minimum(last, tl.maximum(tl.cdiv(row + QUERIES + shift, KEYS), 0))
        whole = tl.minimum(whole, tl.maximum(row + shift + 1, 0) // KEYS)
    if WINDOW:
        first = tl.maximum(row + shift - window + 1, 0) // KEYS
        begin = tl.minimum(tl.cdiv(tl.maximum(row + QUERIES + shift - window, 0), KEYS), last)
        whole = tl.maximum(whole, begin)
    most = tl.full([QUERIES], _LEAST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    # Blocks that a window may begin in, those that are seen whole, and those that end what is seen.
    for phase in tl.static_range(3):
        if phase != 0 or WINDOW:
            low = first if phase == 0 else begin if phase == 1 else whole
            high = begin if phase == 0 else whole if phase == 1 else last
            for at in range(low, high):
                column = at * KEYS + tl.arange(0, KEYS)
                key = tl.load(k + column[:, None] * D + channel[None, :])
                times = by
                if not Q_WHOLE:
                    times *= tl.load(k_scale + of * k_blocks + k_first + at * KEYS // BLOCK)
                x = tl.dot(_operand(query, INTEGER, NATIVE), _operand(key, INTEGER, NATIVE).T).to(tl.float32) * times
                if mask is not None:
                    x = _masked(x, mask, rows, column, queries, keys, mask_query, mask_key)
                if phase != 1:
                    there = (column < keys)[None, :]
                    if CAUSAL:
                        there &= column[None, :] <= rows[:, None] + shift
                    if WINDOW:
                        there &= column[None, :] > rows[:, None] + shift - window
                    x = tl.where(there, x, float("-inf"))
                now = tl.maximum(most, tl.ceil(tl.max(x, 1)))
                p = tl.exp2(x - now[:, None] + _SHIFT)
                less = tl.exp2(most - now)
                total = total * less + tl.sum(p, 1)
                acc *= less[:, None]
                most = now
                if v_scale is None:
                    there = (column < keys)[:, None] & (channel < WIDTH)[None, :]
                    value = tl.load(v + column.to(tl.int64)[:, None] * v_row + channel[None, :] * v_column, there, 0)
                    acc = _add_plain(p, value, acc, SPEC, COMPILED)
                else:
                    value = tl.load(v + channel[:, None] * v_column + column[None, :])
                    if V_WHOLE:
                        unit = tl.load(v_scale + of * count + sequence)
                    else:
                        unit = tl.load(v_scale + of * k_blocks + k_first + at * KEYS // BLOCK)
                    acc += tl.dot(_weights(p, NATIVE, SPEC), _operand(value, False, NATIVE).T) * (unit * LIFT * LIFT)
    there = rows < queries
    acc = tl.where((total == 0)[:, None], 0.0, acc / total[:, None])
    rows = (start + rows).to(tl.int64)
    out += head.to(tl.int64) * out_head
    sums += head.to(tl.int64) * sums_head
    if cu_q is None:
        out += sequence.to(tl.int64) * out_sequence
        sums += sequence.to(tl.int64) * sums_sequence
    place = out + rows[:, None] * out_token + channel[None, :]
    tl.store(place, from_float32(acc, out.dtype.element_ty, SPEC), there[:, None] & (channel < WIDTH)[None, :])
    tl.store(sums + rows, (most - _SHIFT + tl.log2(total)) * _LN2, there)


@triton.jit
def _operand(code, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """Bytes of codes as tensor cores take them."""
    if INTEGER:
        value = code.to(tl.int8, bitcast=True)
    elif NATIVE:
        value = code.to(tl.float8e4nv, bitcast=True)
    else:
        value = _half(code)
    return value


@triton.jit
def _half(code):
    """Float16 of e4m3, 2^8 times smaller; what stands for NaN is a number, and has a scale that is NaN."""
    bits = code.to(tl.int16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _weights(p, NATIVE: tl.constexpr, SPEC: tl.constexpr):
    """Weights in e4m3."""
    if NATIVE:
        value = p.to(tl.float8e4nv)
    else:
        ELEMENT: tl.constexpr = SPEC.element
        value = _half(encode_float(p, 0.0, ELEMENT, False))
    return value


@triton.jit
def _add_plain(p, value, acc, SPEC: tl.constexpr, COMPILED: tl.constexpr):
    """Add products of weights and values in 16 bits."""
    if COMPILED:
        if value.dtype == tl.int16:
            value = value.to(tl.bfloat16, bitcast=True)
        acc = tl.dot(p.to(value.dtype), value, acc)
    else:
        p = to_float32(from_float32(p, value.dtype, SPEC))
        acc = tl.dot(p, to_float32(value), acc)
    return acc


@triton.jit
def _masked(x, mask, rows, columns, queries, keys, of_query, of_key):
    """Scores in powers of two with a mask: bytes that are 0 where nothing is seen, or what is added."""
    place = mask + rows.to(tl.int64)[:, None] * of_query + columns.to(tl.int64)[None, :] * of_key
    found = tl.load(place, (rows < queries)[:, None] & (columns < keys)[None, :], 0)
    if mask.dtype.element_ty == tl.uint8:
        x = tl.where(found != 0, x, float("-inf"))
    else:
        x += to_float32(found) * _LOG2E
    return x
