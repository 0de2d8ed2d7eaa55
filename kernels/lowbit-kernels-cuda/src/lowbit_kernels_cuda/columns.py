"""GPTQ's loop over the columns of groups, for all rows and candidates at a time; see `lowbit_algos.columns`.

A program takes some rows through a block of groups, each warp one candidate, each lane its own rows, so that lanes wait
for one another only where the best candidate is chosen. Sixteen columns at a time are in registers; what earlier ones
erred by is added to them when their turn comes.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false
# pyright: reportUnnecessaryComparison=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.element import Element
from lowbit.format import Format
from lowbit.numerics import ScaleMode, Scales
from lowbit_kernels_cuda.scaling import Spec, raw, scale_of_amax, scale_of_range, spec

# Tensor scales may be any, one for each matrix.
_TENSOR = tl.constexpr("rows")

# Columns in registers; rows of a program; rows times candidates of a warp, and the most warps of a program: a lane that
# takes two rows and several candidates reads M once for all of them.
_COLUMNS, _ROWS, _LANES, _WARPS = 16, 32, 64, 4


def round_columns(
    w: Tensor, x: Tensor, m: Tensor, d: Tensor, scales: Tensor, zeros: Tensor, element: Element
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets and errors (E, N, g) of rows under the best of their candidates, and the losses (C, E, N) of all of them.

    `w` and `x` (E, N, g), `m` (E, g, g), `d` (E, g), `scales` and `zeros` (C, E, N), all float32 and in any strides;
    fastest where rows lie side by side.
    """
    targets, errors = (torch.empty_like(w.mT, memory_format=torch.contiguous_format).mT for _ in range(2))
    losses = torch.empty(scales.shape, device=w.device)
    given = scales.contiguous(), zeros.contiguous(), losses
    _launch(w, x, m, d, len(scales), w.shape[2], targets, errors, element, given=given)
    return targets, errors, losses


def round_groups(
    w: Tensor,
    x: Tensor,
    m: Tensor,
    d: Tensor,
    inverses: Tensor,
    shares: Tensor,
    tensor_scale: Tensor | None,
    fmt: Format,
    mode: ScaleMode,
    scales: Scales,
    targets: Tensor,
    errors: Tensor,
) -> None:
    """Choose scales of `shares` (C,) of what each group needs, and write all that comes of the best of them.

    `w`, `x`, `targets` and `errors` (E, N, G g), `m` (E, G g, G g), `d` (E, G g), `inverses` (E, G, g, g) of M's blocks
    on its diagonal, `tensor_scale` (E, 1, 1), and scales and zero points (E, N, G), which, as `targets` and `errors`
    do, may lie in larger tensors. `x` is written over.
    """
    chosen = spec(fmt, mode, w.device)
    found = inverses, shares, tensor_scale, raw(scales.scale), scales.zero
    _launch(w, x, m, d, len(shares), inverses.shape[3], targets, errors, fmt.element, SPEC=chosen, found=found)


def _launch(
    w: Tensor,
    x: Tensor,
    m: Tensor,
    d: Tensor,
    count: int,
    g: int,
    targets: Tensor,
    errors: Tensor,
    element: Element,
    *,
    SPEC: Spec | None = None,
    given: tuple[Tensor | None, ...] = (None,) * 3,
    found: tuple[Tensor | None, ...] = (None,) * 5,
) -> None:
    experts, n, width = w.shape
    candidates = triton.next_power_of_2(count)
    rows = max(_ROWS, _LANES // candidates)
    # What comes of every candidate.
    tried = w.new_empty(2, experts, count, g, n) if count > 1 else None
    inverses, _, _, scale, zero = found
    integer = element.kind == "int"
    run: Any = _round[triton.cdiv(n, rows), experts]
    run(
        *(w, x, m, d, *given, *found, tried, targets, errors, n, width, g, count),
        *(*w.stride(), *x.stride(), *m.stride(), *d.stride(), *targets.stride(), *errors.stride()),
        *((0,) * 4 if inverses is None else inverses.stride()),
        *((0,) * 3 if scale is None else scale.stride()),
        *((0,) * 3 if zero is None else zero.stride()),
        SPEC=SPEC,
        LOW=element.min,
        HIGH=element.max,
        MANTISSA=-1 if integer else element.mantissa,
        LEAST=0 if integer else 1 - element.bias,
        CANDIDATES=candidates,
        ROWS=rows,
        COLUMNS=_COLUMNS,
        num_warps=min(candidates * rows // _LANES, _WARPS),
        # Scales have to be those of `lowbit.numerics`; sums are fused where they are written so.
        enable_fp_fusion=False,
    )


@triton.jit
def _round(
    w,
    x,
    m,
    d,
    scales,
    zeros,
    losses,
    inverses,
    shares,
    tensor_scale,
    scale,
    zero,
    tried,
    targets,
    errors,
    n,
    width,
    g,
    count,
    w_expert,
    w_row,
    w_column,
    x_expert,
    x_row,
    x_column,
    m_expert,
    m_row,
    m_column,
    d_expert,
    d_column,
    targets_expert,
    targets_row,
    targets_column,
    errors_expert,
    errors_row,
    errors_column,
    inverses_expert,
    inverses_group,
    inverses_row,
    inverses_column,
    scale_expert,
    scale_row,
    scale_group,
    zero_expert,
    zero_row,
    zero_group,
    SPEC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    experts, expert = tl.num_programs(1).to(tl.int64), tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    # A lane goes through one candidate of one row, or a few rows; all take a part in what is done once for all of them.
    lane = tl.arange(0, CANDIDATES * ROWS)
    # Were more rows said to be contiguous, a lane would read four at once, and columns be spread over lanes.
    candidate, row = lane // ROWS, tl.max_contiguous(first_row + lane % ROWS, 2)
    here = (row < n) & (candidate < count)
    candidates, rows = tl.arange(0, CANDIDATES)[:, None], tl.max_contiguous(first_row + tl.arange(0, ROWS), 2)
    there = rows < n
    inner = tl.arange(0, COLUMNS)
    w += expert * w_expert
    x += expert * x_expert
    m += expert * m_expert
    d += expert * d_expert
    targets += expert * targets_expert
    errors += expert * errors_expert
    for start in range(0, width, g):
        if SPEC is None:
            place = (candidate * experts + expert) * n + row
            s = tl.load(scales + place, here, 1.0)
            z = tl.load(zeros + place, here, 0.0)
        else:
            if start > 0:
                _bring(
                    *(x + rows * x_row, m, errors + rows * errors_row, start, g, there),
                    *(m_row, m_column, x_column, errors_column, COLUMNS),
                )
            low, high = _range(
                *(w + start * w_column + rows * w_row, x + start * x_column + rows * x_row),
                *(inverses + expert * inverses_expert + (start // g) * inverses_group, g, there),
                *(w_column, x_column, inverses_row, inverses_column, ROWS, COLUMNS),
            )
            share = tl.load(shares + candidates, candidates < count, 1.0)
            if SPEC.zero:
                stored, size, point = scale_of_range(low[None, :] * share, high[None, :] * share, SPEC)
            else:
                whole = 1.0
                if SPEC.tensor:
                    whole = tl.load(tensor_scale + expert)
                stored, size = scale_of_amax(tl.maximum(-low, high)[None, :] * share, whole, SPEC, _TENSOR)
                point = tl.zeros([CANDIDATES, ROWS], tl.float32)
            s, z = tl.reshape(size, (CANDIDATES * ROWS,)), tl.reshape(point, (CANDIDATES * ROWS,))
        # Where there are candidates, what comes of each is written apart, and in the end the best one's moved.
        if CANDIDATES == 1:
            to_targets, to_errors = targets + start * targets_column + row * targets_row, errors + row * errors_row
            to_errors += start * errors_column
            target_step, error_step = targets_column, errors_column
        else:
            to_targets = tried + (expert * count + candidate) * g * n + row
            to_errors = to_targets + experts * count * g * n
            target_step, error_step = n, n
        loss = tl.zeros([CANDIDATES * ROWS], tl.float32)
        for first in range(0, g, COLUMNS):
            columns = first + inner
            inside = columns < g
            tile = tl.load(
                x + row[None, :] * x_row + (start + columns)[:, None] * x_column, here[None, :] & inside[:, None], 0.0
            )
            from_m = m + start * m_row + (start + columns) * m_column
            for i in tl.range(0, first, loop_unroll_factor=2):
                factors = tl.load(from_m + i * m_row, inside, 0.0)[:, None]
                tile = tl.fma(factors, tl.load(to_errors + i * error_step, here, 0.0)[None, :], tile)
            for j in range(COLUMNS):
                column = first + j
                now = here & (column + tl.zeros([CANDIDATES * ROWS], tl.int32) < g)
                target = tl.sum(tl.where(inner[:, None] == j, tile, 0.0), 0)
                value = _nearest(target, s, z, LOW, HIGH, MANTISSA, LEAST) * s
                error = tl.load(w + (start + column) * w_column + row * w_row, now, 0.0) - value
                beside = target - value
                weight = tl.load(
                    d + (start + column) * d_column + tl.zeros([1], tl.int32), column < g + tl.zeros([1], tl.int32), 0.0
                )
                loss = tl.fma(weight * beside, beside, loss)
                factors = tl.load(from_m + column * m_row, (inner > j) & inside, 0.0)[:, None]
                tile = tl.fma(factors, error[None, :], tile)
                tl.store(to_targets + column * target_step, target, now)
                tl.store(to_errors + column * error_step, error, now)
            # What one lane wrote another may read.
            tl.debug_barrier()
        if SPEC is None:
            tl.store(losses + (candidate * experts + expert) * n + row, loss, here)
        several = tl.where(candidates < count, tl.reshape(loss, (CANDIDATES, ROWS)), float("inf"))
        best = tl.argmin(several, 0)
        if SPEC is not None:
            to = scale + expert * scale_expert + rows * scale_row + (start // g) * scale_group
            chosen = candidates == best[None, :]
            tl.store(to, tl.sum(tl.where(chosen, stored, 0), 0).to(scale.dtype.element_ty), there)
            if SPEC.zero:
                to = zero + expert * zero_expert + rows * zero_row + (start // g) * zero_group
                tl.store(to, tl.sum(tl.where(chosen, point, 0.0), 0).to(zero.dtype.element_ty), there)
        if CANDIDATES > 1:
            place = tried + (expert * count + best) * g * n + rows
            _move(place, targets + start * targets_column + rows * targets_row, g, there, n, targets_column, COLUMNS)
            place += experts * count * g * n
            _move(place, errors + start * errors_column + rows * errors_row, g, there, n, errors_column, COLUMNS)
            tl.debug_barrier()


@triton.jit
def _bring(
    x,
    m,
    errors,
    start,
    g,
    there,
    m_row,
    m_column,
    x_column,
    errors_column,
    COLUMNS: tl.constexpr,
):
    """Bring the group's columns of `x` up to date with those of the block before it."""
    for first in range(0, g, COLUMNS):
        columns = start + first + tl.arange(0, COLUMNS)
        inside = columns < start + g
        place = x[None, :] + columns[:, None] * x_column
        tile = tl.load(place, there[None, :] & inside[:, None], 0.0)
        for i in range(start):
            factors = tl.load(m + i * m_row + columns * m_column, inside, 0.0)[:, None]
            tile = tl.fma(factors, tl.load(errors + i * errors_column, there, 0.0)[None, :], tile)
        tl.store(place, tile, there[None, :] & inside[:, None])
    tl.debug_barrier()


@triton.jit
def _range(
    w,
    x,
    inverse,
    g,
    there,
    w_column,
    x_column,
    inverse_row,
    inverse_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The least and the greatest of what a group's columns would come to if none of them were rounded, and 0."""
    low = tl.zeros([COLUMNS, ROWS], tl.float32)
    high = tl.zeros([COLUMNS, ROWS], tl.float32)
    for first in range(0, g, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < g
        tile = tl.load(w[None, :] + columns[:, None] * w_column, there[None, :] & inside[:, None], 0.0)
        for i in range(tl.minimum(first + COLUMNS, g)):
            moved = tl.load(x + i * x_column, there, 0.0) - tl.load(w + i * w_column, there, 0.0)
            factors = tl.load(inverse + i * inverse_row + columns * inverse_column, inside, 0.0)[:, None]
            tile = tl.fma(factors, moved[None, :], tile)
        low = tl.minimum(low, tile)
        high = tl.maximum(high, tile)
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def _move(tried, to, g, there, step, to_step, COLUMNS: tl.constexpr):
    for first in range(0, g, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[:, None]
        inside = there[None, :] & (columns < g)
        tl.store(to[None, :] + columns * to_step, tl.load(tried[None, :] + columns * step, inside), inside)


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
