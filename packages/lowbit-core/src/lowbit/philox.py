"""Philox4x32-10: random numbers as a function of (seed, element index), so that every backend draws the same bits.

Element `i` takes word `i % 4` of the block with counter `i // 4`; key and counter are 64 bits wide.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123's known answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def offset_seed(seed: int | Tensor, offset: Tensor | None) -> int | Tensor:
    """The seed `seed + offset`; that of an int64 () tensor stays where it is."""
    return seed if offset is None else offset + seed


def uniform(count: int, seed: int | Tensor, *, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Float32 (count,) in [0, 1), multiples of 2^-24: the draws of elements `offset ..< offset + count`."""
    index = torch.arange(offset, offset + count, dtype=torch.int64, device=device)
    words = philox(index >> 2, seed)
    lane = (index & 3).unsqueeze(0)
    return (words.gather(0, lane).squeeze(0) >> 8).to(torch.float32) * 2.0**-24


def philox(counter: Tensor, seed: int | Tensor) -> Tensor:
    """Int64 (4, count) holding the four 32-bit words of each 64-bit int64 `counter` under the 64-bit `seed`."""
    zero = torch.zeros_like(counter)
    words = [counter & _MASK, (counter >> 32) & _MASK, zero, zero]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return torch.stack(words)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product; halves keep every partial product inside int64."""
    low = a * (b & 0xFFFF)
    mid = a * (b >> 16) + (low >> 16)
    return (mid >> 16) & _MASK, ((mid << 16) | (low & 0xFFFF)) & _MASK
