"""The operator `cached_attention`: codes of a key-value cache are read once, from where they are.

Programs share a text's tokens: each attends to some of them, for all queries that one head of keys serves, and a second
kernel combines what they found. Every code is a float16, and so are queries in units of a power of two; weights times
scales of values are rounded to float16 in the unit of the largest scale of a block of tokens. Scores, sums and results
are in float32. A scale of keys multiplies scores, so nothing but its conversion is done to a code.
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

from lowbit.format import Format
from lowbit_kernels_cuda.codes import decode
from lowbit_kernels_cuda.inputs import multiprocessors, overlaps
from lowbit_kernels_cuda.scaling import spec

_LOG2_E = math.log2(math.e)
# The most programs that share a text.
_MOST = 128
# So many results are combined at once.
_PART = 64
# Four codes of int8 to float16: each as the last byte of 1024 + 128 + code, from which 1152 is subtracted.
_INT8 = tl.constexpr(
    "{ .reg .b32 a, c; xor.b32 a, $2, 0x80808080; mov.b32 c, 0x64806480; prmt.b32 $0, a, 0x64646464, 0x4140; "
    "prmt.b32 $1, a, 0x64646464, 0x4342; sub.rn.f16x2 $0, $0, c; sub.rn.f16x2 $1, $1, c; }"
)
# The same of one code each of two pairs, the first or the second.
_INT8_FIRST = tl.constexpr(
    "{ .reg .b32 a, c; and.b32 a, $1, 0x00FF00FF; mov.b32 c, 0x64806480; xor.b32 a, a, c; sub.rn.f16x2 $0, a, c; }"
)
_INT8_SECOND = tl.constexpr(
    "{ .reg .b32 a, c; shr.u32 a, $1, 8; and.b32 a, a, 0x00FF00FF; mov.b32 c, 0x64806480; xor.b32 a, a, c; "
    "sub.rn.f16x2 $0, a, c; }"
)
_E4M3_FIRST, _E4M3_SECOND = (
    tl.constexpr(
        f"{{ .reg .b32 a; .reg .b16 low, high; prmt.b32 a, $1, $1, {which}; mov.b32 {{low, high}}, a; "
        "cvt.rn.f16x2.e4m3x2 $0, low; }"
    )
    for which in ("0x2020", "0x3131")
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How tokens are shared: so many in a step of a program, by so many warps, read so many steps before.

    Few warps wait less for one another, and many rows do not fit their registers.
    """

    tokens: int
    warps: int
    stages: int
    # Programs for each processor of the GPU: as many as registers have room for, however many a thread takes.
    programs: int


# By rows, for heads of 128 channels; what has twice as many takes the next.
_PLANS = {16: Plan(64, 2, 3, 4), 32: Plan(64, 4, 3, 2), 64: Plan(64, 8, 3, 1)}


def cached_attention(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    window: int,
    softmax_scale: float,
    k_format: str,
    v_format: str,
    plan: Plan | None = None,
) -> Tensor:
    """The operator `cached_attention`."""
    (batch, heads, queries, d), groups = q.shape, k_codes.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    room, page, table_row = k_codes.shape[1], 0, 0
    if table is not None:
        table = table.contiguous()
        room, page, table_row = table.shape[1] * k_codes.shape[1], k_codes.shape[1], table.stride(0)
    if not k_codes.numel():
        room = 0
    # Two codes of values are a word.
    if any(step % 2 for step in (v_codes.storage_offset(), *v_codes.stride()[:3])):
        v_codes = v_codes.clone(memory_format=torch.contiguous_format)
    pairs = v_codes.view(torch.int16)
    all_rows = heads // groups * queries
    # Few rows are filled up to the 16 of a product.
    rows = min(max(triton.next_power_of_2(all_rows), 16), 64)
    blocks = triton.cdiv(all_rows, rows)
    plan = _PLANS[min(rows * triton.cdiv(d, 128), 64)] if plan is None else plan
    splits = _splits(batch * groups * blocks, room, plan, q.device)
    soon, parts, stats = splits > 1 and overlaps(q.device), None, None
    if splits > 1:
        parts = torch.empty(batch, heads, queries, splits, d, device=q.device)
        stats = torch.empty(2, batch, heads, queries, splits, device=q.device)
    device = q.device if q.is_cuda else None
    run: Any = _attend[groups * blocks, splits, batch]
    run(
        *(q, k_codes, k_scale, pairs, v_scale, lengths.contiguous(), table, out, parts, stats, softmax_scale * _LOG2_E),
        *(*q.stride()[:3], *k_codes.stride()[:3], *k_scale.stride(), *pairs.stride()[:3], *v_scale.stride()),
        *(table_row, groups, heads // groups, queries, room, k_codes.shape[0], window, splits),
        batch * heads * queries * splits,
        D=d,
        WIDTH=max(triton.next_power_of_2(d), 16),
        K_SPEC=spec(Format.parse(k_format), device=device),
        V_SPEC=spec(Format.parse(v_format), device=device),
        ROWS=rows,
        TOKENS=plan.tokens,
        PAGE=page,
        WINDOW=window > 0,
        SPLIT=splits > 1,
        OVERLAPS=soon,
        num_warps=plan.warps,
        # Triton counts one for what a table is read by, too.
        num_stages=plan.stages if table is None else 2 * plan.stages - 1,
    )
    if splits > 1:
        add: Any = _combine[(batch * heads * queries,)]
        add(
            *(parts, stats, out, splits, batch * heads * queries * splits),
            D=d,
            WIDTH=triton.next_power_of_2(d),
            MOST=_MOST,
            PART=_PART,
            OVERLAPS=soon,
            num_warps=8,
            **({"launch_pdl": True} if soon else {}),
        )
    return out


def _splits(programs: int, room: int, plan: Plan, device: torch.device) -> int:
    """How many programs share the tokens of a text: as many as the GPU has room for, each with a few steps at least."""
    wanted = multiprocessors(device) * plan.programs // programs
    return max(min(wanted, room // (4 * plan.tokens), _MOST), 1)


@triton.jit(do_not_specialize=["table_row", "room", "pages", "window", "splits", "all_parts"])
def _attend(
    q,
    k_codes,
    k_scale,
    v_pairs,
    v_scale,
    lengths,
    table,
    out,
    parts,
    stats,
    scale,
    q_batch,
    q_head,
    q_token,
    k_row,
    k_token,
    k_head,
    ks_row,
    ks_token,
    ks_head,
    v_row,
    v_token,
    v_head,
    vs_row,
    vs_token,
    vs_head,
    table_row,
    groups,
    each,
    queries,
    room,
    pages,
    window,
    splits,
    all_parts,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K_SPEC: tl.constexpr,
    V_SPEC: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program some rows (queries of the heads that one of keys serves) of a text, and some of its tokens."""
    group, split, text = tl.program_id(0) % groups, tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    head, query = group * each + row // queries, row % queries
    inside = row < each * queries
    # Of more than there is room for, any will do.
    length = tl.minimum(tl.load(lengths + text).to(tl.int64), room + queries).to(tl.int32)
    end = tl.minimum(length, room)
    # The last token that each row sees, and the first one that any does.
    last = length - queries + query
    first = tl.maximum(length - queries + 1 - window, 0) if WINDOW else 0
    step = first // TOKENS
    steps = tl.maximum(tl.cdiv(end, TOKENS) - step, 0)
    begin, stop = step + steps * split // splits, step + steps * (split + 1) // splits

    channel = tl.arange(0, WIDTH)
    known = channel < D
    x_at = (
        text.to(tl.int64) * q_batch
        + head.to(tl.int64)[:, None] * q_head
        + query.to(tl.int64)[:, None] * q_token
        + channel[None, :]
    )
    x = tl.load(q + x_at, inside[:, None] & known[None, :], 0.0).to(tl.float32)
    field = _field(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    x = (x * _power(254 - field)[:, None]).to(tl.float16)
    unit = _power(field) * scale

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # Of the channels that are first, and second, in a pair.
    even = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    odd = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    k_codes += group.to(tl.int64) * k_head
    k_scale += group.to(tl.int64) * ks_head
    v_pairs += group.to(tl.int64) * v_head
    v_scale += group.to(tl.int64) * vs_head
    if PAGE != 0:
        table += text.to(tl.int64) * table_row
    # Steps of whose tokens each row sees all come last: they need no masks.
    seen_from = tl.maximum(length - window, 0) if WINDOW else 0
    clear = tl.minimum(tl.maximum(tl.cdiv(seen_from, TOKENS), begin), stop)
    clear_stop = tl.maximum(tl.minimum((length - queries + 1) // TOKENS, stop), clear)
    clear_stop = tl.where(length > room, clear, clear_stop)
    cache = k_codes, k_scale, v_pairs, v_scale
    strides = k_row, k_token, ks_row, ks_token, v_row, v_token, vs_row, vs_token
    seen = first, end, last, window
    for i in tl.range(0, clear - begin + stop - clear_stop, num_stages=1):
        at = tl.where(begin + i < clear, begin + i, clear_stop + i - (clear - begin))
        most, total, even, odd = _step(
            *(x, unit, most, total, even, odd, at, cache, strides, table, text, pages, seen),
            *(D, WIDTH, K_SPEC, V_SPEC, TOKENS, PAGE, WINDOW, True),
        )
    for i in tl.range(0, clear_stop - clear):
        most, total, even, odd = _step(
            *(x, unit, most, total, even, odd, clear + i, cache, strides, table, text, pages, seen),
            *(D, WIDTH, K_SPEC, V_SPEC, TOKENS, PAGE, WINDOW, False),
        )
    result = tl.interleave(even, odd)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    # More tokens than there is room for are not all there.
    total = tl.where(length > room, float("nan"), total)
    to = (text.to(tl.int64) * groups * each + head) * queries + query
    if not SPLIT:
        result = tl.where((total == 0.0)[:, None], 0.0, result / total[:, None])
        place_of = to[:, None] * D + channel[None, :]
        tl.store(out + place_of, result.to(out.dtype.element_ty), inside[:, None] & known[None, :])
    else:
        to = to * splits + split
        tl.store(parts + to[:, None] * D + channel[None, :], result, inside[:, None] & known[None, :])
        tl.store(stats + to, most, inside)
        tl.store(stats + all_parts + to, total, inside)


@triton.jit
def _step(
    x,
    unit,
    most,
    total,
    even,
    odd,
    at,
    cache,
    strides,
    table,
    text,
    pages,
    seen,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K_SPEC: tl.constexpr,
    V_SPEC: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to TOKENS tokens, of which each row sees all if not MASKED."""
    k_codes, k_scale, v_pairs, v_scale = cache
    k_row, k_token, ks_row, ks_token, v_row, v_token, vs_row, vs_token = strides
    first, end, last, window = seen
    place, channel, pair = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    token = at * TOKENS + place
    there = (token >= first) & (token < end)
    # Rows and places in them, of all tokens or of each.
    if PAGE == 0:
        row, is_page, of = text, True, at * TOKENS
    elif PAGE % TOKENS == 0:
        row = tl.load(table + at * TOKENS // PAGE)
        is_page, of = (row >= 0) & (row < pages), at * TOKENS % PAGE
        row = tl.where(is_page, row, 0)
    else:
        index, of = token // PAGE, token % PAGE
        if TOKENS % PAGE == 0:
            # The same, and places do not change from step to step.
            index, of = at * (TOKENS // PAGE) + place // PAGE, place % PAGE
        row = tl.load(table + index, there, -1) if MASKED else tl.load(table + index)
        is_page = (row >= 0) & (row < pages)
        row = tl.where(is_page, row, 0)
    row, of = row.to(tl.int64), of.to(tl.int64)
    k_from, v_from = k_codes + row * k_row + of * k_token, v_pairs + row * v_row + of * v_token
    ks_from, vs_from = k_scale + row * ks_row + of * ks_token, v_scale + row * vs_row + of * vs_token
    if PAGE == 0 or PAGE % TOKENS == 0:
        k_from = k_from + (place[:, None] * k_token + channel[None, :])
        v_from = v_from + (place[:, None] * v_token + pair[None, :])
        ks_from, vs_from = ks_from + place * ks_token, vs_from + place * vs_token
    else:
        k_from, v_from = k_from[:, None] + channel[None, :], v_from[:, None] + pair[None, :]
    if MASKED:
        by, of_values = tl.load(ks_from, there, 0.0), tl.load(vs_from, there, 0.0)
        codes = tl.load(k_from, there[:, None] & (channel < D)[None, :], 0)
        pairs = tl.load(v_from, there[:, None] & (pair < D // 2)[None, :], 0)
    elif WIDTH != D:
        by, of_values = tl.load(ks_from), tl.load(vs_from)
        codes = tl.load(k_from, (channel < D)[None, :], 0)
        pairs = tl.load(v_from, (pair < D // 2)[None, :], 0)
    else:
        by, of_values, codes, pairs = tl.load(ks_from), tl.load(vs_from), tl.load(k_from), tl.load(v_from)
    if PAGE != 0:
        by = tl.where(is_page, by, float("nan"))
    scores = tl.dot(x, tl.trans(_half(codes, K_SPEC))) * unit[:, None] * by[None, :]
    if MASKED:
        visible = there[None, :] & (token[None, :] <= last[:, None])
        if WINDOW:
            visible = visible & (token[None, :] > last[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    larger = tl.maximum(most, tl.max(scores, 1))
    # Before anything is seen, any number is as good.
    centre = tl.where(larger == float("-inf"), 0.0, larger)
    weights = tl.exp2(scores - centre[:, None])
    before = tl.exp2(most - centre)
    total = total * before + tl.sum(weights, 1)
    largest = _field(tl.max(of_values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
    weights = (weights * (of_values * _power(254 - largest))[None, :]).to(tl.float16)
    one, other = _halves(pairs, V_SPEC)
    even = even * before[:, None] + tl.dot(weights, one) * _power(largest)
    odd = odd * before[:, None] + tl.dot(weights, other) * _power(largest)
    return larger, total, even, odd


@triton.jit
def _field(bits):
    """The exponent field of float32 magnitudes, such that a power of two has it and its reciprocal."""
    return tl.minimum(tl.maximum(bits >> 23, 1), 253)


@triton.jit
def _power(field):
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _half(codes, SPEC: tl.constexpr):
    """Exact float16 of codes."""
    if SPEC.element.kind == "int" and SPEC.fused:
        value = tl.inline_asm_elementwise(_INT8, "=r,=r,r", [codes], tl.float16, True, 4)
    elif SPEC.element.kind == "int":
        value = codes.to(tl.int8, bitcast=True).to(tl.float16)
    elif SPEC.convert != "":
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        value = decode(codes, SPEC.element).to(tl.float16)
    return value


@triton.jit
def _halves(pairs, SPEC: tl.constexpr):
    """Exact float16 of the codes that are first, and second, in a pair."""
    if SPEC.element.kind == "int" and SPEC.fused:
        one = tl.inline_asm_elementwise(_INT8_FIRST, "=r,r", [pairs], tl.float16, True, 2)
        other = tl.inline_asm_elementwise(_INT8_SECOND, "=r,r", [pairs], tl.float16, True, 2)
    elif SPEC.convert != "":
        one = tl.inline_asm_elementwise(_E4M3_FIRST, "=r,r", [pairs], tl.float16, True, 2)
        other = tl.inline_asm_elementwise(_E4M3_SECOND, "=r,r", [pairs], tl.float16, True, 2)
    else:
        one, other = _half((pairs & 0xFF).to(tl.uint8), SPEC), _half(((pairs >> 8) & 0xFF).to(tl.uint8), SPEC)
    return one, other


@triton.jit(do_not_specialize=["splits", "all_parts"])
def _combine(
    parts,
    stats,
    out,
    splits,
    all_parts,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    PART: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program a query: the results of all programs that shared its text, each by its share of the sum."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, MOST), tl.arange(0, WIDTH)
    largest = tl.load(stats + at * splits + split, split < splits, float("-inf"))
    sums = tl.load(stats + all_parts + at * splits + split, split < splits, 0.0)
    most = tl.max(largest, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(sums * tl.exp2(largest - most), 0)
    result = tl.zeros([WIDTH], tl.float32)
    for first in tl.range(0, splits, PART):
        part = at * splits + first + tl.arange(0, PART)
        there = part < (at + 1) * splits
        weight = tl.exp2(tl.load(stats + part, there, float("-inf")) - most)
        found = tl.load(parts + part[:, None] * D + channel[None, :], there[:, None] & (channel < D)[None, :], 0.0)
        result += tl.sum(found * weight[:, None], 0)
    result = tl.where(total == 0.0, 0.0, result / total)
    tl.store(out + at * D + channel, result.to(out.dtype.element_ty), channel < D)
