"""Calibration text: files of plain text, JSON lines or parquet, as windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit_hf.evaluate import load_tokenizer

_COLUMN = "text"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a model is calibrated on: `samples` windows of `length` tokens of `files`, chosen by `seed`."""

    files: tuple[Path, ...]
    samples: int = 128
    length: int = 512
    seed: int = 0

    def windows(self, folder: Path) -> Tensor:
        """Token ids (samples, length), by the tokenizer in the model's folder.

        Documents of all files follow one another, the tokenizer's end token between them.

        Raises:
            CheckpointError: a file cannot be read, or they hold too little text.
        """
        if self.samples < 1 or self.length < 2:
            raise CheckpointError(f"--samples {self.samples} and --seq-len {self.length}: needed are 1 and 2 or more")
        tokenizer = load_tokenizer(folder)
        end = tokenizer.eos_token_id
        ids: list[int] = []
        for document in chain.from_iterable(map(_documents, self.files)):
            if ids and end is not None:
                ids.append(end)
            ids += tokenizer(document, verbose=False).input_ids
        whole = len(ids) // self.length
        if whole < self.samples:
            raise CheckpointError(
                f"{', '.join(map(str, self.files))}: {len(ids)} tokens, {whole} windows of {self.length}; --samples "
                f"{self.samples} needs {self.samples * self.length}: give a longer text, or fewer samples"
            )
        chosen = torch.randperm(whole, generator=torch.Generator().manual_seed(self.seed))[: self.samples]
        windows = torch.tensor(ids[: whole * self.length], dtype=torch.int64).view(whole, self.length)
        return windows[chosen.sort().values]

    def described(self) -> dict[str, str | int | float]:
        """What a report tells of it."""
        told: dict[str, str | int | float] = {
            "files": ", ".join(file.name for file in self.files),
            "samples": self.samples,
        }
        return {**told, "sequence length": self.length, "tokens": self.samples * self.length, "seed": self.seed}

    def fingerprint(self) -> str:
        """Names the text and the choice."""
        digests = [sha256(file.read_bytes()).hexdigest() for file in self.files]
        return ":".join(map(str, [*digests, self.samples, self.length, self.seed]))


def _documents(file: Path) -> Iterator[str]:
    """The texts in a file.

    Raises:
        CheckpointError: it cannot be read, or a document has no text.
    """
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(file)
        return
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if kind not in (".jsonl", ".ndjson"):
        yield text
        return
    # Not splitlines: strings in JSON may hold what Unicode too takes for ends of lines.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _text_of(line, f"{file}, line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        document: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    text = document.get(_COLUMN) if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise CheckpointError(f"{where} has no text; needed is a string, or an object with a string {_COLUMN!r}")
    return text


def _parquet(file: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 # pyright: ignore[reportMissingTypeStubs] - 100 MB that few need
    except ImportError as error:
        raise CheckpointError(f"reading {file} needs pyarrow; run: pip install 'lowbit-hf[parquet]'") from error
    try:
        column = parquet.read_table(file, columns=[_COLUMN]).column(_COLUMN)
    except (OSError, KeyError, ArrowException) as error:
        raise CheckpointError(f"{file} cannot be read as parquet with a column {_COLUMN!r}: {error}") from error
    for number, text in enumerate(column.to_pylist(), 1):
        if not isinstance(text, str):
            raise CheckpointError(
                f"{file}, row {number} holds {type(text).__name__} in {_COLUMN!r}; needed is a string"
            )
        yield text
