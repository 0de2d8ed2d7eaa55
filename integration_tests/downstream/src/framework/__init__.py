"""A framework that stores its layers' weights in few bits, and knows of lowbit nothing but its core."""

import torch
from torch import nn

import lowbit

WEIGHT = lowbit.Format.parse("int4:1x32:bfloat16")


class SmallLinear(nn.Module):
    """A linear layer whose weight is kept in `WEIGHT`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lowbit.quantize(weight, WEIGHT), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T`."""
        return nn.functional.linear(x, self.weight)
