"""Which modules compute by which recipe, and that nothing else of a model changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import RecipeError
from lowbit_moe import TrainRule, convert_, count_products, linear, swiglu_experts


class Experts(nn.Module):
    """As transformers has them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.down_proj = nn.Parameter(torch.randn(4, 32, 32) / 8)
        self.act_fn = nn.functional.silu

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError


class Grouped(nn.Module):
    """As torchtitan has them."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(4, 48, 32) / 8) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(4, 32, 48) / 8)

    def forward(self, x, num_tokens_per_expert):
        raise AssertionError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.gate = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        self.experts, self.last = Experts(), nn.Linear(32, 16, bias=False)

    def forward(self, x):
        y = self.norm(self.first(x))
        weights, chosen = self.gate(y).softmax(-1).topk(2)
        return self.last(self.experts(y, chosen, weights))


def test_a_recipe_takes_layers_and_experts_but_no_router():
    model, x = Model(), torch.randn(50, 32, requires_grad=True)
    before, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    told = convert_(model, "MXFP8")
    assert {row.name: row.recipe and row.recipe.name for row in told.rows} == {
        "first": "MXFP8",
        "gate": None,
        "experts": "MXFP8",
        "last": "MXFP8",
    }
    assert "gate     plain     a router, which no rule names" in str(told)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert type(model.gate) is nn.Linear
    assert isinstance(model.first, nn.Linear)
    assert "recipe=MXFP8" in repr(model.first)
    with count_products() as counts:
        out = model(x)
        out.square().sum().backward()
    # Two layers and the experts' two, three products each.
    assert counts == {"emulated": 12}
    y = model.norm(linear(x, model.first.weight, model.first.bias, "MXFP8"))
    weights, chosen = model.gate(y).softmax(-1).topk(2)
    experts = model.experts
    mixed = swiglu_experts(y, chosen, weights, experts.gate_up_proj, experts.down_proj, recipe="MXFP8")
    assert torch.equal(out, linear(mixed, model.last.weight, None, "MXFP8"))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_first_rule_that_matches_decides_and_exact_names_reach_routers():
    model = Model()
    rules = [TrainRule("last.weight", None), TrainRule("gate.weight", "FP8_ROW"), TrainRule("*", "MXFP8", ("Linear",))]
    told = {row.name: (row.recipe and row.recipe.name, row.reason) for row in convert_(model, rules).rows}
    assert told == {
        "first": ("MXFP8", None),
        "gate": ("FP8_ROW", None),
        "experts": (None, "no rule matches it"),
        "last": (None, "rule 'last.weight' keeps it"),
    }
    # Once more, by another recipe.
    convert_(model, "FP8_ROW")
    assert model.first.train_recipe.name == "FP8_ROW"


def test_nvfp4_keeps_the_first_and_the_last():
    told = {row.name: row.recipe and row.recipe.name for row in convert_(Model(), "NVFP4").rows}
    assert told == {"first": None, "gate": None, "experts": "NVFP4", "last": None}


def test_layers_that_are_kept_are_kept_whole():
    """All modules of a layer begin alike up to the first number."""
    block = {"attention": nn.ModuleDict({"q": nn.Linear(16, 16), "o": nn.Linear(16, 16)}), "up": nn.Linear(16, 16)}
    model = nn.Module()
    model.model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict(copy.deepcopy(block)) for _ in range(4))})
    kept = {row.name: row.reason for row in convert_(model, "NVFP4").rows}
    parts, why = ("attention.q", "attention.o", "up"), "the recipe keeps the first and the last layer"
    assert kept == {f"model.layers.{i}.{part}": why if i in {0, 3} else None for i in range(4) for part in parts}


def test_experts_with_three_weights_take_rows_in_order():
    model, x, counts = nn.Sequential(Grouped()), torch.randn(20, 32), torch.tensor([5, 0, 9, 3])
    convert_(model, "BF16")
    found, (grouped,) = model[0](x, counts), model
    start = 0
    for e, count in enumerate(counts.tolist()):
        rows = x[start : start + count]
        hidden = nn.functional.silu(rows @ grouped.w1[e].T) * (rows @ grouped.w3[e].T)
        torch.testing.assert_close(found[start : start + count], hidden @ grouped.w2[e].T)
        start += count
    assert found[start:].count_nonzero() == 0


def test_what_cannot_be_done_changes_nothing():
    model = Model()
    with pytest.raises(
        RecipeError, match="rules 'nowhere.weight' match no weight .* there are first.weight, gate.weight"
    ):
        convert_(model, [TrainRule("*", "MXFP8"), TrainRule("nowhere.weight", "MXFP8")])
    assert type(model.first) is nn.Linear
    model.last.weight = nn.Parameter(lowbit.quantize(model.last.weight.detach(), "MXFP8"), requires_grad=False)
    with pytest.raises(RecipeError, match="last hold quantized weights; training needs plain ones"):
        convert_(model, "MXFP8")
    assert type(model.first) is nn.Linear
    with pytest.raises(RecipeError, match="training recipe 'MXFP9' is unknown; use one of BF16, FP8_TENSOR"):
        convert_(model, "MXFP9")
