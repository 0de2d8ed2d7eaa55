"""`lowbit lint`: whether a checkpoint loads elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.command import DONE, PROBLEM
from lowbit.errors import RecipeError
from lowbit.table import align
from lowbit_hf.commands.options import AsJson, Model
from lowbit_hf.commands.running import say, say_json, subcommand
from lowbit_hf.hub import find_model

if TYPE_CHECKING:
    from lowbit_hf.lint import Finding, Report, Verdict

_NAMES = ("vllm", "transformers", "sglang")


@subcommand("lint", "lowbit lint ./Qwen3-8B-W4A16 --runtime vllm --tp 2 --gpu h100")
def lint(
    model: Model,
    runtime: Annotated[
        list[str], typer.Option(metavar="|".join(_NAMES), help="who shall load it; repeatable; default: all")
    ] = [],  # noqa: B006 - typer's way to say that an option may repeat
    tp: Annotated[int, typer.Option("--tp", metavar="N", min=1, help="GPUs each layer is divided among")] = 1,
    gpu: Annotated[str | None, typer.Option(metavar="GPU", help="GPU it shall run on, such as h100 or sm90")] = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Find what keeps a checkpoint from loading in vLLM, transformers or SGLang, and what to do about it.

    Reads headers and scales only. Leaves with 1 if there is an error.
    """
    from lowbit_hf.lint import lint as check  # noqa: PLC0415
    from lowbit_hf.lint.gpus import capability_of  # noqa: PLC0415

    for name in runtime:
        if name not in _NAMES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(_NAMES)}", param_hint="'--runtime'")
    try:
        if gpu is not None:
            capability_of(gpu)
    except RecipeError as error:
        raise typer.BadParameter(str(error), param_hint="'--gpu'") from error
    report = check(find_model(model), runtime, tp=tp, gpu=gpu)
    if as_json:
        say_json(asdict(report))
    else:
        show(report)
    return PROBLEM if report.failed else DONE


def show(report: Report) -> None:
    """Print findings and verdicts."""
    for finding in report.findings:
        say(_line(finding))
    say("\n".join(align([_summary(verdict) for verdict in report.verdicts])))


def _line(finding: Finding) -> str:
    who = ", ".join(finding.runtimes) + (f" on {finding.gpu}" if finding.gpu else "")
    return f"{finding.severity}: {finding.key} [{who}]\n  {finding.what}\n  fix: {finding.fix}"


def _summary(verdict: Verdict) -> dict[str, str]:
    return {
        "runtime": f"{verdict.runtime} {verdict.version}",
        "loads": "yes" if verdict.loads else "no",
        "schemes": verdict.told() or "nothing is quantized by compressed-tensors",
    }
