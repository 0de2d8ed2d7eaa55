"""The operator `cache_write`: keys, values and queries of a token are rotated, rounded and written in one launch."""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.format import Format
from lowbit_kernels_cuda.codes import encode_float, from_float32, to_float32
from lowbit_kernels_cuda.scaling import magnitude, raw, round_to_even, scale_of_amax, spec

# Heads of a program.
_ROWS = 8


def cache_write(
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    positions: Tensor,
    table: Tensor | None,
    k_format: str,
    v_format: str,
) -> Tensor:
    """The operator `cache_write`."""
    batch, groups, tokens, d = k.shape
    out = k.new_empty(0) if q is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    heads = 0 if q is None else q.shape[1]
    if not batch * tokens * d:
        return out
    # Channels lie side by side.
    k, v, q, cos, sin = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (k, v, q, cos, sin))
    table = table if table is None else table.contiguous()
    angles = [(0, 0) if x is None else (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)) for x in (cos, sin)]
    blocks = triton.cdiv(groups, _ROWS)
    run: Any = _write[batch * tokens, 2 * blocks + triton.cdiv(heads, _ROWS)]
    run(
        *(None if x is None else raw(x) for x in (k, v, q, cos, sin)),
        *(k_codes, k_scale, v_codes, v_scale, raw(out), positions, table),
        *(*k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if q is None else q.stride()[:3]), *angles[0], *angles[1]),
        *(*k_codes.stride()[:3], *k_scale.stride(), *v_codes.stride()[:3], *v_scale.stride()),
        *(positions.stride(0), positions.stride(1) if positions.dim() > 1 else 0),
        *(0 if table is None else table.stride(0), 0 if table is None else table.shape[1]),
        *(tokens, groups, heads, *k_codes.shape[:2]),
        D=d,
        HALF=triton.next_power_of_2(d // 2),
        K_SPEC=spec(Format.parse(k_format), device=k.device if k.is_cuda else None),
        V_SPEC=spec(Format.parse(v_format), device=k.device if k.is_cuda else None),
        ROWS=_ROWS,
        EACH=positions.dim() > 1,
        # Where the angles of the second half of the channels are.
        SECOND=d // 2 if cos is not None and cos.shape[2] == d else 0,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _write(
    k,
    v,
    q,
    cos,
    sin,
    k_codes,
    k_scale,
    v_codes,
    v_scale,
    out,
    positions,
    table,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    q_batch,
    q_head,
    q_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    kc_row,
    kc_token,
    kc_head,
    ks_row,
    ks_token,
    ks_head,
    vc_row,
    vc_token,
    vc_head,
    vs_row,
    vs_token,
    vs_head,
    position_batch,
    position_token,
    table_row,
    table_size,
    tokens,
    groups,
    heads,
    rows,
    room,
    D: tl.constexpr,
    HALF: tl.constexpr,
    K_SPEC: tl.constexpr,
    V_SPEC: tl.constexpr,
    ROWS: tl.constexpr,
    EACH: tl.constexpr,
    SECOND: tl.constexpr,
):
    """A program some heads of keys, of values or of queries of a token."""
    text, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    blocks = tl.cdiv(groups, ROWS)
    block = tl.program_id(1)
    channel = tl.arange(0, HALF)[None, :]
    cos_at, sin_at = text * cos_batch + token * cos_token, text * sin_batch + token * sin_token
    if block < 2 * blocks:
        position = tl.load(positions + text * position_batch + token * position_token).to(tl.int64)
        if not EACH:
            position += token
        if table is None:
            row, place, there = text, position, (position >= 0) & (position < room)
        else:
            page = tl.maximum(room, 1)
            index = position // page
            there = (position >= 0) & (index < table_size) & (room > 0)
            row, place = tl.load(table + text * table_row + index, there, -1).to(tl.int64), position % page
            there = there & (row >= 0) & (row < rows)
        head = (block % blocks) * ROWS + tl.arange(0, ROWS)
        if block < blocks:
            start = k + text * k_batch + token * k_token
            low, high = _read(start, head, groups, k_head, channel, D)
            if cos is not None:
                low, high = _turned(low, high, cos + cos_at, sin + sin_at, channel, k, K_SPEC, D, SECOND)
            to, scale_to = k_codes + row * kc_row + place * kc_token, k_scale + row * ks_row + place * ks_token
            _keep(low, high, to, scale_to, head, kc_head, ks_head, channel, there, groups, D, K_SPEC)
        else:
            start = v + text * v_batch + token * v_token
            low, high = _read(start, head, groups, v_head, channel, D)
            to, scale_to = v_codes + row * vc_row + place * vc_token, v_scale + row * vs_row + place * vs_token
            _keep(low, high, to, scale_to, head, vc_head, vs_head, channel, there, groups, D, V_SPEC)
    elif q is not None:
        head = (block - 2 * blocks) * ROWS + tl.arange(0, ROWS)
        low, high = _read(q + text * q_batch + token * q_token, head, heads, q_head, channel, D)
        low, high = _turned(low, high, cos + cos_at, sin + sin_at, channel, q, K_SPEC, D, SECOND)
        turned_to = out + ((text * heads + head.to(tl.int64)[:, None]) * tokens + token) * D + channel
        inside = (head < heads)[:, None] & (channel < D // 2)
        tl.store(turned_to, from_float32(low, out.dtype.element_ty, K_SPEC), inside)
        tl.store(turned_to + D // 2, from_float32(high, out.dtype.element_ty, K_SPEC), inside)


@triton.jit
def _read(start, head, heads, step, channel, D: tl.constexpr):
    """Both halves of the channels of some heads, in float32."""
    at = start + head.to(tl.int64)[:, None] * step + channel
    inside = (head < heads)[:, None] & (channel < D // 2)
    return to_float32(tl.load(at, inside, 0)), to_float32(tl.load(at + D // 2, inside, 0))


@triton.jit
def _turned(low, high, cos, sin, channel, like, SPEC: tl.constexpr, D: tl.constexpr, SECOND: tl.constexpr):
    """Halves of channels turned by angles; every product and sum is rounded to the type of `like`."""
    inside = channel < D // 2
    cos_low, sin_low = to_float32(tl.load(cos + channel, inside, 0)), to_float32(tl.load(sin + channel, inside, 0))
    if SECOND == 0:
        cos_high, sin_high = cos_low, sin_low
    else:
        cos_high = to_float32(tl.load(cos + SECOND + channel, inside, 0))
        sin_high = to_float32(tl.load(sin + SECOND + channel, inside, 0))
    # No sum of a product by `-high`: a Triton takes that for `0 - high`, which has another sign where both are 0.
    first = _rounded(_rounded(low * cos_low, like, SPEC) - _rounded(high * sin_low, like, SPEC), like, SPEC)
    second = _rounded(_rounded(high * cos_high, like, SPEC) + _rounded(low * sin_high, like, SPEC), like, SPEC)
    return first, second


@triton.jit
def _rounded(x, like, SPEC: tl.constexpr):
    return to_float32(from_float32(x, like.dtype.element_ty, SPEC))


@triton.jit
def _keep(low, high, to, scale_to, head, step, scale_step, channel, there, heads, D: tl.constexpr, SPEC: tl.constexpr):
    """Write codes and a scale for each head."""
    largest = tl.max(tl.maximum(magnitude(low), magnitude(high)), 1)
    stored, by = scale_of_amax(largest.to(tl.float32, bitcast=True), 1.0, SPEC, "")
    # Of no head where there is no place.
    inside = head < tl.where(there, heads, 0)
    tl.store(scale_to + head.to(tl.int64) * scale_step, stored, inside)
    to = to + head.to(tl.int64)[:, None] * step + channel
    inside = inside[:, None] & (channel < D // 2)
    tl.store(to, _code(low, by[:, None], SPEC), inside)
    tl.store(to + D // 2, _code(high, by[:, None], SPEC), inside)


@triton.jit
def _code(x, by, SPEC: tl.constexpr):
    """The bytes of the nearest codes, the largest for what is beyond; of NaN 0, or NaN where there is one."""
    x = tl.div_rn(x, tl.zeros_like(x) + by)
    if SPEC.element.kind == "int":
        whole = tl.minimum(tl.maximum(round_to_even(x), SPEC.element.min), SPEC.element.max)
        code = tl.where(x == x, whole, 0.0).to(tl.int32)
    elif SPEC.convert != "":
        near = tl.where(x == x, tl.minimum(tl.maximum(x, SPEC.element.min), SPEC.element.max), x)
        code = near.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = encode_float(x, 0.0, SPEC.element, False)
    return code.to(tl.uint8)
