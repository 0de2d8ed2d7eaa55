"""Quantizing a model block by block, by what its blocks are fed.

Each block runs once to see what its weights are multiplied with, its weights are rounded, and, in sequential mode, it
runs again with them, so that the next block learns to live with what this one does. At no time is more needed than one
block, what it is fed, and what was observed of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit import LowbitError, QuantizedTensor, RecipeError, quantize
from lowbit.numerics import DEFAULT_MODE, ScaleMode
from lowbit.plan import Plan, plan
from lowbit.recipe import Recipe
from lowbit_algos.blocks import Batch, Call, capture, find_blocks
from lowbit_algos.gptq import Options
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Input, Observing, Static, Target, rounded_input, static_scale
from lowbit_algos.rounding import decibels, output_sqnr, round_weights, weight_sqnr, with_use
from lowbit_algos.watch import Product, Watch

# Batches by which the error that has gathered is judged.
_JUDGED = 4
# Channels told of for each input.
_OUTLIERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How weights are rounded, and by what."""

    rounding: Literal["nearest", "gptq"] = "gptq"
    # Whether a block is fed what quantized blocks before it make of the data, or what the original ones do.
    sequential: bool = True
    # Whether GPTQ sees inputs as the activation rounds them.
    activation_aware: bool = True
    # How static activations choose their range.
    static: Static = "histogram"
    # Tokens an expert should have seen; what it lacks, it is given of the mean of all experts. None: as many as it has
    # columns.
    expert_tokens: int | None = None
    # How e8m0 scales are rounded.
    mode: ScaleMode = DEFAULT_MODE
    # What GPTQ is told besides.
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """How one weight fared."""

    name: str
    weight_sqnr: float
    output_sqnr: float
    # Largest input channels: (channel, its amax over the median channel's).
    outliers: tuple[tuple[int, float], ...]
    # Tokens that each expert saw, and the experts that were given of the mean of all; () for matrices.
    tokens: tuple[int, ...]
    starved: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """How a block fared: its weights, its output's SQNR against the original model in dB, and seconds."""

    name: str
    layers: tuple[LayerResult, ...]
    sqnr: float
    seconds: float


Take = Callable[[BlockResult, Mapping[str, QuantizedTensor]], None]
"""Told of every block when it is done: what became of it, and its quantized weights by name."""


def calibrate_(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Batch],
    method: Method | None = None,
    *,
    take: Take | None = None,
) -> Plan:
    """Quantize `model`'s parameters in place as `recipe` says, by what `batches` make of them; returns the plan.

    A batch is what the model is called with: a tensor, or arguments by name. Weights outside the model's blocks are
    rounded to nearest. A model that cannot be quantized as a whole is left as it was. `take` is told of every block.

    Raises:
        RecipeError: as `plan`, or a weight outside the blocks is to have static activations.
        LowbitError: the model's blocks do not feed one another, a weight to quantize is never multiplied with, or
            values are not finite.
    """
    method = method or Method()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = plan(model, recipe, device=next((p.device for p in parameters.values()), "cpu"))
    targets = {
        row.name: Target(row.format, row.activation, row.k_axis)
        for row in result.rows
        if row.action == "quantize" and row.format is not None
    }
    blocks = find_blocks(model)
    done = {name: round_outside(name, parameters[name], targets[name], method) for name in outside(targets, blocks)}

    def keep(block: BlockResult, weights: Mapping[str, QuantizedTensor]) -> None:
        done.update(weights)
        if take is not None:
            take(block, weights)

    # Blocks are changed as they go; what they were comes back whatever happens.
    before = {name: parameters[name].data for name in targets}
    try:
        captured = capture(model, blocks, batches)
        walk = Walk(method, Hidden.of(captured.hidden))
        for (name, block), calls in zip(blocks.items(), captured.calls, strict=True):
            walk.step(name, block, targets, calls, keep)
    finally:
        for name, data in before.items():
            parameters[name].data = data
    fresh = {id(parameters[name]): nn.Parameter(weight, requires_grad=False) for name, weight in done.items()}
    for name, parameter in parameters.items():
        if id(parameter) in fresh:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, fresh[id(parameter)])
    return result


def outside(targets: Iterable[str], blocks: Iterable[str]) -> list[str]:
    """Those of the names that belong to no block."""
    prefixes = tuple(_prefix(block) for block in blocks)
    return [name for name in targets if not name.startswith(prefixes)]


def round_outside(name: str, weight: Tensor, target: Target, method: Method) -> QuantizedTensor:
    """A weight whose inputs are not observed, rounded to nearest.

    Raises:
        RecipeError: its activation has a range that only observation gives.
    """
    if target.activation is not None and target.activation.scaling != "dynamic":
        raise RecipeError(
            f"{name!r} lies outside the model's blocks, where inputs are not observed, and is to have "
            f"{target.activation.scaling} activations; keep it, or use dynamic ones"
        )
    q = quantize(weight, target.format, axis=target.k_axis, mode=method.mode)
    return with_use(q, target.activation)


class Walk:
    """The way through the blocks: what the next one is fed, and how far it is from the original model's.

    `hidden` is fed to the next block, `other` (a few batches) runs beside it: through the original blocks in sequential
    mode, through the quantized ones otherwise.
    """

    def __init__(self, method: Method, hidden: Hidden, other: Hidden | None = None) -> None:
        self.method, self.hidden = method, hidden
        self.other = other or Hidden.of([hidden[i] for i in range(self.judged(len(hidden)))])

    @staticmethod
    def judged(count: int) -> int:
        """Of so many batches, how many run through the other blocks too."""
        return min(_JUDGED, count)

    def step(
        self,
        name: str,
        block: nn.Module,
        targets: Mapping[str, Target],
        calls: Sequence[Call],
        take: Take,
        *,
        paths: tuple[Path | None, Path | None] = (None, None),
    ) -> None:
        """Quantize one block's share of `targets` (by name in the model), and go on to what the next one is fed.

        In the end the block holds the values of its quantized weights. `paths`: files for what comes after.
        """
        started, prefix = time.monotonic(), _prefix(name)
        mine = {key.removeprefix(prefix): target for key, target in targets.items() if key.startswith(prefix)}
        parameters = {key: block.get_parameter(key) for key in mine}
        after, beside = self.hidden.after(paths[0]), self.other.after(paths[1])
        seen = Observing(parameters, mine, static=self.method.static, aware=self.method.activation_aware)
        sequential = self.method.sequential
        with torch.no_grad():
            for i, call in enumerate(calls):
                seen.next_batch()
                with Watch(parameters, seen):
                    out = call(block, self.hidden[i])
                if not sequential:
                    after[i] = out
            if sequential:
                self._run(block, calls, self.other, beside)
            results, weights = self._round(prefix, parameters, mine, seen.finish())
            rounding = _Rounding(weights)
            for key, q in weights.items():
                parameters[key].data = q.dequantize()
            with Watch(parameters, rounding):
                if sequential:
                    self._run(block, calls, self.hidden, after)
                else:
                    self._run(block, calls, self.other, beside)
        self.hidden, self.other = after, beside
        whole = {prefix + key: q for key, q in weights.items()}
        take(BlockResult(name=name, layers=results, sqnr=self._sqnr(), seconds=time.monotonic() - started), whole)

    @staticmethod
    def _run(block: nn.Module, calls: Sequence[Call], fed: Hidden, after: Hidden) -> None:
        for i in range(len(fed)):
            after[i] = calls[i](block, fed[i])

    def _sqnr(self) -> float:
        """Of what the quantized blocks make of the data, against what the original ones do, in dB."""
        signal = noise = 0.0
        for i, other in enumerate(self.other):
            a, b = self.hidden[i].to(torch.float32), other.to(torch.float32)
            original = b if self.method.sequential else a
            signal += float(original.square().sum(dtype=torch.float64))
            noise += float((a - b).square().sum(dtype=torch.float64))
        return decibels(signal, noise)

    def _round(
        self, prefix: str, parameters: Mapping[str, Tensor], targets: Mapping[str, Target], inputs: Mapping[str, Input]
    ) -> tuple[tuple[LayerResult, ...], dict[str, QuantizedTensor]]:
        """A block's weights, one set that shares an input after the other."""
        results: list[LayerResult] = []
        weights: dict[str, QuantizedTensor] = {}
        method = self.method
        options = None if method.rounding == "nearest" else method.options
        for found in {id(found): found for found in inputs.values()}.values():
            group = {key: parameters[key].detach() for key in found.names}
            hessian, starved = feed_starved(found, method.expert_tokens)
            try:
                rounded = round_weights(group, targets, hessian, options, mode=method.mode)
                for key, (q, notes) in rounded.items():
                    act_scale, act_zero = static_scale(found, targets[key].activation, q.dtype)
                    weights[key] = with_use(q, targets[key].activation, act_scale=act_scale, act_zero=act_zero)
                    results.append(
                        LayerResult(
                            name=prefix + key,
                            weight_sqnr=weight_sqnr(group[key], q),
                            output_sqnr=output_sqnr(group[key], q, hessian, targets[key].k_axis),
                            outliers=_outliers(found),
                            tokens=tuple(found.hessian.tokens.tolist()) if group[key].dim() == 3 else (),
                            starved=starved,
                            notes=notes,
                        )
                    )
            except LowbitError as error:
                raise type(error)(f"{', '.join(prefix + key for key in group)}: {error}") from error
        return tuple(results), weights


class _Rounding:
    """A `see` for `Watch` that rounds inputs as the weights' activations do."""

    def __init__(self, weights: Mapping[str, QuantizedTensor]) -> None:
        self._weights = weights

    def __call__(self, product: Product) -> Tensor | None:
        """The rounded input, where the weight's activation rounds it."""
        q = self._weights[product.name]
        if q.activation is None or product.x.numel() == 0:
            return None
        return rounded_input(product.x.reshape(-1, product.x.shape[-1]), q.activation, q.act_scale, q.act_zero)


def feed_starved(found: Input, least: int | None) -> tuple[Tensor, tuple[int, ...]]:
    """The Hessian of an input, and the experts that saw fewer than `least` tokens (by default as many as columns).

    What these lack they are given of the mean of all experts' tokens; an expert that saw none has that alone.
    """
    hessian, tokens = found.hessian.hessian, found.hessian.tokens
    if hessian.dim() == 2:
        return hessian, ()
    lacking = (hessian.shape[-1] if least is None else least) - tokens
    starved = tuple((lacking > 0).nonzero().flatten().tolist())
    if not starved:
        return hessian, ()
    mean = hessian.sum(0) / tokens.sum()
    fed = hessian.clone()
    for e in starved:
        fed[e] += mean * lacking[e]
    return fed, starved


def _outliers(found: Input) -> tuple[tuple[int, float], ...]:
    low, high = found.channels.low, found.channels.high
    amax = torch.maximum(-low, high)
    ratio = amax / amax.median().clamp_min(torch.finfo(torch.float32).tiny)
    top = ratio.topk(min(_OUTLIERS, len(ratio)))
    return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _prefix(block: str) -> str:
    return f"{block}." if block else ""
