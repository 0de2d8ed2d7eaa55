"""The operator `dequantize`: codes are unpacked, decoded and multiplied by their scales in registers."""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.format import WHOLE, Format
from lowbit.numerics import Scales, check_data, check_scales
from lowbit_kernels_cuda.codes import decode, from_float32, split_apart
from lowbit_kernels_cuda.scaling import raw, scale_value, spec


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    fmt: str,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The operator `dequantize`; parts with gaps are first copied.

    Raises:
        FormatError: as the operator.
    """
    parsed = Format.parse(fmt)
    shape = (*qdata.shape[:-1], k)
    check_data(qdata, parsed, k)
    check_scales(Scales(scale, zero, tensor_scale), parsed, shape)
    values = torch.empty(shape, dtype=dtype, device=qdata.device)
    if not values.numel():
        return values
    batch, rows, columns = prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1, k
    height, group = parsed.block_for(max(len(shape), 2))[-2:]
    if tensor_scale is not None:
        tensor_scale = tensor_scale.expand((*scale.shape[:-1], 1)).contiguous()
    # Blocks of one row are rows then: nothing lies between them.
    per = 1
    if height == 1 and group != WHOLE:
        per = columns // group
        batch, rows, columns = 1, batch * rows * per, group
    length = group if group != WHOLE else min(max(triton.next_power_of_2(columns), 16), 1024)
    if height > 1:
        # Some squares side by side, so that what is read is.
        length = max(length, 128)
    tall = max(min(4096 // length, triton.next_power_of_2(rows)), 1)
    parts: tuple[Any, ...] = tuple(
        None if part is None else raw(part.contiguous()) for part in (qdata, scale, zero, tensor_scale, values)
    )
    run: Any = _dequantize[(batch * triton.cdiv(rows, tall) * triton.cdiv(columns, length),)]
    run(
        *(*parts, rows, columns, per),
        SPEC=spec(parsed, device=qdata.device if qdata.is_cuda else None),
        GROUP=group,
        HEIGHT=height,
        ROWS=tall,
        COLUMNS=length,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return values


@triton.jit
def _dequantize(
    data,
    scales,
    zeros,
    tensor_scales,
    values,
    rows,
    columns,
    per,
    SPEC: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    along = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * along
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row, column = tile // along * ROWS + tl.arange(0, ROWS)[:, None], tile % along * COLUMNS
    c = column + tl.arange(0, COLUMNS)[None, :]
    inside = row < rows

    # The row of each row's scale, and its scale, or those of its columns, in it.
    if HEIGHT == 0:
        scale_row = batch + tl.zeros_like(row)
    else:
        scale_row = batch * tl.cdiv(rows, HEIGHT) + row // HEIGHT
    at = scale_row
    if GROUP != 0:
        at = scale_row * tl.cdiv(columns, GROUP) + (c if COLUMNS > GROUP else column) // GROUP
    there = inside & (c < columns) if GROUP != 0 and COLUMNS > GROUP else inside
    tensor_scale = 1.0
    if SPEC.tensor:
        tensor_scale = tl.load(tensor_scales + scale_row // per, inside, 1.0)
    scale = scale_value(tl.load(scales + at, there, 0), tensor_scale, SPEC)

    ELEMENT: tl.constexpr = SPEC.element
    row = batch * rows + row
    if SPEC.run == 1:
        codes = tl.load(data + row * columns + c, inside & (c < columns), 0)
    else:
        runs = tl.cdiv(columns, SPEC.run)
        run = column // SPEC.run + tl.arange(0, COLUMNS // SPEC.run)[None, :]
        first = data + (row * runs + run) * SPEC.run_bytes
        word = tl.load(first, inside & (run < runs), 0)
        if SPEC.run_bytes > 4:
            word = word.to(tl.int64)
        elif SPEC.run_bytes > 1:
            word = word.to(tl.int32)
        BYTES: tl.constexpr = SPEC.run_bytes
        for i in tl.static_range(1, BYTES):
            word |= tl.load(first + i, inside & (run < runs), 0).to(word.dtype) << (8 * i)
        codes = split_apart(word, SPEC, ROWS, COLUMNS)
    value = decode(codes, ELEMENT)
    if SPEC.zero:
        zero = tl.load(zeros + at, there, 0).to(tl.int32)
        if SPEC.signed_zero:
            zero = (zero << 24) >> 24
        value -= zero.to(tl.float32)
    value = from_float32(value * scale, values.dtype.element_ty, SPEC)
    tl.store(values + row * columns + c, value, inside & (c < columns))
