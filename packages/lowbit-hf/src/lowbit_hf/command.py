"""The subcommands that `lowbit-hf` adds to the `lowbit` command; each is a function of its arguments."""

from __future__ import annotations

import atexit
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from importlib.resources import as_file, files
from math import inf, isfinite, isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from lowbit.command import DONE, PROBLEM
from lowbit.errors import CheckpointError, RecipeError
from lowbit.report import Report
from lowbit.table import align, fold, size
from lowbit_hf.hub import find_model
from lowbit_hf.progress import Meter
from lowbit_hf.schemes import ALIASES, SCHEMES, Scheme, scheme

# transformers takes seconds to import, so what needs it is imported by the command that runs it.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowbit_algos import Method
    from lowbit_hf.budget import Budget
    from lowbit_hf.evaluate import Evaluation
    from lowbit_hf.job import Job
    from lowbit_hf.mixing import Mix
    from lowbit_hf.quantize import Account
    from lowbit_hf.texts import Calibration

# What `--to auto` chooses from.
_AUTO: tuple[str, ...] = ("W3A16", "W4A16", "W4A16_G32", "W8A16")
_COMPARED = ("W8A8", "W4A16", "FP8_DYNAMIC", "MXFP8", "MXFP4A16", "NVFP4A16")

Mode = Literal["floor", "ceil", "even", "rceil"]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder (config.json and safetensors), or a hub id")
]
To = Annotated[str, typer.Option(metavar="SCHEME", help="scheme of every Linear and expert; see: lowbit schemes")]
Tos = Annotated[
    str,
    typer.Option(
        metavar="SCHEME",
        help="scheme of every Linear and expert (see: lowbit schemes); or several and KEEP by commas, or auto",
    ),
]
Bits = Annotated[float | None, typer.Option(metavar="BITS", help="of several schemes, the least harm within this mean")]
MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", metavar="NATS", help="of several schemes, the fewest bits within this divergence"),
]
Rules = Annotated[
    list[str], typer.Option("--rule", metavar="'GLOB=SCHEME'", help="another scheme for these; repeatable")
]
Keep = Annotated[list[str], typer.Option(metavar="GLOB", help="leave these as they are; repeatable, asked first")]
Device = Annotated[str | None, typer.Option(metavar="cpu|cuda", help="where to compute; default: cuda if there is one")]
ScaleModes = Annotated[Mode, typer.Option("--scale-mode", help="how MX block scales are rounded to powers of two")]
Coverage = Annotated[float, typer.Option("--min-coverage", help="fail if a smaller share of all bytes becomes low-bit")]
Nonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="keep weights with NaN or infinity unquantized")]
AlgorithmOf = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="rtn or gptq, smoothquant or awq, rotation, learned, distilled; or some joined by +. Needs --calibrate",
    ),
]
Algorithms = Annotated[
    list[str], typer.Option("--algorithm", metavar="NAME", help="an algorithm to try, as for quantize; repeatable")
]
Calibrate = Annotated[
    list[Path], typer.Option(metavar="FILE", help="text to calibrate on: .txt, .jsonl or .parquet; repeatable")
]
Samples = Annotated[int, typer.Option(metavar="N", help="windows of the text to calibrate on")]
Length = Annotated[int, typer.Option("--seq-len", metavar="N", help="tokens of a window")]
Seed = Annotated[int, typer.Option(metavar="N", help="which windows are chosen")]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="memory the run may take, such as 4GiB; one that needs more is refused"),
]
MaxGpu = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="the GPU's memory that it may take, with --device cuda; held to in the same way"),
]
OnePass = Annotated[bool, typer.Option("--one-pass", help="feed blocks what the original model makes")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Text = Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text; default: 300 kB that lowbit-hf brings")]
Tokens = Annotated[int | None, typer.Option(metavar="N", min=2, help="use only the text's first N tokens")]


def quantize(argv: list[str]) -> int:
    """Make a checkpoint low-bit, from disk to disk."""
    return _run(_quantize, argv)


def plan(argv: list[str]) -> int:
    """Show what quantize would do to every tensor, and do nothing."""
    return _run(_plan, argv)


def eval(argv: list[str]) -> int:  # noqa: A001 - the name of the command
    """Measure perplexity, and the distance from a base model."""
    return _run(_eval, argv)


def compare(argv: list[str]) -> int:
    """Quantize a model by several schemes and table what each one costs."""
    return _run(_compare, argv)


def inspect(argv: list[str]) -> int:
    """Show what a checkpoint holds, tensor by tensor."""
    return _run(_inspect, argv)


def diff(argv: list[str]) -> int:
    """Compare two checkpoints tensor by tensor, straight from disk."""
    return _run(_diff, argv)


def synthesize(argv: list[str]) -> int:
    """Let a model write more text to calibrate it on."""
    return _run(_synthesize, argv)


def schemes(argv: list[str]) -> int:
    """List the schemes that --to takes, with their bits per weight."""
    return _run(_schemes, argv)


def _run(command: Callable[..., int], argv: list[str]) -> int:
    """Run one command; wrong arguments leave with exit code 2 (typer's), LowbitErrors go up to `lowbit`."""
    name = command.__name__.removeprefix("_")

    @wraps(command)
    def leave(*args: Any, **kwargs: Any) -> None:
        raise typer.Exit(command(*args, **kwargs))

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, epilog=_EXAMPLES[name])(leave)
    try:
        typer.main.get_command(app).main(argv, prog_name=f"lowbit {name}")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else DONE
    return DONE


def _quantize(
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
    bits_per_weight: Bits = None,
    max_kl: MaxKl = None,
    max_memory: MaxMemory = None,
    max_gpu: MaxGpu = None,
    device: Device = None,
    scale_mode: ScaleModes = "even",
    min_coverage: Coverage = 0.0,
    allow_nonfinite: Nonfinite = False,  # noqa: FBT002
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")] = False,  # noqa: FBT002
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Make a checkpoint low-bit, from disk to disk, by rounding to nearest or by an algorithm that does better.

    Linear layers and experts get SCHEME; the output head and routers stay. A run that was stopped continues when the
    same command is given again. The result is in compressed-tensors layout, which transformers and vLLM read.
    """
    if out == Path() and not dry_run:
        raise typer.BadParameter("needed is a folder to write to", param_hint="'-o' / '--out'")
    device = _joined(_device(device))
    if max_gpu is not None and not device.startswith("cuda"):
        raise typer.BadParameter(f"bounds a GPU's memory, and this run computes on {device}", param_hint="'--max-gpu'")
    text = _calibration(calibrate, samples, seq_len, seed)
    method = _method(algorithm, scale_mode, sequential=not one_pass, calibrated=text is not None)
    most = None if max_memory is None else _bytes_of(max_memory)
    most_gpu = None if max_gpu is None else _bytes_of(max_gpu, "--max-gpu")

    def job_of(to: str, rules: list[str], kept: list[str]) -> Job:
        return _job(
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
        )

    if (names := _several(to)) or bits_per_weight is not None or max_kl is not None:
        mix = _mix(names, rule, keep, job_of, device, bits_per_weight, max_kl, calibrated=text is not None)
        _print_note(str(mix))
        rule = [*rule, *(f"{name}={scheme.name}" for name, scheme in mix.rules)]
        to, keep = mix.to.name, [*keep, *mix.keep]
    job = job_of(to, rule, keep)
    _require_data(job)
    if dry_run:
        return _show_plan(job, _foreseen(job, device), as_json=as_json)
    account = _carry_out(job, out, _device(device), overwrite=overwrite)
    if account is None:
        return DONE
    report = Report.from_json((out / "report.json").read_text(encoding="utf-8"))
    if as_json:
        _print_json(_account_json(job, account, out) | {"memory": _memory_json(report)})
        return DONE
    _print(
        f"{out}: {account.quantized} of {len(account.tensors)} tensors, {job.plan.coverage:.1%} of the bytes, "
        f"are low-bit, {job.bits_per_weight:.4g} bits per weight; "
        f"{size(job.checkpoint.nbytes)} -> {size(job.output_bytes)}"
    )
    _print(_nothing_lost(account))
    if told := _memory_taken(report):
        _print(told)
    _print(f"report: {out / 'report.html'}")
    _print(f"next: lowbit eval {out} --against {model}\n      vllm serve {out}")
    return DONE


def _plan(
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
    job = _job(model, to, rule, keep, _device(device), "even", min_coverage, allow_nonfinite=allow_nonfinite)
    return _show_plan(job, as_json=as_json)


def _eval(
    model: Model,
    text: Text = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="base model to measure the distance from")] = None,
    device: Device = None,
    tokens: Tokens = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Measure perplexity on a text; against a base also mean KL divergence and top-1 agreement."""
    from lowbit_hf.loading import load  # noqa: PLC0415

    folder, where = find_model(model), _device(device)
    base = None if against is None else load(find_model(against), device=where)
    loaded = load(folder, device=where)
    result = _evaluate(loaded, base, _token_ids(folder, text, tokens), model)
    if as_json:
        _print_json({"model": model, "against": against, **asdict(result)})
    else:
        _print(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens")
        if result.kl is not None and result.top1 is not None:
            _print(f"against {against}: mean KL {result.kl:.5f} nats a token, top-1 agreement {result.top1:.2%}")
    return DONE if isfinite(result.perplexity) else PROBLEM


def _compare(
    model: Model,
    to: Annotated[list[str], typer.Option(metavar="SCHEME", help="a scheme to try; repeatable")] = list(_COMPARED),  # noqa: B006
    algorithm: Algorithms = ["rtn"],  # noqa: B006
    calibrate: Calibrate = [],  # noqa: B006
    samples: Samples = 128,
    seq_len: Length = 512,
    seed: Seed = 0,
    text: Text = None,
    device: Device = None,
    tokens: Tokens = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="keep the checkpoints here, one folder a scheme")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace checkpoints that exist there")] = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Quantize a model by several schemes, evaluate each against the original, and print one table."""
    from lowbit_hf.loading import load  # noqa: PLC0415

    folder, where = find_model(model), _device(device)
    data = _calibration(calibrate, samples, seq_len, seed)
    jobs = {
        (name, each): _job(
            model,
            name,
            [],
            [],
            where,
            "even",
            0.0,
            allow_nonfinite=False,
            calibration=data,
            method=_method(each, "even", sequential=True, calibrated=data is not None),
        )
        for name in dict.fromkeys(name.upper() for name in to)
        for each in dict.fromkeys(algorithm)
    }
    for job in jobs.values():
        _require_data(job)
    base = load(folder, device=where)
    ids = _token_ids(folder, text, tokens)
    result = _evaluate(base, None, ids, "the original")
    dtype = str(base.dtype).removeprefix("torch.")
    stored = next(iter(jobs.values())).checkpoint.nbytes
    rows: list[dict[str, Any]] = [_table_row(dtype, None, 8.0 * base.dtype.itemsize, stored, result)]
    with TemporaryDirectory(prefix="lowbit-") as scratch:
        parent = Path(scratch) if out is None else out
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"cannot make the folder {parent}: {error}"
            raise CheckpointError(msg) from error
        for (name, each), job in jobs.items():
            target = parent / (name if each == "rtn" else f"{name}-{each}")
            _carry_out(job, target, where, overwrite=overwrite)
            result = _evaluate(load(target, device=where), base, ids, target.name)
            rows.append(_table_row(name, each, job.bits_per_weight, job.output_bytes, result))
    if as_json:
        _print_json({"model": model, "results": rows})
    else:
        several = any(row["algorithm"] not in {None, "rtn"} for row in rows)
        _print("\n".join(align([_table_cells(row, algorithm=several) for row in rows])))
    return DONE


def _inspect(model: Model, as_json: AsJson = False) -> int:  # noqa: FBT002
    """Show what a checkpoint holds: every tensor's shape, format and bytes; alike layers in one line."""
    from lowbit_hf.difference import Weights  # noqa: PLC0415

    weights = Weights(find_model(model))
    rows = weights.describe()
    weights.close()
    if as_json:
        _print_json(rows)
        return DONE
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["stored"]), []).append(row)
    cells = []
    for (shape, stored), alike in groups.items():
        total = sum(row["bytes"] for row in alike) / len(alike)
        for name, count in fold(row["name"] for row in alike):
            cells.append(
                {"tensor": name, "shape": "x".join(map(str, shape)), "stored": stored, "size": size(total * count)}
            )
    _print("\n".join(align(cells)))
    _print(f"\n{len(rows)} tensors, {size(sum(row['bytes'] for row in rows))}")
    return DONE


def _diff(
    a: Annotated[str, typer.Argument(metavar="A", help="the original")],
    b: Annotated[str, typer.Argument(metavar="B", help="what became of it")],
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Compare two checkpoints tensor by tensor, straight from disk, by SQNR (20 dB: the error is 10 % of the signal).

    Leaves with 1 if a tensor is in only one of them.
    """
    from lowbit_hf.difference import Weights, compare  # noqa: PLC0415

    first, second = find_model(a), find_model(b)
    weights = Weights(first)
    weights.close()
    with Meter("diff", len(weights.names)) as meter:
        found = compare(first, second, advance=lambda _: meter.advance(1))
    lost = bool(found.only_a or found.only_b)
    if as_json:
        rows = [asdict(difference) for difference in found.differences]
        _print_json({"tensors": rows, "only_a": found.only_a, "only_b": found.only_b})
        return PROBLEM if lost else DONE
    # A NaN is a difference too, and the worst.
    changed = sorted((d for d in found.differences if d.largest != 0), key=lambda d: -inf if isnan(d.sqnr) else d.sqnr)
    cells = [
        {
            "tensor": d.name,
            "A": d.stored_a,
            "B": d.stored_b,
            "SQNR dB": f"{d.sqnr:.2f}",
            "largest error": f"{d.largest:.3g}",
        }
        for d in changed
    ]
    _print("\n".join(align(cells)))
    _print(
        f"{chr(10) if cells else ''}{len(changed)} tensors differ, {len(found.differences) - len(changed)} are equal"
    )
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            _print(f"only in {side}: {', '.join(name for name, _ in fold(names))}")
    return PROBLEM if lost else DONE


def _synthesize(
    model: Model,
    source: Annotated[Path, typer.Option("--from", metavar="FILE", help="text to begin with, as for --calibrate")],
    out: Annotated[Path, typer.Option("-o", "--out", help="JSON lines to make, NAME.jsonl; whole or not at all")],
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="documents to write")] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", metavar="N", help="tokens of a document")] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="which beginnings, and what is drawn after them")] = 0,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="tokens of FILE that begin a document")] = 8,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")] = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Let a causal language model write more text to calibrate it on, where there is too little.

    Each document begins with a few tokens of FILE and goes on with what the model predicts, sampled as it is. The same
    seed writes the same text on the same device.
    """
    from lowbit_hf.synthesis import synthesize  # noqa: PLC0415
    from lowbit_hf.texts import Calibration  # noqa: PLC0415

    folder, where = find_model(model), _device(device)
    prompts = Calibration((source,), samples, prompt_tokens, seed)
    with Meter(f"synthesize {out.name}", samples * seq_len) as meter:
        synthesize(folder, prompts, out, length=seq_len, device=where, overwrite=overwrite, advance=meter.advance)
    if as_json:
        _print_json({"out": str(out), "documents": samples, "tokens": samples * seq_len, "seed": seed})
    else:
        _print(f"{out}: {samples} documents of {seq_len} tokens\nnext: --calibrate {source} --calibrate {out}")
    return DONE


def _schemes(as_json: AsJson = False) -> int:  # noqa: FBT002
    """List the schemes that --to takes, with bits per weight; schemes of integers in groups also take _G and a size."""
    rows = [
        {
            "scheme": entry.name,
            "bits per weight": f"{entry.bits_per_weight:.3f}",
            "weights": str(entry.weight),
            "inputs": "as they are" if entry.activation is None else str(entry.activation),
            "file format": entry.file_format,
            "calibration": "needed" if entry.needs_data else "",
        }
        for entry in SCHEMES.values()
    ]
    if as_json:
        _print_json(rows)
    else:
        _print("\n".join(align(rows)))
        _print("\nother names: " + ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items()))
    return DONE


def _job(
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
) -> Job:
    from lowbit_hf.job import prepare  # noqa: PLC0415

    wanted = _scheme(to, "--to")
    return prepare(
        find_model(model),
        wanted,
        rules=[_parse_rule(rule) for rule in rules],
        keep=keep,
        mode=mode,
        min_coverage=min_coverage,
        allow_nonfinite=allow_nonfinite,
        device=device,
        calibration=calibration,
        method=method,
        max_memory=max_memory,
        max_gpu=max_gpu,
    )


def _bytes_of(text: str, option: str = "--max-memory") -> int:
    """A size such as 4GiB, 500 MB or 1e9."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?) *(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise typer.BadParameter(f"{text!r} is not a size, such as 4GiB", param_hint=f"'{option}'")
    return int(number * (1024 if match[3] else 1000) ** (" kmgt".index(match[2]) if match[2] else 0))


def _calibration(files: list[Path], samples: int, length: int, seed: int) -> Calibration | None:
    from lowbit_hf.texts import Calibration  # noqa: PLC0415

    for file in files:
        if not file.is_file():
            raise typer.BadParameter(f"there is no file {file}", param_hint="'--calibrate'")
    return Calibration(tuple(files), samples, length, seed) if files else None


def _method(algorithm: str, mode: Mode, *, sequential: bool, calibrated: bool) -> Method:
    """What an algorithm's name means."""
    from lowbit_algos import Method  # noqa: PLC0415

    try:
        # No file format has a place for factors that stay with a weight.
        method = Method.of(algorithm, sequential=sequential, mode=mode, pre_scale=False)
    except RecipeError as error:
        raise typer.BadParameter(str(error), param_hint="'--algorithm'") from error
    if method.name != "rtn" and not calibrated:
        msg = f"{algorithm} needs a text to calibrate on: --calibrate FILE"
        raise typer.BadParameter(msg, param_hint="'--algorithm'")
    return method


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
    found = [_scheme(name, "--to") for name in schemes]
    jobs = [(each, job_of(name, rules, keep)) for each, name in zip(found, schemes, strict=True)]
    return choose(jobs, keep=KEEP in names, device=device, bits_per_weight=bits_per_weight, max_kl=max_kl)


def _require_data(job: Job) -> None:
    from lowbit_hf.job import require_data  # noqa: PLC0415

    require_data(job)


def _parse_rule(rule: str) -> tuple[str, Scheme]:
    pattern, found, name = rule.rpartition("=")
    if not found or not pattern:
        raise typer.BadParameter(f"{rule!r} must be GLOB=SCHEME, such as '*.down_proj=W8A16'", param_hint="'--rule'")
    return pattern, _scheme(name, "--rule")


def _scheme(name: str, option: str) -> Scheme:
    """A scheme by name; one that is unknown whatever the model is wrong use."""
    try:
        return scheme(name)
    except RecipeError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{option}'") from error


def _joined(device: str) -> str:
    """The device of this process, once it has joined those that torchrun started with it."""
    from lowbit_hf.processes import join, leave  # noqa: PLC0415

    atexit.register(leave)
    return join(device)


def _carry_out(job: Job, out: Path, device: str, *, overwrite: bool) -> Account | None:
    """The account of a run; None where another process writes."""
    from lowbit_hf.quantize import run  # noqa: PLC0415

    try:
        with Meter(f"quantize {out.name}", job.checkpoint.nbytes) as meter:
            command = shlex.join(["lowbit", *sys.argv[1:]])
            return run(job, out, overwrite=overwrite, device=device, command=command, advance=meter.advance)
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted before {out} was made; the same command continues where this one stopped\n")
        raise


def _token_ids(folder: Path, text: Path | None, tokens: int | None) -> Tensor:
    from lowbit_hf.evaluate import tokenize  # noqa: PLC0415

    with as_file(files("lowbit_hf") / "data" / "text.txt") as default:
        return tokenize(folder, text or default)[:tokens]


def _evaluate(model: PreTrainedModel, base: PreTrainedModel | None, ids: Tensor, label: str) -> Evaluation:
    from lowbit_hf.evaluate import evaluate  # noqa: PLC0415

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    with Meter(f"evaluate {label}", ids.numel()) as meter:
        return evaluate(model, ids, context=min(context, 2048), base=base, advance=meter.advance)


def _foreseen(job: Job, device: str) -> Budget:
    """What a run would take of memory."""
    from lowbit_hf.quantize import foresee  # noqa: PLC0415

    return foresee(job, device)


def _show_plan(job: Job, budget: Budget | None = None, *, as_json: bool) -> int:
    if as_json:
        planned = {} if budget is None else {"planned_memory": asdict(budget.planned)}
        _print_json(json.loads(job.plan.to_json()) | planned)
    else:
        _print(str(job.plan) if budget is None else f"{job.plan}\n\n{budget}")
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
    if account.unowned:
        lines.append(f"not part of the model, carried: {', '.join(name for name, _ in fold(account.unowned))}")
    if account.left_behind:
        lines.append(f"left behind, of the original alone: {', '.join(account.left_behind)}")
    return "\n".join(lines)


def _table_row(name: str, algorithm: str | None, bits: float, stored: int, result: Evaluation) -> dict[str, Any]:
    told = {"scheme": name, "algorithm": algorithm, "bits_per_weight": bits, "bytes": stored}
    return {**told, **asdict(result)}


def _table_cells(row: dict[str, Any], *, algorithm: bool) -> dict[str, str]:
    return {
        "scheme": row["scheme"],
        **({"algorithm": row["algorithm"] or ""} if algorithm else {}),
        "bits per weight": f"{row['bits_per_weight']:.3f}",
        "size": size(row["bytes"]),
        "perplexity": f"{row['perplexity']:.3f}",
        "KL": "" if row["kl"] is None else f"{row['kl']:.5f}",
        "top-1": "" if row["top1"] is None else f"{row['top1']:.2%}",
    }


def _device(wanted: str | None) -> str:
    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="'--device'")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device on this machine", param_hint="'--device'")
    return device


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _print_note(text: str) -> None:
    """Say something beside the result, which may be JSON."""
    sys.stderr.write(text + "\n")


def _print_json(value: Any) -> None:
    """Print JSON, which has no NaN and no infinity: they become null."""
    _print(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


_EXAMPLES = {
    "quantize": "example: lowbit quantize ./Qwen3-8B --to W4A16 --rule '*.down_proj=W8A16' -o ./Qwen3-8B-W4A16",
    "plan": "example: lowbit plan ./Qwen3-8B --to NVFP4A16 --keep '*.layers.0.*'",
    "eval": "example: lowbit eval ./Qwen3-8B-W4A16 --against ./Qwen3-8B --text notes.txt",
    "compare": "example: lowbit compare ./Qwen3-8B --to W8A8 --to W4A16 --to MXFP4A16",
    "inspect": "example: lowbit inspect ./Qwen3-8B-W4A16",
    "diff": "example: lowbit diff ./Qwen3-8B ./Qwen3-8B-W4A16",
    "schemes": "example: lowbit schemes --json",
    "synthesize": "example: lowbit synthesize ./Qwen3-8B --from notes.txt --samples 384 -o more.jsonl",
}
