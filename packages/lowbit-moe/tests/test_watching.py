"""Hooks that name where numbers stop being finite, and count what rounding loses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit_moe import NonFiniteError, convert_, watch


def model(recipe="MXFP8"):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))
    convert_(made, recipe)
    return made


def test_the_first_activation_that_is_not_finite_is_named():
    watched, x = model(), torch.randn(8, 64)
    with torch.no_grad():
        watched[2].weight[3, 4] = torch.inf
    with (
        pytest.raises(NonFiniteError, match=r"of the output of 2 \(TrainedLinear\), shape \(8, 16\), are not finite"),
        watch(watched),
    ):
        watched(x)
    # Nothing is left behind.
    assert not watched(x).isfinite().all()
    x[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"1 of 512 numbers of the input of 0 \(TrainedLinear\)"), watch(watched):
        watched(x)


def test_the_first_gradient_that_is_not_finite_is_named():
    watched, x = model(), torch.randn(8, 64, requires_grad=True)
    with watch(watched), pytest.raises(NonFiniteError, match="of the gradient of the output of 2"):
        (watched(x) * torch.inf).sum().backward()


def test_a_gradient_of_a_weight_is_looked_at():
    watched, x = model("BF16"), torch.full((8, 64), 1e30)
    with torch.no_grad():
        watched[0].weight.mul_(1e-30)
    # Each is finite, and their sums of products are not.
    with watch(watched), pytest.raises(NonFiniteError, match="of the gradient of weight of 0"):
        (watched[0](x) * 1e30).sum().backward()


def test_what_rounding_loses_is_counted():
    watched, x = model("FP8_ROW"), torch.ones(4, 64)
    # Beside 448, of one scale, half of the smallest subnormal number, 2^-9, rounds to 0, and 1.5 of it does not.
    x[0], x[0, 0], x[0, 1] = 2.0**-10, 448.0, 1.5 * 2.0**-9
    x[1, ::2] = 0
    with watch(watched, rates=True) as seen:
        watched(x).sum().backward()
    found = seen.lost["0"]
    assert found["input"].underflow == 62 / (256 - 32)
    assert found["input"].overflow == found["weight"].overflow == 0
    assert set(found) == {"input", "weight", "gradient"}
    assert 0 <= found["weight"].underflow < 0.01
    assert set(seen.lost) == {"0", "2"}
