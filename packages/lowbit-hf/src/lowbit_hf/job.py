"""What a run will do, decided before it starts: which tensor of a checkpoint gets which scheme."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import CheckpointError, RecipeError
from lowbit.header import written_by
from lowbit.numerics import ScaleMode
from lowbit.plan import Parameter, Plan, Row, plan
from lowbit.recipe import Recipe, Rule
from lowbit.shards import Checkpoint, TensorEntry, row_slices
from lowbit_algos import Method
from lowbit_hf.apart import Apart, notes_of, take_apart
from lowbit_hf.filing import Filing, InCompressedTensors, InLowbit, Name
from lowbit_hf.fused import fused
from lowbit_hf.kv_cache import CacheScales, plan_cache
from lowbit_hf.layouts.layout import Entry
from lowbit_hf.schemes import OWN, KvCache, Scheme
from lowbit_hf.skeleton import LINEAR, Owner, Skeleton, read_config
from lowbit_hf.stacks import Stack
from lowbit_hf.stored import open_plain, without_quantization
from lowbit_hf.texts import Calibration

# Rows that are looked at together.
_SLICE_BYTES = 2 << 20
# Schemes that come close to those that need data.
_WITHOUT_DATA = {"FP8": "FP8_DYNAMIC", "NVFP4": "NVFP4A16", "W8A8_STATIC": "W8A8", "W8A8_STATIC_ASYM": "W8A8_ASYM"}
# A router decides which expert sees a token; it is tiny, and rounding it changes the choice.
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)\.weight")


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
    # Bytes of memory that the process may take, and of the GPU's; None: as many as it needs.
    max_memory: int | None = None
    max_gpu: int | None = None
    # Tensors that are turned in two ways, and so become two: what the other one is called.
    untied: Mapping[str, str] = field(default_factory=dict)
    # How weights are put into files.
    filing: Filing = field(default_factory=InCompressedTensors)
    # Scales of a key-value cache that are measured and added; None: none are.
    kv_cache: CacheScales | None = None

    @property
    def fused(self) -> list[list[str]]:
        """Quantized weights that serving engines load into one matrix, and plain ones among them."""
        modules = [name.removesuffix(".weight") for name in self.owners]
        groups = [[f"{module}.weight" for module in found] for found in fused(modules)]
        return [names for names in groups if any(name in self.schemes for name in names)]

    @property
    def divided(self) -> list[str]:
        """Weights that engines load into one matrix with others of another scheme, which they refuse."""
        found = [names for names in self.fused if len({self.schemes.get(name) for name in names}) > 1]
        return [name for names in found for name in names]

    @property
    def algorithm(self) -> str:
        """What rounds the weights, by name."""
        return "rtn" if self.method is None or self.calibration is None else self.method.name

    @property
    def files(self) -> dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]:
        """Tensors of each output file, which has the name of the input file they come from."""
        files = {
            name: [planned for entry in entries for planned in self.outputs(entry)]
            for name, entries in self.checkpoint.shards.items()
        }
        for file, scale in self.cache_scales:
            files[file].append(scale)
        return files

    @property
    def metadata(self) -> dict[str, str]:
        """What every file says of itself."""
        return {"format": "pt"} | written_by("lowbit-hf") | notes_of(self.checkpoint)

    @property
    def cache_scales(self) -> list[tuple[str, Entry]]:
        """Output file of every scale of the key-value cache that is added, and its name, dtype and shape."""
        return [] if self.kv_cache is None else list(self.kv_cache.entries())

    def outputs(self, entry: TensorEntry) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What one input tensor becomes."""
        scheme = self.schemes.get(entry.name)
        if scheme is None:
            names = [entry.name, *([self.untied[entry.name]] if entry.name in self.untied else [])]
            return [(name, entry.dtype, entry.shape) for name in names]
        made = self.filing.entries(scheme, self.matrix_shape(entry), self.dtype)
        return [(self.filing.join(entry.name, local), dtype, shape) for local, dtype, shape in made]

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
        cache = None if self.kv_cache is None else self.kv_cache.kind
        written = [self.filing.name, self.metadata]
        told = [self.checkpoint.fingerprint(), self.config, decisions, self.mode, how, written, cache]
        text = json.dumps(told, sort_keys=True)
        return sha256(text.encode()).hexdigest()


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
    max_memory: int | None = None,
    max_gpu: int | None = None,
    layout: Name = "compressed-tensors",
    kv_cache: KvCache | None = None,
) -> Job:
    """Decide what happens to every tensor of the checkpoint in `folder`; nothing is written.

    Every Linear (and GPT-2's Conv1D) weight and every expert gets scheme `to`, but for the output head and routers,
    which stay; `keep` and `rules` (patterns on checkpoint or model names, in this order) go before that. A stack of
    experts is a matrix for each, unless all of them stay. `kv_cache` adds scales of a key-value cache.

    Raises:
        CheckpointError: the folder is damaged.
        RecipeError: a pattern matches nothing, a weight does not fit its scheme, too little is covered, or the model or
            the layout has no place for scales of a cache.
    """
    skeleton = Skeleton.build(folder)
    config = read_config(folder)
    # A weight that is quantized already is what it stands for.
    checkpoint = take_apart(open_plain(folder, config, skeleton), skeleton)
    config = without_quantization(config, skeleton.dtype)
    owners = {name: skeleton.owner(name) for name in checkpoint.entries}
    parameters = [_parameter(entry, owners[entry.name]) for entry in checkpoint.entries.values()]
    # What a match on tensors stands for, in the user's words.
    stacks = checkpoint.stacks if isinstance(checkpoint, Apart) else {}
    meant = {pattern: _translate(pattern, owners, stacks) for pattern in (*keep, *(pattern for pattern, _ in rules))}
    given = {match: pattern for pattern, match in meant.items()}
    made: list[tuple[Rule, Scheme | None]] = [(Rule(meant[pattern], None), None) for pattern in keep]
    nonfinite: tuple[str, ...] = ()
    if allow_nonfinite:
        candidates = [name for name in checkpoint.entries if not any(rule.matches_name(name) for rule, _ in made)]
        nonfinite = tuple(name for name in candidates if not _finite(checkpoint, checkpoint.entries[name]))
    made += [(Rule(name, None), None) for name in nonfinite]
    for pattern, scheme in rules:
        made += _rules(meant[pattern], scheme, skeleton.dtype, parameters, made)
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
    if isinstance(checkpoint, Apart):
        checkpoint, found = _with_whole(checkpoint, found, schemes)
        owners = {name: skeleton.owner(name) for name in checkpoint.entries}
    rotated = calibration is not None and method is not None and method.rotation
    untied = _untied(skeleton, owners, schemes) if rotated else {}
    job = Job(
        folder,
        checkpoint,
        skeleton,
        config,
        found,
        schemes,
        owners,
        mode,
        nonfinite,
        calibration,
        method,
        max_memory,
        max_gpu,
        untied,
        _filing(layout, schemes, calibration, method),
        None if kv_cache is None else plan_cache(kv_cache, checkpoint, skeleton, owners),
    )
    if kv_cache is not None and layout != "compressed-tensors":
        raise RecipeError(
            f"nothing that reads {layout}'s layout keeps a key-value cache in fp8, so its scales go into "
            "compressed-tensors alone; leave --kv-cache or --layout"
        )
    _check_outputs(job)
    _check_stacks(job)
    return job


def _filing(
    layout: Name, schemes: Mapping[str, Scheme], calibration: Calibration | None, method: Method | None
) -> Filing:
    """How weights are put into files of a layout.

    Raises:
        RecipeError: it has no place for them.
    """
    kept = calibration is not None and method is not None and method.smoothing is not None and method.pre_scale
    if layout == "lowbit":
        return InLowbit(kept)
    if kept:
        raise RecipeError(
            "compressed-tensors has no place for smoothing factors that stay with a weight; give pre_scale=False, or "
            "write lowbit's layout (--layout lowbit)"
        )
    for name, scheme in schemes.items():
        if scheme.file_format == OWN:
            raise RecipeError(
                f"{scheme.name!r}, for {name!r}, is no scheme of compressed-tensors (see lowbit schemes); a format by "
                "its spec goes into lowbit's layout: --layout lowbit"
            )
    return InCompressedTensors()


def _untied(skeleton: Skeleton, owners: Mapping[str, Owner | None], schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """The embedding that is also the output head, which rotation turns in another way, and what that is called.

    Raises:
        RecipeError: it is to be quantized.
    """
    head = f"{skeleton.output_embedding}.weight"
    stored = {owner.name: name for name, owner in owners.items() if owner is not None}
    embedding = stored.get(f"{skeleton.input_embedding}.weight")
    if head in stored or embedding is None:
        return {}
    if embedding in schemes:
        raise RecipeError(
            f"{embedding!r} is the output head too, which rotation makes a tensor of its own; such an embedding cannot "
            "be quantized: leave it by --keep"
        )
    return {embedding: head}


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


def _translate(pattern: str, owners: Mapping[str, Owner | None], stacks: Mapping[str, Stack]) -> str:
    """The pattern on tensor names that a user's pattern stands for: tensors, modules, or the model's parameters.

    That of a stack of experts stands for all that is in it.
    """
    rule = Rule(pattern, None)
    direct = [name for name in owners if rule.matches_name(name)]
    whole = [stack.matrices(name) for name, stack in stacks.items() if rule.matches_name(name)]
    if whole:
        return "re:" + "|".join([*map(re.escape, direct), *whole])
    if direct:
        return pattern
    module = Rule(f"{pattern}.weight", None)
    if any(module.matches_name(name) for name in owners):
        return module.match
    held = [name for name, owner in owners.items() if owner is not None and rule.matches_name(owner.name)]
    return "re:" + "|".join(re.escape(name) for name in held) if held else pattern


def _with_whole(checkpoint: Apart, found: Plan, schemes: Mapping[str, Scheme]) -> tuple[Checkpoint, Plan]:
    """The checkpoint and the plan with those stacks whole of which nothing is quantized."""
    divided = {checkpoint.experts[name].stack for name in schemes if name in checkpoint.experts}
    rows: dict[str, Row] = {}
    for row in found.rows:
        place = checkpoint.experts.get(row.name)
        if place is None or place.stack in divided:
            rows[row.name] = row
        elif place.stack not in rows:
            entry = checkpoint.stored.entries[place.stack]
            held = {"bytes_before": entry.nbytes, "bytes_after": entry.nbytes}
            rows[place.stack] = replace(row, name=entry.name, shape=entry.shape, **held)
    left = {name: stack for name, stack in checkpoint.stacks.items() if name in divided}
    return Apart(checkpoint.stored, left) if left else checkpoint.stored, Plan(tuple(rows.values()))


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
    """Refuse schemes, and scales of a key-value cache, that need calibration data where there is none.

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
    if job.kv_cache is not None and job.calibration is None:
        raise RecipeError(
            "--kv-cache stores scales of keys and values, which only data tells; give a text by --calibrate FILE, or "
            "leave it"
        )


def _check_stacks(job: Job) -> None:
    """Refuse stacks of experts that would have several schemes where a stack is calibrated as one weight.

    Also those that a model keeps with gate and up in turn, in a format with one scale for several rows.

    Raises:
        RecipeError: there is one.
    """
    if isinstance(job.checkpoint, Apart):
        for name, place in job.checkpoint.experts.items():
            scheme = job.schemes.get(name)
            rows = 1 if scheme is None else scheme.weight.block[-2]
            if scheme is not None and rows > 1 and job.checkpoint.stacks[place.stack].interleaved:
                raise RecipeError(
                    f"{scheme.name} has one scale for {rows} rows, and the model keeps gate and up of {place.stack!r} "
                    "in turn, a row of each, which no such scale fits; use a scheme with scales of rows, or leave it "
                    "by --keep"
                )
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
        and (owner.name == f"{skeleton.output_embedding}.weight" or ROUTER.search(name))
    ]
    return [name for name in names if not any(rule.matches_name(name) for rule in decided)]
