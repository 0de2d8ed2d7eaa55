"""Rotary positions in a GGUF file: metadata, and for Llama 3's scaling a tensor of factors.

Source: llama.cpp's `conversion/base.py` and `conversion/llama.py`; transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

FREQUENCIES = "rope_freqs.weight"
"""The tensor (head size / 2,) that divides the frequencies."""

_TOLD = {
    "default": {"rope_type", "rope_theta"},
    "linear": {"rope_type", "rope_theta", "factor"},
    "yarn": {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"},
    "llama3": {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    | {"low_freq_factor", "high_freq_factor"},
}
# Factors are all that a file has of Llama 3's scaling; these are the settings that its models were made with.
_LLAMA3 = [
    {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0, 16.0, 4.0, 2.0)
]


def metadata_of(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp is told of a model's `rope_parameters`, by key without the architecture.

    Raises:
        CheckpointError: llama.cpp has no such positions, or no place for a setting of theirs.
    """
    kind = str(rope.get("rope_type", "default"))
    others = {key for key, value in rope.items() if value is not None} - _TOLD.get(kind, set())
    if rope.get("partial_rotary_factor") == 1.0:
        others.discard("partial_rotary_factor")
    if kind not in _TOLD or others:
        what = f"rope_type {kind!r}" if kind not in _TOLD else f"{', '.join(sorted(others))} of rope_type {kind!r}"
        msg = f"GGUF has no place that lowbit knows for {what}; it writes {', '.join(_TOLD)}"
        raise CheckpointError(msg)
    told: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        told |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        told["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return told


def factors_of(rope: Mapping[str, Any], head: int) -> Tensor | None:
    """Llama 3's factors (head / 2,) in float32; None: the positions need none."""
    if rope.get("rope_type") != "llama3":
        return None
    length, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequencies = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, head, 2, dtype=torch.float32) / head))
    wavelength = 2 * pi / frequencies
    smooth = (length / wavelength - low) / (high - low)
    between = 1.0 / ((1.0 - smooth) / factor + smooth)
    made = torch.where(wavelength > length / low, factor, between)
    return torch.where(wavelength < length / high, 1.0, made)


def parameters_of(told: Mapping[str, Any], factors: Tensor | None, head: int) -> dict[str, Any]:
    """The `rope_parameters` of metadata, by key without the architecture, and of a file's factors.

    Raises:
        CheckpointError: they mean what lowbit cannot tell transformers.
    """
    kind = str(told.get("rope.scaling.type", "none"))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": told.get("rope.freq_base", 10000.0)}
    if kind not in ("none", "linear", "yarn") or (factors is not None and kind != "none"):
        beside = "" if factors is None else f" beside {FREQUENCIES}"
        msg = f"rope.scaling.type is {kind!r}{beside}; lowbit reads none, linear and yarn, the factors alone"
        raise CheckpointError(msg)
    if factors is not None:
        for settings in _LLAMA3:
            found = {**rope, "rope_type": "llama3", **settings}
            made = factors_of(found, head)
            if made is not None and made.shape == factors.shape and torch.allclose(made, factors, rtol=1e-5):
                return found
        msg = f"{FREQUENCIES} holds factors of none of Llama 3's models, whose settings are all that transformers takes"
        raise CheckpointError(msg)
    if kind == "none":
        return rope
    rope |= {"rope_type": kind, "factor": told.get("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = told.get(
            "rope.scaling.original_context_length", told.get("context_length")
        )
    return rope
