"""lowbit.bench.inputs: what benchmarks run on, and the measure of accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.bench.inputs import EXACT, normal, sqnr

CPU = torch.device("cpu")


def test_values_are_normal_and_the_same_for_a_seed():
    x = normal(300, 400, kind="normal", seed=3, device=CPU)
    assert x.dtype == torch.bfloat16
    assert float(x.float().std()) == pytest.approx(1, abs=0.02)
    assert (x == 0).sum() < 10
    assert torch.equal(x, normal(300, 400, kind="normal", seed=3, device=CPU))
    assert not torch.equal(x, normal(300, 400, kind="normal", seed=4, device=CPU))


@pytest.mark.parametrize(("columns", "outliers"), [(400, 4), (32, 1)])
def test_one_column_in_a_hundred_is_thirty_times_as_large(columns, outliers):
    x = normal(1000, columns, kind="outliers", seed=0, device=CPU).float()
    spread = x.std(0)
    assert int((spread > 20).sum()) == outliers
    assert spread[spread > 20].tolist() == pytest.approx([30.0] * outliers, rel=0.1)


def test_sqnr_in_decibels():
    exact = torch.tensor([3.0, 4.0])
    assert sqnr(exact, torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr(exact, torch.tensor([3.0, 4.0 + 5 * 10**-2.5])) == pytest.approx(50.0, abs=1e-3)
    assert sqnr(exact, exact) == sqnr(torch.zeros(2), torch.zeros(2)) == EXACT
    assert sqnr(exact, torch.tensor([math.nan, 4.0])) == sqnr(exact, torch.tensor([math.inf, 4.0])) == -EXACT
    assert sqnr(torch.zeros(2), exact) == -EXACT
