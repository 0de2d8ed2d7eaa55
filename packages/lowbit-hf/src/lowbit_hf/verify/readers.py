"""Programs that read quantized weights, other than lowbit."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowbit_hf.layouts import Layout
from lowbit_hf.layouts.compressed_tensors import CompressedTensors
from lowbit_hf.layouts.gguf import Gguf
from lowbit_hf.verify.decoders import DECODERS


class Reader(ABC):
    """Reads the weights of one layout."""

    # What `--with` calls it, and the package it is of.
    name: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, layout: Layout) -> None:
        """Keep the config."""
        self.layout = layout

    @classmethod
    def installed(cls) -> bool:
        """Whether its package is there."""
        return find_spec(cls.package.replace("-", "_")) is not None

    @classmethod
    def title(cls) -> str:
        """Name and version."""
        return f"{cls.name} {version(cls.package)}"

    @classmethod
    @abstractmethod
    def knows(cls, layout: Layout) -> bool:
        """Whether it reads a layout."""

    @abstractmethod
    def read(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The values (n, k) of a module's tensors, in whatever dtype it computes them."""


class ByCompressedTensors(Reader):
    """compressed-tensors' own decompressor."""

    name = package = "compressed-tensors"

    @classmethod
    def knows(cls, layout: Layout) -> bool:
        """See `Reader`."""
        return isinstance(layout, CompressedTensors)

    def read(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Reader`."""
        # An extra, and so imported only by what needs it.
        from compressed_tensors.compressors import BaseCompressor  # noqa: PLC0415
        from compressed_tensors.quantization import QuantizationScheme  # noqa: PLC0415

        assert isinstance(self.layout, CompressedTensors)
        group = self.layout.find(module)
        reader: Any = BaseCompressor.get_value_from_registry(group["format"])
        return reader.decompress(dict(parts), QuantizationScheme(**group))["weight"]


class ByNumpy(Reader):
    """Decoders of layouts whose own packages need a GPU, or are many."""

    name = package = "numpy"

    @classmethod
    def knows(cls, layout: Layout) -> bool:
        """See `Reader`."""
        return layout.method in DECODERS

    def read(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Reader`."""
        del module
        return torch.from_numpy(DECODERS[self.layout.method](parts, self.layout.quantization))


class ByGguf(Reader):
    """The `gguf` package of llama.cpp."""

    name = package = "gguf"

    @classmethod
    def knows(cls, layout: Layout) -> bool:
        """See `Reader`."""
        return isinstance(layout, Gguf)

    def read(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Reader`."""
        # An extra too.
        from gguf import GGMLQuantizationType  # noqa: PLC0415
        from gguf.quants import dequantize  # noqa: PLC0415

        del module
        ((local, blocks),) = parts.items()
        values = dequantize(blocks.flatten(1).numpy(), GGMLQuantizationType[local.upper()])
        return torch.from_numpy(np.ascontiguousarray(values))


READERS: tuple[type[Reader], ...] = (ByCompressedTensors, ByNumpy, ByGguf)
"""Those that read a weight at a time; transformers reads models."""
