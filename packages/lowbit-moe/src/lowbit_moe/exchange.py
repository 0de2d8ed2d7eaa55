"""Rows of tokens to the ranks that have their experts, rounded on the way, and back; of gradients, too.

Rank r of R has experts `r E / R` and on, of E in all. What travels are codes and scales.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, distributed

from lowbit import FormatError, QuantizedTensor
from lowbit.format import WHOLE, Format
from lowbit.numerics import Scales
from lowbit_moe.experts import combine
from lowbit_moe.operands import Operand, Rounded, filled
from lowbit_moe.recipe import TrainRecipe
from lowbit_moe.routing import Routing, over_tokens


class Exchange:
    """Which rows of tokens go to which rank of `group`, and as what; differentiable.

    `chosen` (T, k) numbers the experts of this rank's tokens among all, of which each rank has `experts`; a number that
    there is not stands for none. Rows travel in the format `payload`, rounded as `recipe` rounds, or as they are if it
    is None. How many go where is known only once all ranks have told one another, which the processor waits for when it
    needs it first, having done what it could before.

    Raises:
        FormatError: the payload has blocks of several rows, a tensor scale, or zero points; or `chosen` is no matrix of
            integers.
    """

    def __init__(
        self,
        chosen: Tensor,
        experts: int,
        *,
        group: distributed.ProcessGroup,
        recipe: TrainRecipe | str = "MXFP8",
        payload: Format | str | None = "MXFP8",
    ) -> None:
        """Begin to tell the other ranks how many rows will come."""
        self.payload, self.recipe, self.group = payload_of(payload), TrainRecipe.parse(recipe), group
        ranks = distributed.get_world_size(group)
        # Rows of this rank's tokens in the order of all experts, which is that of ranks.
        self.routing = Routing.of(chosen, ranks * experts)
        ours = torch.diff(self.routing.offs, prepend=self.routing.offs.new_zeros(1))
        theirs = torch.empty_like(ours)
        distributed.all_to_all_single(theirs, ours, group=group)
        self._theirs = theirs.view(ranks, experts)
        sizes = torch.stack((ours.view(ranks, experts).sum(1), self._theirs.sum(1)))
        self._sizes = sizes.to("cpu", non_blocking=True)
        on_host = sizes.device.type == "cpu"
        self._told = None if on_host else torch.accelerator.current_stream(sizes.device).record_event()

    def dispatch(self, x: Tensor, *, plain: bool = False) -> Tensor:
        """Rows (M, K) for this rank's experts, of all ranks' tokens x (T, K), in groups that end at `offs`.

        They are a QuantizedTensor, which `grouped_mm` takes as it is, where the recipe's forward product has the
        payload's format; else, and if `plain`, numbers in the dtype of x.

        Raises:
            FormatError: x has another number of rows than there are choices.
        """
        if x.dim() != 2 or x.shape[0] != self.routing.places.shape[0]:
            raise FormatError(f"needed is x (T, K) of {self.routing.places.shape[0]} tokens; this is {tuple(x.shape)}")
        return _Dispatch.apply(x, self, plain)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sums (T, K) over what each token's experts gave, rows (M, K) on their ranks, times `weights` (T, k)."""
        back = _Return.apply(rows, self)
        # Rows that no expert has are the last.
        back = torch.nn.functional.pad(back, (0, 0, 0, weights.numel() - back.shape[0]))
        return combine(back, weights, self.routing)

    @property
    def offs(self) -> Tensor:
        """(E / R,) int32: the ends of this rank's experts' rows."""
        return self._orders[2]

    @cached_property
    def sizes(self) -> tuple[list[int], list[int]]:
        """How many rows go to each rank, and how many come from each."""
        if self._told is not None:
            self._told.synchronize()
        sent, received = self._sizes.tolist()
        return sent, received

    @cached_property
    def _orders(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row in the order of this rank's experts its place among those that come, and the reverse; ends."""
        # Rows come rank by rank, and from each expert by expert; each such piece is put where its expert's rows are.
        ends, goals = (part.flatten().cumsum(0) for part in (self._theirs, self._theirs.mT))
        ranks, experts = self._theirs.shape
        moves = (goals.view(experts, ranks).mT - ends.view(ranks, experts)).contiguous()
        rows = torch.arange(sum(self.sizes[1]), device=ends.device)
        places = rows + moves.flatten()[torch.searchsorted(ends, rows, right=True)]
        order = rows - moves.mT.flatten()[torch.searchsorted(goals, rows, right=True)]
        return order, places, goals[ranks - 1 :: ranks].to(torch.int32)

    def to_experts(self, rows: Tensor, picks: Tensor | None) -> Operand | Tensor:
        """`rows` (n, K), or `rows[picks]`, in the order of `routing`, to where their experts are, by expert."""
        parts = self._rounded(rows, picks)
        moved = self._moved(parts, *self.sizes)
        return self._of([_picked(part, self._orders[0]) for part in moved], rows)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Rows (M, K) of this rank's experts to where their tokens are, in the order of `routing`."""
        sent, received = self.sizes
        moved = self._moved(self._rounded(rows, self._orders[1]), received, sent)
        return values(self._of(moved, rows), rows)

    def _rounded(self, rows: Tensor, picks: Tensor | None) -> list[Tensor]:
        if self.payload is None:
            return [rows if picks is None else rows.index_select(0, picks)]
        how, align = Rounded(self.recipe.mode), self._align
        if picks is None:
            found = how.along(rows, self.payload, align)
        else:
            whole = torch.full((1,), len(picks), dtype=torch.int32, device=rows.device)
            found = how.moved(filled(rows, align), picks, whole, self.payload)
        # Bytes, since not every backend moves 8-bit floats.
        return [part.contiguous().view(torch.uint8) for part in found.parts[:2]]

    def _moved(self, parts: list[Tensor], sent: list[int], received: list[int]) -> list[Tensor]:
        found = [part.new_empty(sum(received), part.shape[1]) for part in parts]
        for part, to in zip(parts, found, strict=True):
            distributed.all_to_all_single(to, part[: sum(sent)], received, sent, group=self.group)
        return found

    def _of(self, moved: list[Tensor], rows: Tensor) -> Operand | Tensor:
        """What bytes that were moved are, of such rows."""
        if self.payload is None:
            return moved[0]
        codes, scale = moved
        parts = codes.view(self.payload.element.storage), scale.view(self.payload.scale.storage), None
        return Operand(parts, str(self.payload), rows.shape[1] + -rows.shape[1] % self._align)

    @property
    def _align(self) -> int:
        assert self.payload is not None
        group = self.payload.block[-1]
        return 1 if group == WHOLE else group


def payload_of(payload: Format | str | None) -> Format | None:
    """The format that rows travel in.

    Raises:
        FormatError: it has blocks of several rows, a tensor scale, or zero points.
    """
    fmt = Format.parse(payload) if isinstance(payload, str) else payload
    if fmt is not None and (fmt.block_for(2)[0] != 1 or fmt.tensor_scale or fmt.zero is not None):
        raise FormatError(f"rows travel in formats whose blocks are parts of one row, without tensor scales; not {fmt}")
    return fmt


def values(found: Operand | Tensor, like: Tensor) -> Tensor:
    """What came, as numbers (M, K) of the dtype of rows (n, K)."""
    return found.values(like.dtype)[:, : like.shape[1]] if isinstance(found, Operand) else found


def _picked(part: Tensor, order: Tensor) -> Tensor:
    # Eight bytes at once, where rows have so many.
    wide = part.view(torch.int64) if part.shape[1] * part.itemsize % 8 == 0 else part
    return wide.index_select(0, order).view(part.dtype)


class _Dispatch(torch.autograd.Function):
    """Tokens to the ranks of their experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Exchange, plain: bool) -> Tensor:  # noqa: FBT001 - as autograd calls it
        """Send."""
        ctx.way = way
        found, k, takes = way.to_experts(x, way.routing.tokens), x.shape[1], way.recipe.forward
        if plain or not isinstance(found, Operand) or takes is None:
            return values(found, x)
        if found.format != str(takes.left) or k % takes.align:
            return values(found, x)
        codes, scale, _ = found.parts
        return QuantizedTensor.from_parts(codes, Scales(scale), takes.left, k=k, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Send back, and sum over the rows of each token in one order."""
        way: Exchange = ctx.way
        rows, places = way.to_tokens(grads[0]), way.routing.places
        rows = torch.nn.functional.pad(rows, (0, 0, 0, places.numel() - rows.shape[0]))
        return over_tokens(rows, places), None, None


class _Return(torch.autograd.Function):
    """What experts give to the ranks of their tokens."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Exchange) -> Tensor:
        """Send."""
        ctx.way = way
        return way.to_tokens(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Send to the experts."""
        return values(ctx.way.to_experts(grads[0], None), grads[0]), None
