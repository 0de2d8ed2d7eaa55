"""Rotation: the same function in another basis, found from what blocks compute, or refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_smooth import HEAD, Attention, K
from torch import nn
from torch.nn import functional as F

from lowbit import LowbitError, Recipe, RecipeError, Rule
from lowbit.hadamard import Rotation
from lowbit_algos import Method, calibrate_
from lowbit_algos.blocks import Call, Probe
from lowbit_algos.rotation import find_ends, find_turns

WIDE = 96


class Block(nn.Module):
    def __init__(self, norm=nn.RMSNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(K), norm(K)
        self.attention = Attention()
        self.gate, self.up, self.down = nn.Linear(K, WIDE), nn.Linear(K, WIDE), nn.Linear(WIDE, K)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Two blocks; the head shares the embedding's weight."""

    def __init__(self, norm=nn.RMSNorm, *, tied=True):
        super().__init__()
        self.embed = nn.Embedding(50, K)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(K), nn.Linear(K, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def made(*args, outliers=False, **kwargs):
    torch.manual_seed(0)
    model = Model(*args, **kwargs).eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape) * 0.2
    # Some channels that norms make large, made up for in the weights behind them.
    for block in model.blocks if outliers else ():
        a = block.attention
        for norm, takers in ((block.norm1, (a.q, a.k, a.v)), (block.norm2, (block.gate, block.up))):
            norm.weight.data[:3] *= 60
            for taker in takers:
                taker.weight.data[:, :3] /= 60
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def batches():
    return list(torch.randint(50, (6, 8, 16), generator=torch.Generator().manual_seed(1)))


def linears(block):
    return {name: -1 for name, p in block.named_parameters() if p.dim() == 2}


def probe_of(block):
    return Probe(block, Call((None,), {}, 0), torch.randn(2, 16, K, generator=torch.Generator().manual_seed(2)))


def test_what_makes_and_takes_hidden_states_is_found():
    block = made().blocks[0]
    before = copy.deepcopy(block.state_dict())
    turns = find_turns(block, linears(block), probe_of(block), Rotation(K))
    assert turns.takers == {
        **{f"attention.{name}.weight": ("norm1.weight", -1) for name in "qkv"},
        **{f"{name}.weight": ("norm2.weight", -1) for name in ("gate", "up")},
    }
    assert turns.makers == {"attention.out.weight": -2, "attention.out.bias": -1, "down.weight": -2, "down.bias": -1}
    assert turns.heads == {
        "attention.v.weight": (0, HEAD),
        "attention.v.bias": (0, HEAD),
        "attention.out.weight": (-1, HEAD),
    }
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_the_function_stays_the_same_to_float32_rounding(batches, tied):
    model, rotation = made(tied=tied, outliers=True), Rotation(K)
    wanted = model(batches[0])
    ends = find_ends(model, ["blocks.0", "blocks.1"])
    assert ends.names == ("embed.weight", "norm.weight", "head.weight")
    norm = model.norm.weight.clone()
    turned = {name: ends.turned(name, model.get_parameter(name), rotation, norm) for name in ends.names}
    for name, weight in turned.items():
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(weight)
    for block in model.blocks:
        before = block.state_dict()
        turns = find_turns(block, linears(block), probe_of(block), rotation)
        for name, values in turns.apply(block, rotation).items():
            assert not torch.equal(values, before[name]), name
            block.get_parameter(name).data = values
    assert float((model(batches[0]) - wanted).norm() / wanted.norm()) < 1e-5


def rise(recipe, method, batches):
    model = made(outliers=True)
    plain = copy.deepcopy(model)
    calibrate_(model, recipe, batches, method)
    a, b = (torch.cat([m(batch) for batch in batches]) for m in (model, plain))
    return model, float((a - b).norm() / b.norm())


W4A4 = Recipe((Rule.of("blocks.*", "INT4_G32", activation="dynamic:INT4_G32", modules="Linear"),))


def test_outliers_are_spread(batches):
    for method in (Method(rounding="nearest"), Method()):
        _, plain = rise(W4A4, method, batches)
        model, rotated = rise(W4A4, replace(method, rotation=True), batches)
        assert rotated < 0.9 * plain
    assert model.head.weight is not model.embed.weight
    assert torch.equal(model.norm.weight, torch.ones(K))


def test_a_run_that_fails_leaves_the_model_as_it_was(batches):
    model = made()
    before = copy.deepcopy(model.state_dict())
    recipe = Recipe((Rule.of("blocks.*", "INT4_G32", modules="Linear"),))

    def fail(block, weights):
        del weights
        if block.name == "blocks.1":
            raise LowbitError("stop")

    with pytest.raises(LowbitError, match="stop"):
        calibrate_(model, recipe, batches, Method.of("rotation+gptq"), take=fail)
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_norms_that_take_the_mean_off_are_refused(batches):
    model = made(nn.LayerNorm)
    with pytest.raises(LowbitError, match="does not return the same in a rotated basis.*choose algorithms without"):
        calibrate_(model, W4A4, batches, Method.of("rotation+gptq"))


def test_what_else_lies_outside_the_blocks_is_named(batches):
    model = made()
    model.positions = nn.Embedding(16, K)
    with pytest.raises(LowbitError, match=r"rotation needs .* outside its blocks this one has .*positions.weight"):
        calibrate_(model, W4A4, batches, Method.of("rotation+gptq"))


def test_rotation_alone_is_not_offered():
    with pytest.raises(RecipeError, match=r"rotation .* join it with"):
        Method.of("rotation")
    assert Method.of("gptq+rotation").name == "rotation+gptq"
