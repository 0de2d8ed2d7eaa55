"""What a quantization run did to a model and how well it went: as dataclasses, as JSON, and as one page of HTML."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, cast, get_args, get_origin, get_type_hints

import torch

from lowbit import page
from lowbit.errors import CheckpointError
from lowbit.header import as_object, quote

_VERSION: Final = 1
# No number of a report is as large, and figures drawn from larger ones would overflow.
_MOST: Final = 1e30
_WORDS: Final = {str: "a string", int: "a whole number", float: "a finite number", NoneType: "null"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight that was quantized, and how it fared."""

    name: str
    shape: tuple[int, ...]
    format: str
    # How its input is rounded; None: it is not.
    activation: str | None
    algorithm: str
    # Stored bits a weight, scales and zero points included.
    bits: float
    # Index of the decoder block it is in; None: in none.
    block: int | None
    # dB.
    weight_sqnr: float
    # dB, of W x over the calibration inputs; None: nothing was calibrated.
    output_sqnr: float | None
    # Name of the kernel that would run it; None: none does.
    kernel: str | None
    seconds: float
    # Input channels of largest magnitude: (channel, its amax over the median channel's).
    outliers: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A decoder block, and the error that has gathered up to its output."""

    index: int
    name: str
    # dB, of its output against the unquantized model's.
    sqnr: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """What the experts of one weight saw of the calibration data."""

    name: str
    # Calibration tokens of each expert.
    tokens: tuple[int, ...]
    # Indices of the experts whose Hessian is in part, or all, that shared by all.
    fallback: tuple[int, ...]
    # Indices of the experts that were sent more tokens for their Hessian, those that came closest to being theirs.
    topped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A parameter that was left as it was, and why."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run: what was asked for, what every parameter became, how well, and what it took."""

    # Name of the model.
    title: str
    scheme: str
    algorithm: str
    # How a key-value cache may be kept, by scales that were measured for it; None: there are none.
    kv_cache: str | None = None
    # The command line that does it again.
    command: str
    # In the model's order.
    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    experts: tuple[Experts, ...]
    kept: tuple[Kept, ...]
    # Bytes of all parameters.
    bytes_before: int
    bytes_after: int
    # Mean over the quantized weights, scales and zero points included.
    bits_per_weight: float
    # Share of the bytes before that became low-bit, from 0 to 1.
    coverage: float
    seconds: float
    # Bytes: the most that was used, the most that was expected, the most that was allowed; None: unknown, unlimited.
    peak_memory: int | None
    planned_memory: int | None
    max_memory: int | None
    # The same of the GPU's memory, by what tensors took of it; None also where there was no GPU.
    peak_gpu: int | None = None
    planned_gpu: int | None = None
    max_gpu: int | None = None
    # Such as file, tokens, samples, sequence length, seed; empty: nothing was calibrated.
    calibration: Mapping[str, str | int | float]
    # What `environment()` told.
    environment: Mapping[str, str]

    def to_json(self) -> str:
        """All fields in the order above, under a version; numbers that are not finite become null."""
        plain = cast("dict[str, object]", _plain(self))
        return json.dumps({"version": _VERSION} | plain, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that `to_json` wrote; null reads as None, or as NaN where a number must be.

        Raises:
            CheckpointError: the text is not JSON, not a report, or one of another version.
        """
        try:
            members = as_object(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"report is not JSON: {error}; needed is what Report.to_json wrote") from error
        if members is None or "version" not in members:
            raise CheckpointError("report is not a JSON object with a version; needed is what Report.to_json wrote")
        if (found := members.pop("version")) != _VERSION:
            raise CheckpointError(
                f"report has version {quote(found)}, and this lowbit-core reads {_VERSION}; use the one that wrote it"
            )
        return cast("Report", _object(members, Report, "report"))

    def to_html(self) -> str:
        """One page that needs no other file and asks for none, in light and dark, for screens from a phone's up."""
        return page.render(self)


def environment() -> dict[str, str]:
    """What a run depends on besides its arguments: versions, CPU, threads, GPUs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowbit-core": version("lowbit-core"),
        "platform": platform.platform(),
        "cpu": model or platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return found


def _plain(value: object) -> object:
    """The value as JSON has it."""
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, object]", value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(value: object, cls: type[Any], where: str) -> object:
    """The dataclass that an object of JSON holds."""
    members = as_object(value)
    if members is None:
        raise CheckpointError(f"{where} is {quote(value)}, not an object")
    hints = _hints(cls)
    needed = {entry.name for entry in fields(cls) if entry.default is MISSING}
    if wrong := sorted((needed - members.keys()) | (members.keys() - hints.keys())):
        word = "lacks" if wrong[0] in hints else "has the unknown field"
        raise CheckpointError(f"{where} {word} {quote(wrong[0])}; a report has {', '.join(hints)} there")
    return cls(**{name: _read(item, hints[name], f"{where}.{name}") for name, item in members.items()})


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(value: object, hint: Any, where: str) -> object:
    """The value that JSON holds in place of a field of type `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _object(value, cast("type[Any]", hint), where)
    if origin is tuple:
        return _tuple(value, args, where)
    if origin is Mapping:
        members = as_object(value)
        if members is None:
            raise CheckpointError(f"{where} is {quote(value)}, not an object")
        return {key: _read(item, args[1], f"{where}.{key}") for key, item in members.items()}
    return _scalar(value, args if origin is UnionType else (hint,), where)


def _tuple(value: object, args: tuple[Any, ...], where: str) -> tuple[object, ...]:
    """A tuple of any length, `(X, ...)`, or of one item for each of `args`."""
    items = cast("list[object]", value) if isinstance(value, list) else None
    if items is None or (args[-1] is not ... and len(items) != len(args)):
        raise CheckpointError(f"{where} is {quote(value)}, not a list{'' if args[-1] is ... else f' of {len(args)}'}")
    hints = args[:1] * len(items) if args[-1] is ... else args
    return tuple(_read(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(items, hints, strict=True)))


def _scalar(value: object, kinds: tuple[Any, ...], where: str) -> object:
    # type(), for True is an int to isinstance.
    kind = type(value)
    # No count is larger, and not every larger one is a float.
    sound = not isinstance(value, int | float) or abs(value) < _MOST
    if kind in kinds and sound:
        return value
    if float in kinds and value is None:
        return math.nan
    if float in kinds and isinstance(value, int) and kind is int and sound:
        return float(value)
    words = " or ".join(_WORDS[kind] for kind in kinds)
    raise CheckpointError(f"{where} is {quote(value)}, not {words}")
