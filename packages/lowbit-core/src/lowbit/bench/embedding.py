"""`lowbit bench embedding`: rows of a quantized table, beside a bfloat16 table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.backends import Call, kernel
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, Shape, Use, footprint, lowbits, plain
from lowbit.bench.inputs import normal
from lowbit.bench.timing import copies_of
from lowbit.tensor import QuantizedTensor


def _cases(given: Given) -> Iterator[Case]:
    for shape, use in product(given.shapes, given.uses):
        yield _case(given, shape, use)


def _case(given: Given, shape: Shape, use: Use) -> Case:
    (m, v, d), device, dtype = shape, given.device, torch.bfloat16
    row, out = d * use.format.bits_per_element((v, d)) / 8, m * (d * dtype.itemsize + 8)
    run = kernel("reference.embedding").run

    def quantized(weight: Tensor) -> QuantizedTensor:
        return lowbit.quantize(weight, use.format)

    def bound(weight: Tensor) -> nn.Embedding:
        return bound_table(quantized(weight))

    def by_lowbit(ids: Tensor, table: nn.Embedding) -> Tensor:
        return table(ids)

    def by_reference(ids: Tensor, q: QuantizedTensor) -> Tensor:
        return run(ids, *q.stored, str(use.format), d, q.dtype)

    def exact(weight: Tensor) -> Tensor:
        return weight[picked(m, weight, 0)]

    def contender(name: str, made: Callable[[Tensor], Any], work: Callable[..., Tensor], row: float) -> Contender:
        return Contender(name, partial(picking, made, m), work, out + m * row, plain, touched=round(m * row))

    candidate, reference = lowbits(
        Call("embedding", use.format, None, device.type, dtype, v, d),
        contender("lowbit", bound, by_lowbit, row),
        contender("reference", quantized, by_reference, row),
        bound=True,
    )
    return Case(
        {"format": use.spec, "m": m, "rows": v, "columns": d},
        0,
        lambda kind: (normal(v, d, kind=kind, seed=0, device=device),),
        exact,
        candidate,
        contender("bfloat16", plain, nn.functional.embedding, d * dtype.itemsize),
        reference,
    )


def picked(m: int, weight: Tensor, i: int) -> Tensor:
    """Rows of a table that the i-th call picks: others each time."""
    generator = torch.Generator(weight.device).manual_seed(i)
    return torch.randint(len(weight), (m,), generator=generator, device=weight.device)


def picking(made: Callable[[Tensor], Any], m: int, weight: Tensor) -> Make:
    """Operands of calls that pick `m` rows of what is made of a table."""
    tables = [made(weight)]
    count = copies_of(footprint(tables[0]))

    def make(i: int) -> tuple[Tensor, Any]:
        # A large table is not copied, since calls pick other rows; a small one would be in a cache before long.
        while len(tables) <= i % count:
            tables.append(made(weight))
        return picked(m, weight, i), tables[i % count]

    return make


def bound_table(weight: QuantizedTensor, kind: Callable[..., Any] = nn.Embedding) -> Any:
    """A table that is packed for the kernel that lowbit chooses."""
    v, d = weight.shape
    table = kind(v, d, device="meta")
    table.weight = nn.Parameter(weight, requires_grad=False)
    lowbit.bind(table)
    return table


def _usual(device: str) -> list[Shape]:
    return [(m, 128256, 4096) for m in (64, 1024, 16384)] if device == "cuda" else [(m, 32000, 1024) for m in (1, 1024)]


benchmark = Benchmark(
    about="rows of a quantized table, bound, beside a bfloat16 table",
    dims=(Dim("M", 1, 65536, 4096), Dim("V", 1024, 262144, 32768), Dim("D", 256, 8192, 1024, grouped=True)),
    formats=("INT4_G128", "UINT4_G128", "INT8_ROW", "FP8_ROW", "MXFP8", "MXFP4", "NVFP4"),
    usual=_usual,
    quantized=lambda shape: [shape[1:]],
    cases=_cases,
)
