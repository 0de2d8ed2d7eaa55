"""The operator that torch.compile sees in the place of `linear` with a packed weight; needs no Triton."""

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
_LIBRARY.define("linear(Tensor x, Tensor[] parts, str[] names, str format, int n, int k, Tensor? bias) -> Tensor")


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


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """See `lowbit_kernels_cuda.linear.pack`."""
    return import_module("lowbit_kernels_cuda.linear").pack(weight)


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    return import_module("lowbit_kernels_cuda.linear").unpack(packed, description)


def run(x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, of any number of tokens."""
    layout = description.layout
    n, k = (description.shape[layout.permutation.index(d)] for d in range(2))
    call = _linear if unwatched(x, bias) else torch.ops.lowbit_cuda.linear.default
    return call(x, parts, description.names[1:], layout.format, n, k, bias)


def _linear(
    x: Tensor, parts: Sequence[Tensor], names: Sequence[str], fmt: str, n: int, k: int, bias: Tensor | None
) -> Tensor:
    # Triton launches on the current device, whatever its arguments are on.
    with torch.cuda.device_of(x):
        return import_module("lowbit_kernels_cuda.linear").linear(x, parts, names, fmt, n, k, bias)


def _linear_fake(
    x: Tensor, parts: Sequence[Tensor], names: Sequence[str], fmt: str, n: int, k: int, bias: Tensor | None
) -> Tensor:
    del parts, names, fmt, k, bias
    return x.new_empty(*x.shape[:-1], n)


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _linear, "CUDA")
torch.library.register_fake("lowbit_cuda::linear", _linear_fake, lib=_LIBRARY)
