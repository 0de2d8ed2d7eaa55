"""`lowbit synthesize`: more text to calibrate on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.command import DONE
from lowbit_hf.commands.options import AsJson, Device, Model, device_of
from lowbit_hf.commands.running import say, say_json, subcommand
from lowbit_hf.hub import find_model
from lowbit_hf.progress import Meter


@subcommand("synthesize", "lowbit synthesize ./Qwen3-8B --from notes.txt --samples 384 -o more.jsonl")
def synthesize(
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

    folder, where = find_model(model), device_of(device)
    prompts = Calibration((source,), samples, prompt_tokens, seed)
    with Meter(f"synthesize {out.name}", samples * seq_len) as meter:
        synthesize(folder, prompts, out, length=seq_len, device=where, overwrite=overwrite, advance=meter.advance)
    if as_json:
        say_json({"out": str(out), "documents": samples, "tokens": samples * seq_len, "seed": seed})
    else:
        say(f"{out}: {samples} documents of {seq_len} tokens\nnext: --calibrate {source} --calibrate {out}")
    return DONE
