"""Architectures: what transformers and llama.cpp call the tensors of a model, and where each says its sizes.

Both directions come from one table. llama.cpp turns pairs of neighbouring values by rotary positions, transformers
values half a head apart; so rows of q and k stand in another order in files of the architecture `llama`, only there.

Source: llama.cpp's `conversion/llama.py` and `conversion/qwen.py`; the `gguf` package's `TENSOR_NAMES` and `Keys`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit_hf.gguf.header import Header, Value
from lowbit_hf.gguf.rope import metadata_of, parameters_of

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_DENSE = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_ATTENTION = {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"} | {
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_NORMS = {f"self_attn.{name}_norm": f"attn_{name}_norm" for name in "qk"}
_QWEN_EXPERTS = {f"mlp.experts.{{}}.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")}
_MIXTRAL_EXPERTS = {
    f"block_sparse_moe.experts.{{}}.{ours}": f"ffn_{theirs}_exps"
    for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
}
_ATTENTION_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
# What a file may tell besides; anything else may change what the model computes.
_ALSO_READ = {
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "vocab_size",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
_IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_STORED = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where llama.cpp keeps a tensor of transformers: `expert` is its index in a stack."""

    name: str
    expert: int | None = None
    # Heads whose rows stand in llama.cpp's order; 0: rows stand as they are.
    heads: int = 0
    # Norms, biases and routers, which llama.cpp computes with in float32.
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One kind of model."""

    # `general.architecture`.
    name: str
    model_class: str
    model_type: str
    modules: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    biases: frozenset[str] = frozenset()
    turned: bool = False
    sizes: Mapping[str, str] = field(default_factory=lambda: _SIZES)
    # What its config has to say; llama.cpp knows no other.
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def place(self, name: str, config: Any) -> Place | None:
        """Where llama.cpp keeps the tensor that transformers calls `name`; None: nowhere."""
        module, _, local = name.rpartition(".")
        if module in _TOP and local == "weight":
            return Place(name=f"{_TOP[module]}.weight", wide=module == "model.norm")
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            return None
        block, module, local = match.groups()
        expert = _EXPERT.fullmatch(module)
        if expert is not None:
            theirs = self.experts.get(f"{expert[1]}.{{}}.{expert[3]}") if local == "weight" else None
            return None if theirs is None else Place(name=f"blk.{block}.{theirs}.weight", expert=int(expert[2]))
        theirs = self.modules.get(module)
        if theirs is None or (local == "bias" and theirs not in self.biases):
            return None
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs, 0)
        wide = local == "bias" or theirs.endswith("_norm") or theirs == "ffn_gate_inp"
        return Place(name=f"blk.{block}.{theirs}.{local}", heads=heads if self.turned else 0, wide=wide)

    def original(self, name: str) -> str | None:
        """What transformers calls the tensor `name` of a file, `{}` for the number of an expert; None: nothing."""
        module, _, local = name.rpartition(".")
        tops = {theirs: ours for ours, theirs in _TOP.items()}
        if module in tops and local == "weight":
            return f"{tops[module]}.weight"
        match = _STORED.fullmatch(name)
        if match is None:
            return None
        block, module, local = match.groups()
        ours = {theirs: ours for ours, theirs in (*self.modules.items(), *self.experts.items())}.get(module)
        if ours is None or (local == "bias" and module not in self.biases):
            return None
        return f"model.layers.{block}.{ours}.{local}"


_LLAMA = Architecture(
    name="llama",
    model_class="LlamaForCausalLM",
    model_type="llama",
    modules=_ATTENTION | _DENSE,
    biases=_ATTENTION_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    turned=True,
)
_MIXTRAL = Architecture(
    name="llama",
    model_class="MixtralForCausalLM",
    model_type="mixtral",
    modules=_ATTENTION | {"block_sparse_moe.gate": "ffn_gate_inp"},
    experts=_MIXTRAL_EXPERTS,
    turned=True,
    sizes=_SIZES | _EXPERTS,
)
_QWEN2 = Architecture(
    name="qwen2",
    model_class="Qwen2ForCausalLM",
    model_type="qwen2",
    modules=_ATTENTION | _DENSE,
    biases=_ATTENTION_BIASES,
)
_QWEN3 = Architecture(
    name="qwen3", model_class="Qwen3ForCausalLM", model_type="qwen3", modules=_ATTENTION | _NORMS | _DENSE
)
_QWEN3_MOE = Architecture(
    name="qwen3moe",
    model_class="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    modules=_ATTENTION | _NORMS | {"mlp.gate": "ffn_gate_inp"},
    experts=_QWEN_EXPERTS,
    sizes=_SIZES | _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
    fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
)
ARCHITECTURES = (_LLAMA, _MIXTRAL, _QWEN2, _QWEN3, _QWEN3_MOE)


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        CheckpointError: lowbit does not write it, or the config says what llama.cpp does not compute.
    """
    found = next((each for each in ARCHITECTURES if each.model_type == config.model_type), None)
    if found is None:
        known = ", ".join(each.model_type for each in ARCHITECTURES)
        raise CheckpointError(f"model_type {config.model_type!r} cannot be written as GGUF; lowbit writes {known}")
    wanted = {"hidden_act": "silu", "sliding_window": None, **found.fixed}
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    told = {key: getattr(config, key, value) for key, value in wanted.items()} | {"layer_types": layers}
    for key, value in {**wanted, "layer_types": {"full_attention"}}.items():
        if told[key] != value:
            raise CheckpointError(
                f"{key} is {told[key]!r}, and llama.cpp's architecture {found.name!r} computes with {value!r} alone"
            )
    return found


def head_size(config: Any) -> int:
    """Values of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def settings_of(architecture: Architecture, config: Any) -> dict[str, int | float | str]:
    """The metadata of a config, by key without the architecture.

    Raises:
        CheckpointError: its positions cannot be told.
    """
    told: dict[str, int | float | str] = {key: int(getattr(config, ours)) for key, ours in architecture.sizes.items()}
    head = head_size(config)
    told |= {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "vocab_size": int(config.vocab_size)}
    told |= {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head}
    return told | metadata_of(config.rope_parameters)


def architecture_in(header: Header) -> Architecture:
    """The architecture of a file.

    Raises:
        CheckpointError: lowbit does not read it, or it tells of what transformers' model does not compute.
    """
    name = header.metadata.get("general.architecture")
    experts = bool(header.metadata.get(f"{name}.expert_count", 0))
    found = next((each for each in ARCHITECTURES if each.name == name and bool(each.experts) == experts), None)
    if found is None:
        known = ", ".join(dict.fromkeys(each.name for each in ARCHITECTURES))
        raise CheckpointError(f"general.architecture is {name!r}, which lowbit does not read; it reads {known}")
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(f"this is one of {parts} files; join them first: llama-gguf-split --merge")
    keys = {key.removeprefix(f"{name}.") for key in header.metadata if key.startswith(f"{name}.")}
    unknown = sorted(keys - set(found.sizes) - _ALSO_READ)
    if unknown:
        raise CheckpointError(f"{name}.{unknown[0]} is metadata that lowbit does not know, and may change the model")
    return found


def config_of(header: Header, factors: Tensor | None) -> dict[str, Any]:
    """The `config.json` of a file, whose tensor of rotary factors is `factors`.

    Raises:
        CheckpointError: it lacks a size or a tensor, or tells of what transformers' model does not compute.
    """
    architecture = architecture_in(header)
    prefix = f"{architecture.name}."
    told = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    sizes = {ours: _count(told, key) for key, ours in architecture.sizes.items()}
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("the file has no matrix token_embd.weight; it holds no whole model")
    heads = max(sizes["num_attention_heads"], 1)
    head = _count(told, "attention.key_length") if "attention.key_length" in told else sizes["hidden_size"] // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if told.get(key, head) != head:
            raise CheckpointError(
                f"{prefix}{key} is {told[key]}, and lowbit reads heads of one size alone, here {head}"
            )
    biases = {name.split(".")[2] for name in header.tensors if name.endswith(".bias") and name.startswith("blk.")}
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        **sizes,
        "head_dim": head,
        "rms_norm_eps": _short(told.get("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_parameters": parameters_of({key: _short(value) for key, value in told.items()}, factors, head),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **architecture.fixed,
        "hidden_act": "silu",
        "dtype": str(dtype_of(header)).removeprefix("torch."),
    }
    if architecture is _LLAMA:
        config |= {"attention_bias": "attn_q" in biases, "mlp_bias": "ffn_up" in biases}
    for ours, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        config[f"{ours}_token_id"] = token if isinstance(token, int) else None
    if any(each.kind.block > 1 for each in header.tensors.values()):
        config["quantization_config"] = {"quant_method": "gguf"}
    return config


def dtype_of(header: Header) -> torch.dtype:
    """What weights read as: the embeddings' or the output's dtype, bfloat16 where both are quantized."""
    ends = [header.tensors[name].kind for name in ("token_embd.weight", "output.weight") if name in header.tensors]
    return next((kind.dtype for kind in ends if kind.block == 1), torch.bfloat16)


def turn(rows: int, heads: int) -> Tensor:
    """Where each row of q or k in llama.cpp's order stands in transformers': pairs half a head apart come together.

    Source: `permute` in llama.cpp's `conversion/llama.py`.
    """
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _count(told: Mapping[str, Value], key: str) -> int:
    found = told.get(key)
    if not isinstance(found, int) or not 0 < found < 1 << 31:
        raise CheckpointError(f"the metadata {key!r} is {found!r}; needed is a count")
    return found


def _short(value: Any) -> Any:
    """A float32 as the shortest number that means it, as people wrote it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
