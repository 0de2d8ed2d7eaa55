"""Scales of a key-value cache, against what transformers' own cache holds of the written model, and who reads them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file
from transformers import DynamicCache

from lowbit import QuantizedTensor
from lowbit.command import main
from lowbit.errors import LowbitError, RecipeError
from lowbit.report import Report
from lowbit_algos import Method
from lowbit_hf import calibrated
from lowbit_hf.convert import convert
from lowbit_hf.difference import compare
from lowbit_hf.gguf.export import export
from lowbit_hf.layouts import WRITERS, layout_of
from lowbit_hf.lint import lint
from lowbit_hf.loading import load
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme

KINDS = ["llama", "qwen2", "qwen3", "qwen3-moe", "mixtral", "gpt2", "gpt-oss", "phi3"]
NEAREST = Method(rounding="nearest")
SCALES = ("k_scale", "v_scale")


@dataclass(frozen=True)
class Windows:
    """More windows than run at once; of the last one, the first token is in no other."""

    count: int = 6
    length = 32

    def windows(self, folder):
        windows = torch.randint(2, 95, (self.count, 32), generator=torch.Generator().manual_seed(5))
        windows[-1, 0] = 95
        return windows

    def fingerprint(self):
        return f"windows {self.count}"

    def described(self):
        return {"samples": self.count}


def job_of(folder, kind="fp8", name="W8A16_G32", method=NEAREST, **options):
    data = {"calibration": Windows(), "method": method}
    return prepare(folder, scheme(name), mode="even", kv_cache=kind, **(data | options))


@pytest.fixture(autouse=True)
def batches(monkeypatch):
    """Four windows run at once, so that there are two batches."""
    monkeypatch.setattr("lowbit_hf.budget.BATCH_TOKENS", 128)


@pytest.fixture
def quantized(make, tmp_path):
    """`quantized(folder, **options of job_of)`: the folder it became, and the account of that."""
    made = []

    def of(folder, **options):
        made.append(tmp_path / f"kv-{len(made)}")
        return made[-1], run(job_of(folder, **options), made[-1])

    return of


def scales_of(folder):
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items() if n.endswith(SCALES)}


def plain(model):
    """The model, its weights plain, so that transformers' own functions run it."""
    for name, parameter in list(model.named_parameters()):
        if isinstance(parameter, QuantizedTensor):
            owner, _, attribute = name.rpartition(".")
            weight = torch.nn.Parameter(parameter.dequantize(torch.float32), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, weight)
    return model


def amax_of(model, windows):
    """Of each layer's keys and values in a cache of transformers', the largest magnitude of each head."""
    found = {}
    with torch.no_grad():
        for batch in windows.split(4):
            cache = DynamicCache()
            model(input_ids=batch, past_key_values=cache, use_cache=True)
            for k, layer in enumerate(cache.layers):
                for local, states in zip(SCALES, (layer.keys, layer.values), strict=True):
                    amax = states.abs().amax((0, 2, 3))
                    found[k, local] = torch.maximum(found.get((k, local), amax), amax)
    return found


def place(name):
    """The number of the layer, and which scale it is."""
    return next(int(part) for part in name.split(".") if part.isdecimal()), name.rpartition(".")[2]


def outliers(folder, change):
    """Channels of the first head of keys, and values of the last token, larger than all else."""

    def edit(state):
        state["model.layers.0.self_attn.k_proj.weight"][:2] *= 300
        state["model.embed_tokens.weight"][95, :4] = 40

    return change(folder, tensors=edit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("each", ["fp8", "fp8-head"])
def test_scales_are_of_what_the_written_model_puts_into_its_cache(make, change, quantized, kind, each):
    folder = make(kind, torch.float32)
    if kind == "qwen2":
        folder = outliers(folder, change)
    out, account = quantized(folder, kind=each)
    scales, windows = scales_of(out), Windows().windows(folder)
    single, double = (plain(load(out)) for _ in range(2))
    # That of experts for float32 takes no float64.
    double.set_experts_implementation("eager")
    exact, wide = amax_of(single, windows), amax_of(double.double(), windows)
    assert set(map(place, scales)) == set(exact)
    assert set(account.added) == set(scales)
    for name, scale in scales.items():
        by_head = exact[place(name)]
        assert scale.dtype == torch.float32
        assert tuple(scale.shape) == ((len(by_head), 1, 1) if each == "fp8-head" else (1,))
        amax = by_head if each == "fp8-head" else by_head.amax().reshape(1)
        assert torch.equal(scale.flatten(), amax / 448), name
        # A chain of a few hundred float32 sums in each of two blocks.
        expected = wide[place(name)] if each == "fp8-head" else wide[place(name)].amax().reshape(1)
        torch.testing.assert_close(scale.flatten().double(), expected / 448, rtol=1e-4, atol=0)
    if kind == "qwen2":
        first = exact[0, "k_scale"]
        assert first[0] > 20 * first[1]


EVERYTHING = replace(Method.of("rotation+smoothquant+learned", pre_scale=False), learned=2)


@pytest.mark.parametrize("method", [EVERYTHING, replace(EVERYTHING, learned=0, distilled=2)])
def test_whatever_is_done_to_the_weights(make, quantized, method):
    folder = make("llama", torch.float32)
    out, _ = quantized(folder, method=method, name="W4A16_G32")
    found = amax_of(plain(load(out)), Windows().windows(folder))
    for key, scale in scales_of(out).items():
        torch.testing.assert_close(scale, found[place(key)].amax().reshape(1) / 448, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "rounding"), [("llama", "nearest"), ("qwen3-moe", "gptq")])
def test_in_one_pass_they_are_of_the_original(make, quantized, kind, rounding):
    folder = make(kind, torch.float32)
    before = amax_of(load(folder), Windows().windows(folder))
    for sequential in (True, False):
        out, _ = quantized(folder, name="W3A16_G32", method=Method(rounding=rounding, sequential=sequential))
        same = [torch.equal(s, before[place(n)].amax().reshape(1) / 448) for n, s in scales_of(out).items()]
        assert all(same) if not sequential else not any(same)


def test_inputs_are_rounded_as_the_model_rounds_them(make, quantized):
    folder = make("llama", torch.float32)
    out, _ = quantized(folder, name="W8A8_STATIC")
    found = amax_of(load(out), Windows().windows(folder))
    for name, scale in scales_of(out).items():
        # An input that lies between two codes may go to either, which differ by 1/127 of the range.
        torch.testing.assert_close(scale, found[place(name)].amax().reshape(1) / 448, rtol=0.01, atol=0)


def test_of_nothing_but_zeros_the_scale_is_1(make, change, quantized):
    def edit(state):
        state["model.layers.1.self_attn.v_proj.weight"].zero_()
        state["model.layers.0.self_attn.k_proj.weight"][32:] = 0

    folder = change(make("llama"), tensors=edit)
    out, _ = quantized(folder, kind="fp8-head")
    scales = scales_of(out)
    assert scales["model.layers.1.self_attn.v_scale"].flatten().tolist() == [1, 1]
    assert scales["model.layers.0.self_attn.k_scale"].flatten()[1] == 1
    assert scales["model.layers.0.self_attn.k_scale"].flatten()[0] < 0.1
    assert lint(out, ["vllm"]).findings == ()


def test_what_is_not_finite_is_told(make, change, quantized):
    folder = change(make("llama"), tensors=lambda s: s["model.layers.1.self_attn.v_proj.weight"].fill_(torch.inf))
    with pytest.raises(LowbitError, match=r"layers.1.self_attn put NaN or infinity into its key-value cache"):
        quantized(folder, keep=["*.layers.1.*"])


def test_names_are_those_of_the_checkpoint(make, change, quantized):
    def edit(state):
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)

    out, _ = quantized(change(make("gpt2"), tensors=edit))
    assert set(scales_of(out)) == {f"h.{k}.attn.{local}" for k in (0, 1) for local in SCALES}


def test_scales_of_shards_are_in_the_index(make, quantized):
    folder = make("llama", shard="200KB")
    out, _ = quantized(folder)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in out.glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert len(set(held.values())) > 2
    assert len(scales_of(out)) == 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize("sequential", [True, False])
def test_a_run_that_was_killed_ends_the_same(make, tmp_path, monkeypatch, sequential):
    folder, method = make("llama", num_hidden_layers=3), replace(NEAREST, sequential=sequential)
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(job_of(folder, method=method), whole)
    give, seen = calibrated.CacheWatch.give, []

    def once(self, block, write):
        # Before the second block is done, and after the first of its scales.
        seen.append(block)

        def written(name, scale):
            write(name, scale)
            if len(seen) == 2:
                raise Killed

        give(self, block, written)

    with monkeypatch.context() as patch:
        patch.setattr(calibrated.CacheWatch, "give", once)
        with pytest.raises(Killed):
            run(job_of(folder, method=method), out)
        with pytest.raises(LowbitError, match="unfinished output of another run"):
            run(job_of(folder, "fp8-head", method=method), out)
        run(job_of(folder, method=method), out)
    assert seen == [f"model.layers.{k}" for k in (0, 1, 1, 2)]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()


# Who has no such cache


def test_models_without_such_a_cache_are_refused(make):
    for kind, words in {
        "bert": "does not generate",
        "deepseek": "one latent vector of each token",
        "bart": "lies outside the blocks",
    }.items():
        with pytest.raises(RecipeError, match=words):
            job_of(make(kind))


def test_a_module_that_keeps_nothing_is_told(make, tmp_path, monkeypatch):
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward

    def without(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **more):
        del past_key_values
        return forward(self, hidden_states, position_embeddings, attention_mask, None, **more)

    monkeypatch.setattr(attention, "forward", without)
    with pytest.raises(LowbitError, match=r"layers.0.self_attn put nothing into its key-value cache"):
        run(job_of(make("llama")), tmp_path / "out")


def test_other_counts_of_heads_are_told(make, tmp_path, monkeypatch):
    job = job_of(make("llama"), "fp8-head")
    wrong = replace(job.kv_cache, attentions=tuple(replace(a, heads=3) for a in job.kv_cache.attentions))
    with pytest.raises(LowbitError, match=r"puts \(4, 2, 32, 32\) into its cache, and needed are .* 3 heads"):
        run(replace(job, kv_cache=wrong), tmp_path / "out")


def test_blocks_without_attention_are_named(make, quantized):
    job = job_of(make("qwen3-next"))
    assert job.kv_cache.without == ("model.layers.0",)
    assert str(job.kv_cache).endswith("each layer; none in model.layers.0")
    out, _ = quantized(make("qwen3-next"))
    assert set(scales_of(out)) == {f"model.layers.1.self_attn.{local}" for local in SCALES}


def test_without_data_or_a_place_they_are_refused(make, tmp_path):
    with pytest.raises(RecipeError, match=r"--kv-cache stores scales .* --calibrate FILE"):
        run(prepare(make(), scheme("W8A16_G32"), mode="even", kv_cache="fp8"), tmp_path / "out")
    with pytest.raises(RecipeError, match="nothing that reads lowbit's layout keeps"):
        job_of(make(), layout="lowbit")
    assert not list(tmp_path.iterdir())


# Who reads them


@pytest.mark.parametrize("each", ["fp8", "fp8-head"])
def test_compressed_tensors_has_a_place_for_every_scale(make, quantized, stock, each):
    folder = make("qwen3")
    out, _ = quantized(folder, kind=each)
    config = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    strategy = "attn_head" if each == "fp8-head" else "tensor"
    wanted = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, dynamic=False)
    assert config.kv_cache_scheme == wanted
    model = stock(folder)
    apply_quantization_config(model, config)
    places = {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith(SCALES)}
    assert places == {name: tuple(scale.shape) for name, scale in scales_of(out).items()}
    held = dict(stock(out).named_parameters())
    for name, scale in scales_of(out).items():
        assert torch.equal(held[name].float(), scale.to(held[name].dtype).float())


def test_lint_finds_nothing_in_what_is_written(make, quantized, tmp_path):
    for kind in ("llama", "qwen3-moe"):
        out, _ = quantized(make(kind), name="FP8_DYNAMIC")
        without, _ = quantized(make(kind), kind=None, name="FP8_DYNAMIC")
        assert lint(out).findings == lint(without).findings
        convert(out, tmp_path / kind, WRITERS["modelopt"])
        assert lint(tmp_path / kind, ["vllm"]).findings == ()
    heads, _ = quantized(make("llama"), kind="fp8-head", name="FP8_DYNAMIC")
    assert lint(heads, ["vllm"]).findings == ()
    (found,) = lint(heads, ["sglang"]).findings
    assert (found.severity, found.key) == ("warning", "quantization_config.kv_cache_scheme.strategy")


def test_lint_finds_scales_that_do_not_fit(make, change, quantized):
    out, _ = quantized(make("llama"))
    name = "model.layers.0.self_attn.v_scale"
    (found,) = lint(change(out, tensors=lambda s: s.pop(name)), ["vllm"]).findings
    assert (found.severity, found.key) == ("warning", name)
    (found,) = lint(change(out, tensors=lambda s: s.update({name: torch.ones(2, 1, 1)})), ["vllm"]).findings
    assert (found.severity, found.key) == ("error", name)
    by_head = change(out, config=lambda c: c["quantization_config"]["kv_cache_scheme"].update(strategy="attn_head"))
    (found,) = lint(by_head, ["vllm"]).findings
    assert found.severity == "error"
    assert "(heads, 1, 1)" in found.what


def test_modelopt_has_them_by_its_own_names_and_back(make, quantized, tmp_path):
    out, _ = quantized(make("llama"), name="NVFP4A16")
    made = convert(out, tmp_path / "modelopt", WRITERS["modelopt"])
    assert (made.inexact, made.left_behind) == ({}, ("report.html", "report.json"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "modelopt"))
    for k in (0, 1):
        for local, side in zip(SCALES, "kv", strict=True):
            scale = theirs[f"model.layers.{k}.self_attn.{side}_proj.{local}"]
            assert scale.shape == ()
            assert scale == ours[f"model.layers.{k}.self_attn.{local}"]
    assert not [name for name in theirs if name.endswith(SCALES) and "_proj." not in name]
    config = json.loads((tmp_path / "modelopt" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    legacy = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    assert legacy["quantization"]["kv_cache_quant_algo"] == "FP8"
    convert(tmp_path / "modelopt", tmp_path / "back", WRITERS["compressed-tensors"])
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (out / name).read_bytes()
    same = compare(out, tmp_path / "modelopt")
    assert len(same.differences) == len(load(out).state_dict()) - 1 + 4
    assert all(d.largest == 0 for d in same.differences)
    assert (same.only_a, same.only_b, same.caches_a, same.caches_b) == ((), (), (), ())


@pytest.mark.parametrize(
    ("quantization", "scheme"),
    [
        ({"kv_cache_scheme": "FP8"}, True),
        ({"kv_cache_quant_algo": "FP8"}, True),
        ({"quantization": {"kv_cache_quant_algo": "FP8"}}, True),
        ({"kv_cache_scheme": {"dynamic": False, "num_bits": 4, "type": "float"}}, False),
        ({"quantization": {"kv_cache_quant_algo": "NVFP4"}}, False),
        ({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float", "strategy": None}}, True),
        ({"kv_cache_scheme": {"dynamic": True, "num_bits": 8, "type": "float"}}, False),
        ({"quantization": {"kv_cache_quant_algo": None}}, None),
    ],
)
def test_forms_of_modelopts_config(make, tmp_path, quantization, scheme):
    found = layout_of(
        tmp_path, {"quantization_config": {"quant_method": "modelopt", **quantization}}, None
    ).cache_scheme
    if scheme is None:
        assert found is None
        return
    ours = WRITERS["compressed-tensors"].cache(found)
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    assert (None if ours is None else QuantizationArgs(**ours["kv_cache_scheme"])) == (args if scheme else None)


LEFT = {
    "gptq": "W8A16_G32",
    "awq": "W4A16_ASYM_G32",
    "lowbit": "W8A16_G32",
    "deepseek-fp8": "FP8_BLOCK",
    None: "W8A16_G32",
}


@pytest.mark.parametrize("layout", LEFT)
def test_layouts_without_a_place_say_what_they_leave(make, quantized, tmp_path, layout):
    out, _ = quantized(make("llama"), name=LEFT[layout])
    made = convert(out, tmp_path / "out", None if layout is None else WRITERS[layout])
    words = '4 scales and the scheme {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": true, '
    assert [left for left in made.left_behind if left.startswith(words)]
    assert not scales_of(tmp_path / "out")
    assert made.carried == len(load_file(make("llama") / "model.safetensors")) - made.weights
    ids = torch.randint(2, 96, (2, 16))
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, load(out)(ids).logits)


def test_llama_cpp_s_file_has_none(quantized, tmp_path):
    out, _ = quantized(Path(__file__).parents[3] / "integration_tests/models/lm-tiny")
    made = export(out, tmp_path / "gguf", pre="gpt-2")
    assert made.left_behind[-1].startswith("12 scales and the scheme")
    assert compare(out, tmp_path / "gguf" / "model.gguf").only_a == ()


def test_a_scale_a_head_has_no_place_in_modelopt(make, quantized, tmp_path):
    out, _ = quantized(make("llama"), kind="fp8-head", name="NVFP4A16")
    made = convert(out, tmp_path / "out", WRITERS["modelopt"])
    assert "attn_head" in made.left_behind[-1]
    assert not scales_of(tmp_path / "out")
    assert "kv_cache_scheme" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    convert(out, tmp_path / "same", WRITERS["compressed-tensors"])
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_loaded_model_keeps_its_cache_in_its_own_dtype(make, quantized, caplog):
    out, _ = quantized(make("llama"))
    without, _ = quantized(make("llama"), kind=None)
    with caplog.at_level(logging.WARNING):
        model = load(out)
    assert "here the cache stays in the model's dtype" in caplog.text
    ids = torch.randint(2, 96, (2, 16))
    assert torch.equal(model(ids).logits, load(without)(ids).logits)
    assert set(model.state_dict()) == set(load(without).state_dict())
    found = compare(make("llama"), out)
    assert (found.only_a, found.only_b, found.caches_a) == ((), (), ())
    assert set(found.caches_b) == set(scales_of(out))


def test_quantized_again_they_are_left_behind_or_made_anew(make, quantized):
    first, _ = quantized(make("llama"))
    out, account = quantized(first, kind=None, name="W4A16_G32")
    assert account.left_behind[-1].startswith("4 scales and the scheme")
    assert not scales_of(out)
    again, account = quantized(first, kind="fp8-head", name="W4A16_G32")
    assert len(account.added) == 4
    assert {tuple(scale.shape) for scale in scales_of(again).values()} == {(2, 1, 1)}


# The command


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    ids = torch.randint(96, (400,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return path


def test_the_command_plans_writes_and_reports(worded, text, tmp_path, capsys):
    folder, out = worded(), tmp_path / "out"
    line = ["quantize", str(folder), "--to", "W8A16_G32,W4A16_G32", "--bits-per-weight", "6", "--device", "cpu"]
    line += ["--calibrate", str(text), "--samples", "8", "--seq-len", "16", "--kv-cache", "fp8-head"]
    words = "fp8 (e4m3fn), a scale for the keys and one for the values of each head"
    assert main([*line, "--dry-run"]) == 0
    assert f"\n\nkey-value cache: {words}\n\ntakes at most" in capsys.readouterr().out
    assert main([*line, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["kv_cache"]
    assert main([*line, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "added, for the key-value cache: model.layers.{0..1}.self_attn.k_scale, " in said
    assert set(planned["scales"]) == set(scales_of(out))
    assert planned["blocks_without"] == []
    assert planned["scheme"] == json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert Report.from_json((out / "report.json").read_text()).kv_cache == words
    assert f"Key-value cache: <strong>{words}</strong>" in (out / "report.html").read_text()
    assert main(["eval", str(out), "--text", str(text), "--device", "cpu"]) == 0
    assert main(["diff", str(folder), str(out)]) == 0
    assert "for a key-value cache of few bits, in B alone: model.layers.{0..1}" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "model.layers.{0..1}.self_attn.k_scale" in capsys.readouterr().out
