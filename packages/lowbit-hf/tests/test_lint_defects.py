"""Every defect that `lowbit lint` knows, seeded in a good checkpoint, is found, and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan

import pytest
import torch
from lint_edits import (
    ALL,
    ENGINES,
    GROUP,
    LAYER,
    Q,
    both,
    drop,
    filled,
    group_of,
    in_blocks,
    inputs,
    plain,
    put,
    top,
    weights,
)

from lowbit_hf.lint import lint

INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_TOKEN = INT8_TOKEN | {"type": "float"}


@dataclass(frozen=True)
class Seed:
    made: tuple
    key: str
    what: str
    fix: str
    runtimes: tuple = ALL
    tensors: object = None
    config: object = None
    severity: str = "error"
    asked: tuple = ALL
    tp: int = 1
    gpu: str | None = None


LLAMA = ("llama", "W4A16")
MOE = ("qwen3-moe", "W4A16_G64")
EXPERT = "model.layers.1.mlp.experts.2"
IGNORE = "quantization_config.ignore"

SEEDS = {
    "act-order by g_idx": Seed(
        LLAMA, f"{GROUP}.weights.actorder", "'group', which scatters", "'weight'", config=weights(actorder="group")
    ),
    "unknown key of weights": Seed(
        LLAMA, f"{GROUP}.weights.foo", "does not define the key 'foo'", "delete", config=weights(foo=1)
    ),
    "unknown key of a group": Seed(
        LLAMA, f"{GROUP}.foo", "does not define the key 'foo'", "delete", config=lambda c: group_of(c).update(foo=1)
    ),
    "bits that are none": Seed(
        LLAMA, f"{GROUP}.weights.num_bits", "num_bits is 'four'", "whole number", config=weights(num_bits="four")
    ),
    "malformed pattern": Seed(
        LLAMA,
        f"{GROUP}.targets",
        "malformed pattern",
        "correct",
        config=lambda c: group_of(c)["targets"].append("re:("),
    ),
    "status": Seed(
        LLAMA,
        "quantization_config.quantization_status",
        "'frozen'",
        '"compressed"',
        ("transformers",),
        config=top(quantization_status="frozen"),
    ),
    "sparsity": Seed(
        LLAMA,
        "quantization_config.sparsity_config",
        "no longer",
        "dense",
        ENGINES,
        config=top(sparsity_config={"format": "dense", "targets": ["Linear"]}),
    ),
    "asymmetric W8": Seed(
        ("llama", "W8A8"),
        f"{GROUP}.weights.symmetric",
        "needs weights.symmetric true; this is False",
        "symmetric true",
        ENGINES,
        tensors=lambda state: state.update(
            {
                name.replace("weight_scale", "weight_zero_point"): torch.zeros_like(tensor, dtype=torch.int8)
                for name, tensor in list(state.items())
                if name.endswith("weight_scale")
            }
        ),
        config=weights(symmetric=False),
    ),
    "W4A8-FP8 in groups of 64": Seed(
        ("llama", "W4A16_G64"),
        f"{GROUP}.weights.group_size",
        "W4AFP8, needs weights.group_size 128; this is 64",
        "group_size 128",
        ("vllm",),
        config=inputs(FP8_TOKEN),
        asked=("vllm", "transformers"),
    ),
    "W4A8-FP8 on Blackwell": Seed(
        ("llama", "W4AFP8"),
        GROUP,
        "needs sm90 only; b200 is sm100",
        "another GPU",
        ("vllm",),
        asked=("vllm",),
        gpu="b200",
    ),
    "W4A8-FP8 in float16": Seed(
        ("llama", "W4AFP8"),
        "dtype",
        "float16",
        "--dtype bfloat16",
        ("vllm",),
        config=lambda c: c.update(dtype="float16"),
        asked=("vllm",),
    ),
    "FP8 on Ampere": Seed(
        ("llama", "FP8_DYNAMIC"),
        GROUP,
        "native from sm89 on; on a100 inputs stay 16-bit",
        "newer GPU",
        ENGINES,
        severity="warning",
        gpu="a100",
    ),
    "packed codes declared as bytes": Seed(
        LLAMA,
        f"{GROUP}.format",
        "the tensors are weight_packed",
        '"pack-quantized"',
        config=lambda c: group_of(c).update(format="int-quantized"),
    ),
    "no format anywhere": Seed(
        LLAMA,
        f"{GROUP}.format",
        "no file format",
        "pack-quantized",
        ENGINES,
        config=both(lambda c: group_of(c).pop("format"), lambda c: c["quantization_config"].pop("format")),
    ),
    "a format left to inference": Seed(
        ("llama", "W4A8"),
        f"{GROUP}.format",
        "'int-quantized' is inferred",
        '"pack-quantized"',
        ("transformers",),
        config=lambda c: group_of(c).pop("format"),
        asked=("vllm", "transformers"),
    ),
    "no scheme for MXFP6": Seed(
        ("llama", "MXFP6A16"), GROUP, "6-bit floats", "MXFP8", ("vllm",), asked=("vllm", "transformers")
    ),
    "zero points that are compressed": Seed(
        ("llama", "W4A16_ASYM"), GROUP, "unpacked zero points", "dequantize=True", ("transformers",)
    ),
    "several formats dequantized": Seed(
        ("llama", "W8A8", [("*.mlp.*", "W4A16")]),
        "quantization_config.dequantize",
        "several file formats",
        "delete the key",
        ("transformers",),
        config=top(dequantize=True),
    ),
    "a cache by channels": Seed(
        LLAMA,
        "quantization_config.kv_cache_scheme.strategy",
        "'channel'",
        "per tensor",
        ("vllm",),
        config=top(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
        asked=("vllm", "transformers"),
    ),
    "a cache without scales": Seed(
        LLAMA,
        "quantization_config.kv_cache_scheme",
        "no k_scale",
        "calibrate",
        ENGINES,
        config=top(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
        severity="warning",
    ),
    "zero points of a symmetric scheme": Seed(
        LLAMA,
        f"{Q}.weight_zero_point",
        "symmetric",
        "delete the tensor",
        tensors=put(f"{Q}.weight_zero_point", lambda _: torch.zeros(16, 1, dtype=torch.int32)),
    ),
    "g_idx": Seed(
        LLAMA,
        f"{Q}.weight_g_idx",
        "scattered by a g_idx",
        "leave the tensor out",
        ("vllm", "transformers"),
        tensors=put(f"{Q}.weight_g_idx", lambda _: torch.zeros(128, dtype=torch.int32)),
    ),
    "no scale": Seed(LLAMA, f"{Q}.weight_scale", "missing", "quantize again", tensors=drop(f"{Q}.weight_scale")),
    "no weight_shape": Seed(
        LLAMA, f"{Q}.weight_shape", "missing", "quantize again", ("transformers",), tensors=drop(f"{Q}.weight_shape")
    ),
    "weight_shape": Seed(
        LLAMA,
        f"{Q}.weight_shape",
        "says (128, 120); the weight is (128, 128)",
        "write [128, 128]",
        tensors=put(f"{Q}.weight_shape", filled(1, 120)),
    ),
    "an expert's weight_shape": Seed(
        MOE,
        f"{EXPERT}.up_proj.weight_shape",
        "says (64, 1024)",
        "write [64, 128]",
        tensors=put(f"{EXPERT}.up_proj.weight_shape", filled(1, 1024)),
    ),
    "dtype of a scale": Seed(
        ("llama", "NVFP4A16"),
        f"{Q}.weight_scale",
        "torch.bfloat16 (128, 8); group_0 and the model need torch.float8_e4m3fn",
        "quantize this weight again",
        tensors=put(f"{Q}.weight_scale", torch.Tensor.bfloat16),
    ),
    "shape of codes": Seed(
        ("llama", "W8A8"),
        f"{Q}.weight",
        "(127, 128)",
        "quantize this weight again",
        tensors=put(f"{Q}.weight", lambda t: t[:127]),
    ),
    "NaN scale": Seed(LLAMA, f"{Q}.weight_scale", "NaN", "quantize", tensors=put(f"{Q}.weight_scale", filled(3, nan))),
    "infinite scale": Seed(
        LLAMA, f"{Q}.weight_scale", "infinite", "quantize", tensors=put(f"{Q}.weight_scale", filled(3, inf))
    ),
    "zero scale": Seed(LLAMA, f"{Q}.weight_scale", "zero", "quantize", tensors=put(f"{Q}.weight_scale", filled(3, 0))),
    "NaN among powers of two": Seed(
        ("llama", "MXFP4A16"),
        f"{Q}.weight_scale",
        "NaN",
        "quantize",
        tensors=put(f"{Q}.weight_scale", filled(3, 255)),
        asked=("vllm", "transformers"),
        runtimes=("vllm", "transformers"),
    ),
    "a router that ignore forgot": Seed(
        MOE,
        IGNORE,
        "model.layers.0.mlp.gate: not quantized, so it must be named",
        "add model.layers.0.mlp.gate",
        ENGINES,
        config=lambda c: c["quantization_config"]["ignore"].remove("model.layers.0.mlp.gate"),
    ),
    "a router under another name": Seed(
        MOE,
        IGNORE,
        "'layers.0.mlp.gate' there names no module",
        "add model.layers.0.mlp.gate",
        ("vllm",),
        config=top(ignore=["lm_head", "layers.0.mlp.gate", "model.layers.1.mlp.gate"]),
    ),
    "a tied head that ignore forgot": Seed(
        LLAMA, IGNORE, "lm_head: not quantized", "add lm_head", ("transformers",), config=top(ignore=[])
    ),
    "a plain weight that ignore forgot": Seed(
        LLAMA,
        IGNORE,
        f"{LAYER}.self_attn.o_proj: not quantized",
        "add",
        **plain(f"{LAYER}.self_attn.o_proj", (128, 128), ignore=False),
    ),
    "a module for multi-token prediction": Seed(
        LLAMA,
        IGNORE,
        "mtp.fc: not quantized",
        "add mtp.fc",
        ENGINES,
        tensors=put("mtp.fc.weight", lambda _: torch.zeros(8, 8).bfloat16()),
    ),
    "a module that no target covers": Seed(
        LLAMA,
        IGNORE,
        "mtp.fc: not quantized",
        "add mtp.fc",
        ("sglang",),
        tensors=put("mtp.fc.weight", lambda _: torch.zeros(8, 8).bfloat16()),
        config=lambda c: group_of(c).update(targets=["re:model.layers.*proj"]),
    ),
    "quantized, but ignored": Seed(
        LLAMA,
        IGNORE,
        f"{LAYER}.mlp.down_proj",
        "take the entry out",
        config=top(ignore=["lm_head", f"{LAYER}.mlp.down_proj"]),
    ),
    "quantized, but not covered": Seed(
        LLAMA,
        "model.layers.{0..1}.self_attn.k_proj, model.layers.{0..1}.self_attn.o_proj, model.layers.{0..1}.self_attn.q_proj and 1 more",
        "no config group has a target",
        '"Linear"',
        config=lambda c: group_of(c).update(targets=["re:.*mlp.*"]),
    ),
    "experts without a target": Seed(
        MOE,
        "model.layers.{0..1}.mlp.experts.{0..3}.down_proj, model.layers.{0..1}.mlp.experts.{0..3}.gate_proj, model.layers.{0..1}.mlp.experts.{0..3}.up_proj",
        "no config group has a target",
        "experts need it",
        config=lambda c: group_of(c).update(targets=["re:.*self_attn.*"]),
    ),
    "a module that is not there": Seed(
        LLAMA, f"{LAYER}.self_attn.o_proj", "no tensor of it", "copy", tensors=drop(f"{LAYER}.self_attn.o_proj.")
    ),
    "one of q, k and v left alone": Seed(
        LLAMA, IGNORE, "loaded into one matrix", "one scheme", ENGINES, **plain(Q, (128, 128), ignore=True)
    ),
    "schemes of q, k and v": Seed(
        ("llama", "W8A8", [("*.0.self_attn.q_proj", "FP8_DYNAMIC")]), Q, "another scheme", "one scheme", ENGINES
    ),
    "global scales of q, k and v": Seed(
        ("llama", "NVFP4A16"),
        f"{LAYER}.self_attn.k_proj.weight_global_scale",
        "fused with",
        "one global scale",
        ENGINES,
        tensors=put(f"{LAYER}.self_attn.k_proj.weight_global_scale", lambda t: t * 2),
        severity="warning",
    ),
    "an expert missing": Seed(
        MOE,
        f"{EXPERT}.down_proj, {EXPERT}.gate_proj, {EXPERT}.up_proj",
        "no tensors",
        "every expert",
        tensors=drop(f"{EXPERT}."),
    ),
    "the last expert's projection missing": Seed(
        MOE,
        "model.layers.1.mlp.experts.3.up_proj",
        "no tensors",
        "every expert",
        tensors=drop("model.layers.1.mlp.experts.3.up_proj."),
    ),
    "experts in a stack": Seed(
        MOE,
        "model.layers.0.mlp.experts.gate_up_proj_packed",
        "one stack",
        "experts.0.gate_proj.weight_packed",
        tensors=put(
            "model.layers.0.mlp.experts.gate_up_proj_packed", lambda _: torch.zeros(4, 8, 8, dtype=torch.int32)
        ),
    ),
    "an expert in another scheme": Seed(
        ("qwen3-moe", "FP8_DYNAMIC"),
        f"{EXPERT}.down_proj, {EXPERT}.gate_proj, {EXPERT}.up_proj",
        "other experts",
        "one scheme",
        ENGINES,
        config=lambda c: c["quantization_config"]["config_groups"].update(
            group_1=group_of(c)
            | {"targets": [f"re:{EXPERT}\\."], "input_activations": FP8_TOKEN | {"strategy": "tensor"}}
        ),
    ),
    "K in groups on four GPUs": Seed(
        ("llama", "W4A16_G64"),
        "model.layers.{0..1}.self_attn.o_proj",
        "K / 4 GPUs = 32 is no multiple of 64",
        "fewer GPUs",
        ENGINES,
        tp=4,
    ),
    "K in blocks": Seed(
        ("llama", "FP8_DYNAMIC", (), (), {"hidden_size": 192, "head_dim": 32, "num_key_value_heads": 4}),
        "model.layers.{0..1}.mlp.gate_proj, model.layers.{0..1}.mlp.up_proj, model.layers.{0..1}.self_attn.k_proj and 2 more",
        "K = 192 is no multiple of 128",
        "leave it unquantized",
        ENGINES,
        tensors=in_blocks,
        config=both(
            weights(strategy="block", block_structure=[128, 128]),
            inputs(FP8_TOKEN | {"strategy": "group", "group_size": 128}),
        ),
    ),
    "N in blocks of a fused matrix": Seed(
        ("llama", "FP8_BLOCK"),
        "model.layers.{0..1}.self_attn.k_proj",
        "64, fused, is no multiple of 128",
        "FP8_DYNAMIC",
        ENGINES,
    ),
    "architecture": Seed(
        LLAMA,
        "architectures",
        "'FooForCausalLM' is not part of transformers",
        "upgrade",
        ("transformers",),
        config=lambda c: c.update(architectures=["FooForCausalLM"]),
    ),
    "Conv1D": Seed(
        ("gpt2", "W8A8"),
        "transformer.h.{0..1}.attn.c_attn, transformer.h.{0..1}.attn.c_proj, transformer.h.{0..1}.mlp.c_fc and 1 more",
        "Conv1D",
        "lowbit_hf.load",
    ),
    "experts' global scales in transformers": Seed(
        ("mixtral", "NVFP4A16"), GROUP, "wrong values", "lowbit_hf.load", ("transformers",)
    ),
    "a head that Linear does not mean": Seed(
        ("llama", "W8A8", [("lm_head", "W8A8")], (), {"tie_word_embeddings": False}),
        "lm_head",
        "its class is another one",
        "without the head",
        ENGINES,
    ),
    "a head that is named": Seed(
        ("llama", "W8A8", [("lm_head", "W8A8")], (), {"tie_word_embeddings": False}),
        "lm_head",
        "only some model classes",
        "without the head",
        ("vllm",),
        config=lambda c: group_of(c)["targets"].append("lm_head"),
        severity="warning",
    ),
}


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_seeded_defects_are_found_and_nothing_else(good, change, seed):
    kind, name, *rest = seed.made
    rules, keep, config = [*rest, *[(), (), {}][len(rest) :]]
    folder = good(kind, name, rules, keep, **config)
    if seed.tensors is not None or seed.config is not None:
        before = lint(folder, seed.asked, tp=seed.tp, gpu=seed.gpu).findings
        assert not any(finding.key == seed.key and seed.what in finding.what for finding in before)
        folder = change(folder, tensors=seed.tensors, config=seed.config)
    report = lint(folder, seed.asked, tp=seed.tp, gpu=seed.gpu)
    assert len(report.findings) == 1, report.findings
    (found,) = report.findings
    assert (found.severity, found.key, found.runtimes) == (seed.severity, seed.key, seed.runtimes)
    assert seed.what in found.what
    assert seed.fix in found.fix
    assert found.gpu == seed.gpu
    assert {v.runtime for v in report.verdicts if not v.loads} == (set(seed.runtimes) if report.failed else set())


def test_gpus_that_do_not_divide_rows_and_columns(good):
    report = lint(good("llama", "FP8_DYNAMIC"), ["vllm"], tp=3)
    found = {finding.key: finding.what for finding in report.findings}
    assert all("3 GPUs" in what for what in found.values())
    assert any(key.endswith("q_proj") for key in found)
