"""Gated feed-forward experts that are on several ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed

from lowbit.format import Format
from lowbit_moe.exchange import Exchange
from lowbit_moe.experts import check_choice, gated
from lowbit_moe.recipe import TrainRecipe


def parallel_swiglu_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    group: distributed.ProcessGroup,
    recipe: TrainRecipe | str = "MXFP8",
    payload: Format | str | None = "MXFP8",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    act: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
    apply_gate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`swiglu_experts` with this rank's share of the experts, (E / R, 2 I, K) and (E / R, K, I), for its tokens x.

    `chosen` (T, k) number all experts; biases are this rank's share, too. Rows travel as `Exchange` moves them: of
    tokens that `recipe` rounds as the payload does nothing more is lost by it, of what experts give, and of gradients,
    one rounding.

    Raises:
        FormatError: shapes do not fit, or the payload has blocks of several rows or a tensor scale.
    """
    check_choice(x, chosen, weights)
    exchange = Exchange(chosen, gate_up.shape[0], group=group, recipe=recipe, payload=payload)
    rows = exchange.dispatch(x)
    out = gated(rows, exchange.offs, gate_up, down, recipe, gate_up_bias, down_bias, act, apply_gate)
    return exchange.combine(out, weights)
