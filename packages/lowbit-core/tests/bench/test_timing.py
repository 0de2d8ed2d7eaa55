"""lowbit.bench.timing: which copies calls go through, how many there are, and what is made of their times."""

from __future__ import annotations

from time import sleep

import pytest
import torch

from lowbit.bench import measure, timing
from lowbit.bench.timing import busy, calls_of, copies_of, covered, samples_of, time_calls

CPU = torch.device("cpu")


class Clock:
    """A clock that calls set forward, each by the next of the seconds given, the last again and again."""

    def __init__(self, *seconds):
        self.now, self.seconds, self.went = 0.0, list(seconds), []

    def __call__(self):
        return self.now

    def make(self, i):
        def run():
            self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
            self.went.append(i)

        return run


@pytest.mark.parametrize("footprint", [200_000, 8_700_000, 33_500_000, 100_000_000, 199_999_999, 200_000_000, 2**30])
def test_copies_are_more_than_200_mb_and_no_more_than_that_takes(footprint):
    copies = copies_of(footprint)
    assert copies * footprint > 200_000_000
    assert (copies - 1) * footprint <= 200_000_000


def test_tiny_operands_are_copied_1024_times_at_most():
    assert copies_of(0) == copies_of(1) == copies_of(100_000) == 1024


@pytest.mark.parametrize("copies", [1, 2, 3, 7, 19, 20, 21, 24, 1024])
def test_a_graph_has_20_calls_or_more_and_each_copy_as_often(copies):
    calls = calls_of(copies)
    assert calls >= 20
    assert calls % copies == 0
    assert calls - copies < 20


def test_samples_fill_the_budget():
    assert samples_of(0.01, 1.0) == 100
    assert samples_of(10.0, 1.0) == 3
    assert samples_of(1e-9, 1.0) == 500


def test_the_median_and_the_quartiles_of_what_the_clock_told():
    # A call that compiles, one that says how many there can be, and five samples of 1 s / 0.2 s.
    clock = Clock(9.0, 0.2, 5.0, 1.0, 2.0, 4.0, 3.0)
    found = time_calls(clock.make, 2**30, CPU, budget=1.0, clock=clock)
    assert (found.low, found.median, found.high) == pytest.approx((2.0, 3.0, 4.0))
    assert (found.samples, found.calls, found.rotated, found.how) == (5, 1, 2**30, "rotated")


def test_calls_on_a_cpu_go_through_all_copies_in_turn():
    clock = Clock(0.1)
    found = time_calls(clock.make, 60_000_000, CPU, budget=1.0, clock=clock)
    assert clock.went == [i % 4 for i in range(12)]
    assert (found.samples, found.rotated) == (10, 240_000_000)


class Replay:
    """A graph of as many calls."""

    def __init__(self, calls):
        self.calls = calls


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose events tell that each call takes `gpu.each` seconds, and that keeps what it was asked for."""

    class Gpu:
        def __init__(self):
            self.each, self.waits, self.captured, self.made, self.timed = 1e-5, "", [], [], []

        def make(self, i):
            self.made.append(i)
            return lambda: i

        def evented(self, run, count):
            self.timed.append(run.calls if isinstance(run, Replay) else "eager")
            return [self.each * (run.calls if isinstance(run, Replay) else 1)] * count

        def capture(self, runs, calls):
            self.captured.append([run() for run in runs])
            return Replay(calls)

    gpu = Gpu()
    monkeypatch.setattr(timing, "_evented", gpu.evented)
    monkeypatch.setattr(timing, "_wait", lambda run: gpu.waits)
    monkeypatch.setattr(timing, "_captured", gpu.capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return gpu


def test_short_calls_on_a_gpu_are_one_graph_over_all_copies_divided_by_its_calls(gpu):
    found = timing._on_gpu(gpu.make, 8_700_000, 0.1)
    assert gpu.made == list(range(23))
    assert gpu.captured == [[0], list(range(23))]
    assert gpu.timed == [1, 23]
    assert (found.how, found.calls, found.rotated) == ("graph", 23, 23 * 8_700_000)
    assert found.median == pytest.approx(1e-5)
    assert found.samples == samples_of(23e-5, 0.1)


def test_long_calls_on_a_gpu_are_timed_alone_on_one_copy(gpu):
    gpu.each = 2e-3
    found = timing._on_gpu(gpu.make, 1_000, 0.1)
    assert (gpu.made, gpu.timed) == ([0], [1, 1])
    assert (found.how, found.calls, found.rotated, found.samples, found.note) == ("flushed", 1, 1_000, 50, "")


@pytest.mark.parametrize("each", [2e-3, 1e-5])
def test_a_number_of_samples_takes_the_place_of_a_time(gpu, each):
    gpu.each = each
    assert timing._on_gpu(gpu.make, 8_700_000, 0.1, 20).samples == 20


def test_what_no_graph_can_hold_is_timed_alone_and_says_why(gpu, monkeypatch):
    gpu.waits = "waits for the GPU: called a synchronizing CUDA operation"
    found = timing._on_gpu(gpu.make, 1_000_000, 0.1)
    assert (found.how, found.calls, found.note) == ("flushed", 1, gpu.waits)
    assert (gpu.made, gpu.captured, gpu.timed) == ([0], [], ["eager", "eager"])

    def fails(runs, calls):
        raise RuntimeError("capture was invalidated\nmore")

    gpu.waits = ""
    monkeypatch.setattr(timing, "_captured", fails)
    found = timing._on_gpu(gpu.make, 1_000_000, 0.1)
    assert (found.how, found.note) == ("flushed", "cannot be captured: capture was invalidated")


@pytest.mark.gpu
def test_a_gpu_takes_as_long_in_a_graph_as_the_bytes_need():
    size = 1 << 24

    def make(i):
        return torch.full((size,), i, dtype=torch.uint8, device="cuda").clone

    short = time_calls(make, 2 * size, torch.device("cuda"), budget=0.05)
    assert short.how == "graph"
    assert 0.1e12 < 2 * size / short.median < 10e12
    waits = time_calls(lambda i: lambda: float(torch.ones((), device="cuda")), 4, torch.device("cuda"), budget=0.05)
    assert waits.how == "flushed"
    assert "waits for the GPU" in waits.note


@pytest.mark.gpu
def test_memory_of_a_call_is_its_peak_and_its_result():
    x = torch.zeros(1 << 20, device="cuda")  # 4 MiB

    def run():
        return (x + 1)[:1] + (x.double() + 1)[:1]

    assert 20 << 20 <= measure._taken(run, x.device) <= 24 << 20


def test_what_ranges_cover_together_counts_once():
    assert covered([(4, 5), (0, 2), (1, 3), (1.5, 2.5), (7, 9)]) == 3 + 1 + 2
    assert covered([]) == 0


@pytest.mark.gpu
def test_a_gpu_is_not_busy_while_python_does_something_else():
    x = torch.randn(4096, 4096, device="cuda")
    product = busy(lambda: x @ x, x.device)

    def run():
        first = x @ x
        torch.cuda.synchronize()
        sleep(10 * product)
        return first @ x

    assert product > 0
    assert product < busy(run, x.device) < 4 * product
