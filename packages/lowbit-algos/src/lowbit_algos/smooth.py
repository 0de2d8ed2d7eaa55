"""Smoothing: channels of an input divided by factors, and the weights' columns multiplied by them.

The product stays; what changes is which of the two is hard to round. Factors go into what makes the input, as
`lowbit_algos.folds` finds it, or stay with the weight as its `pre_scale`.

    SmoothQuant   s_j = amax|x_j|^a / amax|w_j|^(1 - a)
    AWQ           s_j = rms(x_j)^a, centred on 1

Of several a, and no factors at all, the one is taken that changes the layer's output least: by `tr(E H E^T)` for the
error E of its weights, and by what rounding a sample of its inputs adds.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"; Lin et
al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration".
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit import quantize
from lowbit.numerics import ScaleMode
from lowbit_algos.folds import Fold, Producer, scale_axis
from lowbit_algos.inputs import Input, Target, rounded_input

Smoothing = Literal["smoothquant", "awq"]

_SMOOTHQUANT = tuple(i / 10 for i in range(3, 10))
_AWQ = tuple(i / 20 for i in range(1, 21))
# Beyond these a factor would move a whole dtype's range.
_LEAST, _MOST = 1e-5, 1e5
# Where inputs are rounded too, a sample of them tells losses: factors have to lower it by more than that may be wrong.
_CLEARLY = 0.9
# Rows of a weight by which factors are judged.
_ROWS = 512


@dataclass(frozen=True, slots=True)
class _Layer:
    """A weight that takes an input: float32 (.., N, K), and what becomes of it."""

    name: str
    weight: Tensor
    target: Target


@dataclass(frozen=True, slots=True)
class Smoothed:
    """What smoothing made of a block."""

    # Float32 values of weights to be quantized: what the block holds of them is rounded to its dtype.
    exact: Mapping[str, Tensor]
    # By what the input of a weight is to be multiplied where nothing before it could take that over.
    pre_scales: Mapping[str, Tensor]
    # All parameters that changed.
    changed: frozenset[str]
    # By what the input of a weight is divided now.
    factors: Mapping[str, Tensor]


def smooth(
    block: nn.Module,
    targets: Mapping[str, Target],
    inputs: Mapping[str, Input],
    folds: Sequence[Fold],
    kind: Smoothing,
    *,
    alpha: float | None,
    mode: ScaleMode,
    pre_scale: bool,
    exact: Mapping[str, Tensor],
) -> Smoothed:
    """Choose factors for every input of a block, and put them in place; with `pre_scale`, also where nothing folds.

    `alpha` is the exponent a; None: the best of several. `exact` are float32 values of weights that the block holds
    rounded.
    """
    exact = dict(exact)
    divided: dict[str, Tensor] = {}
    pre_scales: dict[str, Tensor] = {}
    changed: set[str] = set()
    left = dict.fromkeys(targets)
    for fold in folds:
        names = [name for name in fold.consumers if name in targets]
        if not names or any(name not in left for name in names):
            continue
        layers = [_layer(block, name, targets[name], exact) for name in names]
        # One input and one way to it: then its channels are the producer's.
        source = fold.consumers[names[0]]
        alike = all(torch.equal(fold.consumers[name], source) for name in fold.consumers)
        if not alike or any(inputs[name] is not inputs[names[0]] for name in names):
            continue
        factors = _choose(layers, inputs[names[0]], source, fold.producer.channels, kind, alpha, mode)
        if factors is not None:
            factors = _fold(block, fold, factors, targets, exact)
            changed |= {name for name, _ in fold.producer.parameters} | set(fold.consumers)
            divided |= {name: factors[fold.consumers[name].to(factors.device)] for name in names}
        for name in names:
            del left[name]
    for name in list(left) if pre_scale else ():
        names = [other for other in inputs[name].names if other in left]
        if not names:
            continue
        layers = [_layer(block, other, targets[other], exact) for other in names]
        k = layers[0].weight.shape[-1]
        factors = _choose(layers, inputs[name], torch.arange(k), k, kind, alpha, mode)
        for layer in layers:
            del left[layer.name]
            if factors is not None:
                exact[layer.name] = scale_axis(layer.weight, factors, -1).movedim(-1, layer.target.k_axis)
                pre_scales[layer.name], divided[layer.name] = factors.reciprocal(), factors
    return Smoothed(exact, pre_scales, frozenset(changed), divided)


def _layer(block: nn.Module, name: str, target: Target, exact: Mapping[str, Tensor]) -> _Layer:
    held = exact.get(name, block.get_parameter(name).detach())
    return _Layer(name, held.to(torch.float32).movedim(target.k_axis, -1), target)


def _choose(
    layers: Sequence[_Layer],
    found: Input,
    source: Tensor,
    channels: int,
    kind: Smoothing,
    alpha: float | None,
    mode: ScaleMode,
) -> Tensor | None:
    """The factors (channels,) of least loss; None where none are better than those of any exponent."""
    source = source.to(layers[0].weight.device)
    weights = torch.stack([layer.weight.abs().flatten(0, -2).amax(0) for layer in layers]).amax(0)
    if kind == "smoothquant":
        inputs = torch.maximum(-found.channels.low, found.channels.high)
    else:
        hessian = found.hessian.hessian
        inputs = (hessian if hessian.dim() == 2 else hessian.sum(0)).diagonal().clamp_min(0).sqrt()
    inputs, weights = (_of_channels(x, source, channels) for x in (inputs, weights))
    exponents = (alpha,) if alpha is not None else _SMOOTHQUANT if kind == "smoothquant" else _AWQ
    candidates = [_factors(inputs, weights, a, kind) for a in exponents]
    if alpha is not None:
        return candidates[0]
    none = torch.ones_like(candidates[0])
    losses = [_loss(layers, found, factors[source], mode) for factors in (none, *candidates)]
    if any(layer.target.activation is not None for layer in layers):
        losses[0] *= _CLEARLY
    best = min(range(len(losses)), key=losses.__getitem__)
    return None if best == 0 else candidates[best - 1]


def _of_channels(x: Tensor, source: Tensor, channels: int) -> Tensor:
    """The largest of the columns (K,) that come from each channel."""
    return x.new_zeros(channels).scatter_reduce(0, source, x, "amax", include_self=True)


def _factors(inputs: Tensor, weights: Tensor, a: float, kind: Smoothing) -> Tensor:
    """Factors of channels; 1 where an input or a weight is all zeros."""
    alive = (inputs > 0) & (weights > 0)
    factors = inputs**a / weights ** (1 - a) if kind == "smoothquant" else inputs**a
    if kind == "awq" and bool(alive.any()):
        low, high = torch.aminmax(factors[alive])
        factors = factors / (low * high).sqrt()
    return torch.where(alive, factors.clamp(_LEAST, _MOST), 1.0)


def _loss(layers: Sequence[_Layer], found: Input, s: Tensor, mode: ScaleMode) -> float:
    """What rounding adds to the outputs of layers under factors (K,) of their columns."""
    hessian = found.hessian.hessian / torch.outer(s, s)
    total = 0.0
    for layer in layers:
        w = layer.weight[..., :_ROWS, :] * s
        error = quantize(w, layer.target.format, mode=mode).dequantize(torch.float32) - w
        total += float(((error @ hessian) * error).sum(dtype=torch.float64))
        activation, sample = layer.target.activation, found.sample
        if activation is not None and sample is not None and len(sample):
            x = sample.to(torch.float32) / s
            noise = (rounded_input(x, activation) - x) @ w.flatten(0, -2).T
            total += float(noise.square().sum(dtype=torch.float64)) * int(found.hessian.tokens.sum()) / len(sample)
    return total


def _fold(
    block: nn.Module, fold: Fold, factors: Tensor, targets: Mapping[str, Target], exact: MutableMapping[str, Tensor]
) -> Tensor:
    """Divide what the producer makes by factors, and multiply its consumers' columns; the factors it could hold."""
    producer, by = fold.producer, factors
    for name, _ in producer.parameters:
        parameter = block.get_parameter(name)
        if name in targets:
            exact[name] = producer.scaled(name, exact.get(name, parameter.data.to(torch.float32)), by.reciprocal())
            parameter.data = exact[name].to(parameter.dtype)
            continue
        old = parameter.data
        new = producer.scaled(name, old.to(torch.float32), by.reciprocal()).to(old.dtype)
        if old.dim() == 1 and name == producer.parameters[0][0]:
            # What the norm could not hold of the factors, the columns need not be multiplied by either.
            by = _told_apart(old, new, by, producer)
        parameter.data = new
    for name, source in fold.consumers.items():
        parameter, columns = block.get_parameter(name), by[source.to(by.device)]
        held = exact.get(name, parameter.data.to(torch.float32))
        axis = targets[name].k_axis if name in targets else -1
        scaled = scale_axis(held, columns, axis)
        if name in targets:
            exact[name] = scaled
        parameter.data = scaled.to(parameter.dtype)
    return by


def _told_apart(old: Tensor, new: Tensor, factors: Tensor, producer: Producer) -> Tensor:
    """Factors that a norm's weight was really divided by, once it was rounded."""
    a, b = (x[producer.outputs - producer.channels :].to(torch.float32) for x in (old, new))
    return torch.where((a != 0) & (b != 0), a / b, factors)
