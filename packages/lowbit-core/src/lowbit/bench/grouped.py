"""`lowbit bench grouped`: tokens that lie sorted by expert, times quantized experts, beside bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit.backends import Call, kernel
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, Shape, Use, copies, lowbits, plain
from lowbit.bench.inputs import normal
from lowbit.bench.linear import FORMATS
from lowbit.bench.peers import grouped
from lowbit.tensor import INNER, QuantizedTensor


def _cases(given: Given) -> Iterator[Case]:
    for shape, use in product(given.shapes, given.uses):
        yield _case(given, shape, use)


def _case(given: Given, shape: Shape, use: Use) -> Case:
    (m, n, k, experts), device, dtype = shape, given.device, torch.bfloat16
    # With fewer tokens than experts some are not read.
    read, tokens = min(m, experts) / experts, m * (n + k) * dtype.itemsize
    moved = tokens + read * experts * n * k * use.format.bits_per_element((experts, n, k)) / 8
    spec, activation = str(use.format), "" if use.activation is None else str(use.activation)
    run = kernel("reference.grouped_mm").run
    # As evenly as they go.
    offs = torch.tensor([m * (e + 1) // experts for e in range(experts)], dtype=torch.int32, device=device)

    def prepare(x: Tensor, weight: Tensor) -> Make:
        return copies(lowbit.quantize(weight, use.format, activation=use.activation), x)

    def prepare_bound(x: Tensor, weight: Tensor) -> Make:
        q = lowbit.quantize(weight, use.format, activation=use.activation)
        return lambda i: (_bound(deepcopy(q) if i else q), x.clone())

    def by_lowbit(experts: nn.Module, x: Tensor) -> Tensor:
        return functional.grouped_mm(x, experts.get_parameter("weight").mT, offs=offs)

    def by_torch(x: Tensor, weight: Tensor) -> Tensor:
        return functional.grouped_mm(x, weight.mT, offs=offs)

    def by_reference(q: QuantizedTensor, x: Tensor) -> Tensor:
        return run(x, offs, *(getattr(q, name) for name in INNER), spec, activation)

    candidate, reference = lowbits(
        Call("grouped_mm", use.format, use.activation, device.type, dtype, n, k),
        Contender("lowbit", prepare_bound, by_lowbit, moved, plain),
        Contender("reference", prepare, by_reference, moved, plain),
        bound=True,
    )
    return Case(
        {"format": use.spec, "m": m, "n": n, "k": k, "experts": experts},
        2 * m * n * k,
        lambda kind: (
            normal(m, k, kind=kind, seed=1, device=device),
            normal(experts, n, k, kind=kind, seed=0, device=device) / k**0.5,
        ),
        partial(_exact, offs),
        candidate,
        Contender(
            "bfloat16",
            copies,
            by_torch,
            tokens + read * experts * n * k * dtype.itemsize,
            plain,
        ),
        reference,
        grouped(use, offs, moved, device) if given.peers else (),
    )


def _bound(weight: QuantizedTensor) -> nn.Module:
    """Experts whose weights are packed for the kernel that lowbit chooses."""
    experts = nn.Module()
    experts.weight = nn.Parameter(weight, requires_grad=False)
    lowbit.bind(experts)
    return experts


def _exact(offs: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    parts = zip(x.split(sizes), weight, strict=True)
    return torch.cat([rows.float() @ expert.float().mT for rows, expert in parts])


def _usual(device: str) -> list[Shape]:
    if device != "cuda":
        return [(256, 1024, 1024, 8)]
    return [(16, 2048, 7168, 8), (256, 2048, 7168, 8), (16384, 8192, 5120, 4), (65536, 2048, 7168, 8)]


benchmark = Benchmark(
    about="tokens sorted by expert times quantized experts, beside bfloat16",
    dims=(
        Dim("M", 16, 65536, 512),
        Dim("N", 256, 8192, 1024, grouped=True),
        Dim("K", 256, 8192, 1024, grouped=True),
        Dim("E", 2, 64, 8),
    ),
    formats=FORMATS,
    usual=_usual,
    quantized=lambda shape: [(shape[3], shape[1], shape[2])],
    cases=_cases,
    inputs=True,
)
