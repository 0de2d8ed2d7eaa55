"""Products of 8-bit codes of inputs and weights: what runs for how many tokens, lowbit's kernel or torch's library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lowbit.activation import Activation
from lowbit.backends import Call, Description
from lowbit.format import WHOLE, Format
from lowbit.tensor import QuantizedTensor
from lowbit_kernels_cuda.byte_dots import byte_dots
from lowbit_kernels_cuda.inputs import Producer, overlaps, quantized
from lowbit_kernels_cuda.library import FEW, Side, by_library, in_float, in_library, of_matrices
from lowbit_kernels_cuda.linear import counters
from lowbit_kernels_cuda.programs import blocks_of_tokens
from lowbit_kernels_cuda.scaling import raw, spec
from lowbit_kernels_cuda.weights import repeated

# More tokens than there can be.
_MOST = 2**31


@dataclass(frozen=True, slots=True)
class _Plan:
    """What programs of `byte_dots` do: rows of the weight, tokens, columns at a time, and as the kernel has them."""

    rows: int
    tokens: int
    columns: int
    stages: int
    warps: int
    splits: int = 1
    swap: bool = False
    tiled: bool = False


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """The weight's inner tensors, scales and zero points as `_side` has them, and sums if inputs have zero points."""
    side = in_float(_side(weight.qdata, weight.scale, weight.zero, weight.format))
    rest = (weight.act_scale, weight.act_zero, weight.pre_scale)
    packed = [side.codes, side.scale, *(part for part in (side.zero, *rest) if part is not None)]
    if weight.activation is not None and weight.activation.format.zero is not None:
        packed.append(_sums(side.codes))
    return tuple(packed)


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    fmt, shape = Format.parse(description.layout.format), description.canonical_shape
    found = dict(zip(description.names, packed, strict=False))
    natural = fmt.scale_shape(shape)
    found["qdata"] = found["qdata"].view(shape)
    for name, storage in (("scale", fmt.scale.storage), ("zero", fmt.zero and fmt.zero.code_dtype)):
        if name in found:
            # Of experts, or rows, that share one, the first has it.
            *lead, rows = (*(1,) * (3 - len(shape)), *shape[:-1])
            each = found[name].view(*lead, -1, natural[-1]) if name == "scale" else found[name].view(*lead, rows, 1)
            found[name] = each[: natural[0] if len(shape) == 3 else 1, : natural[-2]].reshape(natural).to(storage)
    return found


def _side(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format) -> Side:
    """A weight (N, K), or (E, N, K), with a scale for every row or block of rows, and a zero point for every row."""
    *experts, n, _ = codes.shape
    *over, rows, _ = fmt.block_for(codes.dim())
    scale = repeated(scale, over, experts)
    if zero is not None:
        zero = repeated(zero, (*over, rows), (*experts, n)).reshape(-1).contiguous()
    return Side(codes.flatten(0, -2).contiguous(), scale.flatten(0, -2), zero)


def _sums(codes: Tensor) -> Tensor:
    return codes.sum(-1, dtype=torch.int32)


def product(
    x: Tensor,
    packed: Sequence[Tensor],
    names: Sequence[str],
    fmt: str,
    activation: str,
    shape: Sequence[int],
    bias: Tensor | None,
    offs: Tensor | None,
    values: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` of x, rounded as the activation says, and what `pack` made of a weight of `shape`.

    The tokens of each expert end at `offs` where the weight is (E, N, K).

    Raises:
        FormatError: the activation needs a stored scale, and there is none.
    """
    del values
    n, k = shape[-2:]
    named = dict(zip(names, packed, strict=False))
    how, weight = Activation.parse(activation), Format.parse(fmt)
    if "pre_scale" in named:
        x = x * named["pre_scale"].to(x.dtype)
    tokens = x.reshape(-1, k)
    if not len(tokens):
        return x.new_empty(*x.shape[:-1], n)
    # Before inputs are rounded: products read it while they wait for those.
    ends = None if offs is None else offs.to(torch.int32).contiguous()
    left = Side(*quantized(tokens, how, named.get("act_scale"), named.get("act_zero")))
    found = _multiply(left, _weight(packed, names), how.format, weight, bias, x.dtype, ends)
    return found.view(*x.shape[:-1], n)


def _weight(packed: Sequence[Tensor], names: Sequence[str]) -> Side:
    named = dict(zip(names, packed, strict=False))
    sums = packed[len(names)] if len(packed) > len(names) else None
    return Side(named["qdata"], named["scale"], named.get("zero"), sums)


def rounded_once(
    x: Tensor,
    spec_: str,
    activation: str,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    producer: Producer,
    *,
    expands: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes, scales and zero points of x (M, K) rounded for several weights."""
    del spec_, expands
    how = Activation.parse(activation)
    return quantized(x, how, act_scale, act_zero, producer if producer.kind else None)


def several(
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    packed: Sequence[Sequence[Tensor]],
    names: Sequence[str],
    spec_: str,
    activation: str,
    rows: Sequence[int],
    k: int,
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    expands: bool,
) -> list[Tensor]:
    """`product` of what `rounded_once` gave and each of several weights."""
    del rows, k, expands
    how, fmt = Activation.parse(activation), Format.parse(spec_)
    if how.scaling == "static":
        named = dict(zip(names, packed[0], strict=False))
        scale, zero = how.stored(named.get("act_scale")).float().view(1, 1), named.get("act_zero")
        zero = None if zero is None else zero.view(1, 1)
    assert scale is not None
    left = Side(values, scale, zero)
    return [
        _multiply(left, _weight(each, names), how.format, fmt, bias, dtype, None)
        for each, bias in zip(packed, biases, strict=True)
    ]


def scaled_mm(
    a_qdata: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_qdata: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    b_tensor_scale: Tensor | None,
    bias: Tensor | None,
    a_format: str,
    b_format: str,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The operator `scaled_mm`."""
    del a_tensor_scale, b_tensor_scale, k
    of_a, of_b = Format.parse(a_format), Format.parse(b_format)
    if not len(a_qdata):
        return a_qdata.new_empty(0, len(b_qdata), dtype=dtype)
    left = Side(a_qdata.contiguous(), a_scale, a_zero)
    if of_a.element != of_b.element:
        return of_matrices(left, Side(b_qdata.contiguous(), b_scale), bias, dtype)
    right = _side(b_qdata, b_scale, b_zero, of_b)
    right = replace(right, sums=None if a_zero is None else _sums(right.codes))
    return _multiply(left, right, of_a, of_b, bias, dtype, None)


def scaled_grouped_mm(
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
    """The operator `scaled_grouped_mm`."""
    del a_tensor_scale, b_tensor_scale, k
    if not len(a_qdata):
        return a_qdata.new_empty(0, b_qdata.shape[1], dtype=dtype)
    left = Side(a_qdata.contiguous(), a_scale, a_zero)
    right = _side(b_qdata, b_scale, b_zero, Format.parse(b_format))
    right = replace(right, sums=None if a_zero is None else _sums(right.codes))
    return _multiply(left, right, Format.parse(a_format), Format.parse(b_format), None, dtype, offs.contiguous())


def _multiply(
    left: Side,
    right: Side,
    inputs: Format,
    weight: Format,
    bias: Tensor | None,
    dtype: torch.dtype,
    offs: Tensor | None,
) -> Tensor:
    """`left @ right.T + bias` (M, N), of inputs and a weight with these formats."""
    experts = 0 if offs is None else len(offs)
    (m, k), n = left.codes.shape, len(right.codes) // (experts or 1)
    group, integer = inputs.block_for(2)[-1], weight.element.kind == "int"
    shared = inputs.block_for(2)[0] == WHOLE
    rows = weight.block_for(2 if offs is None else 3)[-2]
    if not integer:
        library = in_library(m, n, k, bias, dtype, left.codes.device, experts, group, rows)
        most = _in_blocks(n, group, rows, left.codes.device, library=library)
        if FEW < m <= most and not experts and _aligned(n, dtype):
            blocks = import_module("lowbit_kernels_cuda.hopper_blocks")
            return (blocks.of_blocks if group else blocks.of_rows)(in_float(left), in_float(right), bias, dtype)
        if library:
            if shared and rows == WHOLE:
                return of_matrices(left, right, bias, dtype)
            return by_library(left, right, bias, dtype, group, rows)
    left, right = in_float(left), in_float(right)
    sums = None
    if right.zero is not None:
        sums = _sums(left.codes)
        if left.zero is not None:
            sums -= k * left.zero.to(torch.int32).view(-1)
    if not group and _in_rows(m, n, experts, left.codes.device) and _aligned(n, dtype):
        of_rows = import_module("lowbit_kernels_cuda.hopper_rows").of_rows
        return of_rows(replace(left, sums=sums), right, bias, dtype, offs, rows or n, shared=shared)
    out = left.scale.new_empty(m, n, dtype=dtype)
    plan = _plan(m, n, k, experts, out.device, integer=integer)
    blocks = triton.cdiv(n, plan.rows) * blocks_of_tokens(m, plan.tokens, experts)
    partial = count = None
    if plan.splits > 1:
        partial = out.new_empty(plan.splits, m, n, dtype=torch.int32 if integer else torch.float32)
        count = counters(blocks, out.device)
    codes: list[Any] = [each.codes if integer else raw(each.codes) for each in (left, right)]
    if plan.tiled:
        sizes = zip((left, right), (plan.tokens, plan.rows), strict=True)
        codes = [TensorDescriptor.from_tensor(each.codes, [size, plan.columns]) for each, size in sizes]
    soon = overlaps(out.device)
    kernel: Any = byte_dots
    kernel[blocks, plan.splits](
        *(codes[0], left.scale, left.zero, sums, codes[1], right.scale, right.zero, right.sums),
        *(None if bias is None else raw(bias), raw(out), partial, count, offs, m, n, k, rows or n),
        SPEC=spec(inputs, device=out.device if out.is_cuda else None),
        SHARED=shared,
        GROUP=group,
        INTEGER=integer,
        EXPERTS=experts,
        EVEN=k % plan.columns == 0,
        ROWS=plan.rows,
        TOKENS=plan.tokens,
        COLUMNS=plan.columns,
        SPLITS=plan.splits,
        SWAP=plan.swap,
        STAGES=plan.stages,
        BAND=8,
        TILED=plan.tiled,
        # Beyond a few tokens products, not reading, take the time, and leaving tensor cores a good part of that.
        IMPRECISE=128 if plan.swap and not integer and not group else None,
        OVERLAPS=soon,
        num_warps=plan.warps,
        **({"launch_pdl": True} if soon else {}),
    )
    return out


def _plan(m: int, n: int, k: int, experts: int, device: torch.device, *, integer: bool) -> _Plan:
    """The plan for m tokens, of as many experts; what was fastest on an H100, see docs/performance.md."""
    multiprocessors, hopper = _device(device)
    # As many tokens as an expert that has some is likely to have.
    each = triton.cdiv(m, min(m, experts)) if experts else m
    if each <= 64:
        tokens = max(16, triton.next_power_of_2(each))
        plan = _Plan(64, tokens, 128, stages=6, warps=4, swap=True, tiled=hopper)
        if k >= 512 and integer:
            plan = _Plan(64, tokens, 256, stages=4, warps=4, swap=True)
    elif not hopper:
        plan = _Plan(128, 128, 128, stages=3, warps=4)
    elif each <= 256 or n * m <= 128 * 256 * multiprocessors:
        plan = _Plan(128, 128, 128, stages=4, warps=4, tiled=True)
    else:
        plan = _Plan(128, 256, 128, stages=4, warps=8, tiled=True)
    programs, splits = triton.cdiv(n, plan.rows) * triton.cdiv(m, plan.tokens), 1
    while splits < 8 and not experts and 2 * programs * splits <= multiprocessors and k >= 4 * splits * plan.columns:
        splits *= 2
    return replace(plan, splits=splits)


def _aligned(n: int, dtype: torch.dtype) -> bool:
    """Whether kernels that write by the tensor memory accelerator take n rows of a weight."""
    return dtype.itemsize == 2 and n % 8 == 0


def _on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _in_rows(m: int, n: int, experts: int, device: torch.device) -> bool:
    """Whether the kernel for scales of rows on Hopper, of 128 tokens by 256 rows a program, is the fastest of ours."""
    if experts:
        return _on_hopper(device) and m > 64 * min(m, experts)
    return _on_hopper(device) and m > 64 and 2 * triton.cdiv(m, 128) * triton.cdiv(n, 256) > _device(device)[0]


def _in_blocks(n: int, group: int, rows: int, device: torch.device, *, library: bool) -> int:
    """Up to how many tokens of e4m3 `hopper_blocks` is used: beside another kernel, of one round of programs or so."""
    if not _on_hopper(device) or group not in {0, 128} or (group and rows != 128):
        return 0
    multiprocessors, _ = _device(device)
    most = 128 * (multiprocessors // triton.cdiv(n, 64))
    if not group:
        return max(most, 64)
    return max(most, 128 * min(multiprocessors // triton.cdiv(n, 128), 1)) if library else _MOST


def how(call: Call) -> str | None:
    """Which of torch's `scaled_mm` and lowbit's kernel runs for how many tokens, in words; None: always lowbit's."""
    assert call.format is not None
    assert call.activation is not None
    assert call.n is not None
    assert call.k is not None
    group, rows, device = call.activation.format.block_for(2)[-1], call.format.block_for(2)[-2], torch.device("cuda")
    experts = int(call.op == "grouped_mm")
    if call.format.element.kind == "int" or not in_library(
        FEW + 1, call.n, call.k, None, call.x_dtype, device, experts, group, rows
    ):
        return None
    few = max(FEW, _in_blocks(call.n, group, rows, device, library=True))
    return f"beyond {few} tokens torch's scaled_mm, which is faster there; up to them lowbit's own kernels"


@cache
def _device(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether blocks come by the tensor memory accelerator."""
    if device.type != "cuda":
        return 132, False
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.major >= 9
