"""The memory of this process: what it holds, what it ever held, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch


def peak_memory() -> int:
    """The most memory, in bytes, that this process has held."""
    import resource  # noqa: PLC0415 - Windows has none, and what else is here works there

    # Kilobytes everywhere but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_use() -> int:
    """The memory, in bytes, that this process holds now; where the system does not tell, the most it ever held."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * mmap.PAGESIZE if status.is_file() else peak_memory()


def release() -> None:
    """Give memory that was freed back to the system; the C library keeps what lies between pieces still in use.

    Only glibc has a way to; others do it by themselves, or not at all. What torch keeps of a GPU goes back too.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
