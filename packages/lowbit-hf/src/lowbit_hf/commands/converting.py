"""`lowbit export` and `lowbit dequantize`: the same numbers in another layout, or plain."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.command import DONE
from lowbit.table import fold, size
from lowbit_hf.commands.options import AsJson, Model
from lowbit_hf.commands.running import say, say_json, subcommand
from lowbit_hf.hub import find_model
from lowbit_hf.progress import Meter

if TYPE_CHECKING:
    from lowbit_hf.layouts import Writer

_AS = "compressed-tensors, modelopt, gptq, gptq_v2, awq, deepseek-fp8 or mxfp4-gptoss"

Out = Annotated[Path, typer.Option("-o", "--out", help="folder to make; appears whole or not at all")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")]


@subcommand("export", "lowbit export ./Qwen3-8B-W4A16 --as gptq -o ./Qwen3-8B-GPTQ")
def export(
    model: Model,
    layout: Annotated[str, typer.Option("--as", metavar="LAYOUT", help=_AS)],
    out: Out,
    overwrite: Overwrite = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Write a quantized checkpoint in another layout: the same codes and scales, packed as other programs read them.

    What is written is read back and compared; a conversion that is not exact says so, and by how much.
    """
    from lowbit_hf.layouts import WRITERS  # noqa: PLC0415

    if layout not in WRITERS:
        raise typer.BadParameter(f"{layout!r} is not one of {', '.join(WRITERS)}", param_hint="'--as'")
    return _convert(model, WRITERS[layout], out, overwrite=overwrite, as_json=as_json)


@subcommand("dequantize", "lowbit dequantize ./DeepSeek-V3 -o ./DeepSeek-V3-bf16")
def dequantize(
    model: Model,
    out: Out,
    overwrite: Overwrite = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Write a quantized checkpoint as a plain one, in the model's dtype: what its weights stand for."""
    return _convert(model, None, out, overwrite=overwrite, as_json=as_json)


def _convert(model: str, writer: Writer | None, out: Path, *, overwrite: bool, as_json: bool) -> int:
    from lowbit.shards import Checkpoint  # noqa: PLC0415
    from lowbit_hf.convert import convert  # noqa: PLC0415

    folder, command = find_model(model), shlex.join(["lowbit", *sys.argv[1:]])
    with Checkpoint.open(folder) as stored:
        count = stored.nbytes
    with Meter(f"write {out.name}", count) as meter:
        made = convert(folder, out, writer, overwrite=overwrite, command=command, advance=meter.advance)
    if as_json:
        say_json({"out": str(out), **asdict(made)})
        return DONE
    what = "plain" if writer is None else writer.name
    say(
        f"{out}: {made.weights} weights as {what}, {made.carried} other tensors and {len(made.files)} files carried; "
        f"{size(made.bytes_before)} -> {size(made.bytes_after)}"
    )
    if writer is not None and not made.inexact:
        say("exact: every weight reads back with the values that it had")
    if made.inexact:
        worst = max(made.inexact.values())
        names = ", ".join(name for name, _ in fold(made.inexact))
        say(f"not exact: {len(made.inexact)} weights changed, by up to {worst:.2g} of their largest value: {names}")
    if made.left_behind:
        say(f"left behind, of the original alone: {', '.join(made.left_behind)}")
    return DONE
