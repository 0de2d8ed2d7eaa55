"""A small model that predicts tokens, and text for it."""

from __future__ import annotations

import torch
from torch import nn

K, WORDS = 64, 50


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(K), nn.Linear(K, 128), nn.Linear(128, K)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up, self.down = (
            nn.RMSNorm(K),
            nn.Linear(K, 128),
            nn.Linear(K, 128),
            nn.Linear(128, K),
        )

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(self.gate(y).relu() * self.up(y))


class Predictor(nn.Module):
    """Predicts a token from the one before; its head is its embedding."""

    def __init__(self, block=Block):
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, K), nn.RMSNorm(K)
        self.blocks, self.head = nn.ModuleList(block() for _ in range(2)), nn.Linear(K, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) / 16


def made(block=Block):
    torch.manual_seed(0)
    return Predictor(block).eval()


def text(seed):
    """Few batches, for each step of learning takes them all."""
    return torch.randint(WORDS, (6, 16, 32), generator=torch.Generator().manual_seed(seed))


def divergence(model, original, ids):
    """Float64, by torch's own."""
    with torch.no_grad():
        p, q = original(ids).double().log_softmax(-1), model(ids).double().log_softmax(-1)
    return float(nn.functional.kl_div(q, p, log_target=True, reduction="sum") / p.shape[:-1].numel())
