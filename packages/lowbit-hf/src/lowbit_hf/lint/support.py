"""Rules out of the runtimes' tables: whether a scheme loads, on which GPU, and with which sizes."""

from __future__ import annotations

from collections.abc import Iterator

from lowbit_hf.fused import FUSED
from lowbit_hf.lint.arguments import FORMATS, Group
from lowbit_hf.lint.envelope import stored_otherwise
from lowbit_hf.lint.finding import Finding, Support, name_all
from lowbit_hf.lint.fitting import fit
from lowbit_hf.lint.gpus import describe
from lowbit_hf.lint.subject import Module, Subject
from lowbit_hf.lint.table import COLUMN_PARALLEL, ROW_PARALLEL, Part, Row, Runtime


def check_support(subject: Subject) -> Iterator[Finding]:
    """What the tables say of every group."""
    for group in subject.groups:
        if group.problems or group.weights is None or group.format not in FORMATS or stored_otherwise(subject, group):
            continue
        for runtime in subject.runtimes:
            for part in subject.parts_of(group):
                row, lacking = fit(runtime, group, part)
                if row is not None and not lacking:
                    yield from _check_row(subject, runtime, group, row)
                    continue
                yield _unfit(runtime, group, part, row, [(m.path, m.given, m.needed) for m in lacking])
            yield from _check_sizes(subject, runtime, group)


def support_of(subject: Subject, runtime: Runtime) -> Iterator[Support]:
    """What a runtime does with every group, for the summary."""
    for group in subject.groups:
        if group.problems or group.weights is None:
            continue
        for part in subject.parts_of(group):
            row, lacking = fit(runtime, group, part)
            if row is None or lacking or _refused(subject, row):
                yield Support(group=group.name, scheme=None, part=part, gpus="none", kernel="")
            else:
                gpus = "CPUs" if row.cpu_only else describe(row.capability, exact=row.exact)
                yield Support(group=group.name, scheme=row.name, part=part, gpus=gpus, kernel=row.kernel)


def _unfit(
    runtime: Runtime, group: Group, part: Part, row: Row | None, lacking: list[tuple[str, object, str]]
) -> Finding:
    """No row takes the group; the nearest says why."""
    where = " for experts" if part == "experts" else ""
    if row is None or not lacking:
        assert group.weights is not None
        key, weights = f"{group.key}.weights.num_bits", f"{group.weights.num_bits}-bit {group.weights.type} weights"
        names = dict.fromkeys(each.name for each in runtime.rows if part in each.parts and not each.refusal)
        what, fix = f"no scheme{where} has {weights} in {group.format!r}", f"use one of {', '.join(names)}"
    else:
        path, given, needed = lacking[0]
        key = f"{group.key}.{path}"
        given = "null" if given is None else repr(given)
        what = f"the nearest scheme{where}, {row.name}, needs {path} {needed}; this is {given}"
        more = [f"{path} {needed}" for path, _, needed in lacking[1:]]
        fix = f"quantize with {path} {needed}" + (f", and {', '.join(more)}" if more else "")
    return Finding(severity="error", key=key, what=what, fix=fix, runtimes=(runtime.name,))


def _refused(subject: Subject, row: Row) -> bool:
    return bool(row.refusal) and not (row.unless and (subject.quantization or {}).get(row.unless))


def _check_row(subject: Subject, runtime: Runtime, group: Group, row: Row) -> Iterator[Finding]:
    """A row takes the group: unless it is a refusal, or the GPU or the dtype is not right."""
    if _refused(subject, row):
        yield Finding(severity="error", key=group.key, what=row.refusal, fix=row.fix, runtimes=(runtime.name,))
        return
    if row.dtypes and subject.dtype is not None and subject.dtype.removeprefix("torch.") not in row.dtypes:
        yield Finding(
            severity="error",
            key="dtype" if "dtype" in subject.config else "torch_dtype",
            what=f"the kernel of {row.name} gives {' or '.join(row.dtypes)}; the model is {subject.dtype}",
            fix=f"serve with --dtype {row.dtypes[0]}, or write it in config.json",
            runtimes=(runtime.name,),
        )
    if subject.gpu is None:
        return
    name, capability = subject.gpu
    needed = row.capability
    wrong = needed is not None and (capability != needed if row.exact else capability < needed)
    if wrong or row.cpu_only:
        needs = "a CPU" if row.cpu_only else describe(needed, exact=row.exact)
        yield Finding(
            severity="error",
            key=group.key,
            what=f"{row.name} needs {needs}; {name} is sm{capability}",
            fix="serve on another GPU, or quantize to a scheme that this one has",
            runtimes=(runtime.name,),
            gpu=name,
        )
    elif row.native is not None and capability < row.native:
        yield Finding(
            severity="warning",
            key=group.key,
            what=f"{row.name} is native from sm{row.native} on; on {name} {row.fallback}",
            fix="serve on a newer GPU, or quantize to a scheme that this one has",
            runtimes=(runtime.name,),
            gpu=name,
        )


def _check_sizes(subject: Subject, runtime: Runtime, group: Group) -> Iterator[Finding]:
    """Rows and columns on each GPU that the group or the kernel cannot divide."""
    defects: dict[tuple[str, str], list[str]] = {}
    for module in subject.members(group):
        if module.shape is not None and not (runtime.name == "transformers" and not module.classes):
            row, lacking = fit(runtime, group, module.part)
            if row is not None and not lacking and not _refused(subject, row):
                for what, fix in _odd_sizes(subject, runtime, module, group, row):
                    defects.setdefault((what, fix), []).append(module.name)
    for (what, fix), names in defects.items():
        yield Finding(severity="error", key=name_all(names), what=what, fix=fix, runtimes=(runtime.name,))


def _odd_sizes(subject: Subject, runtime: Runtime, module: Module, group: Group, row: Row) -> Iterator[tuple[str, str]]:
    assert module.shape is not None
    assert group.weights is not None
    n, k = module.shape
    divided = subject.tp if runtime.own_classes and module.last in ROW_PARALLEL else 1
    size = group.weights.group_size or 0
    step = max(size, row.columns, 1)
    per = f"K / {divided} GPUs" if divided > 1 else "K"
    if k % divided or (k // divided) % step:
        fix = f"serve on fewer GPUs, or use a group size that divides {k // divided}"
        if divided == 1:
            fix = f"leave it unquantized, or use a scheme whose groups divide {k}"
        yield f"{per} = {k / divided:g} is no multiple of {step}", fix
    if not runtime.own_classes:
        return
    if module.last in COLUMN_PARALLEL and n % subject.tp:
        yield f"N = {n} rows cannot be divided among {subject.tp} GPUs", "serve on a number of GPUs that divides N"
    elif group.weights.strategy == "block" and (n // subject.tp) % (rows := _block_rows(group)):
        if _precedes(subject, module) or (subject.tp > 1 and module.last in COLUMN_PARALLEL):
            fix = "quantize to FP8_DYNAMIC, which has no blocks"
            yield f"N / {subject.tp} GPUs = {n // subject.tp:g}, fused, is no multiple of {rows}", fix
    elif row.rows > 1 and (total := _fused_rows(subject, module)) % (subject.tp * row.rows):
        fix = f"leave it unquantized, or use a scheme other than {row.name}"
        yield f"N / {subject.tp} GPUs = {total / subject.tp:g}, fused, is no multiple of {row.rows}", fix


def _block_rows(group: Group) -> int:
    structure = group.raw["weights"].get("block_structure")
    return structure[0] if isinstance(structure, list) and structure and type(structure[0]) is int else 128


def _precedes(subject: Subject, module: Module) -> bool:
    """Whether another projection's rows follow it in a fused matrix, or it is an expert's, which are stacked."""
    parent = module.name.removesuffix(module.last)
    for names in FUSED:
        if module.last in names:
            present = [name for name in names if parent + name in subject.modules]
            return module.part == "experts" or present[-1] != module.last
    return False


def _fused_rows(subject: Subject, module: Module) -> int:
    """Rows of a module, and of those that are fused with it."""
    parent = module.name.removesuffix(module.last)
    for names in FUSED:
        if module.last in names:
            siblings = [subject.modules[parent + name] for name in names if parent + name in subject.modules]
            return sum(sibling.shape[0] for sibling in siblings if sibling.shape is not None)
    assert module.shape is not None
    return module.shape[0]
