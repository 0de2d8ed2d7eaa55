"""`lowbit quantize` and `lowbit plan`."""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.command import DONE
from lowbit.report import Report
from lowbit.table import fold, size
from lowbit_hf.commands.options import (
    AlgorithmOf,
    AsJson,
    Bits,
    Calibrate,
    Coverage,
    Device,
    Keep,
    KvCacheOf,
    LayoutOf,
    Layouts,
    Length,
    MaxGpu,
    MaxKl,
    MaxMemory,
    Mode,
    Model,
    Nonfinite,
    OnePass,
    Rules,
    Samples,
    ScaleModes,
    Seed,
    To,
    Tos,
    bytes_of,
    calibration_of,
    device_of,
    method_of,
    rule_of,
    scheme_of,
)
from lowbit_hf.commands.running import command_line, note, say, say_json, subcommand
from lowbit_hf.hub import find_model
from lowbit_hf.progress import Meter

if TYPE_CHECKING:
    from lowbit_algos import Method
    from lowbit_hf.budget import Budget
    from lowbit_hf.job import Job
    from lowbit_hf.mixing import Mix
    from lowbit_hf.quantize import Account
    from lowbit_hf.schemes import KvCache
    from lowbit_hf.texts import Calibration

# What `--to auto` chooses from.
_AUTO: tuple[str, ...] = ("W3A16", "W4A16", "W4A16_G32", "W8A16")


@subcommand("quantize", "lowbit quantize ./Qwen3-8B --to W4A16 --rule '*.down_proj=W8A16' -o ./Qwen3-8B-W4A16")
def quantize(
    model: Model,
    to: Tos,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to make; appears whole or not at all")] = Path(),
    rule: Rules = [],  # noqa: B006 - typer copies it
    keep: Keep = [],  # noqa: B006
    algorithm: AlgorithmOf = "rtn",
    calibrate: Calibrate = [],  # noqa: B006
    samples: Samples = 128,
    seq_len: Length = 512,
    seed: Seed = 0,
    one_pass: OnePass = False,  # noqa: FBT002
    kv_cache: KvCacheOf = None,
    bits_per_weight: Bits = None,
    max_kl: MaxKl = None,
    max_memory: MaxMemory = None,
    max_gpu: MaxGpu = None,
    device: Device = None,
    scale_mode: ScaleModes = "even",
    min_coverage: Coverage = 0.0,
    allow_nonfinite: Nonfinite = False,  # noqa: FBT002
    layout: LayoutOf = "compressed-tensors",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")] = False,  # noqa: FBT002
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Make a checkpoint low-bit, from disk to disk, by rounding to nearest or by an algorithm that does better.

    Linear layers and experts get SCHEME; the output head and routers stay. A run that was stopped continues when the
    same command is given again. The result is in compressed-tensors layout, which transformers and vLLM read; or in
    lowbit's own, for what that one cannot hold.
    """
    from lowbit_hf.job import require_data  # noqa: PLC0415

    if out == Path() and not dry_run:
        raise typer.BadParameter("needed is a folder to write to", param_hint="'-o' / '--out'")
    device = _joined(device_of(device))
    if max_gpu is not None and not device.startswith("cuda"):
        raise typer.BadParameter(f"bounds a GPU's memory, and this run computes on {device}", param_hint="'--max-gpu'")
    text = calibration_of(calibrate, samples, seq_len, seed)
    method = method_of(algorithm, scale_mode, sequential=not one_pass, calibrated=text is not None, layout=layout)
    most = None if max_memory is None else bytes_of(max_memory)
    most_gpu = None if max_gpu is None else bytes_of(max_gpu, "--max-gpu")

    def job_of(to: str, rules: list[str], kept: list[str]) -> Job:
        return prepared(
            model,
            to,
            rules,
            kept,
            device,
            scale_mode,
            min_coverage,
            allow_nonfinite=allow_nonfinite,
            calibration=text,
            method=method,
            max_memory=most,
            max_gpu=most_gpu,
            layout=layout,
            kv_cache=kv_cache,
        )

    if (names := _several(to)) or bits_per_weight is not None or max_kl is not None:
        mix = _mix(names, rule, keep, job_of, device, bits_per_weight, max_kl, calibrated=text is not None)
        note(str(mix))
        rule = [*rule, *(f"{name}={scheme.name}" for name, scheme in mix.rules)]
        to, keep = mix.to.name, [*keep, *mix.keep]
    job = job_of(to, rule, keep)
    require_data(job)
    _warn(job)
    if dry_run:
        return _show_plan(job, _foreseen(job, device), as_json=as_json)
    account = carry_out(job, out, device_of(device), overwrite=overwrite)
    if account is None:
        return DONE
    report = Report.from_json((out / "report.json").read_text(encoding="utf-8"))
    if as_json:
        say_json(_account_json(job, account, out) | {"memory": _memory_json(report)})
        return DONE
    say(
        f"{out}: {account.quantized} of {len(account.tensors)} tensors, {job.plan.coverage:.1%} of the bytes, "
        f"are low-bit, {job.bits_per_weight:.4g} bits per weight; "
        f"{size(job.checkpoint.nbytes)} -> {size(job.output_bytes)}"
    )
    say(_nothing_lost(account))
    if told := _memory_taken(report):
        say(told)
    say(f"report: {out / 'report.html'}")
    serve = f"\n      vllm serve {out}" if layout == "compressed-tensors" else ""
    say(f"next: lowbit eval {out} --against {model}{serve}")
    return DONE


@subcommand("plan", "lowbit plan ./Qwen3-8B --to NVFP4A16 --keep '*.layers.0.*'")
def plan(
    model: Model,
    to: To,
    rule: Rules = [],  # noqa: B006 - typer copies it
    keep: Keep = [],  # noqa: B006
    device: Device = None,
    min_coverage: Coverage = 0.0,
    allow_nonfinite: Nonfinite = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Show what quantize would do to every tensor: rule, format, bytes, kernel here, or why it is left."""
    job = prepared(model, to, rule, keep, device_of(device), "even", min_coverage, allow_nonfinite=allow_nonfinite)
    _warn(job)
    return _show_plan(job, as_json=as_json)


def prepared(
    model: str,
    to: str,
    rules: list[str],
    keep: list[str],
    device: str,
    mode: Mode,
    min_coverage: float,
    *,
    allow_nonfinite: bool,
    calibration: Calibration | None = None,
    method: Method | None = None,
    max_memory: int | None = None,
    max_gpu: int | None = None,
    layout: Layouts = "compressed-tensors",
    kv_cache: KvCache | None = None,
) -> Job:
    """The job that a command's options ask for."""
    from lowbit_hf.job import prepare  # noqa: PLC0415

    wanted = scheme_of(to, "--to")
    return prepare(
        find_model(model),
        wanted,
        rules=[rule_of(rule) for rule in rules],
        keep=keep,
        mode=mode,
        min_coverage=min_coverage,
        allow_nonfinite=allow_nonfinite,
        device=device,
        calibration=calibration,
        method=method,
        max_memory=max_memory,
        max_gpu=max_gpu,
        layout=layout,
        kv_cache=kv_cache,
    )


def _warn(job: Job) -> None:
    """Say beforehand what engines will refuse."""
    if job.filing.name == "compressed-tensors" and job.divided:
        names = ", ".join(name for name, _ in fold(job.divided))
        note(f"warning: vLLM and SGLang load these into one matrix, and refuse several schemes in it: {names}")


def _several(to: str) -> list[str]:
    """The schemes that --to leaves a choice of, in upper case; none where it names one."""
    names = list(_AUTO) if to.lower() == "auto" else list(dict.fromkeys(name.strip().upper() for name in to.split(",")))
    return names if len(names) > 1 else []


def _mix(
    names: list[str],
    rules: list[str],
    keep: list[str],
    job_of: Callable[[str, list[str], list[str]], Job],
    device: str,
    bits_per_weight: float | None,
    max_kl: float | None,
    *,
    calibrated: bool,
) -> Mix:
    """What is chosen of several schemes, for which there has to be a text and one bound."""
    from lowbit_hf.mixing import KEEP, choose  # noqa: PLC0415

    schemes = [name for name in names if name != KEEP]
    if (bits_per_weight is None) == (max_kl is None) or len(names) < 2 or not schemes:
        msg = "several schemes (--to auto, or names joined by commas) go with one of --bits-per-weight and --max-kl"
        raise typer.BadParameter(msg, param_hint="'--to'")
    if not calibrated:
        raise typer.BadParameter("needs a text to choose schemes by: --calibrate FILE", param_hint="'--to'")
    found = [scheme_of(name, "--to") for name in schemes]
    jobs = [(each, job_of(name, rules, keep)) for each, name in zip(found, schemes, strict=True)]
    return choose(jobs, keep=KEEP in names, device=device, bits_per_weight=bits_per_weight, max_kl=max_kl)


def _joined(device: str) -> str:
    """The device of this process, once it has joined those that torchrun started with it."""
    from lowbit_hf.processes import join, leave  # noqa: PLC0415

    atexit.register(leave)
    return join(device)


def carry_out(
    job: Job, out: Path, device: str, *, overwrite: bool, command: str | None = None, settle: bool = True
) -> Account | None:
    """The account of a run, by default one of the command that was typed; None where another process writes."""
    from lowbit_hf.quantize import run  # noqa: PLC0415

    try:
        with Meter(f"quantize {out.name}", job.checkpoint.nbytes) as meter:
            return run(
                job,
                out,
                overwrite=overwrite,
                device=device,
                command=command or command_line(),
                settle=settle,
                advance=meter.advance,
            )
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted before {out} was made; the same command continues where this one stopped\n")
        raise


def _foreseen(job: Job, device: str) -> Budget:
    """What a run would take of memory."""
    from lowbit_hf.quantize import foresee  # noqa: PLC0415

    return foresee(job, device)


def _show_plan(job: Job, budget: Budget | None = None, *, as_json: bool) -> int:
    cache = job.kv_cache
    if as_json:
        planned: dict[str, Any] = {} if budget is None else {"planned_memory": asdict(budget.planned)}
        if cache is not None:
            scales = [name for _, (name, _, _) in job.cache_scales]
            planned["kv_cache"] = {"scheme": cache.scheme, "scales": scales, "blocks_without": cache.without}
        say_json(json.loads(job.plan.to_json()) | planned)
    else:
        told = [] if cache is None else [f"key-value cache: {cache}"]
        say("\n\n".join([str(job.plan), *told, *([] if budget is None else [str(budget)])]))
    return DONE


def _memory_json(report: Report) -> dict[str, Any]:
    return {
        "host": {"peak": report.peak_memory, "planned": report.planned_memory, "allowed": report.max_memory},
        "gpu": {"peak": report.peak_gpu, "planned": report.planned_gpu, "allowed": report.max_gpu},
    }


def _memory_taken(report: Report) -> str:
    """What a calibrated run took of memory, in a line; rounding to nearest takes next to none."""
    if not report.calibration:
        return ""
    sides = {"memory": (report.peak_memory, report.planned_memory, report.max_memory)}
    sides["GPU memory"] = report.peak_gpu, report.planned_gpu, report.max_gpu
    told = [
        f"{name}: {size(peak)} at most, {size(planned)} planned"
        + ("" if allowed is None else f", {size(allowed)} allowed")
        for name, (peak, planned, allowed) in sides.items()
        if peak is not None and planned is not None
    ]
    return "; ".join(told)


def _account_json(job: Job, account: Account, out: Path) -> dict[str, Any]:
    totals = {"out": str(out), "bits_per_weight": job.bits_per_weight, "coverage": job.plan.coverage}
    return {**totals, "bytes_before": job.checkpoint.nbytes, "bytes_after": job.output_bytes, **asdict(account)}


def _nothing_lost(account: Account) -> str:
    kept = len(account.tensors) - account.quantized - len(account.changed)
    files = f"{len(account.files)} other files carried ({', '.join(account.files) or 'none'})"
    lines = [f"nothing lost: {account.quantized} tensors quantized, {kept} carried bit for bit, {files}"]
    if account.changed:
        names = ", ".join(name for name, _ in fold(account.changed))
        lines.append(f"changed to fit what was quantized, in the precision they had: {names}")
    if account.added:
        lines.append(f"added, for the key-value cache: {', '.join(name for name, _ in fold(account.added))}")
    if account.unowned:
        lines.append(f"not part of the model, carried: {', '.join(name for name, _ in fold(account.unowned))}")
    if account.left_behind:
        lines.append(f"left behind, of the original alone: {', '.join(account.left_behind)}")
    return "\n".join(lines)
