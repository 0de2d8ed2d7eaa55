"""What benchmarks run on, never zeros, whose products take less power: normal values, and some with outliers."""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["normal", "outliers"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

EXACT: Final = 200.0
"""SQNR in dB that stands for no difference at all, and negated for results that are not finite."""

_OUTLIERS, _SHARE = 30.0, 0.01


def normal(*shape: int, kind: Kind, seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values; of kind `outliers`, 1 % of the columns (one at least) 30 times as large, as in activations."""
    # A generator of its own: torch's is of no use once a capture of a CUDA graph failed.
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    if kind == "outliers":
        k = shape[-1]
        x[..., torch.randperm(k, generator=generator, device=device)[: max(round(_SHARE * k), 1)]] *= _OUTLIERS
    return x


def sqnr(exact: Tensor, found: Tensor) -> float:
    """Signal to quantization noise in dB, `20 log10(|exact| / |exact - found|)`, within `EXACT` of 0."""
    noise = float(torch.linalg.vector_norm(exact.float() - found.float(), dtype=torch.float64))
    signal = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
    if not math.isfinite(noise) or not signal:
        return EXACT if not noise else -EXACT
    return EXACT if not noise else min(max(20 * math.log10(signal / noise), -EXACT), EXACT)
