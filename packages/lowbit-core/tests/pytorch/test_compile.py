"""torch.compile of models with quantized weights: one graph serves every number of tokens, gradients included."""

from __future__ import annotations

import pytest
import torch
from cells import ROWS, column, inputs, model
from tolerance import assert_computed
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lowbit import quantize

TOKENS = (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100)


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@column("torch.compile")
def test_one_graph_serves_every_number_of_tokens(row):
    made, counter = model(row), CompileCounterWithBackend("inductor")
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for m in TOKENS:
            # Kernels run as in eager; between them, inductor's silu may differ in the last bit.
            assert_computed(row, made, compiled(*inputs(row, m)), inputs(row, m))
    assert counter.frame_count == 1


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_without_fusion_nothing_changes_a_bit(row):
    made, counter = model(row), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for m in TOKENS[::5]:
            assert torch.equal(compiled(*inputs(row, m)), made(*inputs(row, m)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in {"int8-row", "mxfp8", "int4-g128"}], ids=str)
def test_gradients_compile(row):
    made, counter = model(row), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend=counter)
    for m in (12, 16, 33):
        found, wanted = (through(row, run, m) for run in (compiled, made))
        # One expert's rows among zeros, or alone: the products may sum in another order.
        torch.testing.assert_close(found, wanted, rtol=0, atol=512 * 2.0**-24 * float(wanted.abs().max()))
    assert counter.frame_count == 1


class Convolutions(nn.Module):
    """A convolution of each kind, the second of a rounded input, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 32, 3, padding="same"), nn.Conv2d(32, 8, 3, padding=1, stride=2)
        self.three = nn.Linear(8, 16)
        for layer, fmt, axis, activation in (
            (self.one, "INT8_TENSOR", -1, None),
            (self.two, "MXFP4", 1, "dynamic:INT8_TENSOR_ASYM"),
            (self.three, "INT8_ROW", -1, "dynamic:INT8_ROW"),
        ):
            q = quantize(layer.weight.detach(), fmt, axis=axis, activation=activation)
            layer.weight = nn.Parameter(q, requires_grad=False)

    def forward(self, x):
        x = self.two(self.one(x).unflatten(-1, (-1, 4)))
        return self.three(x.movedim(1, -1))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_convolutions_compile(backend):
    torch.manual_seed(0)
    made, counter = Convolutions(), CompileCounterWithBackend(backend)
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    for n in (2, 3, 5):
        x = torch.randn(n, 4, 12, generator=torch.Generator().manual_seed(n))
        # Inductor gives every length of a window's dims a graph of its own, or none at all, of plain convolutions too.
        torch._dynamo.mark_dynamic(x, 0)
        found, wanted = (_through(run, x.requires_grad_()) for run in (compiled, made))
        # Inductor may add float32 products in another order, of sums of at most 288 terms.
        bound = 0 if backend == "aot_eager" else 288 * 2.0**-24
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=bound * float(other.abs().max()))
    assert counter.frame_count == 1


def _through(run, x):
    x.grad = None
    y = run(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def through(row, run, m):
    x, *offs = inputs(row, m)
    run(x.requires_grad_(), *offs).square().sum().backward()
    return x.grad
