"""SmoothQuant on a real model that needs it: its norms and weights rewritten so that inputs have outliers."""

from __future__ import annotations

import pytest
import torch

from lowbit import Recipe, Rule
from lowbit_algos import Method, calibrate_
from lowbit_hf import load
from lowbit_hf.evaluate import evaluate, tokenize
from lowbit_hf.schemes import scheme
from lowbit_hf.texts import Calibration

ROUNDS = {"W8A8": (0.2, 0.007), "W8A8_STATIC": (0.2, 0.03)}


def with_outliers(folder):
    """The same function to all but the last bits: five channels of every norm times 64, the next weights' columns less."""
    model, generator = load(folder), torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, consumers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:5]
            norm.weight.data[channels] *= 64
            for consumer in consumers:
                consumer.weight.data[:, channels] /= 64
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ROUNDS))
def test_smoothquant_mends_a_model_that_needs_it(models, name):
    folder, chosen = models / "lm-tiny", scheme(name)
    ids = tokenize(folder, models / "calibration.txt")[-20000:]
    batches = Calibration((models / "calibration.txt",), 96, 512).windows(folder)[:32].split(8)
    recipe = Recipe((Rule("re:.*_proj.weight", chosen.weight_format(torch.bfloat16), chosen.activation),))
    base = evaluate(with_outliers(folder), ids, context=512).perplexity
    assert base == pytest.approx(evaluate(load(folder), ids, context=512).perplexity, rel=1e-6)
    rises = []
    for method in ("rtn", "smoothquant"):
        model = with_outliers(folder)
        calibrate_(model, recipe, ({"input_ids": b, "use_cache": False} for b in batches), Method.of(method))
        rises.append(evaluate(model, ids, context=512).perplexity / base - 1)
    assert rises[0] > ROUNDS[name][0]
    assert rises[1] < ROUNDS[name][1]
