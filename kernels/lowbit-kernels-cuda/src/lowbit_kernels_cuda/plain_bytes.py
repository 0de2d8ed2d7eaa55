"""What products of 8-bit codes take, inputs rounded as the weight is: int8 by int8, e4m3 by e4m3. Needs no Triton.

The weight stays as it is stored, for tensor cores that multiply such codes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import Call, Description
from lowbit.format import WHOLE, Format
from lowbit.tensor import QuantizedTensor
from lowbit_kernels_cuda.packed import called, largest, refuses_experts

_ROWS = ((1, WHOLE), (WHOLE, WHOLE))
# Sums of integers are kept in 32 bits.
_MOST = 2**31


def refuses(call: Call) -> str | None:
    """Why a call is not for this kernel, or None."""
    assert call.format is not None
    assert call.k is not None
    if call.activation is None:
        return "needs inputs that are rounded, too; these stay as they are"
    reason = refuses_experts(call) or _refuses_formats(call.activation.format, call.format, call.k)
    if reason is None and call.k % 16:
        reason = f"needs columns by the 16; this weight has {call.k}"
    if reason is None and call.format.element.name == "e4m3fn" and call.device == "cuda":
        reason = _refuses_gpu()
    return reason


def refuses_scaled_mm(call: Call) -> str | None:
    """Why a product of two rounded operands is not for this kernel, or None; as matrices e5m2 meets e4m3fn, too."""
    assert call.format is not None
    assert call.activation is not None
    sides = call.activation.format, call.format
    if {fmt.element.name for fmt in sides} != {"e4m3fn", "e5m2"}:
        return refuses(call)
    if any(fmt.block_for(2) != (WHOLE, WHOLE) or fmt.tensor_scale for fmt in sides):
        return f"needs one scale of each matrix where e5m2 meets e4m3fn; these are {sides[0]} and {sides[1]}"
    return _refuses_gpu() if call.device == "cuda" else "needs torch's scaled_mm on a GPU where e5m2 meets e4m3fn"


def refuses_grouped(call: Call) -> str | None:
    """Why groups of rounded rows are not multiplied by their experts' matrices by this kernel, or None."""
    assert call.format is not None
    assert call.activation is not None
    sides = call.activation.format, call.format
    if any(fmt.block_for(2) not in _ROWS for fmt in sides):
        # Products of values are faster than ours of blocks' codes.
        return f"needs scales of rows or matrices on both sides; these are those of {sides[0]} and {sides[1]}"
    return refuses(call)


def refuses_grouped_k(call: Call) -> str | None:
    """Why groups of columns are not summed over by torch's `scaled_grouped_mm`, or None."""
    assert call.format is not None
    assert call.activation is not None
    sides = call.activation.format, call.format
    if any(fmt.element.name != "e4m3fn" or fmt.tensor_scale or fmt.block_for(2) not in _ROWS for fmt in sides):
        return f"needs e4m3fn with scales of rows or matrices on both sides; these are {sides[0]} and {sides[1]}"
    if call.x_dtype != torch.bfloat16:
        return f"needs results in bfloat16; these are {call.x_dtype}"
    found = torch.cuda.get_device_capability() if call.device == "cuda" else (0, 0)
    if found == (9, 0):
        return None
    return f"needs a GPU of compute capability 9.0, for which torch has it; this has {found[0]}.{found[1]}"


def _refuses_formats(inputs: Format, weight: Format, k: int) -> str | None:
    names = {fmt.element.name for fmt in (inputs, weight)}
    if names not in ({"int8"}, {"e4m3fn"}) or inputs.tensor_scale or weight.tensor_scale:
        return f"needs int8 by int8, or e4m3fn by e4m3fn, without tensor scales; this is {inputs} by {weight}"
    integers = names == {"int8"}
    if any(fmt.scale.name == "e4m3fn" for fmt in (inputs, weight)) or not _meet(inputs, weight, integers=integers):
        return (
            "needs scales of rows or matrices, or of 128 columns on both sides; these are those of "
            f"{inputs} and {weight}"
        )
    if integers and k * largest(inputs) * largest(weight) >= _MOST:
        return f"needs integers whose sums 32 bits hold; of {k} columns of {inputs} by {weight} they do not"
    return None


def _refuses_gpu() -> str | None:
    found = torch.cuda.get_device_capability()
    if found >= (8, 9):
        return None
    return f"needs tensor cores for e4m3fn, of compute capability 8.9 on; this GPU has {found[0]}.{found[1]}"


def _meet(inputs: Format, weight: Format, *, integers: bool) -> bool:
    """Whether scales of both can wait for sums of as many columns."""
    if inputs.block_for(2) in _ROWS and weight.block_for(2) in _ROWS:
        return True
    return not integers and inputs.block_for(2) == (1, 128) and weight.block_for(2) in {(1, 128), (128, 128)}


def how(call: Call) -> str | None:
    """See `lowbit_kernels_cuda.byte_linear.how`."""
    return import_module("lowbit_kernels_cuda.byte_linear").how(call)


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """See `lowbit_kernels_cuda.byte_linear.pack`."""
    return import_module("lowbit_kernels_cuda.byte_linear").pack(weight)


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    return import_module("lowbit_kernels_cuda.byte_linear").unpack(packed, description)


def run(x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, of any number of tokens."""
    return called("byte_linear", x, parts, description.names, description, bias)


def run_grouped(x: Tensor, parts: tuple[Tensor, ...], description: Description, offs: Tensor) -> Tensor:
    """Each token by its expert's `weight.T`; `offs` (E,) ends each expert's, and those beyond the last become zeros."""
    return called("byte_linear", x, parts, description.names, description, None, offs)


def run_scaled_mm(*arguments: Any) -> Tensor:
    """The operator `scaled_mm`."""
    with torch.cuda.device_of(arguments[0]):
        return import_module("lowbit_kernels_cuda.byte_linear").scaled_mm(*arguments)


def run_scaled_grouped_mm(*arguments: Any) -> Tensor:
    """The operator `scaled_grouped_mm`."""
    with torch.cuda.device_of(arguments[0]):
        return import_module("lowbit_kernels_cuda.byte_linear").scaled_grouped_mm(*arguments)


def run_scaled_grouped_mm_k(*arguments: Any) -> Tensor:
    """The operator `scaled_grouped_mm_k`."""
    with torch.cuda.device_of(arguments[0]):
        return import_module("lowbit_kernels_cuda.library").scaled_grouped_mm_k(*arguments)
