"""The layout of fp8 checkpoints as DeepSeek publishes them, `quant_method` fp8.

    weight            float8_e4m3fn (n, k)
    weight_scale_inv  float32 (ceil(n/128), ceil(k/128)): a multiplier, whatever its name says
    weight_scale      float32 of one number, where the config has no weight_block_size
    input_scale       float32 of one number, where activation_scheme is static

Source: transformers' `integrations/finegrained_fp8`; vLLM's `quantization/fp8`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.element import E4M3FN, FLOAT32
from lowbit.errors import CheckpointError
from lowbit.format import FP8_TENSOR, Format, FP8_1x128, FP8_128x128
from lowbit.numerics import Scales
from lowbit.tensor import QuantizedTensor
from lowbit_hf.layouts.layout import Entry, Layout, Outline, Writer, fits, only, scale_element, take

_BLOCKS = (replace(FP8_128x128, scale=FLOAT32), Activation(FP8_1x128))
_STATIC = (replace(FP8_TENSOR, scale=FLOAT32), Activation(FP8_TENSOR, "static"))
_DYNAMIC = (replace(FP8_TENSOR, scale=FLOAT32), Activation(FP8_TENSOR))


class Fp8(Layout):
    """Reads fp8, in blocks or with one scale a matrix."""

    method = "fp8"
    marks = frozenset({"weight_scale_inv", "weight_scale"})
    parts = frozenset({"weight", "weight_scale_inv", "weight_scale", "input_scale"})
    told = parts - {"weight"}

    def __init__(self, quantization: Mapping[str, Any], skeleton: Any) -> None:
        """Read a config."""
        super().__init__(quantization, skeleton)
        block, inputs = quantization.get("weight_block_size"), quantization.get("activation_scheme", "dynamic")
        if block not in (None, [128, 128]) or inputs not in ("dynamic", "static") or (block and inputs == "static"):
            msg = (
                f"the config has weight_block_size {block!r} and activation_scheme {inputs!r}; lowbit reads blocks of "
                "[128, 128] with dynamic inputs, and one scale a matrix with dynamic or static ones"
            )
            raise CheckpointError(msg)
        self._kind = _BLOCKS if block else _STATIC if inputs == "static" else _DYNAMIC

    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """See `Layout`."""
        del module
        n, k = take(parts, "weight", E4M3FN.storage, 2).shape
        fmt, activation = self._kind
        found = Outline((n, k), fmt, activation, self.dtype)
        name, shape = ("weight_scale_inv", fmt.scale_shape((n, k))) if self._blocks else ("weight_scale", (1,))
        scale = parts.get(name)
        if scale is None or scale.numel() != prod(shape):
            given = "missing" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
            msg = f"{name} is {given}; needed is float32 {shape}"
            raise CheckpointError(msg)
        return replace(found, format=replace(fmt, scale=scale_element(parts, (name, "input_scale"), self.dtype)))

    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """See `Layout`."""
        found = self.outline(module, parts)
        scale = parts["weight_scale_inv" if self._blocks else "weight_scale"]
        static = found.activation is not None and found.activation.scaling == "static"
        if static and "input_scale" not in parts:
            raise CheckpointError("activation_scheme is static, and it has no input_scale")
        return QuantizedTensor.from_parts(
            parts["weight"],
            Scales(scale.reshape(found.format.scale_shape(found.shape)).to(found.format.scale.storage), None, None),
            found.format,
            k=found.shape[1],
            dtype=found.dtype,
            activation=found.activation,
            act_scale=only(parts["input_scale"]).reshape(1, 1) if static else None,
        )

    @property
    def _blocks(self) -> bool:
        return self._kind is _BLOCKS


class Fp8Writer(Writer):
    """Writes fp8 in blocks of 128 x 128."""

    name = "deepseek-fp8"

    def refusal(self, outline: Outline) -> str | None:
        """See `Writer`."""
        # A scale of a tensor goes with those of e4m3 alone.
        fmt: Format = outline.format if outline.format.tensor_scale else replace(outline.format, scale=FLOAT32)
        if len(outline.shape) != 2 or (fmt, outline.activation) != _BLOCKS:
            return (
                f"DeepSeek's layout holds e4m3 in blocks of 128 x 128 with inputs rounded in groups of 128 (scheme "
                f"FP8_BLOCK), not {outline.format} with {outline.activation or 'plain'} inputs"
            )
        return None

    def entries(self, outline: Outline) -> list[Entry]:
        """See `Writer`."""
        n, k = outline.shape
        return [
            ("weight", E4M3FN.storage, (n, k)),
            ("weight_scale_inv", torch.float32, (-(-n // 128), -(-k // 128))),
        ]

    def tensors(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Writer`."""
        stored = {"weight": weight.qdata, "weight_scale_inv": weight.scale.to(torch.float32)}
        n, k = weight.shape
        fits(stored, self.entries(Outline((n, k), weight.format, weight.activation, weight.dtype)))
        return stored

    def config(
        self, outlines: Mapping[str, Outline], ignored: Sequence[str], named: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `Writer`."""
        del outlines, named
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(ignored) or None,
        }
