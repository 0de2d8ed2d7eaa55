"""PackedTensor: a weight laid out for one kernel. It runs and unpacks; it is never saved, sliced or moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import return_and_correct_aliasing

from lowbit.backends import Description, generation, kernel, under_autocast, without_autocast
from lowbit.bags import bag_arguments
from lowbit.errors import FormatError, NotPortableError, UnsupportedOpError
from lowbit.experts import by_expert
from lowbit.ops import unwatched
from lowbit.tensor import INNER, QuantizedTensor, in_backward

# These would look for values in the wrapper, which has none.
_STORAGE = {torch.Tensor.share_memory_, torch.Tensor.data.__set__}  # pyright: ignore[reportAttributeAccessIssue]
aten = torch.ops.aten


class PackedTensor(torch.Tensor):
    """The parts that kernel `kernel_name` made of a weight; `unpack()` gives the QuantizedTensor back, bit for bit.

    The parts for a kernel that packs nothing are the inner tensors themselves.
    """

    parts: tuple[Tensor, ...]
    kernel_name: str
    description: Description
    # Whether it reads as the transpose, which is only good for `x @ w.t()`; of experts, each matrix does.
    transposed: bool
    # How the kernel ran last: the op, the generation of backends, and the kernel as a function of (x, bias or offs).
    way: tuple[str, int, Callable[..., Tensor]] | None

    def __new__(
        cls,
        parts: Sequence[Tensor],
        kernel_name: str,
        description: Description,
        transposed: bool = False,  # noqa: FBT001, FBT002 - a field
    ) -> Self:
        """Wrap what the kernel's `pack` returned."""
        self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's documented constructor for subclasses
            cls,
            (*description.shape[:-2], *description.shape[:-3:-1]) if transposed else description.shape,
            dtype=description.layout.dtype,
            device=parts[0].device,
        )
        self.parts, self.kernel_name, self.description = tuple(parts), kernel_name, description
        self.transposed, self.way = transposed, None
        for i, part in enumerate(parts):
            setattr(self, f"part{i}", part)
        return self

    @classmethod
    def from_quantized(cls, weight: QuantizedTensor, kernel_name: str) -> Self:
        """Bind `weight` to a kernel, packed if the kernel packs."""
        pack = kernel(kernel_name).pack
        inner = weight.inner_tensors()
        description = Description(weight.storage_layout, tuple(inner), tuple(weight.shape))
        return cls(tuple(inner.values()) if pack is None else pack(weight), kernel_name, description)

    def unpack(self) -> QuantizedTensor:
        """The canonical tensor this was packed from.

        Raises:
            NotPortableError: the kernel cannot restore it.
        """
        row = kernel(self.kernel_name)
        if row.pack is None:
            return QuantizedTensor(_named(self), self.description.layout)
        if row.unpack is None:
            msg = f"kernel {self.kernel_name} keeps no way back to the portable layout; load the checkpoint again"
            raise NotPortableError(msg)
        return QuantizedTensor(row.unpack(self.parts, self.description), self.description.layout)

    def seen(self, *, transposed: bool) -> PackedTensor:
        """The same weight, or its transpose."""
        return PackedTensor(self.parts, self.kernel_name, self.description, transposed)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, Description, bool]]:
        """Names of the parts, and kernel, description and direction (torch's subclass protocol)."""
        return [f"part{i}" for i in range(len(self.parts))], (self.kernel_name, self.description, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: tuple[str, Description, bool], outer_size: object, outer_stride: object
    ) -> PackedTensor:
        """Undo `__tensor_flatten__`."""
        del outer_size, outer_stride
        kernel_name, description, transposed = context
        parts = [inner[f"part{i}"] for i in range(len(inner))]
        return PackedTensor(parts, kernel_name, description, transposed)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on; lets torch.compile cache it across processes."""
        return repr((self.kernel_name, self.description, self.transposed))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the kernel for what uses it; anything else goes on, mostly to a refusal."""
        if func in _USES:
            return _USES[func](*args, **(kwargs or {}))
        if func in _STORAGE:
            raise NotPortableError(_refusal(func))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - the documented way
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Detach, transpose and be used; tensor parallelism calls the parts that linear decomposes to.

        Raises:
            NotPortableError: any other operator.
        """
        keywords = dict(kwargs or {})
        if func in _ALIASES and _is_alias(func, *args):
            tensor: PackedTensor = args[0]
            turned = func in {aten.t.default, aten.transpose.int}
            # A view of a normal tensor is one too, in inference mode as well: they share a version counter.
            with torch.inference_mode(mode=tensor.is_inference()):
                view = tensor.seen(transposed=tensor.transposed != turned)
            return return_and_correct_aliasing(func, args, keywords, view)
        if func in {aten.mm.default, aten.addmm.default} and not keywords:
            return _mm(*args)
        if func is aten.linear.default:
            return _linear(*args, **keywords)
        if func is aten._grouped_mm.default:  # noqa: SLF001 - what F.grouped_mm is in graphs
            return _grouped_mm(
                *args[:2], **dict(zip(("offs", "bias", "out_dtype"), args[2:], strict=False)), **keywords
            )
        if func is aten.embedding.default:
            return _embedding(args[1], args[0])
        # Inference mode hands over composite operators (mT, matmul) whole.
        result = func.decompose(*args, **keywords)
        if result is NotImplemented:
            raise NotPortableError(_refusal(func))
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled.

        Raises:
            NotPortableError: always.
        """
        msg = f"a weight packed for {self.kernel_name} is not portable; call lowbit.unbind(model) before saving"
        raise NotPortableError(msg)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Shape, kernel and format instead of values."""
        del tensor_contents
        fmt = self.description.layout.format
        return f"PackedTensor(shape={tuple(self.shape)}, kernel={self.kernel_name!r}, format={fmt!r})"


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 - F.linear's own name
    """F.linear with a packed weight (N, K)."""
    if (way := _way("linear", input, weight, bias)) is not None:
        return way(input, bias)
    packed = _operand(weight, "linear")
    if input.shape[-1] != packed.shape[-1]:
        msg = f"the input has {input.shape[-1]} columns, but {packed!r} contracts {packed.shape[-1]}"
        raise FormatError(msg)
    arguments = under_autocast(input), packed, None if bias is None else under_autocast(bias)
    if torch.is_grad_enabled() and input.requires_grad:
        return _Linear.apply(*arguments)
    return _run("linear", *arguments)


def _grouped_mm(
    mat_a: Tensor, mat_b: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """F.grouped_mm of tokens (M, K) with packed experts that read as (E, K, N)."""
    plain = offs is not None and bias is None and out_dtype is None
    if plain and (way := _way("grouped_mm", mat_a, mat_b, offs)) is not None:
        return way(mat_a, offs)
    packed, mat_a = _operand(mat_b, "grouped_mm"), under_autocast(mat_a)
    if offs is None or bias is not None or out_dtype not in (None, mat_a.dtype):
        msg = "grouped_mm with packed experts takes 2-D tokens and offs, no bias and no other out_dtype"
        raise UnsupportedOpError(msg)
    if mat_a.shape[-1] != packed.shape[-2]:
        msg = f"the tokens have {mat_a.shape[-1]} columns, but {packed!r} contracts {packed.shape[-2]}"
        raise FormatError(msg)
    if torch.is_grad_enabled() and mat_a.requires_grad:
        return _GroupedMM.apply(mat_a, packed, offs)
    return _run("grouped_mm", mat_a, packed, offs)


def _mm(*operands: Tensor) -> Tensor:
    """`x @ w.t()` with or without a bias before it, where w reads as (N, K), and in a backward pass `g @ w`."""
    *bias, x, weight = operands
    if not isinstance(weight, PackedTensor):
        raise NotPortableError(_refusal("x @ w"))
    if _reads(weight, "linear"):
        if bias or not in_backward():
            raise NotPortableError(_refusal("x @ w"))
        return _decoded(x, weight)
    return _linear(x, weight.seen(transposed=not weight.transposed), *bias)


def _embedding(input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:  # noqa: A002
    """F.embedding with a packed table; padding_idx and gradients concern training only."""
    del padding_idx
    if max_norm is not None:
        msg = "embedding with max_norm rewrites its table, which packed codes cannot take"
        raise NotPortableError(msg)
    if (way := _way("embedding", input, weight)) is not None:
        return way(input, None)
    return _run("embedding", input, _operand(weight, "embedding"), None)


def _embedding_bag(input: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:  # noqa: A002
    """F.embedding_bag with a table for which a kernel was chosen; none packs it."""
    w = _operand(weight, "embedding_bag")
    layout, named = w.description.layout, _named(w)
    ids, offsets, weights, *how = bag_arguments(w.shape[0], input, *rest, **options)
    fixed = (*how, layout.format, w.description.shape[-1], layout.dtype)
    return kernel(w.kernel_name).run(ids, offsets, weights, *(named.get(name) for name in INNER[:4]), *fixed)


class _Linear(torch.autograd.Function):
    """The kernel forwards; backwards as the neutral op: to the input through rounding as if it were the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.bias = weight, bias is not None
        return _run("linear", x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares *any
        return _decoded(grad, ctx.weight), None, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.bias else None


class _GroupedMM(torch.autograd.Function):
    """As `_Linear`, expert by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedTensor, offs: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(offs)
        return _run("grouped_mm", x, weight, offs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares *any
        canonical = ctx.weight.unpack()
        weight = torch.ops.lowbit.dequantize(
            *canonical.stored, canonical.storage_layout.format, canonical.canonical_shape[-1], grad.dtype
        )
        (offs,) = ctx.saved_tensors
        to_x = by_expert(grad, offs, weight.shape[-1], lambda e, rows: rows @ weight[e])
        return to_x if canonical.pre_scale is None else to_x * canonical.pre_scale.to(to_x.dtype), None, None


def _decoded(grad: Tensor, weight: PackedTensor) -> Tensor:
    """`grad @ w` with the values of the canonical weight, smoothed as the forward pass smooths its input."""
    canonical = weight.unpack()
    values = canonical.dequantize(grad.dtype)
    to_x = grad @ (values.t() if _sideways(weight) else values)
    return to_x if canonical.pre_scale is None else to_x * canonical.pre_scale.to(to_x.dtype)


def _way(op: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Callable[..., Tensor] | None:
    """The kernel as a function of (x, bias or offs), where nothing but it takes part; see `lowbit.uses`."""
    if is_compiling() or type(weight) is not PackedTensor or not _reads(weight, op) or not unwatched(x, bias):
        return None
    if op != "embedding" and x.shape[-1] != weight.shape[_CONTRACTED[op]]:
        return None
    if weight.way is None or weight.way[:2] != (op, generation()):
        if not _serves(weight, op):
            return None
        weight.way = op, generation(), _bound(op, weight)
    return weight.way[2]


def _serves(weight: PackedTensor, op: str) -> bool:
    """Whether its kernel is for an op, or looks rows up in what it packed for another."""
    row = kernel(weight.kernel_name)
    return row.op == op or (op == "embedding" and row.lookup is not None)


def _bound(op: str, weight: PackedTensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    row, description, layout = kernel(weight.kernel_name), weight.description, weight.description.layout
    if row.op != op and (lookup := row.lookup) is not None:
        return lambda x, _: lookup(x, weight.parts, description)
    if row.pack is not None:
        return lambda x, bias: row.run(x, weight.parts, description, bias)
    named = _named(weight)
    parts = tuple(named.get(name) for name in INNER)
    if row.op == "embedding":
        return lambda x, _: row.run(x, *parts[:4], layout.format, description.shape[-1], layout.dtype)
    if row.op == "grouped_mm":
        return lambda x, offs: row.run(x, offs, *parts, layout.format, layout.activation or "")
    return lambda x, bias: row.run(x, *parts, bias, layout.format, layout.activation or "")


def _run(op: str, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
    return without_autocast(_bound(op, weight), x.device.type, x, bias)


def _named(weight: PackedTensor) -> dict[str, Tensor]:
    """The inner tensors of a weight whose kernel packs nothing."""
    return dict(zip(weight.description.names, weight.parts, strict=True))


def _operand(weight: Tensor, op: str) -> PackedTensor:
    if isinstance(weight, PackedTensor) and _serves(weight, op) and _reads(weight, op):
        return weight
    msg = f"{op} has no way to use {weight!r} beside a packed tensor; call lowbit.unbind(model) first"
    raise NotPortableError(msg)


def _reads(weight: PackedTensor, op: str) -> bool:
    """Whether a weight lies as the op takes it: experts as (E, K, N), that of a linear as (N, K), a table by rows."""
    if op == "linear":
        return weight.transposed == _sideways(weight)
    return weight.transposed == (op == "grouped_mm" and weight.description.layout.permutation == (0, 1, 2))


def _sideways(weight: PackedTensor) -> bool:
    """Whether a matrix is a parameter of shape (K, N), as that of transformers' Conv1D."""
    return weight.description.layout.permutation == (1, 0)


def _refusal(func: Any) -> str:
    return f"{func} has no meaning for a weight packed for one kernel; call lowbit.unbind(model) or .unpack() first"


def _is_alias(func: Any, tensor: Tensor, *rest: Any) -> bool:
    if func is aten.transpose.int:
        return {dim % tensor.dim() for dim in rest} == {tensor.dim() - 2, tensor.dim() - 1}
    return func is not aten.view.default or tuple(*rest) == tuple(tensor.shape)


_ALIASES = {aten.detach.default, aten.alias.default, aten.t.default, aten.transpose.int, aten.view.default}
_USES = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.embedding: _embedding,
    torch.nn.functional.embedding_bag: _embedding_bag,
    torch.nn.functional.grouped_mm: _grouped_mm,
    vars(torch)["_grouped_mm"]: _grouped_mm,
}
# Which dim of the weight, as the op takes it, is the input's last.
_CONTRACTED = {"linear": -1, "grouped_mm": -2}
