"""The operator that torch.compile sees in the place of products with a packed weight; needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from lowbit.backends import Call, Description
from lowbit.format import WHOLE
from lowbit.ops import unwatched
from lowbit.tensor import QuantizedTensor

_DTYPES = (torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("lowbit_cuda", "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor x, Tensor[] parts, str[] names, str format, int[] shape, Tensor? bias, Tensor? offs, "
    "Tensor? values) -> Tensor"
)


def refuses(call: Call) -> str | None:
    """Why a call is not for this kernel, or None."""
    fmt = call.format
    assert fmt is not None
    assert call.k is not None
    if call.activation is not None:
        return f"needs inputs as they are; these are rounded to {call.activation}"
    if call.x_dtype not in _DTYPES:
        return f"needs inputs in bfloat16 or float16; these are {call.x_dtype}"
    group = fmt.block[-1]
    if group != WHOLE and group % 64 and group not in {16, 32}:
        return f"needs scales of 16 or 32 columns, or of multiples of 64; this is {fmt}"
    if call.k % 8:
        return f"needs columns by the 8; this weight has {call.k}"
    return None


def slower(call: Call) -> str | None:
    """At how many tokens the kernel is slower than a plain weight, in words, or None."""
    if refuses(call) is not None or call.device != "cuda":
        return None
    return import_module("lowbit_kernels_cuda.linear").slower(call)


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
    return _called(x, parts, description, bias, None, None)


def run_values(x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    """As `run`, by whichever of codes and values is faster for as many tokens."""
    return _called(x, parts[:-1], description, bias, None, parts[-1])


def run_grouped(x: Tensor, parts: tuple[Tensor, ...], description: Description, offs: Tensor) -> Tensor:
    """Each token by its expert's `weight.T`; `offs` (E,) ends each expert's, and those beyond the last become zeros."""
    return _called(x, parts, description, None, offs, None)


def _called(
    x: Tensor,
    parts: tuple[Tensor, ...],
    description: Description,
    bias: Tensor | None,
    offs: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    call = _linear if unwatched(x, bias if offs is None else offs) else torch.ops.lowbit_cuda.linear.default
    names, layout = description.names[1:], description.layout
    return call(x, parts, names, layout.format, description.canonical_shape, bias, offs, values)


def _linear(
    x: Tensor,
    parts: Sequence[Tensor],
    names: Sequence[str],
    fmt: str,
    shape: Sequence[int],
    bias: Tensor | None,
    offs: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    # Triton launches on the current device, whatever its arguments are on.
    with torch.cuda.device_of(x):
        return import_module("lowbit_kernels_cuda.linear").product(x, parts, names, fmt, shape, bias, offs, values)


def _linear_fake(
    x: Tensor,
    parts: Sequence[Tensor],
    names: Sequence[str],
    fmt: str,
    shape: Sequence[int],
    bias: Tensor | None,
    offs: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    del parts, names, fmt, bias, offs, values
    return x.new_empty(*x.shape[:-1], shape[-2])


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _linear, "CUDA")
torch.library.register_fake("lowbit_cuda::linear", _linear_fake, lib=_LIBRARY)
