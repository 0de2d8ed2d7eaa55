"""The backend `flashinfer`: its NVFP4 casts, for those who ask for them by name.

With `g = 1 / tensor_scale`, and `~` for a reciprocal that the GPU approximates:

    scale = e4m3fn(g * (amax(block) * ~6))
    code  = e2m1(x * ~(scale * ~g))

lowbit divides, so codes and scales differ here and there by a step. A block of zeros has the scale 0, where lowbit has
1, and one too small for e4m3fn has 0, where lowbit has 2^-9. An infinity saturates and a NaN beside numbers becomes
one, where lowbit gives their block a NaN scale. Hence a priority below the reference's.

Source: flashinfer 0.7.2, `cvt_warp_fp16_to_fp4` and `get_sf_out_offset_128x4` of `quantization_utils.cuh`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import Call, Kernel
from lowbit.blocked import blocked_shape
from lowbit.conventions import to_global_scale
from lowbit.errors import NoKernelError
from lowbit.format import NVFP4
from lowbit.numerics import ScaleMode, check_choice
from lowbit_kernels_cuda.backend import refuses_gpu

_DTYPES = (torch.bfloat16, torch.float16)


class Flashinfer:
    """The backend; its entry point resolves to `backend`."""

    name = "flashinfer"

    def probe(self) -> str | None:
        """None where there is a GPU that converts to e2m1 by itself, and flashinfer is installed."""
        # Who has no such GPU is not told to install a gigabyte.
        if (refused := refuses_gpu((10, 0))) is not None:
            return refused
        if find_spec("flashinfer") is None:
            return "needs flashinfer, which is not installed here: pip install 'lowbit-kernels-cuda[flashinfer]'"
        return None

    def kernels(self) -> tuple[Kernel, ...]:
        """Both casts, with scales as they are and in tiles."""
        return (
            Kernel("flashinfer.quantize", "quantize", "cuda", -1, quantize, _refuses),
            Kernel("flashinfer.quantize_blocked", "quantize_blocked", "cuda", -1, quantize_blocked, _refuses),
        )


def quantize(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    fmt: str,
    mode: str,
    rounding: str,
    seed: int,
) -> list[Tensor]:
    """The op `quantize` of a matrix (m, k): codes (m, k/2), scales (m, k/16), the tensor scale.

    Raises:
        NoKernelError: block scales are given, or the call is none that `_check` takes.
    """
    del zero, fmt, seed
    if scale is not None:
        raise NoKernelError(
            "flashinfer chooses block scales, and some are given; leave them out or use another backend"
        )
    return _cast(x, tensor_scale, mode, rounding, "layout_linear", (x.shape[0], x.shape[-1] // 16))


def quantize_blocked(
    x: Tensor, tensor_scale: Tensor | None, fmt: str, mode: str, rounding: str, seed: int
) -> list[Tensor]:
    """The op `quantize_blocked` of a matrix (m, k): codes (m, k/2), scales in tiles, the tensor scale.

    Raises:
        NoKernelError: the call is none that `_check` takes.
    """
    del fmt, seed
    return _cast(x, tensor_scale, mode, rounding, "layout_128x4", blocked_shape((x.shape[0], x.shape[-1] // 16)))


def _cast(
    x: Tensor, tensor_scale: Tensor | None, mode: str, rounding: str, layout: str, shape: tuple[int, ...]
) -> list[Tensor]:
    whole = _check(x, tensor_scale, mode, rounding)
    flashinfer: Any = import_module("flashinfer")
    # Of one row, also a column counts as contiguous, and flashinfer would transpose it.
    rows = x.reshape(-1).view(x.shape)
    with torch.cuda.device_of(x):
        data, scale = flashinfer.nvfp4_quantize(
            rows,
            to_global_scale(whole),
            sfLayout=getattr(flashinfer.SfLayout, layout),
            nvfp4_4over6=None,  # whatever its environment variables say
        )
    return [data, scale.view(NVFP4.scale.storage).reshape(shape), whole.clone()]


def _check(x: Tensor, tensor_scale: Tensor | None, mode: str, rounding: str) -> Tensor:
    """The tensor scale of a call that flashinfer has a cast for, as far as a `Call` does not tell.

    Raises:
        NoKernelError: it has none.
        FormatError: the mode is unknown.
    """
    if x.dim() != 2 or x.numel() == 0:
        raise NoKernelError(f"flashinfer needs one matrix with values; this is {tuple(x.shape)}; use another backend")
    if tensor_scale is None or tuple(tensor_scale.shape) != (1, 1):
        found = "none" if tensor_scale is None else f"of shape {tuple(tensor_scale.shape)}"
        raise NoKernelError(
            f"flashinfer needs a tensor scale of shape (1, 1); this is {found}; give one for the whole matrix, such as "
            "lowbit.numerics.tensor_scale_for_amax(x.abs().amax().float().reshape(1, 1), lowbit.NVFP4)"
        )
    check_choice("scale mode", mode, ScaleMode)  # scales that are no powers of two follow none
    if rounding != "nearest":
        raise NoKernelError(f"flashinfer needs rounding 'nearest'; this is {rounding!r}; use another backend")
    return tensor_scale


def _refuses(call: Call) -> str | None:
    if call.x_dtype not in _DTYPES:
        return f"needs values in bfloat16 or float16; these are {call.x_dtype}"
    if call.format != NVFP4:
        return f"needs NVFP4; this is {call.format}"
    if call.k is not None and call.k % 16:
        return f"needs rows of a multiple of 16 values; these have {call.k}"
    return None


backend = Flashinfer()
