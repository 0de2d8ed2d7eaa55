"""The memory of a run: what it may take, what it is going to take, and what it took."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from lowbit.errors import LowbitError, RecipeError
from lowbit.memory import keep_little, memory_in_use, peak_memory
from lowbit.table import size
from lowbit_algos import Method
from lowbit_hf.calibrated import BATCH_TOKENS, Calibrated
from lowbit_hf.footprint import Footprint, of_rounding
from lowbit_hf.job import Job


class Budget:
    """What a run is allowed of memory, what it is planned to take with what the process holds before, and what it took.

    It measures from when it is made.
    """

    # Tokens that run through a block at once.
    tokens: int
    # Whether what blocks are fed stays on the GPU.
    held: bool
    planned: Footprint

    def __init__(self, job: Job, calibrated: Calibrated | None, device: str) -> None:
        """Plan for as many tokens at once as fit.

        Raises:
            RecipeError: it needs more than the job allows, however few run at once; or that bounds a GPU's memory, and
                `device` is none.
        """
        self._job, self._calibrated, self._gpu = job, calibrated, _gpu(device)
        if job.max_gpu is not None and self._gpu is None:
            raise RecipeError(f"max_gpu={job.max_gpu} bounds a GPU's memory, and this run computes on {device}")
        # Plans count what is held, and not what the C library would keep of what was.
        keep_little()
        self._held = _held(self._gpu)
        # The high-water mark tells of this run only once it has passed what it was before.
        self._before, self._seen = peak_memory(), self._held.host
        self._fit()

    @property
    def allowed(self) -> tuple[int | None, int | None]:
        """Bytes of the host's and of the GPU's memory; None: as many as there are."""
        return self._job.max_memory, self._job.max_gpu

    @property
    def measured(self) -> Footprint:
        """The most that was held at once so far, the process and all."""
        peak = peak_memory()
        self._seen = max(self._seen, memory_in_use(), peak if peak > self._before else 0)
        return Footprint(self._seen, 0 if self._gpu is None else torch.cuda.max_memory_allocated(self._gpu))

    def agree(self, tokens: int, *, held: bool) -> None:
        """Plan for as many tokens at once, and for as much on the GPU, as other processes or an earlier run decided on.

        Raises:
            RecipeError: they do not fit.
        """
        self.tokens, self.held, self.planned = tokens, held, self._plan(tokens, held=held)
        if lacking := self._lacking():
            raise RecipeError(f"{lacking}; the run that this one continues began with {tokens} tokens at once")

    def check(self) -> None:
        """Hold the run to what it is allowed.

        Raises:
            LowbitError: it has taken more.
        """
        measured = self.measured
        for had, planned, allowed, what, option in self._sides(measured):
            if allowed is not None and had > allowed:
                raise LowbitError(
                    f"this run has taken {size(had)} of {what}, where {size(planned)} were planned and {size(allowed)} "
                    f"are allowed; what is done is kept, and the same command with a larger {option} continues"
                )

    @contextmanager
    def kept(self) -> Generator[None]:
        """A context in which torch takes no more of the GPU than is allowed, its cache included.

        Raises:
            LowbitError: the run needs more of it.
        """
        gpu, allowed = self._gpu, self._job.max_gpu
        if gpu is None:
            yield
            return
        whole = torch.cuda.get_device_properties(gpu).total_memory
        if allowed is not None:
            torch.cuda.set_per_process_memory_fraction(min(allowed / whole, 1.0), gpu)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise LowbitError(
                f"this run needs more of the GPU's memory than it may take: {size(self.measured.gpu)} were in use, "
                f"{size(self.planned.gpu)} were planned, and "
                + (f"the GPU has {size(whole)}" if allowed is None else f"{size(allowed)} are allowed")
                + "; what is done is kept, and the same command with a larger --max-gpu, or fewer programs on the GPU, "
                "continues"
            ) from error
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, gpu)

    def __str__(self) -> str:
        """What was planned, in words."""
        of = [
            f"{size(planned)} of {what}" + ("" if allowed is None else f" ({size(allowed)} allowed)")
            for _, planned, allowed, what, _ in self._sides(self.planned)
        ]
        at_once = "" if self._calibrated is None else f", with {self.tokens} tokens at once"
        return f"takes at most {' and '.join(of)}{at_once}"

    def _fit(self) -> None:
        length = 1 if self._job.calibration is None else self._job.calibration.length
        self.tokens = max(BATCH_TOKENS, length)
        while True:
            self.held, self.planned = False, self._plan(self.tokens, held=False)
            lacking = self._lacking()
            if not lacking:
                self._hold()
                return
            if self._calibrated is None or self.tokens // 2 < length:
                raise RecipeError(lacking)
            self.tokens //= 2

    def _hold(self) -> None:
        """Have what blocks are fed on the GPU, if there is room for it beside all else."""
        if self._gpu is None or self._calibrated is None or (self._job.method or Method()).distilled:
            return
        free, _ = torch.cuda.mem_get_info(self._gpu)
        allowed = self._held.gpu + free // 2 if self._job.max_gpu is None else self._job.max_gpu
        planned = self._plan(self.tokens, held=True)
        if planned.gpu <= allowed:
            self.held, self.planned = True, planned

    def _plan(self, tokens: int, *, held: bool) -> Footprint:
        job, before = self._job, self._held
        if self._calibrated is None:
            needed = of_rounding(torch.get_num_threads(), cuda=self._gpu is not None)
        else:
            method, data = job.method or Method(), job.calibration
            needed = self._calibrated.memory(method, tokens, 1 if data is None else data.length)
            if held and data is not None:
                needed = needed.more(self._calibrated.fed(data.samples * data.length, tokens, method))
        return Footprint(before.host + needed.host, before.gpu + needed.gpu)

    def _lacking(self) -> str | None:
        """What does not fit, in words."""
        for held, planned, allowed, what, option in self._sides(self._held):
            if allowed is not None and planned > allowed:
                instead = ", or round to nearest, which streams weights a few rows at a time"
                return (
                    f"this run needs {size(planned)} of {what}, of which the program itself holds {size(held)}, and "
                    f"may take {size(allowed)}; allow that much by {option}{instead if self._calibrated else ''}"
                )
        return None

    def _sides(self, other: Footprint) -> list[tuple[int, int, int | None, str, str]]:
        """For the host and the GPU: some other figure, what is planned and allowed, and how to speak of it."""
        host, gpu = self.allowed
        sides: list[tuple[int, int, int | None, str, str]] = [
            (other.host, self.planned.host, host, "memory", "--max-memory")
        ]
        if self._gpu is not None:
            sides.append((other.gpu, self.planned.gpu, gpu, "the GPU's memory", "--max-gpu"))
        return sides


def _gpu(device: str) -> int | None:
    """The number of the GPU that a device is."""
    found = torch.device(device)
    if found.type != "cuda":
        return None
    return found.index if ":" in device else torch.cuda.current_device()


def _held(gpu: int | None) -> Footprint:
    """What the process holds now; on a GPU once the libraries are there that every run needs."""
    if gpu is None:
        return Footprint(memory_in_use())
    some = torch.eye(2, device=f"cuda:{gpu}")
    torch.linalg.cholesky(some @ some)
    torch.cuda.synchronize(gpu)
    del some
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(gpu)
    return Footprint(memory_in_use(), torch.cuda.memory_allocated(gpu))
