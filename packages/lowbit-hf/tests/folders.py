"""Jobs of small models, and what they leave in folders."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from lowbit_hf.quantize import prepare
from lowbit_hf.schemes import scheme

Q = "model.layers.0.self_attn.q_proj"


def job_of(folder, name="W4A16_G32", *, rules=(), mode="even", **options):
    return prepare(folder, scheme(name), rules=[(p, scheme(each)) for p, each in rules], mode=mode, **options)


def tree(folder):
    """All files but the report, which tells how long things took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stem != "report"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tensors(folder):
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def leftovers(folder):
    """What a run left beside its output, or in its place."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith((".out", "out")))
