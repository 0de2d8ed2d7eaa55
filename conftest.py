"""What every member's tests share, before torch and Triton are first imported.

Parallel workers, which already fill the cores, keep torch and numba to one thread each, and what they start, too. Where
there is no GPU, Triton interprets kernels, whichever test imports it first.
"""

from __future__ import annotations

import os
import shutil

if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "NUMBA"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
