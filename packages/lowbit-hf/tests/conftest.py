"""Small models of random weights, made once a session, and what the tests do to them."""

from __future__ import annotations

import json
import random
import shutil
from math import inf
from pathlib import Path
from zlib import crc32

import pytest
import torch
import transformers
from foreign import KINDS, options
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig

from lowbit.command import main
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
} | SPECIAL
MODELS = {
    "llama": ("LlamaForCausalLM", SMALL),
    "qwen2": ("Qwen2ForCausalLM", SMALL),  # q, k and v have biases
    "qwen3": ("Qwen3ForCausalLM", SMALL | {"head_dim": 32}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
    ),
    "bert": ("BertForMaskedLM", SMALL),
    "mixtral": ("MixtralForCausalLM", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        SMALL
        | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
        | {"first_k_dense_replace": 2, "num_key_value_heads": 4},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        SMALL
        | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        SMALL | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
    ),
    "phi3": ("Phi3ForCausalLM", SMALL),  # q, k and v are one matrix
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        SMALL
        | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        | {"shared_expert_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 96, "max_position_embeddings": 32}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        | SPECIAL,
    ),
    "olmo": ("OlmoForCausalLM", SMALL),  # its norms have no weights
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 32} | SPECIAL,
    ),
}


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """`make(kind, dtype, **config)`: the folder of a random model, not to be written to."""
    made = {}

    def of(kind="llama", dtype=torch.bfloat16, *, shard="1GB", **changes):
        key = json.dumps([kind, str(dtype), shard, changes], sort_keys=True)
        if key not in made:
            architecture, config = MODELS[kind]
            cls = getattr(transformers, architecture)
            with torch.random.fork_rng():
                torch.manual_seed(crc32(key.encode()))  # the same model whatever tests ran before
                model = cls(cls.config_class(**config | changes)).to(dtype)
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1:  # norms and biases are ones and zeros, which would hide their loss
                        parameter.data.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            made[key] = tmp_path_factory.mktemp(kind) / "model"
            model.save_pretrained(made[key], max_shard_size=shard)
        return made[key]

    return of


@pytest.fixture(scope="session")
def worded(make, tmp_path_factory):
    """`worded(kind, **config)`: a random model with a tokenizer of its 96 words; the second is the end token."""
    made = {}

    def of(kind="llama", **changes):
        key = json.dumps([kind, changes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("worded") / kind
            shutil.copytree(make(kind, **changes), made[key])
            words = Tokenizer(models.WordLevel({"?": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 96)}, unk_token="?"))
            words.pre_tokenizer = pre_tokenizers.Whitespace()
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
            tokenizer.save_pretrained(made[key])
        return made[key]

    return of


@pytest.fixture
def change(tmp_path):
    """`change(folder, tensors=edit, config=edit)`: a copy of a one-file folder, its tensors and config edited in place."""
    count = 0

    def copy(folder, *, tensors=None, config=None):
        nonlocal count
        count += 1
        target = tmp_path / f"changed-{count}"
        shutil.copytree(folder, target)
        if tensors is not None:
            state = load_file(target / "model.safetensors")
            tensors(state)
            save_file(
                {name: t.contiguous() for name, t in state.items()}, target / "model.safetensors", {"format": "pt"}
            )
        if config is not None:
            values = json.loads((target / "config.json").read_text())
            config(values)
            (target / "config.json").write_text(json.dumps(values))
        return target

    return copy


@pytest.fixture
def quantize(tmp_path):
    """`quantize(folder, "W4A16", **options)`: the folder it became."""
    count = 0

    def to(folder, name, *, rules=(), mode="even", **options):
        nonlocal count
        count += 1
        out = tmp_path / f"quantized-{count}"
        rules = [(pattern, scheme(each)) for pattern, each in rules]
        run(prepare(folder, scheme(name), rules=rules, mode=mode, **options), out)
        return out

    return to


@pytest.fixture(scope="session")
def speaking():
    """A small language model that was trained, with its tokenizer."""
    return Path(__file__).parents[3] / "integration_tests/models/lm-tiny"


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(2, 96, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def stock():
    """`stock(folder)`: the model as transformers alone loads it."""

    def of(folder):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        return model.eval()

    return of


def shapes(hidden, inner, kv):
    attention = {
        f"self_attn.{name}_proj": (n, hidden) for name, n in {"q": hidden, "k": kv, "v": kv, "o": hidden}.items()
    }
    mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    return {f"model.layers.0.{name}": shape for name, shape in (attention | mlp).items()}


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """`foreign(kind, seed)`: a folder in another program's layout, and its weights by module."""

    def of(kind, seed, **more):
        draw = random.Random(f"{kind} {seed}")
        # Blocks of 128 that are not all whole.
        hidden, inner = (160, 192) if kind == "fp8" else (64, 128)
        chosen = options(kind, seed) | more
        weights = {
            module: KINDS[kind].weight(draw, n, k, **chosen) for module, (n, k) in shapes(hidden, inner, 32).items()
        }
        folder = tmp_path_factory.mktemp("foreign")
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=hidden // 32,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=32,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        ).to_dict()
        plain = {"model.embed_tokens": (32, hidden), "lm_head": (32, hidden), "model.norm": (hidden,)}
        plain |= {f"model.layers.0.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        random_ = torch.Generator().manual_seed(seed)
        tensors = {f"{name}.weight": torch.randn(size, generator=random_).bfloat16() for name, size in plain.items()}
        tensors |= {f"{m}.{local}": tensor for m, weight in weights.items() for local, tensor in weight.tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config["quantization_config"] = KINDS[kind].config(chosen)
        (folder / "config.json").write_text(json.dumps(config))
        return folder, weights

    return of


@pytest.fixture
def command(capsys, monkeypatch):
    """`command("inspect", folder)`: its exit code, what it said and what it told beside."""
    monkeypatch.setattr("lowbit_hf.progress._DELAY", inf)

    def called(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return called


@pytest.fixture(scope="session")
def good(make, tmp_path_factory):
    """`good(kind, scheme, rules, **config)`: a quantized folder, made once a session and not to be written to."""
    made = {}

    def of(kind, name, rules=(), keep=(), **config):
        key = json.dumps([kind, name, rules, keep, config])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("good") / f"{kind}-{name}"
            chosen = [(pattern, scheme(each)) for pattern, each in rules]
            job = prepare(make(kind, **config), scheme(name), rules=chosen, keep=keep, mode="even")
            run(job, made[key])
        return made[key]

    return of
