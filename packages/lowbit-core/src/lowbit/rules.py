"""What each operator does to a QuantizedTensor: views, copies and joins that touch no value.

Geometry is worked out in canonical dims. A cut is allowed where it does not go through a block; codes that would then
start inside a byte are re-packed, which moves bits but changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from lowbit.errors import FormatError, UnsupportedOpError
from lowbit.format import WHOLE
from lowbit.numerics import data_shape
from lowbit.packing import pack, unit, unpack
from lowbit.tensor import FUNCTIONS, RULES, QuantizedTensor, Rule, check_axis

aten = torch.ops.aten
Values = dict[str, Tensor | None]


def rule_of(*overloads: Any) -> Callable[[Rule], Rule]:
    """Register `rule(func, args, kwargs)` for operators, given as overloads or by name."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads, rule))
        return rule

    return register


def _view_rule(*overloads: Any) -> Callable[[Rule], Rule]:
    """Register `rule(tensor, *args)` and tell autograd and functionalization that the result aliases the input."""

    def register(rule: Rule) -> Rule:
        def checked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # A view of a normal tensor is one too, in inference mode as well: they share a version counter.
            with torch.inference_mode(mode=args[0].is_inference()):
                view = rule(*args, **kwargs)
            return return_and_correct_aliasing(func, args, kwargs, view)

        RULES.update(dict.fromkeys(overloads, checked))
        return rule

    return register


# Copies: every inner tensor alike.


@_view_rule(aten.detach.default, aten.alias.default)
def _detach(tensor: QuantizedTensor) -> QuantizedTensor:
    return tensor.with_inner({name: part.detach() for name, part in tensor.inner_tensors().items()})


@rule_of(aten.clone.default, aten._pin_memory.default)
def _each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor: QuantizedTensor = args[0]
    # A clone keeps the packed bytes as they are, whatever order of dims is asked for.
    kwargs.pop("memory_format", None)
    inner = {name: func(part, *args[1:], **kwargs) for name, part in tensor.inner_tensors().items()}
    return return_and_correct_aliasing(func, args, kwargs, tensor.with_inner(inner))


@rule_of(aten.is_pinned.default)
def _is_pinned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return all(func(part, *args[1:], **kwargs) for part in args[0].inner_tensors().values())


@rule_of(aten._to_copy.default)
def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor: QuantizedTensor = args[0]
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        msg = f"a QuantizedTensor reads as a floating point tensor of 16 bits or more, not {dtype}"
        raise UnsupportedOpError(msg)
    kwargs.pop("memory_format", None)
    inner = {name: func(part, **kwargs) for name, part in tensor.inner_tensors().items()}
    return tensor.with_inner(inner, replace(tensor.storage_layout, dtype=dtype))


@rule_of(aten.copy_.default)
def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[:2]
    if not isinstance(target, QuantizedTensor) or not isinstance(source, QuantizedTensor):
        msg = (
            "copy_ between a QuantizedTensor and a plain tensor would round or dequantize unseen; "
            "use lowbit.quantize(x, fmt) or .dequantize() on one side"
        )
        raise UnsupportedOpError(msg)
    described = [
        (replace(t.storage_layout, dtype=torch.float32), {name: part.shape for name, part in t.inner_tensors().items()})
        for t in (target, source)
    ]
    if described[0] != described[1]:
        msg = f"copy_ needs equal formats and shapes of all parts, not {target!r} and {source!r}"
        raise FormatError(msg)
    whole = target.untyped_storage().nbytes() // target.element_size()
    for name, part in target.inner_tensors().items():
        # More of this part's memory than of the values: others read it too, or it is a copy that nobody else reads.
        more = part.numel() * part.element_size() * whole > part.untyped_storage().nbytes() * target.numel()
        if more and not target.is_meta and not _may_become(target, source, name):
            msg = (
                f"copy_ into a cut of a QuantizedTensor in {target.format} cannot change {name}, which it does not "
                "have to itself; join the pieces with torch.cat instead, or fill a tensor that is still empty "
                "(module.to_empty)"
            )
            raise FormatError(msg)
    for name, part in target.inner_tensors().items():
        func(part, getattr(source, name), *args[2:], **kwargs)
    return target


def _may_become(target: QuantizedTensor, source: QuantizedTensor, name: str) -> bool:
    """Whether a part shared with other cuts is as in `source`, or still unset."""
    return _is_unset(target, name) or torch.equal(raw_bytes(getattr(target, name)), raw_bytes(getattr(source, name)))


def _is_unset(tensor: QuantizedTensor, name: str) -> bool:
    """Whether a part was never filled: its scale is NaN, as `empty_like` leaves it."""
    scale = getattr(tensor, {"zero": "scale", "act_zero": "act_scale"}.get(name, name))
    return name != "qdata" and bool(scale.to(torch.float32).isnan().all())


# Views: only the permutation, or a cut between blocks.


@_view_rule(aten.t.default)
def _t(tensor: QuantizedTensor) -> QuantizedTensor:
    return _permute(tensor, tuple(reversed(range(tensor.dim()))))


@_view_rule(aten.transpose.int)
def _transpose(tensor: QuantizedTensor, dim0: int, dim1: int) -> QuantizedTensor:
    dims = list(range(tensor.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(tensor, dims)


@_view_rule(aten.permute.default)
def _permute(tensor: QuantizedTensor, dims: Sequence[int]) -> QuantizedTensor:
    dims = [check_axis(d, tensor.dim()) for d in dims]
    if sorted(dims) != list(range(tensor.dim())):
        msg = f"permute{tuple(dims)} must name each of the {tensor.dim()} dimensions once"
        raise FormatError(msg)
    permutation = tuple(tensor.permutation[d] for d in dims)
    return tensor.with_inner(tensor.inner_tensors(), replace(tensor.storage_layout, permutation=permutation))


@_view_rule(aten.slice.Tensor)
def _slice(
    tensor: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    dim = check_axis(dim, tensor.dim())
    n = tensor.shape[dim]
    start, end, step = slice(start, end, step).indices(n)
    return _cut(tensor, tensor.permutation[dim], start, max(start, end), step)


@_view_rule(aten.select.int)
def _select(tensor: QuantizedTensor, dim: int, index: int) -> QuantizedTensor:
    dim = check_axis(dim, tensor.dim())
    d, n = tensor.permutation[dim], tensor.shape[dim]
    if not -n <= index < n:
        msg = f"index {index} is out of range for dimension {dim} of size {n}"
        raise IndexError(msg)
    index %= n
    vector = tensor.format.block_for(tensor.dim())
    if d == tensor.dim() - 1 or vector[d] > 1:
        msg = (
            f"select({dim}, {index}) takes one value out of block {tensor.format.block_name} of {tensor.format}; "
            "only dimensions with one scale an index, or one scale in all, can be selected from"
        )
        raise FormatError(msg)
    inner = _on_geometry(tensor, lambda part: part.select(d, index if part.shape[d] > 1 else 0))
    fmt = tensor.format.with_block(*vector[:d], *vector[d + 1 :])
    permutation = tuple(p - (p > d) for i, p in enumerate(tensor.permutation) if i != dim)
    return tensor.with_inner(inner, replace(tensor.storage_layout, format=str(fmt), permutation=permutation))


@_view_rule(aten.split.Tensor)
def _split(tensor: QuantizedTensor, size: int, dim: int = 0) -> list[QuantizedTensor]:
    n = tensor.shape[dim]
    return _split_sizes(tensor, [min(size, n - i) for i in range(0, max(n, 1), size)], dim)


@_view_rule(aten.split_with_sizes.default)
def _split_sizes(tensor: QuantizedTensor, sizes: Sequence[int], dim: int = 0) -> list[QuantizedTensor]:
    if sum(sizes) != tensor.shape[dim]:
        msg = f"split sizes {list(sizes)} must add up to {tensor.shape[dim]}, the size of dimension {dim}"
        raise FormatError(msg)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_slice(tensor, dim, a, a + size) for a, size in zip(starts, sizes, strict=True)]


@_view_rule(aten.unbind.int)
def _unbind(tensor: QuantizedTensor, dim: int = 0) -> list[QuantizedTensor]:
    return [_select(tensor, dim, i) for i in range(tensor.shape[dim])]


@_view_rule(aten.unsqueeze.default)
def _unsqueeze(tensor: QuantizedTensor, dim: int) -> QuantizedTensor:
    dim = check_axis(dim, tensor.dim() + 1)
    return _reshape(tensor, (*tensor.shape[:dim], 1, *tensor.shape[dim:]))


@_view_rule(aten.squeeze.dim)
def _squeeze(tensor: QuantizedTensor, dim: int) -> QuantizedTensor:
    dim = check_axis(dim, tensor.dim())
    return _select(tensor, dim, 0) if tensor.shape[dim] == 1 else tensor.with_inner(tensor.inner_tensors())


@_view_rule(aten.squeeze.default)
def _squeeze_all(tensor: QuantizedTensor) -> QuantizedTensor:
    squeezed = tensor.with_inner(tensor.inner_tensors())
    for dim in reversed(range(tensor.dim())):
        squeezed = _squeeze(squeezed, dim)
    return squeezed


@_view_rule(aten.view.default, aten._unsafe_view.default)
def _reshape(tensor: QuantizedTensor, shape: Sequence[int]) -> QuantizedTensor:
    """Reshape dims that have a scale of their own freely; blocked ones only as whole runs of blocks."""
    shape = _infer(tensor, shape)
    if shape == tuple(tensor.shape):
        return tensor.with_inner(tensor.inner_tensors())
    fmt, old = tensor.format, tensor.canonical_shape
    if tensor.permutation != tuple(range(tensor.dim())):
        msg = (
            f"view({shape}) of a QuantizedTensor with permuted dimensions {tensor.permutation}; undo the permute first"
        )
        raise FormatError(msg)
    vector = fmt.block_for(len(old))
    kept = next(len(vector) - i for i, b in enumerate(vector) if b != 1 or i == len(vector) - 1)
    group = vector[-1]
    grouped = kept == 1 and group not in (WHOLE, 1) and not tensor.storage_layout.tail
    shared = tensor.inner_tensors().keys() & {"tensor_scale", "pre_scale"}
    regroups = grouped and not shared and bool(shape) and shape[-1] % lcm(group, unit(fmt.element.bits)[0]) == 0
    if not regroups and shape[len(shape) - kept :] != old[len(old) - kept :]:
        msg = (
            f"view of shape {tuple(old)} as {shape} cuts through block {fmt.block_name} of {fmt}; keep the last {kept} "
            f"dimension(s) {tuple(old[len(old) - kept :])} as they are"
        )
        raise FormatError(msg)
    lead = shape[: len(shape) - kept]

    fmt = fmt.with_block(*(1,) * len(lead), *vector[len(vector) - kept :])

    def resize(part: Tensor, regrouped: tuple[int, ...]) -> Tensor:
        return part.reshape(regrouped if regroups else (*lead, *part.shape[len(old) - kept :]))

    inner: Values = dict(tensor.inner_tensors())
    inner["qdata"] = resize(tensor.qdata, data_shape(shape, fmt))
    inner["scale"] = resize(tensor.scale, fmt.scale_shape(shape))
    if tensor.zero is not None:
        inner["zero"] = resize(tensor.zero, fmt.scale_shape(shape))
    if tensor.tensor_scale is not None:
        inner["tensor_scale"] = _reshape_tensor_scale(tensor.tensor_scale, old, shape, kept)
    permutation = tuple(range(len(shape)))
    return tensor.with_inner(inner, replace(tensor.storage_layout, format=str(fmt), permutation=permutation))


# Joins.


@rule_of(aten.cat.default)
def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QuantizedTensor:
    del func
    tensors: Sequence[QuantizedTensor] = args[0]
    dim = check_axis(kwargs.get("dim", args[1] if len(args) > 1 else 0), tensors[0].dim())
    first = tensors[0]
    _check_alike(tensors)
    # An empty tensor has no scale to agree on.
    tensors = [t for t in tensors if t.shape[dim]] or [first]
    first = tensors[0]
    d, rank = first.permutation[dim], first.dim()
    block = first.format.block_for(rank)[d]
    for tensor in tensors[:-1]:
        if block > 1 and tensor.canonical_shape[d] % block:
            msg = f"cat along dimension {dim}: size {tensor.canonical_shape[d]} cuts block {block} of {first.format}"
            raise FormatError(msg)
    inner: Values = {
        name: _join(tensors, name, d) if block != WHOLE else _shared(tensors, name, dim)
        for name in ("scale", "zero")
        if getattr(first, name) is not None
    }
    inner["tensor_scale"] = _cat_tensor_scale(tensors, d, dim)
    for name in ("act_scale", "act_zero"):
        inner[name] = _shared(tensors, name, dim)
    inner["pre_scale"] = (
        _join(tensors, "pre_scale", 0)
        if d == rank - 1 and first.pre_scale is not None
        else _shared(tensors, "pre_scale", dim)
    )
    if d < rank - 1 or not first.format.element.packed:
        inner["qdata"] = _join(tensors, "qdata", d)
        return first.with_inner(inner)
    codes = torch.cat([_codes(t) for t in tensors], -1)
    return _with_codes(first, inner, codes)


@rule_of(aten.stack.default)
def _stack(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    del func
    tensors, *rest = args
    dim: int = kwargs.get("dim", rest[0] if rest else 0)
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


# Storage: torch would look for the values in the wrapper, which has none.


def _share_memory(tensor: QuantizedTensor) -> QuantizedTensor:
    for part in tensor.inner_tensors().values():
        part.share_memory_()
    return tensor


def _is_shared(tensor: QuantizedTensor) -> bool:
    return all(part.is_shared() for part in tensor.inner_tensors().values())


def _set_data(tensor: Tensor, value: object) -> None:
    del tensor, value
    msg = "setting .data of a QuantizedTensor would leave its codes behind; use copy_ or a new Parameter"
    raise UnsupportedOpError(msg)


FUNCTIONS.update({torch.Tensor.share_memory_: _share_memory, torch.Tensor.is_shared: _is_shared})
FUNCTIONS[torch.Tensor.data.__set__] = _set_data  # pyright: ignore[reportAttributeAccessIssue]


def _cut(tensor: QuantizedTensor, d: int, start: int, end: int, step: int) -> QuantizedTensor:
    """Canonical dim `d` from start to end, where that does not go through a block."""
    fmt, n = tensor.format, tensor.canonical_shape[d]
    block = fmt.block_for(tensor.dim())[d]
    if start == end:
        start, end, step = 0, 0, 1
    aligned = start % max(block, 1) == 0 and (end % max(block, 1) == 0 or end == n) and (step == 1 or block <= 1)
    if block > 1 and not aligned:
        msg = (
            f"slice {start}:{end}:{step} of a dimension of size {n} cuts through block {fmt.block_name} of {fmt}; "
            f"slice at multiples of {block}"
        )
        raise FormatError(msg)
    last = d == tensor.dim() - 1
    inner: Values = dict(tensor.inner_tensors())
    for name in ("scale", "zero"):
        part = inner.get(name)
        if part is not None and (block != WHOLE or start == end):
            blocks = slice(start // max(block, 1), -(-end // max(block, 1)), step)
            inner[name] = part[(slice(None),) * d + (blocks,)]
    if tensor.tensor_scale is not None and tensor.tensor_scale.shape[d] > 1:
        inner["tensor_scale"] = tensor.tensor_scale[
            (slice(None),) * d + (slice(start // block, -(-end // block), step),)
        ]
    if last and tensor.pre_scale is not None:
        inner["pre_scale"] = tensor.pre_scale[start:end:step]
    if not (last and fmt.element.packed):
        inner["qdata"] = tensor.qdata[(slice(None),) * d + (slice(start, end, step),)]
        return tensor.with_inner(inner)
    run, size = unit(fmt.element.bits)
    if step == 1 and start % run == 0 and (end % run == 0 or end == n):
        inner["qdata"] = tensor.qdata.narrow(d, start // run * size, -(-(end - start) // run) * size)
        return tensor.with_inner(inner, replace(tensor.storage_layout, tail=-(end - start) % run))
    return _with_codes(tensor, inner, _codes(tensor)[..., start:end:step])


def _codes(tensor: QuantizedTensor) -> Tensor:
    return unpack(tensor.qdata, tensor.format.element, tensor.canonical_shape[-1])


def _with_codes(tensor: QuantizedTensor, inner: Values, codes: Tensor) -> QuantizedTensor:
    element = tensor.format.element
    tail = -codes.shape[-1] % unit(element.bits)[0]
    return tensor.with_inner({**inner, "qdata": pack(codes, element)}, replace(tensor.storage_layout, tail=tail))


def _on_geometry(tensor: QuantizedTensor, change: Callable[[Tensor], Tensor]) -> Values:
    """Inner tensors with `change` applied to those that share the data's dims."""
    return {
        name: change(part) if name in {"qdata", "scale", "zero", "tensor_scale"} else part
        for name, part in tensor.inner_tensors().items()
    }


def _infer(tensor: QuantizedTensor, shape: Sequence[int]) -> tuple[int, ...]:
    known = _product([s for s in shape if s != -1])
    full = tuple(tensor.numel() // max(known, 1) if s == -1 else s for s in shape)
    if _product(full) != tensor.numel():
        msg = f"shape {tuple(shape)} is invalid for a tensor of {tensor.numel()} elements"
        raise FormatError(msg)
    return full


def _product(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _reshape_tensor_scale(scale: Tensor, old: tuple[int, ...], shape: tuple[int, ...], kept: int) -> Tensor:
    if scale.numel() == 1:
        return scale.reshape((1,) * len(shape))
    lead = scale.expand(*old[: len(old) - kept], *scale.shape[len(old) - kept :])
    return lead.reshape(*shape[: len(shape) - kept], *scale.shape[len(old) - kept :])


def _check_alike(tensors: Sequence[Any]) -> None:
    first = tensors[0]
    for tensor in tensors:
        if not isinstance(tensor, QuantizedTensor):
            msg = "cat and stack join QuantizedTensors with one another, not with plain tensors; quantize those first"
            raise UnsupportedOpError(msg)
        same = replace(tensor.storage_layout, tail=0) == replace(first.storage_layout, tail=0)
        if not same or tensor.inner_tensors().keys() != first.inner_tensors().keys():
            msg = f"cat and stack need one format, dtype and order of dimensions, not {first!r} and {tensor!r}"
            raise FormatError(msg)


def _join(tensors: Sequence[QuantizedTensor], name: str, d: int) -> Tensor:
    parts = [getattr(tensor, name) for tensor in tensors]
    # torch.cat lacks fp8 on some devices; the bytes are what is joined.
    raw = [p.view(torch.uint8) if p.dtype.itemsize == 1 else p for p in parts]
    return torch.cat(raw, d).view(parts[0].dtype)


def _shared(tensors: Sequence[QuantizedTensor], name: str, dim: int) -> Tensor | None:
    """A copy of the part all tensors have in common, which must be equal in all since one is kept."""
    # A rank without rows may never have been given what belongs to the use of the whole.
    if name.startswith(("act", "pre")) and getattr(tensors[0], name) is not None:
        tensors = [tensor for tensor in tensors if not _is_unset(tensor, name)] or tensors
    first: Tensor | None = getattr(tensors[0], name)
    for tensor in tensors:
        part = getattr(tensor, name)
        if first is not None and not torch.equal(raw_bytes(first), raw_bytes(part)):
            msg = (
                f"cat along dimension {dim} keeps one {name} for the result, but the {name} differ; "
                f"quantize with one shared {name}, or a format with smaller blocks"
            )
            raise FormatError(msg)
    return None if first is None else first.clone()


def raw_bytes(part: Tensor) -> Tensor:
    """The bytes of a part, contiguous, one dimension at least."""
    return part.contiguous().view(torch.uint8) if part.dim() else part.reshape(1).view(torch.uint8)


def _cat_tensor_scale(tensors: Sequence[QuantizedTensor], d: int, dim: int) -> Tensor | None:
    """One tensor scale where all share an equal one, otherwise one a row of blocks (or leading index) of the result."""
    scales = [t.tensor_scale for t in tensors]
    if any(s is None for s in scales):
        return None
    first = scales[0]
    assert first is not None
    uniform = all(s is not None and s.shape == first.shape and torch.equal(s, first) for s in scales)
    each = d < tensors[0].dim() - 2 and all(t.shape[dim] == 1 for t in tensors)
    if len(tensors) == 1 or (uniform and first.shape[d] == 1 and not each):
        return first.clone()
    if d == tensors[0].dim() - 1:
        return _shared(tensors, "tensor_scale", dim)
    ranks = [list(s.shape) for s in scales if s is not None]
    widest = [max(r[i] for r in ranks) for i in range(len(ranks[0]))]
    parts = []
    for tensor, scale in zip(tensors, scales, strict=True):
        assert scale is not None
        parts.append(scale.expand(*widest[:d], tensor.scale.shape[d], *widest[d + 1 :]))
    return torch.cat(parts, d)
