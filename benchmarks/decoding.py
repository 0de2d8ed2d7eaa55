"""How many tokens a second a model shaped as a known one runs with low-bit weights, beside the same in bfloat16.

    python benchmarks/decoding.py --scheme W4A16 --batch 1 16 --work /tmp/decoding --json benchmarks/decoding.json
    python benchmarks/decoding.py --model qwen3-8b --layers 36 --scheme W4AFP8 --batch 32 --prefill 2048

makes a checkpoint of random weights (kept in --work for the next run), rounds it to each scheme, and runs every model
in a process of its own with no compiled code of others, so that memory and the time to the first token are its own.
A step is one token for each sequence of a transformers StaticCache, compiled and captured in a CUDA graph; the graph
advances the position itself, and with the head feeds the token it chose to the next step, as a server's would. With
--prefill a step of that many tokens of one sequence, which chooses one more, is measured, too. Beside
the speed stands how far hidden states are from what the reference kernels make of the same quantized weights.
Without a GPU, `--device cpu --tiny` tries all of it on a tiny model, neither compiled nor captured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lowbit.packed import PackedTensor
from lowbit.table import align
from lowbit.tensor import QuantizedTensor

NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# Class of the configuration, sizes, base of the positions, and what else is not as that class has it.
MODELS: dict[str, tuple[str, tuple[int, ...], float, dict[str, Any]]] = {
    "llama-3-8b": ("LlamaConfig", (128256, 4096, 14336, 32, 8), 500000.0, {"rms_norm_eps": 1e-5}),
    "qwen3-8b": ("Qwen3Config", (151936, 4096, 12288, 32, 8), 1000000.0, {"rms_norm_eps": 1e-6, "head_dim": 128}),
}
# Has columns for one group of W4A16.
TINY = (512, 128, 256, 4, 2)
MODES = ("with_head", "without_head")
# Steps that are timed together, and groups of them that are not counted.
GROUP, WARM_UP = 10, 3


def main() -> None:
    """Make the models, measure each, tell and write the figures."""
    options = asked()
    if options.child:
        sys.stdout.write(json.dumps(measure(options.child, options)) + "\n")
        return
    with TemporaryDirectory() as scratch:
        size = "tiny" if options.tiny else f"{options.layers}-layers"
        plain = (options.work or Path(scratch)) / f"{options.model}-{size}"
        if not plain.exists():
            make(plain, options)
        models: list[dict[str, Any]] = [{"model": "bfloat16", **spawn(plain)}]
        for name in options.scheme or ["W4A16"]:
            out = plain.with_name(f"{plain.name}-{name}")
            models.append({"model": name, "quantize_s": quantize(plain, name, out, options.device), **spawn(out)})
    lines: list[dict[str, str]] = []
    for model in models:
        for row, base in zip(model["batches"], models[0]["batches"], strict=True):
            line = {"model": model["model"], "step": f"{row['batch']} x {row['tokens']}"}
            for mode in MODES:
                row[mode]["over_bfloat16"] = row[mode]["tokens_per_s"] / base[mode]["tokens_per_s"]
                line[f"tokens/s {mode}"] = f"{row[mode]['tokens_per_s']:.1f} ({row[mode]['over_bfloat16']:.2f}x)"
            line["first token"] = f"{row['first_token_s']:.2f} s"
            for figure, form in (("difference", ".1e"), ("held_over_packed", ".3f")):
                line[figure] = "-" if model[figure] is None else format(model[figure], form)
            lines.append(line)
    sys.stdout.write("\n".join(align(lines)) + "\n")
    if options.json:
        names = ("model", "layers", "tiny", "context", "position", "attention", "runs")
        told = {name: getattr(options, name) for name in names}
        result = {"benchmark": "decoding", "machine": machine(options.device), **told, "models": models}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def asked() -> argparse.Namespace:
    """The options; what cannot be measured here is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", action="append", help="may be given several times; default: W4A16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS", help="measure a prompt of so many, too")
    parser.add_argument("--model", choices=list(MODELS), default="llama-3-8b", help="whose shape the model has")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=512, help="tokens that the cache has room for")
    parser.add_argument("--position", type=int, default=256, help="tokens that are in it before each group of steps")
    told = "of all models alike: grouped, which copies no keys for each head, or one of transformers': sdpa, eager"
    parser.add_argument("--attention", default="sdpa", help=told)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        sys.exit("--device cpu needs --tiny: a CPU shows only that this runs")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU that torch can use; --device cpu --tiny tries it without one")
    if options.attention == "grouped" and options.prefill and options.prefill < options.context:
        sys.exit(f"--attention grouped takes a --prefill of --context tokens, {options.context}, or more")
    if options.position + GROUP > options.context:
        sys.exit(f"--context needs room for {GROUP} tokens after --position")
    if options.tiny:
        options.layers = 2
    return options


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write a checkpoint as transformers begins one: normal weights with a deviation of 0.02."""
    import transformers

    kind, sizes, base, rest = MODELS[options.model]
    shape: dict[str, Any] = dict(zip(NAMES, TINY if options.tiny else sizes, strict=True)) | rest
    shape |= {"num_hidden_layers": options.layers, "max_position_embeddings": 8192}
    config = getattr(transformers, kind)(**shape, rope_parameters={"rope_type": "default", "rope_theta": base})
    torch.manual_seed(0)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    partial.rename(folder)


def quantize(plain: Path, scheme_name: str, out: Path, device: str) -> float:
    """Round the linear layers of a checkpoint to nearest, and tell the seconds."""
    from lowbit_hf.quantize import prepare, run
    from lowbit_hf.schemes import scheme

    start = time.perf_counter()
    run(prepare(plain, scheme(scheme_name), mode="even", device=device), out, overwrite=True, device=device)
    return time.perf_counter() - start


def spawn(model: Path) -> dict[str, Any]:
    """What a process of its own measures of a model."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with TemporaryDirectory() as cache:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        child = [sys.executable, __file__, *sys.argv[1:], "--child", str(model)]
        return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, env=env).stdout.splitlines()[-1])


@torch.no_grad()
def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The measured process: load, bind, decode, and compare with the reference kernels."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    import lowbit
    from lowbit_hf import load

    # From its first product on cuBLAS keeps a workspace, which is no model's.
    ones = torch.ones(64, 64, dtype=torch.bfloat16, device=options.device)
    torch.mm(ones, ones)
    before = memory(options.device)["resident_bytes"]
    start = time.perf_counter()
    model: Any = load(folder, device=options.device)
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    model.set_attn_implementation(options.attention)
    loaded = time.perf_counter()
    bindings = lowbit.bind(model)
    told: dict[str, Any] = {"load_s": loaded - start, "bind_s": time.perf_counter() - loaded}
    tensors = [*model.parameters(), *model.buffers()]
    packed = sum(size(tensor) for tensor in tensors if isinstance(tensor, PackedTensor | QuantizedTensor))
    others = sum(map(size, tensors)) - packed
    told |= {"kernels": sorted({row.kernel for row in bindings.rows}), "packed_bytes": packed, "other_bytes": others}
    del tensors
    told["after_bind"] = memory(options.device)
    told["batches"] = rows = [steps(model, batch, 1, options) for batch in options.batch]
    if options.prefill:
        rows.append(steps(model, 1, options.prefill, options))
    told |= {"held_bytes": None, "held_over_packed": None, "difference": None}
    if packed and options.device == "cuda":
        # Of the first call of all; what is not known to be for anything else is held for the weights.
        told["held_bytes"] = rows[0]["resident_bytes"] - before - others - rows[0]["cache_bytes"]
        told["held_over_packed"] = told["held_bytes"] / packed
    if packed:
        prompt = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1))
        prompt = prompt.to(options.device)
        bound = model.model(prompt, use_cache=False).last_hidden_state.double()
        # Undoes the binding; canonical weights then run on reference kernels, whatever else would take them.
        lowbit.bind(model, prefer=["reference"])
        wanted = model.model(prompt, use_cache=False).last_hidden_state.double()
        told["difference"] = float((bound - wanted).norm() / wanted.norm())
    return told


def steps(model: Any, batch: int, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time steps of so many sequences and tokens, with and without the head: one token, or a prompt from its start."""
    from transformers import StaticCache

    import lowbit

    torch.compiler.reset()
    # The peak begins anew.
    memory(options.device)
    config, gpu, device = model.config, options.device == "cuda", torch.device(options.device)
    position = options.position if tokens == 1 else 0
    cache = StaticCache(config=config, max_cache_len=max(options.context, tokens))
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, torch.bfloat16, device)
    layers: list[Any] = cache.layers
    for part in (part for layer in layers for part in (layer.keys, layer.values)):
        part[:, :, :position].normal_()
    ids = torch.randint(config.vocab_size, (batch, tokens), device=device)

    def rewind() -> None:
        for layer in layers:
            layer.cumulative_length.fill_(position)

    def hidden() -> Tensor:
        # Position and mask come of the cache's own count of tokens, a tensor on the device.
        return model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state

    def choose(states: Tensor) -> Tensor:
        return model.lm_head(states[:, -1:]).argmax(-1)

    # In two pieces the decoder is compiled once for both modes; a graph makes one of them.
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": lowbit.compile_options()}
    body = torch.compile(hidden, **how) if gpu else hidden
    head = torch.compile(choose, **how) if gpu else choose
    kinds: dict[str, Callable[[], object]] = {
        "with_head": lambda: ids[:, -1:].copy_(head(body())),
        "without_head": body,
    }
    rewind()
    start = time.perf_counter()
    kinds["with_head"]()
    # Waits for the token, as whoever asked for it does.
    ids.tolist()
    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "first_token_s": time.perf_counter() - start}
    row |= memory(options.device)
    row["cache_bytes"] = sum(size(part) for layer in layers for part in (layer.keys, layer.values))
    # A prompt has room for itself alone.
    number = GROUP if tokens == 1 else 1
    for mode in MODES:
        repeat = replayed if gpu else timeit.repeat
        groups = repeat(kinds[mode], rewind, repeat=options.runs, number=number)
        seconds = statistics.median(groups) / number
        row[mode] = {"step_s": seconds, "tokens_per_s": batch * tokens / seconds, "group_s": groups}
    return row


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention (B, M, H, D) of queries (B, H, M, D) whose heads share keys and values (B, H / G, L, D) by the G.

    transformers' own with a mask makes G copies of keys and values.
    """
    del module
    batch, heads, tokens, size = query.shape
    if tokens > 1:
        # A prompt from its start, whose cache has room for itself alone.
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    # What of the cache is not filled yet.
    assert mask is not None
    scores = (query.view(batch, key.shape[1], -1, size) @ key.mT).float() * scaling
    out = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype) @ value
    return out.view(batch, 1, heads, size), None


def replayed(step: Callable[[], object], rewind: Callable[[], None], *, repeat: int, number: int) -> list[float]:
    """`timeit.repeat` of one graph's replays, by the GPU's clock."""
    rewind()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(WARM_UP + repeat)]
    for start, end in marks:
        rewind()
        start.record()
        for _ in range(number):
            graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in marks[WARM_UP:]]


def size(tensor: Tensor) -> int:
    """Bytes of a tensor, or of the parts of a quantized one."""
    parts = tensor.inner_tensors().values() if isinstance(tensor, QuantizedTensor) else (tensor,)
    return sum(part.nbytes for part in (tensor.parts if isinstance(tensor, PackedTensor) else parts))


def memory(device: str) -> dict[str, Any]:
    """Bytes of the GPU that tensors take now, and took at most since this was last asked; none on a CPU."""
    if device == "cpu":
        return {"resident_bytes": None, "peak_bytes": None}
    gc.collect()
    found = {"resident_bytes": torch.cuda.memory_allocated(), "peak_bytes": torch.cuda.max_memory_allocated()}
    torch.cuda.reset_peak_memory_stats()
    return found


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "transformers", "lowbit-core", "lowbit-kernels-cuda")},
        "date": datetime.now(UTC).date().isoformat(),
    }


if __name__ == "__main__":
    main()
