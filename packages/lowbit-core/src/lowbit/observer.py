"""Observers: what is remembered of values that pass by, so that formats can be fitted to them later.

What an observer knows are buffers, each with a reduction (a sum, a minimum or a maximum) that joins two of them. So
statistics are saved with the model, move with it, and come out the same whichever process saw which values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit.errors import FormatError
from lowbit.format import WHOLE, Format
from lowbit.numerics import DEFAULT_MODE, ScaleMode, Scales, choose_scale, decode, encode

__all__ = [
    "AbsMax",
    "Hessian",
    "Histogram",
    "MinMax",
    "MovingAverage",
    "Observer",
    "PerChannelAbsMax",
    "PerChannelMinMax",
    "Percentile",
]

Reduction = Literal["sum", "min", "max"]

_JOIN: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}
# Of a range, those that a search for the least squared error tries, from all of it down to a twentieth.
_SHARES = tuple(1 - i / 80 for i in range(77))
_CODES = 1 << 16


class Observer(nn.Module):
    """Statistics of all values seen, in buffers that `reductions` says how to join.

    Buffers move with `.to`, but keep their dtype: a model cast to bfloat16 is no reason to round its statistics.
    """

    reductions: ClassVar[dict[str, Reduction]]

    def update(self, x: Tensor) -> None:
        """Take in a float tensor of any shape."""
        raise NotImplementedError

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """Low and high ends, float32 (C,) (one for observers that do not tell channels apart), that `fmt` should span.

        Raises:
            FormatError: the observer knows no range.
        """
        raise NotImplementedError

    def qparams(self, fmt: Format, *, mode: ScaleMode = DEFAULT_MODE) -> Scales:
        """Scales (C, 1), zero points and a tensor scale that fit values like those seen, one scale a channel.

        Of the format all parts count but the block. A format with a tensor scale gets one for all that was seen.

        Raises:
            FormatError: nothing was seen, or a NaN or an infinity was, or the observer knows no range.
        """
        low, high = self.range(fmt)
        if bool((low > high).any()):
            raise FormatError(f"{type(self).__name__} has seen no values; run the model on calibration data first")
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise FormatError(f"{type(self).__name__} has seen a NaN or an infinity; repair the model, or its inputs")
        return choose_scale(torch.stack((low, high), -1), fmt.with_block(1, WHOLE), mode=mode)

    def merge(self, other: Self) -> None:
        """Take in all that another observer of the same kind has seen.

        Raises:
            FormatError: it is of another kind, or sees other channels.
        """
        if type(other) is not type(self):
            raise FormatError(f"{type(self).__name__} cannot take in what {type(other).__name__} has seen")
        for name, reduction in self.reductions.items():
            mine, theirs = self.get_buffer(name), other.get_buffer(name)
            if mine.shape != theirs.shape:
                raise FormatError(f"{name} is of shape {tuple(mine.shape)} here and {tuple(theirs.shape)} there")
            mine.copy_(_JOIN[reduction](mine, theirs.to(mine.device)))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Let every process of `group` know what all of them have seen; each has to call this."""
        for name, reduction in self.reductions.items():
            dist.all_reduce(self.get_buffer(name), getattr(dist.ReduceOp, reduction.upper()), group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - nn.Module's
        del recurse
        for name in self.reductions:
            kept, moved = self.get_buffer(name), fn(self.get_buffer(name))
            setattr(self, name, moved if moved.dtype == kept.dtype else kept.to(moved.device))
        return self


class MinMax(Observer):
    """The least and the largest value."""

    reductions: ClassVar[dict[str, Reduction]] = {"low": "min", "high": "max"}
    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.full((1,), torch.inf))
        self.register_buffer("high", torch.full((1,), -torch.inf))

    def update(self, x: Tensor) -> None:
        """Take in a float tensor of any shape."""
        if x.numel():
            low, high = torch.aminmax(x.detach())
            self.low.copy_(torch.minimum(self.low, low.to(torch.float32)))
            self.high.copy_(torch.maximum(self.high, high.to(torch.float32)))

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """All that was seen."""
        del fmt
        return self.low, self.high


class AbsMax(Observer):
    """The largest magnitude."""

    reductions: ClassVar[dict[str, Reduction]] = {"amax": "max"}
    amax: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", torch.full((1,), -torch.inf))

    def update(self, x: Tensor) -> None:
        """Take in a float tensor of any shape."""
        if x.numel():
            self.amax.copy_(torch.maximum(self.amax, x.detach().abs().amax().to(torch.float32)))

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """From the largest magnitude below zero to that above."""
        del fmt
        return -self.amax, self.amax


class MovingAverage(Observer):
    """The mean, over all updates, of each one's least and largest value: what one batch spans, give or take.

    Every update counts the same, whenever it came, so that processes can be joined.
    """

    reductions: ClassVar[dict[str, Reduction]] = {"low_sum": "sum", "high_sum": "sum", "count": "sum"}
    low_sum: Tensor
    high_sum: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in self.reductions:
            self.register_buffer(name, torch.zeros(1, dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Take in a float tensor of any shape."""
        if x.numel():
            low, high = torch.aminmax(x.detach())
            self.low_sum += low
            self.high_sum += high
            self.count += 1

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """The mean ends."""
        del fmt
        if not bool(self.count):
            return self.low_sum.new_full((1,), torch.inf), self.low_sum.new_full((1,), -torch.inf)
        return (self.low_sum / self.count).to(torch.float32), (self.high_sum / self.count).to(torch.float32)


class PerChannelMinMax(Observer):
    """The least and the largest value of each of `channels`, which are the last dim of what is seen."""

    reductions: ClassVar[dict[str, Reduction]] = {"low": "min", "high": "max"}
    low: Tensor
    high: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.full((channels,), torch.inf))
        self.register_buffer("high", torch.full((channels,), -torch.inf))

    def update(self, x: Tensor) -> None:
        """Take in a float tensor (.., channels)."""
        rows = _rows(x, len(self.low))
        if len(rows):
            low, high = torch.aminmax(rows, dim=0)
            self.low.copy_(torch.minimum(self.low, low.to(torch.float32)))
            self.high.copy_(torch.maximum(self.high, high.to(torch.float32)))

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """Each channel's own."""
        del fmt
        return self.low, self.high


class PerChannelAbsMax(Observer):
    """The largest magnitude of each of `channels`, which are the last dim of what is seen."""

    reductions: ClassVar[dict[str, Reduction]] = {"amax": "max"}
    amax: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("amax", torch.full((channels,), -torch.inf))

    def update(self, x: Tensor) -> None:
        """Take in a float tensor (.., channels)."""
        rows = _rows(x, len(self.amax))
        if len(rows):
            self.amax.copy_(torch.maximum(self.amax, rows.abs().amax(0).to(torch.float32)))

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """Each channel's own."""
        del fmt
        return -self.amax, self.amax


class _Counts(Observer):
    """How often each bfloat16 value was seen; exact for bfloat16 inputs, others are rounded to it first."""

    reductions: ClassVar[dict[str, Reduction]] = {"counts": "sum"}
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        # By bit pattern, and so in the order of the values but for negative ones.
        self.register_buffer("counts", torch.zeros(_CODES, dtype=torch.int64))

    def update(self, x: Tensor) -> None:
        """Take in a float tensor of any shape."""
        bits = x.detach().to(torch.bfloat16).contiguous().view(torch.int16).flatten()
        self.counts += torch.bincount(bits.to(torch.int32) & (_CODES - 1), minlength=_CODES)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Values seen, float32 in ascending order, and how often; infinities and NaN (sorted last) too."""
        bits = self.counts.nonzero().flatten()
        values = bits.to(torch.int16).view(torch.bfloat16).to(torch.float32)
        values, order = values.sort()
        return values, self.counts[bits][order]

    def _ends(self) -> tuple[Tensor, Tensor]:
        values, _ = self.seen()
        if not len(values):
            return self.counts.new_full((1,), torch.inf, dtype=torch.float32), values.new_full((1,), -torch.inf)
        # NaN is sorted last, and says more than whatever is least.
        return (values[-1:] if bool(values[-1].isnan()) else values[:1]), values[-1:]


class Percentile(_Counts):
    """The range that holds `percent` of all values, an equal share left out at either end."""

    def __init__(self, percent: float = 99.99) -> None:
        super().__init__()
        if not 0 < percent <= 100:
            raise FormatError(f"percent={percent} must lie above 0 and be at most 100")
        self.percent = percent

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """The values at both ends of that share."""
        del fmt
        low, high = self._ends()
        if not bool(low <= high) or not bool((low.isfinite() & high.isfinite()).all()):
            return low, high
        values, counts = self.seen()
        rank = counts.cumsum(0)
        cut = int(rank[-1]) * (100 - self.percent) / 200
        first = int((rank > cut).nonzero()[0])
        last = int((rank >= int(rank[-1]) - cut).nonzero()[0])
        return values[first : first + 1], values[last : last + 1]


class Histogram(_Counts):
    """The range under which a format changes the values seen least, by the sum of squares."""

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """The best of ranges shrunk at both ends alike, then at each end alone where the format can use that."""
        low, high = self._ends()
        if not bool(low <= high) or not bool((low.isfinite() & high.isfinite()).all()):
            return low, high
        shares = torch.tensor(_SHARES, device=low.device)
        if fmt.zero is None:
            amax = torch.maximum(-low, high)
            best = self._best(-amax * shares, amax * shares, fmt)
            return -amax * shares[best], amax * shares[best]
        low, high = low.clamp_max(0), high.clamp_min(0)
        best = self._best(low * shares, high * shares, fmt)
        low, high = low * shares[best], high * shares[best]
        low = low * shares[self._best(low * shares, high.expand(len(shares)), fmt)]
        high = high * shares[self._best(low.expand(len(shares)), high * shares, fmt)]
        return low, high

    def _best(self, low: Tensor, high: Tensor, fmt: Format) -> Tensor:
        """Index of the range (C,) of least squared error."""
        values, counts = self.seen()
        rows = fmt.with_block(1, WHOLE)
        scales = choose_scale(torch.stack((low, high), -1), rows)
        x = values.expand(len(low), -1)
        rounded = decode(encode(x, rows, scales), rows, scales, x.shape[-1])
        return ((rounded - x).to(torch.float64).square() @ counts.to(torch.float64)).argmin()


class Hessian(Observer):
    """`sum x x^T` (K, K) in float32 over inputs x, and how many there were; with `experts`, one for each of them."""

    reductions: ClassVar[dict[str, Reduction]] = {"hessian": "sum", "tokens": "sum"}
    hessian: Tensor
    tokens: Tensor

    def __init__(self, k: int, experts: int | None = None) -> None:
        super().__init__()
        self.register_buffer("hessian", torch.zeros((k, k) if experts is None else (experts, k, k)))
        self.register_buffer("tokens", torch.zeros(experts or 1, dtype=torch.int64))

    def update(self, x: Tensor, ends: Tensor | None = None) -> None:
        """Take in rows (.., K); with experts, those of expert e end before row `ends[e]`.

        Raises:
            FormatError: rows are of another length, or `ends` is missing or left over.
        """
        rows = _rows(x, self.hessian.shape[-1])
        if (ends is None) != (self.hessian.dim() == 2):
            raise FormatError("a Hessian with experts needs to know where each one's rows end, and only that one does")
        self.tokens += add_products(self.hessian, rows, rows, ends)

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """There is none.

        Raises:
            FormatError: always.
        """
        raise FormatError(f"a Hessian knows no range to fit {fmt} to; it is what GPTQ needs. Observe with MinMax too")


def add_products(total: Tensor, x: Tensor, y: Tensor, ends: Tensor | None) -> Tensor:
    """Add `sum x y^T` over rows of x and y (M, K) to `total`, in place; returns how many rows there were, (1,) or (E,).

    `total` is (K, K), or (E, K, K) with those of expert e ending before row `ends[e]`.
    """
    if ends is None:
        _add_product(total, x, y)
        return torch.full((1,), len(x), device=total.device)
    start, stops = 0, ends.tolist()
    for e, stop in enumerate(stops):
        _add_product(total[e], x[start:stop], y[start:stop])
        start = stop
    return torch.diff(torch.tensor([0, *stops], device=total.device))


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    if x.is_cuda and x.dtype == y.dtype and x.dtype in {torch.bfloat16, torch.float16}:
        # Products of 16-bit floats are exact in float32, and tensor cores add them up in it, ten times as fast.
        torch.ops.aten.addmm.dtype_out(total, x.T, y, torch.float32, out=total)
    else:
        total.addmm_(x.to(torch.float32).T, y.to(torch.float32))


def _rows(x: Tensor, channels: int) -> Tensor:
    """`x` (.., channels) as rows.

    Raises:
        FormatError: it has other channels.
    """
    if x.dim() == 0 or x.shape[-1] != channels:
        raise FormatError(f"values of shape {tuple(x.shape)} were seen where the last dimension had to be {channels}")
    return x.detach().reshape(-1, channels)
