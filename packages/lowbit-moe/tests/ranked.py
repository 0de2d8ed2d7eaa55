"""What ranks compute together, and one alone: experts of several ranks beside all of them on one."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowbit import QuantizedTensor
from lowbit_moe import AdamW, Exchange, convert_, parallel_swiglu_experts, shard_experts_, swiglu_experts

WIDTH, COLUMNS, EXPERTS = 72, 48, 6


def given(rank, dtype=torch.float32):
    """A rank's tokens, of other numbers than other ranks', some of which go to one expert or to none."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 30 + 7 * rank
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    weights = torch.rand(tokens, 2, generator=generator).to(dtype)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(tokens)])
    chosen[2], chosen[3] = torch.tensor([EXPERTS, 4]), torch.tensor([-1, 0])
    return x, weights, chosen


def experts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(99)
    gate_up = torch.randn(EXPERTS, 2 * COLUMNS, WIDTH, generator=generator) / 8
    return gate_up.to(dtype), (torch.randn(EXPERTS, WIDTH, COLUMNS, generator=generator) / 7).to(dtype)


def together(recipe, payload, device):
    """Output, and gradients of x, weights and this rank's experts, of the sum of the outputs' squares."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    x, weights, chosen = (part.to(device) for part in given(rank))
    mine = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    parts = [part.requires_grad_() for part in (x, weights, *(side[mine].to(device) for side in experts()))]
    out = parallel_swiglu_experts(
        parts[0], chosen, parts[1], *parts[2:], group=distributed.group.WORLD, recipe=recipe, payload=payload
    )
    return [part.detach().cpu() for part in (out, *torch.autograd.grad(out.square().sum(), parts))]


def alone(recipe, ranks, device):
    """The same of every rank's tokens, one after another, by all experts."""
    all_given = [given(rank) for rank in range(ranks)]
    x, weights, chosen = (torch.cat(parts).to(device) for parts in zip(*all_given, strict=True))
    parts = [part.requires_grad_() for part in (x, weights, *(side.to(device) for side in experts()))]
    out = swiglu_experts(parts[0], chosen, parts[1], *parts[2:], recipe=recipe)
    results = (out, *torch.autograd.grad(out.square().sum(), parts))
    return [len(each[0]) for each in all_given], [part.detach().cpu() for part in results]


def exchanged(recipe, payload, device):
    """What this rank's experts are given, whether as codes, the ends, and what comes back of as much."""
    x, weights, chosen = (part.to(device) for part in given(distributed.get_rank(), torch.bfloat16))
    experts = EXPERTS // distributed.get_world_size()
    exchange = Exchange(chosen, experts, group=distributed.group.WORLD, recipe=recipe, payload=payload)
    coded = isinstance(exchange.dispatch(x), QuantizedTensor)
    x.requires_grad_()
    rows = exchange.dispatch(x, plain=True)
    back = exchange.combine(rows, weights)
    (to_x,) = torch.autograd.grad(back.float().sum(), (x,))
    return rows.detach().cpu(), coded, exchange.offs.tolist(), back.detach().cpu(), to_x.cpu()


def idle(device, alone=0):
    """Sums of this rank's tokens, of which the first rank has none, and their gradients; of a rank by one `alone`."""
    rank = alone or distributed.get_rank()
    x, weights, chosen = (part[: len(part) * min(rank, 1)].to(device) for part in given(rank))
    x.requires_grad_()
    if alone:
        out = swiglu_experts(x, chosen, weights, *(side.to(device) for side in experts()), recipe="MXFP8")
    else:
        each = EXPERTS // distributed.get_world_size()
        sides = [side[rank * each : (rank + 1) * each].to(device) for side in experts()]
        how = {"group": distributed.group.WORLD, "recipe": "MXFP8", "payload": None}
        out = parallel_swiglu_experts(x, chosen, weights, *sides, **how)
    return out.detach().cpu(), torch.autograd.grad(out.square().sum(), x)[0].cpu()


class Experts(nn.Module):
    """Gated experts with the names that transformers has for them, and biases."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = map(nn.Parameter, experts())
        self.gate_up_proj_bias = nn.Parameter(torch.linspace(-1, 1, EXPERTS * 2 * COLUMNS).view(EXPERTS, -1))
        self.down_proj_bias = nn.Parameter(torch.linspace(-1, 1, EXPERTS * WIDTH).view(EXPERTS, -1))
        self.act_fn = nn.functional.silu


class Mixture(nn.Module):
    """A dense layer, a router and its experts, and a dense layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 40)
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts()

    def forward(self, x):
        x = self.first(x)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return self.last(x + self.experts(x, chosen, weights))


def trained(recipe, payload, device, of_ranks=None):
    """Gradients of the mean of ranks' losses, whole, and parameters after two steps: by each rank, or by one alone."""
    model = Mixture().to(device)
    convert_(model, recipe)
    alone = of_ranks is not None
    if not alone:
        mesh = init_device_mesh(device, (distributed.get_world_size(),), mesh_dim_names=("ranks",))
        shard_experts_(model, mesh, payload=payload)
        for part in (model.first, model.last):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=set(model.experts.parameters()))
    optimizer = AdamW(model.parameters(), lr=0.01)
    gradients = []
    for _ in range(2):
        for rank in range(of_ranks) if alone else (distributed.get_rank(),):
            model(given(rank)[0].to(device)).square().mean().backward()
        for p in model.parameters() if alone else ():
            # After it was rounded, as ranks do.
            p.grad /= of_ranks
        gradients = gradients or [whole(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return gradients, [whole(p) for p in model.parameters()]


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().cpu()
