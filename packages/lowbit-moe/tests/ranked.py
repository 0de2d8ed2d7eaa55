"""What ranks compute together, and one alone: experts of several ranks beside all of them on one."""

from __future__ import annotations

import torch
from torch import distributed

from lowbit_moe import parallel_swiglu_experts, swiglu_experts

WIDTH, COLUMNS, EXPERTS = 72, 48, 6


def given(rank, dtype=torch.float32):
    """A rank's tokens, of other numbers than other ranks', some of which go to one expert or to none."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 30 + 7 * rank
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    weights = torch.rand(tokens, 2, generator=generator).to(dtype)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(tokens)])
    chosen[2] = torch.tensor([EXPERTS, 4])
    return x, weights, chosen


def experts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(99)
    gate_up = torch.randn(EXPERTS, 2 * COLUMNS, WIDTH, generator=generator) / 8
    return gate_up.to(dtype), (torch.randn(EXPERTS, WIDTH, COLUMNS, generator=generator) / 7).to(dtype)


def together(recipe, payload):
    """Output, and gradients of x, weights and this rank's experts, of the sum of the outputs' squares."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    x, weights, chosen = given(rank)
    mine = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    parts = [part.requires_grad_() for part in (x, weights, *(side[mine].clone() for side in experts()))]
    out = parallel_swiglu_experts(
        parts[0], chosen, parts[1], *parts[2:], group=distributed.group.WORLD, recipe=recipe, payload=payload
    )
    return [out.detach(), *torch.autograd.grad(out.square().sum(), parts)]


def alone(recipe, ranks):
    """The same of every rank's tokens, one after another, by all experts."""
    all_given = [given(rank) for rank in range(ranks)]
    x, weights, chosen = (torch.cat(parts) for parts in zip(*all_given, strict=True))
    parts = [part.requires_grad_() for part in (x, weights, *experts())]
    out = swiglu_experts(parts[0], chosen, parts[1], *parts[2:], recipe=recipe)
    return [len(each[0]) for each in all_given], [out.detach(), *torch.autograd.grad(out.square().sum(), parts)]
