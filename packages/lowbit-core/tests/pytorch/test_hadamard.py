"""Hadamard matrices of many sizes, and rotations by them."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.hadamard import Rotation, hadamard

SIZES = [1, 2, 4, 8, 12, 20, 24, 28, 36, 64, 76, 84, 128, 256, 768, 896, 1152]


@pytest.mark.parametrize("n", SIZES)
def test_rows_are_orthogonal(n):
    h = hadamard(n)
    assert set(h.flatten().unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n))


@pytest.mark.parametrize("n", [2, 8, 64, 256])
def test_powers_of_two_are_sylvesters(n):
    """Whose entry (i, j) is the parity of the bits that i and j share."""
    parity = [[(i & j).bit_count() % 2 for j in range(n)] for i in range(n)]
    assert torch.equal(hadamard(n), 1 - 2 * torch.tensor(parity, dtype=torch.float32))


@pytest.mark.parametrize("n", SIZES)
def test_a_rotation_multiplies_each_piece_of_a_row(n):
    rotation = Rotation(n, seed=3)
    whole = rotation(torch.eye(n, dtype=torch.float64))
    assert torch.equal((whole * n**0.5).round().abs(), torch.ones(n, n, dtype=torch.float64))
    torch.testing.assert_close(whole @ whole.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(3, 2 * n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = (x.movedim(1, -1).reshape(3, 5, 2, n) @ whole).reshape(3, 5, 2 * n).movedim(-1, 1)
    torch.testing.assert_close(rotation(x, 1), wanted, rtol=0, atol=1e-12)


def test_signs_depend_on_the_seed_alone():
    x = torch.eye(64)
    assert torch.equal(Rotation(64, 1)(x), Rotation(64, 1)(x))
    assert not torch.equal(Rotation(64, 1)(x), Rotation(64, 2)(x))


@pytest.mark.parametrize("n", [0, -4, 3, 6, 52, 100])
def test_a_size_without_a_matrix_is_refused(n):
    for make in (hadamard, Rotation):
        with pytest.raises(FormatError, match=f"no Hadamard matrix of {n} rows is known"):
            make(n)


@pytest.mark.parametrize("size", [1, 2, 16, 32, 128])
def test_sums_in_order_are_the_rotation(size):
    x = torch.randn(3, 5, 384, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(size, seed=9)
    found, wanted = rotation.in_order(x.bfloat16()), rotation(x.bfloat16().double())
    # As many roundings as there are stages, and one for the root.
    bound = (size.bit_length() + 1) * 2.0**-24 * x.abs().max() * size**0.5
    assert (found - wanted).abs().max() <= bound
    assert found.dtype == torch.float32


def test_sums_in_order_need_powers_of_two():
    with pytest.raises(FormatError, match="power of two; these are of 12"):
        Rotation(12).in_order(torch.ones(2, 24))
    with pytest.raises(FormatError, match="rows of 24 do not divide into pieces of 16"):
        Rotation(16).in_order(torch.ones(2, 24))
