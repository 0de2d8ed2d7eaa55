"""Products of 8-bit floats by torch's `scaled_mm`: when it is the faster one, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Up to so many tokens lowbit's kernels are faster.
FEW = 32


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a product: codes, those of experts one below another, scales, and zero points if any.

    Scales are as they are stored until a kernel is chosen, see `in_float`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    # Int32 sums of rows: of a weight's codes, of an input's less their zero points.
    sums: Tensor | None = None


def in_float(side: Side) -> Side:
    """The side with float32 scales, as lowbit's kernels take them."""
    return replace(side, scale=side.scale.float().contiguous())


def in_library(
    m: int,
    n: int,
    k: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    experts: int,
    group: int,
    rows: int,
) -> bool:
    """Whether torch's `scaled_mm` takes a product of 8-bit floats and is faster."""
    plain = device.type == "cuda" and not experts and dtype == torch.bfloat16 and n % 16 == 0
    if m <= FEW or not plain or (bias is not None and bias.dtype != dtype):
        return False
    blocks = (rows == 1 or (rows == 128 and n % 128 == 0)) and k % 128 == 0
    return not group or (blocks and torch.cuda.get_device_capability(device) == (9, 0))


def by_library(left: Side, right: Side, bias: Tensor | None, dtype: torch.dtype, group: int, rows: int) -> Tensor:
    """The product by torch's `scaled_mm`, where that is what `in_library` says."""
    kinds = torch.nn.functional.ScalingType
    m, n = len(left.codes), len(right.codes)
    codes = left.codes
    if group:
        # The library has tokens side by side, by the four, and the blocks of a weight's rows, too.
        if m % 4:
            codes = torch.nn.functional.pad(codes.view(torch.uint8), (0, 0, 0, -m % 4)).view(codes.dtype)
        of_tokens = _turned(left.scale, m + -m % 4).T
        if rows == 1:
            of_rows, recipes = _turned(right.scale, n), (kinds.BlockWise1x128, kinds.BlockWise1x128)
        else:
            of_rows, recipes = right.scale.float(), (kinds.BlockWise1x128, kinds.BlockWise128x128)
            if of_rows.shape[1] % 4:
                of_rows = torch.nn.functional.pad(of_rows, (0, -of_rows.shape[1] % 4))
    else:
        of_tokens, of_rows = (in_float(side).scale for side in (left, right))
        of_tokens, recipes = of_tokens.expand(m, 1).contiguous(), (kinds.RowWise, kinds.RowWise)
        of_rows = of_rows if rows == 1 else of_rows.expand(n, 1).contiguous()
    found = torch.nn.functional.scaled_mm(
        *(codes, right.codes.T, of_tokens, recipes[0], of_rows.T, recipes[1]),
        bias=bias,
        output_dtype=dtype,
        use_fast_accum=not group,
    )
    return found if len(found) == m else found[:m].clone()


def _turned(scale: Tensor, count: int) -> Tensor:
    """Scales (R, G) as (G, `count`) in float32, by one kernel; zeros beyond R."""
    rows, groups = scale.shape
    new = scale.new_empty if rows == count else scale.new_zeros
    found = new(groups, count, dtype=torch.float32)
    found[:, :rows].copy_(scale.T)
    return found


def of_matrices(left: Side, right: Side, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of two matrices with one scale each by torch's `scaled_mm`: e4m3 by e4m3, or e5m2 by e4m3."""
    kind, n = torch.nn.functional.ScalingType.TensorWise, len(right.codes)
    codes = right.codes
    if n % 16:
        codes = torch.nn.functional.pad(codes.view(torch.uint8), (0, 0, 0, -n % 16)).view(codes.dtype)
    of_left, of_right = (side.scale.reshape(-1)[:1].float() for side in (left, right))
    later = bias is not None and (n % 16 != 0 or bias.dtype != dtype)
    found = torch.nn.functional.scaled_mm(
        *(left.codes, codes.T, of_left, kind, of_right, kind),
        bias=None if later else bias,
        output_dtype=dtype,
        use_fast_accum=left.codes.dtype == right.codes.dtype,
    )
    found = found if n % 16 == 0 else found[:, :n].contiguous()
    return found + bias if bias is not None and later else found


def scaled_grouped_mm_k(
    a_qdata: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_qdata: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    b_tensor_scale: Tensor | None,
    offs: Tensor,
    a_format: str,
    b_format: str,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The operator `scaled_grouped_mm_k`."""
    del a_zero, a_tensor_scale, b_zero, b_tensor_scale, a_format, b_format, k
    kind, experts = torch.nn.functional.ScalingType.RowWise, len(offs)
    # Rows begin at multiples of 16 bytes.
    a_qdata, b_qdata = (
        torch.nn.functional.pad(side.view(torch.uint8), (0, -side.shape[1] % 16)).view(side.dtype)
        if side.shape[1] % 16
        else side.contiguous()
        for side in (a_qdata, b_qdata)
    )
    # The library has a scale for each row of every group.
    of_a, of_b = (
        scale.float().expand(len(codes), 1).reshape(1, -1).expand(experts, -1).reshape(-1)
        for codes, scale in ((a_qdata, a_scale), (b_qdata, b_scale))
    )
    multiply: Any = torch.nn.functional.scaled_grouped_mm  # pyright: ignore[reportAttributeAccessIssue] - not in stubs
    return multiply(
        *(a_qdata, b_qdata.T, of_a, kind, of_b, kind),
        offs=offs,
        output_dtype=dtype,
        use_fast_accum=True,
    )
