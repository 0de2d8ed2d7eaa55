"""What the machine can do at best, measured beside the rest: a copy, and a product of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from lowbit.bench.inputs import normal
from lowbit.bench.timing import Run, Timing, time_calls

# Bytes that are copied, of which the fastest counts (by how they fall on channels of memory, rates of a GPU differ by a
# fifth), and the side of the square matrices; enough to keep the device busy.
_SIZES = {"cuda": ((3 << 27, 1 << 30), 8192), "cpu": ((1 << 28,), 2048)}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates that no kernel goes much beyond, and the measurements behind them."""

    # Bytes read and written a second, by a copy of `copied` bytes.
    bytes_per_s: float
    copied: int
    # Floating-point operations a second, of a product of `side` x `side` matrices of `dtype`.
    flops_per_s: float
    side: int
    dtype: str
    copy: Timing
    product: Timing

    def seconds(self, moved: float, flops: float) -> float:
        """The least time for what must be moved and computed, the two at once."""
        return max(moved / self.bytes_per_s, flops / self.flops_per_s)


def measure_ceilings(device: torch.device, *, budget: float) -> Ceilings:
    """Both rates of `device`, on random data."""
    sizes, side = _SIZES["cuda" if device.type == "cuda" else "cpu"]

    def copying(size: int, i: int) -> Run:
        source = normal(size // 2, kind="normal", seed=i, device=device)
        return partial(torch.empty_like(source).copy_, source)

    def multiplying(side: int, dtype: torch.dtype, i: int) -> Run:
        a, b = (normal(side, side, kind="normal", seed=2 * i + j, device=device, dtype=dtype) for j in range(2))
        return partial(torch.mm, a, b)

    dtype = torch.bfloat16
    if device.type == "cpu":
        # Without instructions for bfloat16, a processor takes a hundred times as long as in float32.
        # So large a footprint makes one copy of each.
        once = partial(time_calls, footprint=1 << 30, device=device, budget=0)
        dtype = min((dtype, torch.float32), key=lambda each: once(partial(multiplying, 256, each)).median)

    copies = [(size, time_calls(partial(copying, size), 2 * size, device, budget=budget)) for size in sizes]
    size, copy = min(copies, key=lambda each: each[1].median / each[0])
    product = time_calls(partial(multiplying, side, dtype), 2 * dtype.itemsize * side**2, device, budget=budget)
    told = str(dtype).removeprefix("torch.")
    return Ceilings(2 * size / copy.median, size, 2 * side**3 / product.median, side, told, copy, product)
