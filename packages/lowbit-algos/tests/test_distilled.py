"""Rounding learned from what the whole model predicts, judged on text that it was not learned from."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from predictor import Predictor, divergence, made, text
from ranks import ranks
from torch import distributed

from lowbit import LowbitError, QuantizedTensor, Recipe, RecipeError, Rule
from lowbit_algos import Method, calibrate_
from lowbit_algos.learned import _Learning

GPTQ = Method()
DISTILLED = Method(distilled=20)
RECIPES = {
    "int2": Recipe((Rule.of("blocks.*", "int2:1x32:bfloat16", modules="Linear"),)),
    "MXFP4, inputs too": Recipe((Rule.of("blocks.*", "MXFP4", activation="dynamic:MXFP4", modules="Linear"),)),
    "a tied embedding": Recipe(
        (
            Rule.of("blocks.*", "INT4_G32", modules="Linear"),
            Rule.of("embed.weight", "INT4_G32"),
        )
    ),
}


@pytest.mark.parametrize("kind", list(RECIPES))
def test_predictions_come_closer_on_other_text(kind):
    original, other, notes = made(), text(2), []

    def solved(method):
        model = made()
        calibrate_(model, RECIPES[kind], text(1), method, take=lambda block, _: notes.append(block.layers[0].notes))
        return model, divergence(model, original, other)

    (_, before), (model, after) = solved(GPTQ), solved(DISTILLED)
    told = notes[-1][-1].split()
    assert after < 0.95 * before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.head.weight is model.embed.weight
    held = text(1)[-1]
    # What it tells is of what was held out, the head's inputs and all as the model computes them.
    assert float(told[3]) == pytest.approx(divergence(model, original, held), rel=1e-2)
    if kind == "int2":
        assert solved(DISTILLED)[1] == after


def test_what_is_no_better_is_not_kept(monkeypatch):
    step = _Learning.step
    monkeypatch.setattr(_Learning, "step", lambda self, rate: step(self, -rate))
    models = []
    for method in (GPTQ, replace(DISTILLED, distilled=5)):
        model = made()
        calibrate_(model, RECIPES["int2"], text(1), method)
        models.append(model)
    assert torch.equal(*(model.blocks[1].up.weight.qdata for model in models))


def on_a_rank():
    model, rank = made(), distributed.get_rank()
    calibrate_(model, RECIPES["int2"], text(1)[rank::2], DISTILLED)
    return {name: part.dequantize() for name, part in model.named_parameters() if isinstance(part, QuantizedTensor)}


def test_two_ranks_distill_the_same():
    original, other = made(), text(2)
    with ranks(2) as two:
        first, second = two.run(on_a_rank)
    one, model = made(), made()
    calibrate_(one, RECIPES["int2"], text(1), DISTILLED)
    for name, values in first.items():
        assert torch.equal(values, second[name])
        model.get_parameter(name).data = values
    # Batches of two processes make other steps than those of one, as good as they are.
    assert divergence(model, original, other) == pytest.approx(divergence(one, original, other), rel=0.1)


def test_a_model_without_logits_is_refused():
    class Pair(Predictor):
        def forward(self, ids):
            return super().forward(ids), None

    model = Pair().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LowbitError, match=r"returns tuple without logits; distillation needs a model that predicts"):
        calibrate_(model, RECIPES["int2"], text(1), DISTILLED)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_it_is_called_by_name():
    assert Method.of("gptq+distilled").distilled > 0
    assert Method.of("distilled+gptq").name == "gptq+distilled"
    with pytest.raises(RecipeError, match="one of each"):
        Method.of("distilled+distilled")
