"""Rules for checkpoints that other tools quantized: whether the method loads, and what of its config does not.

Source: the runtimes' tables; layouts of GPTQ and AWQ as vLLM 0.32.0 reads them, `auto_gptq.py` and `auto_awq.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lowbit.header import as_object
from lowbit_hf.lint.finding import Finding, name_all
from lowbit_hf.lint.gpus import describe
from lowbit_hf.lint.subject import Subject
from lowbit_hf.lint.table import ROW_PARALLEL, Runtime

_ROOT = "quantization_config"
_MODELOPT = "hf_quant_config.json"
# What a method stores for each module besides the codes.
_COMPANIONS = {
    "gptq": ("qweight", ("qzeros", "scales")),
    "awq": ("qweight", ("qzeros", "scales")),
}


def check_foreign(subject: Subject) -> Iterator[Finding]:
    """What is known of a `quant_method` that is not compressed-tensors."""
    method = subject.method
    assert method is not None
    for runtime in subject.runtimes:
        known = runtime.methods.get(method)
        if known is None:
            yield Finding(
                severity="error",
                key=f"{_ROOT}.quant_method",
                what=f"{runtime.name} {runtime.version} does not load {method!r}",
                fix=f"export it as compressed-tensors, or one of {', '.join(runtime.methods)}",
                runtimes=(runtime.name,),
            )
            continue
        yield from _check_values(subject, runtime)
        if subject.gpu is not None and known.capability is not None and subject.gpu[1] < known.capability:
            name, capability = subject.gpu
            yield Finding(
                severity="error",
                key=f"{_ROOT}.quant_method",
                what=f"{method} needs {describe(known.capability)}; {name} is sm{capability}",
                fix="serve on another GPU",
                runtimes=(runtime.name,),
                gpu=name,
            )
    yield from _check_order(subject)
    yield from _check_companions(subject, method)
    yield from _check_groups(subject, method)
    if method == "fp8":
        yield from _check_blocks(subject)
    if method == "mxfp4":
        yield from _check_pairs(subject)


def check_modelopt_file(subject: Subject, folder: Path) -> Iterator[Finding]:
    """ModelOpt's older file, which some readers find only beside `config.json`."""
    if subject.method is None and (folder / _MODELOPT).is_file():
        yield Finding(
            severity="warning",
            key=_MODELOPT,
            what="config.json has no quantization_config, so only readers that know this file see quantized weights",
            fix="copy its content to config.json as quantization_config",
            runtimes=subject.everywhere,
        )


def _check_values(subject: Subject, runtime: Runtime) -> Iterator[Finding]:
    quantization, method = subject.quantization or {}, subject.method or ""
    for key, allowed in runtime.methods[method].values.items():
        given = quantization.get(key)
        compared = given.upper() if key == "quant_algo" and isinstance(given, str) else given
        if key in quantization and compared not in allowed:
            yield Finding(
                severity="error",
                key=f"{_ROOT}.{key}",
                what=f"{key} is {given!r}; {method} loads with {' or '.join(map(repr, allowed))}",
                fix=f"quantize again with {key} {allowed[0]!r}",
                runtimes=(runtime.name,),
            )


def _check_order(subject: Subject) -> Iterator[Finding]:
    quantization = subject.quantization or {}
    minding = tuple(runtime.name for runtime in subject.runtimes if runtime.own_classes and not runtime.scattered)
    if quantization.get("desc_act") and quantization.get("group_size") != -1 and minding:
        yield Finding(
            severity="error",
            key=f"{_ROOT}.desc_act",
            what="desc_act is true, which scatters groups over the columns by a g_idx",
            fix="quantize with desc_act false, or with group_size -1",
            runtimes=minding,
        )


def _check_companions(subject: Subject, method: str) -> Iterator[Finding]:
    codes, others = _COMPANIONS.get(method, ("", ()))
    names = subject.checkpoint.entries
    modules = [name.removesuffix(f".{codes}") for name in names if codes and name.endswith(f".{codes}")]
    missing = [f"{module}.{other}" for module in modules for other in others if f"{module}.{other}" not in names]
    if missing:
        yield Finding(
            severity="error",
            key=name_all(missing),
            what=f"the tensor is missing; {method} stores {', '.join((codes, *others))} for every module",
            fix="copy it from where the checkpoint was made, or quantize again",
            runtimes=subject.everywhere,
        )


def _check_groups(subject: Subject, method: str) -> Iterator[Finding]:
    """K on each GPU against the group size."""
    size, bits = (subject.quantization or {}).get("group_size"), (subject.quantization or {}).get("bits", 4)
    if method not in _COMPANIONS or type(size) is not int or type(bits) is not int or size <= 0 or bits <= 0:
        return
    odd: dict[str, list[str]] = {}
    for name, entry in subject.checkpoint.entries.items():
        module, _, local = name.rpartition(".")
        if local == "qweight" and len(entry.shape) == 2:
            k = entry.shape[0] * 32 // bits if method == "gptq" else entry.shape[0]
            divided = subject.tp if module.rpartition(".")[2] in ROW_PARALLEL else 1
            if k % divided or (k // divided) % size:
                odd.setdefault(f"K / {divided} GPUs = {k / divided:g} is no multiple of {size}", []).append(module)
    for what, names in odd.items():
        if subject.engines:
            fix = "serve on fewer GPUs, or use a group size that divides K on each"
            yield Finding(severity="error", key=name_all(names), what=what, fix=fix, runtimes=subject.engines)


def _check_blocks(subject: Subject) -> Iterator[Finding]:
    """DeepSeek's blocks: a scale for each, and static inputs only without."""
    quantization = subject.quantization or {}
    block = quantization.get("weight_block_size")
    if block is not None and quantization.get("activation_scheme") == "static" and subject.engines:
        yield Finding(
            severity="error",
            key=f"{_ROOT}.activation_scheme",
            what="inputs are static, but weights are scaled in blocks, which needs dynamic ones",
            fix='write "dynamic"',
            runtimes=subject.engines,
        )
    local = "weight_scale_inv" if block is not None else "weight_scale"
    entries = subject.checkpoint.entries
    missing = [
        f"{name.removesuffix('weight')}{local}"
        for name, entry in entries.items()
        if name.endswith(".weight")
        and "float8" in str(entry.dtype)
        and f"{name.removesuffix('weight')}{local}" not in entries
    ]
    if missing:
        yield Finding(
            severity="error",
            key=name_all(missing),
            what=f"the tensor is missing; every fp8 weight has a {local}",
            fix="copy it from where the checkpoint was made, or quantize again",
            runtimes=subject.everywhere,
        )


def _check_pairs(subject: Subject) -> Iterator[Finding]:
    """gpt-oss keeps experts as `_blocks` (E, N, K/32, 16) and `_scales` (E, N, K/32)."""
    entries = subject.checkpoint.entries
    for name, entry in entries.items():
        if name.endswith("_blocks"):
            scales = entries.get(name.removesuffix("_blocks") + "_scales")
            if scales is None or scales.shape != entry.shape[:-1]:
                yield Finding(
                    severity="error",
                    key=name.removesuffix("_blocks") + "_scales",
                    what=f"it is {'missing' if scales is None else scales.shape}; needed is {entry.shape[:-1]}",
                    fix="copy it from where the checkpoint was made, or quantize again",
                    runtimes=subject.everywhere,
                )


def named_quantization(config: dict[str, object]) -> bool:
    """Whether a config has a `quantization_config` that is an object, or none at all."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            return as_object(config[key]) is not None
    return True
