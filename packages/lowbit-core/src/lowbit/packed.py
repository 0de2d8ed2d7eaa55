"""PackedTensor: a weight laid out for one kernel. It runs and unpacks; it is never saved, sliced or moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from lowbit.backends import Description, kernel
from lowbit.errors import NotPortableError
from lowbit.tensor import QuantizedTensor

_KEPT = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class PackedTensor(torch.Tensor):
    """The parts that kernel `kernel_name` made of a weight; `unpack()` gives the QuantizedTensor back, bit for bit."""

    parts: tuple[Tensor, ...]
    kernel_name: str
    description: Description

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor], kernel_name: str, description: Description) -> Self:
        """Wrap what the kernel's `pack` returned."""
        self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's documented constructor for subclasses
            cls, description.shape, dtype=description.layout.dtype, device=parts[0].device
        )
        self.parts, self.kernel_name, self.description = tuple(parts), kernel_name, description
        for i, part in enumerate(parts):
            setattr(self, f"part{i}", part)
        return self

    @classmethod
    def from_quantized(cls, weight: QuantizedTensor, kernel_name: str) -> Self:
        """Pack `weight` for a kernel that packs."""
        pack = kernel(kernel_name).pack
        assert pack is not None
        description = Description(weight.storage_layout, tuple(weight.inner_tensors()), tuple(weight.shape))
        return cls(pack(weight), kernel_name, description)

    def unpack(self) -> QuantizedTensor:
        """The canonical tensor this was packed from.

        Raises:
            NotPortableError: the kernel cannot restore it.
        """
        unpack = kernel(self.kernel_name).unpack
        if unpack is None:
            msg = f"kernel {self.kernel_name} keeps no way back to the portable layout; load the checkpoint again"
            raise NotPortableError(msg)
        return QuantizedTensor(unpack(self.parts, self.description), self.description.layout)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, Description]]:
        """Names of the parts, and kernel and description (torch's subclass protocol)."""
        return [f"part{i}" for i in range(len(self.parts))], (self.kernel_name, self.description)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: tuple[str, Description], outer_size: object, outer_stride: object
    ) -> PackedTensor:
        """Undo `__tensor_flatten__`."""
        del outer_size, outer_stride
        return PackedTensor([inner[f"part{i}"] for i in range(len(inner))], *context)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on; lets torch.compile cache it across processes."""
        return repr((self.kernel_name, self.description))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the kernel for linear and embedding; anything else goes on, mostly to a refusal."""
        if func in {torch.nn.functional.linear, torch.nn.functional.embedding}:
            return _use(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - the documented way to call on
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Detach, and nothing else.

        Raises:
            NotPortableError: any other operator.
        """
        if func in _KEPT:
            tensor: PackedTensor = args[0]
            out = PackedTensor([func(part) for part in tensor.parts], tensor.kernel_name, tensor.description)
            return return_and_correct_aliasing(func, args, dict(kwargs or {}), out)
        msg = f"{func} has no meaning for a weight packed for one kernel; call lowbit.unbind(model) or .unpack() first"
        raise NotPortableError(msg)

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


def _use(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    if not isinstance(weight, PackedTensor) or any(value for value in options.values()):
        msg = "a packed weight is the weight of a linear or embedding call, without options"
        raise NotPortableError(msg)
    return kernel(weight.kernel_name).run(x, weight.parts, weight.description, bias)
