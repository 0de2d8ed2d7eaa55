"""Rounding for attention: queries, keys and values to codes in one launch, as `hopper_attention` reads them.

A program rounds 128 tokens of a head, whose channels it holds in two halves: a Hadamard matrix is
`[[H, H], [H, -H]]` of one half its size.
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
from lowbit.hadamard import hadamard
from lowbit_kernels_cuda.codes import encode_float
from lowbit_kernels_cuda.scaling import magnitude, round_to_even, scale_of_amax, spec

BLOCK = tl.constexpr(TOKENS)
_OF_ZEROS = tl.constexpr(2.0**-40)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes and scales of heads, whose tokens are zeros up to a multiple of 128.

    `q` (B * H, S', D) and `k` (B * G, T', D) are as `lowbit.quantize` gives them, `v` (B * G, D, T') has tokens last:
    the token 16 a + 8 b + 2 t + c is in the place 16 a + 4 t + 2 b + c. Scales are of blocks of 128 tokens; those of
    values are the powers of two that they are, those of queries and keys that are zeros 2^-40.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_power: Tensor
    # How many keys there are.
    keys: int


def rounded(q: Tensor, k: Tensor, v: Tensor, scheme: Scheme) -> Rounded:
    """Queries (B, H, S, D), keys and values (B, G, T, D) as a scheme with block scales and rounded values has them."""
    (batch, heads, queries, d), (_, groups, keys, _) = q.shape, k.shape
    kind, device = scheme.qk.element.storage, q.device
    q_blocks, k_blocks = triton.cdiv(queries, TOKENS), triton.cdiv(keys, TOKENS)
    made = Rounded(
        torch.empty(batch * heads, q_blocks * TOKENS, d, dtype=kind, device=device),
        torch.empty(batch * groups, k_blocks * TOKENS, d, dtype=kind, device=device),
        torch.empty(batch * groups, d, k_blocks * TOKENS, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(batch * heads, q_blocks, device=device),
        torch.empty(batch * groups, k_blocks, device=device),
        torch.empty(batch * groups, k_blocks, device=device),
        keys,
    )
    # Channels lie side by side.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    mean = None
    if scheme.smooth:
        mean = torch.empty(batch * groups, d, device=device)
        taken: Any = _mean
        taken[(batch * groups,)](
            *(k, mean, *k.stride()[:3], groups, keys), D=d, COUNT=SAMPLE, PART=min(SAMPLE, 64), num_warps=4
        )
    kernel: Any = _round
    kernel[(batch * (heads * q_blocks + 2 * groups * k_blocks),)](
        *(q, k, v, made.q, made.k, made.v, made.q_scale, made.k_scale, made.v_power, mean),
        _halves(d, device) if scheme.rotate_qk else None,
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(batch * heads, heads, groups, queries, keys, q_blocks, k_blocks),
        D=d,
        QK=spec(scheme.qk, MODE, device),
        V=spec(scheme.v, MODE, device),
        ROTATE=scheme.rotate_qk,
        num_warps=8,
    )
    return made


@cache
def _halves(d: int, device: torch.device) -> Tensor:
    """A Hadamard matrix of half the channels, over sqrt(D)."""
    return (hadamard(d // 2) * d**-0.5).to(device)


@triton.jit
def _mean(k, mean, batch, head, token, groups, keys, D: tl.constexpr, COUNT: tl.constexpr, PART: tl.constexpr):
    """See `lowbit.attending.mean_of_keys`."""
    at = tl.program_id(0)
    channels = tl.arange(0, D)
    count = tl.minimum(keys, COUNT)
    start = k + (at // groups).to(tl.int64) * batch + (at % groups).to(tl.int64) * head
    total = tl.zeros([D], tl.float32)
    for first in range(0, COUNT, PART):
        i = first + tl.arange(0, PART)
        rows = tl.where(keys > COUNT, (i.to(tl.int64) * keys) // COUNT, i)
        place = start + rows[:, None] * token + channels[None, :]
        total += tl.sum(tl.load(place, (i < count)[:, None], 0.0).to(tl.float32), 0)
    tl.store(mean + at * D + channels, total / count)


@triton.jit
def _round(
    q,
    k,
    v,
    q_codes,
    k_codes,
    v_codes,
    q_scale,
    k_scale,
    v_power,
    mean,
    halves,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    all_heads,
    heads,
    groups,
    queries,
    keys,
    q_blocks,
    k_blocks,
    D: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """A program a block of 128 tokens of a head: those of queries, then of keys, then of values."""
    at = tl.program_id(0)
    all_groups = all_heads // heads * groups
    if at < all_heads * q_blocks:
        head, block = at // q_blocks, at % q_blocks
        start = q + (head // heads).to(tl.int64) * q_batch + (head % heads).to(tl.int64) * q_head
        low, high = _read(start, q_token, block, queries, D)
        _keep(low, high, q_codes, q_scale, halves, head, block, q_blocks, D, QK, ROTATE)
    else:
        at -= all_heads * q_blocks
        keys_too = at < all_groups * k_blocks
        at = tl.where(keys_too, at, at - all_groups * k_blocks)
        head, block = at // k_blocks, at % k_blocks
        if keys_too:
            start = k + (head // groups).to(tl.int64) * k_batch + (head % groups).to(tl.int64) * k_head
            low, high = _read(start, k_token, block, keys, D)
            if mean is not None:
                half = tl.arange(0, D // 2)
                there = (block * BLOCK + tl.arange(0, BLOCK) < keys)[:, None]
                low = tl.where(there, low - tl.load(mean + head * D + half)[None, :], 0.0)
                high = tl.where(there, high - tl.load(mean + head * D + D // 2 + half)[None, :], 0.0)
            _keep(low, high, k_codes, k_scale, halves, head, block, k_blocks, D, QK, ROTATE)
        else:
            start = v + (head // groups).to(tl.int64) * v_batch + (head % groups).to(tl.int64) * v_head
            low, high = _read(start, v_token, block, keys, D)
            _keep_values(low, high, v_codes, v_power, head, block, k_blocks, D, V)


@triton.jit
def _read(start, token, block, tokens, D: tl.constexpr):
    """Both halves of the channels of a block, in float32."""
    rows = block * BLOCK + tl.arange(0, BLOCK)
    place = start + rows.to(tl.int64)[:, None] * token + tl.arange(0, D // 2)[None, :]
    there = (rows < tokens)[:, None]
    return tl.load(place, there, 0.0).to(tl.float32), tl.load(place + D // 2, there, 0.0).to(tl.float32)


@triton.jit
def _turned(low, high, halves, D: tl.constexpr):
    """The channels times a Hadamard matrix over sqrt(D), in halves."""
    half = tl.arange(0, D // 2)
    matrix = tl.load(halves + half[:, None] * (D // 2) + half[None, :])
    return tl.dot(low + high, matrix, input_precision="tf32"), tl.dot(low - high, matrix, input_precision="tf32")


@triton.jit
def _scale(low, high, SPEC: tl.constexpr):
    """The scale of a block, as stored and in float32: NaN where a number is not finite."""
    return scale_of_amax(_largest(low, high).to(tl.float32, bitcast=True), 1.0, SPEC, "")


@triton.jit
def _largest(low, high):
    return tl.max(tl.max(tl.maximum(magnitude(low), magnitude(high)), 1), 0)


@triton.jit
def _keep(
    low, high, codes, scale, halves, head, block, blocks, D: tl.constexpr, SPEC: tl.constexpr, ROTATE: tl.constexpr
):
    """Codes and a scale of queries or keys."""
    if ROTATE:
        low, high = _turned(low, high, halves, D)
    _, by = _scale(low, high, SPEC)
    rows = head.to(tl.int64) * blocks * BLOCK + block * BLOCK + tl.arange(0, BLOCK)
    place = codes + rows[:, None] * D + tl.arange(0, D // 2)[None, :]
    tl.store(place, _code(low, by, SPEC).to(codes.dtype.element_ty, bitcast=True))
    tl.store(place + D // 2, _code(high, by, SPEC).to(codes.dtype.element_ty, bitcast=True))
    # Products of zeros are zeros by any scale, and the smaller it is, the more exactly: see `_CENTRE` of the products.
    tl.store(scale + head * blocks + block, tl.where(_largest(low, high) == 0, _OF_ZEROS, by))


@triton.jit
def _code(x, by, SPEC: tl.constexpr):
    """The bytes of the nearest codes, the largest for what is beyond."""
    x = tl.div_rn(x, tl.zeros_like(x) + by)
    if SPEC.element.kind == "int":
        code = tl.minimum(tl.maximum(round_to_even(x), SPEC.element.min), SPEC.element.max).to(tl.int8)
    elif SPEC.convert != "":
        # Rather NaN than the largest.
        code = tl.where(x == x, tl.minimum(tl.maximum(x, SPEC.element.min), SPEC.element.max), x).to(tl.float8e4nv)
    else:
        code = encode_float(x, 0.0, SPEC.element, False).to(tl.uint8)
    return code.to(tl.uint8, bitcast=True)


@triton.jit
def _keep_values(low, high, codes, power, head, block, blocks, D: tl.constexpr, SPEC: tl.constexpr):
    """Codes of values, tokens last, and the power of two that is their scale."""
    stored, by = _scale(low, high, SPEC)
    place = codes.to(tl.pointer_type(tl.uint8)) + head.to(tl.int64) * D * blocks * BLOCK + block * BLOCK
    _store_values(_code(low, by, SPEC), place, blocks, D)
    _store_values(_code(high, by, SPEC), place + D // 2 * blocks * BLOCK, blocks, D)
    tl.store(power + head * blocks + block, tl.where(by == by, stored.to(tl.float32) - 127.0, by))


@triton.jit
def _store_values(code, place, blocks, D: tl.constexpr):
    turned = tl.reshape(tl.trans(code), (D // 2, BLOCK // 16, 2, 4, 2))
    turned = tl.reshape(tl.permute(turned, (0, 1, 3, 2, 4)), (D // 2, BLOCK))
    rows = tl.arange(0, D // 2).to(tl.int64)[:, None] * blocks * BLOCK
    tl.store(place + rows + tl.arange(0, BLOCK)[None, :], turned)
