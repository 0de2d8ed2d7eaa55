"""Tokens to their experts and back, as `grouped_mm` wants them: rows sorted by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(tokens (M, K), ends (E,) int32, ids (M,)) -> (M, N)`: rows through experts `ids`, in order; `ends` end them."""


def through_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, experts: Experts
) -> Tensor:
    """Each token (.., K) of `hidden_states` through its `top_k_index` experts, weighed and added up."""
    copies = top_k_index.shape[-1]
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    ids = chosen[order]
    # Counted by comparing: the length of what bincount gives depends on data, which compilers do not take.
    counts = (ids.unsqueeze(1) == torch.arange(num_experts, device=ids.device)).sum(0)
    out = experts(hidden_states[order // copies], counts.cumsum(0).to(torch.int32), ids)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    restored = torch.empty_like(out)
    restored[order] = out
    return restored.view(-1, copies, out.shape[-1]).sum(1).to(hidden_states.dtype)
