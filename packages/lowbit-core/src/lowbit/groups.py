"""Rows in groups, such as the tokens of each expert, moved apart so that every group begins at a multiple of a number.

Matrix units take rows by tiles, and a tile that two groups share belongs to neither. `pad_groups` moves the rows of
each group to where a tile begins and fills up with zeros; `unpad_groups` is its exact transpose. Group sizes stay on
the device: the result has as many rows as any sizes could need.

Offsets `offs` (G,) int32 are the ends of groups, in order; rows from the last one on belong to none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import FormatError

LARGEST = 256
"""The largest alignment."""


def padded_rows(rows: int, groups: int, align: int) -> int:
    """Rows that `groups` of `rows` in all take at most: `rows + groups (align - 1)`, down to a multiple of `align`."""
    return (rows + groups * (align - 1)) // align * align


def padded_ends(offs: Tensor, align: int) -> Tensor:
    """Ends (G,) int32 of groups once each is filled up to a multiple of `align`."""
    if align == 1:
        return offs.clone()
    return ((_sizes(offs) + (align - 1)) // align * align).cumsum(0, dtype=torch.int32)


def padded_from(offs: Tensor, align: int, rows: int, padded: int) -> Tensor:
    """Which of `rows` rows each of `padded` ones is, int64; -1: none, it is filling."""
    ends = padded_ends(offs, align)
    row = torch.arange(padded, device=offs.device, dtype=torch.int32)
    group = torch.searchsorted(ends, row, right=True).clamp_max(len(offs) - 1)
    source = row - _starts(ends)[group] + _starts(offs)[group]
    return torch.where((row < ends[-1]) & (source < offs[group]) & (source < rows), source, -1).to(torch.int64)


def padded_to(offs: Tensor, align: int, rows: int, padded: int) -> Tensor:
    """Where each of `rows` rows is among `padded` ones, int64; -1: it is in no group, or beyond them."""
    row = torch.arange(rows, device=offs.device, dtype=torch.int32)
    group = torch.searchsorted(offs, row, right=True).clamp_max(len(offs) - 1)
    place = row - _starts(offs)[group] + _starts(padded_ends(offs, align))[group]
    return torch.where((row < offs[-1]) & (place < padded), place, -1).to(torch.int64)


def pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of `x` (M, ..) by number; zeros for -1."""
    if x.shape[0] == 0:
        return x.new_zeros(rows.shape[0], *x.shape[1:])
    # Not all devices move 8-bit floats; their bytes are what is moved.
    raw = x.view(torch.uint8) if x.dtype.itemsize == 1 else x
    there = (rows >= 0).view(-1, *(1,) * (x.dim() - 1))
    picked = raw.index_select(0, rows.clamp_min(0))
    return torch.where(there, picked, torch.zeros_like(picked)).view(x.dtype)


def check_groups(x: Tensor, index: Tensor | None, offs: Tensor, align: int) -> None:
    """Refuse what no rows can be moved by.

    Raises:
        FormatError: `x` is no matrix, `offs` are not (G,) int32 with G of 1 or more, `index` is not (M,) of
            integers, or `align` is not from 1 to 256.
    """
    if x.dim() != 2:
        raise FormatError(f"rows of groups are a matrix (M, K); these have shape {tuple(x.shape)}")
    if offs.dim() != 1 or offs.shape[0] == 0 or offs.dtype != torch.int32:
        raise FormatError(
            f"offs are (G,) int32, the ends of one group or more; these are {offs.dtype} {tuple(offs.shape)}"
        )
    if index is not None and (index.dim() != 1 or index.dtype not in {torch.int32, torch.int64}):
        raise FormatError(f"index is (M,) int32 or int64, rows of x; this is {index.dtype} {tuple(index.shape)}")
    if not 1 <= align <= LARGEST:
        raise FormatError(f"align={align} is not from 1 to {LARGEST}")


def one_format(other_format: str | None) -> str:
    """The format of columns where rows have none.

    Raises:
        FormatError: columns have none either.
    """
    if other_format is None:
        raise FormatError("quantize_groups needs a format of rows, of columns, or both; there is none")
    return other_format


def _starts(ends: Tensor) -> Tensor:
    return torch.nn.functional.pad(ends[:-1], (1, 0))


def _sizes(offs: Tensor) -> Tensor:
    return offs - _starts(offs)
