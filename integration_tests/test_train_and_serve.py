"""Small real models trained in low precision, written as quantized ones by lowbit-hf, and read again."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit_hf
from lowbit import FormatError
from lowbit.tensor import QuantizedTensor
from lowbit_hf.schemes import scheme_for
from lowbit_moe import AdamW, TrainRule, convert_, to_serving


@pytest.mark.parametrize("recipe", ["MXFP8", "FP8_ROW"])
@pytest.mark.parametrize("name", ["lm-tiny", "moe-tiny"])
def test_a_trained_model_computes_the_same_once_it_was_served_saved_and_loaded(models, tmp_path, name, recipe):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
    # Between bfloat16s and float32 the embedding is as it is; its share in the head is rounded.
    convert_(model, [TrainRule("*", recipe)])
    optimizer = AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(2, model.config.vocab_size, (2, 24))
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        wanted = model(ids).logits
        served = lowbit_hf.attach(to_serving(model))
        assert torch.equal(served(ids).logits, wanted)
        served.save_pretrained(tmp_path)
        loaded = lowbit_hf.load(tmp_path)
        assert torch.equal(loaded(ids).logits, wanted)
    weight = loaded.model.layers[0].self_attn.q_proj.weight
    assert isinstance(weight, QuantizedTensor)
    assert weight.activation.mode == "rceil"
    with pytest.raises(FormatError, match="cannot say that scales of inputs are chosen by 'rceil'"):
        scheme_for(weight.format, weight.activation)
