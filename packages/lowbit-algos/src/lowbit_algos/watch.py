"""Seeing what parameters are multiplied with, whatever module does it and however it is called.

Nothing is put into the model: torch functions are looked at on their way, and a parameter is known by its memory. So
hooks, subclasses of Linear and stacks of experts are all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class Product:
    """A product of inputs with a parameter, or with one expert of it."""

    # Name of the parameter.
    name: str
    # (.., K), the contraction last; of a convolution (N, C, ..) or (C, ..).
    x: Tensor
    # (E,): where each expert's rows of x end; None: the parameter is one matrix, or the weight of a convolution.
    ends: Tensor | None


See = Callable[[Product], Tensor | None]
"""What to do with a product; the tensor it returns takes the place of `x`."""

# Where a function has its input and its weight, by position or name.
_Places = tuple[tuple[int, str], tuple[int, str]]
_OPERANDS: dict[Any, _Places] = {
    functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    functional.grouped_mm: ((0, "mat_a"), (1, "mat_b")),
    vars(torch)["_grouped_mm"]: ((0, "self"), (1, "mat2")),
}
# A convolution is not a product with a matrix, which is what algorithms solve; only those who ask are told of it.
_CONVOLUTIONS = dict.fromkeys((functional.conv1d, functional.conv2d), ((0, "input"), (1, "weight")))


class Watch(TorchFunctionMode):
    """A context in which `see` is told of every product with one of `parameters`, named.

    With `convolutions` it is told of conv1d and conv2d too.
    """

    def __init__(self, parameters: Mapping[str, Tensor], see: See, *, convolutions: bool = False) -> None:
        super().__init__()
        self._operands: dict[Any, _Places] = _OPERANDS | (_CONVOLUTIONS if convolutions else {})
        self._known = {p.untyped_storage().data_ptr(): (name, p) for name, p in parameters.items()}
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Tell of the product that a call is, if it is one, and carry it out."""
        kwargs = kwargs or {}
        places = self._operands.get(func)
        if places is not None:
            x, weight = (_get(args, kwargs, place) for place in places)
            product = self._product(x, weight, kwargs.get("offs"), stacks=func not in _CONVOLUTIONS)
            if product is not None and (other := self._see(product)) is not None:
                args, kwargs = _put(args, kwargs, places[0], other.view_as(x))
        return func(*args, **kwargs)

    def _product(self, x: Any, weight: Any, ends: Tensor | None, *, stacks: bool) -> Product | None:
        """The product, unless it is with another tensor; `stacks`: parameters of three dims are stacks of experts."""
        if type(weight) not in (Tensor, torch.nn.Parameter) or not isinstance(x, Tensor):
            return None
        name, parameter = self._known.get(weight.untyped_storage().data_ptr(), (None, None))
        if name is None or parameter is None:
            return None
        if stacks and parameter.dim() == 3 and ends is None:
            count = len(parameter)
            if weight.dim() == 3:
                # (E, M, K) times all of them: M rows each.
                ends = torch.arange(1, count + 1) * x.shape[-2]
            else:
                e = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
                ends = torch.where(torch.arange(count) < e, 0, x.numel() // x.shape[-1])
        return Product(name, x, ends)


def _get(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: tuple[int, str]) -> Any:
    index, name = place
    return args[index] if index < len(args) else kwargs.get(name)


def _put(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: tuple[int, str], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    index, name = place
    if index < len(args):
        return (*args[:index], value, *args[index + 1 :]), dict(kwargs)
    return args, {**kwargs, name: value}
