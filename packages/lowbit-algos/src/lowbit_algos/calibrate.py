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
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit import LowbitError, QuantizedTensor, RecipeError, quantize
from lowbit.numerics import DEFAULT_MODE, ScaleMode
from lowbit.plan import Plan, plan
from lowbit.recipe import Recipe
from lowbit_algos.blocks import Batch, Call, capture, find_blocks
from lowbit_algos.folds import Fold, Run, find_folds, scale_axis
from lowbit_algos.gptq import Options
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Input, Observing, Static, Target, rounded_input, static_scale
from lowbit_algos.rounding import decibels, output_sqnr, round_weights, weight_sqnr, with_use
from lowbit_algos.smooth import Smoothed, Smoothing, smooth
from lowbit_algos.watch import Product, Watch

# Batches by which the error that has gathered is judged.
_JUDGED = 4
# Channels told of for each input.
_OUTLIERS = 3


Rounding = Literal["nearest", "clipped", "gptq"]

ALGORITHMS = ("rtn", "gptq", "smoothquant", "awq")
"""Names that `Method.of` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How weights are rounded, and what is done to them before."""

    # To nearest; to nearest under the scale of least loss; or by GPTQ.
    rounding: Rounding = "gptq"
    # Whether a block is fed what quantized blocks before it make of the data, or what the original ones do.
    sequential: bool = True
    # What is done before: factors that make inputs and weights alike hard to round, or weights easier.
    smoothing: Smoothing | None = None
    # The exponent of smoothing; None: the best of several.
    alpha: float | None = None
    # Whether factors that nothing takes over stay with the weight, which multiplies its input by them.
    pre_scale: bool = True
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

    @classmethod
    def of(cls, name: str, **more: Any) -> Method:
        """The method of algorithms joined by "+", such as `smoothquant+gptq`; `rtn` is rounding to nearest.

        Raises:
            RecipeError: a name is unknown, or two of them do the same.
        """
        smoothing, rounding = None, None
        for part in name.lower().split("+"):
            if part in ALGORITHMS[:2] and rounding is None:
                rounding = part
            elif part in ALGORITHMS[2:] and smoothing is None:
                smoothing = part
            else:
                raise RecipeError(
                    f"algorithm {name!r} is not known; it is rtn or gptq, smoothquant or awq, or one of each joined by "
                    "'+', such as awq+gptq"
                )
        # Without GPTQ, the search for scales is AWQ's other half.
        alone: Rounding = "clipped" if smoothing == "awq" else "nearest"
        return cls(rounding="gptq" if rounding == "gptq" else alone, smoothing=smoothing, **more)

    @property
    def name(self) -> str:
        """Its algorithms, joined by "+"."""
        parts = (self.smoothing, "gptq" if self.rounding == "gptq" else None)
        return "+".join(part for part in parts if part) or ("rtn" if self.rounding == "nearest" else "clipping")


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
    # Of all weights that share its input.
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """How a block fared: its weights, its output's SQNR against the original model in dB, and seconds."""

    name: str
    layers: tuple[LayerResult, ...]
    sqnr: float
    seconds: float


Take = Callable[[BlockResult, Mapping[str, Tensor]], None]
"""Told of every block when it is done: how it fared, and, by name, its parameters that changed."""


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
    done: dict[str, Tensor] = {
        name: round_outside(name, parameters[name], targets[name], method) for name in outside(targets, blocks)
    }

    def keep(block: BlockResult, weights: Mapping[str, Tensor]) -> None:
        done.update(weights)
        if take is not None:
            take(block, weights)

    # Blocks are changed as they go; what they were comes back whatever happens.
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        captured = capture(model, blocks, batches, probe=method.smoothing is not None)
        walk = Walk(method, Hidden.of(captured.hidden))
        for k, (name, block) in enumerate(blocks.items()):
            walk.step(name, block, targets, captured.calls[k], keep, probe=captured.probe(k, block))
    finally:
        for name, data in before.items():
            parameters[name].data = data
    fresh: dict[int, nn.Parameter] = {}
    for name, weight in done.items():
        if isinstance(weight, QuantizedTensor):
            fresh[id(parameters[name])] = nn.Parameter(weight, requires_grad=False)
        else:
            parameters[name].data = weight
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
        # By names and shapes of a block's parameters.
        self._folds: dict[tuple[object, ...], list[Fold]] = {}
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
        probe: Run | None = None,
        paths: tuple[Path | None, Path | None] = (None, None),
    ) -> None:
        """Quantize one block's share of `targets` (by name in the model), and go on to what the next one is fed.

        In the end the block holds the values of its quantized weights. `probe` runs it on a few
        tokens, for a method that smooths; `paths` are files for what comes after.
        """
        started, prefix = time.monotonic(), _prefix(name)
        mine = {key.removeprefix(prefix): target for key, target in targets.items() if key.startswith(prefix)}
        parameters = {key: block.get_parameter(key) for key in mine}
        after, beside = self.hidden.after(paths[0]), self.other.after(paths[1])
        sequential = self.method.sequential
        with torch.no_grad():
            if sequential:
                self._run(block, calls, self.other, beside)
            smoothed = self._smooth(block, mine, calls, probe)
            seen = self._observe(block, mine, calls, None if sequential else after, smoothed.pre_scales)
            originals = {key: smoothed.exact.get(key, parameter.detach()) for key, parameter in parameters.items()}
            results, weights = self._round(prefix, block, originals, mine, seen, smoothed.pre_scales)
            rounding = _Rounding(weights)
            del originals, seen
            for key, q in weights.items():
                parameters[key].data = _as_used(q)
            with Watch(parameters, rounding):
                if sequential:
                    self._run(block, calls, self.hidden, after)
                else:
                    self._run(block, calls, self.other, beside)
        self.hidden, self.other = after, beside
        whole: dict[str, Tensor] = {prefix + key: q for key, q in weights.items()}
        whole |= {prefix + key: block.get_parameter(key).data for key in smoothed.changed - weights.keys()}
        take(BlockResult(name=name, layers=results, sqnr=self._sqnr(), seconds=time.monotonic() - started), whole)

    def _observe(
        self,
        block: nn.Module,
        targets: Mapping[str, Target],
        calls: Sequence[Call],
        after: Hidden | None,
        pre_scales: Mapping[str, Tensor],
        *,
        aware: bool = True,
    ) -> dict[str, Input]:
        """What weights are multiplied with while the block runs, and what it returns in `after`."""
        parameters = {key: block.get_parameter(key) for key in targets}
        aware = aware and self.method.activation_aware
        seen = Observing(parameters, targets, static=self.method.static, aware=aware, pre_scales=pre_scales)
        for i, call in enumerate(calls):
            seen.next_batch()
            with Watch(parameters, seen):
                out = call(block, self.hidden[i])
            if after is not None:
                after[i] = out
        return seen.finish()

    def _smooth(
        self, block: nn.Module, targets: Mapping[str, Target], calls: Sequence[Call], probe: Run | None
    ) -> Smoothed:
        """Put factors in place, where the method has any."""
        method = self.method
        if method.smoothing is None or probe is None or not targets:
            return Smoothed({}, {}, frozenset())
        kind = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        if kind not in self._folds:
            axes = {name: -1 for name, p in block.named_parameters() if p.dim() in {2, 3}}
            axes |= {name: target.k_axis for name, target in targets.items()}
            self._folds[kind] = find_folds(block, axes, probe)
        inputs = self._observe(block, targets, calls, None, {}, aware=False)
        return smooth(
            block,
            targets,
            inputs,
            self._folds[kind],
            method.smoothing,
            alpha=method.alpha,
            mode=method.mode,
            pre_scale=method.pre_scale,
        )

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
        self,
        prefix: str,
        block: nn.Module,
        originals: Mapping[str, Tensor],
        targets: Mapping[str, Target],
        inputs: Mapping[str, Input],
        pre_scales: Mapping[str, Tensor],
    ) -> tuple[tuple[LayerResult, ...], dict[str, QuantizedTensor]]:
        """A block's weights, one set that shares an input after the other."""
        results: list[LayerResult] = []
        weights: dict[str, QuantizedTensor] = {}
        method = self.method
        options = None if method.rounding == "nearest" else method.options
        if method.rounding == "clipped":
            options = method.options | Options(act_order=False)
        # The smallest first, and each let go of when it is done with: the largest may be most of what memory holds.
        unique = {id(found): found for found in inputs.values()}.values()
        for found in sorted(unique, key=lambda found: found.hessian.hessian.numel()):
            started, group = time.monotonic(), {key: originals[key] for key in found.names}
            hessian, starved = feed_starved(found, method.expert_tokens)
            try:
                # Without what joins columns, no error travels, and what is left is the search for scales.
                apart = method.rounding == "clipped"
                used = torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1)) if apart else hessian
                rounded = round_weights(group, targets, used, options, mode=method.mode)
                for key, (q, notes) in rounded.items():
                    dtype = block.get_parameter(key).dtype
                    act_scale, act_zero = static_scale(found, targets[key].activation, dtype)
                    weights[key] = with_use(
                        q,
                        targets[key].activation,
                        dtype=dtype,
                        act_scale=act_scale,
                        act_zero=act_zero,
                        pre_scale=pre_scales.get(key),
                    )
                    results.append(
                        LayerResult(
                            name=prefix + key,
                            weight_sqnr=weight_sqnr(group[key], q),
                            output_sqnr=output_sqnr(group[key], q, hessian, targets[key].k_axis),
                            outliers=_outliers(found),
                            tokens=tuple(found.hessian.tokens.tolist()) if group[key].dim() == 3 else (),
                            starved=starved,
                            notes=notes,
                            seconds=time.monotonic() - started,
                        )
                    )
            except LowbitError as error:
                raise type(error)(f"{', '.join(prefix + key for key in group)}: {error}") from error
            found.hessian.to("meta")
        place = {prefix + key: i for i, key in enumerate(originals)}
        return tuple(sorted(results, key=lambda result: place[result.name])), weights


class _Rounding:
    """A `see` for `Watch` that rounds inputs as the weights' activations do."""

    def __init__(self, weights: Mapping[str, QuantizedTensor]) -> None:
        self._weights = weights

    def __call__(self, product: Product) -> Tensor | None:
        """The rounded input, where the weight's activation rounds it."""
        q = self._weights[product.name]
        if q.activation is None or product.x.numel() == 0:
            return None
        rows = product.x.reshape(-1, product.x.shape[-1])
        if q.pre_scale is None:
            return rounded_input(rows, q.activation, q.act_scale, q.act_zero)
        pre_scale = q.pre_scale.to(rows.dtype)
        return rounded_input(rows * pre_scale, q.activation, q.act_scale, q.act_zero) / pre_scale


def _as_used(q: QuantizedTensor) -> Tensor:
    """Plain values of a weight that is multiplied with its input as it comes."""
    values = q.dequantize()
    if q.pre_scale is None:
        return values
    return scale_axis(values.to(torch.float32), q.pre_scale, q.permutation.index(q.dim() - 1)).to(values.dtype)


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
