"""GPTQ's loop over the columns of a group: compiled for CPUs, column by column in torch elsewhere.

Rows are independent. Each goes through the columns j in order, in float32:

    q_j = value of the code nearest to w_j,   e_j = (w_j - q_j) / U_jj,   w_k -= e_j U_jk   for k > j

and takes, of several candidates for its scale, the one with the least sum of e_j^2: what the group adds to
`(w - q) H (w - q)^T` once the columns behind it have made up for it.

Source: Frantar et al., "GPTQ", section 3; Frantar and Alistarh, "Optimal Brain Compression", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit import Format, Scales
from lowbit.element import Element
from lowbit.format import WHOLE
from lowbit.numerics import total_scale

Floats = NDArray[np.float32]
# Rows that one core takes through a group side by side; 128 columns of them fill a first-level cache.
_LANES = 64


class Rounded(NamedTuple):
    """Columns of a group, rounded under each row's best candidate."""

    # (N, g): the weights as they were when each was rounded, and e_j.
    weights: Tensor
    errors: Tensor
    # (C, N): the sum of e_j^2 under each candidate.
    losses: Tensor


def round_columns(w: Tensor, u: Tensor, candidates: Sequence[Scales], fmt: Format) -> Rounded:
    """Round `w` (N, g), one group of float32 columns, by `u` (g, g), upper triangular.

    Each candidate has scales (and zero points) for blocks of `fmt`'s rows: (N / rows, 1).
    """
    scales = torch.stack([_of_rows(total_scale(c), w, fmt) for c in candidates])
    zeros = torch.stack([_of_rows(c.zero, w, fmt) for c in candidates])
    if w.device.type != "cpu":
        return _round_in_torch(w, u, scales, zeros, fmt.element)
    w, element = w.contiguous(), fmt.element
    rounded = Rounded(torch.empty_like(w), torch.empty_like(w), torch.empty(scales.shape))
    integer = element.kind == "int"
    grid = (element.min, element.max, -1 if integer else element.mantissa, 0 if integer else 1 - element.bias)
    arrays = (w, u.contiguous(), scales, zeros)
    compiled: Any = _compiled
    compiled(*(a.numpy() for a in arrays), np.array(grid, np.float32), *(part.numpy() for part in rounded))
    return rounded


def _of_rows(part: Tensor | None, w: Tensor, fmt: Format) -> Tensor:
    """(N / rows, 1) -> (N,) in float32; zeros for no zero points."""
    if part is None:
        return w.new_zeros(w.shape[0])
    return part.to(torch.float32).flatten().repeat_interleave(rows_a_scale(fmt, len(w)))[: len(w)]


def rows_a_scale(fmt: Format, n: int) -> int:
    """How many of n rows share a scale."""
    return n if fmt.block[0] == WHOLE else fmt.block[0]


# No reassociation: what this rounds to has to be what `lowbit.numerics.encode` rounds to.
@numba.njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def _compiled(  # noqa: C901 - one loop, whose inner ones become vector instructions
    w: Floats,
    u: Floats,
    scales: Floats,
    zeros: Floats,
    grid: Floats,
    weights: Floats,
    errors: Floats,
    losses: Floats,
) -> None:
    """The loop; `grid` is the element's low, high, bits of mantissa (-1: integers) and least exponent."""
    n, g = w.shape
    low, high, mantissa, least = grid[0], grid[1], np.int32(grid[2]), np.int32(grid[3])
    for tile in numba.prange((n + _LANES - 1) // _LANES):
        first = tile * _LANES
        rows = min(_LANES, n - first)
        x, e = np.zeros((g, _LANES), np.float32), np.zeros((g, _LANES), np.float32)
        s, z = np.ones(_LANES, np.float32), np.zeros(_LANES, np.float32)
        best = np.full(_LANES, np.inf, np.float32)
        for c in range(scales.shape[0]):
            loss = np.zeros(_LANES, np.float32)
            s[:rows], z[:rows] = scales[c, first : first + rows], zeros[c, first : first + rows]
            x[:, :rows] = w[first : first + rows].T
            for j in range(g):
                ujj = u[j, j]
                if mantissa < 0:
                    for r in range(_LANES):
                        v = min(max(np.rint(x[j, r] / s[r]) + z[r], low), high) - z[r]
                        e[j, r] = (x[j, r] - v * s[r]) / ujj
                else:
                    for r in range(_LANES):
                        v = min(max(x[j, r] / s[r], low), high)
                        field = (np.float32(v).view(np.int32) >> np.int32(23)) & np.int32(255)
                        field = max(field - np.int32(127), least) - mantissa + np.int32(127)
                        step = np.int32(field << np.int32(23)).view(np.float32)
                        e[j, r] = (x[j, r] - np.rint(v / step) * step * s[r]) / ujj
                for r in range(_LANES):
                    loss[r] += e[j, r] * e[j, r]
                for k in range(j + 1, g):
                    f = u[j, k]
                    for r in range(_LANES):
                        x[k, r] -= e[j, r] * f
            for r in range(rows):
                losses[c, first + r] = loss[r]
                if c == 0 or loss[r] < best[r]:
                    best[r] = loss[r]
                    weights[first + r] = x[:, r]
                    errors[first + r] = e[:, r]


def _round_in_torch(w: Tensor, u: Tensor, scales: Tensor, zeros: Tensor, element: Element) -> Rounded:
    """The same loop, all rows and candidates at a time."""
    x = w.expand(len(scales), *w.shape).clone()
    errors = torch.empty_like(x)
    for j in range(w.shape[1]):
        scaled = x[..., j] / scales
        if element.kind == "int":
            value = (torch.round(scaled) + zeros).clamp(element.min, element.max) - zeros
        else:
            value = element.decode(element.encode(scaled))
        error = (x[..., j] - value * scales) / u[j, j]
        x[..., j + 1 :] -= error.unsqueeze(-1) * u[j, j + 1 :]
        errors[..., j] = error
    losses = errors.square().sum(-1)
    best = losses.argmin(0), torch.arange(len(w), device=w.device)
    return Rounded(x[best], errors[best], losses)
