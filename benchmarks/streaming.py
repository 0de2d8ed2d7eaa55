"""How fast, and in how much memory, `lowbit quantize` streams a checkpoint that is larger than that memory.

    python benchmarks/streaming.py --gib 8 --scheme W4A16 --json benchmarks/streaming.json

makes a Llama-shaped bfloat16 checkpoint of random weights in sharded safetensors (kept in --work for the next run),
quantizes it in a fresh process, and reports seconds, MB of input a second, and the peak of resident memory above what
the imports alone take. The ceiling is a plain copy of the same files, in the same process, read and written in slices.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, MIDDLE, KEYS, VOCABULARY = 4096, 14336, 1024, 32000
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
SLICE = 8 << 20


def main() -> None:
    """Make the checkpoint, run the job, tell and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--scheme", action="append")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the checkpoint and its copies; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "SCHEME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        quantize(Path(options.child[0]), options.child[1])
        return
    with TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        model = work / f"llama-{options.gib:g}GiB"
        if not model.exists():
            make(model, options.gib)
        result: dict[str, Any] = {
            "benchmark": "streaming",
            "input_gib": size(model) / 2**30,
            "machine": machine(),
            "results": [],
        }
        for scheme in options.scheme or ["W4A16"]:
            runs = [measure(model, scheme) for _ in range(options.runs)]
            row = {
                "scheme": scheme,
                "mb_per_s": statistics.median(run["mb_per_s"] for run in runs),
                "peak_mib_above_import": max(run["peak_mib_above_import"] for run in runs),
                "copy_mb_per_s": statistics.median(run["copy_mb_per_s"] for run in runs),
                "runs": runs,
            }
            result["results"].append(row)
            sys.stdout.write(
                f"{scheme}: {row['mb_per_s']:.0f} MB/s of input (plain copy {row['copy_mb_per_s']:.0f}), "
                f"peak {row['peak_mib_above_import']:.0f} MiB above import\n"
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def make(model: Path, gib: float) -> None:
    """Write a Llama-shaped checkpoint of about `gib` GiB, a shard a layer."""
    partial = model.with_name(model.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    layer_bytes = 2 * sum(n * k for n, k in LINEARS.values())
    layers = max(round((gib * 2**30 - 2 * sum(n * k for n, k in ends.values())) / layer_bytes), 1)
    shards = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in LINEARS.items()}
        | {f"model.layers.{i}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        for i in range(layers)
    ] + [ends | {"model.norm.weight": (HIDDEN,)}]
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for key, shape in shard.items()
        }
        save_file(tensors, partial / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (partial / "config.json").write_text(json.dumps(config))
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    partial.rename(model)


def measure(model: Path, scheme: str) -> dict[str, float]:
    """One run in a fresh process, and a plain copy of the same input right after it."""
    child = [sys.executable, __file__, "--child", str(model), scheme]
    run = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    start = time.perf_counter()
    target = model.parent / "copy"
    target.mkdir(exist_ok=True)
    for path in model.glob("*.safetensors"):
        with path.open("rb") as source, (target / path.name).open("wb") as sink:
            while piece := source.read(SLICE):
                sink.write(piece)
            os.fsync(sink.fileno())
    run["copy_mb_per_s"] = size(model) / 1e6 / (time.perf_counter() - start)
    shutil.rmtree(target)
    return run


def quantize(model: Path, scheme_name: str) -> None:
    """The measured process: import, note the memory, run the job, print the figures as JSON."""
    from lowbit_hf.quantize import prepare, run
    from lowbit_hf.schemes import scheme

    base = resident("VmRSS")
    # Starts the high-water mark anew; ru_maxrss would still hold what the parent had when it forked.
    Path("/proc/self/clear_refs").write_text("5")
    out = model.parent / f"out-{scheme_name}"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    job = prepare(model, scheme(scheme_name), mode="even")
    run(job, out)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - base
    figures = {"seconds": seconds, "mb_per_s": size(model) / 1e6 / seconds, "peak_mib_above_import": peak / 1024}
    figures["output_gib"] = size(out) / 2**30
    shutil.rmtree(out)
    sys.stdout.write(json.dumps(figures) + "\n")


def resident(field: str) -> int:
    """KiB of resident memory now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def size(folder: Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


if __name__ == "__main__":
    main()
