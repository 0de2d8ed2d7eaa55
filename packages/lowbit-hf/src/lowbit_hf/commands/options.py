"""Options that subcommands share, and what is made of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer

from lowbit.errors import FormatError, RecipeError
from lowbit_hf.schemes import KvCache, Scheme, scheme, scheme_of_spec

# transformers takes seconds to import, so what needs it is imported by the command that runs it.
if TYPE_CHECKING:
    from lowbit_algos import Method
    from lowbit_hf.texts import Calibration

Mode = Literal["floor", "ceil", "even", "rceil"]
Layouts = Literal["compressed-tensors", "lowbit"]
LayoutOf = Annotated[
    Layouts, typer.Option("--layout", help="of the files; lowbit holds formats and factors that others cannot")
]
KvCacheOf = Annotated[
    KvCache | None,
    typer.Option(
        "--kv-cache", help="add scales for a key-value cache in fp8, one a layer or one a head. Needs --calibrate"
    ),
]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hugging Face folder (config.json and safetensors), .gguf file, or hub id"),
]
To = Annotated[
    str,
    typer.Option(
        metavar="SCHEME", help="scheme of every Linear and expert (see: lowbit schemes), or FORMAT[+ACTIVATION]"
    ),
]
Tos = Annotated[
    str,
    typer.Option(
        metavar="SCHEME",
        help="scheme of every Linear and expert (see: lowbit schemes), or FORMAT[+ACTIVATION]; or several and KEEP by "
        "commas, or auto",
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


def device_of(wanted: str | None) -> str:
    """The device to compute on."""
    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="'--device'")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device on this machine", param_hint="'--device'")
    return device


def bytes_of(text: str, option: str = "--max-memory") -> int:
    """A size such as 4GiB, 500 MB or 1e9."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?) *(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < 1e18:
        raise typer.BadParameter(f"{text!r} is not a size, such as 4GiB", param_hint=f"'{option}'")
    return int(number * (1024 if match[3] else 1000) ** (" kmgt".index(match[2]) if match[2] else 0))


def calibration_of(files: list[Path], samples: int, length: int, seed: int) -> Calibration | None:
    """The text to calibrate on; None where there are no files."""
    from lowbit_hf.texts import Calibration  # noqa: PLC0415

    for file in files:
        if not file.is_file():
            raise typer.BadParameter(f"there is no file {file}", param_hint="'--calibrate'")
    return Calibration(tuple(files), samples, length, seed) if files else None


def method_of(
    algorithm: str, mode: Mode, *, sequential: bool, calibrated: bool, layout: Layouts = "compressed-tensors"
) -> Method:
    """What an algorithm's name means."""
    from lowbit_algos import Method  # noqa: PLC0415

    try:
        # Only lowbit's layout has a place for factors that stay with a weight.
        method = Method.of(algorithm, sequential=sequential, mode=mode, pre_scale=layout == "lowbit")
    except RecipeError as error:
        raise typer.BadParameter(str(error), param_hint="'--algorithm'") from error
    if method.name != "rtn" and not calibrated:
        msg = f"{algorithm} needs a text to calibrate on: --calibrate FILE"
        raise typer.BadParameter(msg, param_hint="'--algorithm'")
    return method


def rule_of(rule: str) -> tuple[str, Scheme]:
    """The pattern and the scheme of a --rule."""
    pattern, found, name = rule.rpartition("=")
    if not found or not pattern:
        raise typer.BadParameter(f"{rule!r} must be GLOB=SCHEME, such as '*.down_proj=W8A16'", param_hint="'--rule'")
    return pattern, scheme_of(name, "--rule")


def scheme_of(name: str, option: str) -> Scheme:
    """A scheme by name; one that is unknown whatever the model is wrong use."""
    try:
        return scheme_of_spec(name) if ":" in name else scheme(name)
    except (FormatError, RecipeError) as error:
        raise typer.BadParameter(str(error), param_hint=f"'{option}'") from error
