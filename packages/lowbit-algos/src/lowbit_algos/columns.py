"""GPTQ's loop over the columns of a group: compiled for CPUs; elsewhere a backend's kernel, or torch's operators.

Rows are independent. With `H = M D M^T`, each goes through the columns j in order, in float32:

    q_j = value of the code nearest to x_j,   x_k += (w_j - q_j) M_jk   for k > j     (x is w at first)

and takes, of several candidates for its scale, the one with the least `sum_j D_j (x_j - q_j)^2`: what the group adds to
`(w - q) H (w - q)^T`, since that is the sum over all columns. It is GPTQ without an inverse of the Hessian.

Source: Frantar et al., "GPTQ", section 3; Chee et al., "QuIP", theorem 6, for the equality of the two forms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit import Format, NoKernelError, Scales
from lowbit.backends import Call, Kernel, select
from lowbit.element import Element
from lowbit.format import WHOLE
from lowbit.numerics import total_scale

Floats = NDArray[np.float32]
# Rows that one core takes through a group side by side; 128 columns of them fill a first-level cache.
_LANES = 64


class Rounded(NamedTuple):
    """Columns of a group, rounded under each row's best candidate."""

    # (E, N, g): what was rounded, x_j, and w_j - q_j.
    targets: Tensor
    errors: Tensor
    # (C, E, N): what the group adds under each candidate.
    losses: Tensor


def round_columns(w: Tensor, x: Tensor, m: Tensor, d: Tensor, candidates: Scales, fmt: Format) -> Rounded:
    """Round one group of float32 columns `w` (E, N, g), which earlier ones made `x`, by M (E, g, g) and D (E, g).

    Candidates have scales (and zero points) for blocks of `fmt`'s rows: (C, E, N / rows, 1).
    """
    scales = _of_rows(total_scale(candidates), w, fmt)
    zeros = torch.zeros_like(scales) if candidates.zero is None else _of_rows(candidates.zero, w, fmt)
    if w.device.type != "cpu":
        kernel = kernel_for_columns("round_columns", fmt, w.device.type, w.shape[2])
        run = _round_in_torch if kernel is None else kernel.run
        return Rounded(*run(w, x, m, d, scales, zeros, fmt.element))
    w, element = w.contiguous(), fmt.element
    rounded = Rounded(torch.empty_like(w), torch.empty_like(w), torch.empty(scales.shape))
    integer = element.kind == "int"
    grid = (element.min, element.max, -1 if integer else element.mantissa, 0 if integer else 1 - element.bias)
    arrays = (w, x.contiguous(), m.contiguous(), d.contiguous(), scales, zeros)
    compiled: Any = _compiled
    threads = torch.get_num_threads()
    compiled(*(a.numpy() for a in arrays), np.array(grid, np.float32), *(part.numpy() for part in rounded))
    # Numba makes its number of threads OpenMP's, and so torch's, by which sums differ: a run that goes on would, too.
    torch.set_num_threads(threads)
    return rounded


def kernel_for_columns(op: str, fmt: Format, device: str, g: int) -> Kernel | None:
    """A backend's kernel of an op for groups of `g` columns; None: no installed one takes them.

    - `round_columns` takes and returns what `_round_in_torch` does.
    - `round_groups` takes a block of whole groups: w, x, m, d as that one; the inverses of M's blocks (E, G, g, g);
      shares of what a scale covers for the candidates; tensor scales, format and mode. It writes the best ones' scales
      (E, N, G), targets and errors, and may write over x.
    """
    try:
        return select(Call(f"algos.{op}", fmt, None, device, torch.float32, k=g), bound=False).kernel
    except NoKernelError:
        return None


def _of_rows(part: Tensor, w: Tensor, fmt: Format) -> Tensor:
    """(C, E, N / rows, 1) -> (C, E, N) in float32."""
    n = w.shape[1]
    rows = rows_a_scale(fmt, n)
    wide = part.squeeze(-1).to(torch.float32)
    return (wide if rows == 1 else wide.repeat_interleave(rows, 2)[..., :n]).contiguous()


def rows_a_scale(fmt: Format, n: int) -> int:
    """How many of n rows share a scale."""
    return n if fmt.block[0] == WHOLE else fmt.block[0]


# No reassociation: what this rounds to has to be what `lowbit.numerics.encode` rounds to.
@numba.njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def _compiled(  # noqa: C901 - one loop, whose inner ones become vector instructions
    w: Floats,
    given: Floats,
    m: Floats,
    d: Floats,
    scales: Floats,
    zeros: Floats,
    grid: Floats,
    targets: Floats,
    errors: Floats,
    losses: Floats,
) -> None:
    """The loop; `grid` is the element's low, high, bits of mantissa (-1: integers) and least exponent."""
    experts, n, g = w.shape
    low, high, mantissa, least = grid[0], grid[1], np.int32(grid[2]), np.int32(grid[3])
    tiles = (n + _LANES - 1) // _LANES
    for tile in numba.prange(experts * tiles):
        expert, first = tile // tiles, tile % tiles * _LANES
        rows = min(_LANES, n - first)
        x, e = np.zeros((g, _LANES), np.float32), np.zeros((g, _LANES), np.float32)
        s, z = np.ones(_LANES, np.float32), np.zeros(_LANES, np.float32)
        best = np.full(_LANES, np.inf, np.float32)
        for c in range(scales.shape[0]):
            loss = np.zeros(_LANES, np.float32)
            s[:rows], z[:rows] = scales[c, expert, first : first + rows], zeros[c, expert, first : first + rows]
            x[:, :rows] = given[expert, first : first + rows].T
            e[:, :rows] = w[expert, first : first + rows].T
            for j in range(g):
                weight = d[expert, j]
                if mantissa < 0:
                    for r in range(_LANES):
                        v = min(max(np.rint(x[j, r] / s[r]) + z[r], low), high) - z[r]
                        e[j, r] -= v * s[r]
                        loss[r] += weight * (x[j, r] - v * s[r]) ** 2
                else:
                    for r in range(_LANES):
                        v = min(max(x[j, r] / s[r], low), high)
                        field = (np.float32(v).view(np.int32) >> np.int32(23)) & np.int32(255)
                        field = max(field - np.int32(127), least) - mantissa + np.int32(127)
                        step = np.int32(field << np.int32(23)).view(np.float32)
                        v = np.rint(v / step) * step
                        e[j, r] -= v * s[r]
                        loss[r] += weight * (x[j, r] - v * s[r]) ** 2
                for k in range(j + 1, g):
                    f = m[expert, j, k]
                    for r in range(_LANES):
                        x[k, r] += e[j, r] * f
            for r in range(rows):
                losses[c, expert, first + r] = loss[r]
                if c == 0 or loss[r] < best[r]:
                    best[r] = loss[r]
                    targets[expert, first + r] = x[:, r]
                    errors[expert, first + r] = e[:, r]


def _round_in_torch(
    w: Tensor, x: Tensor, m: Tensor, d: Tensor, scales: Tensor, zeros: Tensor, element: Element
) -> tuple[Tensor, Tensor, Tensor]:
    """The same loop, all rows and candidates at a time."""
    x = x.expand(len(scales), *x.shape).clone()
    errors, losses = torch.empty_like(x), torch.zeros_like(scales)
    for j in range(w.shape[2]):
        scaled = x[..., j] / scales
        if element.kind == "int":
            value = (torch.round(scaled) + zeros).clamp(element.min, element.max) - zeros
        else:
            value = element.decode(element.encode(scaled))
        errors[..., j] = w[..., j] - value * scales
        losses += d[:, j : j + 1] * (x[..., j] - value * scales).square()
        x[..., j + 1 :] += errors[..., j : j + 1] * m[:, None, j, j + 1 :]
    best = losses.argmin(0)[None, :, :, None].expand(1, *w.shape)
    return x.gather(0, best)[0], errors.gather(0, best)[0], losses
