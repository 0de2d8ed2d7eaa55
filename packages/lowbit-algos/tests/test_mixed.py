"""Formats chosen weight by weight, against every choice there is and against what models then predict."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from predictor import Gated, K, divergence, made, text
from torch import nn

import lowbit as lb
from lowbit import Format, LowbitError, QuantizedTensor, Recipe, RecipeError, Rule
from lowbit_algos import Candidate, Method, calibrate_, mix
from lowbit_algos.mixed import Choice, Decision, choices, search, within

NEAREST = Method(rounding="nearest")
CANDIDATES = [
    Candidate("2", Format.parse("int2:1x32:bfloat16")),
    Candidate("3", Format.parse("int3:1x32:bfloat16")),
    Candidate("4", Format.parse("INT4_G32")),
    Candidate("6", Format.parse("int6:1x32:bfloat16")),
    Candidate("8", Format.parse("INT8_ROW")),
    Candidate("keep", None),
]


def decisions(seed, count=5):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        harms = torch.rand(4, generator=generator).exp2().sort(descending=True).values.tolist()
        bits = (torch.rand(4, generator=generator) * 10 + 1).sort().values.tolist()
        found.append(Decision((f"w{i}",), tuple(harms), tuple(bits)))
    return found


def every(found):
    for picks in itertools.product(range(4), repeat=len(found)):
        pairs = list(zip(found, picks, strict=True))
        yield math.fsum(d.harms[c] for d, c in pairs), math.fsum(d.bits[c] for d, c in pairs)


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_is_better(seed):
    found = decisions(seed)
    for choice in choices(found):
        best = min(harm for harm, bits in every(found) if bits <= choice.bits + 1e-9)
        assert choice.harm == pytest.approx(best)
        assert choice.harm == pytest.approx(math.fsum(d.harms[c] for d, c in zip(found, choice.picks, strict=True)))
    # Between such budgets, by no more than the one step that does not fit.
    step = max(d.harms[0] - d.harms[-1] for d in found)
    for budget in torch.linspace(choices(found)[0].bits, choices(found)[-1].bits, 9).tolist()[1:-1]:
        best = min(harm for harm, bits in every(found) if bits <= budget)
        choice = within(found, budget)
        assert choice.bits <= budget
        assert best <= choice.harm + 1e-9 <= best + step


def test_a_budget_that_is_too_small_is_told():
    with pytest.raises(LowbitError, match=r"the fewest bits that these candidates take are \d+, and 1 are allowed"):
        within(decisions(0), 1.0)


@pytest.mark.parametrize("factor", [0.3, 2.0, 40.0])
def test_the_search_finds_the_fewest_bits(factor):
    found, asked = decisions(3, 12), list[Choice]()

    def measure(choice):
        asked.append(choice)
        return factor * choice.harm * (1 + 0.05 * math.sin(choice.bits))

    row = choices(found)
    most = factor * row[len(row) // 2].harm
    choice, told = search(found, most, measure)
    assert told <= most
    assert len(asked) <= 7
    fewer = [other for other in row if other.bits < choice.bits]
    assert measure(fewer[-3]) > most
    with pytest.raises(LowbitError, match="the most precise choice of these candidates diverges by"):
        search(found, factor * row[-1].harm / 2, measure)


def test_harm_is_how_far_the_block_moves():
    model = made(Gated)
    found = mix(model, "blocks.*", CANDIDATES[1:3], text(1), NEAREST, bits_per_weight=4.0)
    names = [d.names for d in found.decisions]
    assert names[:2] == [("blocks.0.gate.weight", "blocks.0.up.weight"), ("blocks.0.down.weight",)]
    x = model.embed(text(1)[:4]).detach().double()
    for decision in found.decisions[:2]:
        for harm, candidate in zip(decision.harms, CANDIDATES[1:3], strict=True):
            block, moved = copy.deepcopy(model.blocks[0]).double(), copy.deepcopy(model.blocks[0]).double()
            for name in decision.names:
                local = name.removeprefix("blocks.0.")
                q = lb.quantize(model.get_parameter(name).detach(), candidate.format).dequantize()
                moved.get_parameter(local).data = q.double()
            with torch.no_grad():
                a, b = block(x), moved(x)
            assert harm == pytest.approx(float(((a - b).square().sum(-1) / a.square().sum(-1)).mean()), rel=1e-4)
    size = 2 * 128 * K
    assert found.decisions[0].bits == (size * 3.5, size * 4.5)


def test_a_mixture_keeps_its_budget_and_beats_one_format_of_as_many_bits():
    """The second block matters ten thousand times less."""
    original, other = made(Gated), text(2)
    with torch.no_grad():
        original.blocks[1].down.weight *= 0.01
        original.blocks[1].down.bias *= 0.01
    before = copy.deepcopy(original.state_dict())
    found = mix(original, "blocks.*", CANDIDATES, text(1), bits_per_weight=4.5)
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), before.values(), strict=True))
    assert found.bits_per_weight <= 4.5
    one, several = copy.deepcopy(original), copy.deepcopy(original)
    calibrate_(one, Recipe((Rule.of("blocks.*", "INT4_G32", modules="Linear"),)), text(1))
    calibrate_(several, found.recipe, text(1))
    low = [p for p in several.parameters() if isinstance(p, QuantizedTensor)]
    assert sum(8 * p.stored_bytes for p in low) <= 4.5 * sum(
        p.numel() for p in original.blocks.parameters() if p.dim() == 2
    )
    assert divergence(several, original, other) < 0.5 * divergence(one, original, other)
    assert type(several.blocks[0].down) is nn.Linear


def test_a_bound_on_the_divergence_is_kept():
    original = made(Gated)
    found = mix(original, "blocks.*", CANDIDATES, text(1), max_kl=2e-5)
    assert found.kl is not None
    assert found.kl <= 2e-5
    model = copy.deepcopy(original)
    calibrate_(model, found.recipe, text(1)[:-1])
    # Its own measurement was on what it did not calibrate on. So small a divergence is what float32 leaves of it.
    assert divergence(model, original, text(1)[-1]) == pytest.approx(found.kl, rel=1e-2)
    finer = mix(original, "blocks.*", CANDIDATES, text(1), max_kl=2e-6)
    assert finer.bits_per_weight > found.bits_per_weight
    with pytest.raises(LowbitError, match="add a candidate that is more precise, or keeps weights as they are"):
        mix(original, "blocks.*", CANDIDATES[:2], text(1), max_kl=1e-9)


def test_what_does_not_fit_is_told_before_anything_runs():
    model = made()
    with pytest.raises(RecipeError, match="128"):
        mix(model, "blocks.*.weight", [Candidate("g128", Format.parse("INT4_G128"))], [], bits_per_weight=5.0)
    with pytest.raises(LowbitError, match="one of bits_per_weight and max_kl"):
        mix(model, "blocks.*", CANDIDATES, text(1))
