"""The factor U of an inverse Hessian, `U^T U = H^-1`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import LowbitError

# The damping asked for, and what is tried where rounding left the matrix indefinite even so.
_STEPS = (1.0, 10.0, 100.0)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """U (K, K), upper triangular, of `H + d mean(diag H) I`, and d: `damping`, or if need be 10 or 100 times that.

    With J that reverses the order and `J H J = L L^T`, `U = J L^-1 J`: one factorization and one triangular inverse.

    Raises:
        LowbitError: the matrix is not positive definite even so.
    """
    mean = hessian.diagonal().mean()
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    for step in _STEPS:
        lower, failed = torch.linalg.cholesky_ex((hessian + identity * (damping * step * mean)).flip(0, 1))
        if not int(failed):
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), damping * step
    raise LowbitError(
        f"the Hessian is not positive definite, not even with {damping * _STEPS[-1]:g} of the mean of its diagonal "
        "added to it; it must be a sum of x x^T over inputs x"
    )
