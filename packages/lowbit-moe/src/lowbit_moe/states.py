"""Means of gradients in 8 or 4 bits, by blocks of a row, and the step of AdamW that keeps them so.

A block's numbers are levels times its scale, which makes the largest number the highest level. Levels are a dynamic
tree: each octave has twice as many as the one below it, and an octave is a factor of 8, so that numbers of one block
may be 8^7 times as large as others, and the largest are apart by 1/73 of themselves. Powers of 8 instead of 10 make a
code a float whose exponent counts threefold, which kernels compute with instead of looking it up.

Source: Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022 (dynamic tree quantization); Li et
al., "Memory efficient optimizers with 4-bit states", NeurIPS 2023 (squares without a level of zero).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[8, 4, 32]
"""How many bits each of the two means of a parameter's gradients takes."""

BLOCKS: dict[int, int] = {8: 256, 4: 128, 32: 256}
"""How many numbers of a row share a scale, by bits."""

# Numbers that are worked on at once, so that what is computed on the way stays in a processor's cache.
_CHUNK = 1 << 18


@dataclass(slots=True)
class Item:
    """A parameter (R, C), its gradient, and its states: float32 (R, C), or codes and scales of blocks of each row."""

    parameter: Tensor
    gradient: Tensor
    # (), float32.
    step: Tensor
    # Codes are uint8 (R, C), or of 4 bits two a byte (R, ceil(C / 2)), the first in the low half.
    mean: Tensor
    # (R, ceil(C / block)).
    mean_scale: Tensor | None
    square: Tensor
    square_scale: Tensor | None
    # Which parameter of its optimizer it is.
    number: int


@cache
def levels(bits: int) -> Tensor:
    """Levels (2^bits,), rising: 8^(e - 1 - bits) * (7 w / 2^e - 6) of w = 2 code + 1, between 2^e and 2^(e + 1)."""
    w = 2 * torch.arange(1 << bits, dtype=torch.float64) + 1
    e = w.log2().floor()
    return (8 ** (e - 1 - bits) * (7 * w / 2**e - 6)).to(torch.float32)


def _codes(x: Tensor, bits: int) -> Tensor:
    """Codes, int32, of numbers from 0 to the highest level, or nearly: of the level in whose middle each lies.

    Octave i begins at 8^(i - bits), and has 2^i levels.
    """
    raw = x.view(torch.int32)
    # Thirds of small numbers by a product.
    octave = ((raw >> 23).sub_(127 - 3 * bits).clamp_(min=-3).add_(3).mul_(171) >> 9).sub_(1)
    within = raw - ((octave - bits) * 3 << 23)
    # From 1 to 8 evenly to 1 to 2, whose first digits are the code.
    even = within.view(torch.float32) * (1 / 7) + 6 / 7
    codes = (even.view(torch.int32) - 0x3F000000) >> (23 - octave)
    return codes.clamp_(max=(1 << bits) - 1).masked_fill_(octave < 0, 0)


@cache
def tables(bits: int) -> Tensor:
    """What codes of means, and after them those of squares, stand for; nothing of 32 bits."""
    return torch.empty(0) if bits == 32 else torch.cat([values(bits, signed=signed) for signed in (True, False)])


@cache
def values(bits: int, *, signed: bool) -> Tensor:
    """What each code (2^bits,), as its bits are counted, stands for, times its block's scale."""
    if signed:
        # A negative number's is that of what is opposite to it, in two's complement.
        half = levels(bits - 1).clone()
        half[0] = 0
        return torch.cat((half, torch.tensor([-1.0]), -half[1:].flip(0)))
    # Of 4 bits even steps, since octaves would be few; no level is zero, which would be divided by.
    return levels(8) if bits == 8 else torch.arange(1, 17, dtype=torch.float32) / 16


def decode(codes: Tensor, scale: Tensor, columns: int, bits: int, *, signed: bool) -> Tensor:
    """Numbers (R, `columns`), float32."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[:, :columns]
    found = values(bits, signed=signed).to(codes.device)[codes.int()]
    return found * scale.repeat_interleave(BLOCKS[bits], 1)[:, :columns]


def encode(x: Tensor, bits: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 numbers (R, C), of which none is negative unless they are signed."""
    rows, columns = x.shape
    block, magnitude_bits = BLOCKS[bits], bits - signed
    blocks = torch.nn.functional.pad(x, (0, -columns % block)).view(rows, -1, block)
    even = bits == 4 and not signed
    most = blocks.abs().amax(-1)
    scale = most if even else most * (1 / float(levels(magnitude_bits)[-1]))
    by = torch.where(scale > 0, 1 / scale, 0).unsqueeze(-1)
    if even:
        codes = ((blocks * (by * 16) + 0.5).to(torch.int32) - 1).clamp(0, 15)
    else:
        codes = _codes(blocks.abs() * by, magnitude_bits)
    if signed:
        codes = torch.where(torch.signbit(blocks), -codes, codes) & ((1 << bits) - 1)
    codes = codes.to(torch.uint8).view(rows, -1)
    if bits == 4:
        codes = codes[:, : columns + columns % 2]
        return codes[:, ::2] | (codes[:, 1::2] << 4), scale
    return codes[:, :columns].contiguous(), scale


def step_in_torch(
    items: Sequence[Item],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    bits: int,
    stochastic: bool,
    seed: int,
) -> None:
    """A step of AdamW in place, `step` having been counted, with the means m, v of gradients g and of their squares.

        m += (1 - beta1) (g - m),  v += (1 - beta2) (g^2 - v)
        p -= lr weight_decay p + lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

    It is computed in float32; p and states are rounded once, bfloat16 p by chance where it is `stochastic`.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    for item in items:
        lr, step = float(lr), float(item.step)
        size, shrink = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
        chance = None
        if stochastic and item.parameter.dtype == torch.bfloat16:
            chance = torch.Generator(item.parameter.device).manual_seed(
                int(step) << 32 | (seed + item.number) & 0xFFFFFFFF
            )
        for part in _pieces(item, bits):
            p, g = part.parameter.to(torch.float32), part.gradient.to(torch.float32)
            g = -g if maximize else g
            if part.mean_scale is None or part.square_scale is None:
                m, v = part.mean, part.square
            else:
                m = decode(part.mean, part.mean_scale, g.shape[1], bits, signed=True)
                v = decode(part.square, part.square_scale, g.shape[1], bits, signed=False)
            m.lerp_(g, 1 - betas[0])
            v.lerp_(g.square(), 1 - betas[1])
            p.mul_(1 - lr * weight_decay).addcdiv_(m, v.sqrt().mul_(shrink).add_(eps), value=-size)
            part.parameter.copy_(p if chance is None else _by_chance(p, chance))
            if part.mean_scale is not None and part.square_scale is not None:
                for codes, scale, x, signed in (
                    (part.mean, part.mean_scale, m, True),
                    (part.square, part.square_scale, v, False),
                ):
                    new = encode(x, bits, signed=signed)
                    codes.copy_(new[0])
                    scale.copy_(new[1])


def _pieces(item: Item, bits: int) -> Iterator[Item]:
    """Views of some rows, or of some whole blocks of a row, each."""
    rows, columns = item.parameter.shape
    high, wide, packed, block = max(_CHUNK // columns, 1), min(columns, _CHUNK), 2 if bits == 4 else 1, BLOCKS[bits]
    for r, c in product(range(0, rows, high), range(0, columns, wide)):
        these = slice(r, r + high)
        numbers, codes, scales = ((these, slice(c // n, -(-(c + wide) // n))) for n in (1, packed, block))
        yield Item(
            *(item.parameter[numbers], item.gradient[numbers], item.step),
            *(item.mean[codes], None if item.mean_scale is None else item.mean_scale[scales]),
            *(item.square[codes], None if item.square_scale is None else item.square_scale[scales], item.number),
        )


def _by_chance(p: Tensor, chance: torch.Generator) -> Tensor:
    """A bfloat16 next to each float32, as float32, the nearer the likelier; infinities and NaN stay so."""
    low = torch.randint(1 << 16, p.shape, generator=chance, dtype=torch.int32, device=p.device)
    moved = (p.view(torch.int32) + low) & -65536
    return torch.where(p.isfinite(), moved.view(torch.float32), p)


def narrow(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns (R, C) of a parameter: its first dimension, and all the others; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
