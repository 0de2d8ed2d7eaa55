"""What weights are multiplied with: observed while a block runs, once for all weights that share an input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit import Activation, Format, LowbitError
from lowbit.element import BFLOAT16, FLOAT16
from lowbit.observer import (
    Hessian,
    Histogram,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    PerChannelMinMax,
    add_products,
)
from lowbit.reference import quantize_input
from lowbit_algos.watch import Product

Static = Literal["histogram", "minmax", "moving-average", "percentile"]
"""How the one range of a static activation is chosen."""

_STATIC: dict[Static, type[Observer]] = {
    "histogram": Histogram,
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a parameter is to become."""

    format: Format
    activation: Activation | None = None
    k_axis: int = -1


# Rows of every batch of an input that are kept as they are.
_SAMPLED = 32


class Lost(nn.Module):
    """What rounding takes from inputs x that it makes q of: `sum (x - q) q^T` and `sum (x - q)^2`, or each expert's."""

    cross: Tensor
    squares: Tensor

    def __init__(self, hessian: Tensor) -> None:
        super().__init__()
        self.register_buffer("cross", torch.zeros_like(hessian))
        self.register_buffer("squares", torch.zeros_like(hessian[..., 0]))

    def update(self, x: Tensor, q: Tensor, ends: Tensor | None) -> None:
        """Take in rows (M, K) and what they are rounded to; those of expert e end before row `ends[e]`."""
        lost = x.to(torch.float32) - q
        add_products(self.cross, lost, q, ends)
        start = 0
        for e, stop in enumerate([len(x)] if ends is None else ends.tolist()):
            self.squares.view(-1, x.shape[1])[e] += lost[start:stop].square().sum(0)
            start = stop


@dataclass(slots=True)
class Input:
    """What is known of the inputs that some weights share."""

    # The weights, in the order they were met.
    names: list[str]
    hessian: Hessian
    channels: PerChannelMinMax
    # For a static activation.
    range: Observer | None
    # Where the Hessian is of rounded inputs.
    lost: Lost | None = None
    # Some rows; None for experts.
    sample: Tensor | None = None
    # (E,): of the Hessian's tokens, those that experts were topped up with.
    extra: Tensor | None = None

    def take(self, rows: Tensor, ends: Tensor | None, activation: Activation | None) -> None:
        """Take in rows (M, K), for the Hessian alone; those of expert e end before row `ends[e]`."""
        if self.lost is not None and activation is not None and len(rows):
            x, rows = rows, rounded_input(rows, activation).to(torch.float32)
            self.lost.update(x, rows, ends)
        self.hessian.update(rows, ends)

    def by_expert(self) -> list[Tensor]:
        """What is known of each expert's inputs, (E, ..)."""
        return [self.hessian.hessian, self.hessian.tokens, *(() if self.lost is None else self.lost.buffers())]

    def divide(self, factors: Tensor) -> bool:
        """Make it what channels divided by positive `factors` (K,) would have been; False if that cannot be told.

        It can where all that is asked of inputs is their products and the largest of them.
        """
        if self.lost is not None or type(self.range) not in {type(None), MinMax}:
            return False
        by = factors.to(self.hessian.hessian.device)
        self.hessian.hessian.div_(torch.outer(by, by))
        self.channels.low.div_(by)
        self.channels.high.div_(by)
        if self.sample is not None:
            self.sample = self.sample / by.to(self.sample.dtype)
        if isinstance(self.range, MinMax):
            self.range.low.copy_(self.channels.low.amin())
            self.range.high.copy_(self.channels.high.amax())
        return True

    def observers(self) -> list[Observer]:
        """All of them."""
        return [self.hessian, self.channels, *([] if self.range is None else [self.range])]


class Observing:
    """A `see` for `Watch`: collects `inputs` by the name of each weight, one object for all that share an input.

    `aware`: Hessians are of inputs as the activation rounds them, and what that loses is known too. `pre_scales`
    multiply the inputs of weights first.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        targets: Mapping[str, Target],
        *,
        static: Static,
        aware: bool,
        pre_scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._parameters, self._targets, self._aware = parameters, targets, aware
        self._pre_scales = pre_scales or {}
        self._static = _STATIC[static]
        self.inputs: dict[str, Input] = {}
        # Inputs of this pass over the block, by memory; kept alive, so that no other takes their place.
        self._alive: dict[tuple[object, ...], tuple[str, Tensor]] = {}

    def next_batch(self) -> None:
        """Forget what the last batch's inputs were."""
        self._alive.clear()

    def __call__(self, product: Product) -> None:
        """Take in the inputs of a product."""
        name, x = product.name, product.x.detach()
        if name not in self.inputs:
            self._meet(name, x)
        found = self.inputs[name]
        # Those that share an input are observed once, at the first of them.
        if found.names[0] != name:
            return
        rows = x.reshape(-1, x.shape[-1])
        if name in self._pre_scales:
            rows = rows * self._pre_scales[name].to(rows.dtype)
        if product.ends is None:
            some = rows[:: max(len(rows) // _SAMPLED, 1)][:_SAMPLED]
            found.sample = some.clone() if found.sample is None else torch.cat((found.sample, some))
        found.channels.update(rows)
        if found.range is not None:
            found.range.update(rows)
        found.take(rows, product.ends, self._targets[name].activation)

    def _meet(self, name: str, x: Tensor) -> None:
        target, parameter = self._targets[name], self._parameters[name]
        key = (x.data_ptr(), tuple(x.shape), target.activation, parameter.dim())
        if parameter.dim() == 2 and key in self._alive:
            leader, _ = self._alive[key]
            self.inputs[name] = self.inputs[leader]
            self.inputs[name].names.append(name)
            return
        self._alive[key] = name, x
        k, experts = x.shape[-1], len(parameter) if parameter.dim() == 3 else None
        scaling = "dynamic" if target.activation is None else target.activation.scaling
        # A tensor scale above block scales has to leave room for the largest of them.
        ranges = {"static": self._static, "local": MinMax}
        found = Input(
            [name], Hessian(k, experts), PerChannelMinMax(k), ranges[scaling]() if scaling in ranges else None
        )
        for observer in found.observers():
            observer.to(x.device)
        if self._aware and target.activation is not None:
            found.lost = Lost(found.hessian.hessian)
        self.inputs[name] = found

    def all_reduce(self) -> None:
        """Join what the processes of a run have seen."""
        unique = {id(found): found for found in self.inputs.values()}
        for found in unique.values():
            for observer in found.observers():
                observer.all_reduce()
            for part in () if found.lost is None else found.lost.buffers():
                dist.all_reduce(part)
            if found.sample is not None:
                dist.broadcast(found.sample, 0)

    def finish(self) -> dict[str, Input]:
        """What was observed.

        Raises:
            LowbitError: a parameter that is to be quantized was multiplied with nothing.
        """
        if dist.is_initialized():
            self.all_reduce()
        missing = [name for name in self._targets if name not in self.inputs]
        if missing:
            raise LowbitError(
                f"no product with {missing[0]} was seen while its block ran ({len(missing)} of {len(self._targets)} "
                "parameters); keep what the model does not multiply with, or quantize it by rounding to nearest"
            )
        return self.inputs


def rounded_input(
    x: Tensor, activation: Activation, act_scale: Tensor | None = None, act_zero: Tensor | None = None
) -> Tensor:
    """`x` (M, K) as the layer sees it, in its dtype; without a stored scale, one is chosen from this `x`."""
    if activation.scaling != "dynamic" and act_scale is None:
        activation = replace(activation, scaling="dynamic")
    return quantize_input(x, activation, act_scale, act_zero).values().to(x.dtype)


def static_scale(
    found: Input, activation: Activation | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """`act_scale` and `act_zero` of an activation, (1, 1), from what was observed; None where it has none.

    A scale holds what the weight's `dtype` can hold of it, for that is how files store it.

    Raises:
        FormatError: no input, or one that is not finite, was seen.
    """
    if activation is None or found.range is None:
        return None, None
    stored = next((e for e in (BFLOAT16, FLOAT16) if e.storage == dtype), activation.format.scale)
    local = activation.scaling == "local"
    scales = found.range.qparams(activation.format if local else replace(activation.format, scale=stored))
    if local:
        return scales.tensor_scale, None
    return scales.scale.to(torch.float32), scales.zero
