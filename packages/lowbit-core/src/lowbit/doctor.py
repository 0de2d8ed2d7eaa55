"""`lowbit doctor`: what is installed, which kernel each op would use on this machine, and why not another."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from lowbit.activation import Activation
from lowbit.backends import Call, installed, select
from lowbit.command import DONE, PROBLEM, versions
from lowbit.errors import FormatError, NoKernelError
from lowbit.format import FORMATS, Format

# Distributions of lowbit that exist, and what each one adds.
_DISTRIBUTIONS = {
    "lowbit-core": "formats, tensors, operators",
    "lowbit-algos": "GPTQ, AWQ, SmoothQuant and others that lose less than rounding to nearest",
    "lowbit-hf": "Hugging Face checkpoints: lowbit quantize, eval, diff, ...",
    "lowbit-kernels-cuda": "fast kernels for NVIDIA GPUs",
    "lowbit-kernels-x86": "fast kernels for x86-64 processors",
    "lowbit-moe": "training in low precision: linear layers, experts, AdamW",
    "lowbit-pt2e": "passes over exported graphs",
}
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
_SHAPE = (4096, 4096)
_OPS = ("quantize", "dequantize", "linear", "embedding", "embedding_bag")


def main(argv: list[str]) -> int:
    """Show what is installed, which kernel runs what on this machine, and what is missing."""
    parser = argparse.ArgumentParser(
        "lowbit doctor", description=main.__doc__, epilog="example: lowbit doctor --format MXFP8 --json"
    )
    parser.add_argument("--format", action="append", metavar="F", help="only these formats (a name or a spec string)")
    parser.add_argument("--why", action="store_true", help="also why not another kernel; with --format, always")
    parser.add_argument("--device", help="device type to look at; default: cuda if there is one, otherwise cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        formats = {name: Format.parse(name) for name in options.format or FORMATS}
    except FormatError as error:
        parser.error(str(error))
    report = examine(formats, device)
    why = options.why or options.format is not None
    sys.stdout.write((json.dumps(report, indent=2) if options.json else _render(report, why=why)) + "\n")
    return PROBLEM if report["problems"] else DONE


def examine(formats: dict[str, Format], device: str) -> dict[str, Any]:
    """Everything doctor tells, as plain values."""
    loaded = installed()
    backends = {
        name: {
            "distribution": entry.distribution,
            "problem": entry.problem,
            "kernels": [kernel.name for kernel in entry.kernels],
            "detail": None if entry.problem else getattr(entry.backend, "detail", str)() or None,
        }
        for name, entry in loaded.items()
    }
    packages = dict.fromkeys(_DISTRIBUTIONS) | versions()
    machine = _machine()
    missing = [name for name, found in packages.items() if found is None]
    useless = {name: reason for name in missing if (reason := _useless(name, machine))}
    # A backend that this machine cannot run is not broken; one that cannot be loaded is.
    problems = [f"backend {name}: {entry.problem}" for name, entry in loaded.items() if entry.backend is None]
    return {
        "machine": machine,
        "packages": packages,
        "missing": {name: f"pip install {name}" for name in missing if name not in useless},
        "useless": useless,
        "backends": backends,
        "device": device,
        "kernels": [row for name, fmt in formats.items() for row in _kernels(name, fmt, device)],
        "problems": problems + _mismatched(packages),
    }


def _useless(name: str, machine: dict[str, Any]) -> str | None:
    """Why a distribution that is not installed would do nothing here."""
    if name == "lowbit-kernels-cuda" and not machine["gpu"]:
        return "needs an NVIDIA GPU that torch can use"
    if name == "lowbit-kernels-x86" and machine["system"] != "Linux x86_64":
        return f"needs Linux on x86-64; this is {machine['system']}"
    return None


def _mismatched(packages: dict[str, str | None]) -> list[str]:
    """Distributions that pip was told to install beside a lowbit-core of another minor version."""
    core = packages["lowbit-core"]
    minor = [str(core).split(".")[:2]]
    return [
        f"{name} {found} beside lowbit-core {core}, which it was not made for: pip install --upgrade lowbit-core {name}"
        for name, found in packages.items()
        if name in _DISTRIBUTIONS and found is not None and found.split(".")[:2] not in minor
    ]


def _kernels(name: str, fmt: Format, device: str) -> list[dict[str, Any]]:
    """What each op would run for a weight of `fmt`, weight-only and with the input in the same kind of format."""
    n, k = _SHAPE
    uses: list[tuple[str, Activation | None]] = [(op, None) for op in _OPS]
    uses += [("grouped_mm", None)]
    if fmt.block[0] <= 1:
        uses += [(op, Activation(fmt)) for op in ("linear", "scaled_mm")]
    rows: list[dict[str, Any]] = []
    for op, activation in uses:
        call = Call(op, fmt, activation, device, torch.bfloat16, n, k)
        row: dict[str, Any] = {"format": name, "op": op, "activation": None if activation is None else str(activation)}
        try:
            choice = select(call)
            row |= {"kernel": choice.kernel.name, "refusals": [str(r) for r in choice.refusals]}
        except NoKernelError as error:
            row |= {"kernel": None, "refusals": str(error).splitlines()[1:]}
        rows.append(row)
    return rows


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if info.exists():
        line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
        flags = set(line.split())
    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": [flag for flag in _CPU_FLAGS if flag in flags],
        "gpu": gpus,
    }


def _render(report: dict[str, Any], *, why: bool) -> str:
    machine = report["machine"]
    lines = [
        f"machine   Python {machine['python']}, torch {machine['torch']}, {machine['system']}",
        f"          CPU: {' '.join(machine['cpu']) or 'no vector extension lowbit asks for'}",
        f"          GPU: {', '.join(machine['gpu']) or _no_gpu()}",
        "packages",
    ]
    for name, found in report["packages"].items():
        hint = report["missing"].get(name) or report["useless"].get(name)
        lines.append(f"  {name:<22} {found or f'not installed; {_DISTRIBUTIONS[name]}: {hint}'}")
    lines.append("backends")
    for name, entry in report["backends"].items():
        by = f" by {entry['detail']}" if entry["detail"] else ""
        state = entry["problem"] or f"ready, {len(entry['kernels'])} kernels{by}"
        lines.append(f"  {name:<22} {entry['distribution']}: {state}")
    lines.append(f"kernels on {report['device']} (bf16 input, weight {_SHAPE[0]} x {_SHAPE[1]})")
    idle = {f"{name}: {entry['problem']}" for name, entry in report["backends"].items() if entry["problem"]}
    every = list(dict.fromkeys(row["format"] for row in report["kernels"]))
    grouped: dict[tuple[Any, ...], list[str]] = {}
    for row in report["kernels"]:
        label = row["op"] + (" (input rounded too)" if row["activation"] else "")
        refusals = tuple(row["refusals"]) if why or row["kernel"] is None else ()
        grouped.setdefault((row["kernel"], label, refusals), []).append(row["format"])
    for (kernel, label, refusals), names in sorted(grouped.items(), key=lambda item: item[0][1]):
        lines.append(f"  {label}: {kernel or 'no kernel'}  [{_listing(names, every)}]")
        # Why a whole backend cannot run stands above.
        lines += [f"      not {refusal.strip()}" for refusal in refusals if refusal.strip() not in idle]
    lines += [] if why else ["  why not another kernel: lowbit doctor --why, or --format MXFP8 for one format"]
    return "\n".join(lines + [f"problem: {problem}" for problem in report["problems"]])


def _no_gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none that torch can use"
    return f"none that torch {torch.__version__} can use, though nvidia-smi is here; is it a torch for CUDA? https://pytorch.org"


def _listing(names: list[str], every: list[str]) -> str:
    """`names`, said by what is missing where that is shorter."""
    missing = [name for name in every if name not in names]
    if len(missing) >= len(names) or len(every) == 1:
        return " ".join(names)
    return f"all but {' '.join(missing)}" if missing else f"all {len(every)} formats"
