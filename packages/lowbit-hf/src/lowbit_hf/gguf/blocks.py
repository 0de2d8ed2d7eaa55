"""Quantized weights as llama.cpp's blocks, and back: code for code, scale for scale.

    Q8_0  34 bytes for 32 values: float16 scale, 32 codes int8
    Q4_0  18 bytes for 32 values: float16 scale, 16 bytes; byte j has code j in its low, code j + 16 in its high nibble

A value is its code times the scale. Codes of Q4_0 go from -8 to 7, and are stored with 8 added. Of 32 zeros llama.cpp
makes the scale 0, lowbit 1: a scale of 0 leaves nothing to divide by, and readers of other layouts refuse it. So one
stands for the other, both ways.

Source: `block_q8_0` and `block_q4_0` in ggml's `ggml-common.h`, and `dequantize_row_q4_0` in its `ggml-quants.c`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.element import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8
from lowbit.errors import CheckpointError
from lowbit.format import Format
from lowbit.numerics import Scales
from lowbit.packing import pack, unpack
from lowbit.tensor import QuantizedTensor
from lowbit_hf.gguf.header import KINDS, Kind

Q4_0, Q8_0 = KINDS[2], KINDS[8]
FORMATS = {
    Q4_0.name: Format(element=INT4, block=(1, 32), scale=FLOAT16),
    Q8_0.name: Format(element=INT8, block=(1, 32), scale=FLOAT16),
}
"""What a file's blocks hold, by type."""


def kind_of(fmt: Format, k: int) -> Kind | None:
    """The type that holds rows of `k` values of a format; None: there is none."""
    narrow = fmt.block == (1, 32) and fmt.symmetric and not fmt.tensor_scale and k % 32 == 0
    if not narrow or fmt.scale not in (FLOAT16, BFLOAT16, FLOAT32):
        return None
    return Q4_0 if fmt.element is INT4 else Q8_0 if fmt.element is INT8 else None


def to_blocks(weight: QuantizedTensor) -> Tensor:
    """Blocks (n, k / 32, bytes) of a weight (n, k), uint8.

    Raises:
        CheckpointError: a scale lies beyond float16, or is no number.
    """
    n, k = weight.shape
    scale = weight.scale.to(torch.float16)
    if not bool(scale.isfinite().all()):
        largest = float(weight.scale.abs().amax())
        raise CheckpointError(f"its largest scale is {largest:g}, and GGUF keeps scales in float16, up to 65504")
    codes = unpack(weight.qdata, weight.format.element, k).reshape(n, k // 32, 32)
    # llama.cpp divides the largest value, 0, by -8 or by 127, which gives zeros of either sign.
    zero = -0.0 if weight.format.element is INT4 else 0.0
    scale = scale.where((scale != 1) | codes.any(dim=-1), zero)
    if weight.format.element is INT4:
        raised = (codes + 8).view(torch.uint8)
        codes = raised[..., :16] | raised[..., 16:] << 4
    return torch.cat([scale.unsqueeze(-1).view(torch.uint8), codes.view(torch.uint8)], dim=-1)


def from_blocks(blocks: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """The weight (n, k) that blocks (n, k / 32, bytes) hold, reading as `dtype`."""
    n, groups, size = blocks.shape
    kind = Q4_0 if size == Q4_0.size else Q8_0
    fmt = FORMATS[kind.name]
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    raw = blocks[..., 2:].contiguous()
    if kind is Q4_0:
        raw = torch.cat([raw & 15, raw >> 4], dim=-1)
        raw = (raw.view(torch.int8) - 8).view(torch.uint8)
    dead = scale == 0
    codes = raw.view(torch.int8).masked_fill(dead.unsqueeze(-1), 0).reshape(n, groups * 32)
    scale = scale.masked_fill(dead, 1)
    return QuantizedTensor.from_parts(
        pack(codes, fmt.element), Scales(scale, None, None), fmt, k=groups * 32, dtype=dtype
    )
