"""GGUF files, against the `gguf` package: what it writes is read, what is written it reads, to the bit."""

from __future__ import annotations

import json
import random
import struct
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize
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
from lowbit_hf.gguf.header import parse
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
KINDS = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
SCHEMES = {"Q4_0": "W4A16_G32", "Q8_0": "W8A16_G32"}
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


# Files that are damaged, or made to harm.


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small file, and its bytes."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_foreign(path, "mixtral", 3, "Q4_0")
    return path.read_bytes()


def changed(raw, old, new, count=1):
    assert old in raw
    return raw.replace(old, new, count)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


DAMAGE = {
    "nothing": (lambda raw: raw[:0], "truncated or corrupt"),
    "another magic": (lambda raw: b"GGML" + raw[4:], "no GGUF file"),
    "a pointer": (lambda raw: b"version https://git-lfs" + raw, "git lfs pull"),
    "big-endian": (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "big-endian"),
    "a newer version": (lambda raw: raw[:4] + b"\x09\0\0\0" + raw[8:], "GGUF 9"),
    "many tensors": (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "has 0 dims"),
    "much metadata": (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "corrupt"),
    "a long key": (lambda raw: raw[:24] + b"\xff" * 8 + raw[32:], "truncated or corrupt"),
    "half of it": (lambda raw: raw[: len(raw) // 2], "truncated"),
    "a byte less": (lambda raw: raw[:-64], "truncated"),
    "no UTF-8": (lambda raw: changed(raw, b"general.architecture", b"general.\xff\xferchitecture"), "corrupt|UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(small, tmp_path, case):
    damage, words = DAMAGE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(small))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path).close()


def test_any_byte_of_a_header_may_be_wrong(small, tmp_path):
    """Nothing but a CheckpointError comes of it, and nothing is read from outside the file."""
    path, draw = tmp_path / "model.gguf", random.Random(0)
    with (tmp_path / "whole.gguf").open("wb") as stream:
        stream.write(small)
    with (tmp_path / "whole.gguf").open("rb") as stream:
        end = min(each.offset for each in parse(stream, path, len(small)).tensors.values())
    refused = 0
    for _ in range(400):
        raw = bytearray(small)
        start = draw.randrange(end)
        for i in range(start, min(start + draw.choice([1, 1, 8]), end)):
            raw[i] = draw.choice([0, 1, 0x7F, 0xFF, draw.randrange(256)])
        path.write_bytes(raw)
        try:
            with open_checkpoint(path) as checkpoint:
                for entry in checkpoint.entries.values():
                    assert entry.offset + entry.nbytes <= len(small)
                for name in list(checkpoint.entries)[:3]:
                    checkpoint.read(checkpoint.entries[name])
            with suppress(CheckpointError):
                load_tokenizer(path)
        except CheckpointError:
            refused += 1
    assert refused > 40


def write_llama(path, tensors, **metadata):
    """A file of a llama of one block with other tensors or metadata."""
    writer = gguf.GGUFWriter(path, str(metadata.pop("architecture", "llama")))
    sizes = {"block_count": 1, "context_length": 8, "embedding_length": 32, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 1, "attention.head_count_kv": 1}
    for key, value in (sizes | metadata).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key if key.startswith(("general", "split")) else f"llama.{key}", value)
    embedding = {"token_embd.weight": (np.zeros((4, 32), np.float16), None)}
    for name, (data, kind) in (embedding | tensors).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


ODD = {
    "another architecture": ({}, {"architecture": "gemma3"}, "'gemma3', which lowbit does not read"),
    "unknown metadata": ({}, {"logit_scale": 3}, "llama.logit_scale is metadata that lowbit does not know"),
    "a size in words": ({}, {"context_length": "many"}, "'context_length' is 'many'; needed is a count"),
    "no heads": ({}, {"attention.head_count": 0}, "needed is a count"),
    "two sizes of heads": ({}, {"attention.value_length": 16}, "heads of one size"),
    "one of many": ({}, {"split.count": 3}, "join them first"),
    "a tensor without place": ({"blk.0.ssm_a": (np.zeros((4,), np.float32), None)}, {}, "ssm_a.*has no place"),
    "a flat matrix": ({"blk.0.attn_q.weight": (np.zeros((32,), np.float32), None)}, {}, "has no place"),
    "odd heads": ({"blk.0.attn_q.weight": (np.zeros((31, 32), np.float32), None)}, {}, "no multiple of 2 x 1 heads"),
    "factors of nobody": (
        {"rope_freqs.weight": (np.full((16,), 3.0, np.float32), None)},
        {},
        "factors of none of Llama 3",
    ),
    "factors in half": ({"rope_freqs.weight": (np.ones((16,), np.float16), None)}, {}, "needed are a head's factors"),
    "another scaling": ({}, {"rope.scaling.type": "longrope"}, "'longrope'; lowbit reads none, linear and yarn"),
    "another type": (
        {"blk.0.ffn_up.weight": (np.zeros((2, 210), np.uint8), gguf.GGMLQuantizationType.Q6_K)},
        {},
        "is Q6_K; lowbit reads F32, F16, Q4_0, Q8_0, BF16",
    ),
    "quantized biases": (
        {"blk.0.attn_q.bias": (np.zeros((34,), np.uint8), gguf.GGMLQuantizationType.Q8_0)},
        {},
        "lowbit reads matrices of it",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_files_that_lowbit_cannot_read_are_refused(tmp_path, case):
    tensors, metadata, words = ODD[case]
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(write_llama(tmp_path / "model.gguf", tensors, **metadata)).close()


def test_experts_that_are_too_few(tmp_path):
    file = tmp_path / "model.gguf"
    stack = {"blk.0.ffn_up_exps.weight": (np.zeros((2, 32, 32), np.float32), None)}
    with pytest.raises(CheckpointError, match="holds 2 experts; the metadata say 4"):
        open_checkpoint(write_llama(file, stack, expert_count=4, expert_used_count=2))


def test_tensors_that_overlap(small, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small)
    names = [t.name for t in gguf.GGUFReader(path).tensors]
    where = small.index(text(names[1])) + len(text(names[1]))
    dims = struct.unpack_from("<I", small, where)[0]
    raw = bytearray(small)
    struct.pack_into("<Q", raw, where + 8 + 8 * dims, 0)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="overlap; the header is corrupt"):
        open_checkpoint(path)
    struct.pack_into("<Q", raw, where + 8 + 8 * dims, 1 << 63)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(path)


def test_which_file_of_a_folder(small, tmp_path):
    (tmp_path / "a.gguf").write_bytes(small)
    assert find_model(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(small)
    with pytest.raises(CheckpointError, match="holds 2 GGUF files; name one"):
        find_model(str(tmp_path))
    inner, outer = tmp_path / "inner", tmp_path / "b.gguf"
    inner.mkdir()
    (inner / "model.gguf").symlink_to(outer)
    with pytest.raises(CheckpointError, match="outside the folder"):
        find_model(str(inner))
    (tmp_path / "pipe.gguf").mkdir()
    with pytest.raises(CheckpointError, match="holds no"):
        open_checkpoint(tmp_path / "pipe.gguf")


def test_tokenizers_of_files(tmp_path):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    add_tokens(writer, "llama-bpe")
    writer.add_chat_template("{{ messages }}")
    finish(writer)
    found = load_tokenizer(file)
    assert found("ab b").input_ids == [0, TOKENS.index("ab"), TOKENS.index("Ġ"), TOKENS.index("b")]
    assert (found.bos_token, found.eos_token) == tuple(SPECIAL)
    raw = file.read_bytes()
    file.write_bytes(changed(raw, b"llama-bpe", b"tekken-xx"))
    with pytest.raises(CheckpointError, match="'gpt2' cut by 'tekken-xx'; lowbit reads"):
        load_tokenizer(file)
    file.write_bytes(changed(raw, b"tokenizer.ggml.merges", b"tokenizer.ggml.murges"))
    with pytest.raises(CheckpointError, match="merges' is no list of strings"):
        load_tokenizer(file)
    write_llama(file, {})
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(file)
