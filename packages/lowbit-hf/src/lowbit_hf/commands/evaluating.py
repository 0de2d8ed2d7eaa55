"""`lowbit eval` and `lowbit compare`: what a model is worth."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import as_file, files
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import Tensor

from lowbit.attention import Scheme
from lowbit.command import DONE, PROBLEM
from lowbit.errors import CheckpointError
from lowbit.staging import Staging
from lowbit.table import align, size
from lowbit_hf.commands.options import (
    Algorithms,
    AsJson,
    Calibrate,
    Device,
    Length,
    Model,
    Samples,
    Seed,
    Text,
    Tokens,
    calibration_of,
    device_of,
    method_of,
)
from lowbit_hf.commands.quantizing import carry_out, prepared
from lowbit_hf.commands.running import say, say_json, subcommand
from lowbit_hf.hub import find_model
from lowbit_hf.progress import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowbit_hf.evaluate import Evaluation

_COMPARED = ("W8A8", "W4A16", "FP8_DYNAMIC", "MXFP8", "MXFP4A16", "NVFP4A16")


@subcommand("eval", "lowbit eval ./Qwen3-8B-W4A16 --against ./Qwen3-8B --text notes.txt")
def evaluate(
    model: Model,
    text: Text = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="base model to measure the distance from")] = None,
    attention: Annotated[
        str | None, typer.Option(metavar="SCHEME", help="round the model's attention, too, as by INT8_FP8")
    ] = None,
    device: Device = None,
    tokens: Tokens = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> int:
    """Measure perplexity on a text; against a base also mean KL divergence and top-1 agreement."""
    from lowbit_hf.attention import round_attention  # noqa: PLC0415 - imports transformers, which takes seconds
    from lowbit_hf.loading import load  # noqa: PLC0415

    folder, where = find_model(model), device_of(device)
    scheme = None if attention is None else Scheme.parse(attention)
    base = None if against is None else load(find_model(against), device=where)
    loaded = load(folder, device=where)
    if scheme is not None:
        round_attention(loaded, scheme)
    result = measured(loaded, base, token_ids(folder, text, tokens), model)
    if as_json:
        say_json({"model": model, "against": against, "attention": attention, **asdict(result)})
    else:
        say(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens")
        if result.kl is not None and result.top1 is not None:
            say(f"against {against}: mean KL {result.kl:.5f} nats a token, top-1 agreement {result.top1:.2%}")
    return DONE if isfinite(result.perplexity) else PROBLEM


@subcommand("compare", "lowbit compare ./Qwen3-8B --to W8A8 --to W4A16 --to MXFP4A16")
def compare(
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
    from lowbit_hf.job import require_data  # noqa: PLC0415
    from lowbit_hf.loading import load  # noqa: PLC0415

    folder, where = find_model(model), device_of(device)
    data = calibration_of(calibrate, samples, seq_len, seed)
    jobs = {
        (name, each): prepared(
            model,
            name,
            [],
            [],
            where,
            "even",
            0.0,
            allow_nonfinite=False,
            calibration=data,
            method=method_of(each, "even", sequential=True, calibrated=data is not None),
        )
        for name in dict.fromkeys(name.upper() for name in to)
        for each in dict.fromkeys(algorithm)
    }
    for job in jobs.values():
        require_data(job)
    base = load(folder, device=where)
    ids = token_ids(folder, text, tokens)
    result = measured(base, None, ids, "the original")
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
        targets = {key: parent / (key[0] if key[1] == "rtn" else f"{key[0]}-{key[1]}") for key in jobs}
        for (name, each), job in jobs.items():
            target = targets[name, each]
            # Not settled until all are made, so that a run that is killed takes those that are for its own.
            carry_out(job, target, where, overwrite=overwrite, settle=False)
            result = measured(load(target, device=where), base, ids, target.name)
            rows.append(_table_row(name, each, job.bits_per_weight, job.output_bytes, result))
        for key, job in jobs.items():
            Staging.open(targets[key], fingerprint=job.fingerprint()).close()
    if as_json:
        say_json({"model": model, "results": rows})
    else:
        several = any(row["algorithm"] not in {None, "rtn"} for row in rows)
        say("\n".join(align([_table_cells(row, algorithm=several) for row in rows])))
    return DONE


def token_ids(folder: Path, text: Path | None, tokens: int | None) -> Tensor:
    """The first `tokens` token ids of a text, by default of the one that comes with lowbit."""
    from lowbit_hf.evaluate import tokenize  # noqa: PLC0415

    with as_file(files("lowbit_hf") / "data" / "text.txt") as default:
        return tokenize(folder, text or default)[:tokens]


def measured(model: PreTrainedModel, base: PreTrainedModel | None, ids: Tensor, label: str) -> Evaluation:
    """The quality of a model, `label` to those who wait, in windows of its context, of 2048 tokens at most."""
    from lowbit_hf.evaluate import evaluate  # noqa: PLC0415

    with Meter(f"evaluate {label}", ids.numel()) as meter:
        return evaluate(model, ids, context=min(context_of(model.config), 2048), base=base, advance=meter.advance)


def context_of(config: Any) -> int:
    """Tokens that a model takes at once."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2048)


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
