"""Inputs of products rounded to a low precision, as the numbers that tensor cores multiply with a packed weight.

These are bfloat16s, each a code less its zero point, exactly. Scales of blocks are multiplied in where it is one still;
others are left to sums of products. Or they are codes of e4m3, for tensor cores that multiply these.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.activation import Activation
from lowbit.numerics import DEFAULT_MODE
from lowbit_kernels_cuda.casts import quantize
from lowbit_kernels_cuda.codes import decode, encode_float, from_float32, to_float32
from lowbit_kernels_cuda.packed import folds
from lowbit_kernels_cuda.scaling import (
    from_ordered,
    magnitude,
    ordered,
    raw,
    scale_of_amax,
    scale_of_range,
    scale_value,
    spec,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of a product, and what its sums are multiplied by."""

    # (M, K) of 16 bits each, or e4m3.
    values: Tensor
    # Float32: (M,) or of all (1,), of all columns; (M, K / span) of `span` each.
    scale: Tensor | None = None
    span: int = 0
    # Whether they were rounded, so that weights must not be.
    exact: bool = False


def rounded(
    x: Tensor, activation: Activation, act_scale: Tensor | None, act_zero: Tensor | None, *, moved: bool = False
) -> Inputs:
    """Tokens (M, K), rounded as `activation` says: `scale * values` are what `lowbit.quantize` gives.

    Columns are `moved` where weights are packed as `weights.side_by_side` has them.

    Raises:
        FormatError: a stored scale is needed, and there is none.
    """
    fmt, (m, k) = activation.format, x.shape
    group = fmt.block[-1]
    whole = given = zero = None
    if activation.scaling == "local":
        whole = activation.stored(act_scale).to(torch.float32).reshape(1)
    elif activation.scaling == "static":
        given, zero = activation.stored(act_scale).to(fmt.scale.storage), act_zero
    elif fmt.tensor_scale:
        # Known once all of the input is.
        whole = quantize(x, None, None, None, str(fmt), DEFAULT_MODE, "nearest", 0)[-1].reshape(1)
    elif fmt.block[0] != 1:
        _, given, *rest = quantize(x, None, None, None, str(fmt), DEFAULT_MODE, "nearest", 0)
        zero = rest[0] if rest else None
    out, span, scale = x.new_empty(m, k, dtype=torch.bfloat16), 0, None
    if given is not None:
        scale = given.reshape(1).float()
    elif not group:
        scale = x.new_empty(m, dtype=torch.float32)
    elif folds(fmt):
        scale = whole
    else:
        span, scale = group, x.new_empty(m, triton.cdiv(k, group), dtype=torch.float32)
    length = max(group, 1024) if group else min(triton.next_power_of_2(k), 16384)
    soon = overlaps(x.device)
    kernel: Any = round_inputs
    kernel[m, triton.cdiv(k, length) if group else 1](
        *(raw(x), None if given is None else raw(given.reshape(1)), None if zero is None else raw(zero.reshape(1))),
        *(whole, raw(out), scale, k),
        SPEC=spec(fmt, device=x.device if x.is_cuda else None),
        GROUP=group,
        GIVEN=given is not None,
        SPAN=span,
        COLUMNS=length,
        MOVED=moved,
        OVERLAPS=soon,
        num_warps=4 if group else min(max(length // 512, 1), 16),
        enable_fp_fusion=False,
        **({"launch_pdl": True} if soon else {}),
    )
    return Inputs(out, scale, span, exact=True)


def quantized(
    x: Tensor, activation: Activation, act_scale: Tensor | None, act_zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of tokens (M, K), their float32 scales and their zero points, by an activation without tensor scales.

    Raises:
        FormatError: a stored scale is needed, and there is none.
    """
    scale = zero = None
    if activation.scaling == "static":
        scale = activation.stored(act_scale).to(activation.format.scale.storage).reshape(1, 1)
        zero = None if act_zero is None else act_zero.reshape(1, 1)
    codes, scale, *rest = quantize(x, scale, zero, None, str(activation.format), DEFAULT_MODE, "nearest", 0)
    return codes, scale.float(), rest[0] if rest else None


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a GPU starts a kernel while the one before ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def round_inputs(
    x,
    given,
    zeros,
    whole,
    out,
    scales,
    k,
    SPEC: tl.constexpr,
    GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOVED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """`out` of a row of `x` (M, K), COLUMNS at a time, which are MOVED or not; with GROUP, of COLUMNS of it.

    Scales, which are chosen unless GIVEN, are written to `scales` where sums are to meet them.
    """
    row = tl.program_id(0)
    x += row.to(tl.int64) * k
    out += row.to(tl.int64) * k
    if OVERLAPS:
        # The product may start, and wait for what is written here, as this does for the kernel before: first, for a
        # product reads `offs` before it waits.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if GROUP == 0:
        place = tl.arange(0, COLUMNS)
        # Of 16, four for each of four lanes.
        column = place // 16 * 16 + place // 2 % 4 * 4 + place % 2 * 2 + place // 8 % 2 if MOVED else place
        v = to_float32(tl.load(x + column, column < k, 0))
        zero = 0.0
        if GIVEN:
            scale = scale_value(tl.load(given), 1.0, SPEC)
            if SPEC.zero:
                zero = tl.load(zeros).to(tl.int32)
                if SPEC.signed_zero:
                    zero = (zero << 24) >> 24
                zero = zero.to(tl.float32)
        else:
            most = ordered(v) if SPEC.zero else magnitude(v)
            least = most
            for start in range(COLUMNS, k, COLUMNS):
                more = to_float32(tl.load(x + start + column, start + column < k, 0))
                most = tl.maximum(most, ordered(more) if SPEC.zero else magnitude(more))
                if SPEC.zero:
                    least = tl.minimum(least, ordered(more))
            if SPEC.zero:
                low, high = from_ordered(tl.min(least)), from_ordered(tl.max(most))
                _, scale, zero = scale_of_range(low, high, SPEC)
            else:
                _, scale = scale_of_amax(tl.max(most).to(tl.float32, bitcast=True), 1.0, SPEC, "")
            tl.store(scales + row, scale)
        number = _nearest(tl.div_rn(v, scale), zero, SPEC)
        tl.store(out + place, from_float32(number, tl.int16, SPEC), place < k)
        for start in range(COLUMNS, k, COLUMNS):
            v = to_float32(tl.load(x + start + column, start + column < k, 0))
            number = _nearest(tl.div_rn(v, scale), zero, SPEC)
            tl.store(out + start + place, from_float32(number, tl.int16, SPEC), start + place < k)
    else:
        start = tl.program_id(1) * COLUMNS
        block = start // GROUP + tl.arange(0, COLUMNS // GROUP)[:, None]
        column = block * GROUP + tl.arange(0, GROUP)[None, :]
        v = to_float32(tl.load(x + column, column < k, 0))
        zero, by = 0.0, 1.0
        if SPEC.tensor:
            by = tl.load(whole)
        if SPEC.zero:
            low, high = from_ordered(tl.min(ordered(v), 1)), from_ordered(tl.max(ordered(v), 1))
            _, scale, zero = scale_of_range(low[:, None], high[:, None], SPEC)
        else:
            amax = tl.max(magnitude(v), 1)[:, None].to(tl.float32, bitcast=True)
            stored, scale = scale_of_amax(amax, by, SPEC, "matrix")
        number = _nearest(tl.div_rn(v, scale), zero, SPEC)
        if SPAN:
            groups = tl.cdiv(k, GROUP)
            tl.store(scales + row * groups + block, scale, block < groups)
        elif SPEC.tensor:
            # The tensor scale is for sums.
            ELEMENT: tl.constexpr = SPEC.scale
            number *= decode(stored, ELEMENT)
        else:
            number *= scale
        tl.store(out + column, from_float32(number, tl.int16, SPEC), column < k)


@triton.jit
def _nearest(x, zero, SPEC: tl.constexpr):
    """The code nearest to `x`, less its zero point, in float32; of a NaN, code 0 where an element has none."""
    ELEMENT: tl.constexpr = SPEC.element
    if ELEMENT.kind == "int":
        # Around 1.5 * 2^23 float32 has integers alone.
        near = (tl.minimum(tl.maximum(x, -65536.0), 65536.0) + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(near + zero, ELEMENT.min), ELEMENT.max)
        number = tl.where(x == x, code, 0.0) - zero
    else:
        if not ELEMENT.has_nan:
            x = tl.where(x == x, x, 0.0)
        number = decode(encode_float(x, x, ELEMENT, False), ELEMENT)
    return number
