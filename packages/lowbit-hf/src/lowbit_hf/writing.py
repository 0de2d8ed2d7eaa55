"""Writing a job's output: weights are read, rounded, and put at their final place, a row slice or a block at a time."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.errors import CheckpointError
from lowbit.format import WHOLE, Format
from lowbit.hadamard import Rotation
from lowbit.numerics import Scales, choose_scale, decode, encode, tensor_scale_for_amax
from lowbit.shards import TensorEntry, row_slices
from lowbit.staging import ShardWriter, Staging
from lowbit_algos import Method
from lowbit_algos.rotation import Ends
from lowbit_algos.rounding import decibels
from lowbit_hf.budget import Budget
from lowbit_hf.calibrated import Calibrated, Progress
from lowbit_hf.job import Job
from lowbit_hf.processes import together
from lowbit_hf.schemes import Scheme

R = TypeVar("R")

# Small enough that a slice's float32 intermediates stay in the processor's caches, large enough to hide Python.
_SLICE_BYTES = 2 << 20
# Of a slice's rows, one in so many is decoded again, to tell what rounding cost.
_JUDGED = 8
# In the scratch folder: a line for each weight rounded to nearest.
ROUNDED = "rounded.jsonl"


class NonFiniteWeightError(CheckpointError):
    """A weight holds NaN or infinity."""


class Reader:
    """Reads the tensors of a job's checkpoint, rotated where its ends are."""

    def __init__(self, job: Job, ends: Ends | None = None, rotation: Rotation | None = None) -> None:
        self._checkpoint, self._ends, self._rotation = job.checkpoint, ends, rotation
        self._parts: dict[str, str] = {}
        if ends is not None:
            owned = {owner.name: name for name, owner in job.owners.items() if owner is not None}
            self._parts = {owned[part]: part for part in ends.names if part in owned}
            self._norm = job.checkpoint.read(job.checkpoint.entries[owned[ends.norm]])

    def read(self, entry: TensorEntry, rows: slice | None = None, *, as_head: bool = False) -> Tensor:
        """A tensor or rows of it; `as_head` what it is as the head that it is tied to."""
        data, part = self._checkpoint.read(entry, rows), self._parts.get(entry.name)
        if part is None or self._ends is None or self._rotation is None:
            return data
        return self._ends.turned(self._ends.head if as_head else part, data, self._rotation, self._norm)


class _TensorScales:
    """The tensor scales of two-level formats, one for all projections that engines fuse; chosen when asked for."""

    def __init__(self, job: Job, run: Run, reader: Reader) -> None:
        self._job, self._run, self._reader = job, run, reader
        self._amax: dict[str, Tensor] = {}
        self._fused = {name: names for names in job.fused for name in names}

    def of(self, name: str, fmt: Format) -> Tensor | None:
        if not fmt.tensor_scale:
            return None
        amax = torch.stack([self._largest(sibling) for sibling in self._siblings(name)]).amax()
        return tensor_scale_for_amax(amax.reshape(1, 1), fmt)

    def _siblings(self, name: str) -> list[str]:
        schemes = self._job.schemes
        return [each for each in self._fused.get(name, [name]) if schemes.get(each) == schemes[name]]

    def _largest(self, name: str) -> Tensor:
        if name not in self._amax:
            entry = self._job.checkpoint.entries[name]

            def largest(rows: slice) -> Tensor:
                return self._reader.read(entry, rows).abs().amax().to(torch.float32)

            found = [amax for _, amax in self._run.in_order(largest, row_slices(entry, _SLICE_BYTES))]
            self._amax[name] = torch.stack(found).amax().to(self._run.device)
        return self._amax[name]


def write_rest(
    job: Job, staging: Staging, file: str, run: Run, without: AbstractSet[str], reader: Reader
) -> ShardWriter:
    """Write a file's tensors, those `without` excepted: as they are, or rounded to nearest."""
    writer, scales = staging.plan_file(file, job.files[file], job.metadata), _TensorScales(job, run, reader)
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
                writer.write(entry.name, reader.read(entry, rows if entry.shape else None), rows.start)
                if entry.name in job.untied:
                    writer.write(job.untied[entry.name], reader.read(entry, rows, as_head=True), rows.start)
            run.advance(entry.nbytes)
        else:
            _note(staging, entry.name, _write_weight(job, writer, entry, scheme, run, scales, reader))
        staging.done(unit)
    return writer


def _note(staging: Staging, name: str, sqnr: float) -> None:
    """Remember how a weight fared, for the report of the run that finishes."""
    path = staging.scratch / ROUNDED
    with path.open("a") as lines:
        # A kill may have left a line without its end.
        lines.write("\n" + json.dumps([name, sqnr]))
    staging.wrote(path)


def write_calibrated(
    job: Job, calibrated: Calibrated, windows: Tensor, budget: Budget, staging: Staging, run: Run
) -> None:
    """Write everything: what lies outside the blocks first, then each block when it is done.

    Raises:
        LowbitError: the run takes more memory than is allowed.
    """
    reader = Reader(job, calibrated.ends, calibrated.rotation)
    writers = {file: write_rest(job, staging, file, run, calibrated.names, reader) for file in job.checkpoint.shards}
    budget.check()
    file_of = {entry.name: file for file, entries in job.checkpoint.shards.items() for entry in entries}
    entries = job.checkpoint.entries
    added = {name: file for file, (name, _, _) in job.cache_scales}

    def write(name: str, weight: Tensor | None) -> None:
        if name in added and weight is not None:
            writers[added[name]].write(name, weight.cpu())
            return
        entry, writer, filing = entries[name], writers[file_of[name]], job.filing
        if isinstance(weight, QuantizedTensor):
            stored = filing.whole(job.schemes[name], weight, job.matrix_shape(entry), job.dtype)
            for local, tensor in stored.items():
                writer.write(filing.join(name, local), tensor.cpu().contiguous())
        else:
            plain = job.checkpoint.read(entry) if weight is None else weight.to("cpu", entry.dtype).contiguous()
            writer.write(name, plain)
        run.advance(entry.nbytes)

    def done(blocks: Sequence[str], files: Sequence[Path]) -> None:
        together()
        staging.wrote(*files)
        staging.done(*(f"block:{block}" for block in blocks))
        staging.sync()
        budget.check()

    for block in calibrated.blocks:
        if staging.is_done(f"block:{block}"):
            run.advance(sum(entries[name].nbytes for name in calibrated.stored(block)))
    progress = Progress(staging.scratch, lambda block: staging.is_done(f"block:{block}"), done)
    calibrated.run(windows, job.method or Method(), progress, write, tokens=budget.tokens, held=budget.held)
    for writer in writers.values():
        writer.finish()


def _write_weight(
    job: Job, writer: ShardWriter, entry: TensorEntry, scheme: Scheme, run: Run, scales: _TensorScales, reader: Reader
) -> float:
    """Write a weight rounded to nearest; its SQNR in dB, judged by some of its rows."""
    fmt, filing = scheme.weight_format(job.dtype), job.filing
    shape = job.matrix_shape(entry)
    align = filing.alignment(scheme) or shape[0]
    # What has no dims is not of rows.
    strides = {local: size[0] if size else 0 for local, _, size in filing.entries(scheme, (align, shape[1]), job.dtype)}
    tensor_scale = scales.of(entry.name, fmt)
    transposed = job.transposed(entry.name)
    # A weight kept as (K, N) is read whole: its rows are the file's columns.
    slices = [slice(0, shape[0])] if transposed else row_slices(entry, _SLICE_BYTES, align)

    def convert(rows: slice) -> tuple[dict[str, Tensor], tuple[float, float]]:
        piece = reader.read(entry).mT if transposed else reader.read(entry, rows)
        x = piece.to(run.device).contiguous()
        chosen = choose_scale(x, fmt, mode=job.mode, tensor_scale=tensor_scale)
        if not bool(torch.isfinite(chosen.scale.to(torch.float32)).all()):
            msg = (
                f"tensor {entry.name!r} holds NaN or infinity in rows {rows.start} to {rows.stop}; repair the "
                "checkpoint, or keep such tensors unquantized with --allow-nonfinite"
            )
            raise NonFiniteWeightError(msg)
        data = encode(x, fmt, chosen)
        return filing.rows(scheme, data.cpu(), chosen.cpu(), shape, rows.start), _judge(x, data, fmt, chosen)

    signal = noise = 0.0
    for rows, (tensors, judged) in run.in_order(convert, slices):
        signal, noise = signal + judged[0], noise + judged[1]
        for local, tensor in tensors.items():
            writer.write(filing.join(entry.name, local), tensor.contiguous(), rows.start // align * strides[local])
        run.advance((rows.stop - rows.start) * entry.nbytes // max(shape[0], 1))
    return decibels(signal, noise)


def _judge(x: Tensor, data: Tensor, fmt: Format, scales: Scales) -> tuple[float, float]:
    """Squares of the values, and of what rounding changed, over the first of a slice's rows."""
    step = x.shape[0] if fmt.block[-2] == WHOLE else fmt.block[-2]
    rows = min(max(x.shape[0] // _JUDGED // step, 1) * step, x.shape[0])
    scale_rows = -(-rows // step)
    zero = None if scales.zero is None else scales.zero[:scale_rows]
    few = Scales(scales.scale[:scale_rows], zero, scales.tensor_scale)
    values = x[:rows].to(torch.float32)
    error = values - decode(data[:rows], fmt, few, x.shape[1])
    return float(values.square().sum()), float(error.square().sum())


class Run:
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
