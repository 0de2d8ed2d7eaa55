"""Saying that a kernel is compiled, which takes seconds when it first runs, unless Triton's cache on disk has it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

_LOG = logging.getLogger(__name__)


@contextmanager
def told(what: str) -> Generator[None]:
    """Show `what` on a terminal while it is compiled, and log the seconds."""
    shown, start = sys.stderr.isatty(), time.perf_counter()
    if shown:
        sys.stderr.write(f"lowbit: compiling {what} ...")
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            # Whatever else is written begins where it would have.
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        _LOG.info("compiled %s, or read it from Triton's cache, in %.1f s", what, time.perf_counter() - start)
