"""docs/interop.md says of every scheme who reads it; every cell but vLLM's runs here, on small random models."""

from __future__ import annotations

import json
import os
from importlib.metadata import version

import pytest
import torch
from interop_table import MODELS, PAGE, READERS, VLLM, page, plainly
from test_calibrated import Windows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lowbit.errors import CheckpointError
from lowbit_algos import Method
from lowbit_hf.convert import convert
from lowbit_hf.gguf.export import export
from lowbit_hf.layouts import WRITERS
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import SCHEMES, scheme
from lowbit_hf.verify.checking import compare, pair

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
CLASSES = {
    "dense": (LlamaForCausalLM, LlamaConfig, SMALL),
    "experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig, SMALL | EXPERTS),
}
# Groups of 32 are the only ones that GGUF holds.
NAMES = [*(name for name, each in SCHEMES.items() if each.refusal is None), "W4A16_G32", "W8A16_G32"]
EXPORTS = {"GPTQ": "gptq", "GPTQ v2": "gptq_v2", "AWQ": "awq", "ModelOpt": "modelopt", "DeepSeek": "deepseek-fp8"}
RECORD = os.environ.get("LOWBIT_INTEROP")


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A folder for each kind of model, with a byte-level tokenizer, which GGUF needs."""
    made = {}
    for kind, (cls, config, sizes) in CLASSES.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp("interop") / kind
            cls(config(**sizes)).bfloat16().save_pretrained(made[kind])
        words = Tokenizer(models.BPE({chr(33 + i): i for i in range(94)}, []))
        words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        words.save(str(made[kind] / "tokenizer.json"))
    return made


def reading(found):
    """What a reader makes of all weights."""
    if found.refused is not None:
        return {"mark": "fails", "why": plainly(found.refused)}
    if found.unequal:
        return {"mark": "WRONG", "why": "other values than the files hold, without a word"}
    return {"mark": "="}


def transformers(folder):
    """What transformers reads, and whether it also runs it by itself."""
    (found,) = compare(folder, ["transformers"])
    outcome = reading(found)
    if outcome["mark"] != "=":
        return outcome
    with torch.no_grad():
        both = pair(folder, ["transformers"])
    return outcome if both.hindrance is None else {"mark": "= plain", "why": plainly(both.hindrance)}


def exported(make, out, reader):
    """What an independent reader makes of another layout, if that holds the scheme."""
    try:
        made = make(out)
    except CheckpointError as error:
        return {"mark": "", "why": plainly(error)}
    outcome = reading(compare(out / "model.gguf" if reader == "gguf" else out, [reader])[0])
    return outcome if not made.inexact else {"mark": "rounded", "why": "scales become float16"}


def row(kind, name, source, folder):
    """Every cell of a scheme but vLLM's."""
    chosen = scheme(name)
    data = {"calibration": Windows(), "method": Method.of("rtn")} if chosen.needs_data else {}
    made = folder / "made"
    run(prepare(source, chosen, mode="even", **data), made)
    cells = {
        "compressed-tensors": reading(compare(made, ["compressed-tensors"])[0]),
        "transformers": transformers(made),
    }
    for title, layout in EXPORTS.items():
        cells[title] = exported(lambda out, as_=WRITERS[layout]: convert(made, out, as_), folder / layout, "numpy")
    cells["GGUF"] = exported(lambda out: export(made, out, pre="gpt-2"), folder / "gguf", "gguf")
    return cells


# Other programs warn of their own code.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_cells_are_what_the_page_says(sources, tmp_path, kind, name):
    recorded = json.loads(READERS.read_text(encoding="utf-8")) if READERS.exists() else {"rows": {}}
    cells = row(kind, name, sources[kind], tmp_path)
    if RECORD:
        recorded["versions"] = {each: version(each) for each in ("compressed-tensors", "transformers", "gguf", "torch")}
        recorded["rows"].setdefault(kind, {})[name] = cells
        READERS.parent.mkdir(exist_ok=True)
        READERS.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    assert cells == recorded["rows"][kind][name]


def test_the_page_is_what_was_recorded():
    readers, vllm = (json.loads(path.read_text(encoding="utf-8")) for path in (READERS, VLLM))
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, readers, vllm) == text
    assert all(list(readers["rows"][kind]) == NAMES for kind in MODELS)
