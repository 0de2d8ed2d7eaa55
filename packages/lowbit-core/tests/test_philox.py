"""Philox4x32-10 against a plain-Python oracle that itself gives Random123's known answers."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.philox import philox, uniform

MASK = 2**32 - 1


def oracle(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox4x32-10, as the paper's figure has it."""
    x, k = list(counter), list(key)
    for _ in range(10):
        first, second = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(second >> 32) ^ x[1] ^ k[0], second & MASK, (first >> 32) ^ x[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return x


def words(number: int) -> list[int]:
    return [number & MASK, number >> 32 & MASK]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([MASK] * 4, [MASK] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_oracle_gives_the_known_answers(counter, key, answer):
    assert oracle(counter, key) == [int(word, 16) for word in answer.split()]


@pytest.mark.parametrize("seed", [0, 1, 0x9E3779B97F4A7C15, 2**63, 2**64 - 1, -1])
def test_blocks_are_those_of_the_oracle(seed):
    counters = [0, 1, 2, MASK, 2**32, 0x1234_5678_9ABC_DEF0, 2**63 - 1]
    blocks = philox(torch.tensor(counters), seed)
    assert blocks.dtype == torch.int64
    assert blocks.T.tolist() == [oracle([*words(c), 0, 0], words(seed)) for c in counters]


def test_block_zero_under_seed_zero_is_the_known_answer():
    assert philox(torch.tensor([0]), 0).flatten().tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 1001, 2**34 + 3])
def test_element_takes_its_word_of_its_block(offset):
    found = uniform(23, 77, offset=offset)
    assert found.dtype == torch.float32
    indices = range(offset, offset + 23)
    assert found.tolist() == [(oracle([*words(i // 4), 0, 0], words(77))[i % 4] >> 8) / 2**24 for i in indices]


def test_draws_depend_on_the_index_alone():
    whole = uniform(1000, 5)
    for cut in (0, 1, 2, 3, 499, 1000):
        assert torch.equal(torch.cat([uniform(cut, 5), uniform(1000 - cut, 5, offset=cut)]), whole)
    assert not torch.equal(uniform(1000, 6), whole)


def test_draws_are_uniform():
    count, cells = 2**20, 256
    draws = uniform(count, 2024)
    assert float(draws.min()) >= 0
    assert float(draws.max()) <= 1 - 2.0**-24
    observed = torch.bincount((draws * cells).to(torch.int64), minlength=cells).to(torch.float64)
    # Chi-squared of 255 degrees of freedom: mean 255, standard deviation sqrt(510).
    chi = float(((observed - count / cells) ** 2 / (count / cells)).sum())
    assert abs(chi - (cells - 1)) < 4.5 * math.sqrt(2 * (cells - 1))
