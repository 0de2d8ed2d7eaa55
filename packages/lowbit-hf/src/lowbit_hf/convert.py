"""A checkpoint in another layout: the same numbers, packed as other programs read them; or plain again.

A weight is in memory at a time. What is written is read back by the layout's own reader and compared with what it was
made from, so that a conversion which is not exact says so, and by how much.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.shards import INDEX_NAME, TensorEntry, row_slices
from lowbit.staging import ShardWriter, Staging
from lowbit.tensor import QuantizedTensor
from lowbit_hf.carrying import check_target, ignored_modules, other_files
from lowbit_hf.layouts import LAYOUTS, Layout, Writer
from lowbit_hf.layouts.layout import Entry
from lowbit_hf.skeleton import LINEAR, Owner, Skeleton, read_config
from lowbit_hf.stored import Plain, open_plain, without_quantization

_SLICE_BYTES = 16 << 20
# What only readers of the old layout look for.
_OF_LAYOUTS = ("quantize_config.json", "hf_quant_config.json")
# In the scratch folder: a line for each weight that changed.
_INEXACT = "inexact.jsonl"


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
        if writer is not None:
            refused = {name: reason for name, o in plain.outlines.items() if (reason := writer.refusal(o))}
            if refused:
                name, reason = next(iter(refused.items()))
                more = f", and of {len(refused) - 1} more weights" if len(refused) > 1 else ""
                raise CheckpointError(f"{name!r} cannot be written as {writer.name}{more}: {reason}")

    def outputs(self, entry: TensorEntry) -> list[Entry]:
        """What a tensor of the plain view becomes."""
        outline = self.plain.outlines.get(entry.name)
        if outline is None:
            name = self.plain.layout.plain_name(entry.name)
            return [(self.writer.plain_name(name) if self.writer else name, entry.dtype, entry.shape)]
        if self.writer is None:
            return [(entry.name, entry.dtype, entry.shape)]
        module, _ = self.plain.parts(entry.name)
        writer = self.writer
        return [(writer.join(module, local), dtype, shape) for local, dtype, shape in writer.entries(outline)]

    @cached_property
    def files(self) -> dict[str, list[Entry]]:
        """Tensors of each output file."""
        return {
            file: [made for entry in entries for made in self.outputs(entry)]
            for file, entries in self.plain.shards.items()
        }

    def output_config(self) -> dict[str, Any]:
        """The `config.json` of the output."""
        config = without_quantization(self.config, self.skeleton.dtype)
        if self.writer is None:
            return config
        modules = {self.plain.parts(name)[0]: outline for name, outline in self.plain.outlines.items()}
        owners = {name: self.skeleton.owner(name) for name in self.plain.entries}
        ignored = ignored_modules(self.plain, self.skeleton, owners, set(self.plain.outlines))
        named = {module for module in modules if not _linear(owners[self.plain.layout.weight_name(module)])}
        return {**config, "quantization_config": self.writer.config(modules, ignored, named)}

    @cached_property
    def reader(self) -> Layout:
        """The reader of what is written."""
        quantization = self.output_config()["quantization_config"]
        return LAYOUTS[quantization["quant_method"]](quantization, self.skeleton)

    def fingerprint(self) -> str:
        """Names this input and what is made of it."""
        how = [self.plain.fingerprint(), self.config, None if self.writer is None else self.writer.name]
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
    carried = [name for name in carried if name not in _OF_LAYOUTS]
    config = source.output_config()
    size = sum(_nbytes(entries) for entries in source.files.values())
    with (
        source.plain,
        Staging.open(out, fingerprint=source.fingerprint(), overwrite=overwrite, command=command) as staging,
    ):
        if not staging.published:
            staging.require_space(size + sum((folder / name).stat().st_size for name in carried))
            for file in source.plain.shards:
                _write_file(source, staging, file, advance)
            for name in carried:
                staging.copy_file(folder / name, name)
            _write_json(source, staging, config)
            staging.sync()
            inexact = _told(staging)
            staging.publish()
        else:
            inexact = {}
    return Conversion(
        weights=len(source.plain.outlines),
        inexact=inexact,
        carried=len(source.plain.entries) - len(source.plain.outlines),
        files=tuple(carried),
        left_behind=tuple(left),
        bytes_before=source.plain.stored.nbytes,
        bytes_after=size,
    )


def _write_file(source: Source, staging: Staging, file: str, advance: Callable[[int], None] | None) -> None:
    """Write one shard."""
    writer = staging.plan_file(file, source.files[file], {"format": "pt"})
    for entry in source.plain.shards[file]:
        if not staging.is_done(entry.name):
            if entry.name in source.plain.outlines and source.writer is not None:
                _write_weight(source, source.writer, staging, writer, entry)
            else:
                ((name, _, _),) = source.outputs(entry)
                for rows in row_slices(entry, _SLICE_BYTES):
                    writer.write(name, source.plain.read(entry, rows if entry.shape else None), rows.start)
            staging.done(entry.name)
        if advance is not None:
            advance(entry.nbytes)
    writer.finish()


def _write_weight(source: Source, to: Writer, staging: Staging, writer: ShardWriter, entry: TensorEntry) -> None:
    """Write one weight, and note by how much it changed."""
    plain, layout = source.plain, source.plain.layout
    module, names = plain.parts(entry.name)
    parts = {layout.split(name)[1]: plain.stored.read(plain.stored.entries[name]) for name in names}
    weight = layout.read(module, parts)
    stored = {local: tensor.contiguous() for local, tensor in to.tensors(weight).items()}
    for local, tensor in stored.items():
        writer.write(to.join(module, local), tensor)
    change = _change(weight, source.reader.read(module, stored))
    if change:
        path = staging.scratch / _INEXACT
        with path.open("a") as lines:
            # A kill may have left a line without its end.
            lines.write("\n" + json.dumps([entry.name, change]))
        staging.wrote(path)


def _change(before: QuantizedTensor, after: QuantizedTensor) -> float:
    """The largest difference of two weights' values, over the largest value; and of what rounds their inputs."""
    a, b = before.dequantize(torch.float32), after.dequantize(torch.float32)
    changes = [_relative(a, b)]
    for one, two in ((before.act_scale, after.act_scale), (before.act_zero, after.act_zero)):
        if one is not None and two is not None:
            changes.append(_relative(one.to(torch.float32), two.to(torch.float32)))
        elif one is not None or two is not None:
            changes.append(inf)
    return max(changes, default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    return float((a - b).abs().amax() / a.abs().amax().clamp_min(torch.finfo(torch.float32).tiny))


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


def _told(staging: Staging) -> dict[str, float]:
    path = staging.scratch / _INEXACT
    lines = path.read_text().split("\n") if path.is_file() else []
    found: dict[str, float] = {}
    for line in lines:
        # A line that a kill cut off is written again.
        if line.endswith("]"):
            name, change = json.loads(line)
            found[name] = change
    return found


def _name(entry: Entry) -> str:
    return entry[0]


def _nbytes(entries: list[Entry]) -> int:
    return sum(prod(shape) * dtype.itemsize for _, dtype, shape in entries)


def _linear(owner: Owner | None) -> bool:
    """Whether readers take the module for a linear layer; they do where nobody knows better."""
    return owner is None or owner.stacked or not set(LINEAR).isdisjoint(owner.classes)
