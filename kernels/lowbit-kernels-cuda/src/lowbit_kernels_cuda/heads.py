"""Rounding for attention: queries, keys and values to codes, as attention's kernels read them.

A program rounds 128 tokens of a head, whose channels it holds in two halves: rotary embeddings turn a channel of one
with the same of the other, and a Hadamard matrix is `[[H, H], [H, -H]]` of one half its size.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.attention import MODE, SAMPLE, SCHEMES, TOKENS, Scheme
from lowbit.hadamard import hadamard
from lowbit_kernels_cuda.codes import encode_float, from_float32, to_float32
from lowbit_kernels_cuda.scaling import code_of, divisor_of, nearest_code, quotient, raw, scale_of_amax, spec

BLOCK = tl.constexpr(TOKENS)
_OF_ZEROS = tl.constexpr(2.0**-40)
# Halves turned by an angle, in PTX: two numbers of each at a time.
_TURN = (
    "{{ .reg .b32 zero, one, other, a, b, c, d; mov.b32 zero, 0x80008000; mov.b32 one, {0}; mov.b32 other, {1}; "
    "fma.rn.{2} a, $2, $4, zero; fma.rn.{2} b, $3, $5, zero; fma.rn.{2} c, $3, $4, zero; fma.rn.{2} d, $2, $5, zero; "
    "fma.rn.{2} $0, b, other, a; fma.rn.{2} $1, d, one, c; }}"
)
_TURN_BFLOAT16 = tl.constexpr(_TURN.format("0x3F803F80", "0xBF80BF80", "bf16x2"))
_TURN_FLOAT16 = tl.constexpr(_TURN.format("0x3C003C00", "0xBC00BC00", "f16x2"))
# What a launch of `_round` gives: codes with scales of blocks; the largest magnitudes of heads, or codes by these; or
# turned queries and keys.
_BLOCKS, _LARGEST, _HEADS, _TURNED = (tl.constexpr(i) for i in range(4))
_AS_THEY_ARE = Scheme(SCHEMES["INT8_FP8"].qk, SCHEMES["INT8_FP8"].v, smooth=False)


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


def rounded(
    q: Tensor, k: Tensor, v: Tensor, scheme: Scheme, cos: Tensor | None = None, sin: Tensor | None = None
) -> Rounded:
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
    launch = _launch(q, k, v, scheme, cos, sin)
    launch(_BLOCKS, made.q, made.k, made.v, made.q_scale, made.k_scale, made.v_power)
    return made


def rounded_whole(
    q: Tensor, k: Tensor, v: Tensor, scheme: Scheme, cos: Tensor | None = None, sin: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Codes (B, tokens, heads, D) of queries, keys and values by one scale (B, G) each of a head of keys."""
    batch, groups = k.shape[:2]
    largest = torch.zeros(3, batch * groups, device=q.device)
    scales = torch.empty_like(largest)
    codes = [
        torch.empty(batch, x.shape[2], x.shape[1], x.shape[3], dtype=scheme.qk.element.storage, device=q.device)
        for x in (q, k, v)
    ]
    launch = _launch(q, k, v, scheme, cos, sin)
    launch(_LARGEST, largest=largest)
    launch(_HEADS, *codes, *scales, largest=largest)
    return [(each, scale.view(batch, groups)) for each, scale in zip(codes, scales, strict=True)]


def roped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with rotary embeddings, both in one launch: as `lowbit.attending.roped`."""
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
    # Values are no part of it.
    _launch(q, k, k[:, :, :0], _AS_THEY_ARE, cos, sin)(_TURNED, *map(raw, made))
    return made[0], made[1]


def _launch(
    q: Tensor, k: Tensor, v: Tensor, scheme: Scheme, cos: Tensor | None, sin: Tensor | None
) -> Callable[..., None]:
    """`_round` of these, which takes what it writes, and what it does."""
    (batch, heads, queries, d), (_, groups, keys, _), device = q.shape, k.shape, q.device
    q_blocks, k_blocks, v_blocks = (triton.cdiv(x.shape[2], TOKENS) for x in (q, k, v))
    tables = (None, None, 0, 0) if cos is None or sin is None else _tables(cos, sin, k.dtype)
    compiled_for = spec(scheme.qk, MODE, device if device.type == "cuda" else None)
    matrix = _halves(d, q.dtype if compiled_for.fused else torch.float32, device) if scheme.rotate_qk else None
    # Channels lie side by side.
    q, k, v = (raw(x if x.stride(3) == 1 else x.contiguous()) for x in (q, k, v))
    constants: dict[str, Any] = {"D": d, "QK": compiled_for, "ROTATE": scheme.rotate_qk, "enable_fp_fusion": False}
    mean = None
    if scheme.smooth:
        mean = torch.empty(batch * groups, d, device=device)
        taken: Any = _mean
        taken[(batch * groups,)](
            *(k, mean, matrix, *tables, *k.stride()[:3], groups, keys), COUNT=SAMPLE, num_warps=4, **constants
        )

    def launch(do: Any, *to: Tensor, largest: Tensor | None = None) -> None:
        kernel: Any = _round
        kernel[(batch * (heads * q_blocks + groups * (k_blocks + v_blocks)),)](
            *(
                q,
                k,
                v,
                *to,
                *(None,) * (6 - len(to)),
                largest,
                mean,
                matrix,
                *tables,
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
            ),
            *(batch * heads, heads, groups, queries, keys, q_blocks, k_blocks),
            V=spec(scheme.v, MODE, device if device.type == "cuda" else None),
            DO=do,
            num_warps=4 if scheme.rotate_qk else 8,
            **constants,
        )

    return launch


def _tables(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int]:
    """Tables (.., T, D / 2) in the dtype of queries and keys, and the steps to the next sequence and token."""
    cos, sin = (raw(table.to(dtype).contiguous()) for table in (cos, sin))
    return cos, sin, cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0, cos.stride(-2)


@cache
def _halves(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A Hadamard matrix of half the channels: 1 and -1, so that a 16-bit product has no error."""
    return hadamard(d // 2).to(device, dtype)


@triton.jit
def _mean(
    k,
    mean,
    halves,
    cos,
    sin,
    table,
    table_token,
    batch,
    head,
    token,
    groups,
    keys,
    D: tl.constexpr,
    QK: tl.constexpr,
    ROTATE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """See `lowbit.attending.mean_of_keys`; rotated, but for a factor, as keys are."""
    at = tl.program_id(0)
    of = (at // groups).to(tl.int64)
    i = tl.arange(0, COUNT)
    count = tl.minimum(keys, COUNT)
    rows = tl.where(keys > COUNT, (i.to(tl.int64) * keys) // COUNT, i)
    start = k + of * batch + (at % groups).to(tl.int64) * head
    low, high = _read(start, token, rows, i < count, cos, sin, of * table, table_token, rows, D, QK)
    half = tl.arange(0, D // 2)
    low, high = tl.sum(to_float32(low), 0) / count, tl.sum(to_float32(high), 0) / count
    if ROTATE:
        matrix = tl.load(halves + half[:, None] * (D // 2) + half[None, :]).to(tl.float32)
        a, b = tl.sum(low[:, None] * matrix, 0), tl.sum(high[:, None] * matrix, 0)
        low, high = a + b, a - b
    tl.store(mean + at * D + half, low)
    tl.store(mean + at * D + D // 2 + half, high)


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
    v_scale,
    largest,
    mean,
    halves,
    cos,
    sin,
    table,
    table_token,
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
    DO: tl.constexpr,
):
    """A program a block of 128 tokens of a head: those of queries, then of keys, then of values."""
    at = tl.program_id(0)
    all_groups = all_heads // heads * groups
    if at < all_heads * q_blocks:
        head, block = at // q_blocks, at % q_blocks
        of, row = (head // heads).to(tl.int64), block * BLOCK + tl.arange(0, BLOCK)
        start, first = q + of * q_batch + (head % heads).to(tl.int64) * q_head, keys - queries
        low, high = _read(start, q_token, row, row < queries, cos, sin, of * table, table_token, row + first, D, QK)
        place = _place(q_codes, head, heads, row, queries, q_blocks, D, DO)
        of_group = head // (heads // groups)
        at_scale = head * q_blocks + block if DO == _BLOCKS else of_group
        _keep(low, high, row < queries, place, q_scale, at_scale, largest, of_group, None, halves, D, QK, ROTATE, DO)
    else:
        at -= all_heads * q_blocks
        keys_too = at < all_groups * k_blocks
        at = tl.where(keys_too, at, at - all_groups * k_blocks)
        head, block = at // k_blocks, at % k_blocks
        of, row = (head // groups).to(tl.int64), block * BLOCK + tl.arange(0, BLOCK)
        at_scale = at if DO == _BLOCKS else head
        if keys_too:
            start = k + of * k_batch + (head % groups).to(tl.int64) * k_head
            low, high = _read(start, k_token, row, row < keys, cos, sin, of * table, table_token, row, D, QK)
            if mean is not None:
                mean += head * D
            place = _place(k_codes, head, groups, row, keys, k_blocks, D, DO)
            at_largest = all_groups + head
            _keep(low, high, row < keys, place, k_scale, at_scale, largest, at_largest, mean, halves, D, QK, ROTATE, DO)
        else:
            start = v + of * v_batch + (head % groups).to(tl.int64) * v_head
            if DO == _BLOCKS:
                _keep_values(start, v_token, v_codes, v_scale, head, block, keys, k_blocks, D, V)
            elif DO != _TURNED:
                low, high = _read(start, v_token, row, row < keys, None, None, 0, 0, row, D, V)
                to = _place(v_codes, head, groups, row, keys, k_blocks, D, DO)
                at_largest = 2 * all_groups + head
                _keep(low, high, row < keys, to, v_scale, at_scale, largest, at_largest, None, None, D, V, False, DO)


@triton.jit
def _read(start, token, rows, there, cos, sin, table, table_token, angles, D: tl.constexpr, SPEC: tl.constexpr):
    """Both halves of the channels of tokens, zeros where they are not there, turned where there are tables."""
    half = tl.arange(0, D // 2)[None, :]
    place, there = start + rows.to(tl.int64)[:, None] * token + half, there[:, None]
    low, high = tl.load(place, there, 0), tl.load(place + D // 2, there, 0)
    if cos is not None:
        place = table + angles.to(tl.int64)[:, None] * table_token + half
        low, high = _turn(low, high, tl.load(cos + place, there, 0), tl.load(sin + place, there, 0), SPEC)
    return low, high


@triton.jit
def _turn(low, high, cos, sin, SPEC: tl.constexpr):
    """`low cos - high sin` and `high cos + low sin`, of which each product and sum is rounded."""
    if SPEC.fused:
        # A product is rounded by itself where it is added to -0. A hardware without products alone has these.
        TEXT: tl.constexpr = _TURN_BFLOAT16 if low.dtype == tl.int16 else _TURN_FLOAT16
        low, high = tl.inline_asm_elementwise(
            TEXT, "=r,=r,r,r,r,r", [low, high, cos, sin], dtype=(low.dtype, low.dtype), is_pure=True, pack=2
        )
    else:
        a, b = _times(low, cos, SPEC) - _times(high, sin, SPEC), _times(high, cos, SPEC) + _times(low, sin, SPEC)
        low, high = from_float32(a, low.dtype, SPEC), from_float32(b, low.dtype, SPEC)
    return low, high


@triton.jit
def _times(a, b, SPEC: tl.constexpr):
    """Float32 of a product, rounded to the dtype of its factors."""
    return to_float32(from_float32(to_float32(a) * to_float32(b), a.dtype, SPEC))


@triton.jit
def _place(codes, head, heads, row, tokens, blocks, D: tl.constexpr, DO: tl.constexpr):
    """Where codes of a head's tokens go, in a column; of what is not written anywhere."""
    if DO == _LARGEST:
        place = row
    elif DO == _HEADS:
        place = codes + (((head // heads).to(tl.int64) * tokens + row) * heads + head % heads) * D
    else:
        place = codes + (head.to(tl.int64) * (blocks * BLOCK if DO == _BLOCKS else tokens) + row) * D
    return place[:, None]


@triton.jit
def _keep(
    low,
    high,
    there,
    place,
    scale,
    at_scale,
    largest,
    at_largest,
    mean,
    halves,
    D: tl.constexpr,
    SPEC: tl.constexpr,
    ROTATE: tl.constexpr,
    DO: tl.constexpr,
):
    """Write the codes of queries or keys, or of values as these, and their scale; or the largest magnitude."""
    half = tl.arange(0, D // 2)
    if DO == _TURNED:
        tl.store(place + half[None, :], low, there[:, None])
        tl.store(place + D // 2 + half[None, :], high, there[:, None])
    else:
        if ROTATE:
            matrix = tl.load(halves + half[:, None] * (D // 2) + half[None, :])
            a, b = _product(low, matrix, SPEC), _product(high, matrix, SPEC)
            low, high = a + b, a - b
        else:
            low, high = to_float32(low), to_float32(high)
        if mean is not None:
            low, high = _less(low, mean + half, there), _less(high, mean + D // 2 + half, there)
        if DO != _HEADS:
            most = _largest(_larger(tl.abs(low), tl.abs(high)))
        if DO == _LARGEST:
            # Integers order as floats that are not negative do, and NaN above them.
            tl.atomic_max(largest.to(tl.pointer_type(tl.int32)) + at_largest, most.to(tl.int32, bitcast=True))
        else:
            if DO == _HEADS:
                most = tl.load(largest + at_largest)
            _, by = scale_of_amax(most, 1.0, SPEC, "")
            place += half[None, :]
            _store(low, high, by, place, there, D, SPEC, DO)
            # Rotated numbers are larger by this.
            by *= D**-0.5 if ROTATE else 1.0
            if DO == _BLOCKS:
                # Products of zeros are zeros by any scale, and the smaller it is, the more exactly: see `_CENTRE` of
                # the products.
                by = tl.where(most == 0, _OF_ZEROS, by)
            tl.store(scale + at_scale, by)


@triton.jit
def _product(x, matrix, SPEC: tl.constexpr):
    if x.dtype == tl.int16:
        # The interpreter's are float32.
        x = x.to(tl.bfloat16, bitcast=True) if SPEC.fused else to_float32(x)
    return tl.dot(x.to(matrix.dtype), matrix, input_precision="ieee")


@triton.jit
def _less(x, mean, there):
    """Keys, less their mean where there is one."""
    mean = tl.broadcast_to(-tl.load(mean)[None, :], x.shape)
    return tl.fma(tl.broadcast_to(there.to(tl.float32)[:, None], x.shape), mean, x)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x):
    """The largest of numbers that are not negative, NaN where one is: integers order as they do."""
    return tl.max(tl.max(x.to(tl.int32, bitcast=True), 1), 0).to(tl.float32, bitcast=True)


@triton.jit
def _store(low, high, by, place, there, D: tl.constexpr, SPEC: tl.constexpr, DO: tl.constexpr):
    """Write codes of both halves: of blocks all, zeros where no token is."""
    there = there[:, None] | (DO == _BLOCKS)
    if SPEC.fused and (by > 2.0**-100) & (by < 2.0**100):
        # Nothing on the way is subnormal; the signs are such that zeros keep theirs.
        inverse = tl.div_rn(-1.0, by)
        _put(place, code_of(quotient(-low, -by, inverse, 1), SPEC), there)
        _put(place + D // 2, code_of(quotient(-high, -by, inverse, 1), SPEC), there)
    else:
        _put(place, nearest_code(low, by, SPEC), there)
        _put(place + D // 2, nearest_code(high, by, SPEC), there)


@triton.jit
def _put(place, code, there):
    tl.store(place, code.to(place.dtype.element_ty, bitcast=True), there)


@triton.jit
def _keep_values(start, token, codes, power, head, block, tokens, blocks, D: tl.constexpr, SPEC: tl.constexpr):
    """Write the codes of a block of values, tokens last, and the power of two that is their scale."""
    # A word has four tokens of a channel: so many that turning it costs less.
    i, channels = tl.arange(0, BLOCK // 4), tl.arange(0, D)
    row = block * BLOCK + i // 4 * 16 + i % 4 * 2
    a = _tokens(start, token, row, tokens, channels)
    b = _tokens(start, token, row + 1, tokens, channels)
    c = _tokens(start, token, row + 8, tokens, channels)
    d = _tokens(start, token, row + 9, tokens, channels)
    most = _larger(_larger(tl.abs(a), tl.abs(b)), _larger(tl.abs(c), tl.abs(d)))
    stored, by = scale_of_amax(_largest(most), 1.0, SPEC, "")
    by = divisor_of(by, SPEC, 0)[0]
    if SPEC.convert != "":
        words = tl.inline_asm_elementwise(
            SPEC.convert, "=r,f,f,f,f", [a * by, b * by, c * by, d * by], tl.int32, True, 1
        )
    else:
        words = _byte(a * by, 0, SPEC) | _byte(b * by, 8, SPEC) | _byte(c * by, 16, SPEC) | _byte(d * by, 24, SPEC)
    place = (head.to(tl.int64) * D + channels)[:, None] * (blocks * (BLOCK // 4)) + block * (BLOCK // 4) + i[None, :]
    tl.store(codes.to(tl.pointer_type(tl.int32)) + place, tl.trans(words))
    exponent = stored.to(tl.float32) - 127.0
    tl.store(power + head * blocks + block, tl.where(stored == 255, float("nan"), exponent))


@triton.jit
def _tokens(start, token, row, tokens, channels):
    place = start + row.to(tl.int64)[:, None] * token + channels[None, :]
    return to_float32(tl.load(place, (row < tokens)[:, None], 0))


@triton.jit
def _byte(x, SHIFT: tl.constexpr, SPEC: tl.constexpr):
    return encode_float(x, 0.0, SPEC.element, False) << SHIFT
