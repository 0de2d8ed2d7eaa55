"""Hugging Face checkpoints in lowbit: quantize, evaluate, compare and load them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit_hf.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is first asked for: it needs transformers, which takes seconds."""
    if name != "load":
        msg = f"module 'lowbit_hf' has no attribute {name!r}"
        raise AttributeError(msg)
    from lowbit_hf.loading import load  # noqa: PLC0415

    return load
