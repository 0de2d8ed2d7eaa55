"""The report of a run: what its job decided, and what its parts noted in the scratch folder on their way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import nan, prod
from pathlib import Path
from typing import Any

from lowbit.plan import Row
from lowbit.report import Block, Experts, Kept, Layer, Report, environment
from lowbit_hf.budget import Budget
from lowbit_hf.job import Job
from lowbit_hf.writing import ROUNDED

REPORTS = ("report.json", "report.html")
"""Names of the two forms of a report in an output folder."""


def report_of(job: Job, scratch: Path, *, command: str, seconds: float, budget: Budget) -> Report:
    """The report of a job that is done, whose notes are in `scratch`."""
    blocks = [json.loads(path.read_text()) for path in sorted(scratch.glob("block-*.json"), key=_number)]
    calibrated = {layer["name"]: (k, layer) for k, block in enumerate(blocks) for layer in block["layers"]}
    rounded, rows = _rounded(scratch / ROUNDED), {row.name: row for row in job.plan.rows}
    owners = {name: owner.name for name, owner in job.owners.items() if owner is not None}
    schemes = sorted({scheme.name for scheme in job.schemes.values()})
    text = job.calibration
    return Report(
        title=job.folder.resolve().name,
        scheme=", ".join(schemes),
        algorithm=job.algorithm,
        kv_cache=None if job.kv_cache is None else str(job.kv_cache),
        command=command,
        layers=tuple(_layers(job, rows, owners, calibrated, rounded)),
        blocks=tuple(
            Block(index=k, name=block["name"], sqnr=block["sqnr"], seconds=block["seconds"])
            for k, block in enumerate(blocks)
        ),
        experts=tuple(
            Experts(
                name=name,
                tokens=tuple(layer["tokens"]),
                topped=tuple(layer["topped"]),
                fallback=tuple(layer["starved"]),
            )
            for name, (_, layer) in calibrated.items()
            if layer["tokens"]
        ),
        kept=tuple(
            Kept(name=row.name, bytes=row.bytes_before, reason=row.reason or "")
            for row in job.plan.rows
            if row.action == "keep"
        ),
        bytes_before=job.checkpoint.nbytes,
        bytes_after=job.output_bytes,
        bits_per_weight=job.bits_per_weight,
        coverage=job.plan.coverage,
        seconds=seconds,
        peak_memory=budget.measured.host,
        planned_memory=budget.planned.host,
        max_memory=job.max_memory,
        # Where there is no GPU, nothing of it is held.
        peak_gpu=budget.measured.gpu or None,
        planned_gpu=budget.planned.gpu or None,
        max_gpu=job.max_gpu,
        calibration={} if text is None else text.described(),
        environment=environment(),
    )


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _layers(
    job: Job,
    rows: Mapping[str, Row],
    owners: Mapping[str, str],
    calibrated: Mapping[str, tuple[int, dict[str, Any]]],
    rounded: Mapping[str, float],
) -> Iterator[Layer]:
    """A layer for every weight that was quantized; a stack of experts that was calibrated is one."""
    told: set[str] = set()
    for name, scheme in job.schemes.items():
        parameter, row = owners.get(name, name), rows[name]
        block, result = calibrated.get(parameter, (None, None))
        if parameter in told and result is not None:
            continue
        told.add(parameter)
        entry = job.checkpoint.entries[name]
        stored = 8 * sum(prod(shape) * dtype.itemsize for _, dtype, shape in job.outputs(entry))
        yield Layer(
            name=parameter if result is not None else name,
            shape=entry.shape,
            format=str(scheme.weight_format(job.dtype)),
            activation=None if scheme.activation is None else str(scheme.activation),
            algorithm="rtn" if result is None else job.algorithm,
            bits=stored / max(prod(entry.shape), 1),
            block=block,
            weight_sqnr=rounded.get(name, nan) if result is None else result["weight_sqnr"],
            output_sqnr=None if result is None else result["output_sqnr"],
            kernel=row.kernel,
            seconds=0.0 if result is None else result["seconds"],
            outliers=() if result is None else tuple((int(c), float(r)) for c, r in result["outliers"]),
            notes=() if result is None else tuple(result["notes"]),
        )


def _rounded(path: Path) -> dict[str, float]:
    """SQNR of weights rounded to nearest, by name."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            name, sqnr = json.loads(line)
        except ValueError:
            # An empty first line, or what a kill left of one.
            continue
        found[name] = sqnr
    return found
