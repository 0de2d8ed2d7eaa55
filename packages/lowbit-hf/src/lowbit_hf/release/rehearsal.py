"""A checkpoint of the names, shapes and config that a job will give, to lint it before hours are spent."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lowbit.header import lay_out
from lowbit.shards import INDEX_NAME, byte_view
from lowbit_hf.job import Job
from lowbit_hf.quantize import output_config, output_index

# 1 in e8m0, whose bytes are exponents.
_ONE = 127


@contextmanager
def rehearsed(job: Job) -> Generator[Path]:
    """The folder that a job will make, with scales of 1 and no weights: holes in files take no room."""
    with TemporaryDirectory(prefix="lowbit-") as scratch:
        folder = Path(scratch) / job.folder.name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(output_config(job)))
        if (job.folder / INDEX_NAME).exists():
            (folder / INDEX_NAME).write_text(json.dumps(output_index(job)))
        told = dict(_told(job))
        for name, tensors in job.files.items():
            header, entries = lay_out(tensors, {"format": "pt"}, folder / name)
            with (folder / name).open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(entry.nbytes for entry in entries.values()))
                for entry in entries.values():
                    if entry.name in told:
                        file.seek(entry.offset)
                        file.write(byte_view(told[entry.name]))
        yield folder


def _told(job: Job) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a linter reads: scales and shapes."""
    yield from ((name, torch.ones(shape, dtype=dtype)) for _, (name, dtype, shape) in job.cache_scales)
    for entry in job.checkpoint.entries.values():
        if entry.name not in job.schemes:
            continue
        for name, dtype, shape in job.outputs(entry):
            local = name.rpartition(".")[2]
            if local == "weight_shape":
                yield name, torch.tensor(job.matrix_shape(entry), dtype=dtype)
            elif local.endswith("scale"):
                yield name, torch.full(shape, _ONE if dtype == torch.uint8 else 1).to(dtype)
