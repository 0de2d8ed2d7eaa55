"""The neutral operators `lowbit::*`: schemas, shapes for tracing, and the way to a kernel.

Formats cross these schemas as spec strings, and e8m0 scales as that dtype or, in traced graphs, as their bytes: torch
2.11 can neither save nor compile a program that holds the dtype. Each op runs the kernel that `lowbit.backends` selects
for canonical (unpacked) weights; the plain-PyTorch reference takes every call that is legal, so an op never lacks a
kernel. torch.library lets one owner register an op on a device, so backends do not override these: they add `Kernel`
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.compiler import is_compiling

from lowbit.activation import Activation
from lowbit.arguments import check_call
from lowbit.attending import Seen, gradients, rounded
from lowbit.attention import attention_call, scheme_of, selection
from lowbit.backends import kernel_for, without_autocast
from lowbit.blocked import blocked_shape
from lowbit.decompose import argument_names, decompose
from lowbit.element import E8M0
from lowbit.errors import UnsupportedOpError
from lowbit.experts import by_expert
from lowbit.format import Format
from lowbit.groups import check_groups, one_format, padded_rows
from lowbit.key_values import check_attend, check_write
from lowbit.numerics import data_shape
from lowbit.varlen import varlen_selection
from lowbit.varlen_attending import gradients_varlen, rounded_varlen

SCALES = {"scale": "format", "a_scale": "a_format", "b_scale": "b_format"}
"""Names of arguments that may come as the bytes of an e8m0 scale, and of the format each belongs to."""

_LIBRARY = torch.library.Library("lowbit", "DEF")
_WEIGHT = "Tensor qdata, Tensor scale, Tensor? zero, Tensor? tensor_scale"
_USE = "Tensor? act_scale, Tensor? act_zero, Tensor? pre_scale"
_OPERANDS = (
    "Tensor a_qdata, Tensor a_scale, Tensor? a_zero, Tensor? a_tensor_scale, Tensor b_qdata, Tensor b_scale, "
    "Tensor? b_zero, Tensor? b_tensor_scale"
)
_OF_OPERANDS = "str a_format, str b_format, SymInt k, ScalarType dtype"
_CACHE = "Tensor{} k_codes, Tensor{} k_scale, Tensor{} v_codes, Tensor{} v_scale"
# A seed that stays on its device, int64 (), is added to the other.
_OFFSET = "Tensor? seed_offset=None"
_SCHEMAS = {
    # -> data, scale[, zero][, tensor_scale]; given parts come back as copies.
    "quantize": (
        "(Tensor x, Tensor? scale, Tensor? zero, Tensor? tensor_scale, "
        f"str format, str mode, str rounding, int seed, {_OFFSET}) -> Tensor[]"
    ),
    # -> data, scale in tiles[, zero][, tensor_scale]
    "quantize_blocked": (
        f"(Tensor x, Tensor? tensor_scale, str format, str mode, str rounding, int seed, {_OFFSET}) -> Tensor[]"
    ),
    # -> the parts of x once pieces of `size` of its channels are rotated
    "quantize_rotated": (
        "(Tensor x, Tensor? tensor_scale, int size, int sign_seed, str format, str mode, str rounding, int seed, "
        f"bool blocked=False, {_OFFSET}) -> Tensor[]"
    ),
    # -> the parts of x, then those of x.mT
    "quantize_both": (
        "(Tensor x, Tensor? tensor_scale, str format, str other_format, str mode, str rounding, int seed, "
        f"bool blocked=False, {_OFFSET}) -> Tensor[]"
    ),
    # x (M, K), index (M',), offs (G,) int32 -> by format the parts of what `pad_groups` gives, and those of its .mT by
    # other_format, where there is one; ends
    "quantize_groups": (
        "(Tensor x, Tensor? index, Tensor offs, int align, Tensor? tensor_scale, str? format, str? other_format, "
        f"str mode, str rounding, int seed, bool blocked=False, {_OFFSET}) -> Tensor[]"
    ),
    "dequantize": f"({_WEIGHT}, str format, SymInt k, ScalarType dtype) -> Tensor",
    # x (.., K), weight (N, K) -> (.., N)
    "linear": f"(Tensor x, {_WEIGHT}, {_USE}, Tensor? bias, str format, str activation) -> Tensor",
    # a (M, K), b (N, K), both quantized -> a @ b.T (M, N)
    "scaled_mm": f"({_OPERANDS}, Tensor? bias, {_OF_OPERANDS}) -> Tensor",
    # a (M, K), b (E, N, K), both quantized, offs (E,) int32 ends of each group of a's rows -> (M, N)
    "scaled_grouped_mm": f"({_OPERANDS}, Tensor offs, {_OF_OPERANDS}) -> Tensor",
    # a (N, M), b (K, M), both quantized, offs (E,) int32 ends of each group of columns -> a_e @ b_e.T (E, N, K)
    "scaled_grouped_mm_k": f"({_OPERANDS}, Tensor offs, {_OF_OPERANDS}) -> Tensor",
    # x (M, K), offs (E,) int32 ends of each expert's rows, weight (E, N, K) -> (M, N)
    "grouped_mm": f"(Tensor x, Tensor offs, {_WEIGHT}, {_USE}, str format, str activation) -> Tensor",
    # x (M, K), index (M',), offs (G,) int32 -> rows x[index] in groups that begin at multiples of align, ends of those
    "pad_groups": "(Tensor x, Tensor? index, Tensor offs, int align) -> (Tensor, Tensor)",
    # rows of padded groups, offs as they were before -> the rows (M, K)
    "unpad_groups": "(Tensor x, Tensor offs, int align, SymInt rows) -> Tensor",
    # q (B, H, S, D), k and v (B, G, T, D), a mask of those, a window or 0, tables of rotary embeddings (.., T, D / 2)
    # -> like q, and the log of its sums (B, H, S)
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, int window, float softmax_scale, str scheme, "
        "str prefer, Tensor? cos=None, Tensor? sin=None) -> (Tensor, Tensor)"
    ),
    # q (tokens, H, D), k and v (tokens, G, D) of sequences that begin at cu (B + 1,) int32 -> like q, and (H, tokens)
    "varlen_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k, bool causal, int window, "
        "float softmax_scale, str scheme, str prefer) "
        "-> (Tensor, Tensor)"
    ),
    # k, v (B, G, S, D), q (B, H, S, D), cos, sin, a cache of codes and scales, or of pages of them, where to write -> q
    # rotated, or (0,)
    "cache_write": (
        f"(Tensor k, Tensor v, Tensor? q, Tensor? cos, Tensor? sin, {_CACHE.format('(a!)', '(b!)', '(c!)', '(d!)')}, "
        "Tensor positions, Tensor? table, str k_format, str v_format) -> Tensor"
    ),
    # q (B, H, S, D), a cache, how many tokens of each text there are, a window or 0 -> like q
    "cached_attention": (
        f"(Tensor q, {_CACHE.format('', '', '', '')}, Tensor lengths, Tensor? table, int window, float softmax_scale, "
        "str k_format, str v_format) -> Tensor"
    ),
    # ids (..), weight (V, D) -> (.., D)
    "embedding": f"(Tensor ids, {_WEIGHT}, str format, SymInt k, ScalarType dtype) -> Tensor",
    # ids (M,), offsets (B,) of bags, or (B + 1,) with the end of the last, weights (M,), weight (V, D) -> (B, D)
    "embedding_bag": (
        f"(Tensor ids, Tensor offsets, Tensor? per_sample_weights, {_WEIGHT}, str mode, int padding_idx, "
        "bool include_last_offset, str format, SymInt k, ScalarType dtype) -> Tensor"
    ),
}


def unwatched(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a kernel may run on these without torch's dispatcher, which costs 10 us: nothing else takes part.

    That could be a compiler, a dispatch mode, a transform, a tensor subclass, autocast, or autograd.
    """
    if (
        is_compiling()
        or _dispatch_modes()
        or _transform() is not None
        or _is_any_autocast_enabled()
        or _is_tracing()
        or type(x) is not Tensor
        or (bias is not None and type(bias) not in _PLAIN)
    ):
        return False
    return not ((x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled())


_PLAIN = (Tensor, torch.nn.Parameter)
_torch: Any = torch._C  # pyright: ignore[reportPrivateUsage] - what takes part in a call has no public name
_dispatch_modes, _transform = _torch._len_torch_dispatch_stack, _torch._functorch.peek_interpreter_stack
_is_any_autocast_enabled, _is_tracing = _torch._is_any_autocast_enabled, _torch._is_tracing


# Of operators that take values, where their format stands among the arguments; 0 where they move them as they are.
_FORMAT_AT = {"pad_groups": 0, "unpad_groups": 0}
# Operators that a scheme of attention decides on.
_BY_SCHEME = ("attention", "varlen_attention")
# Operators whose kernels read and write where their arguments say, and what is refused before that.
_CHECKS: dict[str, Callable[..., None]] = {"cache_write": check_write, "cached_attention": check_attend}


def call_of(
    op: str, args: Sequence[Any]
) -> tuple[str, str, torch.device, torch.dtype, int | None, int | None, *tuple[str, ...]]:
    """What decides on the kernel for these arguments of an op, as `Call.of` takes it after the op's name."""
    first = args[0]
    if op in _BY_SCHEME:
        mask, window, scheme = (args[3], args[5], args[7]) if op == "attention" else (None, args[8], args[10])
        return attention_call(first, mask, window, scheme)
    if (at := _FORMAT_AT.get(op)) is not None:
        # Of groups rows may have none, and columns one.
        fmt = (args[at] if args[at] is not None else one_format(args[at + 1])) if at else ""
        # Of a cache, values may be in another format than keys.
        facts = args[-1:] if op in _CHECKS else ()
        return fmt, "", first.device, first.dtype, None, first.shape[-1], *facts
    if op == "dequantize":
        return args[4], "", first.device, args[-1], None, args[-2]
    if op.startswith("embedding"):
        fmt, table = (args[5], args[1]) if op == "embedding" else (args[10], args[3])
        return fmt, "", table.device, args[-1], table.shape[0], args[-2]
    if op.startswith("scaled_"):
        a_format, b_format, k, dtype = args[-4:]
        # Tokens are no part of a call: groups of them are what is summed over.
        summed = None if op == "scaled_grouped_mm_k" else k
        return b_format, str(Activation(Format.parse(a_format))), first.device, dtype, args[4].shape[-2], summed
    weight = args[2] if op == "grouped_mm" else args[1]
    return args[-2], args[-1], first.device, first.dtype, weight.shape[-2], first.shape[-1]


def typed(scale: Tensor, fmt: str) -> Tensor:
    """A scale of a format in its own dtype, where an e8m0 scale came as bytes."""
    return scale.view(E8M0.storage) if scale.dtype == torch.uint8 and Format.parse(fmt).scale is E8M0 else scale


def _attention(*args: Any) -> Any:
    # Attention alone may be told which backends will do.
    q, mask, window, (scheme, prefer) = args[0], args[3], args[5], args[7:9]
    return without_autocast(selection(q, mask, window, scheme, prefer).kernel.run, q.device.type, *args)


def _varlen_attention(q: Tensor, *args: Any) -> Any:
    *_, window, _, scheme, prefer = args
    chosen = varlen_selection(q, window, scheme, prefer).kernel
    return without_autocast(chosen.run, q.device.type, q, *args)


def _arguments(op: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of an operator's arguments, and of the tensors that cannot be left out."""
    schema = getattr(torch.ops.lowbit, op).default
    return tuple(argument_names(schema)), tuple(
        argument.name for argument in schema._schema.arguments if str(argument.type) == "Tensor"
    )


def _checked(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The shapes of what an operator gives, once its arguments are such as it takes."""
    names, needed = _arguments(op)

    def checked(*args: Any, **kwargs: Any) -> Any:
        check_call(op, names, needed, [*args, *(kwargs.get(name) for name in names[len(args) :])])
        return fake(*args, **kwargs)

    return checked


def _implementation(op: str) -> Callable[..., Any]:
    names, needed = _arguments(op)
    if op in _BY_SCHEME:
        run = _attention if op == "attention" else _varlen_attention

        def checked(*args: Any) -> Any:
            check_call(op, names, needed, args)
            return run(*args)

        return checked
    scales = [(names.index(scale), names.index(fmt)) for scale, fmt in SCALES.items() if scale in names]
    formats = [i for i, name in enumerate(names) if name.endswith("format")]
    check = _CHECKS.get(op)

    def implementation(*args: Any) -> Any:
        check_call(op, names, needed, args)
        if check is not None:
            check(*args)
        chosen, given = kernel_for(op, *call_of(op, args)), list(args)
        for i, fmt in scales:
            given[i] = None if args[i] is None else typed(args[i], args[fmt])
        for i in formats:
            given[i] = None if args[i] is None else str(Format.parse(args[i]))
        return without_autocast(chosen.run, args[0].device.type, *given)

    return implementation


def _quantize_fake(x: Tensor, scale: Any, zero: Any, tensor_scale: Any, fmt: str, *rest: Any) -> list[Tensor]:
    del scale, zero, rest
    parsed = Format.parse(fmt)
    shape, natural = tuple(x.shape), parsed.scale_shape(tuple(x.shape))
    parts = [
        x.new_empty(data_shape(shape, parsed), dtype=parsed.element.storage),
        x.new_empty(natural, dtype=parsed.scale.storage),
    ]
    if parsed.zero is not None:
        parts.append(x.new_empty(natural, dtype=parsed.zero.code_dtype))
    if parsed.tensor_scale:
        whole = (*shape[:-2], *(1,) * min(len(shape), 2))
        parts.append(x.new_empty(whole if tensor_scale is None else tensor_scale.shape, dtype=torch.float32))
    return parts


def _quantize_blocked_fake(x: Tensor, tensor_scale: Any, fmt: str, *given: Any) -> list[Tensor]:
    data, scale, *rest = _quantize_fake(x, None, None, tensor_scale, fmt, *given)
    return [data, scale.new_empty(blocked_shape(tuple(scale.shape))), *rest]


def _quantize_rotated_fake(
    x: Tensor,
    tensor_scale: Any,
    size: int,
    sign_seed: int,
    fmt: str,
    mode: str,
    rounding: str,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
    seed_offset: Any = None,
) -> list[Tensor]:
    del size, sign_seed, seed_offset
    if blocked:
        return _quantize_blocked_fake(x, tensor_scale, fmt, mode, rounding, seed)
    return _quantize_fake(x, None, None, tensor_scale, fmt, mode, rounding, seed)


def _quantize_both_fake(
    x: Tensor,
    tensor_scale: Any,
    fmt: str,
    other_format: str,
    mode: str,
    rounding: str,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
    seed_offset: Any = None,
) -> list[Tensor]:
    del seed_offset
    parts: list[Tensor] = []
    for view, spec in ((x, fmt), (x.mT, other_format)):
        data, scale, *rest = _quantize_fake(view, None, None, tensor_scale, spec, mode, rounding, seed)
        parts += [data, scale.new_empty(blocked_shape(tuple(scale.shape))) if blocked else scale, *rest]
    return parts


def _quantize_groups_fake(
    x: Tensor,
    index: Tensor | None,
    offs: Tensor,
    align: int,
    tensor_scale: Any,
    fmt: str | None,
    other_format: str | None,
    mode: str,
    rounding: str,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
    seed_offset: Any = None,
) -> list[Tensor]:
    del seed_offset
    padded, ends = _pad_groups_fake(x, index, offs, align)
    if fmt is None:
        padded, fmt, other_format = padded.mT, one_format(other_format), None
    if other_format is not None:
        parts = _quantize_both_fake(padded, tensor_scale, fmt, other_format, mode, rounding, seed, blocked)
    elif blocked:
        parts = _quantize_blocked_fake(padded, tensor_scale, fmt, mode, rounding, seed)
    else:
        parts = _quantize_fake(padded, None, None, tensor_scale, fmt, mode, rounding, seed)
    return [*parts, ends]


def _dequantize_fake(
    qdata: Tensor, scale: Tensor, zero: Any, tensor_scale: Any, fmt: str, k: int, dtype: Any
) -> Tensor:
    del scale, zero, tensor_scale, fmt
    return qdata.new_empty((*qdata.shape[:-1], k), dtype=dtype)


def _linear_fake(x: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    del rest
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


def _grouped_mm_fake(x: Tensor, offs: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    del offs, rest
    return x.new_empty((x.shape[0], qdata.shape[1]))


def _scaled_mm_fake(a_qdata: Tensor, *rest: Any) -> Tensor:
    return a_qdata.new_empty((a_qdata.shape[0], rest[3].shape[0]), dtype=rest[-1])


def _scaled_grouped_mm_fake(a_qdata: Tensor, *rest: Any) -> Tensor:
    return a_qdata.new_empty((a_qdata.shape[0], rest[3].shape[1]), dtype=rest[-1])


def _scaled_grouped_mm_k_fake(a_qdata: Tensor, *rest: Any) -> Tensor:
    return a_qdata.new_empty((rest[7].shape[0], a_qdata.shape[0], rest[3].shape[0]), dtype=rest[-1])


def _pad_groups_fake(x: Tensor, index: Tensor | None, offs: Tensor, align: int) -> tuple[Tensor, Tensor]:
    check_groups(x, index, offs, align)
    rows = x.shape[0] if index is None else index.shape[0]
    return x.new_empty(padded_rows(rows, offs.shape[0], align), x.shape[1]), torch.empty_like(offs)


def _unpad_groups_fake(x: Tensor, offs: Tensor, align: int, rows: int) -> Tensor:
    check_groups(x, None, offs, align)
    return x.new_empty(rows, x.shape[1])


def _attention_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del rest
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _varlen_attention_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del rest
    sums = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), sums


def _cache_write_fake(k: Tensor, v: Tensor, q: Tensor | None, *rest: Any) -> Tensor:
    check_write(k, v, q, *rest)
    return k.new_empty(0) if q is None else torch.empty_like(q, memory_format=torch.contiguous_format)


def _cached_attention_fake(q: Tensor, *rest: Any) -> Tensor:
    check_attend(q, *rest)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _embedding_fake(ids: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    return qdata.new_empty((*ids.shape, rest[-2]), dtype=rest[-1])


def _embedding_bag_fake(ids: Tensor, offsets: Tensor, weights: Any, qdata: Tensor, *rest: Any) -> Tensor:
    del ids, weights
    return qdata.new_empty((offsets.shape[0] - (1 if rest[-4] else 0), rest[-2]), dtype=rest[-1])


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qdata, scale, zero, tensor_scale, _, _, pre_scale, bias, fmt, _ = inputs
    del output
    ctx.save_for_backward(qdata, scale, zero, tensor_scale, pre_scale)
    ctx.shape, ctx.format, ctx.dtype, ctx.bias = x.shape, fmt, x.dtype, bias is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradient to the input (through rounding as if it were the identity) and to the bias; codes have none."""
    qdata, scale, zero, tensor_scale, pre_scale = ctx.saved_tensors
    weight = torch.ops.lowbit.dequantize(qdata, scale, zero, tensor_scale, ctx.format, ctx.shape[-1], ctx.dtype)
    to_x = grad @ weight
    if pre_scale is not None:
        to_x = to_x * pre_scale.to(to_x.dtype)
    to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.bias else None
    return (to_x, *(None,) * 7, to_bias, None, None)


def _grouped_mm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offs, qdata, scale, zero, tensor_scale, _, _, pre_scale, fmt, _ = inputs
    del output
    ctx.save_for_backward(offs, qdata, scale, zero, tensor_scale, pre_scale)
    ctx.k, ctx.format = x.shape[-1], fmt


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """As for linear, expert by expert."""
    offs, qdata, scale, zero, tensor_scale, pre_scale = ctx.saved_tensors
    weight = torch.ops.lowbit.dequantize(qdata, scale, zero, tensor_scale, ctx.format, ctx.k, grad.dtype)
    to_x = by_expert(grad, offs, ctx.k, lambda e, rows: rows @ weight[e])
    if pre_scale is not None:
        to_x = to_x * pre_scale.to(to_x.dtype)
    return (to_x, *(None,) * 10)


def _pad_groups_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, index, offs, ctx.align = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(index, offs)
    ctx.rows = x.shape[0]


def _pad_groups_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    index, offs = ctx.saved_tensors
    if index is None:
        return torch.ops.lowbit.unpad_groups(grad, offs, ctx.align, ctx.rows), None, None, None
    moved = torch.ops.lowbit.unpad_groups(grad, offs, ctx.align, index.shape[0])
    return grad.new_zeros(ctx.rows, grad.shape[1]).index_add(0, index, moved), None, None, None


def _unpad_groups_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offs, ctx.align, _ = inputs
    del output
    ctx.save_for_backward(offs)
    ctx.rows = x.shape[0]


def _unpad_groups_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (offs,) = ctx.saved_tensors
    padded, _ = torch.ops.lowbit.pad_groups(grad, None, offs, ctx.align)
    # A caller may have given more or fewer rows than padding gives.
    rows = torch.nn.functional.pad(padded, (0, 0, 0, ctx.rows - padded.shape[0]))
    return rows, None, None, None


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, causal, window, ctx.scale, scheme, _, *tables = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.scheme, ctx.causal, ctx.window = scheme_of(scheme), causal, window
    cos, sin = tables or (None, None)
    # Codes, which are half of what was given, or less.
    codes = rounded(q, k, v, ctx.scheme, cos, sin)
    ctx.save_for_backward(mask, cos, sin, *(part for parts in codes for part in parts))


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    mask, cos, sin, *parts = ctx.saved_tensors
    if mask is not None and ctx.needs_input_grad[3]:
        msg = "attention's mask has no gradient here; detach it, or use torch's attention"
        raise UnsupportedOpError(msg)
    _refuse_second(grad)
    found = gradients(
        *(grad, [parts[:2], parts[2:4], parts[4:]], ctx.scheme),
        *(Seen(mask, ctx.causal, ctx.window), ctx.scale, cos, sin),
    )
    return (*found, *(None,) * 8)


def _refuse_second(grad: Tensor) -> None:
    """Refuse the gradient of a gradient: codes are no functions of what they were made of.

    Raises:
        UnsupportedOpError: one is asked for.
    """
    if torch.is_grad_enabled() and grad.requires_grad:
        msg = "attention in 8 bits has no second gradient (create_graph=True); use torch's attention"
        raise UnsupportedOpError(msg)


def _varlen_attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.causal, ctx.window, ctx.scale, scheme, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.scheme, ctx.of_keys = scheme_of(scheme), k.shape
    parts = rounded_varlen(q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.scheme)
    ctx.save_for_backward(cu_q, cu_k, *(part for each in parts for of in each for part in of))


def _varlen_attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    cu_q, cu_k, *saved = ctx.saved_tensors
    _refuse_second(grad)
    of_each = iter(saved)
    counts = 2, 2, 1 if ctx.scheme.v is None else 2
    size = sum(counts)
    parts = [[list(islice(of_each, count)) for count in counts] for _ in range(len(saved) // size)]
    found = gradients_varlen(
        *(grad, ctx.of_keys, cu_q, cu_k, ctx.max_q, ctx.max_k, parts, ctx.scheme),
        causal=ctx.causal,
        window=ctx.window,
        scale=ctx.scale,
    )
    return (*found, *(None,) * 9)


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _quantize_fake,
    "quantize_blocked": _quantize_blocked_fake,
    "quantize_groups": _quantize_groups_fake,
    "quantize_rotated": _quantize_rotated_fake,
    "quantize_both": _quantize_both_fake,
    "dequantize": _dequantize_fake,
    "linear": _linear_fake,
    "scaled_mm": _scaled_mm_fake,
    "scaled_grouped_mm": _scaled_grouped_mm_fake,
    "scaled_grouped_mm_k": _scaled_grouped_mm_k_fake,
    "grouped_mm": _grouped_mm_fake,
    "attention": _attention_fake,
    "varlen_attention": _varlen_attention_fake,
    "cache_write": _cache_write_fake,
    "cached_attention": _cached_attention_fake,
    "embedding": _embedding_fake,
    "embedding_bag": _embedding_bag_fake,
    "pad_groups": _pad_groups_fake,
    "unpad_groups": _unpad_groups_fake,
}
for _name, _fake in _FAKES.items():
    _LIBRARY.define(_name + _SCHEMAS[_name])
    if _name.startswith("quantize") or _name in _CHECKS:
        _names = argument_names(getattr(torch.ops.lowbit, _name).default)
        _FORMAT_AT[_name] = _names.index("k_format" if _name in _CHECKS else "format")
    _LIBRARY.impl(_name, _implementation(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{_name}", _checked(_name, _fake), lib=_LIBRARY)
    torch.library.register_torch_dispatch(f"lowbit::{_name}", FunctionalTensorMode, decompose, lib=_LIBRARY)
_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (_attention_backward, _attention_context),
    "varlen_attention": (_varlen_attention_backward, _varlen_attention_context),
    "linear": (_linear_backward, _linear_context),
    "grouped_mm": (_grouped_mm_backward, _grouped_mm_context),
    "pad_groups": (_pad_groups_backward, _pad_groups_context),
    "unpad_groups": (_unpad_groups_backward, _unpad_groups_context),
}
for _name, (_backward, _context) in _GRADIENTS.items():
    torch.library.register_autograd(f"lowbit::{_name}", _backward, setup_context=_context, lib=_LIBRARY)
