"""From the tensors that vLLM loaded into a layer, fused and cut as it wants them, to QuantizedTensors.

It knows vLLM's layers by their attributes alone, so that it can be read and tested without vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.bind import Binding
from lowbit.conventions import from_global_scale
from lowbit.tensor import QuantizedTensor
from lowbit_hf.layout import format_from_config, from_compressed, tensors_of
from lowbit_hf.schemes import Scheme

STORED = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
"""Local names of what a weight may be stored as."""

_SCALES = {
    "mxfp8-quantized": torch.uint8,
    "mxfp4-pack-quantized": torch.uint8,
    "nvfp4-pack-quantized": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Place:
    """A weight of a layer, as vLLM fuses it: matrices of `rows` each, one below the other, all of `k` columns."""

    rows: tuple[int, ...]
    k: int
    # What the weight reads as.
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole."""
        return sum(self.rows), self.k


def group_of(scheme: Mapping[str, Any]) -> dict[str, Any]:
    """A `config_groups` entry, of a scheme as vLLM keeps it: arguments that compressed-tensors has parsed."""
    parts = ("weights", "input_activations")
    return {
        "format": scheme["format"],
        **{name: None if scheme.get(name) is None else scheme[name].model_dump(mode="json") for name in parts},
    }


def hold(layer: nn.Module, group: Mapping[str, Any], place: Place) -> Binding:
    """Put one bound `weight` in the place of a loaded layer's stored tensors; returns the kernel chosen for it.

    `group` is the layer's entry of `config_groups`. The layer has the tensors under their names in the file.

    Raises:
        CheckpointError: the group means what lowbit cannot hold, or a tensor is missing or does not fit it.
        NoKernelError: LOWBIT_BACKENDS leaves no kernel.
    """
    weight = _read(group, _take(layer, ""), place)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    (row,) = lowbit.bind(layer).rows
    return row


def hold_experts(layer: nn.Module, group: Mapping[str, Any], places: Mapping[str, Place]) -> tuple[Binding, ...]:
    """Put stacked weights (E, N, K) in the place of experts' stored tensors, by the weights' names; as `hold` does.

    Raises:
        CheckpointError: the group means what lowbit cannot hold, or a tensor is missing or does not fit it.
        NoKernelError: LOWBIT_BACKENDS leaves no kernel.
    """
    for name, place in places.items():
        stored = _take(layer, f"{name}_")
        differ = _differ(stored)
        experts: list[Tensor] = [
            _read(group, {local: part[expert] for local, part in stored.items()}, place, by_row=differ)
            for expert in range(len(stored["weight_scale"]))
        ]
        setattr(layer, f"{name}_weight", nn.Parameter(torch.stack(experts), requires_grad=False))
    return lowbit.bind(layer).rows


def stored_tensors(group: Mapping[str, Any], place: Place) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Local name, dtype and shape of what a weight at `place` is stored as; a global scale for each matrix fused.

    Raises:
        CheckpointError: the group means what lowbit cannot hold.
        FormatError: the place does not fit it.
    """
    fmt, _ = format_from_config(group, _SCALES.get(group["format"], place.dtype))
    scheme = Scheme(name=group["format"], weight=fmt, file_format=group["format"])
    return [
        (name, dtype, (len(place.rows),) if name == "weight_global_scale" else shape)
        for name, dtype, shape in tensors_of(scheme, place.shape, place.dtype)
    ]


def _take(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The stored tensors by local name, taken out of the layer."""
    names = [name for name in STORED if isinstance(getattr(layer, prefix + name, None), Tensor)]
    stored = {name: getattr(layer, prefix + name).data for name in names}
    for name in names:
        delattr(layer, prefix + name)
    return stored


def _differ(stored: Mapping[str, Tensor]) -> bool:
    """Whether matrices that were fused have global scales of their own."""
    divisors = stored.get("weight_global_scale")
    return divisors is not None and not bool((divisors == divisors[..., :1]).all())


def _read(
    group: Mapping[str, Any], stored: Mapping[str, Tensor], place: Place, *, by_row: bool | None = None
) -> QuantizedTensor:
    """The weight of these tensors; `by_row`: with a tensor scale for each row, by default where they differ."""
    divisors = stored.get("weight_global_scale")
    if divisors is not None:
        stored = {**stored, "weight_global_scale": divisors[:1]}
    data, scales, fmt = from_compressed(group, stored, place.shape)
    if divisors is not None and (_differ({"weight_global_scale": divisors}) if by_row is None else by_row):
        # Other engines take the largest scale for all, which changes what the others' codes mean.
        scales = replace(scales, tensor_scale=_by_row(divisors, place.rows))
    _, activation = format_from_config(group, stored["weight_scale"].dtype)
    return QuantizedTensor.from_parts(data, scales, fmt, k=place.k, dtype=place.dtype, activation=activation)


def _by_row(divisors: Tensor, rows: Sequence[int]) -> Tensor:
    repeats = torch.tensor(rows, device=divisors.device)
    return from_global_scale(divisors.repeat_interleave(repeats))
