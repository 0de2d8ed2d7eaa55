"""Experts of several ranks: tokens go to where their experts are, rounded on the way, and what those give comes back.

Rank r of R has experts `r E / R` and on, of E in all. What travels are codes and scales, of gradients, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from lowbit import FormatError
from lowbit.format import WHOLE, Format
from lowbit.numerics import ScaleMode
from lowbit_moe.experts import combine, gated
from lowbit_moe.operands import Operand, Rounded
from lowbit_moe.recipe import TrainRecipe
from lowbit_moe.routing import Routing


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

    `chosen` (T, k) number all experts; biases are this rank's share, too. Rows travel in the format `payload`, which
    has scales of rows or of their columns, or in x's own dtype if it is None; of tokens that `recipe` rounds alike
    nothing more is lost by it, of what experts give, and of gradients, one rounding. How many rows travel between ranks
    is what the processor waits for.

    Raises:
        FormatError: shapes do not fit, or the payload has blocks of several rows or a tensor scale.
    """
    recipe, fmt = TrainRecipe.parse(recipe), payload_of(payload)
    if weights.shape != chosen.shape or chosen.shape[:1] != x.shape[:1]:
        raise FormatError(
            f"x (T, K), chosen and weights (T, k) have T in common; these are {tuple(x.shape)}, {tuple(chosen.shape)} "
            f"and {tuple(weights.shape)}"
        )
    ranks, mine = distributed.get_world_size(group), gate_up.shape[0]
    routing = Routing.of(chosen, ranks * mine)
    counts = torch.diff(routing.offs, prepend=routing.offs.new_zeros(1))
    theirs = torch.empty_like(counts)
    distributed.all_to_all_single(theirs, counts, group=group)
    sent, received = (part.view(ranks, mine).sum(1).tolist() for part in (counts, theirs))
    rows = _Picked.apply(x, routing.tokens[: sum(sent)], routing.places)
    arrived = _Exchange.apply(rows, sent, received, group, fmt, recipe.mode)
    # They come rank by rank, and from each expert by expert.
    each = torch.arange(mine, device=x.device).repeat(ranks)
    here = Routing.of(each.repeat_interleave(theirs.long(), output_size=sum(received)).unsqueeze(1), mine)
    out = gated(arrived, here, gate_up, down, recipe, gate_up_bias, down_bias, act, apply_gate)
    back = _Exchange.apply(
        _Picked.apply(out, here.places.view(-1), here.tokens.view(-1, 1)), received, sent, group, fmt, recipe.mode
    )
    # Rows that no expert has are the last.
    back = torch.nn.functional.pad(back, (0, 0, 0, chosen.numel() - back.shape[0]))
    return combine(back, weights, routing)


def payload_of(payload: Format | str | None) -> Format | None:
    """The format that rows travel in.

    Raises:
        FormatError: it has blocks of several rows, a tensor scale, or zero points.
    """
    fmt = Format.parse(payload) if isinstance(payload, str) else payload
    if fmt is not None and (fmt.block_for(2)[0] != 1 or fmt.tensor_scale or fmt.zero is not None):
        raise FormatError(f"rows travel in formats whose blocks are parts of one row, without tensor scales; not {fmt}")
    return fmt


class _Picked(torch.autograd.Function):
    """Rows `tokens` of x (T, K), of which those at `places` (T, k), if there are so many, are each token's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """Gather."""
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gather, too, in one order."""
        (grad,), (places,) = grads, ctx.saved_tensors
        most = places.numel()
        rows = torch.nn.functional.pad(grad, (0, 0, 0, most - grad.shape[0]))
        picked = rows.index_select(0, places.reshape(-1)).view(*places.shape, -1)
        return picked.sum(1, dtype=torch.float32).to(grad.dtype), None, None


class _Exchange(torch.autograd.Function):
    """Rows to and from every rank, `sent` and `received` of them; gradients the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any, fmt: Format | None, mode: ScaleMode
    ) -> Tensor:
        """Send."""
        ctx.way = received, sent, group, fmt, mode
        return _exchanged(rows, sent, received, group, fmt, mode)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Send back."""
        return _exchanged(grads[0], *ctx.way), *(None,) * 5


def _exchanged(
    rows: Tensor, sent: list[int], received: list[int], group: Any, fmt: Format | None, mode: ScaleMode
) -> Tensor:
    if fmt is None:
        return _moved(rows, sent, received, group)
    operand = Rounded(mode).along(rows, fmt, 1 if fmt.block[-1] == WHOLE else fmt.block[-1])
    codes, scale = (_moved(part, sent, received, group) for part in operand.parts[:2])
    values = Operand((codes, scale, None), operand.format, operand.k).values(rows.dtype)
    return values[:, : rows.shape[1]]


def _moved(part: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    # Bytes, since not every backend moves 8-bit floats.
    raw = part.contiguous().view(torch.uint8)
    found = raw.new_empty(sum(received), raw.shape[1])
    distributed.all_to_all_single(found, raw, received, sent, group=group)
    return found.view(part.dtype)
