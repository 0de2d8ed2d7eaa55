"""How errors travel: the factors of a Hessian, `H = M D M^T`, M upper triangular with ones on its diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import LowbitError

# The damping asked for, and what is tried where rounding left the matrix indefinite even so.
STEPS = (1.0, 10.0, 100.0)
# Rows of a Hessian that are brought into order at a time: it may be most of what memory holds.
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Factors:
    """M and D of a Hessian whose columns were brought into `order`, and the damping that it took."""

    order: Tensor
    # M with rows and columns reversed, which is what Cholesky's factor is but for the lengths of its columns.
    _reversed: Tensor
    # (K,): the diagonal of D.
    d: Tensor
    damping: float

    def m(self, rows: slice, columns: slice) -> Tensor:
        """A block of M."""
        k = len(self.d)
        (a, b, _), (c, d, _) = rows.indices(k), columns.indices(k)
        return self._reversed[k - b : k - a, k - d : k - c].flip(0, 1)


def factors(hessian: Tensor, order: Tensor, damping: float) -> Factors:
    """The factors of `hessian` (K, K) with its rows and columns in `order`, damped; it is copied once.

    Added to the diagonal is `damping` times its mean, or 10 or 100 times as much where rounding left the matrix
    indefinite. A column without inputs matters to no other.

    With J that reverses the order and `J H J = L L^T`, `J L J = M D^(1/2)`.

    Raises:
        LowbitError: the matrix is not positive definite even so.
    """
    backwards = order.flip(0)
    # Column by column in memory, as LAPACK wants it, which otherwise works on a copy.
    lower = hessian.new_empty(hessian.shape, dtype=torch.float32).mT
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for step in STEPS:
        for rows, place in zip(backwards.split(_ROWS), lower.mT.split(_ROWS), strict=True):
            place.copy_(hessian[rows][:, backwards])
        diagonal = lower.diagonal()
        diagonal.add_((diagonal == 0).to(diagonal.dtype))
        diagonal.add_(damping * step * diagonal.mean())
        # In place: the output is the input.
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed):
            roots = diagonal.clone()
            return Factors(order, lower.div_(roots), roots.square().flip(0), damping * step)
    raise LowbitError(
        f"the Hessian is not positive definite, not even with {damping * STEPS[-1]:g} of the mean of its diagonal "
        "added to it; it must be a sum of x x^T over inputs x"
    )
