"""Algorithms that quantize better than rounding to nearest, for every format of lowbit."""

from __future__ import annotations

from lowbit_algos.calibrate import calibrate_
from lowbit_algos.gptq import Options, Solution, gptq, solve
from lowbit_algos.method import Method
from lowbit_algos.mixed import Candidate, Mixture, mix
from lowbit_algos.observed import Observation, ObservedLinear, observe

__all__ = [
    "Candidate",
    "Method",
    "Mixture",
    "Observation",
    "ObservedLinear",
    "Options",
    "Solution",
    "calibrate_",
    "gptq",
    "mix",
    "observe",
    "solve",
]
