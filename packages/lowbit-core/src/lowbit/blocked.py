"""Scales as the block-scaled products of tensor cores read them: in tiles of 128 rows by 4 columns, each 512 in a run.

A tile holds the scale of its row `r` and column `c` at `(r % 32) * 16 + (r // 32) * 4 + c`; tiles stand row by row, and
those at the edges are padded with zeros.

Source: NVIDIA's cuBLAS documentation, "1D Block Scaling Factors Layout"; torch calls it `SWIZZLE_32_4_4`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import FormatError

__all__ = ["blocked_shape", "from_blocked", "to_blocked"]

_ROWS, _COLUMNS = 128, 4


def blocked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (.., R/128, C/4, 32, 16) that scales of natural shape (.., R, C) have in tiles; a vector is one row."""
    *lead, rows, columns = shape if len(shape) > 1 else (1, *shape)
    return (*lead, -(-rows // _ROWS), -(-columns // _COLUMNS), 32, 16)


def to_blocked(scale: Tensor) -> Tensor:
    """Scales of natural shape (.., R, C), of any dtype, in tiles of `blocked_shape`."""
    *lead, down, along, _, _ = blocked_shape(tuple(scale.shape))
    raw = torch.atleast_2d(_bytes(scale))
    tiles = raw.new_zeros(*lead, down * _ROWS, along * _COLUMNS)
    tiles[..., : raw.shape[-2], : raw.shape[-1]] = raw
    tiles = tiles.reshape(*lead, down, 4, 32, along, _COLUMNS).transpose(-4, -2)
    return tiles.reshape(*lead, down, along, 32, 16).view(scale.dtype)


def from_blocked(tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales of natural `shape` from the tiles that `to_blocked` laid them out in.

    Raises:
        FormatError: the tiles are not of that shape.
    """
    *lead, down, along, _, _ = needed = blocked_shape(shape)
    if tuple(tiles.shape) != needed:
        raise FormatError(f"tiles of shape {tuple(tiles.shape)} do not hold scales of {shape}; needed is {needed}")
    raw = _bytes(tiles).reshape(*lead, down, along, 32, 4, _COLUMNS).transpose(-4, -2)
    raw = raw.reshape(*lead, down * _ROWS, along * _COLUMNS)
    rows, columns = (1, *shape)[-2:]
    return raw[..., :rows, :columns].reshape(shape).view(tiles.dtype)


def _bytes(scale: Tensor) -> Tensor:
    """8-bit floats as bytes: few operators take their dtypes."""
    return scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale
