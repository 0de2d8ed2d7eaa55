"""CUDA graphs: a model with quantized weights captured once gives, replayed on other tokens, the bits of eager mode."""

from __future__ import annotations

import pytest
import torch
from cells import ROWS, column, inputs, model
from tolerance import assert_computed

pytestmark = pytest.mark.gpu


@column("CUDA graphs")
def test_a_replay_gives_the_bits_of_eager_mode(row):
    made = model(row, device="cuda")
    held = inputs(row, 24, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                made(*held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(*held)
        for seed in (2, 3):
            x, *offs = inputs(row, 24, seed=seed, device="cuda")
            if offs:
                # Other shares too: which rows are whose is read when the graph runs.
                offs = [torch.tensor([4 * seed, 5 * seed, 5 * seed, 24], dtype=torch.int32, device="cuda")]
            for place, value in zip(held, (x, *offs), strict=True):
                place.copy_(value)
            graph.replay()
            if row.rank == 2:
                assert torch.equal(out, made(x))
            else:
                # An expert's rows stand among zeros there and alone in eager mode, so sums may run in another order.
                assert_computed(row, made, out, (x, *offs))


def test_gradients_are_captured_too():
    row = next(row for row in ROWS if str(row) == "int4-g128-3d")
    made = model(row, device="cuda")
    x, offs = inputs(row, 24, device="cuda")
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(made(x, offs).square().sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (grad,) = torch.autograd.grad(made(x, offs).square().sum(), x)
    with torch.no_grad():
        x.copy_(inputs(row, 24, seed=5, device="cuda")[0])
    graph.replay()
    (wanted,) = torch.autograd.grad(made(x, offs).square().sum(), x)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=512 * 2.0**-22 * float(wanted.abs().max()))
