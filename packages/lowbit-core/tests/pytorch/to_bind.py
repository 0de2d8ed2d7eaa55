"""A model to bind, and what a child process does with it: a module of its own, for such a process to import."""

from __future__ import annotations

import torch
from torch import nn

from lowbit import bind, quantize
from lowbit.testing import sample

ASYM = "dynamic:INT8_ROW_ASYM"


def parameter(spec, activation=None, seed=0, shape=(6, 32)):
    return nn.Parameter(quantize(sample(shape, seed=seed), spec, activation=activation), requires_grad=False)


class Model(nn.Module):
    """A tied table and head, and two linear layers of which one has asymmetric activations."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 32), nn.Linear(32, 6, bias=False)
        self.table.weight = self.head.weight = parameter("INT8_ROW", ASYM)
        self.up, self.down = nn.Linear(32, 6), nn.Linear(6, 32, bias=False)
        self.up.weight, self.down.weight = parameter("INT8_ROW", ASYM, 1), parameter("MXFP4", None, 2, (32, 32))

        self.up.bias = nn.Parameter(sample((6,), seed=3))

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x), self.up(self.down(x))


IDS = torch.tensor([[0, 3, 5]])


def bind_and_tell(model, wanted, pipe):
    """Send whether the model as given, and as bound here, computes what was wanted, and the kernels in between."""
    torch.set_num_threads(1)
    with torch.no_grad():
        before = [torch.equal(found, y) for found, y in zip(model(IDS), wanted, strict=True)]
        kernels = [row.kernel for row in bind(model).rows]
        pipe.send((before, kernels, [torch.equal(found, y) for found, y in zip(model(IDS), wanted, strict=True)]))
