"""Rules about modules among one another: coverage, fused projections, experts, the head."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import isfinite

import torch

from lowbit_hf.fused import fused
from lowbit_hf.lint.arguments import Group
from lowbit_hf.lint.finding import Finding, name_all
from lowbit_hf.lint.fitting import fit
from lowbit_hf.lint.subject import EXPERT, Module, Subject
from lowbit_hf.lint.table import Runtime

_IGNORE = "quantization_config.ignore"
# A config may claim any number of experts.
_MOST_MISSING = 1 << 12


def check_structure(subject: Subject) -> Iterator[Finding]:
    """Everything about which modules are quantized, and how."""
    yield from _check_covered(subject)
    yield from _check_plain(subject)
    yield from _check_present(subject)
    yield from _check_fused(subject)
    yield from _check_global_scales(subject)
    yield from _check_experts(subject)
    yield from _check_ends(subject)
    yield from _check_transposed(subject)


def _check_covered(subject: Subject) -> Iterator[Finding]:
    """Quantized tensors that no group explains, or that `ignore` takes for plain ones."""
    quantized = [module for module in subject.modules.values() if module.quantized]
    if subject.groups:
        lost = [module for module in quantized if subject.group_of(module) is None and not subject.ignored(module.name)]
        experts = " (experts need it, or a pattern)" if any(module.part == "experts" for module in lost) else ""
        if lost:
            yield Finding(
                severity="error",
                key=name_all(module.name for module in lost),
                what="it has quantized tensors, but no config group has a target for it",
                fix=f'add "Linear", or "re:" and a pattern, to the targets of a group{experts}',
                runtimes=subject.everywhere,
            )
    ignored = [module.name for module in quantized if subject.ignored(module.name)]
    if ignored:
        yield Finding(
            severity="error",
            key=_IGNORE,
            what=f"it names {name_all(ignored)}, whose tensors are quantized",
            fix="take the entry out, or store these weights unquantized",
            runtimes=subject.everywhere,
        )


def _check_plain(subject: Subject) -> Iterator[Finding]:
    """Plain weights that a reader takes for quantized ones."""
    for runtime in subject.runtimes:
        missed = [
            module.name
            for module in subject.modules.values()
            if not module.quantized
            and not subject.ignored(module.name, runtime)
            and _expects_codes(subject, runtime, module)
        ]
        missed += _tied_heads(subject, runtime)
        if missed and any(module.quantized for module in subject.modules.values()):
            known = {*subject.modules, *({} if subject.skeleton is None else subject.skeleton.linears)}
            stale = [entry for entry in subject.ignore if not entry.startswith("re:") and entry not in known]
            hint = f"; {', '.join(map(repr, stale))} there names no module of the checkpoint" if stale else ""
            yield Finding(
                severity="error",
                key=_IGNORE,
                what=f"{name_all(missed)}: not quantized, so it must be named here, or a scheme is looked for{hint}",
                fix=f"add {name_all(missed)} by its name in the checkpoint",
                runtimes=(runtime.name,),
            )


def _expects_codes(subject: Subject, runtime: Runtime, module: Module) -> bool:
    if subject.group_of(module, runtime) is not None:
        return True
    return runtime.strict and module.multiplies and not module.head


def _tied_heads(subject: Subject, runtime: Runtime) -> list[str]:
    """Heads that the model has but not the file, and that a target covers by their class."""
    skeleton = subject.skeleton
    head = None if skeleton is None else skeleton.output_embedding
    if skeleton is None or head is None or runtime.own_classes or (subject.quantization or {}).get("dequantize"):
        return []
    if any(module.head for module in subject.modules.values()):
        return []
    classes = {base.__name__ for base in type(skeleton.model.get_submodule(head)).__mro__}
    targeted = subject.named(head) or any(classes & set(group.targets) for group in subject.groups)
    return [head] if targeted and not subject.ignored(head) else []


def _check_present(subject: Subject) -> Iterator[Finding]:
    """Linear modules of the model for which the file has nothing at all."""
    skeleton = subject.skeleton
    if skeleton is None:
        return
    owners = [skeleton.owner(f"{name}.weight") for name in subject.modules]
    held = {owner.name for owner in owners if owner is not None}
    absent = [
        name
        for name in skeleton.linears
        if f"{name}.weight" not in held and name not in subject.modules and name != skeleton.output_embedding
    ]
    # A model that keeps several of the file's matrices as one has other names for them.
    if absent and len(absent) < len(skeleton.linears) / 2:
        yield Finding(
            severity="error",
            key=name_all(absent),
            what="the model has this module, the checkpoint has no tensor of it",
            fix="copy the weight from the original checkpoint, or quantize again",
            runtimes=subject.everywhere,
        )


def _check_fused(subject: Subject) -> Iterator[Finding]:
    fusing = tuple(runtime.name for runtime in subject.runtimes if runtime.fuses)
    apart: list[str] = []
    unlike: list[str] = []
    for names in fused(subject.modules) if fusing else ():
        found = [subject.modules[name] for name in names]
        plain = [module for module in found if not module.quantized]
        if plain and len(plain) < len(found):
            # One that `ignore` forgot has a finding of its own.
            apart += [module.name for module in plain if subject.ignored(module.name)]
        elif not plain and len({_scheme(subject.group_of(module)) for module in found}) > 1:
            unlike += _minority(subject, found)
    fix = "give all projections that are fused (q, k and v; gate and up) one scheme"
    if apart:
        what = f"it names {name_all(apart)}, which is loaded into one matrix with projections that are quantized"
        yield Finding(severity="error", key=_IGNORE, what=what, fix=fix, runtimes=fusing)
    if unlike:
        what = "it has another scheme than projections that are loaded into one matrix with it"
        yield Finding(severity="error", key=name_all(unlike), what=what, fix=fix, runtimes=fusing)


def _minority(subject: Subject, modules: list[Module]) -> list[str]:
    """Those that have another scheme than most."""
    states = [_state(subject, module) for module in modules]
    usual = max(states, key=states.count)
    return [module.name for module, state in zip(modules, states, strict=True) if state != usual]


def _scheme(group: Group | None) -> tuple[object, ...]:
    return () if group is None else (group.format, group.weights, group.inputs)


def _check_global_scales(subject: Subject) -> Iterator[Finding]:
    """NVFP4 keeps one global scale for a fused matrix: the largest, under which the others' blocks lose accuracy."""
    fusing = tuple(runtime.name for runtime in subject.runtimes if runtime.fuses)
    unequal: dict[str, list[str]] = {}
    for names in fused(subject.modules) if fusing else ():
        found = [subject.modules[name] for name in names]
        for local in ("weight_global_scale", "input_global_scale"):
            entries = [module.parts[local] for module in found if local in module.parts]
            single = [entry for entry in entries if entry.dtype == torch.float32 and entry.nbytes == 4]
            values = {entry.name: float(subject.checkpoint.read(entry)) for entry in single}
            # What is not finite is another rule's.
            if all(isfinite(value) for value in values.values()):
                usual = max(values.values(), key=list(values.values()).count, default=0.0)
                odd = [name for name, value in values.items() if value != usual]
                unequal.setdefault(local, []).extend(odd)
    for local, names in unequal.items():
        if not names:
            continue
        yield Finding(
            severity="warning",
            key=name_all(names),
            what=f"its {local} is not that of the projections it is fused with; one is used for all",
            fix="quantize these projections under one global scale",
            runtimes=fusing,
        )


def _check_experts(subject: Subject) -> Iterator[Finding]:
    stacks: dict[str, dict[int, dict[str, Module]]] = {}
    for name, module in subject.modules.items():
        if (match := EXPERT.fullmatch(name)) is not None:
            stacks.setdefault(match["stack"], {}).setdefault(int(match["index"]), {})[match["projection"]] = module
    missing: list[str] = []
    unlike: list[str] = []
    for stack, experts in stacks.items():
        # A config may count the experts of another part of the model.
        count = max(subject.experts or 0, max(experts) + 1)
        projections = {name for parts in experts.values() for name in parts}
        lacking = (
            f"{stack}.{i}.{name}"
            for i in range(count)
            for name in sorted(projections)
            if name not in experts.get(i, {})
        )
        missing += islice(lacking, _MOST_MISSING)
        modules = [module for parts in experts.values() for module in parts.values()]
        unlike += _minority(subject, modules)
    if missing:
        yield Finding(
            severity="error",
            key=name_all(missing),
            what="the expert has no tensors, though others of its layer have",
            fix="store every expert by itself, from 0 on, with all projections",
            runtimes=subject.everywhere,
        )
    if unlike and subject.engines:
        yield Finding(
            severity="error",
            key=name_all(unlike),
            what="it has another scheme than other experts of its layer; the first one's is taken for all",
            fix="give all experts of a layer one scheme",
            runtimes=subject.engines,
        )


def _state(subject: Subject, module: Module) -> tuple[object, ...]:
    return _scheme(subject.group_of(module)) if module.quantized else ("plain",)


def _check_ends(subject: Subject) -> Iterator[Finding]:
    """A quantized head or embedding."""
    for module in subject.modules.values():
        if not module.quantized or subject.group_of(module) is None:
            continue
        for runtime in subject.runtimes:
            if module.head and runtime.own_classes:
                yield from _check_head(subject, runtime, module)
            elif module.embedding and not _embeds(subject, runtime, module):
                yield Finding(
                    severity="error",
                    key=module.name,
                    what=f"the embedding is quantized; {' and '.join(runtime.embeddings) or 'no scheme'} may be",
                    fix="quantize again without the embedding",
                    runtimes=(runtime.name,),
                )


def _embeds(subject: Subject, runtime: Runtime, module: Module) -> bool:
    group = subject.group_of(module)
    row, lacking = (None, []) if group is None or group.weights is None else fit(runtime, group, "linear")
    return row is not None and not lacking and row.name in runtime.embeddings


def _check_head(subject: Subject, runtime: Runtime, module: Module) -> Iterator[Finding]:
    if not subject.named(module.name):
        yield Finding(
            severity="error",
            key=module.name,
            what='the head is quantized, but the target "Linear" does not cover it: its class is another one',
            fix="quantize again without the head, or name it among the targets",
            runtimes=(runtime.name,),
        )
    elif runtime.head == "some":
        yield Finding(
            severity="warning",
            key=module.name,
            what="the head is quantized, which only some model classes load",
            fix="quantize again without the head, unless you have seen this model class load it",
            runtimes=(runtime.name,),
        )


def _check_transposed(subject: Subject) -> Iterator[Finding]:
    """GPT-2's Conv1D, whose weights are (K, N) in plain checkpoints, and (N, K) in quantized ones."""
    for runtime in subject.runtimes:
        names = [
            module.name
            for module in subject.modules.values()
            if "Conv1D" in module.classes
            and module.quantized
            and not (runtime.transposed == "packed" and "weight_packed" in module.parts)
        ]
        if names:
            yield Finding(
                severity="error",
                key=name_all(names),
                what="quantized weights of class Conv1D are not read, or are transposed on loading",
                fix="load it with lowbit_hf.load, or keep these weights unquantized",
                runtimes=(runtime.name,),
            )
