"""Calls that write to a key-value cache of codes, and attention over one: what `check_backend` holds backends to.

What is written is fixed to the bit. Attention is held to float64 of the same codes, within what sums in float32 in any
order and weights of 11 bits may lose; parts of a cache that no query sees hold NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.backends import Call
from lowbit.caching import write_cache
from lowbit.cases import Case, Cases, Wanted, rounded_to
from lowbit.format import Format
from lowbit.grid import sample
from lowbit.key_values import FORMATS

_UNIT, _WEIGHTS, _D = 2.0**-24, 2.0**-11, 64
# In the place of NaN, which is beyond any bound.
_NAN = -1024.0
_PARTS = slice(5, 9)


@dataclass(frozen=True, slots=True)
class _Size:
    """A cache's room, in pages or not, and what is written to it, or how many tokens of each text there are."""

    heads: int
    groups: int
    queries: int
    room: int
    page: int | None
    at: tuple[int, ...]
    window: int = 0
    # A page of the first text that is none, though all of its queries see it.
    missing: int | None = None
    # Whether a token's heads lie side by side, as servers have them, and not a head's tokens.
    by_tokens: bool = False


_WRITES = (
    _Size(4, 2, 1, 40, None, (7, 39)),
    _Size(3, 1, 2, 40, 8, (0, 37)),
    # Padding, and what there is no room for.
    _Size(4, 4, 3, 40, 8, (-1, 38), by_tokens=True),
    _Size(1, 1, 2, 40, None, (-2, 40)),
)
_READS = (
    _Size(4, 2, 1, 200, None, (200, 77)),
    _Size(8, 1, 3, 256, 16, (129, 1)),
    _Size(2, 1, 1, 256, 16, (200, 256), missing=3),
    _Size(2, 1, 1, 128, 64, (128, 100), missing=0),
    _Size(2, 2, 5, 300, None, (300, 3), 40, by_tokens=True),
    _Size(6, 2, 2, 192, 64, (150, 0), 70, by_tokens=True),
    # More than there is room for.
    _Size(2, 1, 1, 64, None, (65, 64)),
    _Size(2, 2, 40, 96, 32, (96, 50)),
)


def caches(dtypes: Sequence[torch.dtype], device: str) -> Iterator[tuple[Call, Cases]]:
    """Calls of both operators in all formats, with their cases."""
    for dtype, keys, values in product(dtypes, FORMATS, FORMATS):
        for op, cases in (("cache_write", _writes), ("cached_attention", _reads)):
            call = Call.of(op, str(keys), "", torch.device(device), dtype, None, _D, str(values))
            yield replace(call, device=device), partial(cases, dtype, keys, values)


def _buffers(size: _Size, keys: Format, values: Format) -> tuple[list[Tensor], Tensor | None]:
    """A cache of codes and scales as a model's keys and values give them, and a table whose pages are not in order."""
    texts, table = len(size.at), None
    rows, each = texts, size.room
    if size.page is not None:
        most = size.room // size.page
        # One page is nobody's.
        rows, each = texts * most + 1, size.page
        table = torch.randperm(rows, generator=torch.Generator().manual_seed(5))[: texts * most]
        table = table.to(torch.int32).view(texts, most)
    shape, parts = (rows, size.groups, each, _D), list[Tensor]()
    for seed, fmt in ((7, keys), (8, values)):
        data, scale = _quantized(sample(shape, seed=seed), fmt)
        each = data.transpose(1, 2), scale.transpose(1, 2)
        parts += [x.contiguous() if size.by_tokens else x for x in each]
    return parts, table


def _quantized(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(x.shape, dtype=torch.uint8).transpose(1, 2)
    scale = torch.zeros(x.shape[:-1]).transpose(1, 2)
    spec, at = str(fmt), torch.zeros(x.shape[0], dtype=torch.int64)
    write_cache(x, x, None, None, None, codes, scale, codes.clone(), scale.clone(), at, None, spec, spec)
    return codes.transpose(1, 2), scale.transpose(1, 2)


def _writes(dtype: torch.dtype, keys: Format, values: Format) -> Iterator[Case]:
    for i, size in enumerate(_WRITES):
        parts, table = _buffers(size, keys, values)
        shapes = (size.groups, size.groups, size.heads)
        # Heads of a token lie side by side, as the layer before leaves them.
        given = [
            sample((2, size.queries, heads, _D), seed=j, dtype=dtype).transpose(1, 2) for j, heads in enumerate(shapes)
        ]
        given[0][0, 0, 0] = 0
        if size.queries > 1:
            given[1][0, 0, 1, 3] = torch.nan
        positions = torch.tensor(size.at)
        if i % 2:
            positions = (positions[:, None] + torch.arange(size.queries)).to(torch.int32)
        angles = sample((2 if i % 2 else 1, size.queries, _D // (1 + i // 2)), seed=9)
        # Without queries, keys may be turned or not.
        turns = [None, None] if i == 3 else [angles.cos().to(dtype), angles.sin().to(dtype)]
        queries = None if i in (1, 3) else given[2]
        arguments: tuple[Any, ...] = (*given[:2], queries, *turns, *parts, positions, table, str(keys), str(values))
        after = [x.clone() for x in parts]
        turned = write_cache(*arguments[: _PARTS.start], *after, *arguments[_PARTS.stop :])
        wanted = _typed([turned, *after], keys, values)
        yield Case(
            f"keys {tuple(given[0].shape)} at {size.at} of {size.room}, pages of {size.page}",
            arguments,
            tuple(Wanted(x, x.dtype) for x in wanted),
            written=tuple(range(_PARTS.start, _PARTS.stop)),
            read=partial(_typed, keys=keys, values=values),
        )


def _typed(found: Sequence[Tensor], keys: Format, values: Format) -> Sequence[Tensor]:
    """Codes in the dtypes of their formats, in which one NaN is as good as another."""
    turned, k_codes, k_scale, v_codes, v_scale = found
    return turned, k_codes.view(keys.element.storage), k_scale, v_codes.view(values.element.storage), v_scale


def _reads(dtype: torch.dtype, keys: Format, values: Format) -> Iterator[Case]:
    for size in _READS:
        parts, table = _buffers(size, keys, values)
        lengths, tokens = torch.tensor(size.at), torch.arange(size.room)
        first = lengths - size.queries + 1 - size.window if size.window else torch.zeros_like(lengths)
        unread = (tokens < first[:, None]) | (tokens >= lengths[:, None])
        if table is not None:
            # Pages of which nothing is read need not be there.
            table[unread.view(*table.shape, -1).all(-1)] = -1
            if size.missing is not None:
                table[0, size.missing] = len(parts[0])
        text, token = unread.nonzero(as_tuple=True)
        row = text
        if table is not None:
            page = parts[0].shape[1]
            row = table[text, token // page].long()
            there = (row >= 0) & (row < len(parts[0]))
            row, token = row[there], (token % page)[there]
        for part in parts:
            part[row, token] = torch.nan if part.is_floating_point() else 0x7F
        q = sample((len(lengths), size.queries, size.heads, _D), seed=1, dtype=dtype).transpose(1, 2)
        arguments = (q, *parts, lengths, table, size.window, _D**-0.5, str(keys), str(values))
        yield Case(
            f"q {tuple(q.shape)}, lengths {size.at} of {size.room}, pages of {size.page}, window {size.window}",
            arguments,
            (_wanted(q, parts, lengths, table, ~unread, size, (keys, values)),),
            read=lambda found: [found[0].nan_to_num(_NAN)],
        )


def _wanted(
    q: Tensor,
    parts: Sequence[Tensor],
    lengths: Tensor,
    table: Tensor | None,
    read: Tensor,
    size: _Size,
    formats: tuple[Format, Format],
) -> Wanted:
    """Attention in float64, and what a kernel may be off by."""
    values = list[Tensor]()
    for codes, scale, fmt in zip(parts[::2], parts[1::2], formats, strict=True):
        decoded = fmt.element.decode(codes.contiguous().view(fmt.element.storage)).double() * scale.double()[..., None]
        if table is not None:
            decoded = decoded[table.long().clamp_max(len(codes) - 1)].flatten(1, 2)
        decoded = torch.where(read[..., None, None], decoded, 0.0).transpose(1, 2)
        values.append(decoded.repeat_interleave(size.heads // size.groups, 1))
    keys, values_of = values
    wide, last = q.double(), lengths[:, None] - size.queries + 1 + torch.arange(size.queries)
    token = torch.arange(size.room)
    hidden = token >= last[..., None]
    if size.window:
        hidden |= token < last[..., None] - size.window
    scores = (wide @ keys.mT * _D**-0.5).masked_fill(hidden[:, None], -math.inf)
    # Products of queries, of which a number far below the largest may be 0, and keys.
    lost = (
        wide.abs() @ keys.abs().mT * (_D + 64) + wide.abs().amax(-1, keepdim=True) * keys.abs().sum(-1)[:, :, None]
    ) * _UNIT
    lost = lost * _D**-0.5 + _UNIT * 64
    off = lost.masked_fill(hidden[:, None], 0.0).amax(-1, keepdim=True)
    most = pad(scores, (0, 1), value=_NAN).amax(-1, keepdim=True)
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    none = total == 0
    total = total.masked_fill(none, 1.0)
    size_of = weights @ values_of.abs() / total
    value = weights @ values_of / total
    # Weights times scales may be rounded in steps of 2^-24 of the largest of them.
    bound = size_of * (2 * off.expm1() + _WEIGHTS + (size.room + 64) * _UNIT)
    bound = bound + size.room * _UNIT * values_of.abs().amax((2, 3), keepdim=True) / total
    value, bound = rounded_to(value, bound, None, q.dtype)
    lost = lengths > size.room
    lost[0] |= size.missing is not None
    return Wanted(value.masked_fill(lost[:, None, None, None], _NAN), q.dtype, bound.nan_to_num(0.0))
