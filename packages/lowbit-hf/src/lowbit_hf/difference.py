"""Comparing two checkpoints tensor by tensor, straight from disk, without running a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.apply import plain_weight
from lowbit.errors import CheckpointError
from lowbit.shards import TensorEntry
from lowbit.tensor import QuantizedTensor
from lowbit_hf.apart import Expert
from lowbit_hf.gguf.source import is_gguf, open_checkpoint
from lowbit_hf.layouts import layout_of
from lowbit_hf.layouts.compressed_tensors import CompressedTensors
from lowbit_hf.loading import outline_of, read_weight
from lowbit_hf.skeleton import Skeleton, read_config
from lowbit_hf.stacks import PROJECTIONS, Stack


@dataclass(frozen=True, slots=True)
class Difference:
    """How one tensor differs between checkpoints A and B."""

    name: str
    shape: tuple[int, ...]
    # What each side stores: a dtype or a format spec.
    stored_a: str
    stored_b: str
    # Signal-to-quantization-noise ratio 10 log10(sum a^2 / sum (a - b)^2), in dB; infinite where equal.
    sqnr: float
    # Largest |a - b|; NaN where either has one.
    largest: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All tensors of two checkpoints."""

    differences: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    # Scales of a key-value cache in one that the other has nothing like, which is no loss.
    caches_a: tuple[str, ...] = ()
    caches_b: tuple[str, ...] = ()


class Weights:
    """The tensors of a checkpoint by plain name, compressed ones put together when asked for."""

    def __init__(self, folder: Path) -> None:
        """Open a folder; close it with `close`."""
        self._folder, self.checkpoint = folder, open_checkpoint(folder)
        whole = folder.is_dir() or is_gguf(folder)
        self._layout = layout_of(folder, read_config(folder), None) if whole else None
        modules: dict[str | None, list[str]] = {None: list(self.checkpoint.entries)}
        if self._layout is not None:
            modules = self._layout.modules(self.checkpoint.entries)
        if isinstance(self._layout, CompressedTensors):
            targets = {target for group in self._layout.groups for target in group["targets"]}
            targets = {target for target in targets if not target.startswith("re:")}
            if targets - {"Linear", *modules}:  # names another class: only the model tells whose modules are of it
                self._layout = layout_of(folder, read_config(folder), Skeleton.build(folder))
        self._compressed = {
            self._layout.weight_name(module): (module, names)
            for module, names in modules.items()
            if module is not None and self._layout is not None
        }
        self._plain = modules[None]
        plain = {} if self._layout is None else {name: self._layout.cache_name(name) for name in self._plain}
        # Scales of a key-value cache by the name that compressed-tensors has for each.
        self.caches = {name: stored for stored, name in plain.items() if name is not None}
        scales = set(self.caches.values())
        self.names = [*(name for name in self._plain if name not in scales), *self._compressed]

        # Matrices of stacks that were taken apart; and the quantized stack that one was last read of.
        self._experts: dict[str, tuple[Expert, Stack]] = {}
        self._held: tuple[str, Tensor] | None = None

    def take_apart(self, names: Collection[str]) -> None:
        """Have stacks of experts as those of their matrices that are among `names`."""
        candidates = [name for name in self.names if name not in names and name.rpartition(".")[2] in PROJECTIONS]
        if not candidates or not self._folder.is_dir():
            return
        skeleton = Skeleton.build(self._folder)
        for name in candidates:
            shape = self.shape(name)
            stack = skeleton.stack(name, shape) if len(shape) == 3 else None
            if stack is not None:
                module = name.rpartition(".")[0]
                made = [(e, i, part) for e in range(shape[0]) for i, part in enumerate(stack.parts(module, e))]
                if all(part in names for _, _, part in made):
                    self._experts |= {part: (Expert(name, e, i), stack) for e, i, part in made}
                    self.names = [*(n for n in self.names if n != name), *(part for _, _, part in made)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name` as its model holds it."""
        if name not in self._compressed or self._layout is None:
            return self.checkpoint.entries[name].shape
        module, parts = self._compressed[name]
        shape = outline_of(self.checkpoint, self._layout, module, parts).shape
        return (*shape[:-2], *shape[:-3:-1]) if self._layout.transposed(module) else shape

    def read(self, name: str) -> Tensor:
        """The tensor `name` as its model holds it, quantized ones as QuantizedTensor."""
        if name in self._experts:
            place, stack = self._experts[name]
            return stack.take(self._expert(place), place.number)
        if name in self._compressed and self._layout is not None:
            return read_weight(self.checkpoint, self._layout, *self._compressed[name])
        if name in self.caches:
            # Dimensions of 1 come and go between layouts.
            scale = self.checkpoint.read(self.checkpoint.entries[self.caches[name]])
            return scale if scale.dim() else scale.reshape(1)
        return self.checkpoint.read(self.checkpoint.entries[name])

    def _expert(self, place: Expert) -> Tensor:
        if place.stack not in self._compressed:
            one = slice(place.expert, place.expert + 1)
            return self.checkpoint.read(self.checkpoint.entries[place.stack], one)[0]
        if self._held is None or self._held[0] != place.stack:
            self._held = None
            self._held = place.stack, self.read(place.stack)
        return self._held[1][place.expert]

    def describe(self) -> list[dict[str, Any]]:
        """Name, shape, what is stored, and bytes of every tensor; no weight is read.

        Raises:
            CheckpointError: a compressed module's tensors are incomplete or do not fit its group.
        """
        entries = self.checkpoint.entries
        rows = [_row(name, entries[name].shape, str(entries[name].dtype), [entries[name]]) for name in self._plain]
        for name, (module, parts) in self._compressed.items():
            assert self._layout is not None
            found = outline_of(self.checkpoint, self._layout, module, parts)
            stored = str(found.format) if found.activation is None else f"{found.format} x {found.activation}"
            rows.append(_row(name, self.shape(name), stored, [entries[part] for part in parts]))
        return rows

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()


def compare(a: Path, b: Path, *, advance: Callable[[str], None] | None = None) -> Comparison:
    """Differences of every tensor that both checkpoints have, by name, one tensor in memory at a time.

    A stack of experts that the other has as matrices is compared by those.

    Raises:
        CheckpointError: a folder cannot be read, or a tensor has different shapes in the two.
    """
    first, second = Weights(a), Weights(b)
    try:
        of_second = set(second.names)
        second.take_apart(set(first.names))
        first.take_apart(of_second)
        both = first.caches and second.caches
        of_a, of_b = ([*each.names, *(each.caches if both else ())] for each in (first, second))
        in_a, in_b = set(of_a), set(of_b)
        shared = [name for name in of_a if name in in_b]
        differences = []
        for name in shared:
            differences.append(_difference(name, first.read(name), second.read(name)))
            if advance is not None:
                advance(name)
        return Comparison(
            tuple(differences),
            tuple(name for name in of_a if name not in in_b),
            tuple(name for name in of_b if name not in in_a),
            *(() if both else tuple(each.caches) for each in (first, second)),
        )
    finally:
        first.close()
        second.close()


def _row(name: str, shape: tuple[int, ...], stored: str, parts: Iterable[TensorEntry]) -> dict[str, Any]:
    return {
        "name": name,
        "shape": shape,
        "stored": stored.removeprefix("torch."),
        "bytes": sum(p.nbytes for p in parts),
    }


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    plain_a, plain_b = _plain(a), _plain(b)
    if plain_a.shape != plain_b.shape:
        msg = f"tensor {name!r} has shape {tuple(a.shape)} in A and {tuple(b.shape)} in B; these are different models"
        raise CheckpointError(msg)
    # Equal infinities differ by nothing, but subtract to NaN.
    error = torch.where(plain_a == plain_b, 0.0, plain_a - plain_b)
    noise, signal = float(error.square().sum()), float(plain_a.square().sum())
    sqnr = inf if noise == 0 else 10 * log10(signal / noise) if signal / noise != 0 else -inf
    largest = float(error.abs().max()) if error.numel() else 0.0
    return Difference(name, tuple(a.shape), _stored(a), _stored(b), sqnr, largest)


def _plain(tensor: Tensor) -> Tensor:
    plain = plain_weight(tensor, torch.float32) if isinstance(tensor, QuantizedTensor) else tensor
    return plain.to(torch.float64)


def _stored(tensor: Tensor) -> str:
    return str(tensor.format) if isinstance(tensor, QuantizedTensor) else str(tensor.dtype).removeprefix("torch.")
