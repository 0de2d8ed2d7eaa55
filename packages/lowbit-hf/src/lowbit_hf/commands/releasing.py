"""`lowbit release`: from a model to a checkpoint that others can serve, check and trust."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import Tensor

from lowbit.command import DONE, PROBLEM
from lowbit.report import Report
from lowbit.staging import Staging
from lowbit.table import size
from lowbit_hf.commands import linting, verifying
from lowbit_hf.commands.evaluating import context_of, measured, token_ids
from lowbit_hf.commands.options import (
    AlgorithmOf,
    Calibrate,
    Device,
    Keep,
    KvCacheOf,
    Length,
    MaxGpu,
    MaxMemory,
    Model,
    Rules,
    Samples,
    Seed,
    Text,
    To,
    Tokens,
    bytes_of,
    calibration_of,
    device_of,
    method_of,
)
from lowbit_hf.commands.quantizing import carry_out, prepared
from lowbit_hf.commands.running import command_line, say, subcommand

# transformers takes seconds to import, so what needs it is imported by the command that runs it.
if TYPE_CHECKING:
    from lowbit_hf.job import Job
    from lowbit_hf.lint import Report as Lint
    from lowbit_hf.release.card import Measured


@subcommand("release", "lowbit release ./Qwen3-8B --to W4AFP8 --calibrate notes.txt -o ./Qwen3-8B-W4AFP8")
def release(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to make; appears whole or not at all")],
    to: To = "W4AFP8",
    rule: Rules = [],  # noqa: B006 - typer copies it
    keep: Keep = [],  # noqa: B006
    algorithm: AlgorithmOf = "gptq",
    calibrate: Calibrate = [],  # noqa: B006
    samples: Samples = 128,
    seq_len: Length = 512,
    seed: Seed = 0,
    kv_cache: KvCacheOf = None,
    max_memory: MaxMemory = None,
    max_gpu: MaxGpu = None,
    device: Device = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="GPU", help="GPU it shall run on, such as h100 or sm90")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", metavar="N", min=1, help="GPUs each layer is divided among")] = 1,
    text: Text = None,
    tokens: Tokens = None,
    bench: Annotated[
        list[Path],
        typer.Option("--bench", metavar="JSON", help="speed that vllm bench saved, for the model card; repeatable"),
    ] = [],  # noqa: B006
    push: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="upload it, once you have said yes")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,  # noqa: FBT002
    yes: Annotated[bool, typer.Option("--yes", help="upload without asking")] = False,  # noqa: FBT002
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")] = False,  # noqa: FBT002
) -> int:
    """Quantize a model, and prove it: lint for vLLM, read it by other programs, evaluate it, and write its model card.

    What keeps vLLM from loading the result is told before a weight is computed. OUT appears once all is done, with a
    README.md, the sha256 of every file, and reports; a run that was stopped continues when it is given again.
    """
    from lowbit_hf.job import require_data  # noqa: PLC0415
    from lowbit_hf.release.card import Card, bench_lines, front_of, serve_line, speeds_of  # noqa: PLC0415
    from lowbit_hf.release.files import SUMS, inputs_of, lay_down  # noqa: PLC0415
    from lowbit_hf.release.rehearsal import rehearsed  # noqa: PLC0415
    from lowbit_hf.release.upload import Upload  # noqa: PLC0415

    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise typer.BadParameter(f"{push!r} is not OWNER/NAME", param_hint="'--push-to-hub'")
    if push is not None and not yes and not sys.stdin.isatty():
        raise typer.BadParameter("nobody is there to ask; --yes uploads without", param_hint="'--push-to-hub'")

    where = device_of(device)
    data = calibration_of(calibrate, samples, seq_len, seed)
    job = prepared(
        model,
        to,
        rule,
        keep,
        where,
        "even",
        0.0,
        allow_nonfinite=False,
        calibration=data,
        method=method_of(algorithm, "even", sequential=True, calibrated=data is not None),
        max_memory=None if max_memory is None else bytes_of(max_memory),
        max_gpu=None if max_gpu is None else bytes_of(max_gpu, "--max-gpu"),
        kv_cache=kv_cache,
    )
    require_data(job)
    front, speeds = front_of(job.folder), {path.name: speeds_of(path) for path in bench}
    ids = token_ids(job.folder, text, tokens)
    upload = None if push is None else Upload(push, private=private)
    context = context_of(job.skeleton.config)
    command = shlex.join(["lowbit", *map(_public, sys.argv[1:])])
    sizes = f"{size(job.checkpoint.nbytes)} -> {size(job.output_bytes)}"
    say(f"{to}: {job.plan.coverage:.1%} of the bytes, {job.bits_per_weight:.4g} bits per weight; {sizes}")
    with rehearsed(job) as rehearsal:
        if _linted(rehearsal, gpu, tp).failed:
            say("nothing was done; this is what the result would be")
            return PROBLEM
    told = [job.fingerprint(), gpu, tp, push, sha256(ids.numpy().tobytes()).hexdigest(), speeds]
    fingerprint = sha256(json.dumps(told).encode()).hexdigest()
    with Staging.open(out, fingerprint=fingerprint, overwrite=overwrite, command=command_line()) as staging:
        if not staging.published:
            checkpoint = staging.scratch / "checkpoint"
            # It appears whole, and nothing but this release can have made it.
            if not checkpoint.is_dir():
                carry_out(job, checkpoint, where, overwrite=False, command=command)
            lint = _linted(checkpoint, gpu, tp)
            verification = verifying.verified(checkpoint, [], ids, where)
            verifying.show(verification)
            sound = not lint.failed and not verification.failed
            quality = _measured(job, checkpoint, ids, where, text) if sound else None
            if quality is None or not isfinite(quality.released.perplexity):
                say(f"not released; what was made is in {checkpoint}")
                return PROBLEM
            linked = not Path(model).exists()
            card = Card(
                name=push or out.name,
                base=model if linked else job.folder.resolve().name,
                linked=linked,
                original=front,
                report=Report.from_json((checkpoint / "report.json").read_text(encoding="utf-8")),
                lint=lint,
                verification=verification,
                measured=quality,
                inputs=inputs_of(job),
                speeds=speeds,
                command=command,
                tp=tp,
                context=context,
            )
            lay_down(staging, checkpoint, card.text())
            staging.publish()
    name = push or str(out)
    say(f"{out}: released, with its card (README.md) and {SUMS}\nnext: {serve_line(name, tp)}")
    for line in bench_lines(name, tp, context):
        say(f"      {line}")
    if upload is not None and (yes or typer.confirm(f"upload {upload.told(out)}?")):
        say(f"uploaded: {upload.send(out)}")
    return DONE


def _public(argument: str) -> str:
    """An argument as others shall see it: where files of mine lie is nobody's concern."""
    path = Path(argument)
    return path.name if path.is_absolute() or (os.sep in argument and path.exists()) else argument


def _linted(folder: Path, gpu: str | None, tp: int) -> Lint:
    from lowbit_hf.lint import lint  # noqa: PLC0415

    report = lint(folder, ["vllm"], tp=tp, gpu=gpu)
    linting.show(report)
    return report


def _measured(job: Job, checkpoint: Path, ids: Tensor, device: str, text: Path | None) -> Measured:
    from lowbit_hf.loading import load  # noqa: PLC0415
    from lowbit_hf.release.card import Measured  # noqa: PLC0415

    base = load(job.folder, device=device)
    original = measured(base, None, ids, "the original")
    released = measured(load(checkpoint, device=device), base, ids, "the release")
    say(
        f"perplexity: original {original.perplexity:.4f}, released {released.perplexity:.4f}; mean KL {released.kl:.5f}"
    )
    return Measured("the text that comes with lowbit" if text is None else text.name, original, released)
