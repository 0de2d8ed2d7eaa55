"""What uses a QuantizedTensor's values: linear, embedding(_bag) and grouped_mm, handed to the neutral operators.

Convolutions are no operators of lowbit's own, but PyTorch's, of values that those operators round and decode.
Where nothing but the kernel takes part (`ops.unwatched`), it is called straight, and a weight remembers how: a decoded
token is hundreds of these calls.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lowbit.activation import Activation
from lowbit.backends import generation, kernel_for, under_autocast
from lowbit.bags import bag_arguments
from lowbit.element import FLOAT32
from lowbit.errors import FormatError, UnsupportedOpError
from lowbit.format import Format
from lowbit.ops import unwatched
from lowbit.rules import rule_of
from lowbit.tensor import FUNCTIONS, QuantizedTensor, in_backward

aten = torch.ops.aten


class Way:
    """The kernel that an op with this weight runs on, for inputs of one dtype and device, while backends stay."""

    __slots__ = ("columns", "device", "dtype", "found", "run", "tail", "weight")

    def __init__(self, op: str, w: QuantizedTensor, x: Tensor) -> None:
        layout, (*_, n, k) = w.storage_layout, w.canonical_shape
        self.dtype, self.device, self.found, self.weight = x.dtype, x.device, generation(), _parts(w)
        if op.startswith("embedding"):
            self.columns, self.tail = None, (layout.format, k, layout.dtype)
            self.run = kernel_for(op, layout.format, "", w.qdata.device, layout.dtype, n, k).run
        else:
            self.columns, self.tail = k, (layout.format, layout.activation or "")
            self.run = kernel_for(op, *self.tail, x.device, x.dtype, n, k).run

    def fits(self, x: Tensor) -> bool:
        """Whether it is the way for this input, too."""
        return x.dtype is self.dtype and x.device == self.device and self.found == generation()


def _way(op: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Way | None:
    """How to call the kernel straight; None: something else takes part, or the operands need to be looked at."""
    if is_compiling() or type(weight) is not QuantizedTensor:
        return None
    way = weight.ways.get(op)
    if way is None or not way.fits(x) or way.columns not in {None, x.shape[-1]} or not unwatched(x, bias):
        return None
    return way


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 - F.linear's own name
    """F.linear with a quantized weight (N, K)."""
    if (way := _way("linear", input, weight, bias)) is not None:
        return way.run(input, *way.weight, bias, *way.tail)
    w = _operand(weight, "linear", (0, 1), input, bias)
    if unwatched(input, bias):
        w.ways["linear"] = way = Way("linear", w, input)
        return way.run(input, *way.weight, bias, *way.tail)
    layout = w.storage_layout
    bias = None if bias is None else under_autocast(bias)
    return torch.ops.lowbit.linear(under_autocast(input), *_parts(w), bias, layout.format, layout.activation or "")


def _grouped_mm(
    mat_a: Tensor, mat_b: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """F.grouped_mm of tokens (M, K) with experts that read as (E, K, N), stored K last."""
    if bias is None and out_dtype is None and (way := _way("grouped_mm", mat_a, mat_b, offs)) is not None:
        return way.run(mat_a, offs, *way.weight, *way.tail)
    w = _operand(mat_b, "grouped_mm", (0, 2, 1), mat_a, bias)
    mat_a = under_autocast(mat_a)
    if offs is None or bias is not None or out_dtype not in (None, mat_a.dtype):
        msg = "grouped_mm with quantized experts takes 2-D tokens and offs, no bias and no other out_dtype"
        raise UnsupportedOpError(msg)
    if unwatched(mat_a, offs):
        w.ways["grouped_mm"] = way = Way("grouped_mm", w, mat_a)
        return way.run(mat_a, offs, *way.weight, *way.tail)
    layout = w.storage_layout
    return torch.ops.lowbit.grouped_mm(mat_a, offs, *_parts(w), layout.format, layout.activation or "")


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002
    sparse: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    """F.embedding with a quantized table (V, D); padding_idx and gradients concern training only."""
    del padding_idx, norm_type, scale_grad_by_freq, sparse
    if max_norm is not None:
        msg = "embedding with max_norm rewrites its table, which quantized codes cannot take"
        raise UnsupportedOpError(msg)
    if (way := _way("embedding", input, weight)) is not None:
        return way.run(input, *way.weight[:4], *way.tail)
    w = _operand(weight, "embedding", (0, 1), input)
    if unwatched(input):
        w.ways["embedding"] = way = Way("embedding", w, input)
        return way.run(input, *way.weight[:4], *way.tail)
    layout = w.storage_layout
    return torch.ops.lowbit.embedding(input, *w.stored, layout.format, w.canonical_shape[1], layout.dtype)


def _embedding_bag(input: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:  # noqa: A002
    """F.embedding_bag with a quantized table (V, D)."""
    w = _operand(weight, "embedding_bag", (0, 1), input)
    plain = unwatched(input)
    ids, offsets, weights, *how = bag_arguments(w.canonical_shape[0], input, *rest, plain=plain, **options)
    if plain and (weights is None or unwatched(input, weights)):
        way = w.ways.get("embedding_bag")
        if way is None or not way.fits(input):
            w.ways["embedding_bag"] = way = Way("embedding_bag", w, input)
        return way.run(ids, offsets, weights, *way.weight[:4], *how, *way.tail)
    layout = w.storage_layout
    fixed = (*how, layout.format, w.canonical_shape[1], layout.dtype)
    return torch.ops.lowbit.embedding_bag(ids, offsets, weights, *w.stored, *fixed)


@rule_of(aten.linear.default, aten.embedding.default, aten._grouped_mm.default)
def _use(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if func is aten.embedding.default:
        return _embedding(args[1], args[0])
    if func is aten._grouped_mm.default:
        return _grouped_mm(*args[:2], **dict(zip(("offs", "bias", "out_dtype"), args[2:], strict=False)), **kwargs)
    return _linear(*args, **kwargs)


@rule_of(aten.mm.default, aten.addmm.default)
def _mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`x @ w.t()`, which is what linear decomposes to outside inference mode, and its gradient `g @ w`."""
    if any(value != 1 for value in kwargs.values()):
        msg = f"{func} with {kwargs} has no rule for a QuantizedTensor; call .dequantize() first"
        raise UnsupportedOpError(msg)
    bias, x, w = args if func is aten.addmm.default else (None, *args)
    if in_backward() and func is aten.mm.default and isinstance(w, QuantizedTensor) and w.permutation == (0, 1):
        plain = w.dequantize(x.dtype)
        return func(x, plain if w.pre_scale is None else plain * w.pre_scale.to(x.dtype))
    return _linear(x, w.t() if isinstance(w, QuantizedTensor) else w, bias)


@rule_of(aten.convolution.default)
def _convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """conv1d and conv2d of x (N, C, ..) with a quantized weight (O, C / groups, ..), its input rounded as it says.

    A rounded input is multiplied in float64, codes without their scales: integers are exact, whatever the window.
    """
    del kwargs
    x, weight, bias, *how = args
    w = _kernel_of(weight, x, bias, transposed=how[3])
    if w.activation is None or x.numel() == 0:
        return func(x, _values(w, x.dtype), bias, *how)
    codes, x_scale = _rounded(x, w, w.activation)
    scale, channels = w.scale.permute(w.permutation), (-1, *(1,) * (w.dim() - 2))
    # One scale a channel of the output, or one in all. Powers of two need no such care: values under them are exact.
    if w.tensor_scale is None and w.scale_bits is None and scale[:1].numel() == 1:
        values = _codes(w.qdata, w.zero, w.format, w.canonical_shape[-1]).permute(w.permutation)
        x_scale = x_scale * scale.to(torch.float64).reshape(channels)
    else:
        values = _values(w, torch.float64)
    # Codes count from their zero point, so that what the convolution pads with is 0.0 and not code 0.
    product = func(codes, values, None, *how) * x_scale
    if bias is not None:
        product = product + bias.to(torch.float64).reshape(channels)
    return product.to(x.dtype)


@rule_of(aten.convolution_backward.default)
def _convolution_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gradients to the input, through rounding as if it were the identity, and to the bias; codes have none."""
    del kwargs
    grad, x, weight, *rest, (to_x, _, to_bias) = args
    w = _kernel_of(weight, x, None, transposed=rest[4])
    return func(grad, x, _values(w, grad.dtype), *rest, [to_x, False, to_bias])


def _kernel_of(weight: Any, x: Any, bias: Any, *, transposed: bool) -> QuantizedTensor:
    """The weight of a convolution, refused where it or what it is used for is not what `_convolution` computes."""
    if not isinstance(weight, QuantizedTensor) or isinstance(x, QuantizedTensor) or isinstance(bias, QuantizedTensor):
        msg = (
            "a convolution takes a QuantizedTensor as its weight and plain tensors elsewhere; "
            "call .dequantize() on the others"
        )
        raise UnsupportedOpError(msg)
    if transposed or weight.dim() > 4 or weight.pre_scale is not None:
        msg = (
            "quantized weights are used by conv1d and conv2d without a pre_scale, not transposed and not in three "
            "dimensions; call .dequantize() first"
        )
        raise UnsupportedOpError(msg)
    if weight.activation is not None and (misfit := weight.activation.convolution_misfit) is not None:
        raise UnsupportedOpError(misfit)
    return weight


def _rounded(x: Tensor, w: QuantizedTensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Codes of x less their zero point, float64 in x's shape, and the one float64 scale they are under."""
    fmt = activation.format
    scale = zero = None
    if activation.scaling == "static":
        if w.act_scale is None:
            msg = f"activation {activation} needs a stored act_scale, but the weight carries none; calibrate it"
            raise FormatError(msg)
        scale = w.act_scale.to(fmt.scale.storage).reshape(1, 1)
        zero = None if w.act_zero is None else w.act_zero.reshape(1, 1)
    row = x.reshape(1, -1)
    data, scale, *zeros = torch.ops.lowbit.quantize(row, scale, zero, None, str(fmt), activation.mode, "nearest", 0)
    codes = _codes(data, zeros[0] if zeros else None, fmt, row.shape[-1])
    return codes.reshape(x.shape), scale.to(torch.float64).reshape(())


def _values(w: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The logical values of a weight, in `dtype`."""
    # Compilers hand the class to its rules without saying that they trace, and get an e8m0 scale as bytes here too.
    scale = w.scale if w.scale_bits is None else w.scale_bits
    layout = w.storage_layout
    values = torch.ops.lowbit.dequantize(
        w.qdata, scale, w.zero, w.tensor_scale, layout.format, w.canonical_shape[-1], dtype
    )
    return values.permute(layout.permutation)


def _codes(data: Tensor, zero: Tensor | None, fmt: Format, k: int) -> Tensor:
    """What packed codes stand for under scales of 1, in float64, exactly."""
    unit = replace(fmt, scale=FLOAT32, tensor_scale=False)
    ones = torch.ones(unit.scale_shape((*data.shape[:-1], k)), device=data.device)
    return torch.ops.lowbit.dequantize(data, ones, zero, None, str(unit), k, torch.float64)


FUNCTIONS.update({torch.nn.functional.linear: _linear, torch.nn.functional.embedding: _embedding})
FUNCTIONS.update({torch.nn.functional.embedding_bag: _embedding_bag})
FUNCTIONS.update({torch.nn.functional.grouped_mm: _grouped_mm, vars(torch)["_grouped_mm"]: _grouped_mm})


def _parts(w: QuantizedTensor) -> tuple[Tensor | None, ...]:
    return *w.stored, w.act_scale, w.act_zero, w.pre_scale


def _operand(
    weight: Tensor, op: str, permutation: tuple[int, ...], x: Tensor, bias: Tensor | None = None
) -> QuantizedTensor:
    """The weight of `op`, refused where it does not fit the input or another operand is quantized."""
    if not isinstance(weight, QuantizedTensor) or isinstance(x, QuantizedTensor) or isinstance(bias, QuantizedTensor):
        msg = (
            f"{op} takes a QuantizedTensor as its weight and plain tensors elsewhere; call .dequantize() on the others"
        )
        raise UnsupportedOpError(msg)
    if weight.storage_layout.permutation != permutation:
        msg = (
            f"{op} contracts another axis than the one {weight!r} is blocked along; "
            "quantize it with axis set to the contraction, or call .dequantize()"
        )
        raise UnsupportedOpError(msg)
    # Packed rows may hold room for more codes than the weight has, so their length alone would let a wrong K pass.
    if not op.startswith("embedding") and x.shape[-1] != weight.canonical_shape[-1]:
        msg = f"the input has {x.shape[-1]} columns, but {weight!r} contracts {weight.canonical_shape[-1]}"
        raise FormatError(msg)
    return weight
