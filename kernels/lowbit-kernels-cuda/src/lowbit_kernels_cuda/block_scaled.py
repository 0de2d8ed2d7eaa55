"""Products of MXFP8 by MXFP8 and of NVFP4 by NVFP4, by torch's `scaled_mm` on tensor cores that read blocks' scales.

Blackwell has such; elsewhere codes become 16-bit floats (see `packed`). Codes stay as they are stored, and scales are
in tiles (see `lowbit.blocked`). Needs no Triton until inputs are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.backends import Call, Description
from lowbit.blocked import from_blocked, to_blocked
from lowbit.format import MXFP8, NVFP4, Format
from lowbit.tensor import QuantizedTensor
from lowbit_kernels_cuda.packed import called

_LEAST = (10, 0)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a product: codes (rows, K) as stored, scales in tiles, and the tensor scale if there is one."""

    codes: Tensor
    scale: Tensor
    whole: Tensor | None


def refuses(call: Call) -> str | None:
    """Why a call is not for this kernel, or None."""
    fmt, how = call.format, call.activation
    if fmt not in (MXFP8, NVFP4) or how is None or how.format != fmt:
        return f"needs MXFP8 by MXFP8, or NVFP4 by NVFP4; this is {'plain inputs' if how is None else how} by {fmt}"
    assert call.n is not None
    assert call.k is not None
    if call.k % 32 or call.n % 16:
        return f"needs columns by the 32 and rows by the 16; this weight has {call.n} rows of {call.k}"
    if call.x_dtype not in _DTYPES:
        return f"needs inputs in bfloat16, float16 or float32; these are {call.x_dtype}"
    if call.device == "cuda" and (found := torch.cuda.get_device_capability()) < _LEAST:
        return (
            f"needs tensor cores that read scales of blocks, of compute capability {_LEAST[0]}.{_LEAST[1]} on; this "
            f"GPU has {found[0]}.{found[1]}"
        )
    return None


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """The weight's inner tensors, its scales in tiles."""
    parts = weight.inner_tensors()
    return tuple(to_blocked(part) if name == "scale" else part.contiguous() for name, part in parts.items())


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    found = dict(zip(description.names, packed, strict=True))
    fmt = Format.parse(description.layout.format)
    return found | {"scale": from_blocked(found["scale"], fmt.scale_shape(description.canonical_shape))}


def run(x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, of any number of tokens."""
    return called("block_scaled", x, parts, description.names, description, bias)


def product(
    x: Tensor,
    packed: Sequence[Tensor],
    names: Sequence[str],
    fmt: str,
    activation: str,
    shape: Sequence[int],
    bias: Tensor | None,
    offs: Tensor | None,
    values: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` of x, rounded as the activation says, and what `pack` made of a weight (N, K).

    Raises:
        FormatError: the activation needs a stored scale, and there is none.
    """
    del fmt, offs, values
    n, k = shape
    named, how = dict(zip(names, packed, strict=True)), Activation.parse(activation)
    if "pre_scale" in named:
        x = x * named["pre_scale"].to(x.dtype)
    tokens = x.reshape(-1, k)
    given = how.stored(named.get("act_scale")).float().view(1, 1) if how.scaling == "local" else None
    cast = import_module("lowbit_kernels_cuda.casts").quantize_blocked
    codes, scale, *whole = cast(tokens, given, str(how.format), how.mode, "nearest", 0)
    left = _Side(codes, scale, whole[0] if whole else None)
    right = _Side(named["qdata"], named["scale"], named.get("tensor_scale"))
    return _multiply(left, right, bias, x.dtype).view(*x.shape[:-1], n)


def scaled_mm(
    a_qdata: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_qdata: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    b_tensor_scale: Tensor | None,
    bias: Tensor | None,
    a_format: str,
    b_format: str,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The operator `scaled_mm`."""
    del a_zero, b_zero, a_format, b_format, k
    left = _Side(a_qdata.contiguous(), to_blocked(a_scale), a_tensor_scale)
    right = _Side(b_qdata.contiguous(), to_blocked(b_scale), b_tensor_scale)
    return _multiply(left, right, bias, dtype)


def _multiply(left: _Side, right: _Side, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`left @ right.T + bias`."""
    kinds, orders = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType
    if not len(left.codes):
        return left.codes.new_empty(0, len(right.codes), dtype=dtype)
    recipe, order = [kinds.BlockWise1x32], [orders.SWIZZLE_32_4_4]
    if right.whole is not None:
        recipe, order = [kinds.BlockWise1x16, kinds.TensorWise], [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE]
    # What was put together has a tensor scale for each row, and the library takes one of all.
    of_tokens, of_rows = (
        None if side.whole is None or side.whole.numel() == 1 else side.whole.view(-1) for side in (left, right)
    )
    codes, scales = [], []
    for side in (left, right):
        packed = side.codes.dtype == torch.uint8
        codes.append(side.codes.view(torch.float4_e2m1fn_x2) if packed else side.codes)
        scales.append([side.scale.view(-1)])
        if side.whole is not None:
            scales[-1].append(side.whole.view(-1) if side.whole.numel() == 1 else side.whole.new_ones(1))
    later = of_tokens is not None or of_rows is not None or (bias is not None and bias.dtype != dtype)
    out = torch.nn.functional.scaled_mm(
        *(codes[0], codes[1].T, scales[0], recipe, scales[1], recipe, order, order),
        bias=None if later else bias,
        output_dtype=torch.float32 if later else dtype,
    )
    if not later:
        return out
    if of_tokens is not None:
        out *= of_tokens[:, None]
    if of_rows is not None:
        out *= of_rows
    return (out if bias is None else out + bias.float()).to(dtype)
