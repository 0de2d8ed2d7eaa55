"""GGUF files of small random models, as the `gguf` package writes them, and what their tensors stand for."""

from __future__ import annotations

import random

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize, quantize

KINDS = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
MODELS = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
}
NAMES = {"llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3-moe": "qwen3moe"}
WIDE = {"bf16": gguf.GGMLQuantizationType.BF16, "f16": gguf.GGMLQuantizationType.F16}
WIDE |= {"f32": gguf.GGMLQuantizationType.F32}
SPECIAL = ["<bos>", "<eos>"]
TOKENS = [*SPECIAL, *(chr(33 + i) for i in range(92)), "Ġ", "ab"]


def heads_of(name, config):
    """Heads whose rows llama.cpp keeps in another order."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)


def permuted(rows, heads):
    """Rows of q or k in llama.cpp's order, as its converter has it."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def restored(rows, heads):
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def checkpoint_names(kind, config):
    """Shapes by checkpoint name, experts one by one."""
    with torch.device("meta"):
        model = getattr(transformers, MODELS[kind])(config)
    shapes = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            base, parts = name.rpartition(".")[0], {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
            for part in parts[name.rpartition(".")[2]]:
                _, n, k = value.shape
                n = n // 2 if part != "down" else n
                for e in range(value.shape[0]):
                    mixtral = {"gate": "w1", "down": "w2", "up": "w3"}[part]
                    local = mixtral if kind == "mixtral" else f"{part}_proj"
                    shapes[f"{base}.{e}.{local}.weight"] = (n, k)
        else:
            shapes[name] = tuple(value.shape)
    if kind != "mixtral":
        return shapes
    return {name.replace(".mlp.", ".block_sparse_moe."): shape for name, shape in shapes.items()}


def package_name(kind, name, config):
    """What the package's own table calls a tensor, and which expert of a stack it is."""
    names = gguf.get_tensor_name_map(_arch(kind), config.num_hidden_layers)
    module, _, local = name.rpartition(".")
    expert = None
    if ".experts." in module:
        before, _, after = module.partition(".experts.")
        number, _, part = after.partition(".")
        expert, module = int(number), f"{before}.experts.{part}"
    found = names.get_name(module) or names.get_name(module.replace("block_sparse_moe", "feed_forward")[6:])
    return f"{found}.{local}", expert


def _arch(kind):
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == NAMES[kind])


def config_of(kind, seed):
    """Sizes that vary with the seed."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4])
    values = {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "hidden_size": 32 * heads}
    values |= {"intermediate_size": draw.choice([64, 96]), "tie_word_embeddings": seed % 2 == 0}
    values |= {"num_hidden_layers": draw.choice([1, 2]), "vocab_size": len(TOKENS), "max_position_embeddings": 32}
    if kind in ("mixtral", "qwen3-moe"):
        values |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "qwen3-moe":
        values |= {"norm_topk_prob": True, "moe_intermediate_size": 64}
    if kind.startswith("qwen3"):
        values |= {"head_dim": draw.choice([16, 32])}
    return getattr(transformers, MODELS[kind]).config_class(**values)


def write_foreign(path, kind, seed, quantized):
    """A file of the package's own making, and what each of its tensors stands for, by checkpoint name."""
    config, rng = config_of(kind, seed), np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, NAMES[kind])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if kind in ("mixtral", "qwen3-moe"):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    if kind == "qwen3-moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    add_tokens(writer, ["qwen2", "gpt-2", "llama-bpe"][seed % 3])
    values, stacks = {}, {}
    wide = list(WIDE.values())[seed % 3]
    for name, shape in checkpoint_names(kind, config).items():
        theirs, expert = package_name(kind, name, config)
        weight = (rng.standard_normal(shape) * rng.choice([0.02, 1.0])).astype(np.float32)
        if len(shape) == 1 or "gate_inp" in theirs:
            stored = gguf.GGMLQuantizationType.F32
        elif "token_embd" in theirs or theirs.startswith("output."):
            stored = wide
        else:
            stored = KINDS[quantized]
            if rng.random() < 0.3:
                weight[0, :32] = 0  # a block whose scale is 0
        values[name] = dequantize(quantize(weight, stored), stored)
        heads = heads_of(name, config) if NAMES[kind] == "llama" else 0
        data = quantize(permuted(weight, heads) if heads else weight, stored)
        if expert is None:
            writer.add_tensor(theirs, data, raw_dtype=stored)
        else:
            stacks.setdefault(theirs, []).append(data)
    for theirs, data in stacks.items():
        writer.add_tensor(theirs, np.stack(data), raw_dtype=KINDS[quantized])
    finish(writer)
    return values


def add_tokens(writer, pre):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
