"""Runs a case: every contender's accuracy, and the time it takes, as plain values for a table and for JSON."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import Refusal
from lowbit.bench import ranks
from lowbit.bench.case import Case, Contender, footprint, words
from lowbit.bench.ceilings import Ceilings
from lowbit.bench.inputs import Kind, sqnr
from lowbit.bench.timing import busy, time_calls, time_together


@torch.no_grad()
def measure(case: Case, device: torch.device, ceilings: Ceilings, *, budget: float) -> dict[str, Any]:
    """A row of results: the case, and of each contender times, rates and accuracy, or why there are none.

    `speedup` is over the baseline, `of_ceiling` the share of the rate that the ceilings allow. Accuracy is in dB: to
    the `exact` result, and of the candidate to that of lowbit's `reference`. `peak_bytes` are those of the operands and
    of what a call takes beside them, on a GPU.
    """
    given = [("candidate", case.candidate), ("baseline", case.baseline)]
    given += [("reference", case.reference)] if case.reference is not None else []
    given += [("peer", peer) for peer in case.peers]
    rows = [_Row(role, contender, together=ranks.several()) for role, contender in given]
    for kind in case.kinds:
        _compare(rows, case, kind)
    data = case.data("normal")
    for row in rows:
        row.attempt(row.tell)
        row.attempt(partial(_time, row, case, data, device, budget))
        if device.type == "cuda":
            # Copies of operands are most of a GPU's memory.
            gc.collect()
            torch.cuda.empty_cache()
    base = rows[1].told.get("seconds")
    for row in rows:
        if (seconds := row.told.get("seconds")) is not None and isinstance(row.contender, Contender):
            moved = row.contender.moved
            row.told |= {
                "bytes_per_s": moved / seconds,
                "flops_per_s": case.flops / seconds,
                "of_ceiling": ceilings.seconds(moved, case.flops) / seconds,
                "speedup": None if base is None else base / seconds,
            }
    return {"case": case.told, "flops": case.flops, "contenders": [row.told for row in rows]}


class _Row:
    """A contender, and what is told of it: under "refusal" why there is nothing, under "failed" that it raised."""

    def __init__(self, role: str, contender: Contender | Refusal, *, together: bool) -> None:
        self.contender, self.together = contender, together
        self.told: dict[str, Any] = {"role": role}
        if isinstance(contender, Refusal):
            self.told |= {"name": contender.kernel, "refusal": contender.reason}
            return
        self.told |= {"name": contender.name, "kernel": contender.kernel, "moved_bytes": contender.moved, "sqnr": {}}
        self.told["refusals"] = [str(refusal) for refusal in contender.refusals]

    def tell(self) -> None:
        """Note what else a contender tells of itself."""
        if isinstance(self.contender, Contender) and self.contender.tell is not None:
            self.told |= self.contender.tell()

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step, unless one failed before; what it raises is told, so that the others are still measured.

        Where other processes wait for this one's calls, it ends the run.
        """
        if "refusal" not in self.told:
            try:
                step()
            except Exception as error:  # of other libraries, too; `failed` makes the command fail
                if self.together:
                    raise
                self.told |= {"refusal": words(error), "failed": True}


def _compare(rows: list[_Row], case: Case, kind: Kind) -> None:
    """Note how far the results of all contenders are from the exact one."""
    data = case.data(kind)
    exact = case.exact(*data)
    results: dict[str, Tensor] = {}

    def compare(row: _Row) -> None:
        contender = row.contender
        if not isinstance(contender, Contender) or contender.decode is None:
            return
        result = contender.decode(contender.run(*contender.prepare(*data)(0)))
        row.told["sqnr"][kind] = {"exact": sqnr(exact, result)}
        if row.told["role"] in {"candidate", "reference"}:
            results[row.told["role"]] = result

    for row in rows:
        row.attempt(partial(compare, row))
    if len(results) == 2:
        rows[0].told["sqnr"][kind]["reference"] = sqnr(results["reference"], results["candidate"])


def _time(row: _Row, case: Case, data: tuple[Tensor, ...], device: torch.device, budget: float) -> None:
    contender = row.contender
    assert isinstance(contender, Contender)
    make = contender.prepare(*data)
    held = footprint(make(0))
    if device.type == "cuda":
        row.told["peak_bytes"] = held + _taken(partial(contender.run, *make(0)), device)
    touched = held if contender.touched is None else contender.touched
    if ranks.several():
        run = partial(contender.run, *make(0))
        timing = time_together(run, touched, device, samples=case.samples)
        if device.type == "cuda":
            row.told["busy_seconds"] = ranks.longest(busy(run, device), device)
    else:
        timing = time_calls(
            lambda i: partial(contender.run, *make(i)), touched, device, budget=budget, samples=case.samples
        )
    told = asdict(timing)
    row.told |= {"seconds": told.pop("median"), "quartiles": [told.pop("low"), told.pop("high")], **told}


def _taken(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of a GPU's memory that a call takes at most, its result among them."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
