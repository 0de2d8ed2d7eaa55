"""Memory that was freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Freed pieces below one that stays in use cannot go back by themselves.
SCRIPT = """
import ctypes
from lowbit.memory import memory_in_use, peak_memory, release
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 100_000
pieces = [libc.malloc(size) for _ in range(1000)]
for piece in pieces:
    ctypes.memset(piece, 1, size)
full = memory_in_use()
for piece in pieces[:-1]:
    libc.free(piece)
held = memory_in_use()
release()
print(full - memory_in_use(), full - held, peak_memory() / full)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc keeps what lies between pieces in use")
def test_what_lies_between_pieces_in_use_is_given_back():
    told = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout.split()
    back, before, peak = int(told[0]), int(told[1]), float(told[2])
    assert before < 10 << 20
    assert back > 80 << 20
    # Linux counts pages in batches.
    assert peak > 0.98
