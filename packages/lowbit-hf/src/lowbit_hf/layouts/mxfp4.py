"""gpt-oss's layout: stacks of experts in MXFP4, `quant_method` mxfp4.

    experts.gate_up_proj_blocks  uint8 (experts, n, k/32, 16): 32 codes a block, even ones in low nibbles
    experts.gate_up_proj_scales  uint8 (experts, n, k/32): e8m0

The model keeps `experts.gate_up_proj` as (experts, k, n).

Source: transformers' `integrations/mxfp4`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.element import E8M0
from lowbit.errors import CheckpointError
from lowbit.format import MXFP4
from lowbit.numerics import Scales
from lowbit.tensor import QuantizedTensor
from lowbit_hf.layouts.layout import Entry, Layout, Outline, Writer, take

_SUFFIXES = ("blocks", "scales")


class Mxfp4(Layout):
    """Reads gpt-oss's experts."""

    method = "mxfp4"
    marks = frozenset({"blocks", "scales"})
    parts = frozenset({"blocks", "scales"})

    def split(self, name: str) -> tuple[str, str]:
        """See `Layout`."""
        module, _, local = name.rpartition("_")
        return (module, local) if local in _SUFFIXES else super().split(name)

    def weight_name(self, module: str) -> str:
        """See `Layout`."""
        return module

    def transposed(self, module: str) -> bool:
        """See `Layout`."""
        del module
        return True

    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """See `Layout`."""
        del module
        blocks, scales = take(parts, "blocks", torch.uint8, 4), take(parts, "scales", torch.uint8, 3)
        experts, n, groups, size = blocks.shape
        if size != 16 or tuple(scales.shape) != (experts, n, groups):
            msg = (
                f"blocks have shape {tuple(blocks.shape)} and scales {tuple(scales.shape)}; needed are 16 bytes a scale"
            )
            raise CheckpointError(msg)
        return Outline((experts, n, groups * 32), MXFP4, None, self.dtype)

    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """See `Layout`."""
        found = self.outline(module, parts)
        return QuantizedTensor.from_parts(
            parts["blocks"].flatten(-2),
            Scales(parts["scales"].view(E8M0.storage), None, None),
            MXFP4,
            k=found.shape[-1],
            dtype=found.dtype,
        )


class Mxfp4Writer(Writer):
    """Writes gpt-oss's experts."""

    name = "mxfp4-gptoss"

    def refusal(self, outline: Outline) -> str | None:
        """See `Writer`."""
        if len(outline.shape) == 3 and outline.format == MXFP4 and outline.activation is None:
            return None
        return f"gpt-oss's layout holds stacks of experts in MXFP4, inputs plain; not {outline.format} {outline.shape}"

    def join(self, module: str, local: str) -> str:
        """See `Writer`."""
        return f"{module}_{local}"

    def entries(self, outline: Outline) -> list[Entry]:
        """See `Writer`."""
        experts, n, k = outline.shape
        return [
            ("blocks", torch.uint8, (experts, n, k // 32, 16)),
            ("scales", torch.uint8, (experts, n, k // 32)),
        ]

    def tensors(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Writer`."""
        return {"blocks": weight.qdata.unflatten(-1, (-1, 16)), "scales": weight.scale.view(torch.uint8)}

    def config(
        self, outlines: Mapping[str, Outline], ignored: Sequence[str], named: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `Writer`."""
        del outlines, named
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(ignored)}
