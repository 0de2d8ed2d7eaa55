"""The backend `cuda`: every kernel of this distribution, and what keeps a machine from running them.

Kernels are imported when they first run, so that finding the backend needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.fx import Graph

from lowbit.backends import Call, Kernel
from lowbit.format import WHOLE
from lowbit_kernels_cuda import any_attention, attention, block_scaled, flash3, packed, plain_bytes

_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPS = (16, 32, 64, 128, 256)
_SQUARES = ((16, 16), (128, 128))
# The most channels of a head whose results fit registers.
_CHANNELS = 256


class Cuda:
    """The backend; its entry point resolves to `backend`."""

    name = "cuda"

    def probe(self) -> str | None:
        """None on a machine with a GPU that the kernels run on."""
        if find_spec("triton") is None:
            return "needs triton, which is not installed here: pip install triton (it has wheels for Linux)"
        return refuses_gpu(_CAPABILITY)

    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel."""
        return (
            _row("round_columns", "algos.round_columns", 10, "columns:round_columns", _takes_all),
            _row("round_groups", "algos.round_groups", 10, "columns:round_groups", _shared_scales),
            Kernel("cuda.adamw", "moe.adamw", "cuda", 10, _adamw, _takes_all),
            _row("quantize", "quantize", 10, "casts:quantize", _refuses_cast),
            _row("quantize_blocked", "quantize_blocked", 10, "casts:quantize_blocked", _refuses_cast),
            _row("quantize_both", "quantize_both", 10, "casts:quantize_both", _refuses_cast),
            _row("quantize_rotated", "quantize_rotated", 10, "casts:quantize_rotated", _refuses_cast),
            _row("quantize_groups", "quantize_groups", 10, "casts:quantize_groups", _refuses_cast),
            _row("dequantize", "dequantize", 10, "values:dequantize", _refuses_cast),
            Kernel("cuda.attention", "attention", "cuda", 20, attention.run, attention.refuses, how=attention.how),
            Kernel("cuda.attention_fa3", "attention", "cuda", 20, flash3.run, flash3.refuses, how=flash3.how),
            Kernel(
                *("cuda.attention_any", "attention", "cuda", 10, any_attention.run, any_attention.refuses),
                how=any_attention.how,
            ),
            Kernel(
                *("cuda.varlen_attention", "varlen_attention", "cuda", 10),
                *(any_attention.run_varlen, any_attention.refuses),
                how=any_attention.how,
            ),
            _row("cache_write", "cache_write", 10, "cache_write:cache_write", _refuses_cache),
            _row("cached_attention", "cached_attention", 10, "cached_attention:cached_attention", _refuses_attention),
            _row("pad_groups", "pad_groups", 10, "groups:pad_groups", _takes_all),
            Kernel(
                *("cuda.linear", "linear", "cuda", 10),
                *(packed.run, packed.refuses, packed.pack, packed.unpack, packed.slower),
                how=packed.how,
            ),
            Kernel(
                *("cuda.linear_or_plain", "linear", "cuda", 11, packed.run_values, packed.refuses_values),
                *(packed.pack_values, packed.unpack_values),
                keeps=True,
            ),
            Kernel(
                *("cuda.grouped_mm", "grouped_mm", "cuda", 10),
                *(packed.run_grouped, packed.refuses, packed.pack, packed.unpack),
            ),
            Kernel(
                *("cuda.linear_bytes", "linear", "cuda", 20, plain_bytes.run, plain_bytes.refuses),
                *(plain_bytes.pack, plain_bytes.unpack),
                how=plain_bytes.how,
            ),
            Kernel(
                *("cuda.grouped_mm_bytes", "grouped_mm", "cuda", 20, plain_bytes.run_grouped, plain_bytes.refuses),
                *(plain_bytes.pack, plain_bytes.unpack),
            ),
            Kernel(
                *("cuda.scaled_mm", "scaled_mm", "cuda", 10, plain_bytes.run_scaled_mm, plain_bytes.refuses_scaled_mm),
                how=plain_bytes.how,
            ),
            Kernel(
                *("cuda.scaled_grouped_mm", "scaled_grouped_mm", "cuda", 10),
                *(plain_bytes.run_scaled_grouped_mm, plain_bytes.refuses_grouped),
            ),
            Kernel(
                *("cuda.scaled_grouped_mm_k", "scaled_grouped_mm_k", "cuda", 10),
                *(plain_bytes.run_scaled_grouped_mm_k, plain_bytes.refuses_grouped_k),
            ),
            Kernel(
                *("cuda.linear_block_scaled", "linear", "cuda", 20, block_scaled.run, block_scaled.refuses),
                *(block_scaled.pack, block_scaled.unpack),
            ),
            Kernel(
                *("cuda.scaled_mm_block_scaled", "scaled_mm", "cuda", 10),
                *(block_scaled.scaled_mm, block_scaled.refuses),
            ),
            _row("unpad_groups", "unpad_groups", 10, "groups:unpad_groups", _takes_all),
        )

    def fuse(self, graph: Graph) -> None:
        """See `lowbit_kernels_cuda.fusing`."""
        import_module("lowbit_kernels_cuda.fusing").fuse(graph)


def refuses_gpu(least: tuple[int, int]) -> str | None:
    """Why torch has no GPU of compute capability `least` here, or None."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU that torch can use; torch.cuda.is_available() is False here"
    found = torch.cuda.get_device_capability()
    if found < least:
        return f"needs a GPU of compute capability {least[0]}.{least[1]} or later; this one has {found[0]}.{found[1]}"
    return None


def _row(name: str, op: str, priority: int, target: str, refuses: Callable[[Call], str | None]) -> Kernel:
    """A row of the kernel `MODULE:FUNCTION` of this package."""

    def run(*args: Any) -> Any:
        # Triton launches on the current device, whatever its arguments are on.
        with torch.cuda.device_of(args[0]):
            return _function(target)(*args)

    return Kernel(f"cuda.{name}", op, "cuda", priority, run, refuses)


@cache
def _function(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(import_module(f"lowbit_kernels_cuda.{module}"), function)


def _adamw(kept: Any, items: Any, **options: Any) -> None:
    with torch.cuda.device_of(items[0].parameter):
        import_module("lowbit_kernels_cuda.adamw").adamw(kept, items, **options)


def _takes_all(call: Call) -> str | None:
    del call


def _shared_scales(call: Call) -> str | None:
    one = call.format is not None and call.format.block[-2] == 1
    return None if one else f"needs scales of one row; this is {call.format}"


def _refuses_cast(call: Call) -> str | None:
    if call.x_dtype not in _DTYPES:
        return f"needs values in float32, bfloat16 or float16; these are {call.x_dtype}"
    fmt = call.format
    assert fmt is not None
    if fmt.block in _SQUARES or (fmt.block[:-1] == (1,) and fmt.block[-1] in _GROUPS):
        return None
    if fmt.tensor_scale or fmt.block not in {(1, WHOLE), (WHOLE, WHOLE)}:
        return (
            "needs blocks of one row by 16, 32, 64, 128 or 256, of 16x16 or 128x128, or, without a tensor scale, whole "
            f"rows or whole matrices; this is {fmt}"
        )
    return None


def _refuses_cache(call: Call) -> str | None:
    if call.k is None or call.k % 2 or not 0 < call.k <= _CHANNELS:
        return f"needs heads of an even number of channels up to {_CHANNELS}; these have {call.k}"
    return None


def _refuses_attention(call: Call) -> str | None:
    if call.x_dtype == torch.float32:
        return "multiplies in float16, which holds no float32; needs queries in bfloat16 or float16"
    return _refuses_cache(call)


backend = Cuda()
