"""How errors travel: the factors of Hessians, `H = M D M^T`, M upper triangular with ones on its diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import LowbitError

# The damping asked for, and what is tried where rounding left the matrix indefinite even so.
STEPS = (1.0, 10.0, 100.0)
ROWS = 1024
"""Rows of Hessians that are brought into order at a time: they may be most of what memory holds."""
# Columns of a panel: cuSOLVER factors many small matrices at once well, large ones one after the other.
_PANEL = 256


@dataclass(frozen=True, slots=True)
class Factors:
    """M and D of Hessians (E, K, K) whose columns were brought into `order`, and the damping that each took."""

    # (E, K).
    order: Tensor
    # (E, K, K), each column by column in memory; what lies below the diagonals is arbitrary.
    m: Tensor
    # (E, K): the diagonals of D.
    d: Tensor
    damping: tuple[float, ...]


def factors(hessian: Tensor, order: Tensor, damping: float) -> Factors:
    """The factors of `hessian` (E, K, K) with rows and columns in `order` (E, K), damped; it is copied once.

    Added to each diagonal is `damping` times its mean, or 10 or 100 times as much where rounding left the matrix
    indefinite. A column without inputs matters to no other.

    With J that reverses the order and `J H J = L L^T`, `J L J = M D^(1/2)`.

    Raises:
        LowbitError: a matrix is not positive definite even so.
    """
    # Column by column in memory, as LAPACK wants it, which otherwise works on a copy.
    m = hessian.new_empty(hessian.shape, dtype=torch.float32).mT
    dampings = [damping] * len(m)
    for e in _factor(hessian, order, damping, m).nonzero().flatten().tolist():
        one = slice(e, e + 1)
        for step in STEPS[1:]:
            dampings[e] = damping * step
            if not int(_factor(hessian[one], order[one], dampings[e], m[one])):
                break
        else:
            raise LowbitError(
                f"the Hessian is not positive definite, not even with {damping * STEPS[-1]:g} of the mean of its "
                "diagonal added to it; it must be a sum of x x^T over inputs x"
            )
    roots = m.diagonal(dim1=1, dim2=2).clone()
    _reverse(m.div_(roots[:, None]))
    return Factors(order, m, roots.square().flip(1), tuple(dampings))


def _factor(hessian: Tensor, order: Tensor, damping: float, lower: Tensor) -> Tensor:
    """Write L of every Hessian, brought into order, reversed and damped; which of them failed (E,)."""
    backwards, k = order.flip(1), order.shape[1]
    for rows, place in zip(backwards.split(ROWS, 1), lower.mT.split(ROWS, 1), strict=True):
        taken = hessian.gather(1, rows[:, :, None].expand(-1, -1, k))
        place.copy_(taken.gather(2, backwards[:, None].expand(taken.shape)))
    diagonal = lower.diagonal(dim1=1, dim2=2)
    diagonal.add_((diagonal == 0).to(diagonal.dtype))
    diagonal.add_(damping * diagonal.mean(1, keepdim=True))
    if lower.is_cuda and len(lower) > 1:
        return cholesky_by_panels(lower)
    failed = torch.empty(len(lower), dtype=torch.int32, device=lower.device)
    # In place: the output is the input.
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return failed


def cholesky_by_panels(lower: Tensor) -> Tensor:
    """Write over the lower triangle of matrices (E, K, K) their Cholesky factor, and tell which failed (E,)."""
    failed = torch.zeros(len(lower), dtype=torch.int32, device=lower.device)
    for a in range(0, lower.shape[1], _PANEL):
        panel = lower[:, a:, a : a + _PANEL]
        if a:
            panel.sub_(lower[:, a:, :a] @ lower[:, a : a + _PANEL, :a].mT)
        width = panel.shape[2]
        top, info = torch.linalg.cholesky_ex(panel[:, :width])
        failed |= info
        identity = torch.eye(width, device=lower.device).expand(top.shape)
        inverse = torch.linalg.solve_triangular(top, identity, upper=False)
        panel[:, width:] = panel[:, width:] @ inverse.mT
        panel[:, :width] = top
    return failed


def _reverse(square: Tensor) -> None:
    """Reverse rows and columns of matrices (E, K, K) in place, a few columns and their counterparts at a time."""
    k, columns = square.shape[1], square.mT
    half = (k + 1) // 2
    for a in range(0, half, ROWS):
        b = min(a + ROWS, half)
        first, last = columns[:, a:b], columns[:, k - b : k - a]
        kept = first.flip(1, 2)
        first.copy_(last.flip(1, 2))
        last.copy_(kept)
