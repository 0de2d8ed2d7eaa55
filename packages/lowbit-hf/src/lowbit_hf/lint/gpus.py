"""GPU names and the CUDA compute capabilities they stand for."""

from __future__ import annotations

import re

from lowbit.errors import RecipeError

GPUS = {
    "v100": 70,
    "t4": 75,
    "rtx2080": 75,
    "a100": 80,
    "a30": 80,
    "a10": 86,
    "a10g": 86,
    "a40": 86,
    "rtx3090": 86,
    "l4": 89,
    "l40": 89,
    "l40s": 89,
    "rtx4090": 89,
    "h100": 90,
    "h200": 90,
    "h20": 90,
    "gh200": 90,
    "b200": 100,
    "gb200": 100,
    "b300": 103,
    "gb300": 103,
    "rtx5090": 120,
    "rtxpro6000": 120,
    "gb10": 121,
}
"""Compute capability, 75 for 7.5, by name.

Source: https://developer.nvidia.com/cuda-gpus
"""


def capability_of(gpu: str) -> int:
    """The compute capability of a GPU given as `sm90` or by name, in any case.

    Raises:
        RecipeError: the name is unknown.
    """
    name = re.sub(r"[\s_-]", "", gpu.lower())
    match = re.fullmatch(r"sm(\d{2,3})a?", name)
    if match is not None:
        return int(match[1])
    if name not in GPUS:
        raise RecipeError(f"{gpu!r} is no GPU known here; give a capability such as sm90, or one of {', '.join(GPUS)}")
    return GPUS[name]


def describe(capability: int | None, *, exact: bool = False) -> str:
    """What GPUs a capability stands for, in words."""
    if capability is None:
        return "any device"
    number = f"sm{capability}"
    return f"{number} only" if exact else f"{number} and up"
