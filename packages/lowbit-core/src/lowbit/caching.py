"""What the operators `cache_write` and `cached_attention` compute, in plain PyTorch; nothing waits for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.attending import roped
from lowbit.format import Format
from lowbit.numerics import Scales, choose_scale, decode, encode

# Queries whose scores are held at a time.
_ROWS = 512


def write_cache(
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
    k_format: str | Format,
    v_format: str | Format,
) -> Tensor:
    """The reference of `cache_write`: rotated queries (B, H, S, D), or nothing, (0,), where there are none."""
    k, q = roped(k, cos, sin), None if q is None else roped(q, cos, sin)
    if k.numel() and k_codes.numel():
        row, place, there = _places(positions, k.shape[2], k_codes, table)
        source, target = _without_gaps(there)
        row, place = ((x.flatten()[source] * target) for x in (row, place))
        for x, codes, scale, fmt in ((k, k_codes, k_scale, k_format), (v, v_codes, v_scale, v_format)):
            for part, new in zip((codes, scale), _rounded(x, fmt), strict=True):
                moved = new.transpose(1, 2).flatten(0, 1)[source]
                # Where nothing is to be written, what is there already.
                any_there = target.view(-1, *(1,) * (moved.dim() - 1))
                part.index_put_((row, place), torch.where(any_there, moved, part[row, place]))
    return k.new_empty(0) if q is None else q.contiguous()


def _places(positions: Tensor, tokens: int, codes: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Row and place (B, S) of tokens in the first two dims of a cache, and whether there is such a place."""
    at = positions.to(torch.int64)
    if at.dim() == 1:
        at = at[:, None] + torch.arange(tokens, device=at.device)
    if table is None:
        there = (at >= 0) & (at < codes.shape[1])
        row = torch.arange(at.shape[0], device=at.device)[:, None].expand(at.shape)
        return row, at, there
    page = codes.shape[1]
    index = at.div(page, rounding_mode="floor")
    there = (at >= 0) & (index < table.shape[1])
    if not table.shape[1]:
        return at, at, there
    row = table.to(torch.int64).gather(1, index.clamp(0, table.shape[1] - 1))
    there = there & (row >= 0) & (row < codes.shape[0])
    return row, at % page, there


def _without_gaps(there: Tensor) -> tuple[Tensor, Tensor]:
    """Of tokens (B, S), for each what is written in its place: itself, or else the first that is; and if there is one.

    So what is not to be written is written twice, in another's place, and no number of tokens is asked for.
    """
    there = there.flatten()
    each = torch.arange(there.shape[0], device=there.device)
    source = torch.where(there, each, there.to(torch.int32).argmax())
    return source, there[source]


def _rounded(x: Tensor, spec: str | Format) -> tuple[Tensor, Tensor]:
    """Codes (B, G, S, D) and scales (B, G, S), as a cache holds them."""
    fmt = _parsed(spec)
    scales = choose_scale(x, fmt)
    return encode(x, fmt, scales).view(torch.uint8), scales.scale.squeeze(-1)


def _parsed(spec: str | Format) -> Format:
    return Format.parse(spec) if isinstance(spec, str) else spec


def attend_cache(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    window: int,
    softmax_scale: float,
    k_format: str | Format,
    v_format: str | Format,
) -> Tensor:
    """The reference of `cached_attention`."""
    queries, groups = q.shape[2], k_codes.shape[2]
    ends = lengths.to(torch.int64)[:, None]
    # Of each query, the token after the last that it sees.
    ends_of = ends - queries + 1 + torch.arange(queries, device=q.device)
    keys, missing = _gathered(k_codes, k_scale, table, k_format)
    values, _ = _gathered(v_codes, v_scale, table, v_format)
    token = torch.arange(keys.shape[2], device=q.device)
    read = token < ends
    if window:
        read = read & (token >= ends_of[:, :1] - window)
    keys, values = (_cleared(x, read, missing) for x in (keys, values))
    found = []
    # Where lengths are not known, a loop would take that which was traced for all.
    size = queries if isinstance(queries, torch.SymInt) else _ROWS
    for first in [0] if isinstance(queries, torch.SymInt) else range(0, max(queries, 1), _ROWS):
        rows = q[:, :, first : first + size].float().unflatten(1, (groups, -1))
        last = ends_of[:, first : first + size, None]
        hidden = token >= last
        if window:
            hidden = hidden | (token < last - window)
        scores = (rows @ keys[:, :, None].mT * softmax_scale).masked_fill(hidden[:, None, None], -math.inf)
        # Of no tokens there is no largest; where nothing is seen it may be any.
        most = scores.amax(-1, keepdim=True) if keys.shape[2] else rows.new_zeros(1)
        weights = (scores - most.masked_fill(most == -math.inf, 0.0)).exp()
        total = weights.sum(-1, keepdim=True)
        found.append((weights @ values[:, :, None] / total).masked_fill(total == 0, 0.0))
    out = torch.cat(found, 3).flatten(1, 2)
    return out.masked_fill((ends > keys.shape[2])[..., None, None], math.nan).to(q.dtype)


def _gathered(codes: Tensor, scale: Tensor, table: Tensor | None, spec: str | Format) -> tuple[Tensor, Tensor]:
    """Float32 values (B, G, T, D) of all that there is room for, and of which tokens (B, T) there is no page."""
    missing = codes.new_zeros(1, 1, dtype=torch.bool)
    if table is not None:
        page, each = codes.shape[1], table.to(torch.int64)
        bad = (each < 0) | (each >= codes.shape[0])
        missing = bad.repeat_interleave(page, 1)
        # Of no pages none can be taken.
        codes, scale = (x if x.shape[0] else x.new_zeros(1, *x.shape[1:]) for x in (codes, scale))
        codes, scale = (x[each.masked_fill(bad, 0)].flatten(1, 2) for x in (codes, scale))
    fmt = _parsed(spec)
    codes, scale = codes.transpose(1, 2), scale.transpose(1, 2)
    data = codes.contiguous().view(fmt.element.storage)
    return decode(data, fmt, Scales(scale[..., None]), codes.shape[-1]), missing


def _cleared(x: Tensor, read: Tensor, missing: Tensor) -> Tensor:
    """Values (B, G, T, D), zeros for tokens (B, T) that are not read, and NaN for those that are and have no page."""
    x = x.masked_fill(~read[:, None, :, None], 0.0)
    return x.masked_fill((read & missing)[:, None, :, None], math.nan)
