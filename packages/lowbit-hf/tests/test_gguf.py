"""GGUF files, against the `gguf` package: what it writes is read, what is written it reads, to the bit."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from gguf.quants import dequantize
from gguf_files import KINDS, NAMES, SPECIAL, TOKENS, heads_of, package_name, restored, write_foreign
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from lowbit.errors import CheckpointError
from lowbit.tensor import QuantizedTensor
from lowbit_hf import load
from lowbit_hf.commands.converting import export as command
from lowbit_hf.convert import convert
from lowbit_hf.difference import Weights, compare
from lowbit_hf.evaluate import load_tokenizer
from lowbit_hf.gguf.architecture import ARCHITECTURES
from lowbit_hf.gguf.export import export
from lowbit_hf.gguf.rope import factors_of
from lowbit_hf.gguf.source import open_checkpoint
from lowbit_hf.gguf.tokens import _PRE
from lowbit_hf.hub import find_model
from lowbit_hf.layouts import WRITERS, layout_of
from lowbit_hf.lint import lint
from lowbit_hf.loading import read_tensors
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme
from lowbit_hf.skeleton import read_config

TINY = Path(__file__).parents[3] / "integration_tests/models/lm-tiny"
SCHEMES = {"Q4_0": "W4A16_G32", "Q8_0": "W8A16_G32"}


def tensors_of(path):
    """Type, shape and bytes of each tensor, as the package's reader has them."""
    return {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def fields_of(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if "GGUF." not in key}


def plain(tensor):
    return tensor.dequantize(torch.float32) if isinstance(tensor, QuantizedTensor) else tensor.float()


def held(path):
    """Tensors of a checkpoint by name."""
    with open_checkpoint(path) as checkpoint:
        return read_tensors(checkpoint, layout_of(path, read_config(path), None))


FOREIGN = [(kind, seed, quantized) for kind in NAMES for seed, quantized in enumerate([*KINDS, *KINDS])]


@pytest.mark.parametrize(("kind", "seed", "quantized"), FOREIGN)
def test_files_of_the_package_go_in_and_out(tmp_path, kind, seed, quantized):
    file, ct, again = tmp_path / "foreign.gguf", tmp_path / "ct", tmp_path / "again"
    seed += 10 * list(NAMES).index(kind)
    values = write_foreign(file, kind, seed, quantized)
    found = held(file)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(plain(found[name]), torch.from_numpy(value)), name
    assert sum(isinstance(t, QuantizedTensor) for t in found.values()) == sum(
        name.endswith(("_proj.weight", *(f".w{i}.weight" for i in (1, 2, 3)))) for name in values
    )
    made = convert(file, ct, WRITERS["compressed-tensors"])
    assert made.inexact == {}
    assert made.left_behind == ()
    assert export(ct, again).inexact == {}
    assert tensors_of(again / "model.gguf") == tensors_of(file)
    before, after = fields_of(file), fields_of(again / "model.gguf")
    assert {key: after[key] for key in before} == before


def test_a_tokenizer_comes_back_whole(tiny):
    folder, _ = tiny("Q4_0")
    text = "It costs 12345 dollars, isn't that a lot?\n\n  Yes."
    found = load_tokenizer(folder / "out" / "model.gguf")
    assert found(text).input_ids == load_tokenizer(TINY)(text).input_ids


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny("Q4_0")`: lm-tiny quantized, and its file."""
    made = {}

    def of(quantized):
        if quantized not in made:
            folder = tmp_path_factory.mktemp("tiny")
            run(prepare(TINY, scheme(SCHEMES[quantized]), mode="even"), folder / "ct")
            made[quantized] = folder, export(folder / "ct", folder / "out", pre="gpt-2")
        return made[quantized]

    return of


@pytest.mark.parametrize("quantized", KINDS)
def test_the_package_reads_what_is_written(tiny, quantized):
    folder, made = tiny(quantized)
    config = transformers.AutoConfig.from_pretrained(TINY)
    assert (made.weights, made.inexact, made.files[-2:]) == (42, {}, ("tokenizer.json", "tokenizer_config.json"))
    read = {t.name: t for t in gguf.GGUFReader(folder / "out" / "model.gguf").tensors}
    ours = held(folder / "ct")
    assert len(read) == len(ours)
    for name, tensor in ours.items():
        theirs = read[package_name("llama", name, config)[0]]
        heads = heads_of(name, config)
        values = dequantize(theirs.data, theirs.tensor_type)
        assert torch.equal(torch.from_numpy(restored(values, heads) if heads else values.copy()), plain(tensor)), name
        kind = KINDS[quantized] if isinstance(tensor, QuantizedTensor) else None
        assert theirs.tensor_type == (kind or (0 if tensor.dim() == 1 else gguf.GGMLQuantizationType.BF16))


def test_metadata_is_what_llama_cpp_asks_for(tiny):
    folder, _ = tiny("Q4_0")
    found = fields_of(folder / "out" / "model.gguf")
    raw = json.loads((TINY / "tokenizer.json").read_text())
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 2,
        "general.quantized_by": f"lowbit-hf {version('lowbit-hf')}",
        "llama.block_count": 6,
        "llama.context_length": 512,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 768,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 4096,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.token_type": [3, 3] + [1] * 4094,
        "tokenizer.huggingface.json": (TINY / "tokenizer.json").read_text(),
    }
    assert {key: found[key] for key in wanted} == wanted
    assert {token: i for i, token in enumerate(found["tokenizer.ggml.tokens"])} == raw["model"]["vocab"]
    known = {value for space in vars(gguf.Keys).values() if isinstance(space, type) for value in vars(space).values()}
    assert {key.replace("llama.", "{arch}.") for key in found} <= known


@pytest.mark.parametrize("quantized", KINDS)
def test_transformers_computes_the_same(tiny, quantized):
    """The same float32 weights give the same float32 logits, but for the order in which sums are taken."""
    folder, _ = tiny(quantized)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "out", gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ours = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ours.load_state_dict({name: plain(tensor) for name, tensor in held(folder / "ct").items()}, strict=False)
    ids = torch.randint(2, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = theirs(ids).logits, ours(ids).logits
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


# Small models.


@pytest.fixture
def spoken(make, tmp_path):
    """`spoken(kind, "W4A16_G32", **config)`: a quantized random model with a byte-level tokenizer."""

    def of(kind="llama", name="W4A16_G32", *, pattern=_PRE["qwen2"][0], dtype=torch.bfloat16, **changes):
        out = tmp_path / "spoken"
        run(prepare(make(kind, dtype, **changes), scheme(name), mode="even"), out)
        words = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b")]))
        words.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        words.add_special_tokens(SPECIAL)
        words.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
        words.save(str(out / "tokenizer.json"))
        return out

    return of


def test_a_file_is_read_like_any_checkpoint(spoken, tmp_path):
    folder, out = spoken(), tmp_path / "out"
    export(folder, out)
    file = out / "model.gguf"
    assert find_model(str(out)) == find_model(str(file)) == file
    ids = torch.arange(2, 34).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(load(out)(ids).logits, load(folder)(ids).logits)
    found = compare(folder, file)
    assert (found.only_a, found.only_b) == ((), ())
    assert all(each.largest == 0 for each in found.differences)
    weights = Weights(file)
    rows = {row["name"]: row for row in weights.describe()}
    weights.close()
    assert rows["model.layers.0.mlp.up_proj.weight"]["stored"] == "int4:1x32:float16"
    assert rows["model.norm.weight"]["stored"] == "float32"
    convert(file, tmp_path / "plain", None)
    dense = {name: plain(tensor).bfloat16() for name, tensor in held(folder).items()}
    assert all(torch.equal(tensor.bfloat16(), dense[name]) for name, tensor in held(tmp_path / "plain").items())
    run(prepare(file, scheme("W8A8"), mode="even"), tmp_path / "w8")
    for path in (file, tmp_path / "plain", tmp_path / "w8"):
        assert load_tokenizer(path)("ab b!").input_ids == load_tokenizer(folder)("ab b!").input_ids
    load(tmp_path / "w8")


def test_a_killed_run_goes_on(spoken, tmp_path):
    folder, out = spoken(), tmp_path / "out"
    export(folder, tmp_path / "whole")

    for steps in (5, 12):
        left = iter(range(steps))

        def kill(_, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(folder, out, advance=kill)
        assert not out.exists()
    export(folder, out)
    assert (out / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "spoken", "whole"}
    with pytest.raises(CheckpointError, match="pass --overwrite"):
        export(folder, out)
    export(folder, out, overwrite=True)


def test_experts_in_transformers(spoken, tokens, tmp_path):
    """Stacks of experts hold what each did; routers are as wide as llama.cpp computes with them."""
    folder, out = spoken("qwen3-moe", norm_topk_prob=True), tmp_path / "out"
    export(folder, out)
    config = transformers.Qwen3MoeConfig(**{**_without_quantization(folder), "dtype": "float32"})
    # It does not take the size of an expert from the metadata.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", config=config).eval()
    ours = transformers.Qwen3MoeForCausalLM.from_pretrained(
        None, config=config, state_dict={name: plain(tensor) for name, tensor in held(folder).items()}
    ).eval()
    with torch.inference_mode():
        a, b = theirs(tokens).logits, ours(tokens).logits
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
    kinds = {name: kind for name, (kind, _, _) in tensors_of(out / "model.gguf").items()}
    assert {kind for name, kind in kinds.items() if "gate_inp" in name or "norm" in name} == {0}
    assert kinds["token_embd.weight"] == gguf.GGMLQuantizationType.BF16
    found = transformers.AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    assert found("ab b!").input_ids == load_tokenizer(folder)("ab b!").input_ids


def _without_quantization(folder):
    return {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "quantization_config"}


REFUSED = {
    "groups of 128": ({"name": "W4A16"}, "int4:1x128.*W8A16_G32 as Q8_0, W4A16_G32 as Q4_0"),
    "rounded inputs": ({"name": "W4A8_G32"}, "inputs rounded by dynamic:int8"),
    "floats": ({"name": "MXFP4A16"}, "e2m1:1x32"),
    "another architecture": ({"kind": "bert", "tie_word_embeddings": False}, "model_type 'bert' cannot be written"),
    "a sum of experts that is not 1": ({"kind": "qwen3-moe"}, "norm_topk_prob is False"),
    "a window": ({"kind": "mixtral", "sliding_window": 16}, "sliding_window is 16"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "other positions": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type 'dynamic'",
    ),
    "another pattern": ({"pattern": r"\w+"}, "Name the nearest by --pre NAME"),
    "too small a vocabulary": ({"vocab_size": 64}, "is number 64, and the embeddings hold 64|embeddings hold 64"),
    "a bias without place": ({"kind": "qwen3", "attention_bias": True}, "bias' has no place in llama.cpp's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_first(spoken, tmp_path, case):
    options, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words):
        export(spoken(**options), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["spoken"]


def test_factors_have_no_place(spoken, tmp_path):
    convert(spoken(), tmp_path / "own", WRITERS["lowbit"])
    weight = "model.layers.1.mlp.up_proj.weight"
    state = load_file(tmp_path / "own/model.safetensors")
    state[f"{weight}:pre_scale"] = torch.full((128,), 2.0)
    save_file(state, tmp_path / "own/model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{weight}' .* only lowbit's layout has a place for"):
        export(tmp_path / "own", tmp_path / "out")


def test_tokenizers_that_cannot_be_told(worded, spoken, quantize, tmp_path):
    with pytest.raises(CheckpointError, match="its model is WordLevel; lowbit writes byte-level BPE"):
        export(quantize(worded(), "W4A16_G32"), tmp_path / "out")
    folder = spoken()
    path = folder / "tokenizer.json"
    kept = path.read_text()
    edits = {
        "byte fallback": lambda raw: raw["model"].update(byte_fallback=True),
        "normalizer is Lowercase": lambda raw: raw.update(normalizer={"type": "Lowercase"}),
        "is lstrip": lambda raw: raw["added_tokens"][0].update(lstrip=True),
        "puts the tokens": lambda raw: raw["post_processor"].update(single=raw["post_processor"]["single"][:1] * 2),
        "is not as tokenizers": lambda raw: raw["pre_tokenizer"].update(pretokenizers=[{}]),
    }
    for words, edit in edits.items():
        raw = json.loads(kept)
        edit(raw)
        path.write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=f"{words}|cannot be read"):
            export(folder, tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match="a GGUF file holds the tokenizer too"):
        export(folder, tmp_path / "out")


def test_plain_weights_are_refused(spoken, tmp_path):
    folder = spoken()
    convert(folder, tmp_path / "plain", None)
    with pytest.raises(CheckpointError, match="holds no quantized weights; make some"):
        export(tmp_path / "plain", tmp_path / "out")


def test_a_file_is_neither_written_again_nor_linted(spoken, tmp_path):
    export(spoken(), tmp_path / "out")
    file = tmp_path / "out" / "model.gguf"
    with pytest.raises(CheckpointError, match="is a GGUF file already"):
        export(file, tmp_path / "again")
    with pytest.raises(CheckpointError, match="lowbit export .*model.gguf --as compressed-tensors -o OUT"):
        lint(file)
    with pytest.raises(CheckpointError, match="lie in one another"):
        convert(file, tmp_path / "out", WRITERS["compressed-tensors"])


def test_the_command_takes_a_folder(capsys):
    for arguments, words in (
        (["--as", "gguf", "-o", "x.gguf"], "name a folder"),
        (["--as", "awq", "-o", "x"], "--pre"),
    ):
        assert command(["nowhere", *arguments, "--pre", "gpt-2"]) == 2
        assert words in capsys.readouterr().err


def test_scales_that_float16_does_not_hold(spoken, tmp_path):
    folder = spoken(dtype=torch.float32)
    made = export(folder, tmp_path / "out")
    assert len(made.inexact) == 14
    # Half of the last place of float16, for scales in its normal range.
    assert 0 < max(made.inexact.values()) <= 2**-11
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][3, 1] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match="up_proj.weight' cannot be written as GGUF: its largest scale is 1e\\+06"
    ):
        export(folder, tmp_path / "beyond")
    assert not (tmp_path / "beyond").exists()


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_positions_come_back(spoken, tmp_path, kind):
    folder = spoken(rope_parameters=ROPES[kind])
    export(folder, tmp_path / "out")
    assert read_config(tmp_path / "out" / "model.gguf")["rope_parameters"] == ROPES[kind]
    ids = torch.arange(2, 30).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "out")(ids).logits, load(folder)(ids).logits)


def test_factors_are_transformers_own():
    rope = ROPES["llama3"]
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain_ = 1.0 / (rope["rope_theta"] ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    torch.testing.assert_close(plain_ / factors_of(rope, 128), rotary.inv_freq, rtol=1e-6, atol=0)


def test_names_are_the_packages():
    """Both tables of names, of modules and of ways to cut text, hold what the package knows."""
    theirs = {name.split(".")[-1] for name in gguf.TENSOR_NAMES.values()}
    for each in ARCHITECTURES:
        assert {*each.modules.values(), *each.experts.values()} <= theirs
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == each.name)
        own = {gguf.TENSOR_NAMES[tensor].split(".")[-1] for tensor in gguf.MODEL_TENSORS[arch]}
        assert {*each.modules.values(), *each.experts.values()} <= own
