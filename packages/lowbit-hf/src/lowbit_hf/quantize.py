"""Quantizing a checkpoint from disk to disk: planned whole, then streamed a row slice at a time.

Weights are never all in memory: a slice of a tensor is read, rounded, and written at its final place in an output file
whose layout the plan fixed beforehand. The output appears whole or not at all, and a run that was killed continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, RecipeError
from lowbit.report import Report
from lowbit.shards import INDEX_NAME, Checkpoint, TensorEntry, row_slices
from lowbit.staging import Staging, scratch_of
from lowbit_hf.apart import Apart
from lowbit_hf.budget import Budget
from lowbit_hf.calibrated import Calibrated
from lowbit_hf.carrying import check_target, ignored_modules, other_files, texts_of
from lowbit_hf.filing import InLowbit
from lowbit_hf.job import Job, prepare, require_data
from lowbit_hf.layouts.layout import Outline
from lowbit_hf.layouts.lowbit import LowbitWriter
from lowbit_hf.patterns import PREFIX
from lowbit_hf.processes import agree, follow, rank, require_windows, together
from lowbit_hf.reporting import REPORTS, report_of
from lowbit_hf.schemes import Scheme, quantization_config, targets_of
from lowbit_hf.stored import Plain
from lowbit_hf.writing import NonFiniteWeightError, Reader, Run, write_calibrated, write_rest

__all__ = ["Account", "NonFiniteWeightError", "foresee", "prepare", "run"]

# Bytes of a tensor that are compared at a time.
_COMPARED = 64 << 20


@dataclass(frozen=True, slots=True)
class Account:
    """Where everything went: proof that nothing was lost."""

    # Input tensor -> the output tensors it became, read back from the written files.
    tensors: Mapping[str, tuple[str, ...]]
    # Input tensors that are, or hold experts that are.
    quantized: int
    # Tensors that stay as precise as they were, but hold other values, for what others became.
    changed: tuple[str, ...]
    # Tensors the model itself has no place for, carried all the same.
    unowned: tuple[str, ...]
    files: tuple[str, ...]
    # Files that are of the original alone: weights in another form, the report of another run; and scales of its cache.
    left_behind: tuple[str, ...]
    # Output tensors that come of no input: scales of the key-value cache.
    added: tuple[str, ...] = ()


def run(
    job: Job,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    command: str = "",
    settle: bool = True,
    advance: Callable[[int], None] | None = None,
) -> Account | None:
    """Carry a job out; `advance(bytes)` after every slice of input, `command` is what an error tells to run again.

    Without `settle`, the same job finds `out` done until `lowbit.staging.Staging.open` settles it.

    Of several processes that `lowbit_hf.processes.join` joined, the first writes and returns the account.

    Raises:
        CheckpointError: the output exists or cannot be written, space runs out, or a weight holds NaN or infinity.
        RecipeError: a scheme needs calibration data, and there is none; or memory cannot hold a block.
        LowbitError: the run took more memory than it may; what is done is kept.
    """
    started = time.monotonic()
    check_target(job.folder, out)
    require_data(job)
    windows, calibrated = _calibration(job, device)
    budget = Budget(job, calibrated, device)
    if rank():
        # Only calibration is shared out.
        if windows is not None and calibrated is not None:
            with budget.kept():
                follow(job, calibrated, windows, budget, scratch_of(out))
        return None
    carried, left_behind = other_files(job.folder, job.checkpoint)
    texts, lost = texts_of(job.folder)
    stored = job.checkpoint.stored if isinstance(job.checkpoint, Apart) else job.checkpoint
    left_behind += [*lost, *(stored.cache_left if isinstance(stored, Plain) else ())]
    opened = Staging.open(out, fingerprint=job.fingerprint(), overwrite=overwrite, command=command, settle=settle)
    with opened as staging:
        if staging.published:
            return _account(job, out, [*carried, *texts], left_behind)
        _require_space(job, staging, carried)
        try:
            with budget.kept(), Run(device, advance) as run_:
                if windows is None or calibrated is None:
                    for file in job.checkpoint.shards:
                        write_rest(job, staging, file, run_, set(), Reader(job)).finish()
                        budget.check()
                else:
                    budget.agree(agree(_agreed(staging, budget.tokens)), held=bool(agree(int(budget.held))))
                    together()
                    write_calibrated(job, calibrated, windows, budget, staging, run_)
        except NonFiniteWeightError:
            # No later run could use what is there: the input itself has to change.
            staging.discard()
            raise
        seconds = time.monotonic() - started
        report = report_of(job, staging.scratch, command=command, seconds=seconds, budget=budget)
        _write_others(job, staging, carried, texts, report)
        account = _account(job, staging.files, [*carried, *texts], left_behind)
        staging.publish()
    return account


def foresee(job: Job, device: str) -> Budget:
    """What a run would take of memory; nothing is written.

    Raises:
        RecipeError: it would be refused.
    """
    _, calibrated = _calibration(job, device)
    return Budget(job, calibrated, device)


def _calibration(job: Job, device: str) -> tuple[Tensor, Calibrated] | tuple[None, None]:
    """What a job calibrates on, and what it calibrates, if it does."""
    if job.calibration is None:
        return None, None
    windows = job.calibration.windows(job.folder)
    require_windows(windows)
    rotated = job.method is not None and job.method.rotation
    calibrated = Calibrated(
        *(job.checkpoint, job.skeleton, job.owners, job.schemes), rotated=rotated, device=device, kv_cache=job.kv_cache
    )
    _require_observed(job, calibrated)
    return windows, calibrated


def _require_observed(job: Job, calibrated: Calibrated) -> None:
    """Refuse a stored input scale for a weight outside the blocks, whose inputs are not observed."""
    for name, scheme in job.schemes.items():
        if scheme.needs_data and name not in calibrated.names:
            raise RecipeError(
                f"{name!r} lies outside the model's blocks, where inputs are not observed, and scheme {scheme.name} "
                f"stores a scale for its input; leave it by --keep, or give it a scheme without by --rule"
            )


def _require_space(job: Job, staging: Staging, carried: Sequence[str]) -> None:
    """Refuse a disk that cannot hold the output, and leave nothing of one that was not begun."""
    try:
        staging.require_space(job.output_bytes + sum((job.folder / name).stat().st_size for name in carried))
    except CheckpointError:
        if not any(staging.files.iterdir()):
            staging.discard()
        raise


def _write_others(job: Job, staging: Staging, carried: Sequence[str], texts: Mapping[str, str], report: Report) -> None:
    """Write all but the tensors, and put everything on disk."""
    for name in carried:
        staging.copy_file(job.folder / name, name)
    for name, text in texts.items():
        staging.write_text(name, text)
    staging.write_text("config.json", json.dumps(output_config(job), indent=2) + "\n")
    if (job.folder / INDEX_NAME).exists():
        staging.write_text(INDEX_NAME, json.dumps(output_index(job), indent=2) + "\n")
    for name, text in zip(REPORTS, (report.to_json() + "\n", report.to_html()), strict=True):
        staging.write_text(name, text)
    staging.sync()


def _agreed(staging: Staging, tokens: int) -> int:
    """How many tokens run at once, as the run that this one continues decided: last bits depend on it."""
    path = staging.scratch / "tokens"
    if path.is_file() and (text := path.read_text()).isdecimal():
        return int(text)
    path.write_text(str(tokens))
    staging.wrote(path)
    staging.sync()
    return tokens


def output_config(job: Job) -> dict[str, Any]:
    """The `config.json` of what a job makes."""
    untied = {"tie_word_embeddings": False} if job.untied else {}
    return {**job.config, **untied, "quantization_config": _quantization_config(job)}


def _quantization_config(job: Job) -> dict[str, Any]:
    if isinstance(job.filing, InLowbit):
        entries = job.checkpoint.entries
        shapes = {name: (job.matrix_shape(entries[name]), scheme) for name, scheme in job.schemes.items()}
        outlines = {
            name: Outline(shape, scheme.weight_format(job.dtype), scheme.activation, job.dtype)
            for name, (shape, scheme) in shapes.items()
        }
        return LowbitWriter().config(outlines, ())
    modules: dict[Scheme, list[str]] = {}
    for name, scheme in job.schemes.items():
        modules.setdefault(scheme, []).append(name.removesuffix(".weight"))
    classes = ["Linear", *(["Conv1D"] if any(job.transposed(name) for name in job.schemes) else [])]
    named = {name.removesuffix(".weight") for name in job.schemes if not job.linear(name)}
    groups = targets_of(modules, named, classes)
    ignored = ignored_modules(job.checkpoint, job.skeleton, job.owners, set(job.schemes))
    # Engines name the experts of a stack that stays by the matrices that it is made of.
    whole = {name: job.skeleton.stack(name, entry.shape) for name, entry in job.checkpoint.entries.items()}
    ignored += [PREFIX + stack.modules(name) for name, stack in whole.items() if stack is not None]
    return quantization_config(groups, ignored, None if job.kv_cache is None else job.kv_cache.scheme)


def output_index(job: Job) -> dict[str, Any]:
    """The index of the files that a job makes."""
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
    became: Mapping[str, tuple[str, ...]] = {
        name: tuple(planned for planned, _, _ in job.outputs(entry)) for name, entry in job.checkpoint.entries.items()
    }
    expected = {name for names in became.values() for name in names} | {name for _, (name, _, _) in job.cache_scales}
    quantized = set(job.schemes)
    if isinstance(job.checkpoint, Apart):
        became, quantized = job.checkpoint.by_stack(became), job.checkpoint.wholes(quantized)
    with Checkpoint.open(folder) as written:
        added = tuple(name for _, (name, _, _) in job.cache_scales)
        if expected != set(written.entries):
            lost, extra = sorted(expected - set(written.entries)), sorted(set(written.entries) - expected)
            msg = (
                f"the output lacks {lost[:5]} ({len(lost)}) and adds {extra[:5]} ({len(extra)}); nothing was published"
            )
            raise CheckpointError(msg)
        kept = [entry for entry in job.checkpoint.entries.values() if entry.name not in job.schemes]
        # Only what looks into a block changes what it does not quantize.
        looks = job.method is not None and job.method.probes
        changed = tuple(entry.name for entry in kept if looks and not _equal(job.checkpoint, written, entry))
    unowned = tuple(name for name, owner in job.owners.items() if owner is None)
    return Account(became, len(quantized), changed, unowned, tuple(carried), tuple(left_behind), added)


def _equal(before: Checkpoint, after: Checkpoint, entry: TensorEntry) -> bool:
    slices = row_slices(entry, _COMPARED) if entry.shape else [None]
    return all(torch.equal(before.read(entry, rows), after.read(after.entries[entry.name], rows)) for rows in slices)
