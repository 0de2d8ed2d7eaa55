"""Algorithms that quantize better than rounding to nearest, for every format of lowbit."""

from __future__ import annotations

from lowbit_algos.calibrate import Method, calibrate_
from lowbit_algos.gptq import Solution, gptq, solve

__all__ = ["Method", "Solution", "calibrate_", "gptq", "solve"]
