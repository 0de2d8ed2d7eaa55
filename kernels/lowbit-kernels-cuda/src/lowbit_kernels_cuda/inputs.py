"""Inputs of products rounded to a low precision, as the numbers that tensor cores multiply with a packed weight.

These are bfloat16s, each a code less its zero point, exactly. Scales of blocks are multiplied in where it is one still;
others are left to sums of products. Or they are codes, for tensor cores that multiply 8-bit floats or integers. What
makes them (a norm, a gated activation) may happen in the same pass.
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
from lowbit_kernels_cuda.casts import quantize
from lowbit_kernels_cuda.codes import decode, encode_float, from_float32, to_float32
from lowbit_kernels_cuda.library import FEW
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
from lowbit_kernels_cuda.tiles import begin


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
    # (M, 1), of codes.
    zero: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Producer:
    """What tokens x (M, K) become before they are rounded, each step in their own precision, as PyTorch has it.

    "silu": `silu(x) * more`. "norm": `weight * (x / sqrt(mean(x ** 2) + eps))`, x being the `total` of x and `more`, if
    there is more.
    """

    kind: str
    more: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0
    total: Tensor | None = None


# The longest rows that are made and rounded in one pass.
LONGEST = 32768


def rounded(
    x: Tensor,
    activation: Activation,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    *,
    moved: bool = False,
    out: Tensor | None = None,
    codes: bool = False,
    producer: Producer | None = None,
) -> Inputs:
    """Tokens (M, K), rounded as `activation` says: `scale * values` are what `lowbit.quantize` gives.

    Columns are `moved` where weights are packed as `weights.side_by_side` has them. Values, or `codes`, are put into
    `out` if that is given; a scale is kept for every group of codes.

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
        whole = quantize(x, None, None, None, str(fmt), activation.mode, "nearest", 0)[-1].reshape(1)
    elif fmt.block[0] != 1:
        _, given, *rest = quantize(x, None, None, None, str(fmt), activation.mode, "nearest", 0)
        zero = rest[0] if rest else None
    if out is None:
        out = x.new_empty(m, k, dtype=fmt.element.storage if codes else torch.bfloat16)
    span, scale, zeros = 0, None, None
    if given is not None:
        scale = given.reshape(1).float()
    elif not group:
        scale = x.new_empty(m, dtype=torch.float32)
    elif folds(fmt) and not codes:
        scale = whole
    else:
        span, scale = group, x.new_empty(m, triton.cdiv(k, group), dtype=torch.float32)
    if codes and fmt.zero is not None:
        zeros = x.new_empty(m if given is None else 1, 1, dtype=fmt.zero.code_dtype)
    made = producer or Producer("")
    whole_rows = not group or made.kind == "norm"
    length = max(group, 1024)
    if whole_rows:
        length = min(max(triton.next_power_of_2(k), group), LONGEST if made.kind else 16384)
    soon = overlaps(x.device)
    kernel: Any = round_inputs
    kernel[m, 1 if whole_rows else triton.cdiv(k, length)](
        *(raw(x), None if given is None else raw(given.reshape(1)), None if zero is None else raw(zero.reshape(1))),
        *(whole, raw(out), scale, zeros, k),
        *(None if part is None else raw(part) for part in (made.more, made.weight, made.total)),
        made.eps,
        SPEC=spec(fmt, activation.mode, device=x.device if x.is_cuda else None),
        GROUP=group,
        GIVEN=given is not None,
        SPAN=span,
        COLUMNS=length,
        MOVED=moved,
        CODES=codes,
        PRODUCER=made.kind,
        OVERLAPS=soon,
        num_warps=min(max(length // 512, 1), 16) if whole_rows else 4,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if soon else {}),
    )
    return Inputs(out, scale, span, exact=True, zero=zeros)


def quantized(
    x: Tensor,
    activation: Activation,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    producer: Producer | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of tokens (M, K), their float32 scales and their zero points, by an activation without tensor scales.

    Raises:
        FormatError: a stored scale is needed, and there is none.
    """
    if producer is not None:
        found = rounded(x, activation, act_scale, act_zero, codes=True, producer=producer)
        assert found.scale is not None
        return found.values, found.scale if found.span else found.scale.view(-1, 1), found.zero
    scale = zero = None
    if activation.scaling == "static":
        scale = activation.stored(act_scale).to(activation.format.scale.storage).reshape(1, 1)
        zero = None if act_zero is None else act_zero.reshape(1, 1)
    given = x, scale, zero, None, str(activation.format), activation.mode, "nearest", 0
    codes, scale, *rest = quantize(*given, soon=len(x) > FEW)
    return codes, scale.float(), rest[0] if rest else None


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a GPU starts a kernel while the one before ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; a few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def round_inputs(
    x,
    given,
    zeros,
    whole,
    out,
    scales,
    zeros_out,
    k,
    more,
    weight,
    total,
    eps,
    SPEC: tl.constexpr,
    GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOVED: tl.constexpr,
    CODES: tl.constexpr,
    PRODUCER: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """`out` of a row of `x` (M, K), COLUMNS at a time, which are MOVED or not; with GROUP, of COLUMNS of it.

    Scales, which are chosen unless GIVEN, are written to `scales` where sums are to meet them. With a PRODUCER, COLUMNS
    are a whole row of what it reads, or as many as it needs.
    """
    row = tl.program_id(0)
    x += row.to(tl.int64) * k
    out += row.to(tl.int64) * k
    if more is not None:
        more += row.to(tl.int64) * k
    if total is not None:
        total += row.to(tl.int64) * k
    # First, for a product reads `offs` before it waits.
    begin(OVERLAPS, False)
    if GROUP == 0:
        place = tl.arange(0, COLUMNS)
        # Of 16, four for each of four lanes.
        column = place // 16 * 16 + place // 2 % 4 * 4 + place % 2 * 2 + place // 8 % 2 if MOVED else place
        v = _made(x, more, weight, total, eps, column, k, PRODUCER, SPEC)
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
                following = to_float32(tl.load(x + start + column, start + column < k, 0))
                most = tl.maximum(most, ordered(following) if SPEC.zero else magnitude(following))
                if SPEC.zero:
                    least = tl.minimum(least, ordered(following))
            if SPEC.zero:
                low, high = from_ordered(tl.min(least)), from_ordered(tl.max(most))
                _, scale, zero = scale_of_range(low, high, SPEC)
            else:
                _, scale = scale_of_amax(tl.max(most).to(tl.float32, bitcast=True), 1.0, SPEC, "")
            tl.store(scales + row, scale)
        if zeros_out is not None:
            at = row if not GIVEN else 0
            tl.store(zeros_out + at, zero.to(tl.int32).to(zeros_out.dtype.element_ty))
        tl.store(out + place, _nearest(tl.div_rn(v, scale), zero, out, CODES, SPEC), place < k)
        for start in range(COLUMNS, k, COLUMNS):
            v = to_float32(tl.load(x + start + column, start + column < k, 0))
            number = _nearest(tl.div_rn(v, scale), zero, out, CODES, SPEC)
            tl.store(out + start + place, number, start + place < k)
    else:
        start = tl.program_id(1) * COLUMNS
        block = start // GROUP + tl.arange(0, COLUMNS // GROUP)[:, None]
        column = block * GROUP + tl.arange(0, GROUP)[None, :]
        v = _made(x, more, weight, total, eps, column, k, PRODUCER, SPEC)
        zero, by = 0.0, 1.0
        if SPEC.tensor:
            by = tl.load(whole)
        if SPEC.zero:
            low, high = from_ordered(tl.min(ordered(v), 1)), from_ordered(tl.max(ordered(v), 1))
            _, scale, zero = scale_of_range(low[:, None], high[:, None], SPEC)
        else:
            amax = tl.max(magnitude(v), 1)[:, None].to(tl.float32, bitcast=True)
            stored, scale = scale_of_amax(amax, by, SPEC, "matrix")
        x = tl.div_rn(v, scale)
        if SPAN:
            groups = tl.cdiv(k, GROUP)
            tl.store(scales + row * groups + block, scale, block < groups)
            scale = 1.0
        elif SPEC.tensor:
            # The tensor scale is for sums.
            ELEMENT: tl.constexpr = SPEC.scale
            scale = decode(stored, ELEMENT)
        if CODES:
            tl.store(out + column, _nearest(x, zero, out, True, SPEC), column < k)
        else:
            tl.store(out + column, from_float32(_number(x, zero, SPEC) * scale, tl.int16, SPEC), column < k)


@triton.jit
def _made(x, more, weight, total, eps, column, k, PRODUCER: tl.constexpr, SPEC: tl.constexpr):
    """Float32 of columns of a row as a `Producer` makes them."""
    LIKE: tl.constexpr = x.dtype.element_ty
    inside = column < k
    v = to_float32(tl.load(x + column, inside, 0))
    if PRODUCER == "silu":
        v = _as(tl.div_rn(v, 1.0 + tl.exp(-v)), LIKE, SPEC)
        v = _as(v * to_float32(tl.load(more + column, inside, 0)), LIKE, SPEC)
    if PRODUCER == "norm":
        if more is not None:
            v = _as(v + to_float32(tl.load(more + column, inside, 0)), LIKE, SPEC)
            tl.store(total + column, from_float32(v, LIKE, SPEC), inside)
        v = _as(v * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v) / k + eps)), LIKE, SPEC)
        v = _as(v * to_float32(tl.load(weight + column, inside, 0)), LIKE, SPEC)
    return v


@triton.jit
def _as(x, LIKE: tl.constexpr, SPEC: tl.constexpr):
    """Float32 `x` rounded to what a pointer of type LIKE, to a `raw` tensor, takes."""
    return to_float32(from_float32(x, LIKE, SPEC))


@triton.jit
def _nearest(x, zero, out, CODES: tl.constexpr, SPEC: tl.constexpr):
    """What `out` takes: CODES nearest to `x`, or their numbers."""
    if CODES:
        value = _code(x, zero, SPEC).to(out.dtype.element_ty)
    else:
        value = from_float32(_number(x, zero, SPEC), tl.int16, SPEC)
    return value


@triton.jit
def _number(x, zero, SPEC: tl.constexpr):
    """The code nearest to `x`, less its zero point, in float32."""
    ELEMENT: tl.constexpr = SPEC.element
    code = _code(x, zero, SPEC)
    if ELEMENT.kind == "int":
        number = code.to(tl.float32) - zero
    else:
        number = decode(code, ELEMENT)
    return number


@triton.jit
def _code(x, zero, SPEC: tl.constexpr):
    """Int32 of the code nearest to `x`; of a NaN, code 0 where an element has none."""
    ELEMENT: tl.constexpr = SPEC.element
    if ELEMENT.kind == "int":
        # Around 1.5 * 2^23 float32 has integers alone.
        near = (tl.minimum(tl.maximum(x, -65536.0), 65536.0) + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(near + zero, ELEMENT.min), ELEMENT.max)
        code = tl.where(x == x, code, 0.0).to(tl.int32)
    else:
        if not ELEMENT.has_nan:
            x = tl.where(x == x, x, 0.0)
        code = encode_float(x, x, ELEMENT, False)
    return code
