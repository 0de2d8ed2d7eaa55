"""compressed-tensors' config groups, read without trusting them: a wrong value is a finding, not an exception.

Source: compressed-tensors 0.20.0, `QuantizationScheme` and `QuantizationArgs`, both of which forbid unknown keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lowbit.header import as_object
from lowbit_hf.patterns import PREFIX, Pattern, fault_in

T = TypeVar("T")

SCHEME_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
ARGUMENT_KEYS = frozenset(
    {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"}
    | {"scale_dtype", "zp_dtype", "observer", "observer_kwargs"}
)
FORMATS: dict[str, str] = {
    "int-quantized": "weight",
    "float-quantized": "weight",
    "naive-quantized": "weight",
    "mxfp8-quantized": "weight",
    "pack-quantized": "weight_packed",
    "nvfp4-pack-quantized": "weight_packed",
    "mxfp4-pack-quantized": "weight_packed",
    "mxfp6-pack-quantized": "weight_packed",
}
"""File formats, and the tensor that holds the codes."""

_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_PARTS = ("weights", "input_activations", "output_activations")


@dataclass(frozen=True, slots=True)
class Arguments:
    """One QuantizationArgs, with the defaults that compressed-tensors gives absent keys."""

    num_bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None
    dynamic: bool | str
    actorder: str | None
    scale_dtype: str | None


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a config group, where in it, and what to do."""

    path: str
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of `config_groups`."""

    name: str
    # As it stands in the config.
    raw: Mapping[str, Any]
    targets: tuple[str, ...]
    # Its own, or the config's.
    format: str | None
    # Whether `format` is its own.
    explicit: bool
    weights: Arguments | None
    inputs: Arguments | None
    problems: tuple[Problem, ...] = field(default=())

    @property
    def key(self) -> str:
        """Its path in `config.json`."""
        return f"quantization_config.config_groups.{self.name}"


class Names(Generic[T]):
    """What entries of `targets` or `ignore` stand for, by module: names come before patterns, then the first counts."""

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        """Keep entries with what each stands for; one that starts with `re:` is a pattern that a name's start fits."""
        self._names: dict[str, T] = {}
        self._patterns: list[tuple[Pattern, T]] = []
        for entry, value in entries:
            if not entry.startswith(PREFIX):
                self._names.setdefault(entry, value)
            elif bad_pattern(entry) is None:
                self._patterns.append((Pattern(entry.removeprefix(PREFIX)), value))

    def find(self, module: str) -> T | None:
        """What stands for a module; None: nothing does."""
        if module in self._names:
            return self._names[module]
        return next((value for pattern, value in self._patterns if pattern.starts(module)), None)


def read_group(name: str, raw: object, default_format: object) -> Group:
    """A config group and all that is wrong with its form."""
    entry = as_object(raw) or {}
    problems = [] if entry else [Problem("", f"a config group is an object, not {raw!r}", "write it anew")]
    problems += _check_keys(entry)
    targets = entry.get("targets")
    named = tuple(t for t in targets if isinstance(t, str)) if isinstance(targets, list) else ()
    problems += _check_targets(targets, named)
    arguments: dict[str, Arguments | None] = {}
    for part in _PARTS:
        given = entry.get(part)
        arguments[part] = None if given is None else _read_arguments(part, given, problems)
    own = entry.get("format")
    stored = own or default_format
    return Group(
        name=name,
        raw=entry,
        targets=tuple(target for target in named if bad_pattern(target) is None),
        format=stored if isinstance(stored, str) else None,
        explicit=own is not None,
        weights=arguments["weights"],
        inputs=arguments["input_activations"],
        problems=tuple(problems),
    )


def _check_keys(entry: Mapping[str, object]) -> Iterator[Problem]:
    fix = "delete the key: readers refuse a config with keys they do not know"
    for key in sorted(entry.keys() - SCHEME_KEYS):
        yield Problem(key, f"compressed-tensors does not define the key {key!r} of a config group", fix)
    for part in _PARTS:
        for key in sorted((as_object(entry.get(part)) or {}).keys() - ARGUMENT_KEYS):
            yield Problem(f"{part}.{key}", f"compressed-tensors does not define the key {key!r} of {part}", fix)


def _check_targets(targets: object, named: tuple[str, ...]) -> Iterator[Problem]:
    if not isinstance(targets, list) or not named or len(named) != len(targets):
        yield Problem("targets", f"targets are {targets!r}, not a list of names", 'write "targets": ["Linear"]')
    for target in named:
        if (problem := bad_pattern(target)) is not None:
            yield Problem("targets", f"{target!r} is a malformed pattern: {problem}", "correct the regular expression")


def bad_pattern(target: str) -> str | None:
    """Why a target that starts with `re:` is no regular expression; None: it is one, or a plain name."""
    return fault_in(target.removeprefix(PREFIX)) if target.startswith(PREFIX) else None


def _read_arguments(part: str, given: object, problems: list[Problem]) -> Arguments | None:
    args = as_object(given)
    if args is None:
        problems.append(Problem(part, f"{part} is {given!r}, not an object", "write its num_bits, type and strategy"))
        return None
    group, actorder, dtype = args.get("group_size"), args.get("actorder"), args.get("scale_dtype")
    inferred = "tensor" if group is None else "channel" if group == -1 else "group"
    found: dict[str, Any] = {
        "num_bits": args.get("num_bits", 8),
        "type": args.get("type", "int"),
        "symmetric": args.get("symmetric", True),
        "strategy": args.get("strategy") or inferred,
        "group_size": group,
        "dynamic": args.get("dynamic", False),
    }
    wrong = [(key, needed) for key, value in found.items() if (needed := _needed(key, value)) is not None]
    for key, needed in wrong:
        problems.append(Problem(f"{part}.{key}", f"{key} is {found[key]!r}", f"give {needed}"))
    if wrong:
        return None
    return Arguments(
        **found,
        actorder=("group" if actorder is True else str(actorder)) if actorder else None,
        scale_dtype=dtype if isinstance(dtype, str) else None,
    )


def _needed(key: str, value: object) -> str | None:
    """What the value of a key should be, in words; None: it is that."""
    whole = type(value) is int  # to isinstance, True is one
    match key:
        case "num_bits":
            return None if whole and 1 <= value <= 16 else "a whole number of bits"
        case "group_size":
            return None if value is None or (whole and (value == -1 or value > 0)) else "a positive number, -1 or null"
        case "type":
            return None if value in ("int", "float") else "'int' or 'float'"
        case "symmetric":
            return None if isinstance(value, bool) else "true or false"
        case "dynamic":
            return None if value in (True, False, "local") else "true, false or 'local'"
        case _:
            return None if value in _STRATEGIES else f"one of {', '.join(_STRATEGIES)}"
