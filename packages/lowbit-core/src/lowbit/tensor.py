"""QuantizedTensor: the one canonical, portable tensor class, for every format.

Stored are packed codes and scales with the blocked axis last (the canonical layout); the logical tensor is a dim
permutation of that, so transposing moves no byte and experts kept as (E, K, N) need no second class.
What an operator does to a quantized tensor stands in `lowbit.rules`; one without a rule raises, nothing is dequantized
behind the user's back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lowbit.activation import Activation
from lowbit.element import E8M0
from lowbit.errors import CheckpointError, FormatError, UnsupportedOpError
from lowbit.format import Format
from lowbit.numerics import DEFAULT_MODE, Rounding, ScaleMode, Scales, check_scales, check_use, data_shape, total_bytes
from lowbit.packing import unit

SCHEMA_VERSION = 1
"""Version of the stored form; a file of a newer one is refused with the version that is needed."""

INNER = ("qdata", "scale", "zero", "tensor_scale", "act_scale", "act_zero", "pre_scale")
"""The plain tensors inside, in stored order; all but `qdata` and `scale` may be absent."""

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""Operator overload, or its name -> rule `(func, args, kwargs)`; filled by `lowbit.rules` and `lowbit.sharding`."""
FUNCTIONS: dict[Any, Rule] = {}
"""Torch function -> handler with that function's own signature, for those that must be caught before they decompose."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the inner tensors read as one logical tensor; all plain values, so guards and files can hold it."""

    # Spec strings of the Format and the Activation.
    format: str
    activation: str | None
    # Logical dim i is canonical dim permutation[i].
    permutation: tuple[int, ...]
    # Codes of padding at the end of each packed row.
    tail: int
    # What the values read as.
    dtype: torch.dtype


class QuantizedTensor(torch.Tensor):
    """A tensor of any rank held as codes: `value = (code - zero) * scale [* tensor_scale]`, canonical layout inside.

    `act_scale`, `act_zero` are the static input parameters of the layer that uses it, `pre_scale` (K,) multiplies that
    layer's input first (smoothing). Made by `quantize`; `dequantize()` gives the plain tensor.
    """

    qdata: Tensor
    scale: Tensor
    zero: Tensor | None
    tensor_scale: Tensor | None
    act_scale: Tensor | None
    act_zero: Tensor | None
    pre_scale: Tensor | None
    # An e8m0 scale as bytes, which is how torch's compilers get it: AOTInductor of torch 2.11 lacks the dtype.
    scale_bits: Tensor | None
    storage_layout: Layout
    # Shape with the blocked axis last, as stored.
    canonical_shape: tuple[int, ...]
    # What ran on this tensor before, by op; see `lowbit.uses`.
    ways: dict[str, Any]

    def __new__(cls, inner: Mapping[str, Tensor | None], layout: Layout) -> Self:
        """Wrap inner tensors that are known to fit together; `from_parts` checks them."""
        qdata = inner["qdata"]
        assert qdata is not None
        canonical = canonical_shape(qdata, layout)
        strides = [1] * len(canonical)
        for dim in reversed(range(len(canonical) - 1)):
            strides[dim] = strides[dim + 1] * canonical[dim + 1]
        self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's documented constructor for subclasses
            cls,
            [canonical[d] for d in layout.permutation],
            strides=[strides[d] for d in layout.permutation],
            dtype=layout.dtype,
            device=qdata.device,
        )
        for name in INNER:
            setattr(self, name, inner.get(name))
        # Made now, because what asks for parts by name may forbid operators meanwhile, and handed on, because what
        # traces them knows this view only.
        bits = inner.get("scale_bits")
        self.scale_bits = self.scale.view(torch.uint8) if bits is None and self.scale.dtype == E8M0.storage else bits
        self.storage_layout, self.canonical_shape, self.ways = layout, canonical, {}
        return self

    @classmethod
    def from_parts(
        cls,
        qdata: Tensor,
        scales: Scales,
        fmt: Format,
        *,
        k: int,
        dtype: torch.dtype,
        axis: int = -1,
        activation: Activation | None = None,
        act_scale: Tensor | None = None,
        act_zero: Tensor | None = None,
        pre_scale: Tensor | None = None,
    ) -> Self:
        """A tensor of already quantized parts in canonical layout, whose blocked axis (of `k` values) reads as `axis`.

        Raises:
            FormatError: the parts do not fit the format or one another.
        """
        shape = (*qdata.shape[:-1], k)
        if qdata.dtype != fmt.element.storage or tuple(qdata.shape) != data_shape(shape, fmt):
            msg = (
                f"data is {qdata.dtype} of shape {tuple(qdata.shape)}; for k={k} in {fmt} needed is "
                f"{fmt.element.storage} of shape {data_shape(shape, fmt)}"
            )
            raise FormatError(msg)
        check_scales(scales, fmt, shape)
        check_use(act_scale, act_zero, pre_scale, k)
        axis = check_axis(axis, len(shape))
        order = [d for d in range(len(shape)) if d != axis] + [axis]
        layout = Layout(
            str(fmt),
            None if activation is None else str(activation),
            tuple(order.index(d) for d in range(len(shape))),
            tail_of(fmt, k),
            dtype,
        )
        inner = (qdata, scales.scale, scales.zero, scales.tensor_scale, act_scale, act_zero, pre_scale)
        return cls(dict(zip(INNER, inner, strict=True)), layout)

    @property
    def format(self) -> Format:
        """What the stored numbers mean."""
        return Format.parse(self.storage_layout.format)

    @property
    def activation(self) -> Activation | None:
        """How the layer that uses this weight rounds its input; None: not at all."""
        spec = self.storage_layout.activation
        return None if spec is None else Activation.parse(spec)

    @property
    def permutation(self) -> tuple[int, ...]:
        """Canonical dim of each logical dim."""
        return self.storage_layout.permutation

    @property
    def scales(self) -> Scales:
        """The parts that turn codes into values."""
        return Scales(self.scale, self.zero, self.tensor_scale)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all inner tensors."""
        return total_bytes(self.inner_tensors().values())

    def inner_tensors(self) -> dict[str, Tensor]:
        """The inner tensors that are present, by name, in stored order."""
        return {name: part for name in INNER if (part := getattr(self, name)) is not None}

    def with_inner(self, inner: Mapping[str, Tensor | None], layout: Layout | None = None) -> QuantizedTensor:
        """The same kind of tensor around other parts."""
        if inner["scale"] is self.scale:
            inner = {**inner, "scale_bits": self.scale_bits}
        return QuantizedTensor(inner, layout or self.storage_layout)

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scale, zero and tensor scale, as operators take them: an e8m0 scale as bytes in a traced graph."""
        scale = self.scale if self.scale_bits is None or not is_compiling() else self.scale_bits
        return self.qdata, scale, self.zero, self.tensor_scale

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain logical tensor, rounded once to `dtype` (by default the dtype it reads as)."""
        values = torch.ops.lowbit.dequantize(
            *self.stored, self.storage_layout.format, self.canonical_shape[-1], dtype or self.dtype
        )
        return values.permute(self.permutation)

    def __tensor_flatten__(self) -> tuple[list[str], Layout]:
        """Names of the inner tensors and the layout (torch's subclass protocol)."""
        names = list(self.inner_tensors())
        if self.scale_bits is not None:
            names[names.index("scale")] = "scale_bits"
        return names, self.storage_layout

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], layout: Layout, outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> QuantizedTensor:
        """Undo `__tensor_flatten__`; sizes follow from the inner tensors."""
        del outer_size, outer_stride
        if "scale_bits" in inner:
            inner = {**inner, "scale": inner["scale_bits"].view(E8M0.storage)}
        return QuantizedTensor(inner, layout)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on; lets torch.compile cache it across processes."""
        return repr(self.storage_layout)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Catch linear, embedding and grouped_mm before they decompose; the rest goes on to the aten rules."""
        handler = FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - the documented way
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Apply the operator's rule.

        Raises:
            UnsupportedOpError: there is none.
        """
        rule = RULES.get(func) or RULES.get(str(func))
        if rule is not None:
            return rule(func, args, dict(kwargs or {}))
        # Inference mode hands over composite operators (reshape, to, matmul) whole; their parts may have rules.
        result = func.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            msg = (
                f"{func} has no rule for a QuantizedTensor, and lowbit never dequantizes on its own; "
                "call .dequantize() first if plain values are what you want"
            )
            raise UnsupportedOpError(msg)
        return result

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Sequence[int], outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Bytes of this shard for FSDP2 to gather (its extension protocol)."""
        del outer_stride, module, mp_policy
        return lowbit.sharding.gather_inputs(self, mesh.size(), outer_size)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[QuantizedTensor, tuple[Tensor, ...]] | None:
        """The whole parameter from the gathered bytes (FSDP2's extension protocol)."""
        whole, owned = lowbit.sharding.join_gathered(self, outputs, metadata, param_dtype)
        if out is None:
            return whole, owned
        # Without memory of its own, `out` is already a view of the outputs.
        if owned:
            filled: QuantizedTensor = getattr(out, "_local_tensor", out)  # pyright: ignore[reportAssignmentType] - of a DTensor, its shard
            for name, part in whole.inner_tensors().items():
                # The same values come back for the backward pass, which must not take them for a change.
                with vars(torch.autograd)["_unsafe_preserve_version_counter"](kept := getattr(filled, name)):
                    kept.copy_(part)
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        """A copy that shares nothing, still a Parameter where this one is."""
        copy = self.with_inner({name: part.clone() for name, part in self.inner_tensors().items()})
        memo[id(self)] = copy
        return _as_parameter(copy, is_parameter=isinstance(self, torch.nn.Parameter))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as a schema version, plain values and plain tensors; see `rebuild`."""
        layout = self.storage_layout
        fields = (layout.format, layout.activation, layout.permutation, layout.tail, layout.dtype)
        # Plain pickle knows no tensors of 8-bit floats.
        stored = {
            name: part.view(torch.uint8) if part.is_floating_point() and part.dtype.itemsize == 1 else part
            for name, part in self.inner_tensors().items()
        }
        return rebuild, (SCHEMA_VERSION, fields, stored, isinstance(self, torch.nn.Parameter))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Shape, format and size instead of values, which may be large."""
        del tensor_contents
        bits = 8 * self.stored_bytes / max(self.numel(), 1)
        parts = [f"shape={tuple(self.shape)}", f"format={self.storage_layout.format!r}", f"dtype={self.dtype}"]
        if self.storage_layout.activation:
            parts.append(f"activation={self.storage_layout.activation!r}")
        return f"{type(self).__name__}({', '.join(parts)}, device='{self.device}', {bits:.4g} bits per element)"


def quantize(
    x: Tensor,
    fmt: Format | str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    *,
    axis: int = -1,
    mode: ScaleMode = DEFAULT_MODE,
    rounding: Rounding = "nearest",
    seed: int = 0,
    activation: Activation | str | None = None,
) -> QuantizedTensor:
    """Quantize `x` (1-D to 4-D, floating point) to `fmt`, blocks along `axis`.

    A given `scale` (and `zero`) is used as it is: canonical natural shape `fmt.scale_shape`, that is x with `axis`
    moved last and every dim divided by its block; e8m0 scales may be given as uint8. `tensor_scale` may also be 0-D. No
    gradient flows to x.

    Raises:
        FormatError: x does not fit the format, or a given scale does not fit x; the message names what is needed.
    """
    fmt = Format.parse(fmt) if isinstance(fmt, str) else fmt
    activation = Activation.parse(activation) if isinstance(activation, str) else activation
    if (zero is not None and scale is None) or (tensor_scale is not None and not fmt.tensor_scale):
        msg = f"a zero needs its scale beside it, and a tensor_scale a format that has one; {fmt} would leave it unused"
        raise FormatError(msg)
    canonical = x.detach().movedim(check_axis(axis, x.dim()), -1)
    if scale is not None and fmt.scale is E8M0 and scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if tensor_scale is not None and tensor_scale.dim() == 0:
        tensor_scale = tensor_scale.reshape((1,) * x.dim())
    data, chosen, *rest = torch.ops.lowbit.quantize(
        canonical, scale, zero, tensor_scale, str(fmt), mode, rounding, seed
    )
    scales = Scales(chosen, rest.pop(0) if fmt.zero is not None else None, rest.pop(0) if fmt.tensor_scale else None)
    return QuantizedTensor.from_parts(
        data, scales, fmt, k=canonical.shape[-1], dtype=x.dtype, axis=axis, activation=activation
    )


def rebuild(version: int, fields: tuple[Any, ...], inner: Mapping[str, Tensor], is_parameter: bool) -> QuantizedTensor:  # noqa: FBT001 - pickle passes it by position
    """The tensor that a pickle of schema `version` describes; this function's name is the only code the pickle names.

    Raises:
        CheckpointError: the schema is newer than this lowbit knows.
    """
    check_schema(version)
    fmt = Format.parse(fields[0])
    views = {"qdata": inner["qdata"].view(fmt.element.storage), "scale": inner["scale"].view(fmt.scale.storage)}
    inner = {**inner, **views}
    return _as_parameter(QuantizedTensor(inner, Layout(*fields)), is_parameter=is_parameter)


def check_schema(version: object) -> None:
    """Refuse stored tensors of a schema this lowbit does not know.

    Raises:
        CheckpointError: the version is newer, or not a positive integer.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        msg = f"lowbit schema version {version!r} is not a positive integer; the file is damaged"
        raise CheckpointError(msg)
    if version > SCHEMA_VERSION:
        msg = (
            f"this file has lowbit schema version {version}, and this lowbit-core reads up to {SCHEMA_VERSION}; "
            f"install a lowbit-core that reads schema {version}: pip install --upgrade lowbit-core"
        )
        raise CheckpointError(msg)


def canonical_shape(qdata: Tensor, layout: Layout) -> tuple[int, ...]:
    """Shape of the values that packed `qdata` holds, blocked axis last."""
    bits = Format.parse(layout.format).element.bits
    codes = qdata.shape[-1] * 8 // bits if bits < 8 else qdata.shape[-1]
    return (*qdata.shape[:-1], codes - layout.tail)


def check_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front.

    Raises:
        FormatError: there is no such axis.
    """
    if not -rank <= axis < rank:
        msg = f"axis {axis} does not exist in a tensor of {rank} dimensions"
        raise FormatError(msg)
    return axis % rank


def in_backward() -> bool:
    """Whether autograd is running a backward pass, where `g @ w` is a gradient and not the user's product."""
    return vars(torch._C)["_current_autograd_node"]() is not None  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - no public name


def tail_of(fmt: Format, k: int) -> int:
    """Codes of padding that a packed row of `k` values ends in."""
    return -k % unit(fmt.element.bits)[0] if fmt.element.packed else 0


def _as_parameter(tensor: QuantizedTensor, *, is_parameter: bool) -> QuantizedTensor:
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor  # pyright: ignore[reportReturnType] - Parameter of a subclass is that subclass


torch.serialization.add_safe_globals([rebuild])

import lowbit.ops  # noqa: E402 # pyright: ignore[reportUnusedImport] - defines the operators called above
import lowbit.rules  # noqa: E402 # pyright: ignore[reportUnusedImport] - what operators do to the class, and
import lowbit.sharding  # noqa: E402 - what collectives do, and
import lowbit.uses  # noqa: E402 # pyright: ignore[reportUnusedImport] - what linear, embedding and grouped_mm do
