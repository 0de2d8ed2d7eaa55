"""A checkpoint's stacks of experts seen as a matrix for each expert, and such matrices seen as stacks again.

Files of matrices do not tell what they were, where a model takes either. So a run that takes stacks apart notes their
names in each file's metadata, under `stacks`: `{"STACK": TRANSPOSED, ...}` as JSON, of those it quantized.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from threading import Lock

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.header import as_object, parse_json
from lowbit.shards import Checkpoint, TensorEntry
from lowbit_hf.skeleton import Skeleton
from lowbit_hf.stacks import Stack

_KEY = "stacks"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Expert:
    """A matrix of a stack: whose, and the number of its projection."""

    stack: str
    expert: int
    number: int


class Apart(Checkpoint):
    """A view of a checkpoint with the matrices (N, K) of `stacks` in place of those."""

    def __init__(self, stored: Checkpoint, stacks: Mapping[str, Stack]) -> None:
        """Name the matrices; one expert at a time is in memory.

        Raises:
            CheckpointError: a matrix is there too, by itself.
        """
        self.stored, self.stacks, self._lock = stored, dict(stacks), Lock()
        self.experts: dict[str, Expert] = {}
        self._held: tuple[tuple[str, int], Tensor] | None = None
        self.shards = {
            file: [part for entry in entries for part in self._parts(entry)] for file, entries in stored.shards.items()
        }
        self.entries = {entry.name: entry for entries in self.shards.values() for entry in entries}
        if twice := next((name for name in self.experts if name in stored.entries), None):
            raise CheckpointError(f"{twice!r} is there beside {self.experts[twice].stack!r}, which holds it too")
        self.metadata, self.nbytes = stored.metadata, stored.nbytes

    def read(self, entry: TensorEntry, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """See `Checkpoint`."""
        if entry.name not in self.experts:
            return self.stored.read(entry, rows, out)
        place = self.experts[entry.name]
        matrix = self.stacks[place.stack].take(self._slab(place), place.number)[rows or slice(None)]
        return matrix.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(matrix)

    def by_stack(self, became: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """What each tensor became, that of all matrices of a stack told of the stack."""
        told: dict[str, tuple[str, ...]] = {}
        for name, made in became.items():
            whole = self.experts[name].stack if name in self.experts else name
            told[whole] = (*told.get(whole, ()), *made)
        return told

    def wholes(self, names: Collection[str]) -> set[str]:
        """The tensors of the files that these are, or are of."""
        return {self.experts[name].stack if name in self.experts else name for name in names}

    def fingerprint(self) -> str:
        """See `Checkpoint`."""
        return self.stored.fingerprint()

    def close(self) -> None:
        """See `Checkpoint`."""
        self.stored.close()

    def _slab(self, place: Expert) -> Tensor:
        """All that a stack holds of an expert; its projections are read one after the other."""
        key = place.stack, place.expert
        with self._lock:
            if self._held is None or self._held[0] != key:
                self._held = None
                one = slice(place.expert, place.expert + 1)
                self._held = key, self.stored.read(self.stored.entries[place.stack], one)[0]
            return self._held[1]

    def _parts(self, entry: TensorEntry) -> list[TensorEntry]:
        stack = self.stacks.get(entry.name)
        if stack is None:
            return [entry]
        count, *matrix = entry.shape
        rows, k = reversed(matrix) if stack.transposed else matrix
        shape = rows // len(stack.projections), k
        made: list[TensorEntry] = []
        for e in range(count):
            for number, name in enumerate(stack.parts(entry.name.rpartition(".")[0], e)):
                self.experts[name] = Expert(entry.name, e, number)
                made.append(replace(entry, name=name, shape=shape, nbytes=prod(shape) * entry.dtype.itemsize))
        return made


class Joined(Checkpoint):
    """A view of a checkpoint with stacks in place of the matrices that would make them."""

    def __init__(self, stored: Checkpoint, stacks: Mapping[str, tuple[Stack, Sequence[Sequence[str]]]]) -> None:
        """Take stacks by name, and the names of each expert's matrices.

        Raises:
            CheckpointError: the matrices of a stack differ in shape.
        """
        self.stored, self.stacks = stored, stacks
        first = {parts[0][0]: name for name, (_, parts) in stacks.items()}
        inside = {name for _, parts in stacks.values() for each in parts for name in each}
        self.shards = {
            file: [
                self._entry(first[entry.name]) if entry.name in first else entry
                for entry in entries
                if entry.name in first or entry.name not in inside
            ]
            for file, entries in stored.shards.items()
        }
        self.entries = {entry.name: entry for entries in self.shards.values() for entry in entries}
        self.metadata = stored.metadata
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())

    def read(self, entry: TensorEntry, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """See `Checkpoint`."""
        if entry.name not in self.stacks:
            return self.stored.read(entry, rows, out)
        stack, parts = self.stacks[entry.name]
        entries, dtype = self.stored.entries, entry.dtype
        read = [[self.stored.read(entries[name]).to(dtype) for name in each] for each in parts[rows or slice(None)]]
        made = stack.join(read)
        return made if out is None else out.copy_(made)

    def fingerprint(self) -> str:
        """See `Checkpoint`."""
        return self.stored.fingerprint()

    def close(self) -> None:
        """See `Checkpoint`."""
        self.stored.close()

    def _entry(self, name: str) -> TensorEntry:
        stack, parts = self.stacks[name]
        found = [self.stored.entries[part] for each in parts for part in each]
        first = found[0]
        if any(entry.shape != first.shape for entry in found) or len(first.shape) != 2:
            raise CheckpointError(f"the matrices of {name!r} differ in shape; the folder is damaged")
        dtype = first.dtype
        for entry in found:
            dtype = torch.promote_types(dtype, entry.dtype)
        (n, k), count = first.shape, len(stack.projections)
        shape = (len(parts), k, n * count) if stack.transposed else (len(parts), n * count, k)
        return TensorEntry(name, dtype, shape, first.file, 0, prod(shape) * dtype.itemsize)


def take_apart(checkpoint: Checkpoint, skeleton: Skeleton) -> Checkpoint:
    """The checkpoint with each of its stacks of experts in floating point as matrices; itself if there are none."""
    stacks: dict[str, Stack] = {}
    for name, entry in checkpoint.entries.items():
        if len(entry.shape) == 3 and entry.dtype in _FLOATS and 0 not in entry.shape:
            stack = skeleton.stack(name, entry.shape)
            if stack is not None:
                stacks[name] = stack
    return Apart(checkpoint, stacks) if stacks else checkpoint


def put_together(checkpoint: Checkpoint, skeleton: Skeleton) -> Checkpoint:
    """The checkpoint with stacks where it once had them, or where transformers knows nothing else of its model.

    Raises:
        CheckpointError: the notes of what was there cannot be read, or matrices of a stack do not fit one another.
    """
    noted = _noted(checkpoint)
    found: dict[str, Stack] = {}
    for name in checkpoint.entries:
        place = skeleton.stack_of(name)
        if place is not None:
            found[place[0]] = place[1]
    for name, transposed in noted.items():
        stack = found.get(name) or skeleton.stack(name)
        if stack is not None:
            found[name] = replace(stack, transposed=transposed)
    stacks: dict[str, tuple[Stack, list[list[str]]]] = {}
    for name, stack in found.items():
        parts, module = list[list[str]](), name.rpartition(".")[0]
        while all(part in checkpoint.entries for part in stack.parts(module, len(parts))):
            parts.append(stack.parts(module, len(parts)))
        if parts:
            stacks[name] = stack, parts
    return Joined(checkpoint, stacks) if stacks else checkpoint


def notes_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What the metadata of files say of stacks that were taken apart, now or by the run that made the checkpoint."""
    told = {} if _KEY not in checkpoint.metadata else _noted(checkpoint)
    if isinstance(checkpoint, Apart):
        told |= {name: stack.transposed for name, stack in checkpoint.stacks.items()}
    return {_KEY: json.dumps(told)} if told else {}


def _noted(checkpoint: Checkpoint) -> dict[str, bool]:
    given = checkpoint.metadata.get(_KEY)
    if given is None:
        return {}
    found = as_object(parse_json(given.encode(), f"metadata {_KEY!r}", 1))
    if found is None or not all(isinstance(value, bool) for value in found.values()):
        raise CheckpointError(f"metadata {_KEY!r} of the files is no object of names and booleans; they are damaged")
    return {name: bool(value) for name, value in found.items()}
