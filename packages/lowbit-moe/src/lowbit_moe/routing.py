"""Rows of tokens in the order of the experts that a router chose for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import FormatError


class Routing(NamedTuple):
    """Rows of tokens in the order of their experts, of T tokens and M = T * top-k rows."""

    # (M,) int64: which token each row is.
    tokens: Tensor
    # (T, k) int64: where the rows of each token are.
    places: Tensor
    # (E,) int32: the ends of experts' rows.
    offs: Tensor

    @staticmethod
    def of(chosen: Tensor, experts: int) -> Routing:
        """The order of rows that go to `chosen` (T, k) experts; of those that there are not, rows follow the last end.

        Nothing waits for the device.

        Raises:
            FormatError: `chosen` is no matrix of integers.
        """
        if chosen.dim() != 2 or chosen.dtype.is_floating_point:
            raise FormatError(f"chosen experts are (T, k) integers; these are {chosen.dtype} {tuple(chosen.shape)}")
        flat = chosen.reshape(-1).to(torch.int64)
        flat = torch.where(flat < 0, experts, flat)
        ordered, order = flat.sort(stable=True)
        each = torch.arange(experts, device=flat.device, dtype=flat.dtype)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        offs = torch.searchsorted(ordered, each, right=True).to(torch.int32)
        return Routing(order // max(chosen.shape[1], 1), places.view(chosen.shape), offs)


def over_tokens(rows: Tensor, places: Tensor) -> Tensor:
    """Sums (T, K) over the rows (M, K) of each token, at `places` (T, k), in one order, of rows' dtype."""
    picked = rows.index_select(0, places.reshape(-1)).view(*places.shape, rows.shape[1])
    return picked.sum(1, dtype=torch.float32).to(rows.dtype)
