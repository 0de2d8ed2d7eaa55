from __future__ import annotations

import json
from dataclasses import dataclass
from math import inf, nan

import pytest
import torch

from lowbit.command import main
from lowbit_hf.lint import RUNTIMES, lint
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme

ALL = ("vllm", "transformers", "sglang")
ENGINES = ("vllm", "sglang")
LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
GROUP = "quantization_config.config_groups.group_0"
INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_TOKEN = INT8_TOKEN | {"type": "float"}


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


# Good checkpoints, and who loads them.

GOOD = [
    ("llama", "W4A16", ALL),
    ("llama", "W8A16", ALL),
    ("llama", "W4A16_G32", ALL),
    ("llama", "W3A16_G32", ("vllm", "transformers")),
    ("llama", "W4A16_ASYM", ENGINES),
    ("llama", "W8A8", ALL),
    ("llama", "W8A8_ASYM", ALL),
    ("llama", "FP8_DYNAMIC", ALL),
    ("llama", "MXFP8", ("vllm", "transformers")),
    ("llama", "MXFP8A16", ("vllm", "transformers")),
    ("llama", "MXFP6A16", ("transformers",)),
    ("llama", "MXFP4", ("vllm", "transformers")),
    ("llama", "MXFP4XFP8", ("vllm", "transformers")),
    ("llama", "MXFP4A16", ("vllm", "transformers")),
    ("llama", "NVFP4A16", ALL),
    ("llama", "W4AFP8", ("vllm", "transformers")),
    ("llama", "W4A8", ("vllm", "transformers")),
    ("llama", "W4A4", ("vllm", "transformers")),
    ("qwen2", "W8A8", ALL),
    ("qwen2", "FP8_DYNAMIC", ALL),
    ("qwen3", "W4A16", ALL),
    ("qwen3", "NVFP4A16", ALL),
    ("bert", "W8A8", ALL),
    ("deepseek", "W8A8", ALL),
    ("deepseek", "W4A16_G32", ALL),
    ("qwen3-moe", "W4A16_G64", ALL),
    ("qwen3-moe", "FP8_DYNAMIC", ALL),
    ("qwen3-moe", "W8A8", ("vllm",)),
    ("qwen3-moe", "MXFP4A16", ("vllm", "transformers")),
    ("mixtral", "W4A16", ALL),
    ("mixtral", "NVFP4A16", ENGINES),
]


@pytest.mark.parametrize(("kind", "name", "runtimes"), GOOD, ids=[f"{kind}-{name}" for kind, name, _ in GOOD])
def test_good_checkpoints_are_good(good, kind, name, runtimes):
    folder = good(kind, name)
    assert lint(folder, runtimes).findings == ()
    refusing = [runtime for runtime in ALL if runtime not in runtimes]
    report = lint(folder, refusing) if refusing else None
    for runtime in refusing:
        keys = [finding.key for finding in report.findings if runtime in finding.runtimes]
        assert keys
        assert all(key.startswith(GROUP) for key in keys), keys


def test_blocks_are_good_where_rows_divide(good):
    assert lint(good("llama", "FP8_BLOCK", num_key_value_heads=4)).findings == ()


def test_mixed_schemes_are_good(good):
    assert lint(good("llama", "W8A8", [("*.mlp.*", "W4A16")])).findings == ()
    assert lint(good("qwen3-moe", "W8A8", [("*.experts.*", "W4A16_G64")])).findings == ()


def test_layers_left_alone_are_good(good):
    assert lint(good("llama", "W4A16", keep=("*.layers.0.*",))).findings == ()


def test_sharded_and_plain_checkpoints_are_good(make, good):
    assert lint(make("llama")).findings == ()
    assert lint(good("llama", "W4A16", shard="100KB")).findings == ()


def test_calibrated_schemes_are_good(good, change):
    scale = {"input_global_scale": torch.tensor([100.0])}

    def quantize_inputs(config):
        group = group_of(config)
        group["input_activations"] = group["weights"] | {"dynamic": "local"}

    folder = change(good("llama", "NVFP4A16"), tensors=beside("weight_packed", scale), config=quantize_inputs)
    assert lint(folder).findings == ()
    folder = change(folder, tensors=drop(f"{Q}.input_global_scale"))
    assert [finding.key for finding in lint(folder).findings] == [f"{Q}.input_global_scale"]


# Edits


def group_of(config, name="group_0"):
    return config["quantization_config"]["config_groups"][name]


def beside(local, tensors):
    """Put `tensors` beside every tensor of this local name."""

    def edit(state):
        for module in [name.removesuffix(f".{local}") for name in state if name.endswith(f".{local}")]:
            state |= {f"{module}.{name}": tensor.clone() for name, tensor in tensors.items()}

    return edit


def drop(*prefixes):
    def edit(state):
        for name in [name for name in state if name.startswith(prefixes)]:
            del state[name]

    return edit


def put(name, made):
    """Set a tensor to what `made` makes of the old one."""

    def edit(state):
        state[name] = made(state.get(name))

    return edit


def filled(index, value):
    def edit(tensor):
        tensor = tensor.clone()
        tensor.flatten()[index] = value
        return tensor

    return edit


def weights(**values):
    return lambda config: group_of(config)["weights"].update(values)


def inputs(values):
    return lambda config: group_of(config).update(input_activations=values)


def top(**values):
    return lambda config: config["quantization_config"].update(values)


def plain(module, shape, *, ignore):
    """Store a module unquantized, and say so or not."""

    def tensors(state):
        drop(f"{module}.")(state)
        state[f"{module}.weight"] = torch.randn(shape).bfloat16()

    def config(values):
        if ignore:
            values["quantization_config"]["ignore"].append(module)

    return {"tensors": tensors, "config": config}


def in_blocks(state):
    """Give fp8 weights a scale for each 128 x 128."""
    for name in [name for name in state if name.endswith(".weight_scale")]:
        n, k = state[name.removesuffix("_scale")].shape
        state[name] = torch.ones(-(-n // 128), -(-k // 128)).bfloat16()


def both(*edits):
    def edit(values):
        for each in edits:
            each(values)

    return edit


# Seeded defects: a good checkpoint, its damage, and the one finding.


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


# The tables


def test_tables_say_where_they_come_from():
    assert tuple(RUNTIMES) == ALL
    for runtime in RUNTIMES.values():
        assert runtime.version
        assert runtime.source
        for row in runtime.rows:
            assert row.formats
            assert row.parts
            assert bool(row.refusal) == bool(row.fix), row.name
            assert row.refusal or row.kernel, row.name
            assert bool(row.native) == bool(row.fallback), row.name


# The command


@pytest.fixture
def lowbit(capsys):
    def called(*arguments):
        capsys.readouterr()
        code = main(["lint", *map(str, arguments)])
        return code, *capsys.readouterr()

    return called


def test_the_command_tells_what_loads_and_where(lowbit, good):
    code, out, err = lowbit(good("llama", "W4AFP8"), "--runtime", "vllm", "--tp", "1")
    assert (code, err) == (0, "")
    head, line = out.splitlines()
    assert head.split() == ["runtime", "loads", "schemes"]
    assert line.split(maxsplit=3) == ["vllm", "0.33", "yes", "W4AFP8 on sm90 only (CUTLASS w4a8)"]


def test_the_command_tells_what_is_wrong(lowbit, good):
    code, out, _ = lowbit(good("llama", "W4AFP8"), "--runtime", "vllm", "--gpu", "b200")
    assert code == 1
    assert f"error: {GROUP} [vllm on b200]" in out
    assert "  W4AFP8 needs sm90 only; b200 is sm100" in out
    assert "  fix: serve on another GPU" in out


def test_the_command_gives_json(lowbit, good):
    code, out, _ = lowbit(good("llama", "MXFP6A16"), "--json")
    report = json.loads(out)
    assert code == 1
    assert {tuple(finding["runtimes"]) for finding in report["findings"]} == {("vllm",), ("sglang",)}
    assert [verdict["loads"] for verdict in report["verdicts"]] == [False, True, False]


@pytest.mark.parametrize(
    ("option", "value", "words"), [("--runtime", "tgi", "'tgi' is not one of"), ("--gpu", "h900", "'h900' is no GPU")]
)
def test_wrong_use(lowbit, good, option, value, words):
    code, out, err = lowbit(good("llama", "W4A16"), option, value)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
