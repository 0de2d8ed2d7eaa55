"""A vLLM plugin: what vLLM has no kernel for on a CPU runs on lowbit's operators, behind every kernel of its own.

vLLM calls `register` in each of its processes, by the entry point group `vllm.general_plugins`. That imports neither
transformers nor anything else that vLLM has not imported by then, but lowbit itself.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any


@cache  # vLLM may call plugins more than once in a process
def register() -> None:
    """Offer lowbit to the vLLM of this process, where it runs on a CPU; elsewhere nothing changes.

    On GPUs vLLM has kernels for all these schemes, and lowbit's were not tested under it.
    """
    platforms: Any = import_module("vllm.platforms")
    if platforms.current_platform.is_cpu():
        import_module("lowbit_hf.serving.kernels").add_kernels()
        import_module("lowbit_hf.serving.config").add_config()
