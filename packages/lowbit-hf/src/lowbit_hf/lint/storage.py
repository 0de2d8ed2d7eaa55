"""Rules about the tensors of each quantized module: which there are, of what dtype and shape, and sane scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.shards import TensorEntry
from lowbit_hf.layout import format_from_config, tensors_of
from lowbit_hf.lint.arguments import FORMATS, Group
from lowbit_hf.lint.envelope import stored_otherwise
from lowbit_hf.lint.finding import Finding, name_all
from lowbit_hf.lint.subject import LOCAL, Module, Subject
from lowbit_hf.schemes import Scheme

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Tensors that are scales, and how a foreign method ends their names.
_SCALES = (
    *("weight_scale", "weight_global_scale", "input_scale", "input_global_scale", "k_scale", "v_scale"),
    *("scales", "weight_scale_inv", "weight_scale_2"),
)
# Written in the weight's dtype, but read in any.
_LOOSE = ("input_scale",)

_Defect = tuple[str, str, tuple[str, ...]]


def check_storage(subject: Subject) -> Iterator[Finding]:
    """The tensors of every quantized module against what its group stores."""
    defects: dict[_Defect, list[str]] = {}
    unreadable: dict[str, str] = {}
    skipped = {group.name for group in subject.groups if stored_otherwise(subject, group)}
    for module, group in subject.quantized:
        if group.format not in FORMATS or group.name in skipped or group.name in unreadable:
            continue
        try:
            entries = _entries(module, group)
        except LowbitError as error:
            unreadable[group.name] = str(error)
            continue
        for name, defect in _compare(subject, module, group, entries):
            defects.setdefault(defect, []).append(name)
    for group in subject.groups:
        if group.name in unreadable:
            yield Finding(
                severity="error",
                key=group.key,
                what=unreadable[group.name],
                fix="quantize again with a scheme that `lowbit schemes` lists",
                runtimes=subject.everywhere,
            )
    for (what, fix, runtimes), names in defects.items():
        yield Finding(severity="error", key=name_all(names), what=what, fix=fix, runtimes=runtimes)


def check_scales(subject: Subject) -> Iterator[Finding]:
    """NaN, infinite and zero scales, which turn into NaN far from where they are; reads the scales only."""
    bad: dict[str, list[str]] = {}
    for name, entry in subject.checkpoint.entries.items():
        local = name.rpartition(".")[2]
        scale = (local in _SCALES or local.endswith("_scales")) and entry.nbytes > 0
        if scale and (defect := _bad_scale(subject.checkpoint.read(entry))) is not None:
            bad.setdefault(defect, []).append(name)
    for defect, names in bad.items():
        yield Finding(
            severity="error",
            key=name_all(names),
            what=f"a scale is {defect}",
            fix="quantize this weight again, or keep it unquantized: its values were not finite, or all zero",
            runtimes=subject.everywhere,
        )


def _bad_scale(scale: Tensor) -> str | None:
    if scale.dtype == torch.uint8:  # e8m0, whose last code is NaN; none is zero or infinite
        return "NaN" if bool((scale == 255).any()) else None
    if scale.dtype not in (*_FLOATS, torch.float8_e4m3fn):
        return None
    values = scale.to(torch.float32)
    if bool(values.isnan().any()):
        return "NaN"
    if bool(values.isinf().any()):
        return "infinite"
    return "zero" if bool((values == 0).any()) else None


def _entries(module: Module, group: Group) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Local name, dtype and shape of what the group stores for the module."""
    assert group.weights is not None
    raw = {**group.raw, "format": group.format}
    if group.weights.actorder in ("group", "dynamic"):  # has a finding of its own
        raw["weights"] = {**group.raw["weights"], "actorder": None}
    stored = module.parts.get("weight_scale")
    scale = _scale_dtype(group)
    if scale is None:
        scale = stored.dtype if stored is not None and stored.dtype in _FLOATS else torch.bfloat16
    fmt, activation = format_from_config(raw, scale)
    assert group.format is not None
    scheme = Scheme(name=group.name, weight=fmt, activation=activation, file_format=group.format)
    return tensors_of(scheme, shape_of(module, group), scale if scale in _FLOATS else torch.bfloat16)


def _scale_dtype(group: Group) -> torch.dtype | None:
    """What scales are stored in; None: in a float dtype of the model's choice."""
    if str(group.format).startswith("mx"):
        return torch.uint8
    return torch.float8_e4m3fn if str(group.format).startswith("nvfp4") else None


def shape_of(module: Module, group: Group) -> tuple[int, int]:
    """(N, K) as the model has it, or as the codes' shape tells."""
    if module.shape is not None:
        return module.shape
    assert group.weights is not None
    bits = group.weights.num_bits
    plain, packed = module.parts.get("weight"), module.parts.get("weight_packed")
    if packed is not None and len(packed.shape) == 2:
        return packed.shape[0], packed.shape[1] * packed.dtype.itemsize * 8 // bits
    if plain is not None and len(plain.shape) == 2:
        return plain.shape[0], plain.shape[1]
    scale = module.parts.get("weight_scale")
    rows, groups = (scale.shape[0], scale.shape[-1]) if scale is not None and scale.shape else (0, 0)
    return rows, groups * max(group.weights.group_size or 0, 1)


def _compare(
    subject: Subject, module: Module, group: Group, entries: list[tuple[str, torch.dtype, tuple[int, ...]]]
) -> Iterator[tuple[str, _Defect]]:
    expected = {local for local, _, _ in entries}
    for local in sorted((module.parts.keys() & LOCAL) - expected):
        if (defect := _unexpected(subject, group, local)) is not None:
            yield f"{module.name}.{local}", defect
    for local, dtype, shape in entries:
        name, entry = f"{module.name}.{local}", module.parts.get(local)
        if entry is None:
            # Engines make weights of the size that the model has.
            minding = subject.readers if local == "weight_shape" else subject.everywhere
            if minding:
                what = f"the tensor is missing; {group.name} stores {', '.join(sorted(expected))}"
                yield name, (what, "copy it from where the checkpoint was made, or quantize again", minding)
        elif not _fits(entry, dtype, shape) and not (local in _LOOSE and entry.dtype in _FLOATS):
            given, needed = f"{entry.dtype} {entry.shape}", f"{dtype} {shape}"
            what = f"it is {given}; {group.name} and the model need {needed}"
            yield name, (what, "quantize this weight again, or correct the config group", subject.everywhere)
        elif local == "weight_shape" and entry.nbytes:
            given = tuple(subject.checkpoint.read(entry).tolist())
            needed = shape_of(module, group)
            # Where the model does not tell K, the words hold it, padded to whole ones.
            if given != needed and not (module.shape is None and _padded(given, needed, group)):
                what = f"it says {given}; the weight is {needed}"
                yield name, (what, f"write {list(needed)}", subject.everywhere)


def _padded(given: tuple[int, ...], stored: tuple[int, int], group: Group) -> bool:
    assert group.weights is not None
    per_word = 32 // group.weights.num_bits + 1
    return len(given) == 2 and given[0] == stored[0] and stored[1] - per_word <= given[1] <= stored[1]


def _fits(entry: TensorEntry, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    # Dimensions of 1 come and go between writers.
    return entry.dtype == dtype and [d for d in entry.shape if d != 1] == [d for d in shape if d != 1]


def _unexpected(subject: Subject, group: Group, local: str) -> _Defect | None:
    assert group.weights is not None
    if local == "weight_g_idx":
        minding = tuple(runtime.name for runtime in subject.runtimes if not runtime.scattered)
        scattered = group.weights.actorder in ("group", "dynamic")
        fix = "quantize with actorder 'weight', or without, and leave the tensor out"
        return None if scattered or not minding else ("groups are scattered by a g_idx", fix, minding)
    if local == "weight_zero_point":
        return "the scheme is symmetric, so nothing reads zero points", "delete the tensor", subject.everywhere
    return f"{group.name} stores no such tensor", "delete it, or correct the config group", subject.everywhere
