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


# glibc's numbers of what `mallopt` sets, and from which size on tensors get memory of their own.
_MMAP_THRESHOLD, _OWN = -3, 1 << 20


def keep_little() -> None:
    """Let every tensor of a MiB and more have memory of its own, which goes back to the system when it is freed.

    By itself glibc soon takes pieces of up to 32 MiB from memory that it shares among them, of which holes stay behind:
    over the blocks of a large model they add up. Only glibc has this, and others do not need it.
    """
    _glibc("mallopt", _MMAP_THRESHOLD, _OWN)


def release() -> None:
    """Give memory that was freed back to the system; the C library keeps what lies between pieces still in use.

    Only glibc has a way to; others do it by themselves, or not at all. What torch keeps of a GPU goes back too.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _glibc("malloc_trim", 0)


def _glibc(name: str, *args: int) -> None:
    """Call a function of the C library, where it has it."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*args)
