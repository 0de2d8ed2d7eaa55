"""Steps of AdamW on ranks that have a share of each parameter, for tests with several processes."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from lowbit_moe import AdamW, convert_


def model():
    """Matrices whose rows two and three ranks share unevenly, vectors, and a convolution."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 65), nn.Linear(65, 7), nn.Conv1d(7, 10, 16, padding=8), nn.LayerNorm(2))


def stepped(several, bits, steps, loaded=None):
    """All parameters, whole, after so many steps, with gradients that every rank agrees on; and saved states."""
    found = model()
    if several:
        for part in found:
            fully_shard(part)
    optimizer = AdamW(found.parameters(), lr=0.01, bits=bits)
    if loaded is not None:
        optimizer.load_state_dict(loaded)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in found.parameters():
            grad = torch.randn(p.shape, generator=generator) * torch.randn(p.shape[-1:], generator=generator).exp()
            if several:
                grad = torch.distributed.tensor.distribute_tensor(grad, p.device_mesh, p.placements)
            p.grad = grad
        optimizer.step()
    whole = [p.full_tensor() if several else p for p in found.parameters()]
    states = [
        {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in state.items()}
        for state in optimizer.state.values()
    ]
    assert not several or distributed.get_world_size() > 1
    return [p.detach() for p in whole], states


def gathered(recipe, codes, ranks, device):
    """Losses, gradients of the first step, parameters after two, and bytes sent of each number of the last weight."""
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 256, bias=False)).to(device)
    convert_(found, recipe, fp8_all_gather=codes)
    if ranks:
        for part in (found[0], found[2]):
            fully_shard(part)
        fully_shard(found)
    sent = 0.0
    if ranks:
        share = found[2].weight.to_local()
        inputs, _ = share.fsdp_pre_all_gather(found[2].weight.device_mesh, found[2].weight.shape, None, None, None)
        sent = sum(part.numel() * part.itemsize for part in inputs) / share.numel()
    optimizer = AdamW(found.parameters(), lr=0.01, bits=32)
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)).to(device)
    gradients, losses = [], []
    for _ in range(2):
        loss = found(x).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = gradients or [whole(p.grad) for p in found.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, [whole(p) for p in found.parameters()], sent


def whole(x):
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    # Of torch's own class.
    return torch.ops.aten.alias.default(x.detach()).cpu()
