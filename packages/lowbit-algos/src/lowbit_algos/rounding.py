"""Rounding the weights that share an input: to nearest or by GPTQ, siblings as one matrix where they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, log10
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lowbit import Activation, QuantizedTensor, Scales, quantize
from lowbit.numerics import ScaleMode, tensor_scale_for_amax
from lowbit_algos.gptq import DAMPING, Options, solve
from lowbit_algos.inputs import Target
from lowbit_algos.moments import Moments

# Rows of a weight by which its output error is judged.
_ROWS = 512


class Rounded(NamedTuple):
    """A weight that was quantized, and how that went."""

    weight: QuantizedTensor
    notes: tuple[str, ...] = ()


def round_weights(
    weights: Mapping[str, Tensor],
    targets: Mapping[str, Target],
    hessian: Tensor,
    options: Options | None,
    *,
    mode: ScaleMode,
) -> dict[str, Rounded]:
    """Weights that share an input, quantized: by GPTQ with `options`, or to nearest with None.

    Those that serving engines fuse share their input too, and so NVFP4's tensor scale here.
    """
    done: dict[str, Rounded] = {}
    for names in _alike(weights, targets):
        target, several = targets[names[0]], [weights[name] for name in names]
        whole = _shared_tensor_scale(several, target)
        if options is None:
            for name, weight in zip(names, several, strict=True):
                q = quantize(weight, target.format, tensor_scale=whole, axis=target.k_axis, mode=mode)
                done[name] = Rounded(q)
            continue
        axis = target.k_axis
        # Rows that share no scale are solved as one matrix, which has one factorization.
        together = several[0].dim() == 2 and target.format.block_for(2)[0] == 1
        for part in [names] if together else [[name] for name in names]:
            matrix = torch.cat([weights[name].movedim(axis, -1) for name in part]) if together else weights[part[0]]
            found = solve(
                matrix,
                hessian,
                target.format,
                k_axis=-1 if together else axis,
                tensor_scale=whole,
                **{"mode": mode, **options},
            )
            notes = _damping_note(found.damping, options)
            if not together:
                done[part[0]] = Rounded(found.weight, notes)
                continue
            start = 0
            for name in part:
                rows = weights[name].movedim(axis, -1).shape[0]
                done[name] = Rounded(_rows(found.weight, start, start + rows, axis), notes)
                start += rows
    return {name: done[name] for name in weights}


def with_use(
    q: QuantizedTensor,
    activation: Activation | None,
    *,
    dtype: torch.dtype | None = None,
    act_scale: Tensor | None = None,
    act_zero: Tensor | None = None,
    pre_scale: Tensor | None = None,
) -> QuantizedTensor:
    """The same weight, used under an activation, and reading as `dtype`."""
    return QuantizedTensor.from_parts(
        q.qdata,
        q.scales,
        q.format,
        k=q.canonical_shape[-1],
        dtype=dtype or q.dtype,
        axis=q.permutation.index(q.dim() - 1),
        activation=activation,
        act_scale=act_scale,
        act_zero=act_zero,
        pre_scale=pre_scale,
    )


def output_sqnr(weight: Tensor, q: QuantizedTensor, moments: Moments, k_axis: int) -> float:
    """How much larger outputs are than what rounding the weight, and its inputs, adds to them, in dB.

    Without rounded inputs it is `tr(W H W^T) / tr(D H D^T)` with D = W - Wq. With them, `W x - Wq q = D q + W (x - q)`,
    whose second part has errors of channels that are taken to be independent. Of weights with many rows, rows at equal
    distances stand for all.
    """
    axis = k_axis if k_axis < 0 else k_axis - weight.dim()
    step = max(weight.movedim(axis, -1).shape[-2] // _ROWS, 1)
    w = weight.movedim(axis, -1)[..., ::step, :].to(torch.float32)
    read = [each.dequantize(torch.float32).movedim(axis, -1)[::step] for _, each in _matrices(weight, q)]
    error = w - torch.stack(read).view_as(w)
    signal, noise = (_product(m, moments.hessian, m) for m in (w, error))
    if moments.cross is not None and moments.squares is not None:
        lost = float((w.square().sum(-2) * moments.squares).sum(dtype=torch.float64))
        signal += 2 * _product(w, moments.cross, w) + lost
        noise += 2 * _product(w, moments.cross, error) + lost
    return decibels(signal, noise)


def _product(a: Tensor, matrix: Tensor, b: Tensor) -> float:
    """`tr(A M B^T)`."""
    return float(((a @ matrix) * b).sum(dtype=torch.float64))


def weight_sqnr(weight: Tensor, q: QuantizedTensor) -> float:
    """`|W|^2 / |W - Wq|^2` in dB."""
    signal = noise = 0.0
    for matrix, each in _matrices(weight, q):
        w = matrix.to(torch.float32)
        signal += float(w.square().sum(dtype=torch.float64))
        noise += float((w - each.dequantize(torch.float32)).square().sum(dtype=torch.float64))
    return decibels(signal, noise)


def _matrices(weight: Tensor, q: QuantizedTensor) -> Iterator[tuple[Tensor, QuantizedTensor]]:
    """A weight as it was and as it is, or each expert's: all in float32 would be more than whatever else is held."""
    if weight.dim() == 2:
        yield weight, q
    else:
        yield from ((weight[e], cast("QuantizedTensor", q[e])) for e in range(len(weight)))


def decibels(signal: float, noise: float) -> float:
    """`10 log10(signal / noise)`; infinite without noise."""
    return inf if noise <= 0 else -inf if signal <= 0 else 10 * log10(signal / noise)


def _alike(weights: Mapping[str, Tensor], targets: Mapping[str, Target]) -> list[list[str]]:
    """Names in groups that become the same in every respect."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((targets[name], weight.dim(), weight.dtype), []).append(name)
    return list(groups.values())


def _shared_tensor_scale(weights: Sequence[Tensor], target: Target) -> Tensor | None:
    """One for all, or one for each expert of all."""
    if not target.format.tensor_scale:
        return None
    amax = [weight.abs().amax((-2, -1), keepdim=True).to(torch.float32) for weight in weights]
    return tensor_scale_for_amax(torch.stack(amax).amax(0), target.format)


def _rows(q: QuantizedTensor, start: int, stop: int, axis: int) -> QuantizedTensor:
    """Rows [start, stop) of a canonical matrix, on their own, with the blocked axis as `axis`."""
    zero = None if q.zero is None else q.zero[start:stop].clone()
    scales = Scales(q.scale[start:stop].clone(), zero, q.tensor_scale)
    data, k = q.qdata[start:stop].clone(), q.canonical_shape[-1]
    return QuantizedTensor.from_parts(data, scales, q.format, k=k, dtype=q.dtype, axis=axis)


def _damping_note(damping: Sequence[float], options: Options) -> tuple[str, ...]:
    asked = options.get("damping", DAMPING)
    more = max(damping)
    return (
        () if more <= asked else (f"damped by {more:g} of the Hessian's mean diagonal, where {asked:g} was too little",)
    )
