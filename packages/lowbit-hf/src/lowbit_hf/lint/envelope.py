"""Rules about `quantization_config` itself: keys, status, formats, orders of columns, caches."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from lowbit.header import as_object
from lowbit_hf.layouts.layout import CACHED
from lowbit_hf.lint.arguments import FORMATS, Group
from lowbit_hf.lint.finding import Finding, name_all
from lowbit_hf.lint.subject import Subject

_ROOT = "quantization_config"


def check_envelope(subject: Subject) -> Iterator[Finding]:
    """Everything that the config alone tells."""
    yield from _check_form(subject)
    yield from _check_status(subject)
    yield from _check_sparsity(subject)
    yield from _check_cache(subject)
    yield from _check_mixture(subject)
    for group in subject.groups:
        yield from _check_format(subject, group)
        yield from _check_order(subject, group)


def _check_form(subject: Subject) -> Iterator[Finding]:
    if not subject.groups:
        yield Finding(
            severity="error",
            key=f"{_ROOT}.config_groups",
            what="there is no config group, so nothing is read as quantized",
            fix='add a group with "targets", "weights" and "format"',
            runtimes=subject.everywhere,
        )
    for group in subject.groups:
        for problem in group.problems:
            key = f"{group.key}.{problem.path}" if problem.path else group.key
            yield Finding(severity="error", key=key, what=problem.what, fix=problem.fix, runtimes=subject.everywhere)


def _check_status(subject: Subject) -> Iterator[Finding]:
    status = (subject.quantization or {}).get("quantization_status", "initialized")
    readers = tuple(runtime.name for runtime in subject.runtimes if runtime.reads_status)
    if status != "compressed" and readers:
        yield Finding(
            severity="error",
            key=f"{_ROOT}.quantization_status",
            what=f"the status is {status!r}, so plain weights are built, which compressed tensors do not fit",
            fix='write "compressed"',
            runtimes=readers,
        )


def _check_sparsity(subject: Subject) -> Iterator[Finding]:
    sparsity = as_object((subject.quantization or {}).get("sparsity_config"))
    if sparsity and sparsity.get("targets") and subject.engines:
        yield Finding(
            severity="error",
            key=f"{_ROOT}.sparsity_config",
            what="sparse weights are no longer supported",
            fix="store the weights dense and write {}",
            runtimes=subject.engines,
        )


def _check_cache(subject: Subject) -> Iterator[Finding]:
    """A KV-cache scheme that is not used as written."""
    scheme = as_object((subject.quantization or {}).get("kv_cache_scheme"))
    if scheme is None:
        return
    for runtime in subject.runtimes:
        if not runtime.kv_strategies:
            continue
        path, given = _odd_cache(scheme, runtime.kv_strategies)
        if path is not None:
            yield Finding(
                severity="warning" if runtime.kv_lenient else "error",
                key=f"{_ROOT}.kv_cache_scheme.{path}",
                what=f"{path} is {given!r}; used are symmetric 8-bit floats by {' or '.join(runtime.kv_strategies)}",
                fix="write null, or calibrate fp8 scales per tensor",
                runtimes=(runtime.name,),
            )
        elif not scheme.get("dynamic") and not any(n.endswith(".k_scale") for n in subject.checkpoint.entries):
            yield Finding(
                severity="warning",
                key=f"{_ROOT}.kv_cache_scheme",
                what="there are no k_scale and v_scale tensors, so scales of 1 are used, which cost accuracy",
                fix="write null, or calibrate and store the scales",
                runtimes=(runtime.name,),
            )
    if subject.engines:
        yield from _check_cache_scales(subject, scheme.get("strategy"))


def _check_cache_scales(subject: Subject, strategy: object) -> Iterator[Finding]:
    """Scales of keys without those of values, and scales of another shape than the strategy has."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in subject.checkpoint.entries.items():
        module, _, local = name.rpartition(".")
        if local in CACHED:
            found.setdefault(module, {})[local] = entry.shape
    if missing := [f"{module}.{local}" for module, has in found.items() for local in CACHED if local not in has]:
        yield Finding(
            severity="warning",
            key=name_all(missing),
            what="the tensor is missing, so keys or values are kept under a scale that is not theirs",
            fix="calibrate and store both",
            runtimes=subject.engines,
        )
    wanted = {"tensor": "(1,)", "attn_head": "(heads, 1, 1)"}.get(str(strategy))
    scales = {f"{module}.{local}": shape for module, has in found.items() for local, shape in has.items()}
    by_head = strategy == "attn_head"
    odd = [name for name, shape in scales.items() if not (shape[1:] == (1, 1) if by_head else prod(shape) == 1)]
    if wanted is not None and odd:
        yield Finding(
            severity="error",
            key=name_all(odd),
            what=f"it has shape {scales[odd[0]]}; strategy {strategy!r} has {wanted}",
            fix="write the strategy that the scales are for, or calibrate again",
            runtimes=subject.engines,
        )


def _odd_cache(scheme: dict[str, object], strategies: tuple[str, ...]) -> tuple[str | None, object]:
    wanted = {"type": ("float",), "num_bits": (8,), "symmetric": (True,), "strategy": strategies}
    for path, values in wanted.items():
        given = scheme.get(path, True if path == "symmetric" else None)
        if given not in values:
            return path, given
    return None, None


def _check_mixture(subject: Subject) -> Iterator[Finding]:
    """Several formats, dequantized on load: transformers 5.23 takes one for all."""
    formats = {group.format for group in subject.groups}
    readers = subject.readers
    if len(formats) > 1 and (subject.quantization or {}).get("dequantize") and readers:
        yield Finding(
            severity="error",
            key=f"{_ROOT}.dequantize",
            what="transformers 5.23 does not dequantize a checkpoint of several file formats",
            fix="delete the key, or use one scheme",
            runtimes=readers,
        )


def _check_format(subject: Subject, group: Group) -> Iterator[Finding]:
    """No reader should have to guess how codes are stored."""
    if group.problems or group.weights is None:
        return
    key, known = f"{group.key}.format", group.format in FORMATS
    if not known and (subject.engines or group.explicit):
        yield Finding(
            severity="error",
            key=key,
            what=f"it is {group.format!r}, which is no file format of compressed-tensors",
            fix=f"write one of {', '.join(FORMATS)}",
            runtimes=subject.everywhere if group.explicit else subject.engines,
        )
    elif known and (stored := stored_otherwise(subject, group)):
        yield Finding(
            severity="error",
            key=key,
            what=f"{group.format!r} keeps codes in {FORMATS[group.format or '']}, but the tensors are {stored}",
            fix=_fitting_format(group, stored),
            runtimes=subject.everywhere,
        )
    elif guessing := _misled(subject, group):
        yield Finding(
            severity="error",
            key=key,
            what="without it, 'int-quantized' is inferred, where inputs are quantized too",
            fix='write "pack-quantized" in the group itself',
            runtimes=guessing,
        )


def _misled(subject: Subject, group: Group) -> tuple[str, ...]:
    """Readers that infer an absent format, where compressed-tensors does not infer the one that is stored."""
    if group.explicit or group.inputs is None or group.weights is None or group.weights.type != "int":
        return ()
    packed = any("weight_packed" in module.parts for module in subject.members(group))
    if not packed or (subject.quantization or {}).get("dequantize"):
        return ()
    return tuple(runtime.name for runtime in subject.runtimes if not runtime.inherits_format)


def stored_otherwise(subject: Subject, group: Group) -> str | None:
    """Name of the tensor in which all of a group's codes are, where it is not the one of its format."""
    if group.format not in FORMATS:
        return None
    held = {"weight_packed" if "weight_packed" in module.parts else "weight" for module in subject.members(group)}
    return held.pop() if len(held) == 1 and FORMATS[group.format] not in held else None


def _fitting_format(group: Group, stored: str) -> str:
    assert group.weights is not None
    bits, kind, scales = group.weights.num_bits, group.weights.type, group.weights.strategy
    if kind == "int":
        return f'write "{"pack" if stored == "weight_packed" else "int"}-quantized"'
    if stored == "weight":
        return f'write "{"mxfp8" if scales == "group" else "float"}-quantized"'
    return f'write "{"nvfp4" if scales == "tensor_group" else f"mxfp{bits}"}-pack-quantized"'


def _check_order(subject: Subject, group: Group) -> Iterator[Finding]:
    """Groups scattered over the columns."""
    if group.weights is None or group.weights.actorder not in ("group", "dynamic"):
        return
    indexed = all("weight_g_idx" in module.parts for module in subject.members(group))
    minding = tuple(runtime.name for runtime in subject.runtimes if not (runtime.scattered and indexed))
    if minding:
        yield Finding(
            severity="error",
            key=f"{group.key}.weights.actorder",
            what=f"actorder is {group.weights.actorder!r}, which scatters groups over the columns by a g_idx",
            fix="quantize with actorder 'weight', which keeps groups whole, or without",
            runtimes=minding,
        )
