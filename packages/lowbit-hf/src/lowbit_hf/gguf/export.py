"""A quantized checkpoint as one GGUF file: planned whole, then written a tensor at a time.

The header comes from the `gguf` package; where each tensor goes follows from it, so that a run which was killed goes on
where it stopped, and the folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.header import TensorEntry, written_by
from lowbit.shards import row_slices
from lowbit.staging import ShardWriter, Staging
from lowbit.tensor import QuantizedTensor
from lowbit_hf.carrying import check_target, other_files
from lowbit_hf.convert import Conversion
from lowbit_hf.exactness import changes, note_change
from lowbit_hf.gguf.architecture import Place, architecture_of, head_size, settings_of, turn
from lowbit_hf.gguf.blocks import Q4_0, Q8_0, from_blocks, kind_of, to_blocks
from lowbit_hf.gguf.header import KINDS, Kind
from lowbit_hf.gguf.rope import FREQUENCIES, factors_of
from lowbit_hf.gguf.source import is_gguf
from lowbit_hf.gguf.tokens import CONFIG, FILE, TEMPLATE, Vocabulary, vocabulary_of
from lowbit_hf.layouts import Outline
from lowbit_hf.layouts.layout import FACTORS
from lowbit_hf.skeleton import Skeleton, read_config
from lowbit_hf.stored import Plain, open_plain

NAME = "model.gguf"
"""The file in the folder."""

_ALIGNMENT = 32
_SLICE_BYTES = 16 << 20
_PLAIN = {kind.dtype: kind for kind in KINDS.values() if kind.block == 1}
_F32 = _PLAIN[torch.float32]
_NUMBERS = {kind.name: number for number, kind in KINDS.items()}
# Makes the package take a shape as one of values: any dtype but that of bytes.
_VALUES = np.dtype(np.float32)
# What a folder holds that the file holds too.
_INSIDE = (FILE, CONFIG, TEMPLATE, "vocab.json", "merges.txt", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the file: values of `shape`, slowest dim first."""

    kind: Kind
    shape: tuple[int, ...]

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape as it is written: blocks stand for values."""
        if self.kind.block == 1:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // self.kind.block, self.kind.size)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.stored) * self.kind.dtype.itemsize


class Export:
    """An open folder of quantized weights, and the file that they become."""

    def __init__(self, folder: Path, pre: str | None = None) -> None:
        """Plan every tensor; `pre` is llama.cpp's name of how the tokenizer cuts text, where lowbit knows none.

        Raises:
            CheckpointError: the folder is damaged, or llama.cpp has no such model, weight or tokenizer.
        """
        if find_spec("gguf") is None:
            raise CheckpointError("writing GGUF needs the package gguf; run: pip install 'lowbit-hf[gguf]'")
        if is_gguf(folder):
            raise CheckpointError(f"{folder} is a GGUF file already")
        skeleton = Skeleton.build(folder)
        self.config: Any = skeleton.config
        self.architecture = architecture_of(self.config)
        self.settings = settings_of(self.architecture, self.config)
        self.factors = factors_of(self.config.rope_parameters, head_size(self.config))
        self.vocabulary = vocabulary_of(folder, int(self.config.vocab_size), pre)
        self.plain, self.title = _quantized(folder, skeleton), folder.resolve().name
        try:
            self.places = {name: self._place(name) for name in self.plain.entries}
            self.planned = self._plan()
        except BaseException:
            self.plain.close()
            raise

    def _place(self, name: str) -> Place:
        found = self.architecture.place(name, self.config)
        if found is None:
            raise CheckpointError(f"{name!r} has no place in llama.cpp's architecture {self.architecture.name!r}")
        return found

    def _plan(self) -> dict[str, Planned]:
        """Tensors by llama.cpp's name, in order."""
        planned: dict[str, Planned] = {}
        stacks: dict[str, set[int]] = {}
        if self.factors is not None:
            planned[FREQUENCIES] = Planned(_F32, tuple(self.factors.shape))
        for entry in self.plain.entries.values():
            place = self.places[entry.name]
            kind = self._kind(entry, place)
            shape = entry.shape
            if place.expert is not None:
                stacks.setdefault(place.name, set()).add(place.expert)
                shape = (int(self.config.num_local_experts), *shape)
            made = Planned(kind, shape)
            if planned.setdefault(place.name, made) != made:
                raise CheckpointError(
                    f"{entry.name!r} is {kind.name} {entry.shape}, unlike others that llama.cpp keeps in one tensor "
                    "with it; quantize all experts of a block alike"
                )
        wanted = set(range(int(getattr(self.config, "num_local_experts", 0) or 0)))
        for name, found in stacks.items():
            if found != wanted:
                raise CheckpointError(
                    f"{name} needs the experts {sorted(wanted - found)[:5]}, which the checkpoint lacks"
                )
        return planned

    def _kind(self, entry: TensorEntry, place: Place) -> Kind:
        """The type that a tensor is kept in.

        Raises:
            CheckpointError: there is none that holds it.
        """
        outline = self.plain.outlines.get(entry.name)
        if outline is not None:
            if outline.pre_scale:
                raise CheckpointError(f"{entry.name!r} cannot be written as GGUF: {FACTORS}")
            kind = _kind_of(outline)
            if kind is None or place.wide:
                inputs = "" if outline.activation is None else f" with inputs rounded by {outline.activation}"
                raise CheckpointError(
                    f"{entry.name!r} cannot be written as GGUF: it is {outline.format}{inputs}, and lowbit writes int8 "
                    "and int4, symmetric, in groups of 32, inputs plain (W8A16_G32 as Q8_0, W4A16_G32 as Q4_0)"
                )
            return kind
        if entry.dtype not in _PLAIN:
            raise CheckpointError(f"{entry.name!r} is {entry.dtype}; GGUF holds float32, float16 and bfloat16")
        return _F32 if place.wide else _PLAIN[entry.dtype]

    def file_type(self) -> int:
        """llama.cpp's number for what most weights are."""
        kinds = [planned.kind for planned in self.planned.values()]
        return {Q4_0.name: 2, Q8_0.name: 7}[max((Q4_0, Q8_0), key=kinds.count).name]

    def fingerprint(self) -> str:
        """Names this input and what is made of it."""
        how = [self.plain.fingerprint(), self.settings, self.vocabulary.others, "gguf", written_by("lowbit-hf")]
        return sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()


def export(
    folder: Path,
    out: Path,
    *,
    pre: str | None = None,
    overwrite: bool = False,
    command: str = "",
    advance: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the quantized checkpoint in `folder` as `model.gguf` in the folder `out`; `pre` as for `Export`.

    Raises:
        CheckpointError: as `Export`; or the output exists or cannot be written.
    """
    check_target(folder, out)
    source = Export(folder, pre)
    carried, left = other_files(folder, source.plain)
    with (
        source.plain,
        Staging.open(out, fingerprint=source.fingerprint(), overwrite=overwrite, command=command) as staging,
    ):
        inexact: Mapping[str, float] = {}
        header = _header(source, staging.scratch / "header") if not staging.published else b""
        entries, size = _laid_out(source, len(header), staging.files / NAME)
        if not staging.published:
            staging.require_space(size)
            _write(source, staging, staging.plan_bytes(NAME, header, entries, size), advance)
            staging.sync()
            inexact = changes(staging)
            staging.publish()
    return Conversion(
        weights=len(source.plain.outlines),
        inexact=inexact,
        carried=len(source.plain.entries) - len(source.plain.outlines),
        files=tuple(name for name in carried if name in _INSIDE),
        left_behind=(*left, *(name for name in carried if name not in _INSIDE), *source.plain.cache_left),
        bytes_before=source.plain.stored.nbytes,
        bytes_after=size,
    )


def _quantized(folder: Path, skeleton: Skeleton) -> Plain:
    plain = open_plain(folder, read_config(folder), skeleton)
    if isinstance(plain, Plain):
        return plain
    plain.close()
    raise CheckpointError(
        f"{folder} holds no quantized weights; make some: lowbit quantize {folder} --to W4A16_G32 -o OUT"
    )


def _kind_of(outline: Outline) -> Kind | None:
    if len(outline.shape) != 2 or outline.activation is not None:
        return None
    return kind_of(outline.format, outline.shape[1])


def _header(source: Export, scratch: Path) -> bytes:
    """The file up to its first tensor, padding included."""
    # An extra, and so imported only by what needs it.
    import gguf  # noqa: PLC0415 # pyright: ignore[reportMissingTypeStubs]

    name = source.architecture.name
    writer = gguf.GGUFWriter(scratch, name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.title)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(source.file_type())
    told = {f"{name}.{key}": value for key, value in source.settings.items()} | dict(source.vocabulary.others)
    told["general.quantized_by"] = written_by("lowbit-hf")["written_by"]
    for key, value in told.items():
        # bool is an int to isinstance.
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    _add_vocabulary(writer, source.vocabulary)
    for tensor, planned in source.planned.items():
        kind = gguf.GGMLQuantizationType(_NUMBERS[planned.kind.name])
        writer.add_tensor_info(tensor, planned.shape, _VALUES, planned.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = scratch.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)
    return header + bytes(-len(header) % _ALIGNMENT)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)


def _laid_out(source: Export, start: int, file: Path) -> tuple[dict[str, TensorEntry], int]:
    """Where each tensor goes in the file, and the bytes of it all."""
    entries: dict[str, TensorEntry] = {}
    for name, planned in source.planned.items():
        entries[name] = TensorEntry(name, planned.kind.dtype, planned.stored, file, start, planned.nbytes)
        start += -(-planned.nbytes // _ALIGNMENT) * _ALIGNMENT
    return entries, start


def _write(source: Export, staging: Staging, writer: ShardWriter, advance: Callable[[int], None] | None) -> None:
    """Write every tensor."""
    if source.factors is not None:
        writer.write(FREQUENCIES, source.factors)
    for entry in source.plain.entries.values():
        if not staging.is_done(entry.name):
            if entry.name in source.plain.outlines:
                _write_weight(source, staging, writer, entry)
            else:
                _write_plain(source, writer, entry)
            staging.done(entry.name)
        if advance is not None:
            advance(entry.nbytes)
    writer.finish()


def _write_weight(source: Export, staging: Staging, writer: ShardWriter, entry: TensorEntry) -> None:
    """Write one weight, and note by how much it changed."""
    plain, layout, place = source.plain, source.plain.layout, source.places[entry.name]
    module, names = plain.parts(entry.name)
    parts = {layout.split(name)[1]: plain.stored.read(plain.stored.entries[name]) for name in names}
    weight: QuantizedTensor = layout.read(module, parts)
    try:
        blocks = to_blocks(weight)
    except CheckpointError as error:
        raise CheckpointError(f"{entry.name!r} cannot be written as GGUF: {error}") from error
    note_change(staging, entry.name, weight, from_blocks(blocks, weight.dtype))
    _put(writer, place, _turned(blocks, place), 0)


def _write_plain(source: Export, writer: ShardWriter, entry: TensorEntry) -> None:
    """Write one tensor that is not quantized."""
    place = source.places[entry.name]
    dtype = source.planned[place.name].kind.dtype
    # Rows change places, or are of one of many experts.
    whole = place.heads or place.expert is not None
    for rows in [slice(0, entry.rows)] if whole else row_slices(entry, _SLICE_BYTES):
        found = source.plain.read(entry, rows).to(dtype)
        _put(writer, place, _turned(found, place), rows.start)


def _turned(rows: Tensor, place: Place) -> Tensor:
    return rows[turn(rows.shape[0], place.heads)] if place.heads else rows


def _put(writer: ShardWriter, place: Place, rows: Tensor, start: int) -> None:
    if place.expert is None:
        writer.write(place.name, rows.contiguous(), start)
    else:
        writer.write(place.name, rows.unsqueeze(0).contiguous(), place.expert)
