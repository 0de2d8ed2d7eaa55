"""Bags of rows of a table: what `F.embedding_bag` takes, as the operator has it, and which row is in which bag."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.compiler import is_exporting

from lowbit.errors import FormatError, RowError, UnsupportedOpError

MODES = ("sum", "mean", "max")
_INDICES = (torch.int32, torch.int64)
_MOST_KEPT = 4096


def bag_arguments(
    rows: int,
    input: Tensor,  # noqa: A002 - F.embedding_bag's own name
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002
    mode: str = "mean",
    sparse: bool = False,  # noqa: FBT001, FBT002
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,  # noqa: FBT001, FBT002
    padding_idx: int | None = None,
    *,
    plain: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, str, int, bool]:
    """The operator's first arguments, of those of F.embedding_bag after the table, which has so many rows.

    `input` (M,) with `offsets` (B,) where bags begin, or (B + 1,) with `include_last_offset`; or (B, L), a bag a row.
    A `padding_idx` of -1 is none. `plain`: nothing traces or watches this call (`ops.unwatched`).

    Raises:
        UnsupportedOpError: `max_norm` is given, weights are for another mode than the sum, or the mode is unknown.
        FormatError: shapes or dtypes are not those, or `padding_idx` is no row.
    """
    del norm_type, scale_grad_by_freq, sparse
    if max_norm is not None:
        msg = "embedding_bag with max_norm rewrites its table, which quantized codes cannot take"
        raise UnsupportedOpError(msg)
    if mode not in MODES or (per_sample_weights is not None and mode != "sum"):
        msg = (
            f"embedding_bag has the modes {', '.join(MODES)}, and per_sample_weights for the sum; the mode is {mode!r}"
        )
        raise UnsupportedOpError(msg)
    if per_sample_weights is not None and per_sample_weights.shape != input.shape:
        given = tuple(per_sample_weights.shape)
        msg = f"per_sample_weights need the shape of the input, {tuple(input.shape)}; they have {given}"
        raise FormatError(msg)
    if input.dim() == 2 and offsets is None and not include_last_offset:
        (bags, length), device = input.shape, input.device
        # What takes as long as a few sums do, and is as small, is not made anew.
        kept = plain and bags <= _MOST_KEPT and device.type == "cpu"
        offsets = _kept_begins(bags, length) if kept else torch.arange(bags, device=device) * length
    elif input.dim() != 1 or offsets is None or offsets.dim() != 1:
        msg = (
            "embedding_bag takes rows (M,) with offsets (B,), or (B, L) without; these are "
            f"{tuple(input.shape)}, offsets {'none' if offsets is None else tuple(offsets.shape)}"
        )
        raise FormatError(msg)
    if input.dtype not in _INDICES or offsets.dtype not in _INDICES:
        msg = f"rows and offsets must be int32 or int64; these are {input.dtype} and {offsets.dtype}"
        raise FormatError(msg)
    if include_last_offset and offsets.shape[0] == 0:
        msg = "include_last_offset needs an offset at least, the end of the last bag"
        raise FormatError(msg)
    padding = -1
    if padding_idx is not None:
        padding = padding_idx + rows if padding_idx < 0 else padding_idx
        if not 0 <= padding < rows:
            msg = f"padding_idx must be a row of the table, which has {rows}; it is {padding_idx}"
            raise FormatError(msg)
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    return input if input.dim() == 1 else input.reshape(-1), offsets, weights, mode, padding, include_last_offset


@lru_cache(maxsize=16)
def _kept_begins(bags: int, length: int) -> Tensor:
    # Of no use to autograd, but not refused by it either.
    with torch.inference_mode(mode=False):
        return torch.arange(bags, device="cpu") * length


def pool(
    values: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None, mode: str, padding: int, *, last: bool
) -> Tensor:
    """Float64 (B, D) of rows' values (M, D), row ids (M,): the sum, mean or maximum of each bag's; of an empty one 0.

    With `last`, the last of `offsets` ends the last bag. Rows that are `padding` count as if they were not there.
    """
    count = offsets.shape[0] - (1 if last else 0)
    ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_full((min(count, 1),), ids.shape[0])])
    bag = torch.searchsorted(ends, torch.arange(ids.shape[0], device=ids.device), right=True)
    # What belongs to no bag goes to one that is dropped.
    bag = torch.where(ids == padding, count, bag).to(torch.int64)
    values = values.to(torch.float64)
    if weights is not None:
        values = values * weights.to(torch.float64)[:, None]
    pooled = values.new_zeros(count + 1, values.shape[1])
    if mode == "max":
        at = bag[:, None].expand_as(values)
        return pooled.scatter_reduce(0, at, values, "amax", include_self=False)[:count]
    pooled = pooled.index_add(0, bag, values)
    if mode == "mean":
        members = values.new_zeros(count + 1).index_add(0, bag, torch.ones_like(bag, dtype=values.dtype))
        pooled = pooled / members.clamp_min(1)[:, None]
    return pooled[:count]


def check_rows(ids: Tensor, rows: int) -> None:
    """Refuse ids (any shape) of rows that a table of so many does not have; where they can be read, without waiting.

    Raises:
        RowError: one is negative or too large.
    """
    if is_exporting() or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(end) for end in torch.aminmax(ids))
    if low < 0 or high >= rows:
        msg = f"row {low if low < 0 else high} is not in the table, which has {rows} rows, from 0 on"
        raise RowError(msg)


def check_bags(ids: Tensor, offsets: Tensor) -> None:
    """Refuse offsets that are not 0 first, fall, or pass the end; where they can be read, and without waiting.

    Raises:
        FormatError: they do.
    """
    if is_exporting() or offsets.device.type != "cpu" or not offsets.shape[0]:
        return
    steps = torch.diff(offsets, append=offsets.new_full((1,), ids.shape[0]))
    if int(offsets[0]) or bool((steps < 0).any()):
        msg = f"offsets must begin with 0, not fall, and not pass the {ids.shape[0]} rows that are picked"
        raise FormatError(msg)
