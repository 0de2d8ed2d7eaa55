"""What FSDP2, tensor parallelism and distributed checkpoints ask of a QuantizedTensor: parts move, nothing decodes.

Shards are cuts between blocks (`lowbit.rules`). Rows carry their scales along; what all rows share (the static input
scale, a tensor scale, smoothing) stands on every rank. A gather joins the parts' bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import nan, prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedOpError
from lowbit.format import WHOLE
from lowbit.numerics import Scales, data_shape, encode
from lowbit.rules import raw_bytes, rule_of
from lowbit.tensor import RULES, QuantizedTensor, tail_of

aten = torch.ops.aten


class Gathered(NamedTuple):
    """What a rank's share of an all-gather holds: of each part name, dtype, shape and whether every row has its own."""

    parts: tuple[tuple[str, torch.dtype, tuple[int, ...], bool], ...]
    rows: int
    ranks: int

    @property
    def joined(self) -> bool:
        """Whether the parts' bytes travel as one."""
        return self.ranks == 1 or self.rows % self.ranks != 0


def gather_inputs(shard: QuantizedTensor, ranks: int, outer: Sequence[int]) -> tuple[tuple[Tensor, ...], Gathered]:
    """The bytes of a row shard that every rank needs, for `join_gathered`.

    A rank alone may give FSDP one input only, and where the rows do not divide by the ranks inputs must have the padded
    shard's shape: there the bytes of all parts are joined, and filled up to that.

    Raises:
        UnsupportedOpError: the shard was cut along another dimension than the first.
    """
    if tuple(shard.shape[1:]) != tuple(outer[1:]):
        msg = f"FSDP gathers a QuantizedTensor along dimension 0 only; this shard of {tuple(outer)} is {shard!r}"
        raise UnsupportedOpError(msg)
    rows, uneven = -(-outer[0] // ranks), outer[0] % ranks != 0
    if rows > shard.shape[0]:
        shard = torch.cat([shard, shard.new_zeros((rows - shard.shape[0], *shard.shape[1:]))])  # pyright: ignore[reportAssignmentType] - as every rule of QuantizedTensor
    parts = shard.inner_tensors()
    by_row = {"qdata"} | (
        {"scale", "zero"} & parts.keys() if shard.format.block_for(shard.dim())[0] != WHOLE else set()
    )
    whole = shard.tensor_scale
    # (1, 1) is one for the matrix, or that of an only row, and ranks must agree on which: then every row tells its own.
    if whole is not None and (shard.dim() > 2 or uneven or rows == 1 or whole.shape[0] > 1):
        by_row.add("tensor_scale")
        parts["tensor_scale"] = whole.expand(rows if shard.dim() > 2 else shard.scale.shape[0], *whole.shape[1:])
    told = Gathered(
        tuple((name, part.dtype, tuple(part.shape), name in by_row) for name, part in parts.items()), outer[0], ranks
    )
    data = [raw_bytes(part).flatten() for part in parts.values()]
    if told.joined:
        flat = torch.cat(data)
        data = [flat]
        if uneven:
            data = list(torch.nn.functional.pad(flat, (0, -flat.numel() % shard.numel())).view(-1, *shard.shape))
    return tuple(data), told


def join_gathered(
    shard: QuantizedTensor, outputs: Sequence[Tensor], told: Gathered, dtype: torch.dtype
) -> tuple[QuantizedTensor, tuple[Tensor, ...]]:
    """The whole tensor from what `gather_inputs` gave on every rank, and the memory it owns besides `outputs`."""
    sizes = [prod(shape) * stored.itemsize for _, stored, shape, _ in told.parts]
    each = [output.view(told.ranks, -1) for output in outputs]
    if told.joined:
        # Copies, since a dtype's values start at multiples of its size.
        each = [data.clone() for data in torch.cat(each, 1)[:, : sum(sizes)].split(sizes, 1)]
    inner: dict[str, Tensor] = {}
    for (name, stored, shape, by_row), data in zip(told.parts, each, strict=True):
        # What all rows share is rank 0's: a rank without rows may never have been given it.
        inner[name] = data.flatten().view(stored).view(-1, *shape[1:]) if by_row else data[0].view(stored).view(shape)
    owned = tuple(inner.values()) if told.joined else ()
    whole = shard.with_inner(inner, replace(shard.storage_layout, dtype=dtype))
    return (whole if whole.shape[0] == told.rows else whole[: told.rows]), owned  # pyright: ignore[reportReturnType] - as every rule of QuantizedTensor


class Flattened(torch.Tensor):
    """A QuantizedTensor seen as one row of its values, which only goes back to what it was; FSDP keeps one aside."""

    whole: QuantizedTensor

    def __new__(cls, whole: QuantizedTensor) -> Self:
        """See `whole` flattened."""
        self = torch.Tensor._make_wrapper_subclass(cls, (whole.numel(),), dtype=whole.dtype, device=whole.device)
        self.whole = whole
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """View back, or be moved with the whole.

        Raises:
            UnsupportedOpError: any other operator.
        """
        flat: Flattened = args[0]
        if func is aten.view.default:
            return flat.whole.view(args[1])
        if func in {aten.detach.default, aten._to_copy.default, aten.clone.default, aten._pin_memory.default}:
            return Flattened(func(flat.whole, *args[1:], **(kwargs or {})))
        msg = f"{func} has no meaning for a flattened {flat.whole!r}: a row of its values would cut its blocks"
        raise UnsupportedOpError(msg)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """What was flattened."""
        del tensor_contents
        return f"Flattened({self.whole!r})"


_view = RULES[aten.view.default]


@rule_of(aten.view.default)
def _view_or_flatten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, shape = args
    try:
        return _view(func, args, kwargs)
    except FormatError:
        if tuple(shape) not in {(-1,), (tensor.numel(),)}:
            raise
        return Flattened(tensor)


@rule_of(aten.as_strided.default)
def _as_strided(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, size, stride = args[:3]
    if tuple(size) != tuple(tensor.shape) or tuple(stride) != tensor.stride():
        msg = f"as_strided of a QuantizedTensor gives it as it is, not with sizes {tuple(size)} and strides {stride}"
        raise UnsupportedOpError(msg)
    return aten.alias.default(tensor)


@rule_of(aten.new_zeros.default)
def _new_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QuantizedTensor:
    """Zeros of another shape and the same rank, for a use like this one: what all rows share is kept."""
    tensor, size = args
    fmt, layout = tensor.format, tensor.storage_layout
    same = all(kwargs.get(name) in (None, getattr(tensor, name)) for name in ("dtype", "device"))
    if len(size) != tensor.dim() or not same:
        msg = f"new_zeros of {tensor!r} makes a tensor of its rank, dtype and device, not {tuple(size)} with {kwargs}"
        raise UnsupportedOpError(msg)
    canonical = tuple(size[layout.permutation.index(d)] for d in range(len(size)))
    natural = fmt.scale_shape(canonical)
    inner = {name: part.clone() for name, part in tensor.inner_tensors().items()}
    if tuple(inner["scale"].shape) != natural:
        ones = torch.ones(natural, device=tensor.device)
        inner["scale"] = fmt.scale.encode(ones)
        if tensor.zero is not None:
            inner["zero"] = torch.zeros(natural, dtype=tensor.zero.dtype, device=tensor.device)
    if tensor.tensor_scale is not None:
        shape = tuple(1 if n == 1 else new for n, new in zip(tensor.tensor_scale.shape, natural, strict=True))
        if shape != tuple(tensor.tensor_scale.shape):
            inner["tensor_scale"] = torch.ones(shape, device=tensor.device)
    if tensor.pre_scale is not None and canonical[-1] != tensor.canonical_shape[-1]:
        inner["pre_scale"] = torch.ones(canonical[-1], dtype=tensor.pre_scale.dtype, device=tensor.device)
    scales = Scales(inner["scale"], inner.get("zero"), inner.get("tensor_scale"))
    if tensor.zero is None:
        codes = torch.zeros(data_shape(canonical, fmt), dtype=torch.uint8, device=tensor.device)
        inner["qdata"] = codes.view(fmt.element.storage)
    else:
        inner["qdata"] = encode(torch.zeros(canonical, device=tensor.device), fmt, scales)
    return tensor.with_inner(inner, replace(layout, tail=tail_of(fmt, canonical[-1])))


@rule_of(aten.new_empty.default)
def _new_empty(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Zeros, or the nothing of one dimension that FSDP gives ranks beyond the last row."""
    tensor, size = args
    return Flattened(tensor[:0]) if tuple(size) == (0,) else _new_zeros(func, args, kwargs)


@rule_of(aten.empty_like.default)
def _empty_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QuantizedTensor:
    """Room for a tensor like this one, which reads as NaN until it is filled."""
    tensor = args[0]
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    kwargs.pop("memory_format", None)
    inner = {name: func(part, **kwargs) for name, part in tensor.inner_tensors().items()}
    for name, part in inner.items():
        if name.endswith("scale"):
            stored = tensor.format.scale
            unset = torch.full(part.shape, nan, device=part.device)
            inner[name] = stored.encode(unset) if name == "scale" else unset.to(part.dtype)
    return tensor.with_inner(inner, replace(tensor.storage_layout, dtype=dtype))


@rule_of(aten.constant_pad_nd.default)
def _pad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, pads, *value = args
    for dim, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), start=1):
        if before or after < 0 or any(value):
            msg = f"a QuantizedTensor is padded with zeros at the end of dimensions only, not by {pads} with {value}"
            raise UnsupportedOpError(msg)
        if after:
            size = list(tensor.shape)
            size[-dim] = after
            tensor = torch.cat([tensor, tensor.new_zeros(size)], -dim)
    return tensor


# Collectives by name: some are defined when torch.distributed is first used, and this import must not bring that about.


@rule_of("_c10d_functional.all_gather_into_tensor.default")
def _gather(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every rank's tensor, joined along the first dimension; they must agree in what they share."""
    tensor, ranks, *group = args
    flat = torch.cat([raw_bytes(part).flatten() for part in tensor.inner_tensors().values()])
    gathered = torch.ops._c10d_functional.wait_tensor.default(func(flat, ranks, *group, **kwargs))
    return torch.cat([_from_bytes(each, tensor) for each in gathered.view(ranks, -1)])


def _from_bytes(flat: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    inner = like.inner_tensors()
    pieces = flat.split([part.numel() * part.element_size() for part in inner.values()])
    return like.with_inner(
        {
            name: piece.clone().view(part.dtype).view(part.shape)
            for (name, part), piece in zip(inner.items(), pieces, strict=True)
        }
    )


@rule_of("_c10d_functional.wait_tensor.default", "_c10d_functional._wrap_tensor_autograd.default")
def _wait(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Nothing to do: a gather of quantized tensors has been waited for."""
    return args[0].detach()


@rule_of("c10d.broadcast_.default")
def _broadcast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every part from the root to all ranks."""
    tensors, *rest = args
    work = None
    for name in tensors[0].inner_tensors():
        work = _receive([getattr(t, name) for t in tensors], lambda parts: func(parts, *rest, **kwargs))
    return tensors, work


@rule_of("c10d.scatter_.default")
def _scatter(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every part of a rank's tensor from the root."""
    outputs, inputs, *rest = args
    work = None
    for name in outputs[0].inner_tensors():
        sent = [[raw_bytes(getattr(t, name)) for t in each] for each in inputs]
        parts = [getattr(t, name) for t in outputs]
        work = _receive(parts, lambda parts, sent=sent: func(parts, sent, *rest, **kwargs))
    return outputs, work


def _receive(parts: list[Tensor], communicate: Callable[[list[Tensor]], tuple[Any, Any]]) -> Any:
    """Fill `parts` with what arrives as bytes; returns the finished work."""
    data = [raw_bytes(part) for part in parts]
    work = communicate(data)[1]
    work.wait()
    for part, arrived in zip(parts, data, strict=True):
        part.copy_(arrived.view(part.dtype).view(part.shape))
    return work
