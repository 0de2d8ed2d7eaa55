from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from lowbit.errors import CheckpointError
from lowbit_hf.skeleton import Skeleton, read_config

KINDS = ["llama", "qwen2", "mixtral", "gpt2"]
# What a name in the file stands for: the model's name, a class of its module, and whether it is one part of a stack.
OWNERS = {
    "llama": {
        "model.layers.0.self_attn.q_proj.weight": ("model.layers.0.self_attn.q_proj.weight", "Linear", False),
        "model.norm.weight": ("model.norm.weight", "LlamaRMSNorm", False),
        "model.embed_tokens.weight": ("model.embed_tokens.weight", "Embedding", False),
        "lm_head.weight": ("lm_head.weight", "Linear", False),
    },
    "mixtral": {
        "model.layers.1.block_sparse_moe.experts.3.w1.weight": ("model.layers.1.mlp.experts.gate_up_proj", None, True),
        "model.layers.1.block_sparse_moe.experts.3.w3.weight": ("model.layers.1.mlp.experts.gate_up_proj", None, True),
        "model.layers.1.block_sparse_moe.experts.3.w2.weight": ("model.layers.1.mlp.experts.down_proj", None, True),
        "model.layers.0.block_sparse_moe.gate.weight": ("model.layers.0.mlp.gate.weight", None, False),
    },
    "gpt2": {
        # Published GPT-2 files leave the prefix out.
        "h.0.attn.c_attn.weight": ("transformer.h.0.attn.c_attn.weight", "Conv1D", False),
        "transformer.h.1.mlp.c_fc.bias": ("transformer.h.1.mlp.c_fc.bias", "Conv1D", False),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in OWNERS.items() for name in names])
def test_owner(make, kind, name):
    owner = Skeleton.build(make(kind)).owner(name)
    wanted, cls, stacked = OWNERS[kind][name]
    assert owner is not None
    assert (owner.name, owner.stacked) == (wanted, stacked)
    assert cls is None or cls in owner.classes


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_saved_model_has_an_owner(make, stock, kind):
    skeleton = Skeleton.build(make(kind))
    owners = {name: skeleton.owner(name) for name in load_file(make(kind) / "model.safetensors")}
    parameters = {name for name, _ in stock(make(kind)).named_parameters()}
    assert None not in owners.values()
    assert {owner.name for owner in owners.values()} == parameters


def test_tensors_the_model_has_no_place_for(make):
    skeleton = Skeleton.build(make("llama"))
    for name in (
        "model.layers.2.self_attn.q_proj.weight",
        "mtp.fc.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
    ):
        assert skeleton.owner(name) is None


def test_builds_without_memory(make):
    skeleton = Skeleton.build(make("mixtral"))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert skeleton.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_linears_and_the_head(make, stock, kind):
    model, skeleton = stock(make(kind)), Skeleton.build(make(kind))
    classes = (torch.nn.Linear, Conv1D)
    assert set(skeleton.linears) == {name for name, module in model.named_modules() if isinstance(module, classes)}
    assert skeleton.output_embedding == "lm_head"


def test_values_that_json_lacks(tmp_path):
    config = transformers.Mamba2Config(hidden_size=64, num_heads=4, head_dim=32, num_hidden_layers=1, vocab_size=96)
    config.architectures = ["Mamba2ForCausalLM"]
    config.save_pretrained(tmp_path)  # writes the infinite time_step_limit in a way of its own
    assert Skeleton.build(tmp_path).config.time_step_limit[1] == torch.inf


def test_old_spelling_of_dtype(make, change):
    folder = change(make("llama"), config=lambda c: c.update(torch_dtype=c.pop("dtype")))
    assert Skeleton.build(folder).dtype == torch.bfloat16
    assert Skeleton.build(change(folder, config=lambda c: c.pop("torch_dtype"))).dtype == torch.float32


BAD = {
    "no architecture": ({"architectures": None}, "architecture None"),
    "empty": ({"architectures": []}, "architecture None"),
    "a string": ({"architectures": "LlamaForCausalLM"}, "architecture None"),
    "an object": ({"architectures": {"0": "LlamaForCausalLM"}}, "architecture None"),
    "unknown": ({"architectures": ["TomorrowForCausalLM"]}, "'TomorrowForCausalLM' is not part of transformers"),
    "a function": ({"architectures": ["pipeline"]}, "'pipeline' is not part of transformers"),
    "no model": ({"architectures": ["Trainer"]}, "'Trainer' is not part of transformers"),
    "an attribute": ({"architectures": ["__path__"]}, "'__path__' is not part of transformers"),
    "another model's": ({"model_type": "bert"}, "it is for model_type 'bert'"),
    "no type": ({"model_type": None}, "does not describe a LlamaForCausalLM"),
    "wrong kind": ({"hidden_size": "128"}, "hidden_size"),
    "negative": ({"hidden_size": -128}, "does not describe a LlamaForCausalLM"),
    "dtype": ({"dtype": "float9"}, "float9"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs(make, change, case):
    edit, words = BAD[case]
    with pytest.raises(CheckpointError, match=words):
        Skeleton.build(change(make("llama"), config=lambda c: c.update(edit)))


@pytest.mark.parametrize("named", [["EvilForCausalLM"], ["LlamaForCausalLM"]])
def test_code_of_a_checkpoint_never_runs(make, change, tmp_path, named):
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    folder = change(make("llama"), config=lambda c: c.update(auto_map=code, architectures=named))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    if named == ["LlamaForCausalLM"]:  # whose own class is used
        Skeleton.build(folder)
    else:
        with pytest.raises(CheckpointError, match="code that comes with a checkpoint is never run"):
            Skeleton.build(folder)
    assert not (tmp_path / "ran").exists()


CONTENTS = {
    "missing": None,
    "empty": b"",
    "truncated": b'{"architectures": ["Ll',
    "no object": b"[1, 2]",
    "binary": bytes(range(256)),
    "too deep": b'{"a":' * 200_000,
    "too large": b" " * (17 << 20) + b"{}",
}


@pytest.mark.parametrize("case", CONTENTS)
def test_bad_files(tmp_path, case):
    if CONTENTS[case] is not None:
        (tmp_path / "config.json").write_bytes(CONTENTS[case])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_reads_what_is_there(tmp_path):
    config = {"architectures": ["X"], "ünïcode": [1, None]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config
