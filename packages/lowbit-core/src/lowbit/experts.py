"""Tokens through their experts' matrices, as the reference and gradients do it: one expert after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_expert(
    x: Tensor, offs: Tensor, n: int, product: Callable[[int, Tensor], Tensor], *, mixes_rows: bool = False
) -> Tensor:
    """Rows of `x` (M, ..) each through its expert's `product(e, rows)` (.., n); `offs` (E,) ends each expert's rows.

    Where `offs` cannot be read, in a traced graph or one that CUDA captures, every expert takes M rows, zeros in place
    of others'. Its own come first then if `mixes_rows`: what becomes of a row depends on those beside it.
    """
    out = x.new_zeros(x.shape[0], n)
    if type(offs) is Tensor and not (offs.is_cuda and torch.cuda.is_current_stream_capturing()):
        start = 0
        for e, end in enumerate(offs.tolist()):
            if end > start:
                out[start:end] = product(e, x[start:end])
            start = end
        return out
    m = x.shape[0]
    row, start = torch.arange(m, device=x.device), 0
    for e, end in enumerate(offs.unbind()):
        mine = ((row >= start) & (row < end)).unsqueeze(1)
        rows = torch.where(mine, x, 0)
        if mixes_rows:
            rows = _pick(rows, (row + start) % m)
        rows = product(e, rows)
        if mixes_rows:
            rows = _pick(rows, (row - start) % m)
        out = torch.where(mine, rows, out)
        start = end
    return out


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of `x`, unchecked, because inductor of torch 2.11 writes a check that does not compile."""
    return torch.ops.aten._unsafe_index(x, [rows])  # noqa: SLF001 - no public name
