"""The grid of formats, shapes that fit them, and bounds that hold and are not idle."""

from __future__ import annotations

from math import inf

import pytest
import torch

from lowbit import FORMATS, FormatError, quantize
from lowbit.format import Format
from lowbit.grid import FORMAT_GRID, product_bound, rounding_bound, sample, shapes


def test_the_grid_has_every_constant_and_no_format_twice():
    assert set(FORMATS.values()) < set(FORMAT_GRID)
    assert len(set(FORMAT_GRID)) == len(FORMAT_GRID)


@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_shapes_fit_every_rank_that_the_block_allows(fmt):
    found = shapes(fmt)
    for shape in found:
        fmt.block_of(shape)
        assert any(n > b for n, b in zip(shape, fmt.block_of(shape), strict=True)) or 0 in fmt.block
    for rank in {1, 2, 3, 4} - {len(shape) for shape in found}:
        with pytest.raises(FormatError, match="too small for block"):
            fmt.block_for(rank)


@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_the_rounding_bound_is_reached_to_a_half(fmt):
    """A bound that nothing comes near would let a broken kernel pass."""
    modes = ["floor", "ceil", "even", "rceil"] if fmt.scale.name == "e8m0" else ["even"]
    worst = 0.0
    for seed in range(20):
        for mode in modes:
            x = sample(shapes(fmt)[0], seed=seed)
            error = (quantize(x, fmt, mode=mode).dequantize() - x).abs().max()
            worst = max(worst, (error / x.abs().max()).item())
    assert rounding_bound(fmt) / 2.5 <= worst <= rounding_bound(fmt)


def test_no_bound_where_negative_values_are_lost():
    assert rounding_bound(Format.parse("uint4:1x*:float32")) == inf


@pytest.mark.parametrize("k", [1, 100, 10_000])
def test_the_product_bound_holds_and_is_not_idle(k):
    a, b = sample((5, k)), sample((7, k), seed=1)
    exact = a.to(torch.float64) @ b.to(torch.float64).T
    # The worst order there is: one after the other.
    serial = torch.zeros(5, 7)
    for i in range(k):
        serial += a[:, i : i + 1] * b[:, i]
    bound = product_bound(a, b)
    for product in (a @ b.T, serial):
        assert ((product.to(torch.float64) - exact).abs() <= bound).all()
    assert (bound <= k * 2.0**-22 * a.norm(dim=1, keepdim=True).to(torch.float64) * b.norm(dim=1)).all()


def test_samples_repeat():
    assert torch.equal(sample((3, 4)), sample((3, 4)))
    assert not torch.equal(sample((3, 4)), sample((3, 4), seed=1))
    assert sample((2, 3), dtype=torch.bfloat16).dtype == torch.bfloat16
