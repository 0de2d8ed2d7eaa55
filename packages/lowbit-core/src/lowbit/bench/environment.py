"""What figures were measured on: the device, its clocks, and versions of all that took part."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

# Distributions that peers, and models, come in, beside lowbit's own.
_TOLD = {
    "apache-tvm-ffi",
    "bitsandbytes",
    "deep-gemm",
    "flash_attn_3",
    "humming-kernels",
    "mslk",
    "mslk-cuda",
    "numpy",
    "sageattention",
    "sgl-deep-gemm",
    "tokenspeed-fa3",
    "tokenspeed-triton-kernels",
    "torch",
    "torchao",
    "transformers",
    "triton",
    "triton-kernels",
}
_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, clocks (MHz, W and degrees as nvidia-smi tells them), versions and date, as plain values."""
    names = {d.name: d.version for d in distributions() if d.name}
    return {
        "device": _name(device),
        "clocks": _clocks(device) if device.type == "cuda" else {},
        "versions": {name: names[name] for name in sorted(names) if name in _TOLD or name.startswith("lowbit-")},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    run = f"{os.cpu_count()} cores, {capability}, {threads} thread{'s' * (threads > 1)}"
    return f"{model or platform.processor() or platform.machine()}, {run}"


def _clocks(device: torch.device) -> dict[str, str]:
    """What nvidia-smi tells of a GPU now, or why it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"refusal": "needs nvidia-smi, which is not on PATH"}
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, f"--id={card}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)  # noqa: S603 - no user's words
    except subprocess.TimeoutExpired:
        return {"refusal": "nvidia-smi did not answer within 30 s"}
    values = [part.strip() for part in done.stdout.split(",")]
    if done.returncode or len(values) != len(_CLOCKS):
        return {"refusal": f"nvidia-smi left with {done.returncode}: {(done.stderr or done.stdout).strip()[:200]}"}
    return dict(zip(_CLOCKS, values, strict=True))
