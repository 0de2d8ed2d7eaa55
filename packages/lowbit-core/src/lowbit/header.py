"""The safetensors header, both ways: parsed without trusting a byte of it, laid out the same for the same tensors.

A file is 8 bytes of little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` with an optional
`__metadata__` object of strings, and the data: the tensors, little-endian and row-major, without gaps or overlaps.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeGuard, cast

import torch

from lowbit.errors import CheckpointError

# Each time from files otherwise.
_version = cache(version)

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT: Final = 100_000_000

_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")
_FIELDS = {"dtype", "shape", "data_offsets"}
# Matches up to and including the next bracket outside a string, or the end. It matches everywhere (a string's closing
# quote is optional), so that text which is not JSON is scanned once too.
_UP_TO_BRACKET = re.compile(r'(?:[^"\[{\]}]++|"(?:[^"\\]++|\\.)*+"?)*+(?:([\[{])|[\]}]|\Z)', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Objects and lists in one another. What walks through a parsed file calls itself as often.
_DEEPEST = 64
_LONGEST_NAME = 4096
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 200


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor on disk: `nbytes = prod(shape) * dtype.itemsize` bytes at `offset`, counted from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Size of dim 0; a 0-d tensor is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // max(self.rows, 1)


def parse_header(header: bytes, file: Path, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors, in order of offset, and metadata of `file`, which is `size` bytes long and has this JSON header.

    Raises:
        CheckpointError: the header breaks the format anywhere, or promises more or fewer bytes than the file has.
    """
    # The shortest tensor, `"":{"dtype":"U8","shape":[],"data_offsets":[0,0]},`, has 3 containers in 50 bytes.
    members = as_object(parse_json(header, f"header of {file}", 3 * len(header) // 50 + 3))
    if members is None or header[:1] != b"{":
        raise CheckpointError(f"header of {file} is not a JSON object that starts at its first byte")
    metadata = members.pop("__metadata__", {})
    if not is_strings(metadata):
        raise CheckpointError(f"header of {file}: __metadata__ is {quote(metadata)}, not an object of strings")
    start = 8 + len(header)
    found = [_read_entry(name, info, file, start) for name, info in members.items()]
    found.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_coverage(found, file, start, size)
    return {entry.name: entry for entry in found}, metadata


def written_by(distribution: str) -> dict[str, str]:
    """Metadata that say which distribution wrote a file, in which version."""
    return {"written_by": f"{distribution} {_version(distribution)}"}


def lay_out(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str], file: Path
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The first bytes of a safetensors file, length field included, and where each tensor goes.

    Tensors stand in order of descending item size, then name, after a header padded with spaces to whole 8 bytes, so
    that each is aligned to its items and the same tensors always give the same bytes.

    Raises:
        CheckpointError: a name stands twice or is reserved, a dtype has no safetensors name, or the header is too long.
    """
    members: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0])):
        if name in members or name == "__metadata__" or dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{file} cannot hold {quote(name)} as {dtype}: name taken, or no safetensors dtype")
        end = position + math.prod(shape) * dtype.itemsize
        members[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(members, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > HEADER_LIMIT:
        raise CheckpointError(f"{file}: {len(members)} tensors need a header of {len(header)} bytes; split the file")
    # What the reader would refuse is never written.
    entries, _ = parse_header(header, file, 8 + len(header) + position)
    return len(header).to_bytes(8, "little") + header, entries


def parse_json(raw: bytes, where: str, containers: int) -> object:
    """JSON from an untrusted source: unique keys, no lone surrogates, at most `containers` objects and lists, 64 deep.

    Raises:
        CheckpointError: it is not that.
    """
    try:
        text = raw.decode("utf-8")
        _check_containers(text, containers)
        found: object = json.loads(text, object_pairs_hook=_unique)
        # A lone surrogate cannot be encoded, and would fail much later, in a file name or on a terminal.
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not the JSON it should be: {error}; download the file again") from error
    return found


def quote(value: object) -> str:
    """`repr`, cut to a length that fits an error message."""
    return _BRIEF.repr(value)


def quote_names(names: Sequence[str]) -> str:
    """The first five names, quoted, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(quote(name) for name in names[:5]) + more


def as_object(value: object) -> dict[str, object] | None:
    """A JSON value if it is an object, else None."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


def is_strings(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a JSON value is an object of strings."""
    members = as_object(value)
    return members is not None and all(isinstance(item, str) for item in members.values())


def _read_entry(name: str, info: object, file: Path, start: int) -> TensorEntry:
    where = f"{file}: tensor {quote(name)}"
    if len(name) > _LONGEST_NAME:
        raise CheckpointError(f"{where} has a name of {len(name)} characters, more than {_LONGEST_NAME}")
    fields = as_object(info)
    if fields is None or fields.keys() != _FIELDS:
        raise CheckpointError(f"{where} is {quote(info)}, not an object of dtype, shape and data_offsets")
    dtype_name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype_name in _SUB_BYTE:
        raise CheckpointError(f"{where} is {dtype_name}, which torch cannot hold; store its packed bytes as U8")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"{where} has dtype {quote(dtype_name)}; known are {', '.join(DTYPES)}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: shape {quote(shape)} and data_offsets {quote(offsets)} must be whole numbers from 0 to "
            "2^63 - 1, the offsets two of them in order"
        )
    dtype = DTYPES[dtype_name]
    # torch computes strides over zero-sized dims too, so these must not overflow either.
    if len(shape) > 64 or math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        raise CheckpointError(f"{where}: shape {quote(shape)} is larger than any tensor can be")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where}: {dtype_name} {quote(shape)} is {nbytes} bytes, but data_offsets {offsets} span "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def _check_coverage(entries: list[TensorEntry], file: Path, start: int, size: int) -> None:
    end = max((entry.offset + entry.nbytes for entry in entries), default=start)
    if end > size:
        raise CheckpointError(f"{file} is truncated: it holds {size} bytes of {end} promised; download it again")
    previous = "the header"
    for entry in entries:
        if entry.offset != start:
            what = "overlap" if entry.offset < start else f"leave {entry.offset - start} bytes unused between them"
            raise CheckpointError(f"{file}: {previous} and tensor {quote(entry.name)} {what}; the header is corrupt")
        previous, start = f"tensor {quote(entry.name)}", entry.offset + entry.nbytes
    if start != size:
        raise CheckpointError(f"{file} holds {size - start} bytes after its last tensor; the format allows none")


def _check_containers(text: str, limit: int) -> None:
    """Bound what the parser may build: `[[],[],...` takes 30 times its length in memory."""
    count = depth = 0
    for match in _UP_TO_BRACKET.finditer(text):
        depth += 1 if match.lastindex else -1
        count += 1 if match.lastindex else 0
        if count > limit:
            raise ValueError(f"it has more than {limit} objects and lists")
        if depth > _DEEPEST:
            raise ValueError(f"its objects and lists are more than {_DEEPEST} deep")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique: dict[str, object] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"key {quote(key)} stands twice")
        unique[key] = value
    return unique


def _is_counts(value: object) -> TypeGuard[list[int]]:
    # type(), for True is an int to isinstance.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in cast("list[object]", value)
    )
