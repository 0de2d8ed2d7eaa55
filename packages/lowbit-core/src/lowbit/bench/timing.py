"""How long a call takes on data that no cache holds: the median of many, and their quartiles.

On a GPU a long call is timed alone, after its L2 cache was overwritten. A short one, which alone would measure 10 us of
launching, becomes one CUDA graph of at least 20 calls over copies of its operands of more than 200 MB together, and its
time is that of the graph divided by the calls. On a CPU every call is timed, over such copies in turn.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from time import perf_counter
from typing import Any, Literal

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile

from lowbit.bench.ranks import longest

Run = Callable[[], Any]
How = Literal["graph", "flushed", "rotated", "together"]

# Bytes that the copies of operands have together, more than any GPU's L2 or most CPUs' L3 holds.
_ROTATED = 200_000_000
# No more copies than this, of operands however small.
_COPIES = 1024
_CALLS = 20
# Calls of all processes before those that count.
_WARM = 5
# Seconds from which on a call is long: launching its graph, and what the flush left undone, do not count.
_LONG = 1e-3
_FLUSH = 256 << 20
_FEWEST, _MOST = 3, 500


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call: the median of samples, their first and their third quartile."""

    median: float
    low: float
    high: float
    samples: int
    # Calls a sample is the mean of: those of one CUDA graph, otherwise 1.
    calls: int
    # Bytes of all copies of the operands that calls went through.
    rotated: int
    # "graph" and "flushed" on a GPU, "rotated" on a CPU; "together" where processes wait for one another.
    how: How
    # Why a call on a GPU is not part of a graph, so that its time includes launching its kernels; "" if it is.
    note: str = ""


def copies_of(footprint: int) -> int:
    """Copies of operands of `footprint` bytes that are more than 200 MB together, but 1024 at most."""
    return min(_ROTATED // max(footprint, 1) + 1, _COPIES)


def calls_of(copies: int) -> int:
    """Calls of one graph: every copy as often as the others, at least 20 in all."""
    return -(-_CALLS // copies) * copies


def samples_of(seconds_each: float, budget: float) -> int:
    """How often to measure what takes `seconds_each` within `budget` seconds: 3 times at least, 500 at most."""
    return min(max(int(budget / max(seconds_each, 1e-9)), _FEWEST), _MOST)


def time_calls(
    make: Callable[[int], Run],
    footprint: int,
    device: torch.device,
    *,
    budget: float,
    samples: int | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Timing:
    """Time calls on `device`; `make(i)` gives one over the i-th copy of its operands, which are `footprint` bytes.

    `budget` is in seconds, in place of which there may be a number of `samples`; `clock` is what a CPU's calls are
    timed by.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _on_gpu(make, footprint, budget, samples)
    runs = [make(i) for i in range(copies_of(footprint))]
    # The first call compiles and allocates; what the second takes says how many there can be.
    turns = cycle(runs)
    next(turns)()
    (estimate,) = _clocked(islice(turns, 1), clock)
    taken = _clocked(islice(turns, samples or samples_of(estimate, budget)), clock)
    return _timing(taken, 1, len(runs) * footprint, "rotated")


def time_together(run: Run, footprint: int, device: torch.device, *, samples: int | None) -> Timing:
    """Time a call that all processes of the group make at once, from when all are ready until the last is done."""
    taken: list[float] = []
    for i in range(_WARM + (samples or _CALLS)):
        distributed.barrier()
        _finish(device)
        start = perf_counter()
        run()
        _finish(device)
        seconds = longest(perf_counter() - start, device)
        taken += [seconds] if i >= _WARM else []
    return _timing(taken, 1, footprint, "together")


def busy(run: Run, device: torch.device) -> float:
    """Seconds of a call in which the GPU computes, copies or waits for another; in the others it waits for Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a profiler says of itself
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            _finish(device)
    ranges = [each.time_range for each in found.events() or [] if each.device_type.name == "CUDA"]
    return covered((each.start, each.end) for each in ranges) / 1e6


def covered(ranges: Iterable[tuple[float, float]]) -> float:
    """The length of what ranges, from and to, cover together."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clocked(runs: Iterable[Run], clock: Callable[[], float]) -> list[float]:
    taken: list[float] = []
    for run in runs:
        start = clock()
        run()
        taken.append(clock() - start)
    return taken


def _timing(samples: list[float], calls: int, rotated: int, how: How, note: str = "") -> Timing:
    low, median, high = (part / calls for part in statistics.quantiles(samples, n=4, method="inclusive"))
    return Timing(median, low, high, len(samples), calls, rotated, how, note)


def _on_gpu(make: Callable[[int], Run], footprint: int, budget: float, samples: int | None = None) -> Timing:
    first = make(0)
    # Twice, since the first call compiles, and may choose among kernels by timing them.
    first()
    first()
    # Also a long call may be many kernels, which take longer to launch than to run.
    alone, note = _graph([first], 1)
    estimate = statistics.median(_evented(alone, _FEWEST))
    if not note and estimate < _LONG:
        runs = [first, *map(make, range(1, copies_of(footprint)))]
        calls = calls_of(len(runs))
        graph, note = _graph(runs, calls)
        if not note:
            taken = _evented(graph, samples or samples_of(estimate * calls, budget))
            return _timing(taken, calls, len(runs) * footprint, "graph")
    return _timing(_evented(alone, samples or samples_of(estimate, budget)), 1, footprint, "flushed", note)


def _graph(runs: list[Run], calls: int) -> tuple[Run, str]:
    """The replay of one graph of calls, each run in turn, and ""; or the first run, and why no graph can hold it."""
    if note := _wait(runs[0]):
        return runs[0], note
    try:
        return _captured(runs, calls), ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        return runs[0], f"cannot be captured: {_line(error)}"


def _evented(run: Run, count: int) -> list[float]:
    """Seconds by CUDA events, the L2 cache overwritten before each; meanwhile the CPU gets ahead with the launches."""
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in marks:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in marks]


def _wait(run: Run) -> str:
    """What a call waits for the GPU for, which no graph can hold; "" if it does not.

    Found out before capture, since a capture that fails leaves torch's random numbers unusable.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            return f"waits for the GPU: {_line(error)}"
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return ""


def _captured(runs: list[Run], calls: int) -> Run:
    """The replay of one graph of `calls` calls, each run in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in islice(cycle(runs), calls):
            run()
    graph.replay()
    return graph.replay


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
