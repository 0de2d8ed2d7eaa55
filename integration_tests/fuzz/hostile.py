"""Small checkpoints of every layout, what an attacker makes of their files, and everything that reads them.

`test_fuzz.py` draws from here by hypothesis, `fuzz.py` by atheris.
"""

from __future__ import annotations

import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from foreign import mxfp4_experts
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lowbit_hf
from lowbit import command
from lowbit.errors import LowbitError
from lowbit.header import as_object
from lowbit.shards import INDEX_NAME, Checkpoint
from lowbit_hf.convert import Source, convert
from lowbit_hf.evaluate import load_tokenizer
from lowbit_hf.gguf.export import export
from lowbit_hf.gguf.source import config_in, open_checkpoint, read_metadata
from lowbit_hf.gguf.tokens import files_of
from lowbit_hf.hub import find_model
from lowbit_hf.layouts import WRITERS, layout_of
from lowbit_hf.lint import lint
from lowbit_hf.loading import modules_of, read_weight
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme
from lowbit_hf.skeleton import read_config

SIZES = {"hidden_size": 128, "num_hidden_layers": 1, "head_dim": 64, "num_attention_heads": 2, "vocab_size": 16}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": True}
# What each layout is converted from.
LAYOUTS = {
    "gptq": "W4A16_G32",
    "gptq_v2": "W4A16_G32",
    "awq": "W4A16_G32",
    "modelopt": "NVFP4A16",
    "deepseek-fp8": "FP8_BLOCK",
    "lowbit": "W4A16_G32",
}
# By `quant_method`.
_OF_METHOD = {
    "gptq": "gptq",
    "awq": "awq",
    "modelopt": "modelopt",
    "fp8": "deepseek-fp8",
    "lowbit": "lowbit",
    "mxfp4": "mxfp4",
}
# Stands in code that comes with a checkpoint.
EVIL = "picked_by_the_checkpoint"
# What stands in a JSON text in place of a string.
RAW = {
    "@huge": "1e400",
    "@digits": "9" * 5000,
    "@deep": "[" * 70 + "]" * 70,
    "@deeper": '{"a":' * 20_000 + "1" + "}" * 20_000,
}
# Values that a reader may not expect, wherever they stand.
ODD = [None, True, False, 0, -1, 1, 2, 3, 4, 16, 1.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**9]
ODD += [
    10**12,
    -(10**12),
    10**30,
    10**400,
    "",
    "a",
    "4",
    "\ud800",
    "x\0",
    "é" * 40,
    "9" * 5000,
    "a" * 5000,
    "__class__",
]
ODD += [
    "re:(a|aa)+$",
    "re:(.*)*.*x$",
    "re:(",
    "re:" + "(" * 2000,
    "re:a{99999999999}",
    "re:.*",
    "re:",
    "*",
    "[",
    "..",
    "/",
]
ODD += [
    "../../secret",
    "/etc/passwd",
    "model.safetensors",
    "int8",
    "float8_e4m3fn",
    "load",
    "Linear",
    "org/kernel",
    *RAW,
]
ODD += [[], [[]], [None], [{}], ["Linear"], ["a", 1], [128, 128], [0, 0], {}, {"a": 1}, {"": {}}, {"__float__": "NaN"}]
# Keys that transformers knows, or might.
NAMES = ["auto_map", "configuration_files", "attn_implementation", "_attn_implementation_internal", "custom_generate"]
NAMES += [
    "to_dict",
    "get_text_config",
    "dtype",
    "torch_dtype",
    "num_labels",
    "id2label",
    "rope_scaling",
    "per_layer_config",
]
NAMES += [
    "text_config",
    "layer_types",
    "compression_config",
    "quantization_config",
    "architectures",
    "is_encoder_decoder",
]
NAMES += ["__class__", "self", "\ud800", "", "dynamic", "kv_cache_scheme", "sparsity_config", "base_model_tp_plan"]
_ROOTS: list[str] = []


def made(root: Path) -> dict[str, Path]:
    """A folder of each layout, one of two shards with an index, and a GGUF file."""
    folders = {"plain": root / "plain", "shards": root / "shards"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=1)
        model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(folders["plain"])
        model.save_pretrained(folders["shards"], max_shard_size="100KB")
    letters = Tokenizer(models.BPE({"</s>": 0} | {chr(96 + i): i for i in range(1, 15)} | {"ab": 15}, [("a", "b")]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>").save_pretrained(folders["plain"])
    for name in dict.fromkeys(LAYOUTS.values()):
        folders[name] = root / name
        run(prepare(folders["plain"], scheme(name), mode="even"), folders[name])
    for name, source in LAYOUTS.items():
        folders[name] = root / name
        convert(folders[source], folders[name], WRITERS[name])
    folders["mxfp4"] = root / "mxfp4"
    _gpt_oss(folders["mxfp4"])
    export(folders["W4A16_G32"], root / "gguf", pre="llama-bpe")
    return folders | {"gguf": root / "gguf"}


def _gpt_oss(folder: Path) -> None:
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"]}
    sizes = SIZES | more | {"hidden_size": 64, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 32}
    GptOssForCausalLM(GptOssConfig(**sizes)).bfloat16().save_pretrained(folder)
    tensors, draw = load_file(folder / "model.safetensors"), random.Random(0)
    for name, (n, k) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
        stack = f"model.layers.0.mlp.experts.{name}"
        del tensors[stack]
        tensors |= {f"{stack}_{part}": tensor for part, tensor in mxfp4_experts(draw, 2, n, k)[0].items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))


def attempt(path: Path) -> int:
    """Read a checkpoint in every way; how many succeeded. Whatever is not a LowbitError goes up."""
    done = 0
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for line in (["inspect"], ["lint"], ["plan", "--to", "W8A16"]):
            code = command.main([line[0], str(path), *line[1:]])
            assert code in (0, 1), code
            done += code == 0
    for read in (_prepare, _convert, lowbit_hf.load, load_tokenizer):
        with suppress(LowbitError):
            read(find_model(str(path)))
            done += 1
    return done


def _prepare(path: Path) -> None:
    prepare(path, scheme("W8A8"), mode="even").checkpoint.close()


def _convert(path: Path) -> None:
    source = Source(path, WRITERS["lowbit"])
    with source.plain:
        assert source.files
        source.output_config()


def header(data: bytes, folders: Mapping[str, Path]) -> None:
    """A safetensors file, and every tensor of it."""
    path = folders["plain"] / "model.safetensors"
    path.write_bytes(data)
    with suppress(LowbitError), Checkpoint.open(path) as checkpoint:
        for entry in checkpoint.entries.values():
            assert checkpoint.read(entry).nbytes == entry.nbytes <= len(data)


def index(data: bytes, folders: Mapping[str, Path]) -> None:
    """An index in a folder of shards."""
    root = folders["shards"]
    (root / INDEX_NAME).write_bytes(data)
    with suppress(LowbitError), Checkpoint.open(root) as checkpoint:
        assert all(entry.file.parent == root for entry in checkpoint.entries.values())


def config(data: bytes, folders: Mapping[str, Path]) -> None:
    """A config, in the folder of the layout that it names, without the model that it may describe."""
    found = None
    with suppress(ValueError, RecursionError):
        quantization = (as_object(json.loads(data)) or {}).get("quantization_config")
        found = (as_object(quantization) or {}).get("quant_method")
    root = folders[_OF_METHOD.get(str(found), "W4A16_G32")]
    (root / "config.json").write_bytes(data)
    with suppress(LowbitError), Checkpoint.open(root) as checkpoint:
        layout = layout_of(root, read_config(root), None)
        for module, names in {} if layout is None else modules_of(checkpoint, layout).items():
            if module is not None:
                with suppress(LowbitError):
                    read_weight(checkpoint, layout, module, names)
    with suppress(LowbitError):
        lint(root)


def gguf(data: bytes, folders: Mapping[str, Path]) -> None:
    """A GGUF file, what stands for its config, every tensor of it, and its tokenizer."""
    path = folders["gguf"] / "model.gguf"
    path.write_bytes(data)
    with suppress(LowbitError), open_checkpoint(path) as checkpoint:
        config_in(path)
        for entry in checkpoint.entries.values():
            assert entry.offset + entry.nbytes <= len(data)
            checkpoint.read(entry)
    with suppress(LowbitError):
        files_of(read_metadata(path))


TARGETS = {"header": header, "index": index, "config": config, "gguf": gguf}
"""What reads one kind of file, given its bytes and folders that they may be written into."""


def mutated(value: object, draw: random.Random) -> str:
    """JSON text of a value with a few things in it exchanged, added, taken out or put elsewhere."""
    value = deepcopy(value)
    for _ in range(draw.choice([1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw.choice(places)
        other, elsewhere = draw.choice(places)
        match draw.randrange(6):
            case 0:
                del holder[key]
            case 1:
                holder[key] = deepcopy(other[elsewhere])
            case 2 if isinstance(holder, dict):
                holder[draw.choice(NAMES)] = deepcopy(draw.choice(ODD))
            case 3:
                holder[key] = [holder[key], deepcopy(draw.choice(ODD))]
            case _:
                holder[key] = deepcopy(draw.choice(ODD))
    text = json.dumps(value)
    for written, meant in RAW.items():
        text = text.replace(json.dumps(written), meant)
    if draw.random() < 0.05:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def rewritten(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    size = int.from_bytes(raw[:8], "little")
    found = mutated(json.loads(raw[8 : 8 + size]), draw).encode()
    return len(found).to_bytes(8, "little") + found + raw[8 + size :]


def scrambled(raw: bytes, draw: random.Random, end: int) -> bytes:
    """Bytes, some of the first `end` of which are others."""
    found = bytearray(raw)
    for _ in range(draw.choice([1, 2, 8])):
        start = draw.randrange(end)
        found[start : start + draw.choice([0, 1, 8])] = draw.choice([b"", b"\0", b"\xff" * 8, b"\1", draw.randbytes(4)])
    return bytes(found[: draw.choice([None, None, None, draw.randrange(end)])])


# What a process may open while it reads a checkpoint: its folder, Python and what is installed, the system.
_SYSTEM = [sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev/null", "/dev/urandom", *sysconfig.get_paths().values()]
_SYSTEM += [
    "/usr/lib",
    "/usr/share",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    *map(str, map(Path, sys.path)),
]
_REFUSED = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
_watched: list[tuple[Path, list[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    folder, seen = _watched[-1]
    if event == "open" and isinstance(arguments[0], str | bytes):
        real = os.path.realpath(os.fsdecode(arguments[0]))
        if not any(Path(real).is_relative_to(root) for root in (folder, *_ROOTS)):
            seen.append(f"open {real}")
    elif event in _REFUSED:
        seen.append(f"{event} {arguments}")
    elif (event == "compile" and EVIL in str(arguments[0])) or (event == "import" and EVIL in str(arguments)):
        seen.append(f"{event} {arguments}"[:200])
    elif event == "exec" and Path(arguments[0].co_filename).is_relative_to(folder):
        seen.append(f"exec {arguments[0].co_filename}")


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What is done inside that data may not bring about: files opened outside `folder` and the system, code, pickles.

    Audit hooks cannot be taken away, so there is one for the whole process, which mostly sleeps.
    """
    if not _ROOTS:
        _ROOTS.extend(os.path.realpath(root) for root in _SYSTEM if root)
        sys.addaudithook(_hook)
    seen: list[str] = []
    _watched.append((Path(os.path.realpath(folder)), seen))
    try:
        yield seen
    finally:
        _watched.pop()
