"""llama.cpp's layout, as `lowbit_hf.gguf.source` shows a file: `quant_method` gguf.

MODULE.q8_0  uint8 (n, k/32, 34): blocks of 32 values
MODULE.q4_0  uint8 (n, k/32, 18): blocks of 32 values
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.tensor import QuantizedTensor
from lowbit_hf.gguf.blocks import FORMATS, Q4_0, Q8_0, from_blocks
from lowbit_hf.layouts.layout import Layout, Outline, take

_LOCALS = {kind.name.lower(): kind for kind in (Q4_0, Q8_0)}


class Gguf(Layout):
    """Reads the tensors of a GGUF file."""

    method = "gguf"
    marks = frozenset(_LOCALS)
    parts = frozenset(_LOCALS)

    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """See `Layout`."""
        del module
        ((local, blocks),) = parts.items()
        kind = _LOCALS[local]
        n, groups, size = take(parts, local, torch.uint8, 3).shape
        if size != kind.size:
            msg = f"blocks of {kind.name} have {kind.size} bytes; these have shape {tuple(blocks.shape)}"
            raise CheckpointError(msg)
        return Outline((n, groups * kind.block), FORMATS[kind.name], None, self.dtype)

    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """See `Layout`."""
        found = self.outline(module, parts)
        ((_, blocks),) = parts.items()
        return from_blocks(blocks, found.dtype)
