"""Values rounded by one scale, and back, as operators of one element each that compilers see through.

`encode` and `decode` are what `lowbit::quantize` and `dequantize` do by a scale of the whole tensor that is a number:
graphs of loops need no operands for it, and torch decomposes them into operators that Inductor joins to what is beside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.format import WHOLE, Format
from lowbit.numerics import Scales

_LIBRARY = torch.library.Library("lowbit_pt2e", "FRAGMENT")
_LIBRARY.define("encode(Tensor x, float scale, int zero, str format) -> Tensor")
_LIBRARY.define("decode(Tensor codes, float scale, int zero, ScalarType dtype) -> Tensor")


def _encode(x: Tensor, scale: float, zero: int, format: str) -> Tensor:  # noqa: A002 - an operator's argument
    element = Format.parse(format).element
    steps = x.float() / scale
    steps = steps.round() + zero if element.kind == "int" else steps
    return steps.clamp(element.min, element.max).to(element.storage)


def _decode(codes: Tensor, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
    return ((codes.float() - zero) * scale).to(dtype)


_LIBRARY.impl("encode", _encode, "CompositeImplicitAutograd")
_LIBRARY.impl("decode", _decode, "CompositeImplicitAutograd")

ENCODE: Any = torch.ops.lowbit_pt2e.encode.default
"""`clamp(round(x / scale) + zero)` in a format's codes; those that are floats are rounded as they are stored."""
DECODE: Any = torch.ops.lowbit_pt2e.decode.default
"""`(codes - zero) * scale` in a dtype."""


def refuses(activation: Activation) -> str | None:
    """Why values that are rounded as `activation` says are none of `encode`, or None."""
    fmt = activation.format
    whole = fmt.block == (WHOLE, WHOLE) and not fmt.tensor_scale
    if whole and fmt.element.bits == 8 and fmt.scale.name == "float32":
        return None
    return f"its inputs need 8 bits and one float32 scale, as INT8_TENSOR_ASYM has them; {fmt} is another format"


def numbers(scales: Scales) -> tuple[float, int]:
    """The scale and the zero point of a tensor that has one."""
    return float(scales.scale), 0 if scales.zero is None else int(scales.zero)
