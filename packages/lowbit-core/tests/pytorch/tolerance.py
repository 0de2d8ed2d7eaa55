"""How far a compiled model may be from the same model in eager mode."""

from __future__ import annotations

import torch
from cells import H
from torch.nn import functional

from lowbit import QuantizedTensor


def assert_computed(row, made, found, x):
    """`found` is what `made` gives for `x` but for the order of sums.

    Every token is within the rounding of H float32 terms. Where inputs are rounded to codes, that rounding may bring a
    few hidden values to a neighbouring code: a fifth of the tokens, or one, may be off by one such step times the largest
    weight.
    """
    with torch.no_grad():
        wanted = made(*x)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if not wanted.numel():
        return
    error = (found - wanted).abs().amax(-1)
    sums = H * 2.0**-24 * float(wanted.abs().max())
    if row.activation is None:
        assert float(error.max()) <= sums
    else:
        assert int((error > sums).sum()) <= max(1, len(error) // 5)
        assert float(error.max()) <= sums + step(made, x)


@torch.no_grad()
def step(made, x):
    """Between neighbouring codes of the largest hidden value (3 bits of mantissa at least), through a weight."""
    down = made.down if isinstance(made.down, QuantizedTensor) else made.down.weight
    up = functional.grouped_mm(x[0], made.up.mT, offs=x[1]) if isinstance(made.up, QuantizedTensor) else made.up(x[0])
    return 2.0**-3 * float(functional.silu(up).abs().max()) * float(down.dequantize().abs().max())
