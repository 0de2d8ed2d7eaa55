from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import Q, config, job_of, leftovers, tensors, tree
from safetensors.torch import load_file

import lowbit
from lowbit.errors import CheckpointError, RecipeError
from lowbit.numerics import choose_scale, decode, encode
from lowbit.tensor import QuantizedTensor
from lowbit_hf import writing as module
from lowbit_hf.difference import Weights
from lowbit_hf.layout import to_compressed
from lowbit_hf.loading import load
from lowbit_hf.quantize import NonFiniteWeightError, run
from lowbit_hf.schemes import scheme


def chosen(folder, **options):
    return {name: each.name for name, each in job_of(folder, **options).schemes.items()}


# What is written


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["W8A8", "W4A16_ASYM_G32", "MXFP4A16"])
def test_every_weight_is_rounded_whole(make, quantize, kind, dtype, name):
    folder, entry = make(kind, dtype), scheme(name)
    written, job = tensors(quantize(folder, name)), job_of(folder, name)
    plain, expected = tensors(folder), {}
    for tensor, values in plain.items():
        if tensor not in job.schemes:
            expected[tensor] = values
            continue
        x = values.T.contiguous() if kind == "gpt2" else values  # files of quantized models hold (N, K)
        fmt = entry.weight_format(dtype)
        scales = choose_scale(x, fmt)
        parts = to_compressed(entry, encode(x, fmt, scales), scales, tuple(x.shape))
        expected |= {f"{tensor.removesuffix('.weight')}.{local}": part for local, part in parts.items()}
    assert written.keys() == expected.keys()
    for tensor, values in expected.items():
        assert written[tensor].dtype == values.dtype
        assert torch.equal(written[tensor].view(torch.uint8), values.view(torch.uint8)), tensor


@pytest.mark.parametrize(
    "name",
    ["W8A8", "W3A16_G32", "W4A16_ASYM_G32", "FP8_BLOCK", "MXFP8", "MXFP6A16", "MXFP4A16", "NVFP4A16"],
)
def test_slices_of_any_size_give_the_same_bytes(make, quantize, monkeypatch, name):
    folder = make("llama", head_dim=34)  # q's 136 rows and k's 68 fill neither blocks of 128 nor words of 8 zero points
    keep = ["*.o_proj"]  # whose columns are as many
    monkeypatch.setattr(module, "_SLICE_BYTES", 1 << 30)
    whole = tree(quantize(folder, name, keep=keep))
    slices = []
    convert = module.Run.in_order

    def counted(self, work, pieces):
        pieces = list(pieces)
        slices.append(len(pieces))
        return convert(self, work, pieces)

    monkeypatch.setattr(module.Run, "in_order", counted)
    for size in (1, 5000, 70000):
        monkeypatch.setattr(module, "_SLICE_BYTES", size)
        assert tree(quantize(folder, name, keep=keep)) == whole
    assert max(slices) > 1


@pytest.mark.parametrize("mode", ["floor", "ceil", "even", "rceil"])
def test_scale_mode(make, quantize, mode):
    folder = make("llama")
    weights = Weights(quantize(folder, "MXFP4A16", mode=mode))
    x, fmt = tensors(folder)[f"{Q}.weight"], scheme("MXFP4A16").weight
    scales = choose_scale(x, fmt, mode=mode)
    assert torch.equal(
        weights.read(f"{Q}.weight").dequantize(), decode(encode(x, fmt, scales), fmt, scales, 128, x.dtype)
    )
    weights.close()


SIBLINGS = {
    "llama": [("self_attn", ["q_proj", "k_proj", "v_proj"]), ("mlp", ["gate_proj", "up_proj"])],
    "deepseek": [("self_attn", ["q_a_proj", "kv_a_proj_with_mqa"]), ("mlp", ["gate_proj", "up_proj"])],
    "mixtral": [(f"block_sparse_moe.experts.{expert}", ["w1", "w3"]) for expert in range(4)],
}


@pytest.mark.parametrize("kind", SIBLINGS)
def test_fused_projections_share_a_tensor_scale(make, change, quantize, kind):
    def spread(state):
        for number, name in enumerate(sorted(state)):
            state[name] *= 2.0 ** (number % 5)

    folder = change(make(kind), tensors=spread)
    plain, written = tensors(folder), tensors(quantize(folder, "NVFP4A16"))
    for layer in range(2):
        for parent, names in SIBLINGS[kind]:
            modules = [f"model.layers.{layer}.{parent}.{name}" for name in names]
            divisors = {float(written[f"{name}.weight_global_scale"]) for name in modules}
            largest = max(float(plain[f"{name}.weight"].abs().max()) for name in modules)
            # One divisor for all, the greatest power of two that keeps the largest block's scale within e4m3fn.
            (divisor,) = divisors
            assert largest / 6 * divisor <= 448 < largest / 6 * divisor * 2
    alone = {float(t) for name, t in written.items() if name.endswith("weight_global_scale")}
    assert len(alone) > 1


def test_siblings_of_another_scheme_share_nothing(make, change, quantize):
    def enlarge(state):
        state[f"{Q}.weight"] *= 64

    folder = change(make("llama"), tensors=enlarge)
    written = tensors(quantize(folder, "NVFP4A16", rules=[("*.q_proj", "W8A8")]))
    k, v = (float(written[f"model.layers.0.self_attn.{name}.weight_global_scale"]) for name in ("k_proj", "v_proj"))
    shared = tensors(quantize(folder, "NVFP4A16"))
    assert k == v > float(shared["model.layers.0.self_attn.k_proj.weight_global_scale"])


# What is chosen


def test_linears_and_experts_by_default(make):
    for kind, folder in {kind: make(kind) for kind in ("llama", "mixtral", "gpt2")}.items():
        names = {name for name in tensors(folder) if len(tensors(folder)[name].shape) == 2}
        kept = {name for name in names if any(part in name for part in ("embed", "wte", "wpe", ".gate."))}
        assert set(chosen(folder)) == names - kept, kind


def test_untied_head_is_kept_unless_the_user_says_so(make, quantize):
    folder = make("llama", tie_word_embeddings=False)
    assert "lm_head.weight" not in chosen(folder)
    assert chosen(folder, rules=[("lm_head", "W8A16_G32")])["lm_head.weight"] == "W8A16_G32"
    assert config(quantize(folder, "W4A16_G32"))["ignore"] == ["lm_head"]
    assert config(quantize(folder, "W4A16_G32", rules=[("lm_head", "W8A16_G32")]))["ignore"] == []


def test_every_unquantized_matrix_is_ignored_by_name(make, change, quantize):
    assert config(quantize(make("llama"), "W4A16_G32"))["ignore"] == ["lm_head"]  # tied: in the model, not in the file
    out = quantize(make("mixtral"), "W4A16_G32", keep=["*.experts.0.*"])
    gates = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2)]
    experts = [f"model.layers.{n}.block_sparse_moe.experts.0.{w}" for n in range(2) for w in ("w1", "w2", "w3")]
    assert config(out)["ignore"] == sorted(["lm_head", *gates, *experts])
    extra = {"mtp.fc.weight": torch.ones(8, 8), "mtp.norm.weight": torch.ones(8), "mtp.step": torch.tensor(3)}
    folder = change(make("llama"), tensors=lambda s: s.update(extra))
    assert config(quantize(folder, "W4A16_G32"))["ignore"] == ["lm_head", "mtp.fc"]


EXPERTS = [f"model.layers.1.block_sparse_moe.experts.{expert}" for expert in range(4)]
PATTERNS = {
    "a tensor": ("llama", f"{Q}.weight", [Q]),
    "a module": ("llama", Q, [Q]),
    "a glob on tensors": ("llama", "*.1.*.down_proj.weight", ["model.layers.1.mlp.down_proj"]),
    "a glob on modules": ("llama", "*.0.self_attn.[qk]_proj", [Q, Q.replace("q_proj", "k_proj")]),
    "a regular expression": ("llama", r"re:.*\.0\..*(k|v)_proj", [Q.replace("q_", "k_"), Q.replace("q_", "v_")]),
    "a model's name": (
        "mixtral",
        "model.layers.1.mlp.experts.gate_up_proj",
        [f"{e}.{w}" for e in EXPERTS for w in ("w1", "w3")],
    ),
    "a glob on a model's names": (
        "mixtral",
        "*.1.mlp.experts.*",
        [f"{e}.{w}" for e in EXPERTS for w in ("w1", "w2", "w3")],
    ),
    "a Conv1D": ("gpt2", "*.1.attn.c_attn", ["transformer.h.1.attn.c_attn"]),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns(make, quantize, tokens, case):
    kind, pattern, modules = PATTERNS[case]
    names = {f"{name}.weight" for name in modules}
    folder = make(kind)
    default = chosen(folder)
    assert chosen(folder, keep=[pattern]) == {n: s for n, s in default.items() if n not in names}
    mixed = default | dict.fromkeys(names, "W8A16_G64")
    assert chosen(folder, rules=[(pattern, "W8A16_G64")]) == mixed
    # The plan speaks of the pattern as it was given, and what is written reads back as it was planned.
    job = job_of(folder, rules=[(pattern, "W8A16_G64")])
    assert {row.name for row in job.plan.rows if row.rule == pattern} == names
    out = quantize(folder, "W4A16_G32", rules=[(pattern, "W8A16_G64")])
    assert config(out)["config_groups"]["group_1"]["targets"] == sorted(modules)
    weights = Weights(out)
    assert {name: str(weights.read(name).format) for name in mixed} == {
        name: str(scheme(each).weight) for name, each in mixed.items()
    }
    weights.close()
    if kind != "mixtral":  # whose experts of one stack have one format
        assert load(out)(tokens).logits.isfinite().all()


def test_rules_in_order_and_keep_before_them(make):
    folder = make("llama")
    found = chosen(
        folder, rules=[("*.0.mlp.down_proj", "W8A8"), ("*.mlp.down_proj", "MXFP4A16")], keep=["*.1.mlp.up_proj"]
    )
    assert found["model.layers.0.mlp.down_proj.weight"] == "W8A8"
    assert found["model.layers.1.mlp.down_proj.weight"] == "MXFP4A16"
    assert "model.layers.1.mlp.up_proj.weight" not in found


def test_exactly_named_embeddings_are_covered_by_the_config(make, quantize):
    rules = [("model.embed_tokens.weight", "W4A16_G32")]
    out = quantize(make("llama"), "W4A16_G32", rules=rules)
    assert config(out)["config_groups"]["group_0"]["targets"] == ["Linear", "model.embed_tokens"]


REFUSED = {
    "matches nothing": ({"rules": [("*.gate_prj", "W8A8")]}, r"'\*.gate_prj' matches no parameter; near it are"),
    "keeps nothing": ({"keep": ["model.layers.9"]}, "'model.layers.9' matches no parameter"),
    "matches no linear layer": ({"rules": [("*norm*", "W8A8")]}, "LlamaRMSNorm"),
    "names a vector": ({"rules": [("model.norm.weight", "W8A8")]}, "'model.norm.weight' is 1-D"),
    "never wins": ({"rules": [("*.mlp.*", "W8A8"), ("*.up_proj", "W4A16")]}, "'.*up_proj.*' never wins"),
    "keeps all": ({"keep": ["*"]}, "no rule quantizes anything|never wins"),
    "group does not divide k": ({"name": "W4A16_G96"}, r"has k=128.*not a multiple of block 96"),
    "coverage": ({"min_coverage": 0.99}, "coverage is .* below the 99.00% asked for"),
    "coverage of more than all": ({"min_coverage": 1.5}, "min_coverage is 1.5"),
    "malformed pattern": ({"keep": ["re:("]}, "malformed regular expression"),
    "empty pattern": ({"keep": [""]}, "match is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_do_not_fit(make, case):
    options, words = REFUSED[case]
    with pytest.raises(RecipeError, match=words):
        job_of(make("llama"), **options)


def test_an_error_speaks_of_the_pattern_as_given(make):
    pattern = "*.mlp.experts.gate_up_proj"
    with pytest.raises(RecipeError) as error:
        job_of(make("mixtral"), rules=[(pattern, "W4A16_G96")])
    assert pattern in str(error.value)
    assert "re:" not in str(error.value)


def test_coverage_that_is_met(make):
    assert job_of(make("llama"), min_coverage=0.9).plan.coverage > 0.9


def edited(name, tensor):
    return lambda state: state.update({name: tensor})


ODD = {
    "stacked": (edited(f"{Q}.weight", torch.ones(2, 128, 128)), RecipeError, r"of shape \(2, 128, 128\) cannot"),
    "no rows": (edited(f"{Q}.weight", torch.ones(0, 128)), RecipeError, r"of shape \(0, 128\) cannot"),
    "no columns": (edited(f"{Q}.weight", torch.ones(128, 0)), RecipeError, r"of shape \(128, 0\) cannot"),
    "codes": (edited(f"{Q}.weight", torch.ones(128, 128, dtype=torch.int8)), RecipeError, "is torch.int8"),
    "fp8": (edited(f"{Q}.weight", torch.ones(128, 128).to(torch.float8_e4m3fn)), RecipeError, "is torch.float8_e4m3fn"),
    "scales": (edited(f"{Q}.weight_scale", torch.ones(128, 1)), CheckpointError, "already has .*weight_scale"),
}


@pytest.mark.parametrize("case", ODD)
def test_tensors_that_cannot_be_quantized(make, change, case):
    edit, error, words = ODD[case]
    with pytest.raises(error, match=words):
        job_of(change(make("llama"), tensors=edit))


QUANTIZED = {
    "none of its tensors are": {"quant_method": "gptq"},
    "no object of config_groups": {"quant_method": "compressed-tensors"},
    "quantized by 'int4'; lowbit reads": "int4",
}


@pytest.mark.parametrize("words", QUANTIZED)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_configs_that_say_what_tensors_do_not(make, change, key, words):
    folder = change(make("llama"), config=lambda c: c.update({key: QUANTIZED[words]}))
    with pytest.raises(CheckpointError, match=words):
        job_of(folder)


def test_a_quantized_checkpoint_is_rounded_from_what_it_stands_for(make, quantize):
    once = quantize(make("llama"), "W8A8")
    again = quantize(once, "W4A16_G32")
    held = {name: p for name, p in load(once).named_parameters() if isinstance(p, QuantizedTensor)}
    found = dict(load(again).named_parameters())
    assert held
    for name, p in held.items():
        expected = lowbit.quantize(p.dequantize(torch.bfloat16), found[name].format)
        assert torch.equal(found[name].qdata, expected.qdata)
        assert torch.equal(found[name].scale, expected.scale)


def test_scales_need_a_dtype_that_holds_them(make, change):
    folder = change(make("llama"), config=lambda c: c.update(dtype="float64"))
    with pytest.raises(ValueError, match=r"float16, bfloat16 or float32, not torch.float64"):
        job_of(folder)
    assert job_of(folder, name="MXFP4A16").schemes  # has scales of its own


# NaN and infinity


@pytest.mark.parametrize(
    "name", ["W8A8", "W4A16_G32", "W4A16_ASYM_G32", "FP8_DYNAMIC", "MXFP8", "MXFP4A16", "NVFP4A16"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_weights_are_named(make, change, tmp_path, name, value):
    def spoil(state):
        state[f"{Q}.weight"][77, 5] = value

    folder = change(make("llama"), tensors=spoil)
    with pytest.raises(
        NonFiniteWeightError, match=f"'{Q}.weight' holds NaN or infinity in rows 0 to 128.*--allow-nonfinite"
    ):
        run(job_of(folder, name), tmp_path / "out")
    assert leftovers(tmp_path) == []
    job = job_of(folder, name, allow_nonfinite=True)
    assert job.nonfinite == (f"{Q}.weight",)
    run(job, tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert torch.equal(written[f"{Q}.weight"].view(torch.int16), tensors(folder)[f"{Q}.weight"].view(torch.int16))
    assert len(job.schemes) == 13
    assert Q in config(tmp_path / "out")["ignore"]


def test_nonfinite_where_nothing_is_rounded(make, change, quantize):
    def spoil(state):
        state["model.embed_tokens.weight"][3] = torch.nan
        state["model.norm.weight"][0] = torch.inf

    folder = change(make("llama"), tensors=spoil)
    for allow in (False, True):
        written = tensors(quantize(folder, "W4A16_G32", allow_nonfinite=allow))
        assert int(written["model.embed_tokens.weight"].isnan().sum()) == 128


def test_keeping_what_is_nonfinite_anyway(make, change):
    def spoil(state):
        state[f"{Q}.weight"][0, 0] = torch.nan

    folder = change(make("llama"), tensors=spoil)
    assert f"{Q}.weight" not in chosen(folder, keep=[Q], allow_nonfinite=True)


def test_odd_dtypes_are_carried(make, change, quantize):
    extra = {
        "mtp.a": torch.randn(4, 4).to(torch.float8_e5m2),
        "mtp.b": torch.arange(4).view(2, 2),
        "mtp.c": torch.tensor([[True]]),
        "mtp.d": torch.tensor(2.5),
        "mtp.e": torch.zeros(0, 3),
    }
    folder = change(make("llama"), tensors=lambda s: s.update(extra))
    written = tensors(quantize(folder, "W4A16_G32", allow_nonfinite=True))
    for name, values in extra.items():
        assert written[name].dtype == values.dtype
        assert written[name].shape == values.shape
        assert torch.equal(written[name].to(torch.float64), values.to(torch.float64))


# The account and the rest of the folder


def test_nothing_is_lost(make, change, tmp_path):
    extra = {"mtp.fc.weight": torch.ones(8, 8)}
    folder = change(make("llama"), tensors=lambda s: s.update(extra))
    others = {"tokenizer.json": b"{}", "LICENSE": b"mine", "a/b c.txt": b"\xff", "chat_template.jinja": "ü".encode()}
    weights = {
        "pytorch_model.bin": b"pickle",
        "model.gguf": b"GGUF",
        "onnx/model.onnx": b"o",
        "pytorch_model.bin.index.json": b"{}",
    }
    for name, content in (others | weights | {".git/config": b"[core]"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    account = run(job_of(folder), tmp_path / "out")
    assert account.quantized == 14
    assert account.unowned == ("mtp.fc.weight",)
    assert set(account.left_behind) == set(weights)
    assert set(account.files) == {*others, "generation_config.json"}
    assert set(tree(tmp_path / "out")) == {*account.files, "config.json", "model.safetensors"}
    assert others.items() <= tree(tmp_path / "out").items()
    assert set(account.tensors) == set(tensors(folder))
    became = [name for names in account.tensors.values() for name in names]
    assert len(became) == len(set(became))
    assert set(became) == set(tensors(tmp_path / "out"))
    assert account.tensors[f"{Q}.weight"] == tuple(f"{Q}.weight_{part}" for part in ("packed", "scale", "shape"))
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert {**before, "quantization_config": after["quantization_config"]} == after


def test_a_lost_tensor_is_noticed(make, tmp_path, monkeypatch):
    job = job_of(make("llama"))
    files = module.Job.files.fget

    def forgetful(self):
        return {name: [t for t in planned if t[0] != "model.norm.weight"] for name, planned in files(self).items()}

    monkeypatch.setattr(module.Job, "files", property(forgetful))
    monkeypatch.setattr(
        module.ShardWriter,
        "write",
        lambda self, name, *rest, w=module.ShardWriter.write: name in self.entries and w(self, name, *rest),
    )
    with pytest.raises(CheckpointError, match=r"lacks \['model.norm.weight'\] \(1\)"):
        run(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_keep_their_names_and_the_index_is_true(make, tmp_path):
    folder = make("llama", shard="300KB")
    run(job_of(folder), tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(shards) == {path.name for path in folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, held in shards.items() for name in held}
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in shards.values() for t in held.values())


LINKS = {
    "outside": "secret.txt",
    "nowhere": "nothing.txt",
    "a folder": "folder",
    "a folder outside": "..",
}


@pytest.mark.parametrize("case", LINKS)
@pytest.mark.parametrize("name", ["notes.txt", "deep/er/notes.txt", "tokenizer.json", "weights.bin"])
def test_links_out_of_the_folder(make, change, tmp_path, case, name):
    (tmp_path / "secret.txt").write_text("secret")
    folder = change(make("llama"))
    (folder / "folder").mkdir()
    target = {"folder": folder / "folder", "..": tmp_path}.get(LINKS[case], tmp_path / LINKS[case])
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name} is a link to"):
        run(job_of(folder), tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_links_within_the_folder_and_to_a_hub_cache(make, tmp_path):
    cache = tmp_path / "models--me--small"
    snapshot, blobs = cache / "snapshots/0123", cache / "blobs"
    (snapshot / "deep").mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(make("llama").iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    (blobs / "note").write_text("hello")
    (snapshot / "deep/note.txt").symlink_to("../../../blobs/note")
    (snapshot / "again.txt").symlink_to("deep/note.txt")
    run(job_of(snapshot), tmp_path / "out")
    written = tree(tmp_path / "out")
    assert written["deep/note.txt"] == written["again.txt"] == b"hello"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert tensors(tmp_path / "out").keys() == tensors(make("llama")).keys() - job_of(make("llama")).schemes.keys() | {
        name for names in run(job_of(make("llama")), tmp_path / "again").tensors.values() for name in names
    }
