"""GPTQ's loop over the columns of a group, for all rows and candidates at a time; see `lowbit_algos.columns`.

A warp takes some rows through the loop, each lane its own, so that lanes never wait for one another. Sixteen columns at
a time are in registers; what earlier ones erred by is added to them when their turn comes.
"""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.element import Element
from lowbit.format import Format
from lowbit.numerics import ScaleMode, Scales
from lowbit_kernels_cuda.scaling import raw, scale_of_amax, scale_of_range, spec

# Tensor scales may be any, one for each row.
_TENSOR = tl.constexpr("rows")

_COLUMNS = 16
# Rows of a warp, or twice as many where there are so many warps that a GPU is busy all the same.
_ROWS, _WARPS = 32, 1024


@dataclass(frozen=True, slots=True)
class _Tried:
    """Columns under every candidate, by number: what was rounded and errors (C, g, N), and losses (C, N)."""

    targets: Tensor
    errors: Tensor
    losses: Tensor


def round_columns(
    w: Tensor, x: Tensor, m: Tensor, d: Tensor, scales: Tensor, zeros: Tensor, element: Element
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets and errors (N, g) of rows under the best of their candidates, and the losses (C, N) of all of them.

    `w` and `x` (N, g), `m` (g, g), `d` (g,), `scales` and `zeros` (C, N), all float32 and in any strides; fastest where
    rows lie side by side.
    """
    tried = _try(w, x, m, d, scales, zeros, element)
    if len(scales) == 1:
        return tried.targets[0].mT, tried.errors[0].mT, tried.losses
    best = tried.losses.argmin(0).expand(1, *w.mT.shape)
    return tried.targets.gather(0, best)[0].mT, tried.errors.gather(0, best)[0].mT, tried.losses


def round_group(
    w: Tensor,
    x: Tensor,
    m: Tensor,
    d: Tensor,
    free: Tensor,
    shares: Tensor,
    tensor_scale: Tensor | None,
    fmt: Format,
    mode: ScaleMode,
    scales: Scales,
    targets: Tensor,
    errors: Tensor,
) -> None:
    """Choose scales of `shares` (C,) of what `free + w` (N, g) needs, and write all that comes of the best of them.

    The rest is as for `round_columns`. `targets` and `errors` (N, g), and scales and zero points (N, 1), which may lie
    in larger tensors, are written.
    """
    (n, g), count, chosen = w.shape, len(shares), spec(fmt, mode, w.device)
    stored = torch.empty(count, n, dtype=raw(scales.scale).dtype, device=w.device)
    values, zeros = w.new_empty(count, n), w.new_empty(count, n)
    fit: Any = _fit[(triton.cdiv(n, _ROWS),)]
    fit(
        *(w, free, shares, tensor_scale, stored, values, zeros, n, g, count, *w.stride(), *free.stride()),
        SPEC=chosen,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=1,
        enable_fp_fusion=False,
    )
    tried = _try(w, x, m, d, values, zeros, fmt.element)
    zero = scales.zero
    pick: Any = _pick[(triton.cdiv(n, _ROWS),)]
    pick(
        *(tried.losses, stored, zeros, tried.targets, tried.errors, raw(scales.scale), zero, targets, errors),
        *(n, g, count, scales.scale.stride(0), 0 if zero is None else zero.stride(0)),
        *(*targets.stride(), *errors.stride()),
        ZERO=zero is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=1,
    )


def _try(w: Tensor, x: Tensor, m: Tensor, d: Tensor, scales: Tensor, zeros: Tensor, element: Element) -> _Tried:
    (n, g), count = w.shape, len(scales)
    integer = element.kind == "int"
    tried = _Tried(w.new_empty(count, g, n), w.new_empty(count, g, n), w.new_empty(count, n))
    rows = 64 if count * n >= 64 * _WARPS else _ROWS
    run: Any = _round[triton.cdiv(n, rows), count]
    run(
        *(w, x, m, d, scales.contiguous(), zeros.contiguous(), tried.targets, tried.errors, tried.losses, n, g),
        *(*w.stride(), *x.stride(), *m.stride(), d.stride(0)),
        LOW=element.min,
        HIGH=element.max,
        MANTISSA=-1 if integer else element.mantissa,
        LEAST=0 if integer else 1 - element.bias,
        ROWS=rows,
        COLUMNS=_COLUMNS,
        num_warps=1,
    )
    return tried


@triton.jit
def _round(
    w,
    x,
    m,
    d,
    scales,
    zeros,
    targets,
    errors,
    losses,
    n,
    g,
    w_row,
    w_column,
    x_row,
    x_column,
    m_row,
    m_column,
    d_column,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < n
    candidate = tl.program_id(1).to(tl.int64)
    s = tl.load(scales + candidate * n + rows, there, 1.0)
    z = tl.load(zeros + candidate * n + rows, there, 0.0)
    targets += candidate * g * n + rows
    errors += candidate * g * n + rows
    loss = tl.zeros([ROWS], tl.float32)
    inner = tl.arange(0, COLUMNS)[:, None]
    for first in range(0, g, COLUMNS):
        columns = first + inner
        inside = columns < g
        tile = tl.load(x + rows[None, :] * x_row + columns * x_column, there[None, :] & inside, 0.0)
        for i in range(first):
            factors = tl.load(m + i * m_row + columns * m_column, inside, 0.0)
            tile += factors * tl.load(errors + i * n, there, 0.0)[None, :]
        for j in range(COLUMNS):
            column = first + j
            here = there & (column + tl.zeros([ROWS], tl.int32) < g)
            target = tl.sum(tl.where(inner == j, tile, 0.0), 0)
            value = _nearest(target, s, z, LOW, HIGH, MANTISSA, LEAST) * s
            error = tl.load(w + rows * w_row + column * w_column, here, 0.0) - value
            beside = target - value
            loss += tl.load(d + column * d_column + tl.zeros([ROWS], tl.int32), here, 0.0) * beside * beside
            factors = tl.load(m + column * m_row + columns * m_column, (inner > j) & inside, 0.0)
            tile += factors * error[None, :]
            tl.store(targets + column * n, target, here)
            tl.store(errors + column * n, error, here)
        # What one lane wrote another may read.
        tl.debug_barrier()
    tl.store(losses + candidate * n + rows, loss, there)


@triton.jit
def _nearest(x, s, z, LOW: tl.constexpr, HIGH: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """`x / s` at the nearest code: its value in units of the scale."""
    v = tl.div_rn(x, s)
    if MANTISSA < 0:
        # Beyond this nothing but the end of the range is near, and adding 1.5 * 2^23 rounds to even what is within.
        v = _round_to_even(tl.minimum(tl.maximum(v, -65536.0), 65536.0)) + z
        return tl.minimum(tl.maximum(v, LOW), HIGH) - z
    v = tl.minimum(tl.maximum(v, LOW), HIGH)
    field = (v.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.maximum(field - 127, LEAST) - MANTISSA
    step = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return _round_to_even(v * ((127 - exponent) << 23).to(tl.float32, bitcast=True)) * step


@triton.jit
def _round_to_even(x):
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _fit(
    w,
    free,
    shares,
    tensor_scale,
    stored,
    values,
    zeros,
    n,
    g,
    count,
    w_row,
    w_column,
    free_row,
    free_column,
    SPEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < n
    low = tl.zeros([ROWS], tl.float32)
    high = tl.zeros([ROWS], tl.float32)
    for first in range(0, g, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[:, None]
        inside = there[None, :] & (columns < g)
        tile = tl.load(w + rows[None, :] * w_row + columns * w_column, inside, 0.0)
        tile += tl.load(free + rows[None, :] * free_row + columns * free_column, inside, 0.0)
        low = tl.minimum(low, tl.min(tile, 0))
        high = tl.maximum(high, tl.max(tile, 0))
    whole = 1.0
    if SPEC.tensor:
        whole = tl.load(tensor_scale)
    place = rows
    for candidate in range(count):
        share = tl.load(shares + candidate)
        if SPEC.zero:
            scale, value, zero = scale_of_range(low * share, high * share, SPEC)
            tl.store(zeros + place, zero, there)
        else:
            scale, value = scale_of_amax(tl.maximum(-low, high) * share, whole, SPEC, _TENSOR)
            tl.store(zeros + place, tl.zeros([ROWS], tl.float32), there)
        tl.store(stored + place, scale, there)
        tl.store(values + place, value, there)
        place += n


@triton.jit
def _pick(
    losses,
    stored,
    zeros,
    tried_targets,
    tried_errors,
    scale,
    zero,
    targets,
    errors,
    n,
    g,
    count,
    scale_row,
    zero_row,
    targets_row,
    targets_column,
    errors_row,
    errors_column,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < n
    best = tl.zeros([ROWS], tl.int64)
    least = tl.load(losses + rows, there, 0.0)
    for candidate in range(1, count):
        loss = tl.load(losses + candidate * n + rows, there, 0.0)
        best = tl.where(loss < least, candidate, best)
        least = tl.minimum(loss, least)
    tl.store(scale + rows * scale_row, tl.load(stored + best * n + rows, there), there)
    if ZERO:
        tl.store(zero + rows * zero_row, tl.load(zeros + best * n + rows, there).to(zero.dtype.element_ty), there)
    for first in range(0, g, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[:, None]
        inside = there[None, :] & (columns < g)
        place = (best * g * n + rows)[None, :] + columns * n
        target = tl.load(tried_targets + place, inside)
        error = tl.load(tried_errors + place, inside)
        tl.store(targets + rows[None, :] * targets_row + columns * targets_column, target, inside)
        tl.store(errors + rows[None, :] * errors_row + columns * errors_column, error, inside)
