"""The reference backend: every op in plain PyTorch, on any device, and the oracle that other backends are held to.

Weight-only ops multiply dequantized weights in the input's dtype. With a quantized input, integer codes under scales
that do not vary along K multiply exactly in integers and are scaled once; every other pair multiplies in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.attending import attend
from lowbit.backends import Call, Description, Kernel
from lowbit.bags import check_bags, check_rows, pool
from lowbit.blocked import to_blocked
from lowbit.caching import attend_cache, write_cache
from lowbit.element import Element
from lowbit.errors import FormatError
from lowbit.experts import by_expert, grouped_product
from lowbit.format import WHOLE, Format
from lowbit.groups import check_groups, one_format, padded_ends, padded_from, padded_rows, padded_to, pick_rows
from lowbit.hadamard import Rotation
from lowbit.numerics import Scales, choose_scale, data_shape, decode, encode, total_scale
from lowbit.packing import unpack
from lowbit.philox import offset_seed
from lowbit.varlen_attending import attend_varlen

if TYPE_CHECKING:
    from lowbit.tensor import QuantizedTensor

# Integers up to here are exact in float32.
_EXACT = 2**24


class Matrix:
    """A quantized matrix (rows, K): packed codes, scales, format, and its row sums once they are known."""

    def __init__(self, qdata: Tensor, scales: Scales, fmt: Format, k: int, row_sum: Tensor | None = None) -> None:
        """Wrap canonical parts; `row_sum` (rows, 1) int64, if it was computed before.

        Raises:
            FormatError: the data does not hold k codes a row.
        """
        if tuple(qdata.shape) != data_shape((*qdata.shape[:-1], k), fmt):
            msg = f"data of shape {tuple(qdata.shape)} does not hold rows of {k} values in {fmt}"
            raise FormatError(msg)
        self.qdata, self.scales, self.format, self.k = qdata, scales, fmt, k
        self._row_sum = row_sum

    @property
    def integer(self) -> bool:
        """Whether codes are integers with one scale a row, or one in all."""
        rows, groups = self.scales.scale.shape
        return self.format.element.kind == "int" and groups == 1 and rows in (1, self.qdata.shape[0])

    def codes(self) -> Tensor:
        """Unpacked integer codes (rows, K)."""
        return unpack(self.qdata, self.format.element, self.k)

    def row_sum(self) -> Tensor:
        """Int64 (rows, 1) sums of codes."""
        if self._row_sum is None:
            self._row_sum = self.codes().sum(-1, keepdim=True, dtype=torch.int64)
        return self._row_sum

    def values(self) -> Tensor:
        """Float32 values (rows, K)."""
        return decode(self.qdata, self.format, self.scales, self.k)


def multiply(a: Matrix, b: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`a @ b.T + bias` (M, N), rounded once to `dtype`."""
    if not (a.integer and b.integer):
        product = a.values() @ b.values().T
        return (product if bias is None else product + bias.to(torch.float32)).to(dtype)
    # Float64 holds every integer here exactly, and their product with two float32 scales closely enough that the last
    # rounding is the only one that shows.
    acc = _integer_product(a, b)
    za, zb = a.scales.zero, b.scales.zero
    if za is not None:
        za = za.to(torch.float64)
        acc -= za * b.row_sum().T
    if zb is not None:
        zb = zb.to(torch.float64).T
        acc -= a.row_sum() * zb
    if za is not None and zb is not None:
        acc += a.k * (za * zb)
    acc.mul_(total_scale(a.scales)).mul_(total_scale(b.scales).T)
    return (acc if bias is None else acc.add_(bias)).to(dtype)


def quantize_input(x: Tensor, activation: Activation, act_scale: Tensor | None, act_zero: Tensor | None) -> Matrix:
    """Tokens (M, K) rounded as `activation` says.

    Raises:
        FormatError: static or local scaling without the stored scale it needs.
    """
    fmt = activation.format
    if activation.scaling == "dynamic":
        scales = choose_scale(x, fmt, mode=activation.mode)
    elif activation.scaling == "local":
        whole = activation.stored(act_scale).to(torch.float32).reshape(1, 1)
        scales = choose_scale(x, fmt, mode=activation.mode, tensor_scale=whole)
    else:
        zero = None if act_zero is None else act_zero.reshape(1, 1)
        scales = Scales(activation.stored(act_scale).to(fmt.scale.storage).reshape(1, 1), zero)
    return Matrix(encode(x, fmt, scales), scales, fmt, x.shape[-1])


def _integer_product(a: Matrix, b: Matrix) -> Tensor:
    """Exact `a @ b.T` of codes, in float64, by float32 products of pieces whose sums cannot round."""
    left, right = a.codes(), b.codes()
    terms = _EXACT // (_largest(a.format.element) * _largest(b.format.element))
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    for k in range(0, a.k, terms):
        total += left[:, k : k + terms].to(torch.float32) @ right[:, k : k + terms].to(torch.float32).T
    return total


def _largest(element: Element) -> int:
    return int(max(-element.min, element.max))


def _quantize(
    x: Tensor,
    scale: Any,
    zero: Any,
    tensor_scale: Any,
    fmt: str | Format,
    mode: Any,
    rounding: Any,
    seed: int,
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    parsed = _format(fmt)
    if scale is None:
        scales = choose_scale(x, parsed, mode=mode, tensor_scale=tensor_scale)
    else:
        scales = Scales(scale, zero, tensor_scale)
    parts = [encode(x, parsed, scales, rounding=rounding, seed=offset_seed(seed, seed_offset))]
    for given, part in ((scale, scales.scale), (zero, scales.zero), (tensor_scale, scales.tensor_scale)):
        if part is not None:
            # An op must not return its own input.
            parts.append(part.clone() if part is given else part)
    # Elementwise operators keep the strides of a transposed input.
    return [part.contiguous() for part in parts]


def _quantize_blocked(x: Tensor, tensor_scale: Any, fmt: str | Format, *given: Any) -> list[Tensor]:
    data, scale, *rest = _quantize(x, None, None, tensor_scale, fmt, *given)
    return [data, to_blocked(scale), *rest]


def _quantize_rotated(
    x: Tensor,
    tensor_scale: Any,
    size: int,
    sign_seed: int,
    fmt: str | Format,
    mode: Any,
    rounding: Any,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    turned = Rotation(size, sign_seed).in_order(x)
    if blocked:
        return _quantize_blocked(turned, tensor_scale, fmt, mode, rounding, seed, seed_offset)
    return _quantize(turned, None, None, tensor_scale, fmt, mode, rounding, seed, seed_offset)


def _quantize_both(
    x: Tensor,
    tensor_scale: Any,
    fmt: str | Format,
    other_format: str | Format,
    mode: Any,
    rounding: Any,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    if x.dim() < 2:
        msg = f"x of shape {tuple(x.shape)} has one direction; quantize_both needs two or more dimensions"
        raise FormatError(msg)
    parts: list[Tensor] = []
    for view, spec in ((x, fmt), (x.mT, other_format)):
        given = tensor_scale if _format(spec).tensor_scale else None
        if blocked:
            parts += _quantize_blocked(view, given, spec, mode, rounding, seed, seed_offset)
        else:
            parts += _quantize(view, None, None, given, spec, mode, rounding, seed, seed_offset)
    return parts


def _dequantize(
    qdata: Tensor, scale: Tensor, zero: Any, tensor_scale: Any, fmt: str | Format, k: int, dtype: Any
) -> Tensor:
    # Partial blocks leave the values inside a wider tensor.
    return decode(qdata, _format(fmt), Scales(scale, zero, tensor_scale), k, dtype).contiguous()


def _linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    pre_scale: Tensor | None,
    bias: Tensor | None,
    fmt: str | Format,
    activation: str | Activation,
) -> Tensor:
    weight = Matrix(qdata, Scales(scale, zero, tensor_scale), _format(fmt), x.shape[-1])
    return _apply(x, weight, act_scale, act_zero, pre_scale, bias, activation)


def _apply(
    x: Tensor,
    weight: Matrix,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    pre_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | Activation,
) -> Tensor:
    if pre_scale is not None:
        x = x * pre_scale.to(x.dtype)
    if not activation:
        values = decode(weight.qdata, weight.format, weight.scales, weight.k, x.dtype)
        return torch.nn.functional.linear(x, values, bias)
    out = (*x.shape[:-1], weight.qdata.shape[0])
    if 0 in out:
        return x.new_empty(out)
    tokens = quantize_input(x.reshape(-1, x.shape[-1]), _activation(activation), act_scale, act_zero)
    product = multiply(tokens, weight, bias, x.dtype)
    # An operator's result is new: what autograd takes for a view of something hidden draws warnings.
    return torch.ops.aten._unsafe_view(product, out)  # noqa: SLF001 - no public name


def _scaled_mm(
    a_qdata: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_qdata: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    b_tensor_scale: Tensor | None,
    bias: Tensor | None,
    a_format: str | Format,
    b_format: str | Format,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    a = Matrix(a_qdata, Scales(a_scale, a_zero, a_tensor_scale), _format(a_format), k)
    b = Matrix(b_qdata, Scales(b_scale, b_zero, b_tensor_scale), _format(b_format), k)
    return multiply(a, b, bias, dtype)


def _scaled_grouped_mm(
    a_qdata: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_qdata: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    b_tensor_scale: Tensor | None,
    offs: Tensor,
    a_format: str | Format,
    b_format: str | Format,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    a = decode(a_qdata, _format(a_format), Scales(a_scale, a_zero, a_tensor_scale), k)
    b = decode(b_qdata, _format(b_format), Scales(b_scale, b_zero, b_tensor_scale), k)
    return grouped_product(a, b, offs).to(dtype)


def _grouped_mm(
    x: Tensor,
    offs: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    pre_scale: Tensor | None,
    fmt: str | Format,
    activation: str | Activation,
) -> Tensor:
    parsed = _format(fmt)
    per_scale, *block = parsed.block_for(3)
    parsed = parsed.with_block(*block)

    def product(e: int, rows: Tensor) -> Tensor:
        at = e // per_scale if per_scale else 0
        whole = None if tensor_scale is None else tensor_scale[e if tensor_scale.shape[0] > 1 else 0]
        scales = Scales(scale[at], None if zero is None else zero[at], whole)
        expert = Matrix(qdata[e], scales, parsed, x.shape[-1])
        return _apply(rows, expert, act_scale, act_zero, pre_scale, None, activation)

    mixes_rows = bool(activation) and _activation(activation).format.block_for(2)[0] > 1
    return by_expert(x, offs, qdata.shape[1], product, mixes_rows=mixes_rows)


def _embedding(
    ids: Tensor, qdata: Tensor, scale: Tensor, zero: Any, tensor_scale: Any, fmt: str | Format, k: int, dtype: Any
) -> Tensor:
    if ids.numel() == 0:
        return scale.new_empty((*ids.shape, k), dtype=dtype)
    check_rows(ids, qdata.shape[0])
    rows = ids.reshape(-1)
    parsed = _format(fmt)
    block, group = parsed.block_for(2)
    if block > 1:
        # Each picked row has its block's scale to itself, and the last block of a row may be partial.
        scale = scale.repeat_interleave(group, 1)[:, :k]
        zero = None if zero is None else zero.repeat_interleave(group, 1)[:, :k]
        parsed = parsed.with_block(1, 1)
    parts = [_pick(part, rows if block == 1 else rows // block) if block else part for part in (scale, zero)]
    if tensor_scale is not None and tensor_scale.shape[0] > 1:
        tensor_scale = tensor_scale[rows]
    scales = Scales(parts[0], parts[1], tensor_scale)  # pyright: ignore[reportArgumentType] - scale is present
    return decode(_pick(qdata, rows), parsed, scales, k, dtype).view(*ids.shape, k)


def _embedding_bag(
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    qdata: Tensor,
    scale: Tensor,
    zero: Any,
    tensor_scale: Any,
    mode: str,
    padding: int,
    last: bool,  # noqa: FBT001 - as the operator has it
    fmt: str | Format,
    k: int,
    dtype: Any,
) -> Tensor:
    check_bags(ids, offsets)
    values = _embedding(ids, qdata, scale, zero, tensor_scale, fmt, k, torch.float32)
    return pool(values, ids, offsets, weights, mode, padding, last=last).to(dtype)


def _pick(part: Tensor | None, rows: Tensor) -> Any:
    """Rows of `part`, as bytes where fp8 tensors cannot be indexed."""
    if part is None:
        return None
    # Unlike indexing, index_select refuses negative rows, as F.embedding does.
    return (part.view(torch.uint8) if part.dtype.itemsize == 1 else part).index_select(0, rows).view(part.dtype)


def _pad_groups(x: Tensor, index: Tensor | None, offs: Tensor, align: int) -> tuple[Tensor, Tensor]:
    check_groups(x, index, offs, align)
    if index is not None:
        check_rows(index, x.shape[0])
    rows = x.shape[0] if index is None else index.shape[0]
    source = padded_from(offs, align, rows, padded_rows(rows, offs.shape[0], align))
    if index is not None and rows:
        source = torch.where(source < 0, -1, index.to(torch.int64).index_select(0, source.clamp_min(0)))
    return pick_rows(x, source), padded_ends(offs, align)


def _unpad_groups(x: Tensor, offs: Tensor, align: int, rows: int) -> Tensor:
    check_groups(x, None, offs, align)
    return pick_rows(x, padded_to(offs, align, rows, x.shape[0]))


def _quantize_groups(
    x: Tensor,
    index: Tensor | None,
    offs: Tensor,
    align: int,
    tensor_scale: Any,
    fmt: str | Format | None,
    other_format: str | Format | None,
    mode: Any,
    rounding: Any,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    padded, ends = _pad_groups(x, index, offs, align)
    if fmt is None:
        padded, fmt, other_format = padded.mT, one_format(other_format), None  # pyright: ignore[reportArgumentType] - or a Format
    if other_format is not None:
        parts = _quantize_both(padded, tensor_scale, fmt, other_format, mode, rounding, seed, blocked, seed_offset)
    elif blocked:
        parts = _quantize_blocked(padded, tensor_scale, fmt, mode, rounding, seed, seed_offset)
    else:
        parts = _quantize(padded, None, None, tensor_scale, fmt, mode, rounding, seed, seed_offset)
    return [*parts, ends]


def _format(spec: str | Format) -> Format:
    """What a spec stands for; `lowbit.decompose` hands over formats that no spec names."""
    return spec if isinstance(spec, Format) else Format.parse(spec)


def _activation(spec: str | Activation) -> Activation:
    return spec if isinstance(spec, Activation) else Activation.parse(spec)


def _refuses_nothing(call: Call) -> str | None:
    """The reference takes every call."""
    del call


def _refuses_unless_row_sums_help(call: Call) -> str | None:
    """Packing pays only where the input's zero point needs the weight's row sums."""
    if call.activation is None or call.activation.format.zero is None:
        return "needs asymmetric integer activations; there are no row sums to keep otherwise"
    if call.format is None or call.format.element.kind != "int" or call.format.block[-1] != WHOLE:
        return f"needs integer weights with scales by row or tensor, not {call.format}"
    return None


def _pack_row_sums(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    matrix = Matrix(weight.qdata, weight.scales, weight.format, weight.canonical_shape[-1])
    return *weight.inner_tensors().values(), matrix.row_sum()


def _unpack_row_sums(parts: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    return dict(zip(description.names, parts[:-1], strict=True))


def _run_row_sums(x: Tensor, parts: tuple[Tensor, ...], description: Description, bias: Tensor | None) -> Tensor:
    inner, layout = _unpack_row_sums(parts, description), description.layout
    scales = Scales(inner["scale"], inner.get("zero"), inner.get("tensor_scale"))
    matrix = Matrix(inner["qdata"], scales, Format.parse(layout.format), x.shape[-1], parts[-1])
    use = (inner.get("act_scale"), inner.get("act_zero"), inner.get("pre_scale"))
    return _apply(x, matrix, *use, bias, layout.activation or "")


class Reference:
    """The backend object of the entry point `reference`."""

    name = "reference"

    def probe(self) -> str | None:
        """Plain PyTorch runs everywhere."""

    def kernels(self) -> tuple[Kernel, ...]:
        """A kernel an op, and one that keeps row sums for asymmetric integer activations."""
        runs = {
            "quantize": _quantize,
            "dequantize": _dequantize,
            "linear": _linear,
            "scaled_mm": _scaled_mm,
            "scaled_grouped_mm": _scaled_grouped_mm,
            "scaled_grouped_mm_k": _scaled_grouped_mm,
            "grouped_mm": _grouped_mm,
            "attention": attend,
            "varlen_attention": attend_varlen,
            "cache_write": write_cache,
            "cached_attention": attend_cache,
            "embedding": _embedding,
            "embedding_bag": _embedding_bag,
            "quantize_blocked": _quantize_blocked,
            "quantize_groups": _quantize_groups,
            "quantize_rotated": _quantize_rotated,
            "quantize_both": _quantize_both,
            "pad_groups": _pad_groups,
            "unpad_groups": _unpad_groups,
        }
        return (
            *(Kernel(f"reference.{op}", op, "any", 0, run, _refuses_nothing) for op, run in runs.items()),
            Kernel(
                "reference.linear_row_sums",
                "linear",
                "any",
                1,
                _run_row_sums,
                _refuses_unless_row_sums_help,
                _pack_row_sums,
                _unpack_row_sums,
            ),
        )


backend = Reference()
