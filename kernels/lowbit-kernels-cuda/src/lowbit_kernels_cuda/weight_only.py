"""The operator `linear` for weights that alone are in low precision: packed once, run by a schedule for the tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from lowbit.backends import Call, Description
from lowbit.errors import FormatError
from lowbit.format import WHOLE, Format
from lowbit.packing import pack as pack_codes
from lowbit.packing import unpack as unpack_codes
from lowbit.tensor import QuantizedTensor
from lowbit_kernels_cuda.linear import Text, linear_tiles, lines, text
from lowbit_kernels_cuda.scaling import raw, spec
from lowbit_kernels_cuda.weights import pack_scales, pack_tiles, parts, unpack_scales, unpack_tiles

_DTYPES = (torch.bfloat16, torch.float16)
# Programs times warps that keep a GPU busy.
_BUSY = 2048


def refuses(call: Call) -> str | None:
    """Why a call is not for this kernel, or None."""
    fmt = call.format
    assert fmt is not None and call.k is not None
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
    """Words of tiles, scales and zero points (K / group, N), and what else the weight has.

    Raises:
        FormatError: an 8-bit float is no number.
    """
    fmt = weight.format
    n, k = weight.canonical_shape
    element = fmt.element
    codes = unpack_codes(weight.qdata.view(torch.uint8), element, k) if element.packed else weight.qdata
    codes = codes.view(torch.uint8) & ((1 << element.bits) - 1)
    if element.has_nan and not bool(torch.isfinite(weight.qdata.float()).all()):
        msg = f"the weight has codes of {element.name} that are no numbers; find out where they come from"
        raise FormatError(msg)
    scale = weight.scale
    if scale.itemsize == 1 and not bool((torch.isfinite(scale.float()) & (scale.float() >= 0)).all()):
        msg = "the weight has scales that are no numbers, or negative ones; find out where they come from"
        raise FormatError(msg)
    if element.kind == "int" and element.signed:
        codes = codes ^ (1 << (element.bits - 1))
    rest = (weight.tensor_scale, weight.pre_scale)
    across = [_across(part, n, fmt) for part in (weight.scale, weight.zero) if part is not None]
    return (*pack_tiles(codes, element.bits), *across, *(part for part in rest if part is not None))


def _across(part: Tensor, n: int, fmt: Format) -> Tensor:
    """Scales or zero points as the kernel reads them, those of several rows once for each."""
    rows, group = fmt.block_for(2)
    return pack_scales(raw(part).repeat_interleave(rows or n, 0)[:n], group).view(part.dtype)


def _words(part: Tensor) -> Tensor:
    """What a lane reads of scales or zero points, in words of at most 32 bits."""
    size = 2 * part.shape[-1] * part.itemsize
    return raw(part).view(-1).view(torch.int16 if size == 2 else torch.int32)


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    fmt = Format.parse(description.layout.format)
    n, k = (description.shape[description.layout.permutation.index(d)] for d in range(2))
    element, count = fmt.element, len(parts(fmt.element.bits))
    codes = unpack_tiles(packed[:count], element.bits, n, k)
    if element.kind == "int" and element.signed:
        codes ^= 1 << (element.bits - 1)
        codes = codes.view(torch.int8) << (8 - element.bits) >> (8 - element.bits)
    data = pack_codes(codes, element) if element.packed else codes.view(element.storage)
    rows, group = fmt.block_for(2)
    found = {"qdata": data}
    for name, part in zip(description.names[1:], packed[count:], strict=True):
        if name in {"scale", "zero"}:
            each = unpack_scales(raw(part), n, -(-k // group) if group else 1)
            found[name] = each[:: rows or n].contiguous().view(part.dtype)
        else:
            found[name] = part
    return found


def run(x: Tensor, packed: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    """The operator `linear`."""
    fmt = Format.parse(description.layout.format)
    n, k = (description.shape[description.layout.permutation.index(d)] for d in range(2))
    count = len(parts(fmt.element.bits))
    named = dict(zip(description.names[1:], packed[count:], strict=True))
    if "pre_scale" in named:
        x = x * named["pre_scale"].to(x.dtype)
    tokens = x.reshape(-1, k).contiguous()
    m = len(tokens)
    out = x.new_empty(m, n)
    if not out.numel():
        return out.view(*x.shape[:-1], n)
    bf16, native = x.dtype == torch.bfloat16, x.is_cuda
    many = min(triton.next_power_of_2(triton.cdiv(m, 8)), 8)
    tall = 2 if many > 2 else 1
    programs = triton.cdiv(n, 16 * tall) * triton.cdiv(m, 8 * many)
    warps = min(max(triton.next_power_of_2(triton.cdiv(_BUSY, programs)), 4), 16)
    whole = named.get("tensor_scale")
    form = replace(spec(fmt, device=x.device if native else None), tensor=False)
    launch: Any = linear_tiles[(triton.cdiv(n, 16 * tall), triton.cdiv(m, 8 * many))]
    launch(
        *(tokens.view(torch.int32), packed[:count], _words(named["scale"])),
        *(
            _words(named["zero"]) if "zero" in named else None,
            whole,
            0 if whole is None or whole.numel() == 1 else 1,
            None if bias is None else raw(bias),
            raw(out),
            m,
            n,
            k,
        ),
        SPEC=form,
        PARTS=parts(fmt.element.bits),
        GROUP=fmt.block_for(2)[-1],
        BF16=bf16,
        LINES=lines(fmt.element, bf16),
        TEXT=text(fmt.element, bf16) if native else Text(),
        EVEN=k % 64 == 0,
        WARPS=warps,
        TALL=tall,
        TOKENS=many,
        AHEAD=2 if many <= 2 else 1,
        num_warps=warps,
    )
    return out.view(*x.shape[:-1], n)
