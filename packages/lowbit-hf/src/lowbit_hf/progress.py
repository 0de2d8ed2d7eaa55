"""Progress with the time left, for anything longer than two seconds: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

_DELAY = 2.0
_PLAIN_INTERVAL = 10.0


class Meter:
    """Counts towards `total` and tells stderr; a context manager, silent for the first two seconds."""

    def __init__(self, label: str, total: int) -> None:
        """Start counting `total` of anything under a label."""
        self._label, self._total, self._done = label, max(total, 1), 0
        self._start = self._told = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, count: int) -> None:
        """Count on, and tell if it is time to."""
        self._done += count
        now = time.monotonic()
        if now - self._start < _DELAY:
            return
        if not sys.stderr.isatty():
            if now - self._told >= (_DELAY if self._told == self._start else _PLAIN_INTERVAL):
                self._told = now
                sys.stderr.write(self.line(now) + "\n")
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total)
        if self._task is not None:
            self._bar.update(self._task, completed=self._done)

    def line(self, now: float) -> str:
        """The state in plain words."""
        share = min(self._done / self._total, 1.0)
        left = (now - self._start) * (1 - share) / max(share, 1e-9)
        return f"{self._label}: {share:.0%}, about {left:.0f} s left"

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away, also after an error."""
        if self._bar is not None:
            self._bar.stop()
