"""The operators `quantize` and `quantize_both`: scales, codes and packing from as few reads as there can be.

A tile of values is read along whichever dim is contiguous in memory, and everything follows while it is in registers.
One read is all there is where a tile holds whole blocks; a scale of a longer row, of a whole matrix, or a tensor scale
that is not given needs one more, before. What tiles there are is `_Tile`'s choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.blocked import blocked_shape
from lowbit.errors import FormatError
from lowbit.format import WHOLE, Format
from lowbit.numerics import Rounding, ScaleMode, Scales, check_choice, check_scales, data_shape
from lowbit_kernels_cuda.scaling import (
    Spec,
    decode,
    divide,
    divisor_of,
    encode,
    from_ordered,
    magnitude,
    merge,
    ordered,
    raw,
    scale_of_amax,
    scale_of_range,
    scale_value,
    spec,
    to_float32,
    uniform,
)
