"""Products with weights packed by tiles of 16 rows: the i-th rows of a tile stand in lane i, word by word.

Each row's words are those of the canonical bit stream, so packing is a transposition, and undoing it another. Rows are
padded to whole tiles, columns to multiples of 32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.backends import Call, Description
from lowbit.bags import check_rows
from lowbit.format import WHOLE, Format
from lowbit.packing import pack as pack_codes
from lowbit.packing import packed_bytes
from lowbit.tensor import QuantizedTensor

# As in csrc/kernels.h.
TILE, STEP = 16, 32
MOST_ROUNDED = 1 << 15
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(call: Call) -> str | None:
    """Why a call is not for this kernel, or None."""
    fmt = call.format
    assert fmt is not None
    if call.x_dtype not in DTYPES:
        return f"needs inputs in float32, bfloat16 or float16; these are {call.x_dtype}"
    if len(fmt.block) != 2:
        return f"needs blocks of rows and columns; this is {fmt}"
    if fmt.block[-1] != WHOLE and fmt.block[-1] % 16:
        return f"needs scales of multiples of 16 columns, or of whole rows; this is {fmt}"
    return None if call.activation is None else _refuses_rounded(call.activation, fmt, call.k)


def _refuses_rounded(activation: Activation, fmt: Format, k: int | None) -> str | None:
    to = activation.format
    rows = {"dynamic": (1, WHOLE), "static": (WHOLE, WHOLE)}.get(activation.scaling)
    if to.element.kind != "int" or not to.element.signed or to.block != rows or to.scale.name != "float32":
        return f"needs inputs as they are, or rounded to signed integers by rows or statically; these are {activation}"
    if fmt.element.kind != "int" or 8 % fmt.element.bits:
        return f"needs weights of 1, 2, 4 or 8-bit integers for rounded inputs; this is {fmt}"
    columns = fmt.block[-1]
    if columns != WHOLE and columns % STEP:
        return f"needs scales of multiples of {STEP} columns for rounded inputs; this is {fmt}"
    if k is not None and (k if columns == WHOLE else min(columns, k)) > MOST_ROUNDED:
        return f"needs scales of {MOST_ROUNDED} columns at most for rounded inputs, lest sums overflow; this is {fmt}"
    return None


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """Codes (E, tiles, words, 16), then the other inner tensors: those of scales (E, tiles, groups, 16)."""
    fmt, (n, k) = weight.format, weight.canonical_shape[-2:]
    words = -(-k // STEP) * fmt.element.bits
    raw = _experts(weight.qdata).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, words * 4 - raw.shape[-1]))
    codes = _tiles(raw.contiguous().view(torch.int32))
    if (flips := _flips(fmt)) is not None:
        codes ^= flips.repeat(words // len(flips))[:, None]
    rows = fmt.block_of((n, k))[0]
    parts = [codes]
    for name, part in list(weight.inner_tensors().items())[1:]:
        if name in {"scale", "zero"}:
            parts.append(_tiles(_spread(part, rows, n)))
        elif name == "tensor_scale":
            whole = _experts(part)
            one = whole.shape[-2] == 1
            parts.append(whole.reshape(-1, 1) if one else _tiles(_spread(whole, rows, n)).flatten(1))
        else:
            parts.append(part)
    return tuple(part.contiguous() for part in parts)


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    fmt = Format.parse(description.layout.format)
    *stack, n, k = description.canonical_shape
    rows = fmt.block_of((n, k))[0]
    codes = packed[0]
    if (flips := _flips(fmt)) is not None:
        codes = codes ^ flips.repeat(codes.shape[-2] // len(flips))[:, None]
    columns = packed_bytes(k, fmt.element.bits)
    raw = _untiled(codes, n).contiguous().view(torch.uint8)[..., :columns]
    inner = {"qdata": raw.reshape(*stack, n, columns).view(fmt.element.storage)}
    for name, part in zip(description.names[1:], packed[1:], strict=True):
        if name in {"scale", "zero"}:
            found = _rows(_untiled(part, n), rows)
            inner[name] = found.reshape(*stack, *found.shape[-2:])
        elif name == "tensor_scale":
            found = part[..., None] if part.shape[-1] == 1 else _rows(part[:, :n, None], rows)
            shared = part.shape[0] == 1
            inner[name] = found.reshape(*((1,) * len(stack) if shared else stack), -1, 1)
        else:
            inner[name] = part
    return {name: part.contiguous() for name, part in inner.items()}


def run(x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, of any number of tokens."""
    return _product(x, parts, description, bias, None)


def run_grouped(x: Tensor, parts: tuple[Tensor, ...], description: Description, offs: Tensor) -> Tensor:
    """Each token by its expert's `weight.T`; `offs` (E,) ends each expert's, and those beyond the last become zeros."""
    return _product(x, parts, description, None, offs)


def lookup(ids: Tensor, parts: tuple[Tensor, ...], description: Description) -> Tensor:
    """Rows (.., K) of a packed matrix, for tables that linear layers share."""
    named = dict(zip(description.names, parts, strict=True))
    return torch.ops.lowbit_x86.rows.default(
        *(ids, parts[0], parts[1], named.get("zero"), named.get("tensor_scale"), description.layout.format),
        *(*description.canonical_shape, description.layout.dtype),
    )


def _rows_of(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    spec: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    if not ids.numel():
        return codes.new_empty((*ids.shape, k), dtype=dtype)
    check_rows(ids, n)
    fmt, flat = Format.parse(spec), ids.reshape(-1)
    tile, lane = flat // TILE, flat % TILE

    def each(part: Tensor) -> Tensor:
        return _raw(part)[0, tile, :, lane].view(part.dtype)

    words = each(codes)
    if (flips := _flips(fmt)) is not None:
        words ^= flips.repeat(words.shape[-1] // len(flips))
    raw = words.view(torch.uint8)[:, : packed_bytes(k, fmt.element.bits)].contiguous()
    if tensor_scale is not None:
        tensor_scale = tensor_scale if tensor_scale.numel() == 1 else tensor_scale[0, flat, None]
    values = torch.ops.lowbit_x86.dequantize.default(
        *(raw.view(fmt.element.storage), each(scale), None if zero is None else each(zero), tensor_scale),
        *(str(replace(fmt, block=(1, fmt.block[-1]))), k, dtype),
    )
    return values.view(*ids.shape, k)


def _rows_of_fake(ids: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((*ids.shape, rest[-2]), dtype=rest[-1])


_LIBRARY = torch.library.Library("lowbit_x86", "FRAGMENT")
_LIBRARY.define(
    "rows(Tensor ids, Tensor codes, Tensor scale, Tensor? zero, Tensor? tensor_scale, str format, int n, int k, "
    "ScalarType dtype) -> Tensor"
)
_LIBRARY.impl("rows", _rows_of, "CPU")
torch.library.register_fake("lowbit_x86::rows", _rows_of_fake, lib=_LIBRARY)


def _product(
    x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None, offs: Tensor | None
) -> Tensor:
    named = dict(zip(description.names, parts, strict=True))
    pre_scale = named.get("pre_scale")
    return torch.ops.lowbit_x86.linear.default(
        x.contiguous(),
        parts[0],
        parts[1],
        named.get("zero"),
        named.get("tensor_scale"),
        None if pre_scale is None else pre_scale.to(x.dtype),
        None if bias is None else bias.to(x.dtype).contiguous(),
        offs,
        description.layout.format,
        description.canonical_shape[-2],
        description.layout.activation or "",
        named.get("act_scale"),
        named.get("act_zero"),
    )


def _experts(part: Tensor) -> Tensor:
    """(E, rows, columns) of a matrix or of stacked ones."""
    return part.reshape(-1, *part.shape[-2:])


def _raw(part: Tensor) -> Tensor:
    """The same memory in a dtype that torch pads, repeats and indexes, which it does not for 8-bit floats."""
    return part.view(torch.uint8) if part.dtype.itemsize == 1 else part


def _tiles(part: Tensor) -> Tensor:
    """(E, N, columns) -> (E, tiles, columns, 16)."""
    padded = torch.nn.functional.pad(_raw(part), (0, 0, 0, -part.shape[-2] % TILE))
    return padded.unflatten(-2, (-1, TILE)).mT.contiguous().view(part.dtype)


def _untiled(tiles: Tensor, n: int) -> Tensor:
    """Undo `_tiles`, for N rows."""
    return _raw(tiles).mT.flatten(1, 2)[:, :n].contiguous().view(tiles.dtype)


def _spread(part: Tensor, rows: int, n: int) -> Tensor:
    """(E, blocks of rows, columns) -> (E, N, columns)."""
    return _raw(_experts(part)).repeat_interleave(rows, -2)[:, :n].contiguous().view(part.dtype)


def _rows(part: Tensor, rows: int) -> Tensor:
    """Undo `_spread`."""
    return _raw(part)[:, ::rows].contiguous().view(part.dtype)


def _flips(fmt: Format) -> Tensor | None:
    """Words of 32 codes of sign bits, where zero points come with signed codes: those count from the lowest."""
    if fmt.zero is None or not fmt.element.signed:
        return None
    signs = torch.full((STEP,), -(1 << (fmt.element.bits - 1)), dtype=torch.int8)
    return pack_codes(signs, fmt.element).view(torch.uint8).view(torch.int32)
