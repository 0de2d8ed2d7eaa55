"""compressed-tensors: the layout that lowbit writes itself; `lowbit_hf.layout` has its tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, FormatError
from lowbit.tensor import QuantizedTensor
from lowbit_hf.layout import (
    act_scales,
    format_from_config,
    from_compressed,
    input_tensors,
    shape_of,
    tensors_of,
    to_compressed,
)
from lowbit_hf.layouts.layout import Entry, Layout, Outline, Writer
from lowbit_hf.patterns import PREFIX, Pattern
from lowbit_hf.schemes import Scheme, quantization_config, scheme_for, targets_of
from lowbit_hf.skeleton import Skeleton


class CompressedTensors(Layout):
    """The `config_groups` of a config, and which module each one covers."""

    method = "compressed-tensors"
    marks = frozenset({"weight_packed", "weight_scale"})
    parts = frozenset(
        {
            *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
            *("input_scale", "input_zero_point", "input_global_scale"),
        }
    )
    told = frozenset({"weight_shape"})

    def __init__(self, quantization: Mapping[str, Any], skeleton: Skeleton | None) -> None:
        """Read a config; without a skeleton, classes other than Linear cover nothing."""
        super().__init__(quantization, skeleton)
        given = quantization.get("config_groups")
        if not isinstance(given, dict):
            raise CheckpointError("quantization_config has no object of config_groups; the config is damaged")
        self.groups: list[dict[str, Any]] = []
        for name, group in given.items():
            targets = group.get("targets") if isinstance(group, dict) else None
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                msg = f"quantization_config group {name!r} must be an object with a list of targets"
                raise CheckpointError(msg)
            self.groups.append({**group, "format": group.get("format") or quantization.get("format")})
        targets = {target for group in self.groups for target in group["targets"]}
        self._patterns = {t: Pattern(t.removeprefix(PREFIX)) for t in targets if t.startswith(PREFIX)}

    def find(self, module: str) -> dict[str, Any]:
        """The group that covers checkpoint module `module`: by name, else by pattern, else by class.

        Raises:
            CheckpointError: none does.
        """
        for group in self.groups:
            if module in group["targets"]:
                return group
        for group in self.groups:
            patterns = (self._patterns[target] for target in group["targets"] if target in self._patterns)
            if any(pattern.starts(module) for pattern in patterns):
                return group
        owner = None if self.skeleton is None else self.skeleton.owner(f"{module}.weight")
        # One expert's projection is a Linear in every config, though the model holds it as part of a stack.
        classes = ("Linear",) if owner is None or owner.stacked else owner.classes
        for group in self.groups:
            if any(target in classes for target in group["targets"]):
                return group
        msg = f"module {module!r} has quantized tensors, but no group of quantization_config covers it"
        raise CheckpointError(msg)

    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """See `Layout`."""
        if "weight_scale" not in parts or {"weight", "weight_packed"}.isdisjoint(parts):
            msg = f"it has {', '.join(parts)}; needed are weight_scale, and weight or weight_packed"
            raise CheckpointError(msg)
        group = self.find(module)
        fmt, activation = format_from_config(group, parts["weight_scale"].dtype)
        return Outline(shape_of(group, parts), fmt, activation, self._dtype(parts["weight_scale"]))

    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """See `Layout`."""
        group = self.find(module)
        data, scales, fmt = from_compressed(group, parts)
        _, activation = format_from_config(group, parts["weight_scale"].dtype)
        act_scale, act_zero = (None, None) if activation is None else act_scales(activation, parts)
        return QuantizedTensor.from_parts(
            data,
            scales,
            fmt,
            k=shape_of(group, parts)[1],
            dtype=self._dtype(scales.scale),
            activation=activation,
            act_scale=act_scale,
            act_zero=act_zero,
        )

    def _dtype(self, scale: Tensor) -> torch.dtype:
        return scale.dtype if scale.dtype in (torch.float16, torch.bfloat16) else self.dtype


class CompressedTensorsWriter(Writer):
    """Writes compressed-tensors, which holds whatever has a scheme."""

    name = "compressed-tensors"

    def refusal(self, outline: Outline) -> str | None:
        """See `Writer`."""
        if len(outline.shape) != 2:
            return "compressed-tensors holds matrices, and this is a stack of experts"
        try:
            scheme_for(outline.format, outline.activation)
        except FormatError as error:
            return str(error)
        return None

    def entries(self, outline: Outline) -> list[Entry]:
        """See `Writer`."""
        n, k = outline.shape
        found = scheme_for(outline.format, outline.activation)
        return tensors_of(found, (n, k), _scale_dtype(outline))

    def tensors(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Writer`."""
        found, (n, k) = scheme_for(weight.format, weight.activation), weight.shape
        stored = to_compressed(found, weight.qdata, weight.scales, (n, k))
        outline = Outline((n, k), weight.format, weight.activation, weight.dtype)
        return stored | input_tensors(weight.activation, weight.act_scale, weight.act_zero, _scale_dtype(outline))

    def config(
        self, outlines: Mapping[str, Outline], ignored: Sequence[str], named: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `Writer`."""
        modules: dict[Scheme, list[str]] = {}
        for module, outline in outlines.items():
            modules.setdefault(scheme_for(outline.format, outline.activation), []).append(module)
        return quantization_config(targets_of(modules, named), ignored)

    def cache(self, scheme: Mapping[str, Any]) -> dict[str, Any] | None:
        """See `Writer`."""
        return {"kv_cache_scheme": dict(scheme)} if "num_bits" in scheme else None


def _scale_dtype(outline: Outline) -> torch.dtype:
    """In what integer and fp8 scales are stored: as they are."""
    storage = outline.format.scale.storage
    return storage if storage in (torch.float16, torch.bfloat16, torch.float32) else outline.dtype
