"""The operators that `fusing` puts into a compiled graph: inputs rounded once, and products that share an input.

Needs no Triton. The backend imports it, for compiled code that is kept on disk calls them without `fusing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit_kernels_cuda.packed import folds

_LIBRARY = torch.library.Library("lowbit_cuda", "FRAGMENT")
# Values, scales, zero points, and the sum of x and more under a norm; empty where there is none, or it is stored.
_LIBRARY.define(
    "rounded(str module, Tensor x, str format, str activation, Tensor? act_scale, Tensor? act_zero, bool expands, "
    "str producer, Tensor? more, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "linears(str module, Tensor values, Tensor? scale, Tensor? zero, Tensor[] parts, str[] names, str format, "
    "str activation, int[] rows, int columns, Tensor?[] biases, bool expands, ScalarType dtype) -> Tensor[]"
)


def shares(activation: Activation) -> bool:
    """Whether inputs rounded so need nothing that is known of all of them alone, so that products may share them."""
    fmt = activation.format
    return activation.scaling == "static" or (
        activation.scaling == "dynamic" and fmt.block_for(2)[0] == 1 and not fmt.tensor_scale
    )


def _rounded(
    module: str,
    x: Tensor,
    fmt: str,
    activation: str,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    expands: bool,  # noqa: FBT001 - an operator's
    producer: str,
    more: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = import_module("lowbit_kernels_cuda.inputs")
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    more = None if more is None else more.reshape(tokens.shape).contiguous()
    total = torch.empty_like(tokens) if producer == "norm" and more is not None else None
    made = inputs.Producer(producer, more, weight, eps, total)
    with torch.cuda.device_of(x):
        once = import_module(f"lowbit_kernels_cuda.{module}").rounded_once
        values, *rest = once(tokens, fmt, activation, act_scale, act_zero, made, expands=expands)
    values = values.view(*x.shape[:-1], values.shape[-1])
    if Activation.parse(activation).scaling == "static":
        rest = [None, None]
    scale, zero = (x.new_empty(0) if part is None else part for part in rest)
    return values, scale, zero, x.new_empty(0) if total is None else total.view(x.shape)


def _rounded_fake(
    module: str, x: Tensor, fmt: str, activation: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del fmt
    _, _, _, producer, more, *_ = rest
    how = Activation.parse(activation)
    m, k, group = x.shape[:-1].numel(), x.shape[-1], how.format.block_for(2)[-1]
    static, wide = how.scaling == "static", module == "linear"
    values = x.new_empty(*x.shape[:-1], 2 * k, dtype=torch.uint8)
    if not wide:
        values = x.new_empty(x.shape, dtype=how.format.element.storage)
    scale, zero = x.new_empty(0), x.new_empty(0)
    if not (static or (wide and group and folds(how.format))):
        shape = (m, -(-k // group) if group else 1)
        scale = x.new_empty(shape if group or not wide else (m,), dtype=torch.float32)
    if not (static or wide) and how.format.zero is not None:
        zero = x.new_empty(m, 1, dtype=how.format.zero.code_dtype)
    total = torch.empty_like(x) if producer == "norm" and more is not None else x.new_empty(0)
    return values, scale, zero, total


def _linears(
    module: str,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    parts: Sequence[Tensor],
    names: Sequence[str],
    fmt: str,
    activation: str,
    rows: Sequence[int],
    columns: int,
    biases: Sequence[Tensor | None],
    expands: bool,  # noqa: FBT001 - an operator's
    dtype: torch.dtype,
) -> list[Tensor]:
    tokens = values.reshape(-1, values.shape[-1]).contiguous()
    if not len(tokens):
        return [values.new_empty(*values.shape[:-1], n, dtype=dtype) for n in rows]
    given = (part if part is not None and part.numel() else None for part in (scale, zero))
    size = len(parts) // len(rows)
    packed = [parts[i : i + size] for i in range(0, len(parts), size)]
    with torch.cuda.device_of(values):
        multiply = import_module(f"lowbit_kernels_cuda.{module}").several
        outs = multiply(
            *(tokens, *given, packed, names, fmt, activation, rows, columns, biases, dtype), expands=expands
        )
    return [out.view(*values.shape[:-1], out.shape[-1]) for out in outs]


def _linears_fake(module: str, values: Tensor, *rest: Any) -> list[Tensor]:
    del module
    return [values.new_empty(*values.shape[:-1], n, dtype=rest[-1]) for n in rest[6]]


for _name, _run, _fake in (("rounded", _rounded, _rounded_fake), ("linears", _linears, _linears_fake)):
    _LIBRARY.impl(_name, _run, "CPU")
    _LIBRARY.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"lowbit_cuda::{_name}", _fake, lib=_LIBRARY)
