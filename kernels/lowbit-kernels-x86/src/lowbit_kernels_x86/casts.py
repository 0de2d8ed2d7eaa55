"""Rounding values to formats, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.backends import Call
from lowbit.format import Format
from lowbit.numerics import Rounding, ScaleMode, Scales, check_choice, check_scales, data_shape
from lowbit_kernels_x86.library import contiguous
from lowbit_kernels_x86.weights import DTYPES


def refuses(call: Call) -> str | None:
    """Why values are not rounded by this kernel, or None."""
    fmt = call.format
    assert fmt is not None
    if call.x_dtype not in DTYPES:
        return f"needs values in float32, bfloat16 or float16; these are {call.x_dtype}"
    if len(fmt.block) != 2 or fmt.block[0] != 1:
        return f"needs scales of one row, or of a group of its columns; this is {fmt}"
    return None


def quantize(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    fmt: str,
    mode: str,
    rounding: str,
    seed: int,
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    """Data, scale[, zero][, tensor_scale] of `x`, as `lowbit::quantize`."""
    check_choice("rounding", rounding, Rounding)
    check_choice("scale mode", mode, ScaleMode)
    parsed, shape, given = Format.parse(fmt), tuple(x.shape), scale is not None
    natural = parsed.scale_shape(shape)
    # What an operator returns is never what it was given.
    if scale is not None:
        scale, zero = _copy(scale), None if zero is None else _copy(zero)
    else:
        scale = x.new_empty(natural, dtype=parsed.scale.storage)
        zero = None if parsed.zero is None else x.new_empty(natural, dtype=parsed.zero.code_dtype)
    chooses = parsed.tensor_scale and tensor_scale is None and not given
    if chooses:
        tensor_scale = torch.ones((*shape[:-2], *(1,) * min(len(shape), 2)))
    elif tensor_scale is not None:
        tensor_scale = _copy(tensor_scale)
    check_scales(Scales(scale, zero, tensor_scale), parsed, shape)
    if seed_offset is not None:
        seed += int(seed_offset)
    data = x.new_empty(data_shape(shape, parsed), dtype=parsed.element.storage)
    torch.ops.lowbit_x86.quantize.default(
        *(x.contiguous(), data, scale, zero, _of_each_matrix(tensor_scale, data), fmt, mode),
        *(not given, chooses, seed if rounding == "stochastic" else None),
    )
    return [part for part in (data, scale, zero, tensor_scale) if part is not None]


def dequantize(
    qdata: Tensor, scale: Tensor, zero: Tensor | None, tensor_scale: Tensor | None, fmt: str, k: int, dtype: Any
) -> Tensor:
    """Values of `qdata`, as `lowbit::dequantize`."""
    parts = contiguous((qdata, scale, zero, _of_each_matrix(tensor_scale, qdata)))
    return torch.ops.lowbit_x86.dequantize.default(*parts, fmt, k, dtype)


def _copy(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _of_each_matrix(tensor_scale: Tensor | None, data: Tensor) -> Tensor | None:
    """Tensor scales with those that matrices share repeated for each."""
    if tensor_scale is None:
        return None
    return tensor_scale.expand(*data.shape[:-2], *tensor_scale.shape[-2:]).contiguous()
