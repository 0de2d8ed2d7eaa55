"""`lowbit verify`: whether other programs read the same numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import Tensor

from lowbit.command import DONE, PROBLEM
from lowbit.table import align, fold
from lowbit_hf.commands.evaluating import measured, token_ids
from lowbit_hf.commands.options import AsJson, Device, Model, Text, Tokens, device_of
from lowbit_hf.commands.running import say, say_json, subcommand
from lowbit_hf.gguf.source import open_checkpoint
from lowbit_hf.hub import find_model
from lowbit_hf.progress import Meter

if TYPE_CHECKING:
    from lowbit_hf.verify.checking import Reading, Verification

_NAMES = ("compressed-tensors", "numpy", "gguf", "transformers")


@subcommand("verify", "lowbit verify ./Qwen3-8B-W4A16")
def verify(
    model: Model,
    readers: Annotated[
        list[str], typer.Option("--with", metavar="|".join(_NAMES), help="who shall read it; repeatable; default: all")
    ] = [],  # noqa: B006 - typer's way to say that an option may repeat
    text: Text = None,
    tokens: Tokens = None,
    device: Device = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="compare weights alone")] = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Read a quantized checkpoint with other programs too, compare every value, and evaluate their model and lowbit's.

    compressed-tensors' own decompressor, NumPy decoders of other layouts and the gguf package read a weight at a time,
    transformers the whole model. Leaves with 1 if a value differs, or if no reader could read it.
    """
    for name in readers:
        if name not in _NAMES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(_NAMES)}", param_hint="'--with'")
    folder = find_model(model)
    ids = None if no_eval else token_ids(folder, text, tokens)
    told = verified(folder, readers, ids, device_of(device))
    if as_json:
        say_json({"model": model, "failed": told.failed, **asdict(told)})
    else:
        show(told)
    return PROBLEM if told.failed else DONE


def verified(folder: Path, readers: list[str], ids: Tensor | None, device: str) -> Verification:
    """What the readers make of a checkpoint; models are evaluated on token `ids`, on `device`."""
    from lowbit_hf.verify.checking import Verification, compare, pair  # noqa: PLC0415

    with open_checkpoint(folder) as stored:
        meter = Meter(f"verify {folder.name}", stored.nbytes)
    with meter:
        readings = compare(folder, readers, device=device, advance=meter.advance)
    if ids is None or all(reading.refused for reading in readings):
        return Verification(readings)
    both = pair(folder, readers, device=device)
    ours = measured(both.ours, both.theirs, ids, "lowbit's model")
    theirs = measured(both.theirs, None, ids, "the other's model")
    return Verification(readings, both.how, both.hindrance, ours, theirs)


def show(told: Verification) -> None:
    """Print it."""
    say("\n".join(align([{"reader": reading.reader, "weights": _line(reading)} for reading in told.readings])))
    if told.ours is None or told.theirs is None:
        return
    # Where it cannot read it either, the table has said so.
    if told.hindrance is not None and not told.readings[-1].refused:
        say(f"transformers does not run it by itself: {told.hindrance}")
    say(f"the other model: {told.other}")
    say(
        f"perplexity over {told.ours.tokens} tokens: lowbit {told.ours.perplexity:.4f}, the other "
        f"{told.theirs.perplexity:.4f}; mean KL {told.ours.kl:.5f} nats a token, top-1 agreement {told.ours.top1:.2%}"
    )


def _line(reading: Reading) -> str:
    if reading.refused is not None:
        return f"not read: {reading.refused}"
    if not reading.unequal:
        return f"{reading.weights} of {reading.weights} equal in every value"
    names = ", ".join(name for name, _ in fold([each.name for each in reading.unequal]))
    worst = max(each.largest for each in reading.unequal)
    return f"{len(reading.unequal)} of {reading.weights} DIFFER, by up to {worst:.3g}: {names}"
