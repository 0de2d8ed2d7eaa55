"""`lowbit verify`: what other programs read, against what lowbit reads."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from foreign import KINDS, mxfp4_experts

from lowbit.errors import CheckpointError
from lowbit_hf.convert import convert
from lowbit_hf.layouts import WRITERS
from lowbit_hf.layouts.gptq import Gptq
from lowbit_hf.verify.checking import compare, pair
from lowbit_hf.verify.decoders import DECODERS
from lowbit_hf.verify.readers import ByCompressedTensors

WEIGHTS = 14


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_decoders_read_what_encoders_wrote(foreign, kind, seed):
    folder, weights = foreign(kind, seed)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for tensors, values, _ in weights.values():
        made = torch.from_numpy(DECODERS[config["quant_method"]](tensors, config))
        assert torch.equal(made, values.to(torch.float32))
    (reading,) = compare(folder, ["numpy"])
    assert (reading.weights, reading.unequal, reading.refused) == (7, (), None)


def test_the_decoder_of_stacks():
    tensors, values = mxfp4_experts(Random(1), 3, 16, 64)
    assert torch.equal(torch.from_numpy(DECODERS["mxfp4"](tensors, {})).mT, values.to(torch.float32))


@pytest.mark.parametrize("name", ["W4A16", "W8A8", "FP8_BLOCK", "MXFP8", "NVFP4A16"])
def test_both_readers_agree_with_lowbit(make, quantize, tokens, name):
    folder = quantize(make("qwen3"), name)
    for reading in compare(folder):
        assert (reading.weights, reading.unequal, reading.refused) == (WEIGHTS, (), None)
    both = pair(folder)
    assert both.how.endswith("as it runs")
    assert both.hindrance is None
    with torch.no_grad():
        ours, theirs = (model(tokens).logits.float().log_softmax(-1) for model in (both.ours, both.theirs))
    if name in ("W4A16", "NVFP4A16"):
        assert torch.equal(ours, theirs)
    else:
        # Inputs are rounded by both, each its own way.
        assert 0 < float((ours - theirs).abs().max()) < 0.2


def test_a_reader_that_errs_is_found_out(make, quantize, tmp_path, monkeypatch):
    convert(quantize(make("llama"), "W4A16_G32"), tmp_path / "out", WRITERS["gptq"])
    assert not compare(tmp_path / "out", ["numpy"])[0].unequal
    monkeypatch.setattr(Gptq, "_version", 2)
    (reading,) = compare(tmp_path / "out", ["numpy"])
    assert len(reading.unequal) == WEIGHTS
    # Every zero point is one off, and so every value by a scale.
    assert all(each.values == each.of for each in reading.unequal)


def test_values_that_transformers_drops_are_told(make, quantize):
    """It stacks experts without their global scales."""
    of_weights, of_model = compare(quantize(make("qwen3-moe"), "NVFP4A16"))
    assert of_weights.unequal == ()
    assert sorted(each.name for each in of_model.unequal) == [
        f"model.layers.{layer}.mlp.experts.{stack}_proj" for layer in (0, 1) for stack in ("down", "gate_up")
    ]
    assert all(each.values > 0.9 * each.of for each in of_model.unequal)


def test_what_cannot_be_verified(make, quantize, tmp_path, monkeypatch):
    folder = quantize(make("llama"), "W4A16_G32")
    with pytest.raises(CheckpointError, match="is not quantized, so there is nothing to verify"):
        compare(make("llama"))
    with pytest.raises(CheckpointError, match="and was asked for reads the layout 'compressed-tensors'"):
        compare(folder, ["numpy"])
    convert(folder, tmp_path / "own", WRITERS["lowbit"])
    with pytest.raises(
        CheckpointError, match="independent of lowbit reads the layout 'lowbit'; write another one first"
    ):
        compare(tmp_path / "own")
    monkeypatch.setattr(ByCompressedTensors, "package", "no-such-package")
    with pytest.raises(CheckpointError, match=r"no-such-package, .* run: pip install 'lowbit-hf\[verify\]'"):
        compare(folder)


def test_the_command(command, worded, quantize, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 94 + 2}" for i in range(300)))
    folder = quantize(worded("llama"), "W4A16_ASYM_G32")
    code, said, _ = command("verify", folder, "--text", text)
    assert code == 0
    assert said.count("14 of 14 equal in every value") == 2
    # A known fault of transformers 5.23, which reads these files well enough as plain weights.
    assert "transformers does not run it by itself: RuntimeError" in said
    assert "plain weights\nperplexity over 279 tokens: lowbit" in said
    convert(folder, tmp_path / "awq", WRITERS["awq"])
    code, said, _ = command("verify", tmp_path / "awq", "--text", text, "--json")
    told = json.loads(said)
    assert (code, told["failed"]) == (0, False)
    # But for what float32 leaves of it, which depends on the machine.
    assert told["ours"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert told["ours"]["perplexity"] == pytest.approx(told["theirs"]["perplexity"], rel=1e-5)
    assert [reading["refused"] is None for reading in told["readings"]] == [True, False]
    # Where nobody else reads it, nothing is shown.
    code, said, _ = command("verify", tmp_path / "awq", "--with", "transformers")
    assert code == 1
    assert "not read: ImportError" in said
    assert command("verify", tmp_path / "awq", "--with", "vllm")[0] == 2
