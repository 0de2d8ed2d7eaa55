"""`lowbit bench pad`: rows of groups moved to where tiles begin, quantized on the way, and back, beside copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowbit.backends import Call, kernel
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, Shape, copies, lowbits, plain
from lowbit.bench.cast import halves
from lowbit.bench.inputs import normal
from lowbit.format import FORMATS, Format
from lowbit.groups import padded_rows
from lowbit.numerics import DEFAULT_MODE, Scales, decode

_ALIGN = 128
_MXFP8 = FORMATS["MXFP8"]


def _cases(given: Given) -> Iterator[Case]:
    for shape in given.shapes:
        yield _case(given, shape, "pad_groups")
        yield _case(given, shape, "unpad_groups")
        for other in (None, _MXFP8):
            yield _quantized(given, shape, other)


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


def _quantized(given: Given, shape: Shape, other: Format | None) -> Case:
    """Rows taken by an index, moved and quantized, with `other` along columns as well."""
    (m, k, g), device = shape, given.device
    padded, offs = padded_rows(m, g, _ALIGN), _offs(m, g).to(device)
    index = torch.randperm(m, generator=torch.Generator().manual_seed(1)).to(device)
    written = padded * k * _MXFP8.bits_per_element((padded, k)) / 8 * (1 if other is None else 2)
    moved, rest = 2 * m * k + written, (DEFAULT_MODE, "nearest", 0)
    spec = str(_MXFP8)

    def fused(run: Callable[..., list[Tensor]]) -> Callable[[Tensor], list[Tensor]]:
        return lambda x: run(x, index, offs, _ALIGN, None, spec, None if other is None else spec, *rest)

    def step_by_step(x: Tensor) -> list[Tensor]:
        there, _ = torch.ops.lowbit.pad_groups(x.index_select(0, index), None, offs, _ALIGN)
        if other is None:
            return torch.ops.lowbit.quantize(there, None, None, None, spec, *rest)
        return torch.ops.lowbit.quantize_both(there, None, spec, spec, *rest)

    def values(parts: list[Tensor]) -> Tensor:
        return decode(parts[0], _MXFP8, Scales(parts[1]), k)

    def exact(x: Tensor) -> Tensor:
        return kernel("reference.pad_groups").run(x, index, offs, _ALIGN)[0]

    reference = kernel("reference.quantize_groups").run
    candidate, reference = lowbits(
        Call("quantize_groups", _MXFP8, None, device.type, torch.bfloat16, None, k),
        Contender("lowbit", copies, fused(torch.ops.lowbit.quantize_groups), moved, values),
        Contender("reference", copies, fused(reference), moved, values),
        bound=False,
    )
    op = "quantize_groups MXFP8, rows" + (" and columns" if other is not None else "")
    return Case(
        {"op": op, "rows": m, "columns": k, "groups": g},
        0,
        lambda kind: (normal(m, k, kind=kind, seed=0, device=device).to(torch.bfloat16),),
        exact,
        candidate,
        Contender("copy of as many bytes", halves(moved), Tensor.copy_, moved),
        reference,
        (Contender("index_select, pad_groups, quantize", copies, step_by_step, moved, values),),
    )


def _offs(m: int, g: int) -> Tensor:
    """Ends of `g` groups of `m` rows, of uneven sizes, some of them none."""
    cuts = torch.randint(m + 1, (g - 1,), generator=torch.Generator().manual_seed(0))
    return torch.cat([cuts.sort().values, torch.tensor([m])]).to(torch.int32)


def _usual(device: str) -> list[Shape]:
    return [(16384, 5120, 8), (131072, 2048, 64), (16384, 7168, 256)] if device == "cuda" else [(4096, 1024, 8)]


benchmark = Benchmark(
    about="rows of groups moved to where tiles begin, quantized on the way, and back",
    dims=(Dim("M", 256, 131072, 8192), Dim("K", 256, 8192, 2048, grouped=True), Dim("G", 1, 256, 64)),
    formats=(),
    usual=_usual,
    quantized=lambda _: [],
    cases=_cases,
)
