"""What `lowbit.attention` computes, in plain PyTorch: operands rounded and multiplied, and gradients through that.

Scores, weights and sums are in float32, a few queries at a time. A row's largest score is rounded up to a whole number
(in powers of two), so that what a kernel does block by block, under the largest score it has seen, rounds alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.attention import MODE, SAMPLE, Scheme
from lowbit.format import WHOLE, Format
from lowbit.hadamard import hadamard
from lowbit.numerics import Scales, choose_scale, decode, encode

ONE = 2.0**8
"""What stands for a weight of 1: e4m3 goes to 448, and keeps 2^-9 of numbers above 1."""

# Queries whose scores are held at a time.
_ROWS = 512


@dataclass(frozen=True, slots=True)
class Seen:
    """Which keys a query sees: all, those of a mask, those up to its own token, or the last `window` of them."""

    mask: Tensor | None
    causal: bool
    # 0: as many as there are.
    window: int

    def apply(self, scores: Tensor, first: int, queries: int) -> Tensor:
        """Scores (B, G, H / G, rows, T) of queries from `first` on, of so many in all, -inf where nothing is seen."""
        rows, keys = scores.shape[-2:]
        if self.mask is not None:
            mask = self.mask.expand(*(1,) * (4 - self.mask.dim()), *self.mask.shape)
            part = mask[:, :, first : first + rows] if mask.shape[2] > 1 else mask
            heads = scores.shape[1:3] if part.shape[1] > 1 else (1, 1)
            part = part.unflatten(1, heads)
            scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part.float()
        if self.causal:
            last = torch.arange(first, first + rows, device=scores.device)[:, None] + keys - queries
            key = torch.arange(keys, device=scores.device)
            hidden = key > last
            if self.window:
                hidden |= key <= last - self.window
            scores = scores.masked_fill(hidden, -math.inf)
        return scores


def mean_of_keys(k: Tensor) -> Tensor:
    """The float32 mean (B, G, 1, D) of at most `SAMPLE` keys, evenly spread: the tokens `i T // SAMPLE`."""
    tokens = k.shape[2]
    if tokens > SAMPLE:
        k = k[:, :, torch.arange(SAMPLE, device=k.device) * tokens // SAMPLE]
    return k.float().mean(2, keepdim=True)


def rotated(x: Tensor) -> Tensor:
    """Channels (.., D) multiplied by `H / sqrt(D)`, its own inverse where D is a power of two."""
    d = x.shape[-1]
    return x @ (hadamard(d) * d**-0.5).to(x.device, x.dtype)


def unrotated(x: Tensor) -> Tensor:
    """The inverse of `rotated`."""
    d = x.shape[-1]
    return x @ (hadamard(d) * d**-0.5).to(x.device, x.dtype).T


def roped(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Channels `i` and `i + D / 2` of x (B, H, S, D), turned by angles: the last S rows of tables (.., T, D / 2).

    In tables of D columns each of a pair has its own. Products and sums are rounded to x's dtype, as in transformers.
    Without tables x as it is.
    """
    if cos is None or sin is None:
        return x
    first, half = cos.shape[-2] - x.shape[2], x.shape[3] // 2
    cos, sin = (table[..., first:, :].to(x.dtype).unsqueeze(-3) for table in (cos, sin))
    low, high = x[..., :half], x[..., half:]
    turned = low * cos[..., :half] - high * sin[..., :half], high * cos[..., -half:] + low * sin[..., -half:]
    return torch.cat(turned, -1)


def laid_out_as(x: Tensor, q: Tensor) -> Tensor:
    """`x`, or a copy of it, in the strides that the operator's results have: heads and tokens lie as they do in q."""
    made = torch.empty_like(q)
    return x if x.stride() == made.stride() else made.copy_(x)


def rounded(
    q: Tensor, k: Tensor, v: Tensor, scheme: Scheme, cos: Tensor | None = None, sin: Tensor | None = None
) -> list[list[Tensor]]:
    """Parts of queries, keys and values, as `lowbit.quantize` makes them of what the scheme makes of them.

    Values that are not rounded are one part, as they are.
    """
    q, k, values = roped(q, cos, sin).float(), roped(k, cos, sin).float(), v
    if scheme.smooth:
        k = k - mean_of_keys(k)
    if scheme.rotate_qk:
        q, k = rotated(q), rotated(k)
    if scheme.rotate_v:
        values = rotated(v.float()).to(v.dtype if scheme.v is None else torch.float32)
    return [_parts_of_queries(q, scheme.qk, k.shape[1]), _parts(k, scheme.qk), _parts(values, scheme.v)]


def _parts_of_queries(q: Tensor, fmt: Format, groups: int) -> list[Tensor]:
    """Parts of queries (B, H, S, D), of which one scale for all tokens is that of all heads that share keys."""
    if fmt.block[0] != WHOLE:
        return _parts(q, fmt)
    (batch, heads, queries, d), each = q.shape, q.shape[1] // groups
    codes, scale = _parts(q.reshape(batch, groups, each * queries, d), fmt)
    return [codes.view(batch, heads, queries, codes.shape[-1]), scale.repeat_interleave(each, 1)]


def _parts(x: Tensor, fmt: Format | None) -> list[Tensor]:
    if fmt is None:
        return [x]
    scales = choose_scale(x, fmt, mode=MODE)
    return [encode(x, fmt, scales), scales.scale]


def values_of(parts: list[Tensor], fmt: Format | None, d: int, dtype: torch.dtype) -> Tensor:
    """What `rounded` parts stand for."""
    if fmt is None:
        return parts[0].to(dtype)
    data, scale = parts
    return decode(data, fmt, Scales(scale), d, dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,  # noqa: FBT001 - an operator's arguments
    window: int,
    scale: float,
    scheme: str | Scheme,
    prefer: str,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference of the operator `attention`: the result, and `log sum exp s` (B, H, S) in float32."""
    del prefer
    how = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    parts, seen = rounded(q, k, v, how, cos, sin), Seen(mask, causal, window)
    out, sums = attend_rounded(parts, how, seen, scale, q.dtype)
    return torch.empty_like(q).copy_(out), sums


def attend_rounded(
    parts: list[list[Tensor]], how: Scheme, seen: Seen, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `attend`, in a dtype, of what `rounded` gave."""
    d, heads = parts[0][0].shape[3], parts[1][0].shape[1]
    queries, keys = (values_of(part, how.qk, d, torch.float32) for part in parts[:2])
    values = values_of(parts[2], how.v, d, torch.float32)
    results, sums = [], []
    for first, rows in _some(queries, heads):
        scores = seen.apply(rows @ keys[:, :, None].mT * scale, first, queries.shape[2]) * math.log2(math.e)
        # A whole number, and any of them where nothing is seen.
        most = scores.amax(-1, keepdim=True).ceil() if keys.shape[2] else rows.new_zeros(1)
        most = most.masked_fill(most == -math.inf, 0.0)
        weights = (scores - most).exp2() * ONE
        total = weights.sum(-1, keepdim=True)
        weights = _rounded_weights(weights, how, dtype)
        results.append((weights @ values[:, :, None] / total).masked_fill(total == 0, 0.0))
        sums.append((total.log2() + most - math.log2(ONE)).squeeze(-1) * math.log(2))
    result = torch.cat(results, 3).flatten(1, 2)
    if how.rotate_v:
        result = unrotated(result)
    return result.to(dtype), torch.cat(sums, 3).flatten(1, 2)


def _rounded_weights(weights: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    if scheme.v is None:
        return weights.to(dtype).float()
    return scheme.v.element.decode(scheme.v.element.encode(weights))


def _some(x: Tensor, heads: int) -> Iterator[tuple[int, Tensor]]:
    """Some queries at a time, (B, G, H / G, rows, D), and which is the first of them."""
    x = x.unflatten(1, (heads, -1))
    # Where lengths are not known, a loop would take that which was traced for all.
    if isinstance(x.shape[3], torch.SymInt):
        yield 0, x
        return
    for first in range(0, max(x.shape[3], 1), _ROWS):
        yield first, x[:, :, :, first : first + _ROWS]


def gradients(
    grad: Tensor,
    parts: list[list[Tensor]],
    scheme: Scheme,
    seen: Seen,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, in grad's dtype, as if rounding were the identity.

    With weights `p = softmax(s)` and `dp = grad v^T` of what was rounded: `dv = p^T grad`, `ds = p (dp - sum(p dp))`,
    `dq = ds k scale`, `dk = ds^T q scale`. The forward's own sums are no part of it: those of a backend that did not
    round are of other scores.
    """
    dtype, d = grad.dtype, grad.shape[3]
    queries, keys = (values_of(part, scheme.qk, d, dtype) for part in parts[:2])
    values = values_of(parts[2], scheme.v, d, dtype)
    heads = keys.shape[1]
    turned = rotated(grad.float()).to(dtype) if scheme.rotate_v else grad
    to_q, to_k, to_v = [], torch.zeros_like(keys, dtype=torch.float32), torch.zeros_like(values, dtype=torch.float32)
    for (first, rows), (_, got) in zip(_some(queries, heads), _some(turned, heads), strict=True):
        # Scores are rounded no more than those of the forward.
        scores = seen.apply((rows.float() @ keys[:, :, None].mT.float()) * scale, first, queries.shape[2])
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.softmax(-1).masked_fill(nothing, 0.0)
        to_weights = (got @ values[:, :, None].mT).float()
        to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True)) * scale
        rounded_weights, to_scores = weights.to(dtype), to_scores.to(dtype)
        to_v += (rounded_weights.mT @ got).float().sum(2)
        to_k += (to_scores.mT @ rows).float().sum(2)
        to_q.append(to_scores @ keys[:, :, None])
    result = torch.cat(to_q, 3).flatten(1, 2).float()
    if scheme.rotate_qk:
        result, to_k = unrotated(result), unrotated(to_k)
    if scheme.rotate_v:
        to_v = unrotated(to_v)
    # A turn by the opposite angle is the transpose.
    back = cos, None if sin is None else -sin
    return roped(result.to(dtype), *back), roped(to_k.to(dtype), *back), to_v.to(dtype)
