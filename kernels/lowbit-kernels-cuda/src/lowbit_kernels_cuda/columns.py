"""GPTQ's loop over the columns of a group, for all rows and candidates at a time; see `lowbit_algos.columns`.

A warp takes some rows through the loop, each lane its own, so that lanes never wait for one another. Sixteen columns at
a time are in registers; what earlier ones erred by is added to them when their turn comes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.element import Element

_COLUMNS = 16
# Warps that a GPU should have to choose from: with fewer, each takes fewer rows.
_WARPS = 1024


def round_columns(
    w: Tensor, x: Tensor, m: Tensor, d: Tensor, scales: Tensor, zeros: Tensor, element: Element
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets and errors (N, g) of rows under the best of their candidates, and the losses (C, N) of all of them.

    `w` and `x` (N, g), `m` (g, g), `d` (g,), `scales` and `zeros` (C, N), all float32 and in any strides; fastest where
    rows lie side by side.
    """
    (n, g), count = w.shape, len(scales)
    integer = element.kind == "int"
    # Columns by rows, for every candidate.
    targets, errors = w.new_empty(count, g, n), w.new_empty(count, g, n)
    losses = torch.empty_like(scales)
    rows = 64 if count * n >= 64 * _WARPS else 32
    run: Any = _round[triton.cdiv(n, rows), count]
    run(
        *(w, x, m, d, scales.contiguous(), zeros.contiguous(), targets, errors, losses, n, g),
        *(*w.stride(), *x.stride(), *m.stride(), d.stride(0)),
        LOW=element.min,
        HIGH=element.max,
        MANTISSA=-1 if integer else element.mantissa,
        LEAST=0 if integer else 1 - element.bias,
        ROWS=rows,
        COLUMNS=_COLUMNS,
        num_warps=1,
    )
    if count == 1:
        return targets[0].mT, errors[0].mT, losses
    best = losses.argmin(0).expand(1, g, n)
    return targets.gather(0, best)[0].mT, errors.gather(0, best)[0].mT, losses


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
