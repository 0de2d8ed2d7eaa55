"""A GGUF header, parsed without trusting a byte of it.

A file is the magic `GGUF`, a version, the numbers of tensors and of metadata pairs, the pairs, a table of tensors
(name, dims with the fastest first, type, offset into the data), padding, and the data, each tensor aligned. All is
little-endian.

The `gguf` package maps the file and believes its lengths, so that a short file can keep it busy for ever. Here every
length is held against the bytes that are left before anything is built of it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import torch

from lowbit.errors import CheckpointError
from lowbit.header import quote

# A vocabulary of 260 000 tokens with its merges and the tokenizer.json besides takes 50 MB.
_LARGEST_HEADER = 256 << 20
_LARGEST_ARRAY = 1 << 22
_LARGEST_ALIGNMENT = 1 << 20
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

Value = int | float | str | tuple[int | float | str, ...]
"""A metadata value; bools are ints."""


class Kind(NamedTuple):
    """A type of stored tensors: `size` bytes hold `block` values of a row."""

    name: str
    block: int
    size: int
    dtype: torch.dtype


KINDS: Final[dict[int, Kind]] = {
    0: Kind("F32", 1, 4, torch.float32),
    1: Kind("F16", 1, 2, torch.float16),
    2: Kind("Q4_0", 32, 18, torch.uint8),
    8: Kind("Q8_0", 32, 34, torch.uint8),
    30: Kind("BF16", 1, 2, torch.bfloat16),
}
"""What lowbit reads, by ggml's number."""

# Names for the error alone.
_OTHERS = {
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: values of `shape`, slowest dim first, in `nbytes` at `offset` from the file's start."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All that a file holds besides the tensors' values."""

    metadata: dict[str, Value]
    tensors: dict[str, Stored]
    # sha256 of its bytes.
    digest: str


def parse(stream: BinaryIO, file: Path, size: int) -> Header:
    """The header of `file`, which is `size` bytes long and is read from its start.

    Raises:
        CheckpointError: it breaks the format anywhere, or a tensor is of a type that lowbit does not read.
    """
    cursor = _Cursor(stream, file, size)
    magic = cursor.take(4)
    if magic != b"GGUF":
        hint = "a git-lfs pointer; run `git lfs pull` in its folder" if magic == b"vers" else "no GGUF file"
        raise CheckpointError(f"{file} is {hint}: it starts with {magic!r}")
    version = int(cursor.number("I"))
    if version not in _VERSIONS:
        why = "big-endian, and lowbit reads little-endian ones" if version & 0xFFFF == 0 else f"GGUF {version}"
        raise CheckpointError(
            f"{file} is {why}; lowbit reads versions {_VERSIONS}; convert it with a current llama.cpp"
        )
    tensors, pairs = int(cursor.number("Q")), int(cursor.number("Q"))
    metadata: dict[str, Value] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in metadata:
            raise CheckpointError(f"{file}: the metadata {quote(key)} stands twice; the header is corrupt")
        metadata[key] = _value(cursor, int(cursor.number("I")))
    table = [_info(cursor) for _ in range(tensors)]
    start = -(-cursor.position // _alignment(metadata, file)) * _alignment(metadata, file)
    return Header(metadata, _placed(table, file, start, size), cursor.digest.hexdigest())


class _Cursor:
    """Where in a header the parser is."""

    def __init__(self, stream: BinaryIO, file: Path, size: int) -> None:
        self.stream, self.file, self.position, self.digest = stream, file, 0, hashlib.sha256()
        self._end = min(size, _LARGEST_HEADER)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self._end - self.position:
            raise CheckpointError(
                f"{self.file} is truncated or corrupt: its header asks for {count} bytes at {self.position}, and ends "
                f"before {self._end}; download it again"
            )
        found = self.stream.read(count)
        if len(found) != count:
            raise CheckpointError(f"{self.file} changed while it was read; start again once it is complete")
        self.digest.update(found)
        self.position += count
        return found

    def number(self, code: str) -> int | float:
        """The next number, by its code in `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """The next string."""
        raw = self.take(int(self.number("Q")))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file}: {quote(raw)} in its header is not UTF-8: {error}") from error


def _value(cursor: _Cursor, kind: int) -> Value:
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise CheckpointError(f"{cursor.file}: metadata of type {kind} at {cursor.position}; the header is corrupt")
    item, count = int(cursor.number("I")), int(cursor.number("Q"))
    if count > _LARGEST_ARRAY:
        raise CheckpointError(f"{cursor.file}: an array of {count} items in the metadata, more than {_LARGEST_ARRAY}")
    if item in _NUMBERS:
        code = f"<{count}{_NUMBERS[item]}"
        return struct.unpack(code, cursor.take(struct.calcsize(code)))
    if item == _STRING:
        return tuple(cursor.text() for _ in range(count))
    raise CheckpointError(f"{cursor.file}: an array of type {item} in the metadata, which lowbit does not read")


def _alignment(metadata: dict[str, Value], file: Path) -> int:
    found = metadata.get("general.alignment", 32)
    if not isinstance(found, int) or not 0 < found <= _LARGEST_ALIGNMENT or found & (found - 1):
        raise CheckpointError(f"{file}: general.alignment is {quote(found)}; needed is a power of two")
    return found


def _info(cursor: _Cursor) -> Stored:
    """A row of the table of tensors, its offset counted from the data's start."""
    name = cursor.text()
    where = f"{cursor.file}: tensor {quote(name)}"
    dims = int(cursor.number("I"))
    if not 1 <= dims <= 4:
        raise CheckpointError(f"{where} has {dims} dims; ggml's tensors have 1 to 4")
    shape = tuple(int(cursor.number("Q")) for _ in range(dims))[::-1]
    number, offset = int(cursor.number("I")), int(cursor.number("Q"))
    kind = KINDS.get(number)
    if kind is None:
        known = ", ".join(each.name for each in KINDS.values())
        raise CheckpointError(
            f"{where} is {_OTHERS.get(number, f'of type {number}')}; lowbit reads {known}, so make the file with "
            "`llama-quantize --pure`, or from the original model"
        )
    if prod(max(each, 1) for each in shape) >= 1 << 60 or shape[-1] % kind.block:
        raise CheckpointError(
            f"{where} has shape {shape}; needed are fewer than 2^60 values in rows of whole blocks of {kind.block}"
        )
    return Stored(name, kind, shape, offset, prod(shape) // kind.block * kind.size)


def _placed(table: list[Stored], file: Path, start: int, size: int) -> dict[str, Stored]:
    """Tensors by name, their offsets counted from the file's start, once these are known to lie inside and apart."""
    placed: dict[str, Stored] = {}
    end, before = start, "the header"
    for each in sorted(table, key=lambda each: (each.offset, each.nbytes)):
        offset = start + each.offset
        if each.name in placed:
            raise CheckpointError(f"{file}: tensor {quote(each.name)} stands twice; the header is corrupt")
        if offset < end:
            raise CheckpointError(f"{file}: {before} and tensor {quote(each.name)} overlap; the header is corrupt")
        end, before = offset + each.nbytes, f"tensor {quote(each.name)}"
        if end > size:
            raise CheckpointError(f"{file} is truncated: {before} ends at {end}, the file at {size}; download it again")
        placed[each.name] = Stored(each.name, each.kind, each.shape, offset, each.nbytes)
    return placed
