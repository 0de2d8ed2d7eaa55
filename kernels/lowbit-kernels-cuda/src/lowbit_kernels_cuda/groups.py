"""The operators `pad_groups` and `unpad_groups`: every row is read once, from where it is, and written once.

Which row comes from where is found by bisection of the offsets, for some rows at a time, while their values are on the
way: nothing is told to the host, and no list of rows is in memory.
"""
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.groups import check_groups, padded_ends, padded_rows

# Rows of a program, and bytes of each.
_ROWS, _BYTES = 8, 2048


def pad_groups(x: Tensor, index: Tensor | None, offs: Tensor, align: int) -> tuple[Tensor, Tensor]:
    """The operator `pad_groups`.

    Raises:
        FormatError: as the operator.
    """
    check_groups(x, index, offs, align)
    rows = x.shape[0] if index is None else index.shape[0]
    ends = padded_ends(offs, align)
    out = x.new_empty(padded_rows(rows, offs.shape[0], align), x.shape[1])
    _launch(x, index, ends, offs, out, rows)
    return out, ends


def unpad_groups(x: Tensor, offs: Tensor, align: int, rows: int) -> Tensor:
    """The operator `unpad_groups`.

    Raises:
        FormatError: as the operator.
    """
    check_groups(x, None, offs, align)
    out = x.new_empty(rows, x.shape[1])
    _launch(x, None, offs, padded_ends(offs, align), out, x.shape[0])
    return out


def padded_sources(x: Tensor, index: Tensor | None, offs: Tensor, align: int) -> tuple[Tensor, Tensor]:
    """Which row of x (M, K) each row of `pad_groups` is, int32, negative for none; and the ends of the groups there."""
    rows = x.shape[0] if index is None else index.shape[0]
    ends = padded_ends(offs, align)
    out = torch.empty(padded_rows(rows, offs.shape[0], align), dtype=torch.int32, device=x.device)
    if out.numel():
        run: Any = _list[(triton.cdiv(out.shape[0], 256),)]
        steps, indexed = (len(ends) - 1).bit_length(), index is not None
        given = (index, ends, offs.contiguous(), out, out.shape[0], rows, x.shape[0], len(ends))
        run(*given, STEPS=steps, INDEXED=indexed, ROWS=256, num_warps=4)
    return out, ends


def _launch(x: Tensor, index: Tensor | None, into: Tensor, of: Tensor, out: Tensor, rows: int) -> None:
    """Write rows in groups that end at `into`, from those that end at `of`, of which there are `rows`."""
    if out.numel() == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    width, gap = x.shape[1] * x.element_size(), x.stride(0) * x.element_size()
    # As few and as wide values as rows and their places allow.
    size = next(s for s in (8, 4, 2, 1) if width % s == gap % s == x.data_ptr() % s == 0)
    wide = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size]
    columns = width // size
    block = min(triton.next_power_of_2(columns), _BYTES // size)
    run: Any = _move[triton.cdiv(out.shape[0], _ROWS), triton.cdiv(columns, block)]
    run(
        *(_bytes(x).view(wide), index, into.contiguous(), of.contiguous(), _bytes(out).view(wide)),
        *(out.shape[0], rows, x.shape[0], gap // size, columns, len(into)),
        STEPS=(len(into) - 1).bit_length(),
        INDEXED=index is not None,
        ROWS=_ROWS,
        COLUMNS=block,
        num_warps=4,
    )


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@triton.jit
def _move(
    x,
    index,
    into,
    of,
    out,
    out_rows,
    rows,
    x_rows,
    x_row,
    columns,
    groups,
    STEPS: tl.constexpr,
    INDEXED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < out_rows
    source = _source(row, there, index, into, of, rows, x_rows, groups, STEPS, INDEXED)
    moved = source >= 0
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < columns
    values = tl.load(x + source.to(tl.int64)[:, None] * x_row + column, moved[:, None] & inside, 0)
    tl.store(out + row.to(tl.int64)[:, None] * columns + column, values, there[:, None] & inside)


@triton.jit
def _list(
    index,
    into,
    of,
    out,
    out_rows,
    rows,
    x_rows,
    groups,
    STEPS: tl.constexpr,
    INDEXED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < out_rows
    tl.store(out + row, _source(row, there, index, into, of, rows, x_rows, groups, STEPS, INDEXED), there)


@triton.jit
def _source(row, there, index, into, of, rows, x_rows, groups, STEPS: tl.constexpr, INDEXED: tl.constexpr):
    """Which row moves to each `row`, int32; a negative one: none."""
    # The first group that ends after the row, or the last one.
    low = tl.zeros_like(row)
    high = low + (groups - 1)
    for _ in tl.static_range(STEPS):
        middle = (low + high) >> 1
        after = tl.load(into + middle) > row
        high = tl.where(after, middle, high)
        low = tl.where(after, low, tl.minimum(middle + 1, groups - 1))
    group = high
    begin = tl.load(into + group - 1, group > 0, 0)
    first = tl.load(of + group - 1, group > 0, 0)
    source = row - begin + first
    moved = there & (row < tl.load(into + group)) & (source < tl.load(of + group)) & (source < rows)
    if INDEXED:
        source = tl.load(index + source, moved, 0).to(tl.int32)
        moved = moved & (source < x_rows)
    return tl.where(moved, source, -1)
