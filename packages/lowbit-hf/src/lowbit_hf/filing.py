"""How a run puts the weights that it makes into files: in compressed-tensors' layout, or in lowbit's own.

A run fixes its files before it starts, so each has to say beforehand what a weight becomes. Weights come whole where
they were calibrated, and a slice of rows at a time where they are rounded to nearest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowbit.numerics import Scales
from lowbit.tensor import QuantizedTensor, tail_of
from lowbit_hf.layout import input_tensors, row_alignment, tensors_of, to_compressed
from lowbit_hf.layouts.layout import Entry, Outline
from lowbit_hf.layouts.lowbit import COLUMNS, LowbitWriter
from lowbit_hf.schemes import Scheme

Name = Literal["compressed-tensors", "lowbit"]
"""What `--layout` takes."""


class Filing(ABC):
    """Names and tensors of a weight in the files."""

    name: ClassVar[Name]

    @abstractmethod
    def join(self, weight: str, local: str) -> str:
        """The name of one of a weight's tensors."""

    @abstractmethod
    def entries(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[Entry]:
        """Local name, dtype and shape of every tensor that a weight of `shape` (n, k) and `dtype` becomes."""

    @abstractmethod
    def alignment(self, scheme: Scheme) -> int:
        """Slices of rows can be written apart where they start at multiples of this; 0: only the whole matrix can."""

    @abstractmethod
    def rows(
        self, scheme: Scheme, data: Tensor, scales: Scales, shape: tuple[int, int], first_row: int
    ) -> dict[str, Tensor]:
        """The tensors of the rows from `first_row` on of a weight of `shape`; at row 0 also those of the whole."""

    @abstractmethod
    def whole(
        self, scheme: Scheme, weight: QuantizedTensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of a weight.

        Raises:
            CheckpointError: its inputs are to be rounded by a scale that it does not have.
        """


class InCompressedTensors(Filing):
    """compressed-tensors' layout."""

    name = "compressed-tensors"

    def join(self, weight: str, local: str) -> str:
        """See `Filing`."""
        return f"{weight.removesuffix('.weight')}.{local}"

    def entries(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[Entry]:
        """See `Filing`."""
        return tensors_of(scheme, shape, dtype)

    def alignment(self, scheme: Scheme) -> int:
        """See `Filing`."""
        return row_alignment(scheme)

    def rows(
        self, scheme: Scheme, data: Tensor, scales: Scales, shape: tuple[int, int], first_row: int
    ) -> dict[str, Tensor]:
        """See `Filing`."""
        return to_compressed(scheme, data, scales, shape, first_row=first_row)

    def whole(
        self, scheme: Scheme, weight: QuantizedTensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `Filing`."""
        stored = to_compressed(scheme, weight.qdata.cpu(), weight.scales.cpu(), shape)
        return stored | input_tensors(scheme.activation, weight.act_scale, weight.act_zero, dtype)


@dataclass(frozen=True, slots=True)
class InLowbit(Filing):
    """lowbit's layout.

    Which weights get a `pre_scale` is known only when their block is done, and files are laid out before that. So a run
    that may give some makes room in all, and ones, which take a few bytes a column, stand for none.
    """

    smoothed: bool = False

    name = "lowbit"

    def join(self, weight: str, local: str) -> str:
        """See `Filing`."""
        return LowbitWriter().join(weight, local)

    def entries(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[Entry]:
        """See `Filing`."""
        return LowbitWriter().entries(
            Outline(shape, scheme.weight_format(dtype), scheme.activation, dtype, self.smoothed)
        )

    def alignment(self, scheme: Scheme) -> int:
        """See `Filing`."""
        return scheme.weight.block[-2]

    def rows(
        self, scheme: Scheme, data: Tensor, scales: Scales, shape: tuple[int, int], first_row: int
    ) -> dict[str, Tensor]:
        """See `Filing`."""
        made = {"qdata": data, "scale": scales.scale}
        if scales.zero is not None:
            made["zero"] = scales.zero
        if first_row:
            return made
        if scales.tensor_scale is not None:
            made["tensor_scale"] = scales.tensor_scale
        if tail_of(scheme.weight, shape[1]):
            made[COLUMNS] = torch.tensor(shape[1])
        return self._with_room(made, shape)

    def whole(
        self, scheme: Scheme, weight: QuantizedTensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `Filing`."""
        del scheme, dtype
        return self._with_room(LowbitWriter().tensors(weight), shape)

    def _with_room(self, made: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
        return {"pre_scale": torch.ones(shape[1]), **made} if self.smoothed else made
