"""`lowbit bench bags`: sums of rows of a quantized table, bags of them, beside a bfloat16 table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.backends import Call, kernel
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Shape, Use, lowbits, plain
from lowbit.bench.embedding import bound_table, picked, picking
from lowbit.bench.inputs import normal
from lowbit.bench.peers import bags
from lowbit.tensor import QuantizedTensor


def _cases(given: Given) -> Iterator[Case]:
    for shape, use in product(given.shapes, given.uses):
        yield _case(given, shape, use)


def _case(given: Given, shape: Shape, use: Use) -> Case:
    (b, length, v, d), device, dtype = shape, given.device, torch.bfloat16
    m, fmt = b * length, use.format
    row, out = d * fmt.bits_per_element((v, d)) / 8, b * d * dtype.itemsize + 8 * m
    run, begins = kernel("reference.embedding_bag").run, torch.arange(0, m, length, device=device)

    def quantized(weight: Tensor) -> QuantizedTensor:
        return lowbit.quantize(weight, fmt)

    def bound(weight: Tensor) -> nn.EmbeddingBag:
        return bound_table(quantized(weight), partial(nn.EmbeddingBag, mode="sum"))

    def by_lowbit(ids: Tensor, table: nn.EmbeddingBag) -> Tensor:
        return table(ids.view(b, length))

    def by_reference(ids: Tensor, q: QuantizedTensor) -> Tensor:
        return run(ids, begins, None, *q.stored, *_SUM, str(fmt), d, q.dtype)

    def by_torch(ids: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.embedding_bag(ids.view(b, length), weight, mode="sum")

    def exact(weight: Tensor) -> Tensor:
        return weight[picked(m, weight, 0)].double().view(b, length, d).sum(1).float()

    def contender(name: str, made: Callable[[Tensor], Any], work: Callable[..., Tensor], row: float) -> Contender:
        return Contender(name, partial(picking, made, m), work, out + m * row, plain, touched=round(m * row))

    candidate, reference = lowbits(
        Call("embedding_bag", fmt, None, device.type, dtype, v, d),
        contender("lowbit", bound, by_lowbit, row),
        contender("reference", quantized, by_reference, row),
        bound=True,
    )
    return Case(
        {"format": use.spec, "bags": b, "rows each": length, "rows": v, "columns": d},
        0,
        lambda kind: (normal(v, d, kind=kind, seed=0, device=device),),
        exact,
        candidate,
        contender("bfloat16", plain, by_torch, d * dtype.itemsize),
        reference,
        bags(fmt, (length, d), contender, device) if given.peers else (),
    )


# No row counts as padding, and no offset ends the last bag.
_SUM = ("sum", -1, False)


def _usual(device: str) -> list[Shape]:
    del device
    return [(512, length, 262144, 128) for length in (1, 20, 100)]


benchmark = Benchmark(
    about="sums of rows of a quantized table, bound, beside a bfloat16 table",
    dims=(
        Dim("B", 1, 4096, 512),
        Dim("L", 1, 256, 64),
        Dim("V", 1024, 1048576, 65536),
        Dim("D", 32, 4096, 512, grouped=True),
    ),
    formats=("INT8_ROW", "FP8_ROW", "INT4_G32", "MXFP4", "int2:1x*:float32"),
    usual=_usual,
    quantized=lambda shape: [shape[2:]],
    cases=_cases,
)
