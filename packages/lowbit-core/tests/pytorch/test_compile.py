"""torch.compile of models with quantized weights: one graph serves every number of tokens, gradients included."""

from __future__ import annotations

import pytest
import torch
from cells import ROWS, column, inputs, model
from tolerance import assert_computed
from torch._dynamo.testing import CompileCounterWithBackend

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


def through(row, run, m):
    x, *offs = inputs(row, m)
    run(x.requires_grad_(), *offs).square().sum().backward()
    return x.grad
