"""The backend `x86`: every kernel of this distribution, and what keeps a machine from running them."""

from __future__ import annotations

import platform
from typing import Any

import torch

from lowbit.backends import Call, Kernel
from lowbit.bags import check_bags, check_rows
from lowbit_kernels_x86 import casts, library, weights
from lowbit_kernels_x86.library import contiguous


class X86:
    """The backend; its entry point resolves to `backend`."""

    name = "x86"

    def probe(self) -> str | None:
        """None on a machine whose processor the library is for."""
        if not library.FILE.exists():
            return f"needs an x86-64 processor and Linux; this is {platform.system()} on {platform.machine()}"
        try:
            library.isa()
        except RuntimeError as error:
            return str(error)
        return None

    def detail(self) -> str:
        """The instruction set whose kernels run here."""
        return library.isa()

    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel."""
        return (
            Kernel(
                *("x86.linear", "linear", "cpu", 10, weights.run, weights.refuses, weights.pack, weights.unpack),
                lookup=weights.lookup,
            ),
            Kernel(
                *("x86.grouped_mm", "grouped_mm", "cpu", 10),
                *(weights.run_grouped, weights.refuses, weights.pack, weights.unpack),
            ),
            Kernel("x86.embedding", "embedding", "cpu", 10, _embedding, _refuses_values),
            Kernel("x86.embedding_bag", "embedding_bag", "cpu", 10, _embedding_bag, _refuses_values),
            Kernel("x86.dequantize", "dequantize", "cpu", 10, casts.dequantize, _refuses_values),
            Kernel("x86.quantize", "quantize", "cpu", 10, casts.quantize, casts.refuses),
        )


def _embedding(ids: Any, qdata: Any, *rest: Any) -> Any:
    try:
        return torch.ops.lowbit_x86.embedding.default(*contiguous((ids, qdata, *rest[:3])), *rest[3:])
    except RuntimeError:
        # The library has looked; lowbit's own words for what it found, if it is that.
        check_rows(ids, qdata.shape[0])
        raise


def _embedding_bag(ids: Any, offsets: Any, weights: Any, qdata: Any, *rest: Any) -> Any:
    by = None if weights is None else weights.float()
    try:
        parts = contiguous((ids, offsets, by, qdata, *rest[:3]))
        return torch.ops.lowbit_x86.embedding_bag.default(*parts, *rest[3:])
    except RuntimeError:
        check_bags(ids, offsets)
        check_rows(ids, qdata.shape[0])
        raise


def _refuses_values(call: Call) -> str | None:
    if call.x_dtype not in weights.DTYPES:
        return f"needs values in float32, bfloat16 or float16; these are {call.x_dtype}"
    fmt = call.format
    assert fmt is not None
    return None if len(fmt.block) == 2 else f"needs blocks of rows and columns; this is {fmt}"


backend = X86()
