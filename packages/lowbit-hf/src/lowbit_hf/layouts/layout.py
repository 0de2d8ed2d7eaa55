"""What a checkpoint's layout has to tell: which tensors belong to one quantized weight, and what they mean.

A `Layout` reads, a `Writer` writes; both speak of one weight at a time, by the local names of its tensors (`qweight` of
`model.layers.0.mlp.up_proj.qweight`). Between them stands the canonical `QuantizedTensor`, so that any layout can
become any other that holds the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.element import BFLOAT16, FLOAT16, FLOAT32, Element
from lowbit.errors import CheckpointError
from lowbit.format import Format
from lowbit.tensor import QuantizedTensor
from lowbit_hf.skeleton import Skeleton

_SCALES = (FLOAT32, BFLOAT16, FLOAT16)

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Local name, dtype and shape of a stored tensor."""

CACHED = ("k_scale", "v_scale")
"""Local names of the scales of a key-value cache, in compressed-tensors' layout those of an attention module."""

FACTORS = (
    "it multiplies its input by factors of its own (pre_scale), which only lowbit's layout has a place for: --as lowbit"
)
"""Why other layouts refuse a weight."""


@dataclass(frozen=True, slots=True)
class Outline:
    """All that is known of a quantized weight before its codes are read."""

    # Rows and columns (n, k), after a leading (experts,) where it is a stack.
    shape: tuple[int, ...]
    format: Format
    activation: Activation | None
    # What it reads as.
    dtype: torch.dtype
    # Whether it multiplies its input by factors of its own.
    pre_scale: bool = False
    # Shape of its tensor scale; None: one a matrix.
    tensor_scale: tuple[int, ...] | None = None


class Layout(ABC):
    """How a checkpoint keeps quantized weights; made from its `quantization_config`."""

    # `quant_method` of its config.
    method: ClassVar[str]
    # Local names that only a quantized weight has, those it can have, and those whose values `outline` needs.
    marks: ClassVar[frozenset[str]]
    parts: ClassVar[frozenset[str]]
    told: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, quantization: Mapping[str, Any], skeleton: Skeleton | None) -> None:
        """Read a config.

        Raises:
            CheckpointError: it is malformed, or means what lowbit cannot hold.
        """
        self.quantization, self.skeleton = quantization, skeleton

    @property
    def dtype(self) -> torch.dtype:
        """dtype that weights read as where nothing stored tells."""
        return torch.bfloat16 if self.skeleton is None else self.skeleton.dtype

    def modules(self, names: Collection[str]) -> dict[str | None, list[str]]:
        """Tensors of each quantized module; under None those that are stored as they are."""
        marked = {module for module, local in map(self.split, names) if local in self.marks}
        found: dict[str | None, list[str]] = {None: []}
        for name in names:
            module, local = self.split(name)
            found.setdefault(module if module in marked and local in self.parts else None, []).append(name)
        return found

    def split(self, name: str) -> tuple[str, str]:
        """The module and the local name of a tensor."""
        module, _, local = name.rpartition(".")
        return module, local

    def weight_name(self, module: str) -> str:
        """What the weight of a module is called where it is not quantized."""
        return f"{module}.weight"

    def transposed(self, module: str) -> bool:
        """Whether the model keeps this module's weight as (K, N), though files hold (N, K)."""
        owner = None if self.skeleton is None else self.skeleton.owner(self.weight_name(module))
        return owner is not None and "Conv1D" in owner.classes

    @property
    def cache_scheme(self) -> dict[str, Any] | None:
        """What a config says of a key-value cache, as compressed-tensors' `kv_cache_scheme`; None: nothing."""
        given = self.quantization.get("kv_cache_scheme")
        return dict(cast("dict[str, Any]", given)) if isinstance(given, dict) else None

    def cache_name(self, name: str) -> str | None:
        """What compressed-tensors calls the scale of a key-value cache that is stored as `name`; None: it is none."""
        scale = name.rpartition(".")[2] in CACHED and (self.skeleton is None or self.skeleton.owner(name) is None)
        return name if scale else None

    @abstractmethod
    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """What tensors, by local name, hold; only those of `told` need to have values.

        Raises:
            CheckpointError: one is missing or does not fit, or they mean what lowbit cannot hold.
        """

    @abstractmethod
    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """The weight that tensors, by local name, hold.

        Raises:
            CheckpointError: as `outline`.
        """


class Writer(ABC):
    """How quantized weights are put into a layout."""

    # What `--as` calls it.
    name: ClassVar[str]
    # Whether it has a place for a weight's `pre_scale`.
    smoothed: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, outline: Outline) -> str | None:
        """Why this layout cannot hold a weight; None: it can."""

    @abstractmethod
    def entries(self, outline: Outline) -> list[Entry]:
        """The tensors that a weight becomes."""

    @abstractmethod
    def tensors(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors of a weight, by local name."""

    @abstractmethod
    def config(
        self, outlines: Mapping[str, Outline], ignored: Sequence[str], named: Collection[str] = ()
    ) -> dict[str, Any]:
        """The `quantization_config` of modules, and of those left alone; those `named` are of no class Linear.

        Raises:
            CheckpointError: the layout cannot hold such modules beside one another.
        """

    def cache(self, scheme: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a config says of a key-value cache under a `kv_cache_scheme`; None: the layout has no place for it."""
        del scheme

    def files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """JSON files that readers of this layout look for besides `config.json`, by name."""
        del config
        return {}

    def module_of(self, weight: str) -> str:
        """The module of a weight, by the weight's name where it is not quantized."""
        return weight.removesuffix(".weight")

    def join(self, module: str, local: str) -> str:
        """The name of a module's tensor."""
        return f"{module}.{local}"

    def cache_entry(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """What a scale of a key-value cache that compressed-tensors calls `name` is called here, and its shape."""
        return name, shape or (1,)


def take(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype, dims: int) -> Tensor:
    """The part `name`, which has to be of this dtype and so many dims.

    Raises:
        CheckpointError: it is missing, or of another dtype or number of dims.
    """
    if name not in parts:
        msg = f"tensor {name!r} is missing; the module has {', '.join(sorted(parts)) or 'none'}"
        raise CheckpointError(msg)
    found = parts[name]
    if found.dtype != dtype or found.dim() != dims:
        msg = f"{name} is {found.dtype} {tuple(found.shape)}; needed is {dtype} of {dims} dims"
        raise CheckpointError(msg)
    return found


def fits(parts: Mapping[str, Tensor], entries: Iterable[Entry]) -> None:
    """Check that every entry is there, of its dtype and shape.

    Raises:
        CheckpointError: one is not.
    """
    for name, dtype, shape in entries:
        if tuple(take(parts, name, dtype, len(shape)).shape) != shape:
            msg = f"{name} has shape {tuple(parts[name].shape)}; needed is {shape}"
            raise CheckpointError(msg)


def scale_element(parts: Mapping[str, Tensor], names: Iterable[str], wanted: torch.dtype) -> Element:
    """What the scales among parts are kept as: the model's dtype where that holds all of them, else as they are stored.

    Raises:
        CheckpointError: they are missing, or no floating-point numbers.
    """
    scales = [parts[name] for name in names if name in parts]
    stored = next((element for element in _SCALES if scales and element.storage == scales[0].dtype), None)
    if stored is None:
        given = f"{scales[0].dtype}" if scales else "missing"
        msg = f"tensor {', '.join(map(repr, names))} is {given}; needed is float16, bfloat16 or float32"
        raise CheckpointError(msg)
    narrow = next((element for element in _SCALES if element.storage == wanted), None)
    exact = all(torch.equal(s.to(wanted).to(torch.float64), s.to(torch.float64)) for s in scales)
    return narrow if narrow is not None and exact else stored


def only(scale: Tensor) -> Tensor:
    """The one number of a scale (1,), in float32.

    Raises:
        CheckpointError: there are more, or none.
    """
    if scale.numel() != 1:
        msg = f"a scale of shape {tuple(scale.shape)} has to be one number"
        raise CheckpointError(msg)
    return scale.reshape(1).to(torch.float32)
