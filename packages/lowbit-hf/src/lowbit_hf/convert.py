"""A checkpoint in another layout: the same numbers, packed as other programs read them; or plain again.

A weight is in memory at a time. What is written is read back by the layout's own reader and compared with what it was
made from, so that a conversion which is not exact says so, and by how much.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.header import written_by
from lowbit.shards import INDEX_NAME, TensorEntry, row_slices
from lowbit.staging import ShardWriter, Staging
from lowbit_hf.apart import notes_of, put_together
from lowbit_hf.carrying import check_target, ignored_modules, other_files, texts_of
from lowbit_hf.exactness import changes, note_change
from lowbit_hf.layouts import LAYOUTS, Layout, Outline, Writer
from lowbit_hf.layouts.layout import FACTORS, Entry
from lowbit_hf.skeleton import LINEAR, Owner, Skeleton, read_config
from lowbit_hf.stored import Plain, open_plain, without_quantization

_SLICE_BYTES = 16 << 20
# What only readers of the old layout look for.
_OF_LAYOUTS = ("quantize_config.json", "hf_quant_config.json")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of a checkpoint."""

    weights: int
    # Weights that changed, and by how much: the largest difference over the largest value.
    inexact: Mapping[str, float]
    # Tensors that stay as they are.
    carried: int
    files: tuple[str, ...]
    left_behind: tuple[str, ...]
    bytes_before: int
    bytes_after: int


class Source:
    """An open folder of quantized weights, and what they become."""

    def __init__(self, folder: Path, writer: Writer | None) -> None:
        """Look at every tensor; None: weights become plain.

        Raises:
            CheckpointError: the folder is damaged, holds nothing quantized, or the layout cannot hold a weight of it.
        """
        self.folder, self.writer, self.config = folder, writer, read_config(folder)
        self.skeleton = Skeleton.build(folder)
        plain = open_plain(folder, self.config, self.skeleton)
        if not isinstance(plain, Plain):
            plain.close()
            msg = f"{folder} holds no quantized weights; make some: lowbit quantize {folder} --to SCHEME -o OUT"
            raise CheckpointError(msg)
        self.plain = plain
        # What is written, by name.
        self.view = plain if writer is not None else put_together(plain, self.skeleton)
        scheme = plain.layout.cache_scheme
        # What the new config says of a key-value cache; None: its scales, if there are any, are left behind.
        self.cache = None if writer is None or scheme is None else writer.cache(scheme)
        if writer is not None:
            refused = {name: reason for name, o in plain.outlines.items() if (reason := _refusal(writer, o))}
            if refused:
                name, reason = next(iter(refused.items()))
                more = f", and of {len(refused) - 1} more weights" if len(refused) > 1 else ""
                raise CheckpointError(f"{name!r} cannot be written as {writer.name}{more}: {reason}")

    def outputs(self, entry: TensorEntry) -> list[Entry]:
        """What a tensor of the plain view becomes."""
        outline = self.plain.outlines.get(entry.name)
        if outline is None or self.writer is None:
            return [(entry.name, entry.dtype, entry.shape)]
        writer, module = self.writer, self.writer.module_of(entry.name)
        return [(writer.join(module, local), dtype, shape) for local, dtype, shape in writer.entries(outline)]

    @cached_property
    def files(self) -> dict[str, list[Entry]]:
        """Tensors of each output file."""
        return {
            file: [
                *(made for entry in entries for made in self.outputs(entry)),
                *(scale for scale, _ in self.scales(file)),
            ]
            for file, entries in self.view.shards.items()
        }

    @property
    def metadata(self) -> dict[str, str]:
        """What every output file says of itself."""
        notes = {} if self.writer is None else notes_of(self.plain)
        return {"format": "pt"} | written_by("lowbit-hf") | notes

    def scales(self, file: str) -> Iterator[tuple[Entry, TensorEntry]]:
        """Scales of the key-value cache that an output file gets, and what each comes from."""
        if self.writer is None or self.cache is None:
            return
        names = {entry.name: name for name, entry in self.plain.caches.items()}
        for entry in self.plain.stored.shards[file]:
            if entry.name in names:
                name, shape = self.writer.cache_entry(names[entry.name], entry.shape)
                yield (name, entry.dtype, shape), entry

    def output_config(self) -> dict[str, Any]:
        """The `config.json` of the output."""
        config = without_quantization(self.config, self.skeleton.dtype)
        if self.writer is None:
            return config
        weights = {self.writer.module_of(name): name for name in self.plain.outlines}
        modules = {module: self.plain.outlines[name] for module, name in weights.items()}
        owners = {name: self.skeleton.owner(name) for name in self.plain.entries}
        ignored = ignored_modules(self.plain, self.skeleton, owners, set(self.plain.outlines))
        named = {module for module, name in weights.items() if not _linear(owners[name])}
        return {**config, "quantization_config": {**self.writer.config(modules, ignored, named), **(self.cache or {})}}

    @cached_property
    def reader(self) -> Layout:
        """The reader of what is written."""
        quantization = self.output_config()["quantization_config"]
        return LAYOUTS[quantization["quant_method"]](quantization, self.skeleton)

    def fingerprint(self) -> str:
        """Names this input and what is made of it."""
        how = [self.plain.fingerprint(), self.config, None if self.writer is None else self.writer.name, self.metadata]
        return sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()


def convert(
    folder: Path,
    out: Path,
    writer: Writer | None,
    *,
    overwrite: bool = False,
    command: str = "",
    advance: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the quantized checkpoint in `folder` to `out` by `writer`; None: its weights as plain ones.

    Raises:
        CheckpointError: as `Source`; or the output exists or cannot be written.
    """
    check_target(folder, out)
    source = Source(folder, writer)
    carried, left = other_files(folder, source.plain)
    left += [name for name in carried if name in _OF_LAYOUTS]
    left += [] if source.cache is not None else source.plain.cache_left
    carried = [name for name in carried if name not in _OF_LAYOUTS]
    texts, lost = texts_of(folder)
    config = source.output_config()
    size = sum(_nbytes(entries) for entries in source.files.values())
    with (
        source.plain,
        Staging.open(out, fingerprint=source.fingerprint(), overwrite=overwrite, command=command) as staging,
    ):
        if not staging.published:
            staging.require_space(size + sum((folder / name).stat().st_size for name in carried))
            for file in source.view.shards:
                _write_file(source, staging, file, advance)
            for name in carried:
                staging.copy_file(folder / name, name)
            for name, text in texts.items():
                staging.write_text(name, text)
            _write_json(source, staging, config)
            staging.sync()
            inexact = changes(staging)
            staging.publish()
        else:
            inexact = {}
    return Conversion(
        weights=len(source.plain.outlines),
        inexact=inexact,
        carried=len(source.plain.entries)
        - len(source.plain.outlines)
        + (len(source.plain.caches) if source.cache else 0),
        files=(*carried, *texts),
        left_behind=(*left, *lost),
        bytes_before=source.plain.stored.nbytes,
        bytes_after=size,
    )


def _write_file(source: Source, staging: Staging, file: str, advance: Callable[[int], None] | None) -> None:
    """Write one shard."""
    writer = staging.plan_file(file, source.files[file], source.metadata)
    for entry in source.view.shards[file]:
        if not staging.is_done(entry.name):
            if entry.name in source.plain.outlines and source.writer is not None:
                _write_weight(source, source.writer, staging, writer, entry)
            else:
                for rows in row_slices(entry, _SLICE_BYTES):
                    writer.write(entry.name, source.view.read(entry, rows if entry.shape else None), rows.start)
            staging.done(entry.name)
        if advance is not None:
            advance(entry.nbytes)
    for (name, _, shape), entry in source.scales(file):
        writer.write(name, source.plain.stored.read(entry).reshape(shape))
    writer.finish()


def _write_weight(source: Source, to: Writer, staging: Staging, writer: ShardWriter, entry: TensorEntry) -> None:
    """Write one weight, and note by how much it changed."""
    plain, layout = source.plain, source.plain.layout
    module, names = plain.parts(entry.name)
    parts = {layout.split(name)[1]: plain.stored.read(plain.stored.entries[name]) for name in names}
    weight = layout.read(module, parts)
    stored = {local: tensor.contiguous() for local, tensor in to.tensors(weight).items()}
    made = to.module_of(entry.name)
    for local, tensor in stored.items():
        writer.write(to.join(made, local), tensor)
    note_change(staging, entry.name, weight, source.reader.read(made, stored))


def _refusal(writer: Writer, outline: Outline) -> str | None:
    return FACTORS if outline.pre_scale and not writer.smoothed else writer.refusal(outline)


def _write_json(source: Source, staging: Staging, config: dict[str, Any]) -> None:
    """Write the config, the index, and what readers of the layout look for besides."""
    files = {"config.json": config}
    if (source.folder / INDEX_NAME).exists():
        files[INDEX_NAME] = {
            "metadata": {"total_size": sum(_nbytes(entries) for entries in source.files.values())},
            "weight_map": {name: file for file, made in source.files.items() for name, _, _ in sorted(made, key=_name)},
        }
    if source.writer is not None:
        files |= source.writer.files(config["quantization_config"])
    for name, value in files.items():
        staging.write_text(name, json.dumps(value, indent=2) + "\n")


def _name(entry: Entry) -> str:
    return entry[0]


def _nbytes(entries: list[Entry]) -> int:
    return sum(prod(shape) * dtype.itemsize for _, dtype, shape in entries)


def _linear(owner: Owner | None) -> bool:
    """Whether readers take the module for a linear layer; they do where nobody knows better."""
    return owner is None or owner.stacked or not set(LINEAR).isdisjoint(owner.classes)
