"""The operator that torch.compile sees in the place of products with a weight packed for 16-bit tensor cores.

Needs no Triton. Inputs that are to be rounded become 16-bit floats that hold what they were rounded to.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import Call, Description
from lowbit.format import WHOLE, Format
from lowbit.ops import unwatched
from lowbit.tensor import QuantizedTensor

_DTYPES = (torch.bfloat16, torch.float16)
# Integers up to here are exact in float32.
_EXACT = 2**24
_LIBRARY = torch.library.Library("lowbit_cuda", "FRAGMENT")
_LIBRARY.define(
    "linear(str module, Tensor x, Tensor[] parts, str[] names, str format, str activation, int[] shape, Tensor? bias, "
    "Tensor? offs, Tensor? values) -> Tensor"
)


def refuses(call: Call) -> str | None:
    """Why a call is not for this kernel, or None."""
    fmt = call.format
    assert fmt is not None
    assert call.k is not None
    if call.activation is not None:
        reason = refuses_experts(call) or _refuses_rounded(call.activation.format, fmt, call.k)
        if reason is not None:
            return reason
    elif call.x_dtype not in _DTYPES:
        return f"needs inputs in bfloat16 or float16; these are {call.x_dtype}"
    group = fmt.block[-1]
    if group != WHOLE and group % 64 and group not in {16, 32}:
        return f"needs scales of 16 or 32 columns, or of multiples of 64; this is {fmt}"
    if call.k % 8:
        return f"needs columns by the 8; this weight has {call.k}"
    return None


def folds(fmt: Format) -> bool:
    """Whether a code, less its zero point, times the scale of its block is a bfloat16."""
    element, scale = fmt.element, fmt.scale
    bits = element.mantissa + 1 if element.kind == "float" else element.bits
    return scale.powers_of_two or (scale.bits == 8 and fmt.zero is None and bits + scale.mantissa < 8)


def meet_as_bytes(inputs: Format, weight: Format) -> bool:
    """Whether codes of inputs and of a weight may meet in tensor cores for 8-bit floats: e4m3 by 4 bits."""
    rows, group = inputs.element.name == "e4m3fn" and inputs.block_for(2)[-1] == WHOLE, weight.block_for(2)[-1]
    if weight.element.name == "int4":
        return rows and weight.zero is None and group % 128 == 0 and weight.scale.bits > 8
    return rows and weight.element.name == "e2m1" and weight.scale.powers_of_two and not weight.tensor_scale


def refuses_experts(call: Call) -> str | None:
    """Why inputs of experts are not rounded together, or None."""
    how = call.activation
    if call.op != "grouped_mm" or how is None or how.scaling != "dynamic":
        return None
    if how.format.block_for(2)[0] == 1 and not how.format.tensor_scale:
        return None
    return f"needs inputs of experts rounded row by row, or under stored scales; {how} has one for each expert's rows"


def _refuses_rounded(inputs: Format, weight: Format, k: int) -> str | None:
    """Why inputs rounded to a format are not for this kernel, or None."""
    rows, group = inputs.block_for(2)
    if (rows != 1 and group != WHOLE) or group not in {WHOLE, 16, 32, 64, 128, 256}:
        return f"needs inputs rounded under scales of rows, matrices or 16 to 256 columns; these are {inputs}"
    if group and not folds(inputs) and group % 64:
        return f"needs scales of inputs that are powers of two, or of 64 columns or more; these are {inputs}"
    integers = all(fmt.element.kind == "int" and fmt.block_for(2)[-1] == WHOLE for fmt in (inputs, weight))
    if integers and k * largest(inputs) * largest(weight) > _EXACT:
        return f"needs integers whose sums float32 holds exactly; of {k} columns of {inputs} by {weight} it does not"
    return None


def largest(fmt: Format) -> float:
    """The largest magnitude of integer codes less their zero points."""
    element = fmt.element
    return element.max - element.min if fmt.zero is not None else max(-element.min, element.max)


def slower(call: Call) -> str | None:
    """At how many tokens the kernel is slower than a plain weight, in words, or None."""
    if refuses(call) is not None or call.device != "cuda" or call.activation is not None:
        return None
    return import_module("lowbit_kernels_cuda.linear").slower(call)


def how(call: Call) -> str | None:
    """See `lowbit_kernels_cuda.linear.how`."""
    return import_module("lowbit_kernels_cuda.linear").how(call)


def refuses_values(call: Call) -> str | None:
    """Why a call is not for codes with their plain values beside them, or None."""
    if (reason := refuses(call)) is not None:
        return reason
    return None if slower(call) else "needs a weight that is slower than a plain one at some number of tokens"


def pack_values(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """As `pack`, and last the plain values in the weight's type."""
    values = torch.ops.lowbit.dequantize(*weight.stored, str(weight.format), weight.canonical_shape[-1], weight.dtype)
    return *pack(weight), values


def unpack_values(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack_values`."""
    return unpack(packed[:-1], description)


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """See `lowbit_kernels_cuda.linear.pack`."""
    return import_module("lowbit_kernels_cuda.linear").pack(weight)


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    return import_module("lowbit_kernels_cuda.linear").unpack(packed, description)


def run(x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, of any number of tokens."""
    return called("linear", x, parts, description.names[1:], description, bias)


def run_values(x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    """As `run`, by whichever of codes and values is faster for as many tokens."""
    return called("linear", x, parts[:-1], description.names[1:], description, bias, values=parts[-1])


def run_grouped(x: Tensor, parts: tuple[Tensor, ...], description: Description, offs: Tensor) -> Tensor:
    """Each token by its expert's `weight.T`; `offs` (E,) ends each expert's, and those beyond the last become zeros."""
    return called("linear", x, parts, description.names[1:], description, None, offs)


def called(
    module: str,
    x: Tensor,
    parts: tuple[Tensor, ...],
    names: Sequence[str],
    description: Description,
    bias: Tensor | None,
    offs: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """What `product` of a module makes of x and a weight's packed parts, as one operator to whoever watches."""
    call = _product if unwatched(x, bias if offs is None else offs) else torch.ops.lowbit_cuda.linear.default
    specs = description.layout.format, description.layout.activation or ""
    return call(module, x, parts, names, *specs, description.canonical_shape, bias, offs, values)


def _product(
    module: str,
    x: Tensor,
    parts: Sequence[Tensor],
    names: Sequence[str],
    fmt: str,
    activation: str,
    shape: Sequence[int],
    bias: Tensor | None,
    offs: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    # Triton launches on the current device, whatever its arguments are on.
    with torch.cuda.device_of(x):
        product = import_module(f"lowbit_kernels_cuda.{module}").product
        return product(x, parts, names, fmt, activation, shape, bias, offs, values)


def _product_fake(module: str, x: Tensor, *rest: Any) -> Tensor:
    del module
    shape = rest[4]
    return x.new_empty(*x.shape[:-1], shape[-2])


_LIBRARY.impl("linear", _product, "CPU")
_LIBRARY.impl("linear", _product, "CUDA")
torch.library.register_fake("lowbit_cuda::linear", _product_fake, lib=_LIBRARY)
