"""`lowbit bench pad`: rows of groups moved to where tiles begin, and back, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from lowbit.backends import Call, kernel
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, Shape, copies, lowbits, plain
from lowbit.bench.cast import halves
from lowbit.bench.inputs import normal
from lowbit.groups import padded_rows

_ALIGN = 128


def _cases(given: Given) -> Iterator[Case]:
    for shape, op in product(given.shapes, ("pad_groups", "unpad_groups")):
        yield _case(given, shape, op)


def _case(given: Given, shape: Shape, op: str) -> Case:
    (m, k, g), device, dtype = shape, given.device, torch.bfloat16
    padded = padded_rows(m, g, _ALIGN)
    # Rows are read, and all that there is afterwards is written.
    moved = k * dtype.itemsize * (m + (padded if op == "pad_groups" else m))
    offs = _offs(m, g).to(device)
    neutral, reference = getattr(torch.ops.lowbit, op), kernel(f"reference.{op}").run
    there = kernel("reference.pad_groups").run

    def pads(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, offs: run(x, None, offs, _ALIGN)[0]

    def unpads(run: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, offs: run(x, offs, _ALIGN, m)

    def prepare(x: Tensor) -> Make:
        return copies(x if op == "pad_groups" else there(x, None, offs, _ALIGN)[0], offs)

    def exact(x: Tensor) -> Tensor:
        """Group by group, on the host."""
        if op == "unpad_groups":
            return x
        out, start, place = x.new_zeros(padded, k), 0, 0
        for end in offs.tolist():
            out[place : place + end - start] = x[start:end]
            place, start = place + -(-(end - start) // _ALIGN) * _ALIGN, end
        return out

    way = pads if op == "pad_groups" else unpads
    candidate, other = lowbits(
        Call(op, None, None, device.type, dtype, None, k),
        Contender("lowbit", prepare, way(neutral), moved, plain),
        Contender("reference", prepare, way(reference), moved, plain),
        bound=False,
    )
    return Case(
        {"op": op, "rows": m, "columns": k, "groups": g},
        0,
        lambda kind: (normal(m, k, kind=kind, seed=0, device=device).to(dtype),),
        exact,
        candidate,
        Contender("copy of as many bytes", halves(moved), Tensor.copy_, moved),
        other,
    )


def _offs(m: int, g: int) -> Tensor:
    """Ends of `g` groups of `m` rows, of uneven sizes, some of them none."""
    cuts = torch.randint(m + 1, (g - 1,), generator=torch.Generator().manual_seed(0))
    return torch.cat([cuts.sort().values, torch.tensor([m])]).to(torch.int32)


def _usual(device: str) -> list[Shape]:
    return [(16384, 5120, 8), (131072, 2048, 64), (16384, 7168, 256)] if device == "cuda" else [(4096, 1024, 8)]


benchmark = Benchmark(
    about="rows of groups moved to where tiles begin, and back",
    dims=(Dim("M", 256, 131072, 8192), Dim("K", 256, 8192, 2048, grouped=True), Dim("G", 1, 256, 64)),
    formats=(),
    usual=_usual,
    quantized=lambda _: [],
    cases=_cases,
)
