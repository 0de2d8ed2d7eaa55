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

from lowbit.attention import SAMPLE, TOKENS, Scheme
from lowbit.format import FORMATS, WHOLE
from lowbit.hadamard import hadamard
from lowbit_kernels_cuda.codes import encode_float
from lowbit_kernels_cuda.scaling import spec

BLOCK = tl.constexpr(TOKENS)
# Rounds float32 up to 2^22 to integers, halves to even.
_INTEGER = tl.constexpr(12582912.0)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes and scales of heads, whose tokens are zeros up to a multiple of 128.

    `q` (B * H, S', D) and `k` (B * G, T', D) are as `lowbit.quantize` gives them, `v` (B * G, D, T') has tokens last:
    the token 16 a + 8 b + 2 t + c is in the place 16 a + 4 t + 2 b + c. Scales are of blocks of 128 tokens; those of
    values are the powers of two that they are.
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
    mean = None
    if scheme.smooth:
        mean = torch.empty(batch * groups, d, device=device)
        taken: Any = _mean
        taken[(batch * groups,)](
            *(k, mean, *k.stride()[:3], groups, keys), D=d, COUNT=SAMPLE, PART=min(SAMPLE, 64), num_warps=4
        )
    whole = [x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)]
    integer = scheme.qk.element.kind == "int"
    kernel: Any = _round
    kernel[(batch * (heads * q_blocks + 2 * groups * k_blocks),)](
        *(*whole, made.q, made.k, made.v, made.q_scale, made.k_scale, made.v_power, mean),
        _halves(d, device) if scheme.rotate_qk else None,
        *(*whole[0].stride()[:3], *whole[1].stride()[:3], *whole[2].stride()[:3]),
        *(batch * heads, heads, groups, queries, keys, q_blocks, k_blocks),
        D=d,
        INTEGER=integer,
        ROTATE=scheme.rotate_qk,
        SPEC=spec(FORMATS["FP8_ROW"], device=device),
        num_warps=8,
    )
    return made


def takes(scheme: Scheme) -> str | None:
    """Why this rounding is not that of a scheme; None if it is."""
    if scheme.v is None:
        return "needs values in e4m3; this scheme keeps them"
    if scheme.rotate_v:
        return "needs values that are not rotated; use a scheme without rotate_v"
    if WHOLE in (scheme.qk.block[0], scheme.v.block[0]) or not scheme.v.scale.powers_of_two:
        return f"needs scales of 128 tokens, those of values powers of two (e8m0); this is {scheme}"
    return None


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
    INTEGER: tl.constexpr,
    ROTATE: tl.constexpr,
    SPEC: tl.constexpr,
):
    """A program a block of 128 tokens of a head: those of queries, then of keys, then of values."""
    at = tl.program_id(0)
    all_groups = all_heads // heads * groups
    if at < all_heads * q_blocks:
        head, block = at // q_blocks, at % q_blocks
        start = q + (head // heads).to(tl.int64) * q_batch + (head % heads).to(tl.int64) * q_head
        low, high = _read(start, q_token, block, queries, D)
        _keep(low, high, q_codes, q_scale, halves, head, block, q_blocks, D, INTEGER, ROTATE, SPEC)
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
            _keep(low, high, k_codes, k_scale, halves, head, block, k_blocks, D, INTEGER, ROTATE, SPEC)
        else:
            start = v + (head // groups).to(tl.int64) * v_batch + (head % groups).to(tl.int64) * v_head
            low, high = _read(start, v_token, block, keys, D)
            _keep_values(low, high, v_codes, v_power, head, block, k_blocks, D, SPEC)


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
def _most(low, high):
    return tl.maximum(tl.max(tl.max(tl.abs(low), 1), 0), tl.max(tl.max(tl.abs(high), 1), 0))


@triton.jit
def _keep(
    low,
    high,
    codes,
    scale,
    halves,
    head,
    block,
    blocks,
    D: tl.constexpr,
    INTEGER: tl.constexpr,
    ROTATE: tl.constexpr,
    SPEC: tl.constexpr,
):
    """Codes and a scale of queries or keys."""
    if ROTATE:
        low, high = _turned(low, high, halves, D)
    amax = _most(low, high)
    s = tl.div_rn(amax, 127.5 if INTEGER else 448.0)
    s = tl.where(s > 0, s, 1.0)
    rows = head.to(tl.int64) * blocks * BLOCK + block * BLOCK + tl.arange(0, BLOCK)
    place = codes + rows[:, None] * D + tl.arange(0, D // 2)[None, :]
    tl.store(place, _code(low, s, INTEGER, SPEC))
    tl.store(place + D // 2, _code(high, s, INTEGER, SPEC))
    tl.store(scale + head * blocks + block, s)


@triton.jit
def _code(x, s, INTEGER: tl.constexpr, SPEC: tl.constexpr):
    x = tl.div_rn(x, tl.zeros_like(x) + s)
    if INTEGER:
        code = tl.minimum(tl.maximum(x + _INTEGER - _INTEGER, -128.0), 127.0).to(tl.int8)
    else:
        code = _e4m3(x, SPEC).to(tl.float8e4nv, bitcast=True)
    return code


@triton.jit
def _e4m3(x, SPEC: tl.constexpr):
    """The byte of the nearest e4m3, the largest for what is beyond."""
    if SPEC.convert != "":
        code = tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = encode_float(x, 0.0, SPEC.element, False).to(tl.uint8)
    return code


@triton.jit
def _keep_values(low, high, codes, power, head, block, blocks, D: tl.constexpr, SPEC: tl.constexpr):
    """Codes of values, tokens last, and the power of two that is their scale."""
    amax = _most(low, high)
    # The least e with amax <= 448 * 2^e, and 448 = 1.75 * 2^8.
    bits = amax.to(tl.int32, bitcast=True)
    e = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    e = tl.minimum(tl.maximum(e, -126), 120)
    inverse = ((127 - e) << 23).to(tl.float32, bitcast=True)
    place = codes + head.to(tl.int64) * D * blocks * BLOCK + block * BLOCK
    _store_values(low, inverse, place, blocks, D, SPEC)
    _store_values(high, inverse, place + D // 2 * blocks * BLOCK, blocks, D, SPEC)
    tl.store(power + head * blocks + block, e.to(tl.float32))


@triton.jit
def _store_values(x, inverse, place, blocks, D: tl.constexpr, SPEC: tl.constexpr):
    turned = tl.reshape(tl.trans(_e4m3(x * inverse, SPEC)), (D // 2, BLOCK // 16, 2, 4, 2))
    turned = tl.reshape(tl.permute(turned, (0, 1, 3, 2, 4)), (D // 2, BLOCK))
    rows = tl.arange(0, D // 2).to(tl.int64)[:, None] * blocks * BLOCK
    tl.store(place.to(tl.pointer_type(tl.uint8)) + rows + tl.arange(0, BLOCK)[None, :], turned)
