"""Write the files of this version that later ones must read: `python integration_tests/upgrades/write.py`, once a release.

Each folder is a checkpoint of one layout, with what its weights stand for in `values.npz`; `states.pt` and
`tensors.safetensors` are what torch.save and lowbit.save write.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import decoding
import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lowbit
from lowbit_hf.convert import convert
from lowbit_hf.gguf.export import export
from lowbit_hf.layouts import WRITERS
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme
from lowbit_moe import AdamW

SCHEMES = (
    "W8A8",
    "W4A16_G32",
    "W4A16_ASYM_G32",
    "FP8_DYNAMIC",
    "MXFP8",
    "MXFP6A16",
    "MXFP4A16",
    "NVFP4A16",
    BLOCK := "FP8_BLOCK",
)
# Layout, and the scheme it is converted from.
LAYOUTS = {
    "gptq": "W4A16_G32",
    "awq": "W4A16_G32",
    "modelopt": "NVFP4A16",
    "deepseek-fp8": "FP8_BLOCK",
    "lowbit": "MXFP6A16",
}
# One of each kind: integers, zero points, floats, powers of two, codes of 6 bits, a scale of the tensor.
TENSORS = {
    "int4": "int4:1x32:bfloat16",
    "uint4": "uint4:1x32:bfloat16:zero=uint4",
    "fp8": "e4m3fn:1x*:float32",
    "mxfp6": "e3m2:1x32:e8m0",
    "mxfp4": "e2m1:1x32:e8m0",
    "nvfp4": "e2m1:1x16:e4m3fn:tensor",
}


def write(to: Path) -> None:
    """Everything, into a folder that is not there."""
    to.mkdir(parents=True)
    with TemporaryDirectory() as scratch:
        base = original(Path(scratch) / "original", 32)
        # Blocks of 128 columns, of which one matrix is enough.
        wide, kept = original(Path(scratch) / "wide", 128), ["*self_attn*", "*gate_proj*", "*up_proj*"]
        for name in SCHEMES:
            source, keep = (wide, kept) if name == BLOCK else (base, [])
            run(prepare(source, scheme(name), mode="even", keep=keep), to / name)
        for name, source in LAYOUTS.items():
            convert(to / source, to / name, WRITERS[name])
        export(to / "W4A16_G32", to / "gguf", pre="llama-bpe")
    for folder in sorted(to.iterdir()):
        for extra in (*folder.glob("report.*"), *folder.glob("tokenizer*"), *folder.glob("generation_config.json")):
            extra.unlink()
        np.savez_compressed(folder / "values.npz", **(in_gguf(folder) if folder.name == "gguf" else in_folder(folder)))
    write_tensors(to)


def original(folder: Path, inner: int) -> Path:
    """A Llama of one layer, whose matrices are (32, 32), or have `inner` rows or columns, with large numbers among small ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).bfloat16()
    for parameter in model.parameters():
        parameter.data.mul_(torch.randn(parameter.shape).exp())
    model.save_pretrained(folder)
    letters = Tokenizer(models.BPE({"</s>": 0} | {chr(96 + i): i for i in range(1, 15)} | {"ab": 15}, [("a", "b")]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>").save_pretrained(folder)
    return folder


def in_folder(folder: Path) -> dict[str, np.ndarray]:
    """What each quantized weight of a folder stands for, by its name in the model."""
    stored = {name: decoding.array(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    found: dict[str, np.ndarray] = {}
    for module in sorted({name.rpartition(".")[0] for name in stored if name.endswith("_proj.weight:qdata")}):
        parts = {name.rpartition(":")[2]: part for name, part in stored.items() if name.startswith(f"{module}.")}
        found[f"{module}.weight"] = decoding.plain(parts, "e2m3", 32)
    for module in sorted({name.rpartition(".")[0] for name in stored if name.endswith(("_scale", "_inv", "scales"))}):
        parts = {name.rpartition(".")[2]: part for name, part in stored.items() if name.startswith(f"{module}.")}
        read = {"gptq": decoding.gptq, "awq": decoding.awq}.get(folder.name, decoding.compressed)
        found[f"{module}.weight"] = read(parts)
    assert len(found) == (1 if folder.name in {BLOCK, "deepseek-fp8"} else 7), folder
    return {name: values.astype(np.float32) for name, values in found.items()}


def in_gguf(folder: Path) -> dict[str, np.ndarray]:
    """The same by the gguf package, under llama.cpp's names, of what is not turned for its rotary embeddings."""
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    kept = [tensor for tensor in tensors if "ffn" in tensor.name and "norm" not in tensor.name]
    names = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
    return {
        f"model.layers.0.mlp.{names[tensor.name.split('.')[2]]}.weight": dequantize(tensor.data, tensor.tensor_type)
        for tensor in kept
    }


def write_tensors(to: Path) -> None:
    """Tensors of each kind of format by lowbit.save and by torch.save, that also with states of AdamW."""
    x = torch.randn(8, 64) * torch.randn(8, 64).exp()
    tensors = {name: lowbit.quantize(x, spec) for name, spec in TENSORS.items()}
    parameter = torch.nn.Parameter(x.clone())
    optimizer = AdamW([parameter], bits=8)
    parameter.square().sum().backward()
    optimizer.step()
    lowbit.save(tensors, to / "tensors.safetensors")
    torch.save({"tensors": tensors, "optimizer": optimizer.state_dict()}, to / "states.pt")
    values = {
        name: decoding.plain(
            {part: decoding.array(inner) for part, inner in tensor.inner_tensors().items()},
            TENSORS[name].partition(":")[0],
            64,
        )
        for name, tensor in tensors.items()
    }
    state = {name: decoding.array(part) for name, part in optimizer.state_dict()["state"][0].items()}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values[name] = decoding.moment(state[name], state[f"{name}_scale"], signed=signed)
    np.savez_compressed(to / "values.npz", **{name: found.astype(np.float32) for name, found in values.items()})


if __name__ == "__main__":
    write(Path(__file__).parent / version("lowbit-hf"))
