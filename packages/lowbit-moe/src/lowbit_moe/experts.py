"""Gated feed-forward experts of tokens, and weighted sums of what they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit import FormatError
from lowbit_moe.functional import grouped_mm
from lowbit_moe.recipe import TrainRecipe
from lowbit_moe.routing import Routing


def swiglu_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    recipe: TrainRecipe | str = "MXFP8",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    act: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
    apply_gate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Gated experts of tokens x (T, K): sums (T, K) over the `chosen` (T, k) ones, times `weights` (T, k).

    Expert e gives `down[e] @ (act(gate) * up) + down_bias[e]`, gate and up being halves of `gate_up[e] @ x +
    gate_up_bias[e]`, or what `apply_gate` makes of both. `gate_up` (E, 2 I, K), `down` (E, K, I). Tokens are gathered
    while they are rounded, sums are in one order, and nothing waits for the device.

    Raises:
        FormatError: shapes do not fit.
    """
    check_choice(x, chosen, weights)
    routing = Routing.of(chosen, gate_up.shape[0])
    out = gated(x, routing.offs, gate_up, down, recipe, gate_up_bias, down_bias, act, apply_gate, routing)
    return combine(out, weights, routing)


def check_choice(x: Tensor, chosen: Tensor, weights: Tensor) -> None:
    """Refuse what is no choice for tokens x.

    Raises:
        FormatError: shapes do not fit.
    """
    if weights.shape != chosen.shape or chosen.shape[:1] != x.shape[:1]:
        raise FormatError(
            f"x (T, K), chosen and weights (T, k) have T in common; these are {tuple(x.shape)}, {tuple(chosen.shape)} "
            f"and {tuple(weights.shape)}"
        )


def gated(
    x: Tensor,
    offs: Tensor,
    gate_up: Tensor,
    down: Tensor,
    recipe: TrainRecipe | str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: Callable[[Tensor], Tensor],
    apply_gate: Callable[[Tensor], Tensor] | None,
    routing: Routing | None = None,
) -> Tensor:
    """What each expert gives for its rows (M, K), which end at `offs`: see `swiglu_experts`."""
    hidden = grouped_mm(x, gate_up, offs, recipe=recipe, bias=gate_up_bias, routing=routing)
    if apply_gate is None:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = act(gate) * up
    else:
        hidden = apply_gate(hidden)
    return grouped_mm(hidden, down, offs, recipe=recipe, bias=down_bias)


def combine(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Sums (T, K) over each token's rows (M, K), times their `weights` (T, k), in float32, rounded to rows' dtype."""
    return _Combine.apply(rows, weights, routing.tokens, routing.places)


class _Combine(torch.autograd.Function):
    """Each row is of one token, so that gradients are gathered, too, and in one order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, tokens, places)
        picked = rows.index_select(0, places.reshape(-1)).view(*places.shape, rows.shape[1]).to(torch.float32)
        return (picked * weights.to(torch.float32).unsqueeze(-1)).sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,), (rows, weights, tokens, places) = grads, ctx.saved_tensors
        by_row = torch.empty_like(weights.reshape(-1)).scatter_(0, places.reshape(-1), weights.reshape(-1))
        to_rows = (grad.index_select(0, tokens) * by_row.unsqueeze(-1).to(grad.dtype)).to(rows.dtype)
        picked = rows.index_select(0, places.reshape(-1)).view(*places.shape, rows.shape[1]).to(torch.float32)
        to_weights = (picked * grad.to(torch.float32).unsqueeze(1)).sum(-1).to(weights.dtype)
        return to_rows, to_weights, None, None
