"""Hugging Face checkpoints in lowbit: quantize, evaluate, compare and load them; a key-value cache in few bits.

Once imported, transformers' own `from_pretrained` reads folders in lowbit's layout, `save_pretrained` writes them, and
`attn_implementation="lowbit"` is attention in 8 bits.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit_hf.registration import register

if TYPE_CHECKING:
    from lowbit_hf.attention import register_attention
    from lowbit_hf.cache import QuantizedCache
    from lowbit_hf.loading import load
    from lowbit_hf.quantizer import LowbitConfig, attach

__all__ = ["LowbitConfig", "QuantizedCache", "attach", "load", "register_attention"]

_HOMES = {
    "load": "lowbit_hf.loading",
    "LowbitConfig": "lowbit_hf.quantizer",
    "QuantizedCache": "lowbit_hf.cache",
    "attach": "lowbit_hf.quantizer",
    "register_attention": "lowbit_hf.attention",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it first is: all of it needs transformers, which takes seconds."""
    if name not in _HOMES:
        msg = f"module 'lowbit_hf' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


register()
