"""`lowbit export` and `lowbit dequantize`: the same numbers in another layout, or plain."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.command import DONE
from lowbit.table import fold, size
from lowbit_hf.commands.options import AsJson, Model
from lowbit_hf.commands.running import command_line, say, say_json, subcommand
from lowbit_hf.gguf.source import open_checkpoint
from lowbit_hf.hub import find_model
from lowbit_hf.progress import Meter

if TYPE_CHECKING:
    from lowbit_hf.convert import Conversion
    from lowbit_hf.layouts import Writer

_AS = "compressed-tensors, modelopt, gptq, gptq_v2, awq, deepseek-fp8, mxfp4-gptoss, gguf (llama.cpp's) or lowbit"
_GGUF = "gguf"

Out = Annotated[Path, typer.Option("-o", "--out", help="folder to make; appears whole or not at all")]
OutFor = Annotated[
    Path,
    typer.Option("-o", "--out", help="folder to make, for gguf with one model.gguf; appears whole or not at all"),
]
Pre = Annotated[
    str | None,
    typer.Option("--pre", metavar="NAME", help="for gguf: how llama.cpp shall cut text, where lowbit cannot tell"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")]


@subcommand("export", "lowbit export ./Qwen3-8B-W4A16 --as gptq -o ./Qwen3-8B-GPTQ")
def export(
    model: Model,
    layout: Annotated[str, typer.Option("--as", metavar="LAYOUT", help=_AS)],
    out: OutFor,
    pre: Pre = None,
    overwrite: Overwrite = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Write a quantized checkpoint in another layout: the same codes and scales, packed as other programs read them.

    What is written is read back and compared; a conversion that is not exact says so, and by how much.
    """
    from lowbit_hf.layouts import WRITERS  # noqa: PLC0415

    if pre is not None and layout != _GGUF:
        raise typer.BadParameter("only --as gguf names a pre-tokenizer", param_hint="'--pre'")
    if layout == _GGUF:
        if out.suffix == ".gguf":
            msg = f"{out} looks like a file; name a folder, and the file is model.gguf in it"
            raise typer.BadParameter(msg, param_hint="'--out'")
        return _export_gguf(model, out, pre, overwrite=overwrite, as_json=as_json)
    if layout not in WRITERS:
        known = ", ".join([*WRITERS, _GGUF])
        raise typer.BadParameter(f"{layout!r} is not one of {known}", param_hint="'--as'")
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
    from lowbit_hf.convert import convert  # noqa: PLC0415

    folder = find_model(model)
    with _meter(folder, out) as meter:
        made = convert(folder, out, writer, overwrite=overwrite, command=command_line(), advance=meter.advance)
    return _tell(made, out, None if writer is None else writer.name, as_json=as_json)


def _export_gguf(model: str, out: Path, pre: str | None, *, overwrite: bool, as_json: bool) -> int:
    from lowbit_hf.gguf.export import export  # noqa: PLC0415

    folder = find_model(model)
    with _meter(folder, out) as meter:
        made = export(folder, out, pre=pre, overwrite=overwrite, command=command_line(), advance=meter.advance)
    return _tell(made, out, _GGUF, as_json=as_json)


def _meter(folder: Path, out: Path) -> Meter:
    with open_checkpoint(folder) as stored:
        return Meter(f"write {out.name}", stored.nbytes)


def _tell(made: Conversion, out: Path, layout: str | None, *, as_json: bool) -> int:
    if as_json:
        say_json({"out": str(out), **asdict(made)})
        return DONE
    say(
        f"{out}: {made.weights} weights as {layout or 'plain'}, {made.carried} other tensors and {len(made.files)} "
        f"files carried; {size(made.bytes_before)} -> {size(made.bytes_after)}"
    )
    if layout is not None and not made.inexact:
        say("exact: every weight reads back with the values that it had")
    if made.inexact:
        worst = max(made.inexact.values())
        names = ", ".join(name for name, _ in fold(made.inexact))
        say(f"not exact: {len(made.inexact)} weights changed, by up to {worst:.2g} of their largest value: {names}")
    if made.left_behind:
        say(f"left behind, of the original alone: {', '.join(made.left_behind)}")
    return DONE
