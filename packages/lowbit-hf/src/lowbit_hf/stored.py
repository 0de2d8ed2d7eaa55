"""A checkpoint of quantized weights, read as if they were plain: what they stand for, rounded to the model's dtype."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lowbit.apply import plain_weight
from lowbit.shards import Checkpoint, TensorEntry
from lowbit_hf.gguf.source import open_checkpoint
from lowbit_hf.layouts import Layout, Outline, layout_of
from lowbit_hf.loading import modules_of, outline_of, read_weight
from lowbit_hf.skeleton import Skeleton


class Plain(Checkpoint):
    """A view of a checkpoint; each quantized weight is one tensor of the file that its first part is in.

    Scales of a key-value cache are no part of it, for a plain checkpoint has none.
    """

    def __init__(self, stored: Checkpoint, layout: Layout) -> None:
        """Outline every weight.

        Raises:
            CheckpointError: a quantized module's tensors are incomplete or do not fit its config.
        """
        self.stored, self.layout, self._lock = stored, layout, Lock()
        self._held: tuple[str, Tensor] | None = None
        self.outlines: dict[str, Outline] = {}
        self._modules: dict[str, tuple[str, list[str]]] = {}
        first: dict[str, str] = {}
        # Scales of a key-value cache, by the name that compressed-tensors has for them.
        self.caches: dict[str, TensorEntry] = {}
        for module, names in modules_of(stored, layout).items():
            if module is None:
                plain = {name: layout.cache_name(name) for name in names}
                self.caches = {name: stored.entries[held] for held, name in plain.items() if name is not None}
            else:
                weight = layout.weight_name(module)
                self.outlines[weight] = outline_of(stored, layout, module, names)
                self._modules[weight] = module, names
                first[names[0]] = weight
        parts = {name for _, names in self._modules.values() for name in names}
        parts |= {entry.name for entry in self.caches.values()}
        self.shards = {
            file: [
                self._entry(entry, first[entry.name]) if entry.name in first else entry
                for entry in entries
                if entry.name in first or entry.name not in parts
            ]
            for file, entries in stored.shards.items()
        }
        self.entries = {entry.name: entry for entries in self.shards.values() for entry in entries}
        self.metadata = stored.metadata
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())

    def parts(self, weight: str) -> tuple[str, list[str]]:
        """The module of a quantized weight, and its tensors in the files."""
        return self._modules[weight]

    @property
    def cache_left(self) -> list[str]:
        """What an output without a place for it leaves behind of a key-value cache, in words."""
        scheme = self.layout.cache_scheme
        told = [f"{len(self.caches)} scales"] if self.caches else []
        told += [] if scheme is None else [f"the scheme {json.dumps(scheme)}"]
        return [f"{' and '.join(told)} of the key-value cache"] if told else []

    def read(self, entry: TensorEntry, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """See `Checkpoint`; a quantized weight is read whole, and kept until another one is asked for."""
        if entry.name not in self._modules:
            return self.stored.read(entry, rows, out)
        found = self._weight(entry)[rows or slice(None)]
        return found.clone() if out is None else out.copy_(found)

    def fingerprint(self) -> str:
        """See `Checkpoint`."""
        return self.stored.fingerprint()

    def close(self) -> None:
        """See `Checkpoint`."""
        self.stored.close()

    def _weight(self, entry: TensorEntry) -> Tensor:
        with self._lock:
            if self._held is None or self._held[0] != entry.name:
                self._held = None
                weight = read_weight(self.stored, self.layout, *self._modules[entry.name])
                self._held = entry.name, plain_weight(weight, entry.dtype)
            return self._held[1]

    def _entry(self, first: TensorEntry, weight: str) -> TensorEntry:
        outline = self.outlines[weight]
        *stack, n, k = outline.shape
        shape = (*stack, k, n) if self.layout.transposed(self._modules[weight][0]) else (*stack, n, k)
        return TensorEntry(weight, outline.dtype, shape, first.file, 0, prod(shape) * outline.dtype.itemsize)


def open_plain(folder: Path, config: Mapping[str, Any], skeleton: Skeleton | None) -> Checkpoint:
    """A folder's checkpoint, its weights plain whether they are quantized or not.

    Raises:
        CheckpointError: the folder is damaged, or quantized by a method that lowbit does not read.
    """
    layout, stored = layout_of(folder, config, skeleton), open_checkpoint(folder)
    if layout is None:
        return stored
    with ExitStack() as opened:
        opened.callback(stored.close)
        plain = Plain(stored, layout)
        opened.pop_all()
    return plain


def without_quantization(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A model's config once its weights are plain again, of this dtype."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return kept if "dtype" in kept or "torch_dtype" in kept else {**kept, "dtype": str(dtype).removeprefix("torch.")}
