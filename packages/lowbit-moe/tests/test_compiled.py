"""Layers in a whole graph: the numbers, and the gradients, that they give by themselves."""

from __future__ import annotations

import pytest
import torch

from lowbit_moe import RECIPES, linear, swiglu_experts


def layer(recipe):
    def run(x, w, bias, gate_up, down, weights, chosen):
        return swiglu_experts(linear(x, w, bias, recipe), chosen, weights, gate_up, down, recipe=recipe)

    return run


def inputs(tokens, dtype):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 40), (72, 40), (72,), (4, 96, 72), (4, 72, 48), (tokens, 2))
    given = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return given, torch.randint(4, (tokens, 2), generator=generator)


def results(run, given, chosen):
    torch.manual_seed(3)
    out = run(*given, chosen)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), given)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_graph_of_layers_is_whole_and_has_their_gradients(recipe):
    """Two numbers of tokens, of which the second makes them a symbol."""
    torch._dynamo.reset()
    run = layer(recipe)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (50, 61):
        given, chosen = inputs(tokens, torch.bfloat16)
        for found, wanted in zip(results(compiled, given, chosen), results(run, given, chosen), strict=True):
            assert found.dtype == wanted.dtype
            if RECIPES[recipe].gradient == "nearest":
                assert torch.equal(found, wanted)
            # Other draws, which round a gradient up or down by chance.
            assert (found - wanted).float().norm() <= 0.5 * wanted.float().norm()


def test_a_compiled_layer_has_the_gradients_of_the_plain_one():
    torch._dynamo.reset()
    given, chosen = inputs(50, torch.bfloat16)
    found = results(torch.compile(layer("MXFP8"), fullgraph=True), given, chosen)
    for one, other in zip(found, results(layer("MXFP8"), given, chosen), strict=True):
        # What is between layers may be rounded less often, and then otherwise to codes.
        assert (one - other).float().norm() <= 0.05 * other.float().norm()
