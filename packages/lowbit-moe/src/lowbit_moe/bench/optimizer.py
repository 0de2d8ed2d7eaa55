"""`lowbit bench optimizer`: a step of AdamW over bfloat16 parameters whose states have 8 and 4 bits, beside torch's.

A step changes what it works on. What is timed are steps of the same optimizers again and again, which take as long from
any state. Accuracy is that of the first step, from zero states, by the change of the parameters: it tells whether all
compute the same. What rounding the states costs shows in later steps, and what rounding the parameters costs in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.bench import Benchmark, Case, Contender, Dim, Given, Kind, Make, Shape, normal
from lowbit.bench.peers import optimizers
from lowbit_moe.optimizer import AdamW, kernel_for_steps
from lowbit_moe.states import BLOCKS, Bits

_LR, _EPS, _DECAY = 1e-3, 1e-8, 1e-2
# Of parameters and of gradients; what a value of theirs is, about.
_SCALES = (0.02, 1e-3)
_LAYERS = 16
_BITS: tuple[Bits, ...] = (8, 4)


def _cases(given: Given) -> Iterator[Case]:
    for (count,), bits in product(given.shapes, _BITS):
        yield _case(given, count, bits)


def _case(given: Given, count: int, bits: Bits) -> Case:
    device = given.device

    def data(kind: Kind) -> tuple[Tensor, ...]:
        return tuple(scale * normal(count, kind=kind, seed=i, device=device) for i, scale in enumerate(_SCALES))

    contender = partial(_stepping, count)
    # Of the fused one the same kernel, which may be part of a CUDA graph.
    fused = partial(torch.optim.AdamW, fused=True, capturable=device.type == "cuda")
    # Two codes, and a scale for each block of them; norms, of float32, are too few to count.
    states = 2 * bits / 8 + 2 * 4 / BLOCKS[bits]
    candidate = contender("lowbit", partial(AdamW, bits=bits), states)
    kernel = kernel_for_steps(device.type)
    if kernel is not None:
        candidate = replace(candidate, kernel=kernel.name)
    nearest = contender("lowbit, parameters to nearest", partial(AdamW, bits=bits, rounding="nearest"), states)
    others = optimizers(contender, device) if given.peers else ()
    return Case(
        {"parameters": count, "bits": bits},
        0,
        data,
        _exact,
        candidate,
        contender("torch AdamW, fused", fused, 4),
        peers=(nearest, *others),
    )


def _stepping(count: int, name: str, optimizer: Callable[..., Any], states: float) -> Contender:
    """An optimizer whose states are as many bytes a parameter."""

    def prepare(values: Tensor, gradients: Tensor) -> Make:
        shapes = _tensors(count)
        sizes = [prod(shape) for shape in shapes]

        def make(i: int) -> tuple[Any, list[nn.Parameter], Tensor]:
            parameters: list[nn.Parameter] = []
            for shape, value, gradient in zip(shapes, values.split(sizes), gradients.split(sizes), strict=True):
                parameters.append(nn.Parameter(value.view(shape).clone()))
                parameters[-1].grad = gradient.view(shape).clone()
            stepping = optimizer(parameters, lr=_LR, eps=_EPS, weight_decay=_DECAY)
            if i:
                # Its first step makes the states; that of the first copy is never timed.
                stepping.step()
            return stepping, parameters, values

        return make

    # Parameters and states are read and written, gradients read.
    return Contender(name, prepare, _step, count * (6 + 2 * states), _change, touched=round(count * (4 + states)))


def _step(stepping: Any, parameters: list[nn.Parameter], before: Tensor) -> tuple[list[nn.Parameter], Tensor]:
    stepping.step()
    return parameters, before


def _change(result: tuple[Iterable[Tensor], Tensor]) -> Tensor:
    parameters, before = result
    return torch.cat([parameter.detach().flatten() for parameter in parameters]).float() - before


def _exact(values: Tensor, gradients: Tensor) -> Tensor:
    """The change by a first step in float64, where the means are the gradient and its square."""
    p, g = values.double(), gradients.double()
    return -_LR * (_DECAY * p + g / (g.abs() + _EPS))


def _tensors(count: int) -> list[Shape]:
    """Shapes of `count` values: layers of a transformer, a table, and a vector of what no row of that holds."""
    width = max(isqrt(count // (12 * _LAYERS)) // 32 * 32, 32)
    # Attention, what comes after it, and two norms.
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width), (width,), (width,)]
    shapes = layer * min(_LAYERS, count // sum(map(prod, layer)))
    rows, rest = divmod(count - sum(map(prod, shapes)), width)
    return [*shapes, *([(rows, width)] if rows else []), *([(rest,)] if rest else [])]


benchmark = Benchmark(
    about="a step of AdamW with states of 8 and of 4 bits over bfloat16 parameters, beside torch's",
    dims=(Dim("P", 1 << 16, 1 << 29, 1 << 22),),
    formats=(),
    usual=lambda device: [(1 << n,) for n in ((24, 27, 29) if device == "cuda" else (20, 22))],
    quantized=lambda _: [],
    cases=_cases,
)
