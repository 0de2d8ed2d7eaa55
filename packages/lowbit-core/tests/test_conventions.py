"""Tensor scales of others, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from lowbit import NVFP4, quantize
from lowbit.conventions import from_global_scale, from_weight_scale_2, to_global_scale, to_weight_scale_2


def nearest(wanted, found):
    """Whether no float32 is nearer to a fraction."""
    around = (found, *(np.nextafter(np.float32(found), np.float32(to)) for to in (0, np.inf)))
    return min(around, key=lambda near: abs(Fraction(float(near)) - wanted)) == found


def test_powers_of_two_come_back():
    powers = torch.tensor([2.0**e for e in range(-127, 128)]).reshape(-1, 1)
    there = to_global_scale(powers)
    assert [Fraction(g) * Fraction(t) for g, t in zip(there.tolist(), powers.flatten().tolist(), strict=True)] == [
        1
    ] * 255
    assert torch.equal(from_global_scale(there), powers)


def test_other_numbers_invert_to_the_nearest():
    amax = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).exp()
    given = amax / (448 * 6)
    there = to_global_scale(given)
    for t, g, back in zip(given.flatten(), there, from_global_scale(there).flatten(), strict=True):
        assert nearest(1 / Fraction(float(t)), g.item())
        assert nearest(1 / Fraction(float(g)), back.item())


def test_a_quantized_matrix_is_the_same_in_every_convention():
    q = quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), NVFP4)
    t = q.tensor_scale
    codes = q.dequantize(torch.float32).reshape(32, 4, 16) / (q.scale.float() * t).unsqueeze(-1)
    for value in (
        codes * (q.scale.float() / to_global_scale(t)).unsqueeze(-1),
        codes * (q.scale.float() * to_weight_scale_2(t)).unsqueeze(-1),
    ):
        assert torch.equal(value.reshape(32, 64), q.dequantize(torch.float32))
    assert (to_global_scale(t).shape, to_weight_scale_2(t).shape) == ((1,), ())
    assert torch.equal(from_global_scale(to_global_scale(t)), t)
    assert torch.equal(from_weight_scale_2(to_weight_scale_2(t)), t)
