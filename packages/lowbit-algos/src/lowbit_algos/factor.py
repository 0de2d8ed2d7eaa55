"""How errors travel: the factors of a Hessian, `H = M D M^T`, M upper triangular with ones on its diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import LowbitError

# The damping asked for, and what is tried where rounding left the matrix indefinite even so.
_STEPS = (1.0, 10.0, 100.0)


def factors(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """M (K, K), the diagonal of D (K,), and what was added to the diagonal of H, as a share of its mean.

    That is `damping`, or 10 or 100 times as much where rounding left the matrix indefinite.

    With J that reverses the order and `J H J = L L^T`, `J L J = M D^(1/2)`.

    Raises:
        LowbitError: the matrix is not positive definite even so.
    """
    mean = hessian.diagonal().mean()
    for step in _STEPS:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * step * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper = lower.flip(0, 1)
            roots = upper.diagonal()
            return upper / roots, roots.square(), damping * step
    raise LowbitError(
        f"the Hessian is not positive definite, not even with {damping * _STEPS[-1]:g} of the mean of its diagonal "
        "added to it; it must be a sum of x x^T over inputs x"
    )
