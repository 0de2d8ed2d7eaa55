"""Quantizing a checkpoint from disk to disk: planned whole, then streamed a row slice at a time.

Weights are never all in memory: a slice of a tensor is read, rounded, and written at its final place in an output file
whose layout the plan fixed beforehand. The output appears whole or not at all, and a run that was killed continues.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.errors import CheckpointError, RecipeError
from lowbit.format import Format
from lowbit.numerics import ScaleMode, choose_scale, encode, tensor_scale_for_amax
from lowbit.plan import Parameter, Plan, Row, plan
from lowbit.recipe import Recipe, Rule
from lowbit.shards import INDEX_NAME, Checkpoint, TensorEntry, lies_inside, row_slices
from lowbit.staging import ShardWriter, Staging
from lowbit_algos import Method
from lowbit_hf.calibrated import Calibrated, Progress
from lowbit_hf.layout import input_tensors, row_alignment, tensors_of, to_compressed
from lowbit_hf.schemes import Scheme, quantization_config
from lowbit_hf.skeleton import LINEAR, Owner, Skeleton, read_config
from lowbit_hf.texts import Calibration

R = TypeVar("R")

# Small enough that a slice's float32 intermediates stay in the processor's caches, large enough to hide Python.
_SLICE_BYTES = 2 << 20
# The same weights in forms that other programs load; keeping them would double the folder and contradict its config.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
# Schemes that come close to those that need data.
_WITHOUT_DATA = {"FP8": "FP8_DYNAMIC", "NVFP4": "NVFP4A16", "W8A8_STATIC": "W8A8", "W8A8_STATIC_ASYM": "W8A8_ASYM"}
# A router decides which expert sees a token; it is tiny, and rounding it changes the choice.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)\.weight")
# Projections that serving engines fuse into one, which then has one tensor scale.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a run does, decided before it starts."""

    folder: Path
    checkpoint: Checkpoint
    skeleton: Skeleton
    config: dict[str, Any]
    plan: Plan
    # Scheme of each tensor that is quantized, by checkpoint name.
    schemes: Mapping[str, Scheme]
    owners: Mapping[str, Owner | None]
    mode: ScaleMode
    # Tensors with NaN or infinity that --allow-nonfinite keeps.
    nonfinite: tuple[str, ...]
    # What blocks are calibrated on, and how; None: everything is rounded to nearest.
    calibration: Calibration | None = None
    method: Method | None = None

    @property
    def files(self) -> dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]:
        """Tensors of each output file, which has the name of the input file they come from."""
        return {
            name: [planned for entry in entries for planned in self.outputs(entry)]
            for name, entries in self.checkpoint.shards.items()
        }

    def outputs(self, entry: TensorEntry) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What one input tensor becomes."""
        scheme = self.schemes.get(entry.name)
        if scheme is None:
            return [(entry.name, entry.dtype, entry.shape)]
        module = entry.name.removesuffix(".weight")
        n, k = self.matrix_shape(entry)
        return [(f"{module}.{local}", dtype, shape) for local, dtype, shape in tensors_of(scheme, (n, k), self.dtype)]

    def matrix_shape(self, entry: TensorEntry) -> tuple[int, int]:
        """Rows and columns (n, k) of a weight, whichever way the file keeps it."""
        first, second = entry.shape
        return (second, first) if self.transposed(entry.name) else (first, second)

    def transposed(self, name: str) -> bool:
        """Whether the file keeps this weight as (K, N)."""
        owner = self.owners[name]
        return owner is not None and "Conv1D" in owner.classes

    def linear(self, name: str) -> bool:
        """Whether readers take the module of this weight for a linear layer; they do where nobody knows better."""
        owner = self.owners[name]
        return owner is None or owner.stacked or not set(LINEAR).isdisjoint(owner.classes)

    @property
    def dtype(self) -> torch.dtype:
        """dtype that scales are stored in where they take the weight's."""
        return self.skeleton.dtype

    @property
    def output_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(prod(shape) * dtype.itemsize for tensors in self.files.values() for _, dtype, shape in tensors)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits that a quantized weight takes in the files, with all that belongs to it."""
        entries = [self.checkpoint.entries[name] for name in self.schemes]
        stored = sum(prod(shape) * dtype.itemsize for entry in entries for _, dtype, shape in self.outputs(entry))
        return 8 * stored / sum(prod(entry.shape) for entry in entries)

    def fingerprint(self) -> str:
        """Names this input and these decisions, so that only the same job is ever resumed."""
        decisions = {name: [scheme.name, str(scheme.weight)] for name, scheme in self.schemes.items()}
        how = None if self.calibration is None else [self.calibration.fingerprint(), asdict(self.method or Method())]
        text = json.dumps([self.checkpoint.fingerprint(), self.config, decisions, self.mode, how], sort_keys=True)
        return sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Account:
    """Where everything went: proof that nothing was lost."""

    # Input tensor -> the output tensors it became, read back from the written files.
    tensors: Mapping[str, tuple[str, ...]]
    quantized: int
    # Tensors the model itself has no place for, carried all the same.
    unowned: tuple[str, ...]
    files: tuple[str, ...]
    # Files that hold the same weights in another form.
    left_behind: tuple[str, ...]


def prepare(
    folder: Path,
    to: Scheme,
    *,
    rules: Sequence[tuple[str, Scheme]] = (),
    keep: Sequence[str] = (),
    mode: ScaleMode,
    min_coverage: float = 0.0,
    allow_nonfinite: bool = False,
    device: str = "cpu",
    calibration: Calibration | None = None,
    method: Method | None = None,
) -> Job:
    """Decide what happens to every tensor of the checkpoint in `folder`; nothing is written.

    Every Linear (and GPT-2's Conv1D) weight and every expert gets scheme `to`, but for the output head and routers,
    which stay; `keep` and `rules` (patterns on checkpoint or model names, in this order) go before that.

    Raises:
        CheckpointError: the folder is damaged or already quantized.
        RecipeError: a pattern matches nothing, a weight does not fit its scheme, or too little is covered.
    """
    config = read_config(folder)
    quantized = config.get("quantization_config", config.get("compression_config"))
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        msg = f"{folder} is already quantized ({method}); rounding twice loses twice, so start from the original model"
        raise CheckpointError(msg)
    skeleton = Skeleton.build(folder)
    checkpoint = Checkpoint.open(folder)
    owners = {name: skeleton.owner(name) for name in checkpoint.entries}
    parameters = [_parameter(entry, owners[entry.name]) for entry in checkpoint.entries.values()]
    # What a match on tensors stands for, in the user's words.
    given = {_translate(pattern, owners): pattern for pattern in (*keep, *(pattern for pattern, _ in rules))}
    made: list[tuple[Rule, Scheme | None]] = [(Rule(_translate(pattern, owners), None), None) for pattern in keep]
    nonfinite: tuple[str, ...] = ()
    if allow_nonfinite:
        candidates = [name for name in checkpoint.entries if not any(rule.matches_name(name) for rule, _ in made)]
        nonfinite = tuple(name for name in candidates if not _finite(checkpoint, checkpoint.entries[name]))
    made += [(Rule(name, None), None) for name in nonfinite]
    for pattern, scheme in rules:
        made += _rules(_translate(pattern, owners), scheme, skeleton.dtype, parameters, made)
    made += [(Rule(name, None), None) for name in _kept_by_default(skeleton, owners, [rule for rule, _ in made])]
    made += _rules("*", to, skeleton.dtype, parameters, made)
    try:
        found = plan(parameters, Recipe(tuple(rule for rule, _ in made)), device=device, min_coverage=min_coverage)
    except RecipeError as error:
        raise RecipeError(_in_words_given(str(error), given)) from error
    by_match = {(rule.match, rule.k_axis): scheme for rule, scheme in reversed(made)}
    schemes: dict[str, Scheme] = {}
    for row in found.rows:
        scheme = by_match.get((row.rule or "", row.k_axis)) if row.action == "quantize" else None
        if scheme is not None:
            schemes[row.name] = scheme
    found = Plan(tuple(_as_given(row, given) for row in found.rows))
    job = Job(folder, checkpoint, skeleton, config, found, schemes, owners, mode, nonfinite, calibration, method)
    _check_outputs(job)
    _check_stacks(job)
    return job


def run(
    job: Job,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    command: str = "",
    advance: Callable[[int], None] | None = None,
) -> Account:
    """Carry a job out; `advance(bytes)` after every slice of input, `command` is what an error tells to run again.

    Raises:
        CheckpointError: the output exists or cannot be written, space runs out, or a weight holds NaN or infinity.
        RecipeError: a scheme needs calibration data, and there is none.
    """
    _check_target(job.folder, out)
    require_data(job)
    carried, left_behind = _other_files(job.folder, job.checkpoint)
    windows = None if job.calibration is None else job.calibration.windows(job.folder)
    with Staging.open(out, fingerprint=job.fingerprint(), overwrite=overwrite, command=command) as staging:
        if staging.published:
            return _account(job, out, carried, left_behind)
        try:
            staging.require_space(job.output_bytes + sum((job.folder / name).stat().st_size for name in carried))
        except CheckpointError:
            if not any(staging.files.iterdir()):
                staging.discard()
            raise
        try:
            with _Run(device, advance) as run_:
                if windows is None:
                    for file in job.checkpoint.shards:
                        _write_rest(job, staging, file, run_, set()).finish()
                else:
                    _write_calibrated(job, windows, staging, run_)
        except NonfiniteError:
            # No later run could use what is there: the input itself has to change.
            staging.discard()
            raise
        for name in carried:
            staging.copy_file(job.folder / name, name)
        staging.write_text("config.json", json.dumps(_output_config(job), indent=2) + "\n")
        if (job.folder / INDEX_NAME).exists():
            staging.write_text(INDEX_NAME, json.dumps(_output_index(job), indent=2) + "\n")
        staging.sync()
        account = _account(job, staging.files, carried, left_behind)
        staging.publish()
    return account


def _check_target(folder: Path, out: Path) -> None:
    """Refuse an output that would replace the input, or a folder that is no model."""
    source, target = folder.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        msg = f"the output {out} and the input {folder} lie in one another; write to a folder beside the input"
        raise CheckpointError(msg)
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        msg = f"{out} exists and is no model folder (it has no config.json), so it is never replaced; choose another"
        raise CheckpointError(msg)


class NonfiniteError(CheckpointError):
    """A weight holds NaN or infinity."""


class _TensorScales:
    """The tensor scales of two-level formats, one for all projections that engines fuse; chosen when asked for."""

    def __init__(self, job: Job, run: _Run) -> None:
        self._job, self._run = job, run
        self._amax: dict[str, Tensor] = {}

    def of(self, name: str, fmt: Format) -> Tensor | None:
        if not fmt.tensor_scale:
            return None
        amax = torch.stack([self._largest(sibling) for sibling in self._siblings(name)]).amax()
        return tensor_scale_for_amax(amax.reshape(1, 1), fmt)

    def _siblings(self, name: str) -> list[str]:
        module, _, projection = name.removesuffix(".weight").rpartition(".")
        for group in _FUSED:
            if projection in group:
                names = [f"{module}.{other}.weight" for other in group]
                return [n for n in names if self._job.schemes.get(n) == self._job.schemes[name]]
        return [name]

    def _largest(self, name: str) -> Tensor:
        if name not in self._amax:
            entry = self._job.checkpoint.entries[name]

            def largest(rows: slice) -> Tensor:
                return self._job.checkpoint.read(entry, rows).abs().amax().to(torch.float32)

            found = [amax for _, amax in self._run.in_order(largest, row_slices(entry, _SLICE_BYTES))]
            self._amax[name] = torch.stack(found).amax().to(self._run.device)
        return self._amax[name]


def _parameter(entry: TensorEntry, owner: Owner | None) -> Parameter:
    classes = () if owner is None else owner.classes
    # One expert's projection is a Linear to every reader, though the model holds it as part of a stack.
    return Parameter(entry.name, entry.shape, entry.dtype, ("Linear", *classes) if owner and owner.stacked else classes)


def _finite(checkpoint: Checkpoint, entry: TensorEntry) -> bool:
    """Whether no value of a matrix that might be quantized is NaN or infinite; of others nothing is asked."""
    if len(entry.shape) != 2 or not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
        return True
    slices = row_slices(entry, _SLICE_BYTES)
    return all(bool(torch.isfinite(checkpoint.read(entry, rows)).all()) for rows in slices)


def _translate(pattern: str, owners: Mapping[str, Owner | None]) -> str:
    """The pattern on tensor names that a user's pattern stands for: tensors, modules, or the model's parameters."""
    for candidate in (pattern, f"{pattern}.weight"):
        rule = Rule(candidate, None)
        if any(rule.matches_name(name) for name in owners):
            return candidate
    rule = Rule(pattern, None)
    held = [name for name, owner in owners.items() if owner is not None and rule.matches_name(owner.name)]
    return "re:" + "|".join(re.escape(name) for name in held) if held else pattern


def _as_given(row: Row, given: Mapping[str, str]) -> Row:
    reason = None if row.reason is None else _in_words_given(row.reason, given)
    return replace(row, rule=given.get(row.rule or "", row.rule), reason=reason)


def _in_words_given(text: str, given: Mapping[str, str]) -> str:
    """An error's text with the user's patterns in place of what they were translated to."""
    for match, pattern in given.items():
        text = text.replace(repr(match), repr(pattern))
    return text


def _rules(
    match: str,
    scheme: Scheme,
    dtype: torch.dtype,
    parameters: Sequence[Parameter],
    earlier: Sequence[tuple[Rule, Scheme | None]],
) -> list[tuple[Rule, Scheme | None]]:
    """The rules of one match: a pattern speaks of linear weights, an exact name of whatever it names."""
    fmt = scheme.weight_format(dtype)
    made = [Rule(match, fmt, scheme.activation, axis, (kind,)) for kind, axis in zip(LINEAR, (-1, 0), strict=True)]
    for parameter in parameters:
        if parameter.name == match:
            axis = 0 if "Conv1D" in parameter.modules else -1
            return [(Rule(match, fmt, scheme.activation, axis), scheme)]
    left = [p for p in parameters if not any(rule.matches(p.name, p.modules) for rule, _ in earlier)]
    # A model may have one kind of linear layer only, and a rule that wins nothing is an error, then the first's.
    useful = [rule for rule in made if any(rule.matches(p.name, p.modules) for p in left)] or made[:1]
    return [(rule, scheme) for rule in useful]


def _check_outputs(job: Job) -> None:
    """Refuse weights that no compressed layout holds, and names that the output would have twice.

    Raises:
        RecipeError: a tensor to quantize is no matrix, is empty, or is not the `weight` of a module.
        CheckpointError: a tensor is already there by the name of one that a weight becomes.
    """
    for name in job.schemes:
        shape = job.checkpoint.entries[name].shape
        if len(shape) != 2 or 0 in shape or not name.endswith(".weight"):
            msg = f"tensor {name!r} of shape {shape} cannot be quantized on disk, only matrices *.weight can; keep it"
            raise RecipeError(msg)
    made = [planned for name in job.schemes for planned, _, _ in job.outputs(job.checkpoint.entries[name])]
    taken = [name for name in made if name in job.checkpoint.entries and name not in job.schemes]
    if taken:
        msg = f"{job.folder} already has {taken[0]!r} beside its weight; it looks quantized; start from the original"
        raise CheckpointError(msg)


def require_data(job: Job) -> None:
    """Refuse schemes that need calibration data where there is none.

    Raises:
        RecipeError: there is none.
    """
    needy = {scheme.name: name for name, scheme in job.schemes.items() if scheme.needs_data}
    if needy and job.calibration is None:
        scheme, name = next(iter(needy.items()))
        raise RecipeError(
            f"scheme {scheme} of {name!r} stores a scale for its input, which only data tells; give a text by "
            f"--calibrate FILE, or use {_WITHOUT_DATA.get(scheme, 'a scheme whose activations are dynamic')}"
        )


def _check_stacks(job: Job) -> None:
    """Refuse stacks of experts that would have several schemes where a stack is calibrated as one weight.

    Raises:
        RecipeError: there is one.
    """
    stacks: dict[str, set[str]] = {}
    for name, owner in job.owners.items():
        if owner is not None and owner.stacked and job.calibration is not None:
            scheme = job.schemes.get(name)
            stacks.setdefault(owner.name, set()).add("kept" if scheme is None else scheme.name)
    for parameter, found in stacks.items():
        if len(found) > 1:
            raise RecipeError(
                f"the experts that the model stacks in {parameter!r} have different schemes "
                f"({', '.join(sorted(found))}); calibrated, a stack is one weight: give all of it one scheme"
            )


def _kept_by_default(skeleton: Skeleton, owners: Mapping[str, Owner | None], decided: Sequence[Rule]) -> list[str]:
    """The output head, which most engines cannot load quantized, and routers; unless the user decided on them."""
    names = [
        name
        for name, owner in owners.items()
        if owner is not None
        and set(LINEAR) & set(owner.classes)
        and (owner.name == f"{skeleton.output_embedding}.weight" or _ROUTER.search(name))
    ]
    return [name for name in names if not any(rule.matches_name(name) for rule in decided)]


def _write_rest(job: Job, staging: Staging, file: str, run: _Run, without: AbstractSet[str]) -> ShardWriter:
    """Write a file's tensors, those `without` excepted: as they are, or rounded to nearest."""
    writer, scales = staging.plan_file(file, job.files[file], {"format": "pt"}), _TensorScales(job, run)
    for entry in job.checkpoint.shards[file]:
        unit = f"{file}:{entry.name}"
        if entry.name in without:
            continue
        if staging.is_done(unit):
            run.advance(entry.nbytes)
            continue
        scheme = job.schemes.get(entry.name)
        if scheme is None:
            for rows in row_slices(entry, _SLICE_BYTES):
                writer.write(entry.name, job.checkpoint.read(entry, rows if entry.shape else None), rows.start)
            run.advance(entry.nbytes)
        else:
            _write_weight(job, writer, entry, scheme, run, scales)
        staging.done(unit)
    return writer


def _write_calibrated(job: Job, windows: Tensor, staging: Staging, run: _Run) -> None:
    """Write everything: what lies outside the blocks first, then each block when it is done."""
    calibrated = Calibrated(job.checkpoint, job.skeleton, job.owners, job.schemes, device=run.device)
    writers = {file: _write_rest(job, staging, file, run, calibrated.names) for file in job.checkpoint.shards}
    file_of = {entry.name: file for file, entries in job.checkpoint.shards.items() for entry in entries}
    entries = job.checkpoint.entries

    def write(name: str, weight: Tensor | None) -> None:
        entry, writer, module = entries[name], writers[file_of[name]], name.removesuffix(".weight")
        if isinstance(weight, QuantizedTensor):
            scheme = job.schemes[name]
            stored = to_compressed(scheme, weight.qdata.cpu(), weight.scales.cpu(), job.matrix_shape(entry))
            stored |= input_tensors(scheme.activation, weight.act_scale, weight.act_zero, job.dtype)
            for local, tensor in stored.items():
                writer.write(f"{module}.{local}", tensor.cpu().contiguous())
        else:
            plain = job.checkpoint.read(entry) if weight is None else weight.to("cpu", entry.dtype).contiguous()
            writer.write(name, plain)
        run.advance(entry.nbytes)

    def done(block: str, files: Sequence[Path]) -> None:
        for path in files:
            staging.wrote(path)
        staging.done(f"block:{block}")
        staging.sync()

    progress = Progress(staging.scratch, lambda block: staging.is_done(f"block:{block}"), done)
    calibrated.run(windows, job.method or Method(), progress, write)
    for writer in writers.values():
        writer.finish()


def _write_weight(
    job: Job, writer: ShardWriter, entry: TensorEntry, scheme: Scheme, run: _Run, scales: _TensorScales
) -> None:
    fmt = scheme.weight_format(job.dtype)
    module = entry.name.removesuffix(".weight")
    shape = job.matrix_shape(entry)
    align = max(row_alignment(scheme), 1)
    strides = {local: size[0] for local, _, size in tensors_of(scheme, (align, shape[1]), job.dtype)}
    tensor_scale = scales.of(entry.name, fmt)
    transposed = job.transposed(entry.name)
    # A weight kept as (K, N) is read whole: its rows are the file's columns.
    slices = [slice(0, shape[0])] if transposed else row_slices(entry, _SLICE_BYTES, align)

    def convert(rows: slice) -> dict[str, Tensor]:
        piece = job.checkpoint.read(entry).mT if transposed else job.checkpoint.read(entry, rows)
        x = piece.to(run.device).contiguous()
        chosen = choose_scale(x, fmt, mode=job.mode, tensor_scale=tensor_scale)
        if not bool(torch.isfinite(chosen.scale.to(torch.float32)).all()):
            msg = (
                f"tensor {entry.name!r} holds NaN or infinity in rows {rows.start} to {rows.stop}; repair the "
                "checkpoint, or keep such tensors unquantized with --allow-nonfinite"
            )
            raise NonfiniteError(msg)
        data = encode(x, fmt, chosen).cpu()
        return to_compressed(scheme, data, chosen.cpu(), shape, first_row=rows.start)

    for rows, tensors in run.in_order(convert, slices):
        for local, tensor in tensors.items():
            writer.write(f"{module}.{local}", tensor.contiguous(), rows.start // align * strides[local])
        run.advance((rows.stop - rows.start) * entry.nbytes // max(shape[0], 1))


class _Run:
    """Threads that work on row slices side by side, each with one torch thread: no slice waits for another."""

    def __init__(self, device: str, advance: Callable[[int], None] | None) -> None:
        self.device, self.advance = device, advance or _ignore
        self._count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(1,))

    def in_order(self, work: Callable[[slice], R], slices: Iterable[slice]) -> Iterator[tuple[slice, R]]:
        """`work` done on every slice, results in order; few are ahead of the caller, so memory stays bounded."""
        pending: deque[tuple[slice, Future[R]]] = deque()
        for rows in slices:
            pending.append((rows, self._pool.submit(work, rows)))
            if len(pending) > self._count + 1:
                first, result = pending.popleft()
                yield first, result.result()
        for first, result in pending:
            yield first, result.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _ignore(count: int) -> None:
    """Where nobody asks for progress."""
    del count


def _other_files(folder: Path, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Files to carry over (relative names), and those that hold the weights in another form."""
    carried, left = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            _check_link(folder, path)
        if not path.is_file() or name in {*checkpoint.shards, "config.json", INDEX_NAME} or name.startswith(".git/"):
            continue
        other = path.suffix in _OTHER_WEIGHTS or name.endswith(".index.json")
        (left if other else carried).append(name)
    return carried, left


def _check_link(folder: Path, path: Path) -> None:
    """Refuse a link that would carry a file from elsewhere into a folder that is going to be shared, or that is lost.

    Raises:
        CheckpointError: the link leads outside the folder, to a folder, or nowhere.
    """
    real = path.resolve()
    if not real.is_file() or not lies_inside(folder.resolve(), real):
        msg = f"{path} is a link to {real}, which is no file inside the folder; replace it by a copy if you trust it"
        raise CheckpointError(msg)


def _output_config(job: Job) -> dict[str, Any]:
    modules: dict[Scheme, list[str]] = {}
    for name, scheme in job.schemes.items():
        modules.setdefault(scheme, []).append(name.removesuffix(".weight"))
    # The scheme of most modules covers their classes; exceptions are named, which readers ask first.
    main = max(modules, key=lambda scheme: len(modules[scheme]))
    classes = ["Linear", *(["Conv1D"] if any(job.transposed(name) for name in job.schemes) else [])]
    others = [name for name in modules[main] if not job.linear(f"{name}.weight")]
    groups = {
        scheme: classes + sorted(others) if scheme is main else sorted(names) for scheme, names in modules.items()
    }
    return {**job.config, "quantization_config": quantization_config(groups, _ignored(job))}


def _ignored(job: Job) -> list[str]:
    """Modules that a reader might take for quantized by their class, but that are not, by checkpoint name.

    Engines have classes of their own, a router that transformers spells out being a Linear in vLLM; only embeddings are
    embeddings everywhere.
    """
    quantized = set(job.schemes)
    stored = {
        name.removesuffix(".weight")
        for name, owner in job.owners.items()
        if name.endswith(".weight")
        and name not in quantized
        and len(job.checkpoint.entries[name].shape) > 1
        and (owner is None or "Embedding" not in owner.classes)
    }
    held = {owner.name for owner in job.owners.values() if owner is not None}
    # A tied head is in the model, but not in the file.
    tied = {name for name in job.skeleton.linears if f"{name}.weight" not in held}
    return sorted(stored | tied)


def _output_index(job: Job) -> dict[str, Any]:
    files = job.files
    return {
        "metadata": {"total_size": job.output_bytes},
        "weight_map": {name: file for file, tensors in files.items() for name, _, _ in sorted(tensors)},
    }


def _account(job: Job, folder: Path, carried: Sequence[str], left_behind: Sequence[str]) -> Account:
    """Compare what was planned with what the written files hold.

    Raises:
        CheckpointError: a tensor is missing from the output, or one is there that nothing became.
    """
    became = {
        name: tuple(planned for planned, _, _ in job.outputs(entry)) for name, entry in job.checkpoint.entries.items()
    }
    with Checkpoint.open(folder) as written:
        expected = {name for names in became.values() for name in names}
        if expected != set(written.entries):
            lost, extra = sorted(expected - set(written.entries)), sorted(set(written.entries) - expected)
            msg = (
                f"the output lacks {lost[:5]} ({len(lost)}) and adds {extra[:5]} ({len(extra)}); nothing was published"
            )
            raise CheckpointError(msg)
    unowned = tuple(name for name, owner in job.owners.items() if owner is None)
    return Account(became, len(job.schemes), unowned, tuple(carried), tuple(left_behind))
