"""`lowbit bench cast`: rounding a matrix to a format along either axis, and back, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

import lowbit
from lowbit.backends import Call, kernel
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, Shape, Use, copies, lowbits, plain
from lowbit.bench.inputs import normal
from lowbit.bench.peers import casts
from lowbit.format import FORMATS, Format
from lowbit.numerics import DEFAULT_MODE, Scales
from lowbit.tensor import QuantizedTensor

# What is timed, and the axis that blocks lie along. Decoding leaves that where it is, so once is enough.
_WAYS = (("quantize", -1), ("quantize", -2), ("dequantize", -1))


def _cases(given: Given) -> Iterator[Case]:
    for shape, use, (op, axis) in product(given.shapes, given.uses, _WAYS):
        yield _case(given, shape, use, op, axis)


def _case(given: Given, shape: Shape, use: Use, op: str, axis: int) -> Case:
    fmt, device, dtype = use.format, given.device, torch.bfloat16
    canonical = shape if axis == -1 else shape[::-1]
    moved = shape[0] * shape[1] * (dtype.itemsize + fmt.bits_per_element(canonical) / 8)
    call = Call(op, fmt, None, device.type, dtype, None, canonical[1])
    candidate, reference = (_quantizers if op == "quantize" else _dequantizers)(fmt, axis, moved)
    chosen, other = lowbits(call, candidate, reference, bound=False)
    return Case(
        {
            "op": op,
            "format": use.spec,
            "blocks along": "rows" if axis == -1 else "columns",
            "shape": f"{shape[0]}x{shape[1]}",
        },
        0,
        lambda kind: (normal(*shape, kind=kind, seed=0, device=device),),
        plain,
        chosen,
        Contender("copy of as many bytes", halves(moved), Tensor.copy_, moved),
        other,
        casts(fmt, axis, moved, device) if given.peers and op == "quantize" else (),
    )


def halves(moved: float) -> Callable[[Tensor], Make]:
    """Makes random values and a place for them, of `moved` bytes together."""

    def prepare(x: Tensor) -> Make:
        source = normal(round(moved / 4), kind="normal", seed=0, device=x.device)
        return copies(torch.empty_like(source), source)

    return prepare


def _quantizers(fmt: Format, axis: int, moved: float) -> tuple[Contender, Contender]:
    spec, run = str(fmt), kernel("reference.quantize").run

    def by_reference(x: Tensor) -> QuantizedTensor:
        canonical = x.movedim(axis, -1).contiguous()
        data, scale, *rest = run(canonical, None, None, None, spec, DEFAULT_MODE, "nearest", 0)
        zero = rest.pop(0) if fmt.zero is not None else None
        scales = Scales(scale, zero, rest.pop(0) if fmt.tensor_scale else None)
        return QuantizedTensor.from_parts(data, scales, fmt, k=canonical.shape[-1], dtype=x.dtype, axis=axis)

    def by_lowbit(x: Tensor) -> QuantizedTensor:
        return lowbit.quantize(x, fmt, axis=axis)

    return (
        Contender("lowbit", copies, by_lowbit, moved, _values),
        Contender("reference", copies, by_reference, moved, _values),
    )


def _dequantizers(fmt: Format, axis: int, moved: float) -> tuple[Contender, Contender]:
    run = kernel("reference.dequantize").run

    def prepare(x: Tensor) -> Make:
        return copies(lowbit.quantize(x, fmt, axis=axis))

    def by_reference(q: QuantizedTensor) -> Tensor:
        return run(*q.stored, str(fmt), q.canonical_shape[-1], q.dtype)

    return (
        Contender("lowbit", prepare, QuantizedTensor.dequantize, moved, Tensor.float),
        Contender("reference", prepare, by_reference, moved, Tensor.float),
    )


def _values(q: QuantizedTensor) -> Tensor:
    return q.dequantize(torch.float32)


def _usual(device: str) -> list[Shape]:
    return [(16384, 8192), (131072, 2048), (4096, 4096)] if device == "cuda" else [(1024, 4096)]


benchmark = Benchmark(
    about="round a matrix to a format along its rows or its columns, and decode it",
    dims=(Dim("M", 256, 65536, 4096, grouped=True), Dim("K", 256, 16384, 4096, grouped=True)),
    formats=tuple(FORMATS),
    usual=_usual,
    quantized=lambda shape: [shape, shape[::-1]],
    cases=_cases,
)
