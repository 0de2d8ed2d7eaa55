"""Tokens through their experts' matrices, as the reference and gradients do it."""

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


def grouped_product(a: Tensor, b: Tensor, offs: Tensor, *, apart: bool = False) -> Tensor:
    """Plain products of groups, in order, that end at `offs` (E,) int32: of a's rows, or of what is summed over.

    Of a (M, K) and b (E, N, K) `a[rows of e] @ b[e].T` (M, N), zeros for rows of no group; of a (N, M) and b (K, M)
    `a[:, columns of e] @ b[:, columns of e].T` (E, N, K), where `apart` says that groups of columns begin at multiples
    of 16 bytes. Nothing waits for the device, and no loop runs over groups.
    """
    some, (n, k), product = 16 // a.dtype.itemsize, a.shape, torch.nn.functional.grouped_mm
    if a.numel() == 0:
        # Contiguous as it may be, what is empty has any strides.
        return a.new_zeros((n, b.shape[1]) if b.dim() == 3 else (offs.shape[0], n, b.shape[0]))
    if b.dim() == 3:
        # torch multiplies rows, or columns of b, that lie at multiples of 16 bytes, and some.
        by_column = k % some == 0 and b.stride(-2) == 1 and b.shape[-2] % some == 0
        out = product(_filled(a, some, k), (b if by_column else _filled(b, some, k)).mT, offs=offs)
        return torch.where((torch.arange(n, device=a.device) < offs[-1]).unsqueeze(1), out, 0)
    if apart:
        return product(_filled(a, some, k), _filled(b, some, k).mT, offs=offs)
    # Groups begin anywhere in rows' order alone.
    out = product(_filled(a.mT, some, n).mT, _filled(b.mT, some, b.shape[0]), offs=offs)
    return out[:, :n, : b.shape[0]].contiguous()


def _filled(x: Tensor, some: int, columns: int) -> Tensor:
    """Contiguous `x` with zeros up to a multiple of `some` columns, no less than that."""
    short = -columns % some if columns else some
    return torch.nn.functional.pad(x, (0, short)) if short else x.contiguous()
