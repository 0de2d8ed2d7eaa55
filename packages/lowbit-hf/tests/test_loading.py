from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
import lowbit_hf
from lowbit.errors import CheckpointError
from lowbit.tensor import QuantizedTensor
from lowbit_hf.layouts.compressed_tensors import CompressedTensors
from lowbit_hf.loading import load
from lowbit_hf.schemes import quantization_config, scheme

KINDS = ["llama", "qwen2", "mixtral", "gpt2"]
WEIGHT_ONLY = [
    *[("llama", name) for name in ("W4A16_G32", "W3A16_G64", "W4A16_ASYM_G32", "MXFP8A16", "MXFP6A16", "NVFP4A16")],
    *[(kind, name) for kind in ("qwen2", "mixtral", "gpt2") for name in ("W4A16_ASYM_G32", "NVFP4A16")],
]
Q = "model.layers.0.self_attn.q_proj"


def dequantized(model):
    return {
        name: p.dequantize().contiguous() if isinstance(p, QuantizedTensor) else p.detach()
        for name, p in model.named_parameters()
    }


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def same(got, wanted, kind):
    """Bit for bit; but two roundings differ where sums have another order than transformers'.

    Those are experts' parts, and products of gpt2, whose weights lie (K, N) there: which order a product has depends on
    the processor.
    """
    if kind not in {"mixtral", "gpt2"}:
        return torch.equal(got, wanted)
    return float((got - wanted).abs().max()) <= 8 * torch.finfo(got.dtype).eps * float(wanted.abs().max())


@pytest.fixture
def twin(stock):
    """`twin(folder, model)`: transformers' own model of the plain folder, with the weights that `model` stands for."""

    def of(folder, model):
        plain = stock(folder)
        weights = dequantized(model)
        assert weights.keys() == dict(plain.named_parameters()).keys()
        plain.load_state_dict(weights, strict=False)
        return plain

    return of


def test_is_public():
    assert lowbit_hf.load is load


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_plain_folder_is_what_transformers_loads(make, stock, tokens, kind, dtype):
    folder = make(kind, dtype)
    model = load(folder)
    assert model.dtype == dtype
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert same(logits(model, tokens), logits(stock(folder), tokens), kind)


@pytest.mark.parametrize(("kind", "name"), WEIGHT_ONLY)
def test_logits_are_those_of_the_dequantized_weights(make, quantize, twin, tokens, kind, name):
    model = load(quantize(make(kind), name))
    low = [n for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
    assert len(low) == {"llama": 14, "qwen2": 14, "mixtral": 12, "gpt2": 8}[kind]
    plain = twin(make(kind), model)
    assert same(logits(model, tokens), logits(plain, tokens), kind)
    if name == "W4A16_ASYM_G32" and kind != "mixtral":
        greedy = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(tokens, **greedy), plain.generate(tokens, **greedy))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["W4A16_G32", "MXFP4A16"])
def test_other_dtypes(make, quantize, twin, tokens, dtype, name):
    folder = make("qwen2", dtype)
    model = load(quantize(folder, name))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model, tokens), logits(twin(folder, model), tokens))


@pytest.mark.parametrize(
    ("kind", "name"),
    [*[("llama", each) for each in ("FP8_DYNAMIC", "MXFP8", "W4AFP8", "MXFP4")], *[(kind, "W8A8") for kind in KINDS]],
)
def test_inputs_are_rounded_too(make, quantize, twin, tokens, kind, name):
    model = load(quantize(make(kind), name))
    wanted = scheme(name).activation
    low = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    assert all(p.activation == wanted for p in low)
    got, plain = logits(model, tokens).double(), logits(twin(make(kind), model), tokens).double()
    error = float((got - plain).norm() / plain.norm())
    # A half step of the input's format at its largest magnitude is 1/254, 1/16 or 1/4 of it, over a few layers.
    assert 0 < error < {"W8A8": 0.05, "W4A8_G32": 0.05, "MXFP4": 0.8}.get(name, 0.2)


def test_experts_stay_stacked_and_run_through_grouped_mm(make, quantize, tokens, monkeypatch):
    model = load(quantize(make("mixtral"), "W4A16_G32"))
    assert model.config._experts_implementation == "lowbit"
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, QuantizedTensor)
    assert tuple(experts.gate_up_proj.shape) == (4, 512, 128)
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm

    def counted(x, weight, **options):
        calls.append(type(weight))
        return grouped_mm(x, weight, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    logits(model, tokens)
    assert calls == [QuantizedTensor] * 4  # two layers, two products each


@pytest.mark.parametrize(("kind", "name"), [("llama", "W4A16_G32"), ("mixtral", "W8A8"), ("gpt2", "NVFP4A16")])
def test_bind(make, quantize, tokens, kind, name):
    model = load(quantize(make(kind), name))
    before = logits(model, tokens)
    low = {name for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedTensor)}
    table = lowbit.bind(model)
    assert {row.name for row in table.rows} == low
    assert all(row.kernel for row in table.rows)
    after = logits(model, tokens)
    # Another kernel may add up in another order.
    assert torch.allclose(after.double(), before.double(), rtol=0.02, atol=0.02 * float(before.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings_stay_tied(make, quantize, kind):
    model = load(quantize(make(kind), "W4A16_G32"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["W4A16_G32", "W8A8"])
def test_quantized_embeddings_stay_tied(make, quantize, twin, tokens, name):
    folder = make("llama")
    model = load(quantize(folder, name, rules=[("model.embed_tokens.weight", name)]))
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, QuantizedTensor)
    assert model.get_output_embeddings().weight is embedding
    if scheme(name).activation is None:
        assert torch.equal(logits(model, tokens), logits(twin(folder, model), tokens))


def test_untied_head_is_kept(make, quantize, stock, tokens):
    folder = make("llama", tie_word_embeddings=False)
    model = load(quantize(folder, "W4A16_G32"))
    assert torch.equal(model.lm_head.weight, stock(folder).lm_head.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_sharded(make, quantize, tokens):
    whole, parts = make("mixtral"), make("mixtral", shard="300KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    state = {name: t for shard in parts.glob("*.safetensors") for name, t in load_file(shard).items()}
    out = quantize(parts, "W4A16_G32")
    assert not (out / "model.safetensors").exists()
    model = load(out)
    save_file(state, (single := out.parent / "single.safetensors"), {"format": "pt"})
    one = out.parent / "one"
    one.mkdir()
    single.rename(one / "model.safetensors")
    (one / "config.json").write_bytes((whole / "config.json").read_bytes())
    assert torch.equal(logits(model, tokens), logits(load(quantize(one, "W4A16_G32")), tokens))


def test_tensors_without_a_place_are_passed_over(make, change, quantize, tokens):
    folder = change(
        make("llama"), tensors=lambda s: s.update({"mtp.fc.weight": torch.ones(8, 8), "mtp.step": torch.tensor(3)})
    )
    assert torch.equal(
        logits(load(quantize(folder, "W4A16_G32")), tokens), logits(load(quantize(make("llama"), "W4A16_G32")), tokens)
    )


def test_generation_config_is_the_folder_s(make, change, quantize):
    folder = change(make("llama"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "top_k": 3}))
    for each in (folder, quantize(folder, "W4A16_G32")):
        settings = load(each).generation_config
        assert (settings.eos_token_id, settings.top_k) == ([1, 7], 3)


def drop(name):
    return lambda state: state.pop(name)


def put(name, tensor):
    return lambda state: state.update({name: tensor})


DAMAGE = {
    "a weight missing": (drop("model.norm.weight"), r"missing_keys \['model.norm.weight'\]"),
    "scale missing": (drop(f"{Q}.weight_scale"), f"'{Q}': tensor 'weight_scale' is missing"),
    "shape missing": (drop(f"{Q}.weight_shape"), f"'{Q}': tensor 'weight_shape' is missing"),
    "codes missing": (drop(f"{Q}.weight_packed"), f"'{Q}': tensor 'weight_packed' is missing"),
    "all missing": (lambda s: [s.pop(n) for n in list(s) if n.startswith(f"{Q}.")], f"missing_keys .*{Q}.weight"),
    "scale of another shape": (put(f"{Q}.weight_scale", torch.ones(128, 3)), f"'{Q}': weight_scale is"),
    "codes of another dtype": (
        put(f"{Q}.weight_packed", torch.ones(128, 16)),
        f"'{Q}': weight_packed is torch.float32",
    ),
    "lying shape": (put(f"{Q}.weight_shape", torch.tensor([128, 1 << 40])), f"'{Q}': "),
    "negative shape": (put(f"{Q}.weight_shape", torch.tensor([-128, 128])), f"'{Q}': "),
    "shape of floats": (put(f"{Q}.weight_shape", torch.ones(2)), f"'{Q}': weight_shape is torch.float32"),
    "stray zero points": (put(f"{Q}.weight_zero_point", torch.ones(1)), f"'{Q}': .*weight_zero_point.* no meaning"),
    "another model's shape": (put("model.norm.weight", torch.ones(64)), r"mismatched_keys .*model.norm.weight"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints(make, quantize, change, case):
    edit, words = DAMAGE[case]
    with pytest.raises(CheckpointError, match=words):
        load(change(quantize(make("llama"), "W4A16_G32"), tensors=edit))


def test_an_expert_missing(make, quantize, change):
    out = quantize(make("mixtral"), "W4A16_G32")
    expert = "model.layers.1.block_sparse_moe.experts.2.w1."

    def cut(state):
        for name in [name for name in state if name.startswith(expert)]:
            del state[name]

    with pytest.raises(CheckpointError, match="does not fit MixtralForCausalLM"):
        load(change(out, tensors=cut))


def groups_of(**groups):
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


CONFIGS = {
    "another method": ({"quant_method": "hqq", "bits": 4}, "quantized by 'hqq'; lowbit reads"),
    "another method's tensors": (
        {"quant_method": "gptq", "bits": 4},
        "quantized by 'gptq', but none of its tensors are",
    ),
    # ModelOpt's config has groups too, but its scales mean something else.
    "another with groups": (groups_of() | {"quant_method": "modelopt"}, "needed are a matrix `weight`"),
    "a string": ("int4", "quantized by 'int4'"),
    "no groups": ({"quant_method": "compressed-tensors"}, "no object of config_groups"),
    "a group of null": (groups_of(group_0=None), "'group_0' must be an object"),
    "no targets": (groups_of(group_0={}), "'group_0' must be an object with a list of targets"),
    "targets of numbers": (groups_of(group_0={"targets": [3]}), "list of targets"),
    "malformed pattern": (groups_of(group_0={"targets": ["re:("]}), "malformed regular expression"),
    "nothing covers it": (groups_of(group_0={"targets": ["Conv1d"]}), "has quantized tensors, but no group"),
    "no weights": (groups_of(group_0={"targets": ["Linear"]}), "has weights None"),
    "unknown format": (groups_of(group_0={"targets": ["Linear"], "format": "x", "weights": {}}), "has format 'x'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_mean_nothing(make, quantize, change, case):
    wanted, words = CONFIGS[case]
    out = change(quantize(make("llama"), "W4A16_G32"), config=lambda c: c.update(quantization_config=wanted))
    with pytest.raises(CheckpointError, match=words):
        load(out)


def test_names_go_before_patterns_and_patterns_before_classes():
    names = ["W8A8", "W4A16", "MXFP4A16"]
    targets = [["Linear"], ["re:.*q_proj"], ["model.0.q_proj"]]
    config = quantization_config(dict(zip(map(scheme, names), targets, strict=True)), [])
    groups = CompressedTensors(config, None)
    found = {
        module: groups.find(module)["targets"] for module in ("model.0.q_proj", "model.1.q_proj", "model.1.k_proj")
    }
    assert list(found.values()) == [targets[2], targets[1], targets[0]]


def test_config_under_its_old_name(make, quantize, change, tokens):
    out = quantize(make("llama"), "W4A16_G32")
    old = change(out, config=lambda c: c.update(compression_config=c.pop("quantization_config")))
    assert torch.equal(logits(load(old), tokens), logits(load(out), tokens))
