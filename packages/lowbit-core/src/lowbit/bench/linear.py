"""`lowbit bench linear`: a linear layer with a quantized weight, as `lowbit.bind` leaves it, beside bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import product

import torch
from torch import Tensor, nn

import lowbit
from lowbit.backends import Call, kernel
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, Shape, Use, copies, lowbits, plain
from lowbit.bench.inputs import normal
from lowbit.bench.peers import linears
from lowbit.tensor import INNER, QuantizedTensor

FORMATS = (
    "INT4_G128",
    "MXFP4",
    "NVFP4",
    "INT8_ROW",
    "INT8_ROW/INT8_ROW",
    "FP8_ROW/FP8_ROW",
    "FP8_128x128/FP8_1x128",
    "MXFP8/MXFP8",
    "NVFP4/NVFP4",
)
"""What benchmarks of products measure by default: weights alone in low precision, and inputs, too."""


def _cases(given: Given) -> Iterator[Case]:
    for shape, use in product(given.shapes, given.uses):
        yield _case(given, shape, use)


def _case(given: Given, shape: Shape, use: Use) -> Case:
    (m, n, k), device, dtype = shape, given.device, torch.bfloat16
    # Tokens and results; and the weight, read once.
    moved = m * (n + k) * dtype.itemsize + n * k * use.format.bits_per_element((n, k)) / 8
    spec, activation = str(use.format), "" if use.activation is None else str(use.activation)
    run = kernel("reference.linear").run

    def prepare(x: Tensor, weight: Tensor) -> Make:
        q = lowbit.quantize(weight, use.format, activation=use.activation)
        return lambda i: (_bound(deepcopy(q) if i else q), x.clone())

    def prepare_reference(x: Tensor, weight: Tensor) -> Make:
        return copies(lowbit.quantize(weight, use.format), x)

    def by_reference(q: QuantizedTensor, x: Tensor) -> Tensor:
        return run(x, *(getattr(q, name) for name in INNER), None, spec, activation)

    candidate, reference = lowbits(
        Call("linear", use.format, use.activation, device.type, dtype, n, k),
        Contender("lowbit", prepare, nn.Linear.__call__, moved, plain),
        Contender("reference", prepare_reference, by_reference, moved, plain),
        bound=True,
    )
    return Case(
        {"format": use.spec, "m": m, "n": n, "k": k},
        2 * m * n * k,
        lambda kind: (
            normal(m, k, kind=kind, seed=1, device=device),
            # As layers are initialised: products with it are as large as their inputs.
            normal(n, k, kind=kind, seed=0, device=device) / k**0.5,
        ),
        _exact,
        candidate,
        Contender("bfloat16", copies, nn.functional.linear, 2 * (m * n + m * k + n * k), plain),
        reference,
        linears(use, (n, k), moved, device) if given.peers else (),
    )


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.float().mT


def _bound(weight: QuantizedTensor) -> nn.Linear:
    """A layer without a bias whose weight is packed for the kernel that lowbit chooses."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    lowbit.bind(layer)
    return layer


def _usual(device: str) -> list[Shape]:
    if device != "cuda":
        return [(m, 4096, 4096) for m in (1, 16, 256)]
    weights = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
    return [(m, n, k) for (n, k), m in product(weights, (1, 16, 64, 256, 1024, 4096))]


benchmark = Benchmark(
    about="a linear layer with a quantized weight, bound, beside bfloat16",
    dims=(
        Dim("M", 1, 8192, 256),
        Dim("N", 256, 32768, 4096, grouped=True),
        Dim("K", 256, 32768, 4096, grouped=True),
    ),
    formats=FORMATS,
    usual=_usual,
    quantized=lambda shape: [shape[1:]],
    cases=_cases,
    inputs=True,
)
