"""Tokens through their experts, beside each token's experts one by one in float64."""

from __future__ import annotations

import pytest
import torch

from lowbit import FormatError
from lowbit_moe import Routing, count_products, swiglu_experts

TOKENS, WIDTH, COLUMNS, EXPERTS = 33, 40, 24, 5


def given(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (TOKENS, WIDTH),
        (TOKENS, 2),
        (EXPERTS, 2 * COLUMNS, WIDTH),
        (EXPERTS, WIDTH, COLUMNS),
        (EXPERTS, 2 * COLUMNS),
        (EXPERTS, WIDTH),
    )
    parts = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]
    # Of some expert there is no token; of some token, one expert is none.
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(TOKENS)])
    chosen[3, 1] = chosen[7, 0] = EXPERTS
    return parts, chosen


def one_by_one(x, weights, gate_up, down, gate_up_bias, down_bias, chosen):
    rows = []
    for t in range(len(x)):
        total = torch.zeros(WIDTH, dtype=x.dtype)
        for i, e in enumerate(chosen[t].tolist()):
            if e < EXPERTS:
                gate, up = (gate_up[e] @ x[t] + gate_up_bias[e]).chunk(2)
                total = total + weights[t, i] * (down[e] @ (torch.nn.functional.silu(gate) * up) + down_bias[e])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(("recipe", "least"), [("BF16", 100.0), ("MXFP8", 22.0), ("FP8_ROW", 22.0), ("NVFP4", 9.0)])
def test_each_token_gets_the_weighted_sum_of_its_experts(recipe, least):
    exact, chosen = given()
    wanted = one_by_one(*exact, chosen)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    truth = [wanted.detach(), *torch.autograd.grad(wanted, exact, upstream)]
    x, weights, gate_up, down, gate_up_bias, down_bias = parts = given(torch.float32)[0]
    with count_products() as counts:
        out = swiglu_experts(
            x, chosen, weights, gate_up, down, recipe=recipe, gate_up_bias=gate_up_bias, down_bias=down_bias
        )
        found = [out.detach(), *torch.autograd.grad(out, parts, upstream.float())]
    # Three products of each of two layers, none of them in the operands' own precision unless the recipe is.
    assert counts == {"plain" if recipe == "BF16" else "emulated": 6}
    for one, other in zip(found, truth, strict=True):
        lost = (one.double() - other).pow(2).sum()
        assert 10 * torch.log10(other.pow(2).sum() / lost) > least


def test_rows_are_in_the_order_of_their_experts():
    chosen = torch.tensor([[2, 0], [5, 2], [0, 1]])
    routing = Routing.of(chosen, 4)
    assert routing.tokens.tolist() == [0, 2, 2, 0, 1, 1]
    assert routing.offs.tolist() == [2, 3, 5, 5]
    assert routing.places.tolist() == [[3, 0], [5, 4], [1, 2]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(FormatError, match=r"chosen experts are \(T, k\) integers; these are torch.float32 \(3, 2\)"):
        Routing.of(torch.zeros(3, 2), 4)
    (x, weights, gate_up, down, *_), chosen = given(torch.float32)
    with pytest.raises(FormatError, match="have T in common"):
        swiglu_experts(x, chosen[:4], weights[:4], gate_up, down)
