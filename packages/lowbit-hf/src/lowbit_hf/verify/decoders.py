"""Weights of other layouts, decoded with NumPy from what is documented of them.

`lowbit verify` holds lowbit's readers against these, so nothing here is shared with them: no packing, no format, no
check of anything. Values are float32, each a code times a scale, rounded once.

Source: AutoGPTQ's and AutoAWQ's `qlinear` modules, DeepSeek-V3's `weight_dequant`, ModelOpt's unified checkpoints,
gpt-oss's model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Parts = Mapping[str, Tensor]
Values = NDArray[np.float32]

_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1: Values = np.concatenate([_POSITIVE, -_POSITIVE])
# The column, of eight, that each nibble of a word holds.
_AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


def gptq(parts: Parts, config: Mapping[str, Any]) -> Values:
    """Values (n, k): codes less zero points, times the scale of the group that `g_idx` names."""
    qweight, scale = _integers(parts["qweight"]).T, _numbers(parts["scales"]).T
    n, groups = scale.shape
    if "g_idx" in parts:
        group = _integers(parts["g_idx"])
    else:
        columns = qweight.shape[1] * 32 // int(config["bits"])
        group = np.arange(columns) // (columns // groups)
    k = len(group)
    bits = qweight.shape[1] * 32 // k
    zero = _stream(_integers(parts["qzeros"]), bits, n).T
    if (config.get("checkpoint_format") or config.get("format")) != "gptq_v2":
        zero = (zero + 1) % (1 << bits)
    return (_stream(qweight, bits, k) - zero[:, group]).astype(np.float32) * scale[:, group]


def awq(parts: Parts, config: Mapping[str, Any]) -> Values:
    """Values (n, k): codes less zero points, times scales."""
    del config
    code, zero = (_nibbles(_integers(parts[name])).T for name in ("qweight", "qzeros"))
    scale = _numbers(parts["scales"]).T
    group = np.arange(code.shape[1]) // (code.shape[1] // scale.shape[1])
    return (code - zero[:, group]).astype(np.float32) * scale[:, group]


def fp8(parts: Parts, config: Mapping[str, Any]) -> Values:
    """Values (n, k): e4m3 times `weight_scale_inv`, a multiplier for each block whatever its name says."""
    code = _numbers(parts["weight"])
    if "weight_scale_inv" not in parts:
        return code * _column(_numbers(parts["weight_scale"]))
    rows, columns = config["weight_block_size"]
    return code * _spread(_numbers(parts["weight_scale_inv"]), rows, columns, code.shape)


def modelopt(parts: Parts, config: Mapping[str, Any]) -> Values:
    """Values (n, k) of whichever of ModelOpt's kinds these tensors are."""
    del config
    weight, scale = parts["weight"], parts["weight_scale"]
    if weight.dtype == torch.uint8:
        block: Values = _numbers(scale) * _numbers(parts["weight_scale_2"])
        return _fp4(weight.numpy()) * np.repeat(block, 16, axis=1)
    code = _numbers(weight)
    if scale.dtype == torch.uint8:
        return code * np.repeat(_power(scale), 32, axis=1)
    if scale.dim() == 2 and scale.shape[1] > 1:
        return code * _spread(_numbers(scale), 128, 128, code.shape)
    return code * _column(_numbers(scale))


def mxfp4(parts: Parts, config: Mapping[str, Any]) -> Values:
    """Values (experts, n, k): e2m1 times powers of two."""
    del config
    blocks = parts["blocks"]
    scale: Values = _power(parts["scales"])[..., None]
    return (_fp4(blocks.numpy()) * scale).reshape(*blocks.shape[:2], -1)


DECODERS: dict[str, Callable[[Parts, Mapping[str, Any]], Values]] = {
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
}
"""By `quant_method`."""


def _integers(tensor: Tensor) -> NDArray[np.int32]:
    return tensor.numpy()


def _numbers(tensor: Tensor) -> Values:
    return tensor.to(torch.float32).numpy()


def _power(tensor: Tensor) -> Values:
    """2^(byte - 127)."""
    return _numbers(torch.exp2(tensor.to(torch.float32) - 127))


def _stream(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.int64]:
    """Codes (rows, count) of rows of words, least significant bits first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    each = np.unpackbits(raw, axis=1, count=count * bits, bitorder="little").reshape(len(words), count, bits)
    return each @ (1 << np.arange(bits))


def _nibbles(words: NDArray[np.int32]) -> NDArray[np.int64]:
    """AWQ's codes (rows, 8 * words)."""
    made = np.empty((*words.shape, 8), np.int64)
    for i, column in enumerate(_AWQ):
        made[..., column] = words >> (4 * i) & 15
    return made.reshape(len(words), -1)


def _fp4(raw: NDArray[np.uint8]) -> Values:
    """Values of bytes along the last dim, the low nibble first."""
    return _E2M1[np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)]


def _column(scale: Values) -> Values:
    """One scale, or one for each row."""
    return scale.reshape(-1, 1)


def _spread(scale: Values, rows: int, columns: int, shape: tuple[int, ...]) -> Values:
    whole = scale.repeat(rows, axis=0).repeat(columns, axis=1)
    return whole[: shape[0], : shape[1]]
