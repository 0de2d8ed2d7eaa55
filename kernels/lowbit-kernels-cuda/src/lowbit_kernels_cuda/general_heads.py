"""Rounding of heads for attention on any GPU: every scheme, any channels, sequences of one length or of many.

Codes of each sequence begin with a block of 128 tokens, so that a block has one sequence and one scale.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.attention import MODE, SAMPLE, TOKENS, Scheme
from lowbit.format import WHOLE, Format
from lowbit.hadamard import hadamard
from lowbit_kernels_cuda.codes import to_float32
from lowbit_kernels_cuda.scaling import magnitude, nearest_code, raw, scale_of_amax, spec

BLOCK = tl.constexpr(TOKENS)
_SAMPLE = tl.constexpr(SAMPLE)
# Channels that are multiplied by a Hadamard matrix at a time, so that shared memory suffices.
_PART = 32


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where tokens of sequences are: `count` of `tokens` each, or between `cu` (count + 1,) of `tokens` in all."""

    count: int
    tokens: int
    cu: Tensor | None = None

    @property
    def blocks(self) -> int:
        """Blocks of 128 tokens, no two sequences in one; with `cu`, which the GPU alone knows, at most so many."""
        if self.cu is None:
            return self.count * triton.cdiv(self.tokens, TOKENS)
        return self.tokens // TOKENS + self.count

    @property
    def places(self) -> int:
        """A power of two, no less than `count` where that is read."""
        return 1 if self.cu is None else max(16, triton.next_power_of_2(self.count))


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of heads and their scales, in float32.

    `data` is (heads, 128 * blocks, D'), or of values (heads, D', 128 * blocks), with D' a power of two and zeros beyond
    the channels and tokens that there are; `scale` (heads, blocks), or (heads, sequences) if a head has one alone, of
    queries all heads that share keys.
    """

    data: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """Rounded queries and keys, and values: rounded, or (sequences, heads, tokens, D) in 16 bits."""

    q: Codes
    k: Codes
    v: Codes | Tensor


def channels(d: int) -> int:
    """Channels of codes of heads of `d`: as many as tensor cores take at once, or a multiple."""
    return max(32, triton.next_power_of_2(d))


def rounded(q: Tensor, k: Tensor, v: Tensor, scheme: Scheme, of_q: Sequences, of_k: Sequences) -> Heads:
    """Queries, keys and values (sequences, heads, tokens, D) as a scheme has them; with `cu`, of one sequence."""
    turn = matrix(q.shape[3], channels(q.shape[3]), q.device) if scheme.rotate_qk else None
    made_q = _codes(q, scheme.qk, of_q, None, turn, together=q.shape[1] // k.shape[1])
    made_k = _codes(k, scheme.qk, of_k, _means(k, of_k) if scheme.smooth else None, turn)
    turn = matrix(v.shape[3], channels(v.shape[3]), v.device) if scheme.rotate_v else None
    if scheme.v is not None:
        return Heads(made_q, made_k, _codes(v, scheme.v, of_k, None, turn, values=True))
    if turn is not None:
        d = v.shape[3]
        v = (v.float() @ turn[:d, :d]).to(v.dtype)
    return Heads(made_q, made_k, v)


def _codes(
    x: Tensor,
    fmt: Format,
    of: Sequences,
    mean: Tensor | None,
    turn: Tensor | None,
    *,
    together: int = 1,
    values: bool = False,
) -> Codes:
    heads, d, whole = x.shape[1], channels(x.shape[3]), fmt.block[0] == WHOLE
    size = (d, of.blocks * TOKENS) if values else (of.blocks * TOKENS, d)
    made = Codes(
        torch.empty(heads, *size, dtype=fmt.element.storage, device=x.device),
        torch.empty((heads // together, of.count) if whole else (heads, of.blocks), device=x.device),
    )
    most = torch.zeros_like(made.scale, dtype=torch.int32) if whole else None
    kernel: Any = _round
    # The largest of a head is found before what depends on it.
    for find in (True, False) if whole else (False,):
        kernel[(of.blocks, heads)](
            *(raw(x), raw(made.data), made.scale, most, mean, turn, of.cu, *x.stride(), of.count, of.tokens, together),
            COUNT=of.places,
            WIDTH=x.shape[3],
            D=d,
            PART=min(d, _PART),
            SPEC=spec(fmt, MODE, x.device if x.device.type == "cuda" else None),
            FIND=find,
            VALUES=values,
            num_warps=8,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return made


def _means(k: Tensor, of: Sequences) -> Tensor:
    """See `lowbit.attending.mean_of_keys`: (heads, sequences, D')."""
    heads, d = k.shape[1], channels(k.shape[3])
    mean = torch.empty(heads, of.count, d, device=k.device)
    kernel: Any = _mean
    kernel[(of.count, heads)](
        *(raw(k), mean, of.cu, *k.stride(), of.count, of.tokens), COUNT=of.places, WIDTH=k.shape[3], D=d, num_warps=4
    )
    return mean


@cache
def matrix(width: int, d: int, device: torch.device) -> Tensor:
    """A Hadamard matrix over sqrt(width), and zeros."""
    made = torch.zeros(d, d)
    made[:width, :width] = hadamard(width) * width**-0.5
    return made.to(device)


@triton.jit
def sequence_of(sequence, cu, tokens, COUNT: tl.constexpr):
    """The first token of a sequence, how many it has, and its first block."""
    if cu is None:
        start, length = tokens * 0, tokens
        first = sequence * tl.cdiv(tokens, BLOCK)
    else:
        start = tl.load(cu + sequence)
        length = tl.load(cu + sequence + 1) - start
        index = tl.arange(0, COUNT)
        before = index < sequence
        sizes = tl.load(cu + index + 1, before, 0) - tl.load(cu + index, before, 0)
        first = tl.sum(tl.cdiv(sizes, BLOCK))
    return start, length, first


@triton.jit
def block_of(at, cu, count, tokens, COUNT: tl.constexpr):
    """A block's sequence, that one's first token, its tokens, and how many of them are before the block.

    Blocks beyond the last begin at the end of their sequence, or after it.
    """
    if cu is None:
        sequence = at // tl.cdiv(tokens, BLOCK)
    else:
        index = tl.arange(0, COUNT)
        sizes = tl.load(cu + index + 1, index < count, 0) - tl.load(cu + index, index < count, 0)
        ends = tl.cumsum(tl.cdiv(sizes, BLOCK), 0)
        # Not the last one, which those of no sequence get.
        sequence = tl.sum(((ends <= at) & (index < count - 1)).to(tl.int32))
    start, length, first = sequence_of(sequence, cu, tokens, COUNT)
    return sequence, start, length, (at - first) * BLOCK


@triton.jit
def _mean(
    k,
    mean,
    cu,
    of_sequence,
    of_head,
    of_token,
    of_channel,
    count,
    tokens,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """A program a sequence and head."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    start, length, _ = sequence_of(sequence, cu, tokens, COUNT)
    channel = tl.arange(0, D)
    of = k + head.to(tl.int64) * of_head + channel[None, :] * of_channel
    if cu is None:
        of += sequence.to(tl.int64) * of_sequence
    total = tl.zeros([D], tl.float32)
    for begin in range(0, _SAMPLE, 64):
        i = begin + tl.arange(0, 64)
        row = start + tl.where(length > _SAMPLE, (i.to(tl.int64) * length) // _SAMPLE, i)
        there = (i < length)[:, None] & (channel < WIDTH)[None, :]
        total += tl.sum(to_float32(tl.load(of + row.to(tl.int64)[:, None] * of_token, there, 0)), 0)
    least = tl.maximum(tl.minimum(length, _SAMPLE), 1)
    tl.store(mean + (head * count + sequence).to(tl.int64) * D + channel, total / least)


@triton.jit
def _round(
    x,
    codes,
    scale,
    most,
    mean,
    turn,
    cu,
    of_sequence,
    of_head,
    of_token,
    of_channel,
    count,
    tokens,
    together,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    SPEC: tl.constexpr,
    FIND: tl.constexpr,
    VALUES: tl.constexpr,
):
    """A program a block of 128 tokens of a head.

    `most` has the bits of heads' largest magnitudes, so many heads `together`, which a launch with FIND finds, or is
    None: scales of blocks.
    """
    at, head = tl.program_id(0), tl.program_id(1)
    sequence, start, length, before = block_of(at, cu, count, tokens, COUNT)
    if before >= length:
        return
    row = before + tl.arange(0, BLOCK)
    of = x + head.to(tl.int64) * of_head + (start + row).to(tl.int64)[:, None] * of_token
    if cu is None:
        of += sequence.to(tl.int64) * of_sequence
    means = mean
    if mean is not None:
        means = mean + (head * count + sequence).to(tl.int64) * D
    there = row < length
    if turn is None:
        value = _read(of, of_channel, means, there, 0, WIDTH, D)
    else:
        column = tl.arange(0, D)
        value = tl.zeros([BLOCK, D], tl.float32)
        for begin in range(0, D, PART):
            part = turn + (begin + tl.arange(0, PART))[:, None] * D + column[None, :]
            given = _read(of, of_channel, means, there, begin, WIDTH, PART)
            # Nearly as float32 has it, on tensor cores.
            value = tl.dot(given, tl.load(part), value, input_precision="tf32x3")
    largest = tl.max(tl.max(magnitude(value), 1), 0)
    place = scale + head * tl.num_programs(0) + at
    if most is not None:
        place = head // together * count + sequence
        if FIND:
            tl.atomic_max(most + place, largest)
            return
        largest = tl.load(most + place)
        place = scale + place
    _, by = scale_of_amax(largest.to(tl.float32, bitcast=True), 1.0, SPEC, "")
    tl.store(place, by)
    code = nearest_code(value, by, SPEC).to(codes.dtype.element_ty, bitcast=True)
    column = tl.arange(0, D)
    row = at * BLOCK + tl.arange(0, BLOCK)
    if VALUES:
        row_size = tl.num_programs(0).to(tl.int64) * BLOCK
        tl.store(codes + (head * D + column)[:, None] * row_size + row[None, :], tl.trans(code))
    else:
        row += head.to(tl.int64) * tl.num_programs(0) * BLOCK
        tl.store(codes + row[:, None] * D + column[None, :], code)


@triton.jit
def _read(of, of_channel, mean, there, begin, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Channels from `begin` on, less their mean, in float32; zeros where there is nothing."""
    channel = begin + tl.arange(0, SIZE)
    there = there[:, None] & (channel < WIDTH)[None, :]
    value = to_float32(tl.load(of + channel[None, :] * of_channel, there, 0))
    if mean is not None:
        value = tl.where(there, value - tl.load(mean + channel)[None, :], 0.0)
    return value
