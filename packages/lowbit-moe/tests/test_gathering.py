"""Weights that fully_shard gathers as codes: what two ranks learn is what one learns."""

from __future__ import annotations

import pytest
import torch
from ranks import ranks
from stepping import gathered
from torch import nn

from lowbit import RecipeError
from lowbit_moe import convert_, linear


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def two(request):
    with ranks(2, request.param) as started:
        yield request.param, started


@pytest.mark.parametrize("recipe", ["FP8_TENSOR", "FP8_BLOCK", "MXFP8", "MXFP8_WGRAD_BF16"])
def test_ranks_that_gather_codes_learn_what_one_learns(two, recipe):
    """Codes are those of the whole weight, forward and backward, and again after a step: every bit is the same."""
    device, started = two
    losses, gradients, parameters, _ = gathered(recipe, False, 0, device)
    for mine, of_gradients, of_parameters, sent in started.run(gathered, recipe, True, 2, device):
        assert mine == losses
        # Of a number's 4 bytes one travels, or two where rows and columns have codes of their own, and their scales.
        each = 1 if recipe in {"FP8_TENSOR", "FP8_BLOCK"} else 2
        assert each <= sent < each * 1.04
        assert all(map(torch.equal, of_gradients, gradients))
        assert all(map(torch.equal, of_parameters, parameters))


def test_a_weight_whose_codes_would_travel_is_a_parameter_like_any_other():
    torch.manual_seed(0)
    plain = nn.Linear(64, 96)
    x, weight = torch.randn(5, 64), plain.weight.detach().clone().requires_grad_()
    model = nn.Sequential(plain)
    convert_(model, "MXFP8", fp8_all_gather=True)
    assert isinstance(model[0].weight, nn.Parameter)
    model(x).sum().backward()
    linear(x, weight, plain.bias.detach(), "MXFP8").sum().backward()
    assert torch.equal(torch.as_tensor(model[0].weight.grad), weight.grad)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("recipe", ["FP8_ROW", "NVFP4", "BF16"])
def test_recipes_whose_codes_are_not_one_shares_own_are_refused(recipe):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(RecipeError, match=f"weights of {recipe} are not gathered as codes"):
        convert_(model, recipe, fp8_all_gather=True)
    assert all(type(part) is nn.Linear for part in model)


def test_shares_that_end_within_a_block_are_refused(two):
    with pytest.raises(AssertionError, match="needed is a multiple of 256 rows; leave fp8_all_gather out"):
        two[1].run(odd, two[0])


def odd(device):
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - of each process

    model = nn.Sequential(nn.Linear(128, 192)).to(device)
    convert_(model, "FP8_BLOCK", fp8_all_gather=True)
    fully_shard(model)
    model(torch.randn(4, 128, device=device))
