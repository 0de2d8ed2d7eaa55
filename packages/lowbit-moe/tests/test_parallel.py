"""Experts of two and of three gloo ranks, beside one rank that has all of them and every token."""

from __future__ import annotations

import pytest
import torch
from ranked import alone, together
from ranks import ranks

from lowbit import FormatError
from lowbit_moe import parallel_swiglu_experts


@pytest.fixture(scope="module", params=[2, 3])
def started(request):
    with ranks(request.param) as several:
        yield request.param, several


@pytest.mark.parametrize(
    ("recipe", "payload", "most"),
    [("BF16", None, 1e-5), ("MXFP8", None, 1e-5), ("MXFP8", "MXFP8", 0.1), ("FP8_ROW", "e4m3fn:1x*:e8m0", 0.1)],
)
def test_ranks_together_are_one(started, recipe, payload, most):
    """Tokens are rounded alike; of what comes back, and of gradients, codes of 4 digits are one rounding more."""
    count, several = started
    sizes, wanted = alone(recipe, count)
    found = several.run(together, recipe, payload)
    merged = [torch.cat(parts) for parts in zip(*found, strict=True)]
    assert [len(each[0]) for each in found] == sizes
    for one, other in zip(merged, wanted, strict=True):
        assert (one - other).norm() <= most * other.norm()


def test_what_cannot_travel_is_refused():
    x, chosen = torch.zeros(3, 64), torch.zeros(3, 1, dtype=torch.int64)
    for payload in ("FP8_128x128", "NVFP4", "FP8_TENSOR"):
        with pytest.raises(FormatError, match="rows travel in formats whose blocks are parts of one row"):
            parallel_swiglu_experts(x, chosen, chosen, x, x, group=None, payload=payload)
