"""Where experts of several ranks are: parameters divided by experts, as DTensors, and gradients that ranks agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.format import Format


@dataclass(frozen=True, slots=True)
class Placement:
    """The ranks that have a share of the experts each, and the format that rows travel in; None: as they are."""

    mesh: Any
    payload: Format | None

    @property
    def group(self) -> Any:
        """The ranks."""
        return self.mesh.get_group()

    def local(self, parameter: Any) -> Tensor:
        """This rank's share, with gradients of the mean of all ranks' losses, as `fully_shard` has for the rest."""
        return _Averaged.apply(parameter.to_local(), self.mesh.size())


class _Averaged(torch.autograd.Function):
    """Itself; every rank's rows add to the gradient of an expert, where losses are averaged over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        """The same numbers."""
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The mean."""
        return grads[0] / ctx.ranks, None
