"""What `lowbit.varlen_attention` computes, in plain PyTorch: a sequence at a time, or all at once where one traces.

A tracer does not know lengths: there all sequences are as long as the longest may be, and what is beyond their end is
zeros that no query sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lowbit.attending import Seen, attend_rounded, gradients, rounded
from lowbit.attention import SAMPLE, Scheme
from lowbit.errors import FormatError


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Some sequences' tokens among all: where each begins, and how many it has, int32 (n,)."""

    start: Tensor
    length: Tensor
    # At least the length of each.
    most: int
    # Where all tokens are in (n, most), in order; None: there are n times most.
    places: Tensor | None

    def taken(self, x: Tensor) -> Tensor:
        """The sequences (n, H, most, D) of all tokens (tokens, H, D), zeros beyond their ends."""
        index = torch.arange(self.most, device=x.device)
        rows = self._rows(x, (self.start[:, None] + index).clamp_max(x.shape[0] - 1))
        return rows if self.places is None else rows.masked_fill(~self.there(), 0.0)

    def there(self) -> Tensor:
        """Whether there is a token, (n, 1, most, 1)."""
        there = torch.arange(self.most, device=self.length.device) < self.length[:, None]
        return there[:, None, :, None]

    def mean(self, x: Tensor) -> Tensor:
        """The mean (n, H, 1, D) of tokens, as `lowbit.attending.mean_of_keys` has it."""
        index = torch.arange(min(SAMPLE, self.most), device=x.device)
        length = self.length[:, None].to(torch.int64)
        spread = torch.where(length > SAMPLE, index * length // SAMPLE, index.clamp_max(length - 1))
        rows = self._rows(x, (self.start[:, None] + spread).clamp(0, x.shape[0] - 1)).float()
        rows = rows.masked_fill((index >= length)[:, None, :, None], 0.0)
        return rows.sum(2, keepdim=True) / length.clamp(1, SAMPLE)[:, :, None, None]

    def _rows(self, x: Tensor, index: Tensor) -> Tensor:
        if not x.shape[0]:
            return x.new_zeros(index.shape[0], x.shape[1], index.shape[1], x.shape[2])
        return x[index].transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """Undo `taken`."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.places is None else x[self.places]


@dataclass(frozen=True, slots=True)
class _SeenInside(Seen):
    """What queries of sequences see, each of its own."""

    q: _Tokens
    k: _Tokens

    def apply(self, scores: Tensor, first: int, queries: int) -> Tensor:
        """See `Seen.apply`."""
        del queries
        rows, keys = scores.shape[-2:]
        key = torch.arange(keys, device=scores.device)
        hidden = key >= self.k.length[:, None, None]
        if self.causal:
            row = torch.arange(first, first + rows, device=scores.device)[:, None]
            last = row + (self.k.length - self.q.length)[:, None, None]
            hidden = hidden | (key > last)
            if self.window:
                hidden = hidden | (key <= last - self.window)
        return scores.masked_fill(hidden[:, None, None], -torch.inf)


def _sequences(
    queries: int, keys: int, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Iterator[tuple[_Tokens, _Tokens]]:
    """Each sequence's of so many queries and keys, or all sequences'.

    Raises:
        FormatError: lengths are known, and are not those of sequences.
    """
    if type(cu_q) is not Tensor:
        yield _all(cu_q, queries, max_q), _all(cu_k, keys, max_k)
        return
    ends = [_ends(*each) for each in (("cu_q", cu_q, queries, max_q), ("cu_k", cu_k, keys, max_k))]
    for i in range(len(cu_q) - 1):
        one, other = (
            _Tokens(cu[i : i + 1], cu[i + 1 : i + 2] - cu[i : i + 1], end[i + 1] - end[i], None)
            for cu, end in zip((cu_q, cu_k), ends, strict=True)
        )
        yield one, other


def _all(cu: Tensor, tokens: int, most: int) -> _Tokens:
    start, length = cu[:-1], cu.diff()
    holds: Any = torch.ops.aten._assert_async.msg  # noqa: SLF001 - no other name
    whole = (cu[0] == 0) & (cu[-1] == tokens) & (length >= 0).all() & (length <= most).all()
    holds(whole, "cu_q and cu_k must count up from 0 to all tokens, by at most max_q and max_k at a time")
    token = torch.arange(tokens, device=cu.device, dtype=cu.dtype)
    which = torch.searchsorted(cu[1:].contiguous(), token, right=True).clamp_max(len(start) - 1)
    return _Tokens(start, length, most, which * most + (token - start[which]))


def _ends(name: str, cu: Tensor, tokens: int, most: int) -> list[int]:
    ends = cu.tolist()
    lengths = [after - before for before, after in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0 or max(lengths, default=0) > most:
        msg = (
            f"{name} must count up from 0 to all {tokens} tokens, by at most {most} (max_q or max_k) at a time; it is "
            f"{ends if len(ends) <= 8 else [*ends[:4], '..', *ends[-3:]]}"
        )
        raise FormatError(msg)
    return ends


def attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,  # noqa: FBT001 - an operator's arguments
    window: int,
    scale: float,
    scheme: str | Scheme,
    prefer: str,
) -> tuple[Tensor, Tensor]:
    """The reference of the operator `varlen_attention`: the result, and `log sum exp s` (H, tokens) in float32."""
    del prefer
    how = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    results, sums = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, q.shape[1], dtype=torch.float32)]
    for of_q, of_k in _sequences(q.shape[0], k.shape[0], cu_q, cu_k, max_q, max_k):
        parts, seen = _rounded(q, k, v, of_q, of_k, how), _SeenInside(None, causal, window, of_q, of_k)
        out, total = attend_rounded(parts, how, seen, scale, q.dtype)
        results.append(of_q.packed(out))
        sums.append(of_q.packed(total.unsqueeze(-1)).squeeze(-1))
    return torch.cat(results), torch.cat(sums).T.contiguous()


def _rounded(q: Tensor, k: Tensor, v: Tensor, of_q: _Tokens, of_k: _Tokens, scheme: Scheme) -> list[list[Tensor]]:
    keys = of_k.taken(k)
    if scheme.smooth:
        keys = (keys.float() - of_k.mean(k)).masked_fill(~of_k.there(), 0.0)
    return rounded(of_q.taken(q), keys, of_k.taken(v), replace(scheme, smooth=False))


def rounded_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scheme: Scheme
) -> list[list[list[Tensor]]]:
    """What `rounded` makes of sequences, for `gradients_varlen`."""
    each = _sequences(q.shape[0], k.shape[0], cu_q, cu_k, max_q, max_k)
    return [_rounded(q, k, v, of_q, of_k, scheme) for of_q, of_k in each]


def gradients_varlen(
    grad: Tensor,
    of_keys: torch.Size,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    parts: list[list[list[Tensor]]],
    scheme: Scheme,
    *,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed queries, keys and values, which have the shape `of_keys`; see `attending.gradients`."""
    found = [[grad.new_zeros(0, *shape[1:])] for shape in (grad.shape, of_keys, of_keys)]
    sequences = _sequences(grad.shape[0], of_keys[0], cu_q, cu_k, max_q, max_k)
    for (of_q, of_k), each in zip(sequences, parts, strict=True):
        seen = _SeenInside(None, causal, window, of_q, of_k)
        to_q, to_k, to_v = gradients(of_q.taken(grad), each, scheme, seen, scale)
        for to, of, x in zip(found, (of_q, of_k, of_k), (to_q, to_k, to_v), strict=True):
            to.append(of.packed(x))
    to_q, to_k, to_v = (torch.cat(each) for each in found)
    return to_q, to_k, to_v
