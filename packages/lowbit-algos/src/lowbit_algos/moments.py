"""What is known of a weight's inputs when it is rounded, and what rounding those inputs costs.

A layer that is fed q for x comes closest to `W x` with other weights than W. With `H = sum q q^T` and
`E = sum (x - q) q^T` they are `W + W E (H + d I)^-1`: what of an input's rounding error can be told from the other
channels is taken out again. What so many columns seem to gain by chance is not believed: the correction is made smaller
by that share, down to none.

Source: the normal equations; James and Stein, "Estimation with Quadratic Loss", for how much of them is believed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import LowbitError
from lowbit_algos.factor import STEPS
from lowbit_algos.inputs import Input


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over inputs x as they are rounded, q: of a matrix, or of each expert."""

    # `sum q q^T` (K, K) or (E, K, K), and over how many.
    hessian: Tensor
    tokens: tuple[int, ...]
    # `sum (x - q) q^T`, and `sum (x - q)^2` (K,) or (E, K), where inputs are rounded.
    cross: Tensor | None = None
    squares: Tensor | None = None


def lacking(found: Input, least: int | None) -> Tensor:
    """How many tokens of their own (E,) experts lack of `least`, by default of as many as columns."""
    return ((found.hessian.hessian.shape[-1] if least is None else least) - own_tokens(found)).clamp_min(0)


def own_tokens(found: Input) -> Tensor:
    """How many tokens (E,) the model itself sent to each expert."""
    return found.hessian.tokens if found.extra is None else found.hessian.tokens - found.extra


def moments_of(found: Input, least: int | None) -> tuple[Moments, tuple[int, ...]]:
    """The moments of an input, and the experts that saw fewer than `least` tokens (by default as many as columns).

    What these lack they are given of the mean of all experts' tokens, also where they were topped up: of hardly more
    tokens than columns alone, GPTQ would learn the noise. An expert that saw none has the mean alone.
    """
    hessian, tokens = found.hessian.hessian, found.hessian.tokens
    lost = (None, None) if found.lost is None else (found.lost.cross, found.lost.squares)
    whole = Moments(hessian, tuple(tokens.tolist()), *lost)
    if hessian.dim() == 2:
        return whole, ()
    lacks = lacking(found, least)
    starved = tuple(lacks.nonzero().flatten().tolist())
    if not starved:
        return whole, ()

    def fed(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        # Tokens that were sent besides make the mean weigh more, as they do each expert's own part.
        share = (lacks / own_tokens(found).sum()).view(-1, *(1,) * (part.dim() - 1))
        return torch.addcmul(part, share.to(part.dtype), part.sum(0))

    joined = fed(hessian)
    assert joined is not None
    return Moments(joined, tuple((own_tokens(found) + lacks).tolist()), *map(fed, lost)), starved


def fit(weight: Tensor, moments: Moments, k_axis: int, damping: float) -> Tensor:
    """The float32 weight whose products with rounded inputs come closest to those of `weight` with plain ones.

    Where inputs are not rounded, it is `weight` itself. Shapes are as for `lowbit_algos.solve`; `damping` is d, as a
    share of the mean of H's diagonal.

    Raises:
        LowbitError: a Hessian is not positive definite.
    """
    if moments.cross is None or moments.squares is None:
        return weight
    w = weight.to(torch.float32).movedim(k_axis, -1)
    if w.dim() == 2:
        return _fit(w, moments.hessian, moments.cross, moments.squares, moments.tokens[0], damping).movedim(-1, k_axis)
    each = zip(w, moments.hessian, moments.cross, moments.squares, moments.tokens, strict=True)
    return torch.stack([_fit(*given, damping) for given in each]).movedim(-1, k_axis)


def _fit(w: Tensor, hessian: Tensor, cross: Tensor, squares: Tensor, tokens: int, damping: float) -> Tensor:
    k = w.shape[1]
    if tokens <= k:
        return w
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    # As much damping as GPTQ itself would come to.
    for step in STEPS:
        # In place, and column by column in memory: LAPACK would else work on a copy of what may be most of memory.
        factor = hessian.clone(memory_format=torch.contiguous_format).mT
        factor.diagonal().add_(damping * step * mean)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not int(failed):
            break
    else:
        raise LowbitError(
            f"the Hessian of rounded inputs is not positive definite, not even with {damping * STEPS[-1]:g} of the "
            "mean of its diagonal added to it"
        )
    wanted = w @ cross
    change = torch.cholesky_solve(wanted.T, factor).T
    gain, error = float((change * wanted).sum()), float(w.square().sum(0) @ squares)
    # Each of K columns chosen to lower the error takes one token's worth of it by chance.
    chance = k * max(error - gain, 0.0) / (tokens - k)
    return w + max(1 - chance / gain, 0.0) * change if gain > 0 else w
