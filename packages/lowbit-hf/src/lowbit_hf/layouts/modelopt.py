"""ModelOpt's layout: fp8, NVFP4 and MXFP8, each weight's kind told by its tensors.

    NVFP4   weight uint8 (n, k/2), weight_scale float8_e4m3fn (n, k/16), weight_scale_2 float32 (): a multiplier;
            input_scale float32 (), a multiplier too, where inputs are rounded
    FP8     weight float8_e4m3fn (n, k), weight_scale float32 (), input_scale float32 ();
            weight_scale (n, 1) for FP8_PER_CHANNEL_PER_TOKEN; (n/128, k/128) for FP8_PB_WO, whose inputs stay
    MXFP8   weight float8_e4m3fn (n, k), weight_scale uint8 (n, k/32)

Codes of NVFP4 are as compressed-tensors has them; its global scales are the reciprocals of these. Scales of the
key-value cache are `k_proj.k_scale` and `v_proj.v_scale`, float32 (), where compressed-tensors has `k_scale` and
`v_scale` (1,).

Source: ModelOpt's `export/unified_export_hf`; vLLM's `quantization/modelopt`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.conventions import from_weight_scale_2, to_weight_scale_2
from lowbit.element import E4M3FN, E8M0, FLOAT32
from lowbit.errors import CheckpointError
from lowbit.format import FP8_ROW, FP8_TENSOR, MXFP8, NVFP4, Format, FP8_128x128
from lowbit.numerics import Scales
from lowbit.tensor import QuantizedTensor
from lowbit_hf.layout import one_number
from lowbit_hf.layouts.layout import Entry, Layout, Outline, Writer, fits, only, scale_element
from lowbit_hf.schemes import cache_scheme

_E4M3, _WIDE = E4M3FN.storage, FLOAT32
# What each quant_algo means: weights, and what becomes of inputs.
_ALGOS: dict[str, tuple[Format, Activation | None]] = {
    "FP8": (replace(FP8_TENSOR, scale=_WIDE), Activation(FP8_TENSOR, "static")),
    "FP8_PER_CHANNEL_PER_TOKEN": (replace(FP8_ROW, scale=_WIDE), Activation(FP8_ROW)),
    "FP8_PB_WO": (replace(FP8_128x128, scale=_WIDE), None),
    "NVFP4": (NVFP4, Activation(NVFP4, "local")),
    "W4A16_NVFP4": (NVFP4, None),
    "MXFP8": (MXFP8, Activation(MXFP8)),
}
# Its config's form of an fp8 cache, which has a scale a layer.
_FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
_KV = re.compile(r"\.(?:k_proj\.(k_scale)|v_proj\.(v_scale))$")


class ModelOpt(Layout):
    """Reads ModelOpt's unified checkpoints."""

    method = "modelopt"
    marks = frozenset({"weight_scale", "weight_scale_2"})
    parts = frozenset({"weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})
    told = frozenset({"weight_scale", "input_scale"})

    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """See `Layout`."""
        del module
        if "pre_quant_scale" in parts:
            raise CheckpointError("it has a pre_quant_scale, which multiplies its input; lowbit reads ModelOpt without")
        weight, scale = parts.get("weight"), parts.get("weight_scale")
        if weight is None or scale is None or weight.dim() != 2:
            msg = f"it has {', '.join(sorted(parts))}; needed are a matrix `weight` and its weight_scale"
            raise CheckpointError(msg)
        fmt, activation = _ALGOS[_algorithm(parts)]
        n, k = weight.shape
        shape = (n, k * 2) if fmt is NVFP4 else (n, k)
        stored: list[Entry] = [("weight", weight.dtype, (n, k))]
        if fmt.scale is not _WIDE or scale.dim() == 2:
            stored.append(("weight_scale", scale.dtype, fmt.scale_shape(shape)))
        fits(parts, stored)
        if fmt.scale is _WIDE:
            fmt = replace(fmt, scale=scale_element(parts, ("weight_scale", "input_scale"), self.dtype))
        return Outline(shape, fmt, activation, self.dtype)

    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """See `Layout`."""
        found = self.outline(module, parts)
        fmt, activation, scale = found.format, found.activation, parts["weight_scale"]
        scale = scale.view(E8M0.storage) if fmt is MXFP8 else scale
        two = from_weight_scale_2(only(parts["weight_scale_2"])) if fmt is NVFP4 else None
        stored = activation is not None and activation.scaling != "dynamic"
        return QuantizedTensor.from_parts(
            parts["weight"],
            Scales(scale.reshape(fmt.scale_shape(found.shape)).to(fmt.scale.storage), None, two),
            fmt,
            k=found.shape[1],
            dtype=found.dtype,
            activation=activation,
            act_scale=only(parts["input_scale"]).reshape(1, 1) if stored else None,
        )

    @property
    def cache_scheme(self) -> dict[str, Any] | None:
        """See `Layout`; kinds of caches that compressed-tensors has no scheme for are told by ModelOpt's name."""
        nested: Any = self.quantization.get("quantization")
        found: Any = (nested if isinstance(nested, dict) else {}).get("kv_cache_quant_algo")
        found = self.quantization.get("kv_cache_scheme") or self.quantization.get("kv_cache_quant_algo") or found
        if found == "FP8" or (isinstance(found, dict) and _is_fp8_cache(cast("dict[str, Any]", found))):
            return cache_scheme("fp8")
        return None if found is None else {"kv_cache_quant_algo": found}

    def cache_name(self, name: str) -> str | None:
        """See `Layout`."""
        return super().cache_name(_KV.sub(lambda found: f".{found[1] or found[2]}", name))


def _algorithm(parts: Mapping[str, Tensor]) -> str:
    weight, scale = parts["weight"], parts["weight_scale"]
    if weight.dtype == torch.uint8 and scale.dtype == _E4M3 and "weight_scale_2" in parts:
        return "NVFP4" if "input_scale" in parts else "W4A16_NVFP4"
    if weight.dtype == _E4M3 and scale.dtype == torch.uint8:
        return "MXFP8"
    if weight.dtype == _E4M3 and scale.dtype == torch.float32:
        if scale.numel() == 1 and "input_scale" in parts:
            return "FP8"
        if scale.numel() == weight.shape[0]:
            return "FP8_PER_CHANNEL_PER_TOKEN"
        if scale.dim() >= 2:
            return "FP8_PB_WO"
    told = ", ".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in parts.items())
    msg = f"no quant_algo of ModelOpt that lowbit reads ({', '.join(_ALGOS)}) has {told}"
    raise CheckpointError(msg)


class ModelOptWriter(Writer):
    """Writes ModelOpt's unified checkpoints."""

    name = "modelopt"

    def refusal(self, outline: Outline) -> str | None:
        """See `Writer`."""
        if len(outline.shape) == 2 and _algo_of(outline) is not None:
            return None
        return (
            f"ModelOpt's layout holds {', '.join(_ALGOS)}, none of which is {outline.format} with "
            f"{outline.activation or 'plain'} inputs"
        )

    def entries(self, outline: Outline) -> list[Entry]:
        """See `Writer`."""
        (n, k), fmt = outline.shape, outline.format
        if fmt is NVFP4 or fmt == NVFP4:
            stored: list[Entry] = [
                ("weight", torch.uint8, (n, k // 2)),
                ("weight_scale", _E4M3, (n, k // 16)),
                ("weight_scale_2", torch.float32, ()),
            ]
        elif fmt.scale is E8M0:
            stored = [("weight", _E4M3, (n, k)), ("weight_scale", torch.uint8, fmt.scale_shape((n, k)))]
        else:
            shape = fmt.scale_shape((n, k))
            stored = [("weight", _E4M3, (n, k)), ("weight_scale", torch.float32, () if shape == (1, 1) else shape)]
        activation = outline.activation
        if activation is not None and activation.scaling != "dynamic":
            stored.append(("input_scale", torch.float32, ()))
        return stored

    def tensors(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Writer`."""
        n, k = weight.shape
        outline = Outline((n, k), weight.format, weight.activation, weight.dtype)
        two = weight.tensor_scale
        given: dict[str, Tensor | None] = {
            "weight": weight.qdata,
            "weight_scale": weight.scale,
            "weight_scale_2": None if two is None else to_weight_scale_2(one_number(two)),
            "input_scale": weight.act_scale,
        }
        stored: dict[str, Tensor] = {}
        for name, dtype, shape in self.entries(outline):
            tensor = given[name]
            if tensor is None:
                msg = f"it has no {name}; calibrate it first"
                raise CheckpointError(msg)
            wide = tensor.view(torch.uint8) if dtype == torch.uint8 else tensor.to(dtype)
            stored[name] = wide.reshape(-1)[0].clone() if shape == () else wide.reshape(shape)
        return stored

    def config(
        self, outlines: Mapping[str, Outline], ignored: Sequence[str], named: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `Writer`."""
        del named
        algos = {module: str(_algo_of(outline)) for module, outline in outlines.items()}
        kinds = set(algos.values())
        config: dict[str, Any] = {
            "quant_method": "modelopt",
            "quant_algo": kinds.pop() if len(kinds) == 1 else "MIXED_PRECISION",
            "producer": {"name": "lowbit", "version": version("lowbit-hf")},
            "ignore": list(ignored),
        }
        if config["quant_algo"] == "MIXED_PRECISION":
            config["quantized_layers"] = {module: {"quant_algo": algo} for module, algo in algos.items()}
        elif "NVFP4" in config["quant_algo"]:
            config["group_size"] = 16
        return config

    def files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """See `Writer`."""
        told = {
            "quant_algo": config["quant_algo"],
            "kv_cache_quant_algo": "FP8" if config.get("kv_cache_scheme") else None,
            "group_size": config.get("group_size"),
            "exclude_modules": config["ignore"],
        }
        more = {"quantized_layers": config["quantized_layers"]} if "quantized_layers" in config else {}
        return {"hf_quant_config.json": {"producer": config["producer"], "quantization": told | more}}

    def cache(self, scheme: Mapping[str, Any]) -> dict[str, Any] | None:
        """See `Writer`."""
        return {"kv_cache_scheme": dict(_FP8_CACHE)} if _is_fp8_cache(scheme) else None

    def cache_entry(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """See `Writer`."""
        return re.sub(r"\.([kv])_scale$", r".\1_proj.\1_scale", name), () if shape == (1,) else shape


def _is_fp8_cache(scheme: Mapping[str, Any]) -> bool:
    """Whether a scheme of a key-value cache is fp8 with a stored scale a layer, whatever else it says."""
    told = {name: value for name, value in scheme.items() if value is not None}
    given: dict[str, Any] = {"strategy": "tensor", "symmetric": True, "dynamic": False, **told}
    return given == given | _FP8_CACHE and (given["strategy"], given["symmetric"]) == ("tensor", True)


def _algo_of(outline: Outline) -> str | None:
    fmt = outline.format
    wide = fmt.element is E4M3FN and fmt.scale is not E8M0 and not fmt.tensor_scale
    fmt = replace(fmt, scale=_WIDE) if wide else fmt
    return next((name for name, kind in _ALGOS.items() if kind == (fmt, outline.activation)), None)
