"""How fast a Llama-3.2-1B-shaped model of random weights decodes and reads prompts on a CPU, and in bfloat16.

    python benchmarks/decoding_cpu.py --scheme W4A16 --scheme W8A8 --work /tmp/decoding --json benchmarks/decoding.json

rounds the linear layers of a checkpoint to each scheme, all but the head, which is tied to the embedding, and runs
every model in a process of its own, by lowbit_hf.load and lowbit.bind, not compiled. A step is one token of one
sequence that a transformers StaticCache holds; a prompt is read into an empty one. Both with the head (of a prompt's
last token) and without.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import timeit
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from decoding import GROUP, MODES, NAMES, quantize, size
from torch import Tensor

from lowbit.bench.environment import environment
from lowbit.packed import PackedTensor
from lowbit.table import align
from lowbit.tensor import QuantizedTensor

# By the sizes that decoding.py names, and layers.
MODELS = {"llama-1b": (128256, 2048, 8192, 32, 8, 16), "tiny": (512, 128, 256, 4, 2, 2)}


def main() -> None:
    """Make the models, measure each, tell and write the figures."""
    options = asked()
    if options.child:
        sys.stdout.write(json.dumps(measure(options.child, options)) + "\n")
        return
    with TemporaryDirectory() as scratch:
        plain = (options.work or Path(scratch)) / options.model
        if not plain.exists():
            make(plain, options.model)
        models: list[dict[str, Any]] = [{"model": "bfloat16", **spawn(plain)}]
        for name in options.scheme or ["W4A16", "W8A8"]:
            out = plain.with_name(f"{plain.name}-{name}")
            models.append({"model": name, "quantize_s": quantize(plain, name, out, "cpu"), **spawn(out)})
    lines: list[dict[str, str]] = []
    for model in models:
        line = {"model": model["model"]}
        for part in ("decode", "prefill"):
            for mode in MODES:
                found = model[part][mode]
                found["over_bfloat16"] = found["tokens_per_s"] / models[0][part][mode]["tokens_per_s"]
                line[f"{part} {mode}"] = f"{found['tokens_per_s']:.1f} ({found['over_bfloat16']:.2f}x)"
        lines.append(line)
    sys.stdout.write("\n".join(align(lines)) + "\n")
    if options.json:
        told = {name: getattr(options, name) for name in ("context", "position", "prompt", "runs", "prompts")}
        versions = {name: version(name) for name in ("transformers", "lowbit-hf")}
        result = {"benchmark": "decoding_cpu", "shape": options.model, "environment": environment(torch.device("cpu"))}
        result |= {"versions": versions, **told, "models": models}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def asked() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", action="append", help="may be given several times; default: W4A16 and W8A8")
    parser.add_argument("--model", choices=MODELS, default="llama-1b")
    parser.add_argument("--context", type=int, default=512, help="tokens that the cache has room for")
    parser.add_argument("--position", type=int, default=256, help="tokens that are in it before each group of steps")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--runs", type=int, default=5, help="groups of steps")
    parser.add_argument("--prompts", type=int, default=3, help="prompts that are read")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if max(options.position + GROUP, options.prompt) > options.context:
        sys.exit(f"--context needs room for a prompt, and for {GROUP} tokens after --position")
    return options


def make(folder: Path, name: str) -> None:
    """Write a checkpoint as transformers begins one: normal weights with a deviation of 0.02."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    *sizes, layers = MODELS[name]
    shape: dict[str, Any] = dict(zip(NAMES, sizes, strict=True))
    shape |= {"num_hidden_layers": layers, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    torch.manual_seed(0)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
    partial.rename(folder)


def spawn(model: Path) -> dict[str, Any]:
    """What a process of its own measures of a model."""
    child = [sys.executable, __file__, *sys.argv[1:], "--child", str(model)]
    return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


@torch.inference_mode()
def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The measured process: load, bind, decode and read prompts."""
    from transformers import StaticCache

    import lowbit
    from lowbit_hf import load

    start = time.perf_counter()
    model: Any = load(folder)
    loaded = time.perf_counter()
    bindings = lowbit.bind(model)
    told: dict[str, Any] = {"load_s": loaded - start, "bind_s": time.perf_counter() - loaded}
    packed = [size(tensor) for tensor in model.parameters() if isinstance(tensor, PackedTensor | QuantizedTensor)]
    told |= {"kernels": sorted({row.kernel for row in bindings.rows}), "packed_bytes": sum(packed)}
    config = model.config
    cache = StaticCache(config=config, max_cache_len=options.context)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.bfloat16, torch.device("cpu"))
    layers: list[Any] = cache.layers
    for part in (part for layer in layers for part in (layer.keys, layer.values)):
        part.normal_()

    def rewind(position: int) -> None:
        for layer in layers:
            layer.cumulative_length.fill_(position)

    def hidden(ids: Tensor) -> Tensor:
        return model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state

    def last(ids: Tensor) -> Tensor:
        return model.lm_head(hidden(ids)[:, -1:]).argmax(-1)

    for part, tokens, at, runs, number in (
        ("decode", 1, options.position, options.runs, GROUP),
        ("prefill", options.prompt, 0, options.prompts, 1),
    ):
        ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
        told[part] = {}
        for mode, step in zip(MODES, (last, hidden), strict=True):
            # What is done once is done, and weights are in memory.
            rewind(at)
            step(ids[:, :8])
            groups = timeit.repeat(partial(step, ids), partial(rewind, at), repeat=runs, number=number)
            seconds = statistics.median(groups) / number
            told[part][mode] = {"call_s": seconds, "tokens_per_s": tokens / seconds, "group_s": groups}
    return told


if __name__ == "__main__":
    main()
