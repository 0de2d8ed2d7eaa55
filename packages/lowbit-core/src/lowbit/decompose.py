"""The neutral operators as aten operators, for compilers that cannot call Python.

Each op decomposes to what the reference computes, with one difference: 8-bit floats are told by arithmetic on their
bits, because inductor's C++ lacks their dtypes, some in torch 2.11 and some still in 2.15.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting

from lowbit.activation import Activation
from lowbit.attention import Scheme
from lowbit.backends import kernel
from lowbit.element import E4M3FN, E5M2, E8M0
from lowbit.format import Format

_FLOATS = {element.storage: element for element in (E4M3FN, E5M2, E8M0)}


def decompose(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Trace aten operators in place of `op` where an exported program is taken apart; a rule for functional tracing.

    That is in `ExportedProgram.run_decompositions` and in AOTInductor. What torch.compile and torch.export trace keeps
    the op whole.
    """
    if not is_exporting() or mode.pre_dispatch:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        named = [*zip(argument_names(op), args, strict=False), *kwargs.items()]
        given = {name: _as_traced(name, value) for name, value in named}
        results = kernel(f"reference.{op.name().removeprefix('lowbit::')}").run(*given.values())
        formats = [Format.parse(value) for name, value in named if name.endswith("format")]
        if isinstance(results, Tensor) or not formats:
            return results
        parts, stored = iter(results), []
        for fmt in formats:
            count = 2 + (fmt.zero is not None) + fmt.tensor_scale
            stored += _stored(list(islice(parts, count)), fmt)
        return stored


def argument_names(op: Any) -> list[str]:
    """Names of an operator's arguments, in order."""
    return [argument.name for argument in op._schema.arguments]  # noqa: SLF001 - the only place that has them


def traced_format(fmt: Format) -> Format:
    """The format with codes of 8-bit floats as bytes and 8-bit scales as the values they stand for."""
    codes = fmt.element.as_bits() if fmt.element.storage in _FLOATS else fmt.element
    return replace(fmt, element=codes, scale=fmt.scale.as_values() if fmt.scale.storage in _FLOATS else fmt.scale)


def _as_traced(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        element = E8M0 if name.endswith("scale") and value.dtype == torch.uint8 else _FLOATS.get(value.dtype)
        if element is None:
            return value
        bits = value.view(torch.uint8) if element is E8M0 else _reinterpret(value, torch.uint8)
        return bits if name.endswith("qdata") else element.as_bits().decode(bits)
    if name.endswith("format"):
        return traced_format(Format.parse(value))
    if name == "scheme":
        scheme = Scheme.parse(value)
        return replace(scheme, qk=traced_format(scheme.qk), v=None if scheme.v is None else traced_format(scheme.v))
    if name == "activation" and value:
        activation = Activation.parse(value)
        return replace(activation, format=traced_format(activation.format))
    return value


def _stored(parts: list[Tensor], fmt: Format) -> list[Tensor]:
    """What quantizing gave, in the dtypes that the format stores."""
    data, scale, *rest = parts
    if fmt.element.storage in _FLOATS:
        data = _reinterpret(data, fmt.element.storage)
    if fmt.scale.storage in _FLOATS:
        scale = _reinterpret(fmt.scale.as_bits().encode(scale), fmt.scale.storage)
    return [data, scale, *rest]


def _reinterpret(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of `part` as another dtype of one byte.

    Through a wider one where they can be counted in it: inductor leaves that to aten, and compiles a view of equal
    width into code that names the dtype.
    """
    flat = part if isinstance(part.numel(), torch.SymInt) else part.flatten()
    for wide in (torch.int32, torch.int16):
        if flat.shape[-1] % wide.itemsize == 0 and flat.storage_offset() % wide.itemsize == 0:
            return flat.view(wide).view(dtype).view(part.shape)
    return part.view(dtype)
