"""lowbit's own layout: through transformers' `from_pretrained` and `save_pretrained`, and through lowbit's commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import inf

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_calibrated import Windows
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import lowbit
from lowbit import QuantizedTensor, Recipe, Rule
from lowbit.apply import plain_weight
from lowbit.errors import CheckpointError, RecipeError
from lowbit_algos import Method, calibrate_
from lowbit_hf import LowbitConfig, load
from lowbit_hf.convert import convert
from lowbit_hf.difference import compare
from lowbit_hf.layouts import WRITERS
from lowbit_hf.layouts.lowbit import Lowbit, LowbitWriter
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme, scheme_of_spec

KINDS = ["llama", "qwen3-moe", "mixtral", "gpt2"]
Q = "model.layers.0.self_attn.q_proj.weight"
# What compressed-tensors has no place for.
OWN = {
    "e3m2 weights": "e3m2:1x32:e8m0",
    "e5m2 inputs": "e4m3fn:1x32:e8m0+dynamic:e5m2:1x32:e8m0",
    "int8 inputs of e5m2 weights": "e5m2:1x*:bfloat16+dynamic:int8:1x*:float32",
    "fp8 inputs of fp4 weights": "e2m1:1x16:e4m3fn:tensor+dynamic:e4m3fn:1x*:float32",
    "zero points of blocks": "uint3:2x64:float32:zero=uint3",
    "blocks of integers": "int4:64x64:bfloat16",
    "one scale in all": "int5:*x*:float32",
}
SMOOTH = Method(rounding="nearest", smoothing="smoothquant", alpha=0.5)


def scheme_named(name):
    return scheme_of_spec(name) if ":" in name else scheme(name)


@pytest.fixture
def own(tmp_path):
    """`own(folder, "W4A16", **options)`: the folder in lowbit's layout that it became."""
    count = 0

    def to(folder, name, *, rules=(), **options):
        nonlocal count
        count += 1
        out, rules = tmp_path / f"own-{count}", [(pattern, scheme_named(each)) for pattern, each in rules]
        run(prepare(folder, scheme_named(name), rules=rules, mode="even", layout="lowbit", **options), out)
        return out

    return to


def pretrained(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def quantized(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def tensors(folder):
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_weight(a, b):
    one, two = a.inner_tensors(), b.inner_tensors()
    return (a.storage_layout, one.keys()) == (b.storage_layout, two.keys()) and all(
        bits(one[name]) == bits(two[name]) for name in one
    )


def config(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same_folders(a, b):
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys()
    assert [name for name in one if bits(one[name]) != bits(two[name])] == []
    assert config(a) == config(b)


def assert_read_alike(folder, tokens, *, count):
    """Both loaders give the same weights, and compute the same; the model is that of transformers."""
    ours, theirs = load(folder), pretrained(folder)
    held, other = quantized(ours), quantized(theirs)
    assert held.keys() == other.keys()
    assert len(held) == count
    assert all(same_weight(held[name], other[name]) for name in held)
    assert not any(p.requires_grad for p in other.values())
    wanted = logits(ours, tokens)
    assert bool(wanted.isfinite().all())
    assert torch.equal(logits(theirs, tokens), wanted)
    return theirs


# What both loaders read, and what is saved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["W4A16_G32", "e3m2:1x32:e8m0+dynamic:int8:1x*:float32"])
def test_both_loaders_read_it_and_saving_gives_it_back(make, own, tokens, tmp_path, kind, name):
    folder = own(make(kind), name)
    model = assert_read_alike(folder, tokens, count={"llama": 14, "gpt2": 8}.get(kind, 12))
    model.save_pretrained(tmp_path / "saved")
    assert_same_folders(folder, tmp_path / "saved")
    # A model that was saved is as it was, and can be saved again.
    # So it can when its weights are packed for kernels.
    lowbit.bind(model)
    model.save_pretrained(tmp_path / "twice")
    assert_same_folders(folder, tmp_path / "twice")


@pytest.mark.parametrize("case", OWN)
def test_formats_that_compressed_tensors_cannot_hold(make, own, tokens, case):
    source = make("llama", torch.float32) if case == "one scale in all" else make("llama")
    wanted, plain = scheme_of_spec(OWN[case]), load_file(source / "model.safetensors")
    folder = own(source, OWN[case])
    assert_read_alike(folder, tokens, count=14)
    held = quantized(load(folder))
    for name in (Q, "model.layers.1.mlp.down_proj.weight"):
        expected = lowbit.quantize(plain[name], wanted.weight_format(plain[name].dtype), activation=wanted.activation)
        if wanted.weight.tensor_scale and name == Q:  # one for all of q, k and v
            continue
        assert same_weight(held[name], expected)
    with pytest.raises(CheckpointError, match="cannot be written as compressed-tensors, and of 13 more"):
        convert(folder, folder.with_name("ct"), WRITERS["compressed-tensors"])


def test_rows_that_end_in_padding_keep_their_length(make, own, tokens, tmp_path):
    folder = own(make("llama", intermediate_size=100), "int5:1x*:bfloat16")
    stored = tensors(folder)
    columns = {name: int(t) for name, t in stored.items() if name.endswith(":columns")}
    assert columns == {f"model.layers.{i}.mlp.down_proj.weight:columns": 100 for i in (0, 1)}
    assert_read_alike(folder, tokens, count=14).save_pretrained(tmp_path / "saved")
    assert_same_folders(folder, tmp_path / "saved")


@pytest.mark.parametrize(
    ("kind", "name", "method"),
    [
        ("olmo", "W8A8", SMOOTH),
        ("olmo", "W8A8_STATIC_ASYM", SMOOTH),
        ("olmo", "NVFP4", SMOOTH),
        ("olmo", "W4A16_G32", Method.of("awq+gptq", alpha=0.5)),
        ("gpt2", "W8A8", SMOOTH),
    ],
)
def test_factors_stay_with_weights(make, own, tokens, tmp_path, kind, name, method):
    source = make(kind)
    folder = own(source, name, calibration=Windows(), method=method)
    model = assert_read_alike(folder, tokens, count={"olmo": 14, "gpt2": 8}[kind])
    smoothed = {name: p.pre_scale for name, p in quantized(model).items() if p.pre_scale is not None}
    # Nothing takes over the factors of what comes after a norm without weights, or after GELU.
    assert {name.split(".")[-2] for name in smoothed} == (
        {"c_proj"} if kind == "gpt2" else {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    )
    # Room is made in all; ones, which change nothing, are what weights without factors leave there.
    stored = tensors(folder)
    room = {name: t for name, t in stored.items() if name.endswith(":pre_scale")}
    assert len(room) == len(quantized(model)) > len(smoothed)
    assert sum(bool((t == 1).all()) for t in room.values()) == len(room) - len(smoothed)
    # As the same method makes them in memory, where no file has a say.
    chosen, memory = scheme(name), load(source)
    fmt, axis = chosen.weight_format(torch.bfloat16), 0 if kind == "gpt2" else -1
    recipe = Recipe(tuple(Rule(n, fmt, chosen.activation, axis) for n in quantized(model)))
    calibrate_(memory, recipe, [{"input_ids": Windows().windows(source), "use_cache": False}], method)
    for parameter, factors in smoothed.items():
        expected = memory.get_parameter(parameter)
        assert torch.equal(factors, expected.pre_scale), parameter
        assert torch.equal(model.get_parameter(parameter).qdata, expected.qdata), parameter
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        logits(assert_read_alike(tmp_path / "saved", tokens, count=len(room)), tokens), logits(model, tokens)
    )
    # Where nothing is kept, nothing is stored.
    assert sum(name.endswith(":pre_scale") for name in tensors(tmp_path / "saved")) == len(smoothed)


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_stacks_of_experts_keep_factors_and_input_scales(make, tokens, tmp_path, kind):
    """Of one stack all experts have the same, and each its copy in the file."""
    fmt, inputs = lowbit.INT8_ROW, lowbit.Activation(lowbit.INT8_TENSOR_ASYM, "static")
    recipe = Recipe((Rule("*.experts.*_proj", fmt), Rule("*", None)))
    model = pretrained(make(kind), quantization_config=LowbitConfig(recipe))
    for i, (name, weight) in enumerate(quantized(model).items()):
        module, _, local = name.rpartition(".")
        zero = torch.tensor([[i]], dtype=torch.int8)
        with_use = QuantizedTensor.from_parts(
            weight.qdata, weight.scales, fmt, k=weight.shape[-1], dtype=weight.dtype, activation=inputs,
            act_scale=torch.tensor([[0.03 + i / 100]]), act_zero=zero, pre_scale=torch.rand(weight.shape[-1]) + 0.5,
        )  # fmt: skip
        setattr(model.get_submodule(module), local, torch.nn.Parameter(with_use, requires_grad=False))
    model.save_pretrained(tmp_path / "saved")
    assert sum(name.endswith(":act_zero") for name in tensors(tmp_path / "saved")) == 2 * 4 * 3
    again = assert_read_alike(tmp_path / "saved", tokens, count=4)
    assert all(same_weight(p, quantized(model)[name]) for name, p in quantized(again).items())
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_other_layouts_refuse_factors_and_plain_weights_take_them(make, own, tokens, tmp_path):
    folder = own(make("olmo"), "W8A8", calibration=Windows(), method=SMOOTH)
    for name in set(WRITERS) - {"lowbit"}:
        with pytest.raises(CheckpointError, match=r"'model\.layers\.0.*(pre_scale|cannot be written)"):
            convert(folder, tmp_path / "out", WRITERS[name])
    with pytest.raises(CheckpointError, match="which only lowbit's layout has a place for: --as lowbit"):
        convert(folder, tmp_path / "out", WRITERS["compressed-tensors"])
    assert convert(folder, tmp_path / "plain", None).weights == 14
    weights, stored = quantized(load(folder)), load_file(tmp_path / "plain" / "model.safetensors")
    smoothed = [name for name, weight in weights.items() if weight.pre_scale is not None]
    for name in smoothed:
        values = weights[name].dequantize(torch.float32) * weights[name].pre_scale
        assert torch.equal(stored[name], values.bfloat16())
        assert torch.equal(stored[name], plain_weight(weights[name]))
    ours, plain = logits(load(folder), tokens).float(), logits(load(tmp_path / "plain"), tokens).float()
    assert float((ours - plain).norm() / plain.norm()) < 0.05
    # Both stand for the same weights, to the rounding of bfloat16.
    rows = {row.name: row.sqnr for row in compare(folder, tmp_path / "plain").differences}
    assert all(rows[name] > 45 for name in smoothed)
    with pytest.raises(RecipeError, match="no place for smoothing factors that stay with a weight"):
        prepare(make("olmo"), scheme("W8A8"), mode="even", calibration=Windows(), method=SMOOTH)


def test_a_sharded_folder_is_read_and_written(make, own, tokens, tmp_path):
    folder = own(make("qwen3-moe", shard="100KB"), "W4A16_G32")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = assert_read_alike(folder, tokens, count=12)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    assert_same_folders(folder, tmp_path / "saved")
    assert_read_alike(tmp_path / "saved", tokens, count=12)


def test_quantized_embeddings_stay_tied(make, own, tokens, tmp_path):
    folder = own(make("llama"), "W4A16_G32", rules=[("model.embed_tokens", "int8:1x*:bfloat16")])
    model = assert_read_alike(folder, tokens, count=15)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert isinstance(model.lm_head.weight, QuantizedTensor)
    model.save_pretrained(tmp_path / "saved")
    assert_same_folders(folder, tmp_path / "saved")


def test_rules_are_few_and_say_what_each_weight_is(make, own, tokens, tmp_path):
    rules = [("*.layers.0.*.down_proj", "W8A8"), ("*.experts.*.down_proj", "W4A16_G64"), ("*.1.*.v_proj", "W8A8")]
    folder = own(make("qwen3-moe", num_hidden_layers=3), "W4A16_G32", rules=rules)
    found = config(folder)["quantization_config"]
    assert found["rules"] == [
        {
            "match": r"re:model\.layers\.(0)\.mlp\.experts\.\d+\.down_proj\.weight",
            "weight": "int8:1x*:bfloat16",
            "activation": "dynamic:int8:1x*:float32",
        },
        {
            "match": "model.layers.1.self_attn.v_proj.weight",
            "weight": "int8:1x*:bfloat16",
            "activation": "dynamic:int8:1x*:float32",
        },
        {
            "match": r"re:model\.layers\.(1|2)\.mlp\.experts\.\d+\.down_proj\.weight",
            "weight": "int4:1x64:bfloat16",
            "activation": None,
        },
        {"match": "*", "weight": "int4:1x32:bfloat16", "activation": None},
    ]
    assert_read_alike(folder, tokens, count=18).save_pretrained(tmp_path / "saved")
    assert_same_folders(folder, tmp_path / "saved")


@pytest.mark.parametrize("names", ["ragged", "even", "all"])
def test_rules_match_the_names_they_were_made_for_and_no_others(names):
    every = [f"a.{i}.b.{j}.c" for i in range(3) for j in range(12)] + ["a.0.c", "a.x.b", "a.00.c", "b"]
    odd = {
        "ragged": [n for n in every if n.startswith(("a.0.b.1", "a.2.b.0"))],
        "even": [n for n in every if n.startswith(("a.0.b.", "a.2.b."))] + ["a.00.c", "b"],
        "all": [n for n in every if ".b." in n],
    }[names]
    from lowbit_hf.layouts.layout import Outline  # noqa: PLC0415

    outline = {
        name: Outline((4, 32), lowbit.MXFP4 if name in odd else lowbit.INT4_G32, None, torch.bfloat16) for name in every
    }
    written = LowbitWriter().config(outline, ())
    layout = Lowbit(written, None)
    assert {name for name in every if layout.meaning(name).weight == lowbit.MXFP4} == set(odd)
    assert len(written["rules"]) <= (9 if names == "ragged" else 5)


def test_the_dtype_that_is_asked_for(make, own, tokens):
    folder = own(make("llama"), "e3m2:1x32:e8m0")
    model = pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(model, tokens).dtype == torch.float32
    held = quantized(load(folder))
    assert all(torch.equal(held[name].qdata, p.qdata) for name, p in quantized(model).items())


def test_stacks_of_experts_that_are_stored_as_stacks(tmp_path):
    """gpt-oss keeps them (E, K, N), and files hold (E, N, K)."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    sizes |= {"num_experts_per_tok": 1, "vocab_size": 96, "head_dim": 32, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "layer_types": ["full_attention"]}
    folder, ids = tmp_path / "plain", torch.arange(2, 18).view(1, -1)
    GptOssForCausalLM(GptOssConfig(**sizes, max_position_embeddings=131072)).bfloat16().save_pretrained(folder)
    recipe = Recipe((Rule.of("*.experts.*_proj", "MXFP4", k_axis=-2), Rule.of("*", None)))
    model = pretrained(folder, quantization_config=LowbitConfig(recipe))
    plain = load(folder).get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    weight = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert same_weight(weight, lowbit.quantize(plain, "MXFP4", axis=-2))
    assert tuple(weight.shape) == (2, 64, 64)
    model.save_pretrained(tmp_path / "own")
    assert tuple(tensors(tmp_path / "own")["model.layers.0.mlp.experts.down_proj:qdata"].shape) == (2, 64, 16)
    assert torch.equal(logits(assert_read_alike(tmp_path / "own", ids, count=2), ids), logits(model, ids))
    assert convert(tmp_path / "own", tmp_path / "oss", WRITERS["mxfp4-gptoss"]).inexact == {}
    assert torch.equal(logits(load(tmp_path / "oss"), ids), logits(model, ids))
    assert convert(tmp_path / "oss", tmp_path / "back", WRITERS["lowbit"]).inexact == {}
    assert_same_folders(tmp_path / "own", tmp_path / "back")


# On the fly


@pytest.mark.parametrize("kind", KINDS)
def test_loading_a_plain_folder_quantizes_as_the_command_does(make, own, tmp_path, kind):
    model = pretrained(make(kind), quantization_config=LowbitConfig("w4a16_g32"))
    model.save_pretrained(tmp_path / "saved")
    assert_same_folders(own(make(kind), "W4A16_G32"), tmp_path / "saved")


def test_a_recipe_quantizes_as_quantize_does(make):
    recipe = Recipe((Rule.of("*.o_proj.weight", "MXFP6_E3M2"), Rule.of("*", "MXFP8", activation="dynamic:MXFP8")))
    model, other = pretrained(make("llama"), quantization_config=LowbitConfig(recipe)), load(make("llama"))
    lowbit.quantize_(other, recipe)
    held, wanted = quantized(model), quantized(other)
    assert held.keys() == wanted.keys()
    assert all(same_weight(held[name], wanted[name]) for name in held)


def test_what_cannot_be_quantized_on_the_fly(make, change):
    with pytest.raises(RecipeError, match="static activations .* only data tells"):
        pretrained(make("llama"), quantization_config=LowbitConfig("FP8"))
    with pytest.raises(RecipeError, match="give a scheme or a recipe"):
        pretrained(make("llama"), quantization_config=LowbitConfig())
    with pytest.raises(RecipeError, match="no scheme is named 'W4A61'; did you mean"):
        LowbitConfig("W4A61")
    with pytest.raises(RecipeError, match=r"'\*\.none'"):
        pretrained(make("llama"), quantization_config=LowbitConfig(Recipe((Rule.of("*.none", "MXFP4"),))))
    broken = change(make("llama"), tensors=lambda t: t[Q].view(-1)[:1].fill_(inf))
    with pytest.raises(RecipeError, match=f"'{Q}' hold NaN or infinity"):
        pretrained(broken, quantization_config=LowbitConfig("W4A16_G32"))


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_dequantized_it_is_a_plain_model_again(make, own, tokens, tmp_path, kind):
    folder = own(make(kind), "W8A16_G32")
    model = pretrained(folder)
    model.dequantize()
    assert quantized(model) == {}
    model.save_pretrained(tmp_path / "saved")
    convert(folder, tmp_path / "plain", None)
    assert_same_folders(tmp_path / "plain", tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), tokens), logits(model, tokens))


# Damage


def damaged(folder, out, change, edit=None):
    stored, values = load_file(folder / "model.safetensors"), config(folder)
    change(stored)
    if edit is not None:
        edit(values["quantization_config"])
    out.mkdir()
    save_file({name: t.contiguous() for name, t in stored.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(values))
    return out


DAMAGE = {
    "no scale": (lambda t: t.pop(f"{Q}:scale"), "'scale' is missing"),
    "a short scale": (lambda t: t.update({f"{Q}:scale": t[f"{Q}:scale"][:-1]}), "scale is .* of shape"),
    "short codes": (lambda t: t.update({f"{Q}:qdata": t[f"{Q}:qdata"][:, 1:]}), "last dimension 126"),
    "other codes": (lambda t: t.update({f"{Q}:qdata": t[f"{Q}:qdata"].float()}), "data is torch.float32"),
    "flat codes": (lambda t: t.update({f"{Q}:qdata": t[f"{Q}:qdata"].flatten()}), "needed are rows of codes"),
    "a zero too many": (lambda t: t.update({f"{Q}:zero": torch.zeros(128, 4, dtype=torch.int8)}), "has no zero points"),
    "an input scale too many": (lambda t: t.update({f"{Q}:act_scale": torch.ones(1, 1)}), "act_scale is there"),
    "factors of another K": (lambda t: t.update({f"{Q}:pre_scale": torch.full((64,), 2.0)}), "one a column"),
    "flat factors": (lambda t: t.update({f"{Q}:pre_scale": torch.full((1, 128), 2.0)}), "pre_scale is .* of 1 dims"),
    "other columns": (lambda t: t.update({f"{Q}:columns": torch.tensor(96)}), "data is torch.uint8 of shape"),
    "a plain weight too": (lambda t: t.update({Q: torch.zeros(128, 128)}), "is stored twice, quantized and plain"),
    "wide columns": (lambda t: t.update({f"{Q}:columns": torch.tensor([128, 128])}), "columns is"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights_are_refused_by_both(make, own, tmp_path, case):
    change, words = DAMAGE[case]
    folder = damaged(own(make("llama"), "W4A16_G32"), tmp_path / "damaged", change)
    for reader in (load, pretrained):
        with pytest.raises(CheckpointError, match=f"{Q}.*{words}"):
            reader(folder)


def test_a_buffer_is_no_weight(make, own, tmp_path):
    def quantize(stored):
        for part in ("qdata", "scale"):
            stored[f"model.rotary_emb.inv_freq:{part}"] = stored[f"{Q}:{part}"].clone()

    with pytest.raises(CheckpointError, match=r"'model\.rotary_emb\.inv_freq' has shape \(128, 128\)"):
        pretrained(damaged(own(make("llama"), "W4A16_G32"), tmp_path / "damaged", quantize))


def test_a_weight_of_another_shape_is_refused_by_both(make, own, tmp_path):
    def shrink(stored):
        for part in ("qdata", "scale"):
            stored[f"{Q}:{part}"] = stored[f"{Q}:{part}"][:64]

    folder = damaged(own(make("llama"), "W4A16_G32"), tmp_path / "damaged", shrink)
    with pytest.raises(CheckpointError, match=rf"'{Q}' has shape \(64, 128\), and LlamaForCausalLM has \(128, 128\)"):
        pretrained(folder)
    with pytest.raises(CheckpointError, match=f"does not fit LlamaForCausalLM.*{Q}"):
        load(folder)


def test_experts_that_differ_are_refused_by_both(make, own):
    folder = own(make("qwen3-moe"), "W4A16_G32", rules=[("*.0.mlp.experts.3.up_proj", "W8A16_G32")])
    with pytest.raises(CheckpointError, match=r"gate_proj.* is int4.*3\.up_proj.* is int8.*one parameter for both"):
        pretrained(folder)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(folder)


def test_stacks_that_are_quantized_in_part_are_refused_by_both(make, own):
    folder = own(make("qwen3-moe"), "W4A16_G32", keep=["*.0.mlp.experts.3.up_proj"])
    with pytest.raises(CheckpointError, match=r"3\.up_proj\.weight' is plain, and .* is quantized; .*gate_up_proj"):
        pretrained(folder)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(folder)


CONFIGS = {
    "newer": (lambda q: q.update(version=2), "layout version 2, .* reads up to 1.*pip install --upgrade"),
    "no version": (lambda q: q.update(version=None), "needed is a positive integer"),
    "a flag for a version": (lambda q: q.update(version=True), "needed is a positive integer"),
    "no rules": (lambda q: q.pop("rules"), "rules is null; needed is an array"),
    "rules of another kind": (lambda q: q.update(rules={"*": "MXFP4"}), "needed is an array"),
    "an unknown key": (lambda q: q.update(bits=4), "unknown keys bits"),
    "an unknown format": (lambda q: q["rules"][-1].update(weight="int9:1x32:bfloat16"), "int9"),
    "a bad pattern": (lambda q: q["rules"][-1].update(match="re:("), "malformed regular expression"),
    "an unknown key in a rule": (lambda q: q["rules"][-1].update(axis=1), "unknown keys axis"),
    "no rule for it": (lambda q: q["rules"][-1].update(match="lm_head.weight"), "no rule of quantization_config says"),
    "kept": (lambda q: q["rules"][-1].update(weight=None), "no rule of quantization_config says"),
    "another format": (lambda q: q["rules"][-1].update(weight="int8:1x32:bfloat16"), "data is torch.uint8"),
    "another input": (lambda q: q["rules"][-1].update(activation="static:INT8_TENSOR"), "act_scale is missing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_read_are_refused_by_both(make, own, tmp_path, case):
    edit, words = CONFIGS[case]
    folder = damaged(own(make("llama"), "W4A16_G32"), tmp_path / "damaged", lambda _: None, edit)
    for reader in (load, pretrained):
        with pytest.raises(CheckpointError, match=words):
            reader(folder)


def test_it_is_read_from_folders_only(make, own):
    folder = own(make("llama"), "W4A16_G32")
    with pytest.raises(CheckpointError, match="read from a folder"):
        LlamaForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict=tensors(folder))


def test_plain_parameters_may_be_called_as_parts_are(make, own, tmp_path):
    extra = {"model.layers.9.scale": torch.ones(3), "model.qdata": torch.ones(2)}
    folder = damaged(own(make("llama"), "W4A16_G32"), tmp_path / "more", lambda t: t.update(extra))
    found = Lowbit(config(folder)["quantization_config"], None).modules(tensors(folder))
    assert set(extra) <= set(found[None])
    assert len(quantized(load(folder))) == 14


# Commands, and what importing does


def test_commands_take_it(command, worded, tmp_path, tokens):
    source, out, text = worded(), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 94 + 2}" for i in range(600)))
    fmt = "e3m2:1x32:e8m0+dynamic:int8:1x*:float32"
    code, said, err = command("quantize", source, "--to", fmt, "-o", out)
    assert (code, said) == (1, "")
    assert "goes into lowbit's layout: --layout lowbit" in " ".join(err.split())
    options = ["--algorithm", "smoothquant", "--calibrate", text, "--samples", "8", "--seq-len", "16"]
    code, said, _ = command("quantize", source, "--to", fmt, "--layout", "lowbit", *options, "-o", out)
    assert code == 0
    assert "vllm serve" not in said
    assert_read_alike(out, tokens, count=14)
    assert any(name.endswith(":pre_scale") for name in tensors(out))
    assert "e3m2:1x32:e8m0 x dynamic:int8:1x*:float32" in command("inspect", out)[1]
    assert "16 tensors differ" in " ".join(command("diff", source, out)[1].split()).replace("14 tensors", "16 tensors")
    assert command("eval", out, "--against", source, "--text", text)[0] == 0
    assert command("export", out, "--as", "lowbit", "-o", tmp_path / "again")[0] == 0
    code, said, _ = command("lint", out, "--runtime", "transformers")
    assert code == 0, said
    assert "does not load 'lowbit'" in command("lint", out, "--runtime", "vllm")[1]
    # What is quantized already is what it stands for.
    assert command("quantize", out, "--to", "W4A16_G32", "-o", tmp_path / "ct")[0] == 0
    assert command("quantize", source, "--to", "int9:1x32:bfloat16", "-o", out)[0] == 2


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_compressed_tensors_comes_in_and_goes_out_bit_for_bit(make, quantize, tmp_path, kind):
    folder = quantize(make(kind), "NVFP4A16", rules=[("*.v_proj", "W8A8")])
    assert convert(folder, tmp_path / "own", WRITERS["lowbit"]).inexact == {}
    assert convert(tmp_path / "own", tmp_path / "back", WRITERS["compressed-tensors"]).inexact == {}
    assert_same_folders(folder, tmp_path / "back")


_IMPORTS = """
import sys
import lowbit_hf
assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "QuantizedTensor"
import transformers.quantizers.auto as auto
assert type(auto.__spec__.loader) is type(sys.modules["transformers.quantizers.base"].__spec__.loader)
"""


def test_importing_lowbit_hf_is_all_it_takes_and_takes_no_transformers(make, own):
    assert AUTO_QUANTIZER_MAPPING["lowbit"].__module__ == "lowbit_hf.quantizer"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"] is LowbitConfig
    folder = own(make("llama"), "W4A16_G32")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS, folder], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
