"""Tensor scales of NVFP4 as others store them, and back; block scales in tiles are `lowbit.blocked`.

    lowbit                          value = code * (scale * tensor_scale)
    compressed-tensors, flashinfer  value = code * scale / global_scale      (they choose 448 * 6 / amax)
    ModelOpt                        value = code * (scale * weight_scale_2)  (it chooses amax / (448 * 6))

Powers of two from 2^-127 to 2^127, as lowbit's own tensor scales are, become each other's exactly; of other numbers a
reciprocal is the nearest float32, either way.

Source: compressed-tensors 0.20.0, `compressors/nvfp4`; flashinfer 0.7.2, `make_nvfp4_global_scale`; ModelOpt's
`export/unified_export_hf`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_global_scale", "from_weight_scale_2", "to_global_scale", "to_weight_scale_2"]


def to_global_scale(tensor_scale: Tensor) -> Tensor:
    """The `global_scale = 1 / tensor_scale`, float32 (m,), of m tensor scales: what scales are multiplied by.

    It is compressed-tensors' `weight_global_scale` and `input_global_scale`, and what flashinfer takes, each (1,).
    """
    return tensor_scale.to(torch.float32).reshape(-1).reciprocal()


def from_global_scale(global_scale: Tensor) -> Tensor:
    """The `tensor_scale = 1 / global_scale`, float32 (m, 1): of a matrix where m is 1, else of m rows."""
    return global_scale.to(torch.float32).reshape(-1, 1).reciprocal()


def to_weight_scale_2(tensor_scale: Tensor) -> Tensor:
    """ModelOpt's `weight_scale_2 = tensor_scale`, float32 (), of a matrix; its `input_scale` is the same of inputs."""
    return tensor_scale.to(torch.float32).reshape(())


def from_weight_scale_2(weight_scale_2: Tensor) -> Tensor:
    """The `tensor_scale = weight_scale_2`, float32 (1, 1), of one number."""
    return weight_scale_2.to(torch.float32).reshape(1, 1)
