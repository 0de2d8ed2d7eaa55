"""Checkpoints of other programs, read and written: bit for bit, against encoders that share nothing with the package."""

from __future__ import annotations

import json
import random

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from foreign import KINDS, Weight, mxfp4_experts, nvfp4
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from lowbit import quantize as quantized
from lowbit.errors import CheckpointError
from lowbit.tensor import QuantizedTensor
from lowbit_hf import load
from lowbit_hf.convert import convert
from lowbit_hf.difference import Weights
from lowbit_hf.layouts import WRITERS

SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 20))]
Q = "model.layers.0.self_attn.q_proj"


def same_bits(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def assert_same_tensors(a, b):
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(one) == set(two)
    assert [name for name in one if not same_bits(one[name], two[name])] == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_others_come_in_and_go_out_bit_for_bit(foreign, tmp_path, kind, seed):
    folder, weights = foreign(kind, seed)
    made = convert(folder, tmp_path / "ct", WRITERS["compressed-tensors"])
    assert (made.weights, made.inexact) == (7, {})
    for path in (folder, tmp_path / "ct"):
        read = Weights(path)
        for module, (_, values, input_scale) in weights.items():
            held = read.read(f"{module}.weight")
            # A code times a scale is a float32 to the last bit, but for what a second scale rounds.
            assert torch.equal(held.dequantize(torch.float32), values.to(torch.float32))
            assert (None if held.act_scale is None else float(held.act_scale)) == input_scale
        read.close()
    back = convert(tmp_path / "ct", tmp_path / "back", WRITERS[KINDS[kind].export])
    assert back.inexact == {}
    assert_same_tensors(folder, tmp_path / "back")


OURS = [
    *[(name, layout) for name in ("W4A16_G32", "W8A16_G32", "W3A16_G64") for layout in ("gptq", "gptq_v2")],
    *[(name, layout) for name in ("W4A16_ASYM_G32",) for layout in ("gptq_v2", "awq")],
    *[("W4A16_G32", "awq"), ("FP8_BLOCK", "deepseek-fp8")],
    *[(name, "modelopt") for name in ("NVFP4A16", "FP8_DYNAMIC", "MXFP8")],
]


@pytest.mark.parametrize(("name", "layout"), OURS)
def test_ours_go_out_and_come_back_bit_for_bit(make, quantize, tmp_path, name, layout):
    folder = quantize(make("llama"), name)
    assert convert(folder, tmp_path / "out", WRITERS[layout]).inexact == {}
    assert convert(tmp_path / "out", tmp_path / "back", WRITERS["compressed-tensors"]).inexact == {}
    assert_same_tensors(folder, tmp_path / "back")
    one, two = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
    assert one == two


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_itself_reads_what_others_become(foreign, tmp_path, kind):
    folder, weights = foreign(kind, 4)
    convert(folder, tmp_path / "ct", WRITERS["compressed-tensors"])
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    scheme = QuantizationScheme(**group)
    for module, (_, values, _) in weights.items():
        parts = {name.rpartition(".")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{module}.")}
        read = BaseCompressor.get_value_from_registry(group["format"]).decompress(parts, scheme)["weight"]
        # It multiplies in the dtype of its scales.
        error = (read.to(torch.float64) - values).abs() / values.abs().clamp_min(1e-30)
        assert float(error.max()) <= torch.finfo(read.dtype).eps


def test_a_model_computes_the_same_from_either_layout(foreign, tmp_path):
    ids = torch.arange(16).view(1, -1)
    for kind in ("gptq", "awq", "modelopt nvfp4", "modelopt fp8"):
        folder, _ = foreign(kind, 1)
        convert(folder, tmp_path / kind, WRITERS["compressed-tensors"])
        with torch.inference_mode():
            a, b = (load(path)(ids).logits for path in (folder, tmp_path / kind))
        assert bool(a.isfinite().all())
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["gptq", "awq", "modelopt nvfp4a16", "modelopt mxfp8", "fp8"])
def test_dequantized_checkpoints_hold_what_weights_stand_for(foreign, tmp_path, kind):
    folder, weights = foreign(kind, 2)
    made = convert(folder, tmp_path / "plain", None)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    stored, before = load_file(tmp_path / "plain" / "model.safetensors"), load_file(folder / "model.safetensors")
    for module, weight in weights.items():
        assert torch.equal(stored.pop(f"{module}.weight"), weight.values.to(torch.float32).bfloat16())
    assert made.carried == len(stored)
    assert all(same_bits(tensor, before[name]) for name, tensor in stored.items())


def test_what_is_not_exact_says_by_how_much(foreign, tmp_path):
    folder, _ = foreign("modelopt nvfp4a16", 0, power=False)
    made = convert(folder, tmp_path / "ct", WRITERS["compressed-tensors"])
    # A reciprocal is rounded, and its reciprocal too: an ulp of float32 at most, where it is not the number again.
    assert all(0 < change <= 2**-22 for change in made.inexact.values())
    assert made.inexact


REFUSED = {
    "modelopt": ("W4A16_G32", "none of which is int4"),
    "awq": ("W3A16_G32", "integers of 4 bits"),
    "gptq": ("W5A16_G32", "integers of 2, 3, 4, 8 bits"),
    "deepseek-fp8": ("FP8_DYNAMIC", "e4m3 in blocks of 128 x 128"),
    "gptq_v2": ("W4A8_G32", "leaves inputs as they are"),
    "mxfp4-gptoss": ("MXFP4A16", "stacks of experts"),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_say_what_they_cannot_hold(make, quantize, tmp_path, layout):
    name, words = REFUSED[layout]
    with pytest.raises(CheckpointError, match=words):
        convert(quantize(make("llama"), name), tmp_path / "out", WRITERS[layout])
    assert not (tmp_path / "out").exists()


def test_modelopt_has_one_tensor_scale_a_matrix():
    parts = [quantized(torch.ones(16, 32) * size, "NVFP4") for size in (1, 4)]
    with pytest.raises(CheckpointError, match="one tensor scale a matrix, not 32 that differ"):
        WRITERS["modelopt"].tensors(torch.cat(parts))


def test_a_plain_checkpoint_has_nothing_to_convert(make, tmp_path):
    with pytest.raises(CheckpointError, match="holds no quantized weights"):
        convert(make("llama"), tmp_path / "out", WRITERS["gptq"])


def damaged(folder, change, tmp_path):
    """A copy with some of its tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out = tmp_path / "damaged"
    out.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


DAMAGE = {
    "no scales": ("gptq", lambda t: t.pop(f"{Q}.scales"), "'scales' is missing"),
    "no zeros": ("gptq", lambda t: t.pop(f"{Q}.qzeros"), "'qzeros' is missing"),
    "scattered": ("gptq", lambda t: t[f"{Q}.g_idx"].copy_(t[f"{Q}.g_idx"].flip(0)), "scattered over the columns"),
    "short zeros": ("awq", lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:, 1:]}), "needed is"),
    "a flat scale": (
        "modelopt mxfp8",
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][0]}),
        "of 2 dims",
    ),
    "a wide weight": ("modelopt fp8", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), "quant_algo"),
    "a smoothed weight": (
        "modelopt fp8",
        lambda t: t.update({f"{Q}.pre_quant_scale": torch.ones(4)}),
        "pre_quant_scale",
    ),
    "few blocks": ("fp8", lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(1, 1)}), "weight_scale_inv is"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_of_others_are_refused(foreign, tmp_path, case):
    kind, change, words = DAMAGE[case]
    folder, _ = foreign(kind, 1)
    with pytest.raises(CheckpointError, match=f"{Q}.*{words}"):
        load(damaged(folder, change, tmp_path))


CONFIGS = {
    "5 bits": ("gptq", {"bits": 5}, "lowbit reads bits"),
    "no bits": ("gptq", {"bits": None}, "bits None"),
    "gemv": ("awq", {"version": "gemv"}, "version 'gemv'"),
    "other blocks": ("fp8", {"weight_block_size": [64, 64]}, "weight_block_size"),
    "another method": ("fp8", {"quant_method": "hqq"}, "quantized by 'hqq'; lowbit reads compressed-tensors, gptq"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_of_others_that_lowbit_cannot_read(foreign, case):
    kind, edit, words = CONFIGS[case]
    folder, _ = foreign(kind, 1)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= edit
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_the_legacy_file_of_modelopt_is_read(foreign):
    folder, weights = foreign("modelopt nvfp4", 3)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    told = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": told}))
    held = dict(load(folder).named_parameters())[f"{Q}.weight"]
    assert torch.equal(held.dequantize(torch.float32), weights[Q].values.to(torch.float32))


def test_dynamic_settings_of_gptqmodel_are_followed(foreign, tmp_path):
    """One module of other bits, as `dynamic` says by a pattern; and written so again."""
    folder, weights = foreign("gptq", 2)  # 4 bits
    other = KINDS["gptq"].weight(random.Random(7), 64, 64, bits=8, group=32, symmetric=True, version=1)
    tensors = load_file(folder / "model.safetensors") | {f"{Q}.{name}": t for name, t in other.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"+:.*\.q_proj$": {"bits": 8}, r"-:.*lm_head": {}}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "ct", WRITERS["compressed-tensors"])
    convert(tmp_path / "ct", tmp_path / "back", WRITERS["gptq"])
    assert_same_tensors(folder, tmp_path / "back")
    held = dict(load(tmp_path / "back").named_parameters())
    for module, weight in (weights | {Q: other}).items():
        assert isinstance(held[f"{module}.weight"], QuantizedTensor)
        assert torch.equal(held[f"{module}.weight"].dequantize(torch.float32), weight.values.to(torch.float32))


def test_stacks_of_experts_of_gpt_oss(tmp_path):
    """Read, computed with, made plain and written again, all to the bit."""
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=32,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        max_position_embeddings=131072,
        layer_types=["full_attention"],
    )
    folder, plain, again = (tmp_path / name for name in ("oss", "plain", "again"))
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    tensors, values, draw = load_file(folder / "model.safetensors"), {}, random.Random(0)
    for name, (n, k) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
        stack = f"model.layers.0.mlp.experts.{name}"
        del tensors[stack]
        parts, values[stack] = mxfp4_experts(draw, 2, n, k)
        tensors |= {f"{stack}_{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(raw))
    assert convert(folder, plain, None).weights == 2
    stored = load_file(plain / "model.safetensors")
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in values.items())
    assert convert(folder, again, WRITERS["mxfp4-gptoss"]).inexact == {}
    assert_same_tensors(folder, again)
    model, ids = load(folder), torch.arange(8).view(1, -1)
    assert isinstance(model.get_parameter("model.layers.0.mlp.experts.gate_up_proj"), QuantizedTensor)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, load(plain)(ids).logits)


def test_an_encoder_that_is_wrong_is_told():
    """The oracle itself: what it says a weight stands for follows from its tensors."""
    weight: Weight = nvfp4(random.Random(0), 2, 32, inputs=False, power=True)
    packed, scale = weight.tensors["weight"], weight.tensors["weight_scale"]
    low = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for i, j in ((0, 0), (1, 17), (1, 31)):
        code = int(packed[i, j // 2]) >> (4 * (j % 2)) & 15
        value = (
            low[code & 7] * (-1 if code & 8 else 1) * float(scale[i, j // 16]) * float(weight.tensors["weight_scale_2"])
        )
        assert float(weight.values[i, j]) == value
