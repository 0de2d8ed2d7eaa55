"""The two trained models, quantized once a scheme and session; checkpoints made to any size; and the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit import command
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme

MODELS = Path(__file__).parent / "models"


@pytest.fixture(scope="session")
def models():
    return MODELS


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """`quantized("lm-tiny", "W4A16")`: the folder it became, not to be written to."""
    made = {}

    def to(model, name):
        if (model, name) not in made:
            out = tmp_path_factory.mktemp(model) / name
            run(prepare(MODELS / model, scheme(name), mode="even"), out)
            made[model, name] = out
        return made[model, name]

    return to


@pytest.fixture(scope="session")
def llama():
    def make(folder, layers, hidden):
        """A made checkpoint in the shape of a Llama, a shard a layer, some `12 * hidden^2` weights."""
        folder.mkdir()
        vocabulary, wide = 256, hidden * 8 // 3 // 128 * 128
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "vocab_size": vocabulary,
            "dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        # As random as it must be for every row to have its own scale.
        noise = torch.randn(wide * hidden, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 0.02
        attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes = attention | {
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        shards = [{"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}]
        shards[0] |= {"model.norm.weight": (hidden,)}
        for layer in range(layers):
            norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
            shards.append({f"model.layers.{layer}.{name}.weight": shape for name, shape in (shapes | norms).items()})
        index = {}
        for number, shard in enumerate(shards):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            index |= dict.fromkeys(shard, file)
            tensors = {}
            for name, shape in shard.items():
                count = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
                tensors[name] = noise.roll(len(name) * number)[:count].view(shape).contiguous()
            save_file(tensors, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return folder

    return make


@pytest.fixture
def lowbit(capsys, monkeypatch):
    """`lowbit("plan", folder, ...)`: exit code, stdout and stderr of the command, which never takes long enough to tell."""
    monkeypatch.setattr("lowbit_hf.progress._DELAY", inf)

    def called(*arguments):
        capsys.readouterr()
        code = command.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return called


@pytest.fixture(scope="session")
def start():
    """`start("plan", folder, ...)`: the command as a process of its own, its output piped."""
    script = shutil.which("lowbit", path=os.fspath(Path(sys.executable).parent))
    assert script is not None

    def process(*arguments, **options):
        return subprocess.Popen([script, *map(str, arguments)], stdout=-1, stderr=-1, text=True, **options)

    return process
