"""The way through a model's blocks, one at a time.

Each block runs once to see what its weights are multiplied with, its weights are rounded, and, in sequential mode, it
runs again with them, so that the next block learns to live with what this one does. At no time is more needed than one
block, what it is fed, and what was observed of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lowbit import LowbitError, QuantizedTensor
from lowbit.hadamard import Rotation
from lowbit.memory import release
from lowbit_algos.blocks import Call, Probe
from lowbit_algos.folds import Fold, find_folds
from lowbit_algos.gptq import DAMPING, Options
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Input, Observing, Target, static_scale
from lowbit_algos.learned import learn_block, used
from lowbit_algos.method import Method
from lowbit_algos.moments import Moments, fit, moments_of
from lowbit_algos.rotation import Turns, find_turns
from lowbit_algos.rounding import RoundInputs, decibels, output_sqnr, round_weights, weight_sqnr, with_use
from lowbit_algos.routing import top_up
from lowbit_algos.smooth import Smoothed, smooth
from lowbit_algos.watch import Watch

# Batches by which the error that has gathered is judged.
_JUDGED = 4
# Channels told of for each input.
_OUTLIERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """How one weight fared."""

    name: str
    weight_sqnr: float
    output_sqnr: float
    # Largest input channels: (channel, its amax over the median channel's).
    outliers: tuple[tuple[int, float], ...]
    # Tokens that the model sent to each expert; the experts that were sent more of them to be rounded by, and those
    # that were given of the mean of all; () for matrices.
    tokens: tuple[int, ...]
    topped: tuple[int, ...]
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


class Walk:
    """The way through the blocks: what the next one is fed, and how far it is from the original model's.

    `hidden` is fed to the next block, `other` (a few batches) runs beside it: through the original blocks in sequential
    mode, through the quantized ones otherwise.
    """

    def __init__(
        self, method: Method, hidden: Hidden, rotation: Rotation | None = None, other: Hidden | None = None
    ) -> None:
        self.method, self.hidden, self._rotation = method, hidden, rotation
        # By kind of block.
        self._folds: dict[tuple[object, ...], list[Fold]] = {}
        self._turns: dict[tuple[object, ...], Turns] = {}
        # For distillation: what weights were rounded from, by name.
        self.aims: dict[str, Tensor] = {}
        self.other = other or Hidden.of([hidden[i] for i in range(self.beside(method, len(hidden)))])

    @staticmethod
    def beside(method: Method, count: int) -> int:
        """Of so many batches, how many run through the other blocks too."""
        return count if method.learned else min(_JUDGED, count)

    def step(
        self,
        name: str,
        block: nn.Module,
        targets: Mapping[str, Target],
        calls: Sequence[Call],
        take: Take,
        *,
        probe: Probe | None = None,
        paths: tuple[Path | None, Path | None] = (None, None),
        feeding: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Quantize one block's share of `targets` (by name in the model), and go on to what the next one is fed.

        In the end the block holds the values of its quantized weights. `probe` runs it on a few tokens, for a method
        that smooths; `paths` are files for what comes after. The one pass over all batches that makes what the next
        block is fed is in a context of `feeding`.
        """
        started, prefix = time.monotonic(), prefix_of(name)
        mine = {key.removeprefix(prefix): target for key, target in targets.items() if key.startswith(prefix)}
        parameters = {key: block.get_parameter(key) for key in mine}
        after, beside = self.hidden.after(paths[0]), self.other.after(paths[1])
        sequential = self.method.sequential
        with torch.no_grad():
            turned = self._rotate(block, mine, probe)
            if sequential:
                self._run(block, calls, self.other, beside)
            smoothed, seen = self._smooth(block, mine, calls, probe, turned)
            stacks = self.method.rounding == "gptq" and any(p.dim() == 3 for p in parameters.values())
            # What the block is fed is not to be written over as long as it may have to run again.
            now = not sequential and not stacks and seen is None
            if seen is None:
                with feeding() if now else nullcontext():
                    seen = self.observe(block, mine, calls, after if now else None, smoothed.pre_scales)
            if stacks:
                least = self.method.expert_tokens
                top_up(block, seen, mine, calls, self.hidden, smoothed.pre_scales, least=least)
            if not sequential and not now:
                with feeding():
                    self._run(block, calls, self.hidden, after)
            originals = {key: smoothed.exact.get(key, parameter.detach()) for key, parameter in parameters.items()}
            solved = self.round(prefix, block, originals, mine, seen, smoothed.pre_scales)
            rounding = RoundInputs(solved.weights)
            if self.method.learned:
                steps = self.method.learned
                solved.weights = learn_block(
                    block, solved.weights, solved.aims, calls, self.hidden, beside, rounding, steps=steps
                )
                for key, moments in solved.moments.items():
                    solved.judge(key, originals[key], moments, mine[key].k_axis)
            if self.method.distilled:
                self.aims |= {prefix + key: aim.to(torch.float32) for key, aim in solved.aims.items()}
            weights, results = solved.weights, tuple(solved.results[key] for key in mine)
            del originals, seen, solved
            for key, q in weights.items():
                parameters[key].data = used(q)
            with Watch(parameters, rounding):
                if sequential:
                    with feeding():
                        self._run(block, calls, self.hidden, after)
                else:
                    self._run(block, calls, self.other, beside)
        self.hidden, self.other = after, beside
        whole: dict[str, Tensor] = {prefix + key: q for key, q in weights.items()}
        whole |= {prefix + key: block.get_parameter(key).data for key in smoothed.changed - weights.keys()}
        take(BlockResult(name=name, layers=results, sqnr=self._sqnr(), seconds=time.monotonic() - started), whole)

    def observe(
        self,
        block: nn.Module,
        targets: Mapping[str, Target],
        calls: Sequence[Call],
        after: Hidden | None = None,
        pre_scales: Mapping[str, Tensor] = MappingProxyType({}),
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

    def _rotate(self, block: nn.Module, targets: Mapping[str, Target], probe: Probe | None) -> dict[str, Tensor]:
        """Rotate the block, where the method does; float32 values of what that changed."""
        if self._rotation is None or probe is None:
            return {}
        kind = _kind(block)
        if kind not in self._turns:
            self._turns[kind] = find_turns(block, _axes(block, targets), probe, self._rotation)
        turned = self._turns[kind].apply(block, self._rotation)
        for name, values in turned.items():
            parameter = block.get_parameter(name)
            parameter.data = values.to(parameter.dtype)
        return turned

    def _smooth(
        self,
        block: nn.Module,
        targets: Mapping[str, Target],
        calls: Sequence[Call],
        probe: Probe | None,
        turned: Mapping[str, Tensor],
    ) -> tuple[Smoothed, dict[str, Input] | None]:
        """Put factors in place, where the method has any, and tell what weights are fed then; None: it is to be seen.

        One look at the inputs serves for both where they are not rounded and no histogram is asked for.
        """
        method, changed = self.method, frozenset(turned)
        exact = {name: values for name, values in turned.items() if name in targets}
        if method.smoothing is None or probe is None or not targets:
            return Smoothed(exact, {}, changed, {}), None
        if self._rotation is not None:
            probe = probe.fed(self._rotation(probe.hidden))
        kind = _kind(block)
        if kind not in self._folds:
            self._folds[kind] = find_folds(block, _axes(block, targets), probe)
        inputs = self.observe(block, targets, calls, aware=False)
        smoothed = smooth(
            block,
            targets,
            inputs,
            self._folds[kind],
            method.smoothing,
            alpha=method.alpha,
            mode=method.mode,
            pre_scale=method.pre_scale,
            exact=exact,
        )
        smoothed = replace(smoothed, changed=smoothed.changed | changed)
        aware = method.activation_aware and any(target.activation is not None for target in targets.values())
        unique = {id(found): found for found in inputs.values()}.values()
        divided = (
            found.divide(smoothed.factors[found.names[0]]) for found in unique if found.names[0] in smoothed.factors
        )
        return smoothed, None if aware or not all(divided) else inputs

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

    def round(
        self,
        prefix: str,
        block: nn.Module,
        originals: Mapping[str, Tensor],
        targets: Mapping[str, Target],
        inputs: Mapping[str, Input],
        pre_scales: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Solved:
        """A block's weights, one set that shares an input after the other."""
        method, solved = self.method, Solved()
        options = None if method.rounding == "nearest" else method.options
        if method.rounding == "clipped":
            options = method.options | Options(act_order=False)
        # The smallest first, and each let go of when it is done with: the largest may be most of what memory holds.
        unique = {id(found): found for found in inputs.values()}.values()
        for found in sorted(unique, key=lambda found: found.hessian.hessian.numel()):
            # What the block's run and the input before left would else stay beside the next one.
            release()
            started, group = time.monotonic(), {key: originals[key] for key in found.names}
            moments, starved = moments_of(found, method.expert_tokens)
            extra = torch.zeros_like(found.hessian.tokens) if found.extra is None else found.extra
            # Without what joins columns, no error travels, and what is left is the search for scales.
            hessian = moments.hessian
            if method.rounding == "clipped":
                hessian = torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1))
            try:
                if method.rounding == "gptq" and method.refit:
                    damping = method.options.get("damping", DAMPING)
                    group = {key: fit(w, moments, targets[key].k_axis, damping) for key, w in group.items()}
                rounded = round_weights(group, targets, hessian, options, mode=method.mode)
                for key, (q, notes) in rounded.items():
                    dtype = block.get_parameter(key).dtype
                    act_scale, act_zero = static_scale(found, targets[key].activation, dtype)
                    solved.weights[key] = with_use(
                        q,
                        targets[key].activation,
                        dtype=dtype,
                        act_scale=act_scale,
                        act_zero=act_zero,
                        pre_scale=pre_scales.get(key),
                    )
                    solved.results[key] = LayerResult(
                        name=prefix + key,
                        weight_sqnr=nan,
                        output_sqnr=nan,
                        outliers=_outliers(found),
                        tokens=tuple((found.hessian.tokens - extra).tolist()) if q.dim() == 3 else (),
                        topped=tuple(extra.nonzero().flatten().tolist()),
                        starved=starved,
                        notes=notes,
                        seconds=time.monotonic() - started,
                    )
            except LowbitError as error:
                raise type(error)(f"{', '.join(prefix + key for key in found.names)}: {error}") from error
            if method.learned or method.distilled:
                solved.aims |= group
            if method.learned:
                solved.moments |= dict.fromkeys(found.names, moments)
                continue
            for key in found.names:
                solved.judge(key, originals[key], moments, targets[key].k_axis)
            del moments, hessian
            found.hessian.to("meta")
            found.lost = None
        return solved


@dataclass(slots=True)
class Solved:
    """A block's weights while they are solved, by name."""

    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    results: dict[str, LayerResult] = field(default_factory=dict)
    # For learning: what was rounded, and what it takes to judge what comes of it.
    aims: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)

    def judge(self, name: str, original: Tensor, moments: Moments, k_axis: int) -> None:
        """Tell how a weight fared."""
        q = self.weights[name]
        self.results[name] = replace(
            self.results[name],
            weight_sqnr=weight_sqnr(original, q),
            output_sqnr=output_sqnr(original, q, moments, k_axis),
        )


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What blocks that compute the same have in common."""
    return tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _axes(block: nn.Module, targets: Mapping[str, Target]) -> dict[str, int]:
    """What a block multiplies with, and the axis of each that is summed over."""
    axes = {name: -1 for name, p in block.named_parameters() if p.dim() in {2, 3}}
    return axes | {name: target.k_axis for name, target in targets.items()}


def _outliers(found: Input) -> tuple[tuple[int, float], ...]:
    low, high = found.channels.low, found.channels.high
    amax = torch.maximum(-low, high)
    ratio = amax / amax.median().clamp_min(torch.finfo(torch.float32).tiny)
    top = ratio.topk(min(_OUTLIERS, len(ratio)))
    return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def prefix_of(block: str) -> str:
    """What the names of a block's parameters begin with."""
    return f"{block}." if block else ""
