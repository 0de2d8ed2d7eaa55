"""`lowbit bench cast`: rounding a matrix to a format along one axis or both, and back, beside copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

import lowbit
from lowbit.backends import Call, Refusal, kernel
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, Shape, Use, copies, lowbits, plain
from lowbit.bench.inputs import normal
from lowbit.bench.peers import casts
from lowbit.blocked import from_blocked
from lowbit.format import FORMATS, WHOLE, Format
from lowbit.numerics import DEFAULT_MODE, Scales, choose_scale, decode
from lowbit.tensor import QuantizedTensor


def _cases(given: Given) -> Iterator[Case]:
    for shape, use in product(given.shapes, given.uses):
        fmt = use.format
        yield _case(given, shape, use, "quantize", -1)
        yield _case(given, shape, use, "quantize", -2)
        if fmt.tensor_scale:
            yield _parts_case(given, shape, use, "quantize")
        if len(fmt.block) == 2 and fmt.block[0] == 1 and fmt.block[1] != WHOLE:
            yield _parts_case(given, shape, use, "quantize_both")
            if fmt.scale.bits == 8:
                yield _parts_case(given, shape, use, "quantize_blocked")
        # Decoding leaves the axis where it is, so once is enough.
        yield _case(given, shape, use, "dequantize", -1)


def _case(given: Given, shape: Shape, use: Use, op: str, axis: int) -> Case:
    fmt, device, dtype = use.format, given.device, torch.bfloat16
    canonical = shape if axis == -1 else shape[::-1]
    moved = shape[0] * shape[1] * (dtype.itemsize + fmt.bits_per_element(canonical) / 8)
    call = Call(op, fmt, None, device.type, dtype, None, canonical[1])
    candidate, reference = (_quantizers if op == "quantize" else _dequantizers)(fmt, axis, moved)
    chosen, other = lowbits(call, candidate, reference, bound=False)
    along = "rows" if axis == -1 else "columns"
    peers = casts(fmt, axis, moved, device) if given.peers and op == "quantize" else ()
    return _told(given, shape, use, (op, along), moved, chosen, other, peers)


def _parts_case(given: Given, shape: Shape, use: Use, op: str) -> Case:
    """A case of what only operators do, which return parts; the scale of a tensor is given."""
    fmt, both = use.format, op == "quantize_both"
    outputs = (shape, shape[::-1]) if both else (shape,)
    size = 2 + sum(fmt.bits_per_element(each) for each in outputs) / 8
    moved = shape[0] * shape[1] * size
    call = Call(op, fmt, None, given.device.type, torch.bfloat16, None, shape[1])
    spec, rest = str(fmt), (DEFAULT_MODE, "nearest", 0)
    formats = (spec, spec) if both else (spec,)
    before = (None, None) if op == "quantize" else ()
    decoded = partial(_decoded, fmt, op)

    def prepare(x: Tensor) -> Make:
        return copies(x, choose_scale(x, fmt).tensor_scale)

    def contender(name: str, run: Callable[..., list[Tensor]]) -> Contender:
        def cast(x: Tensor, whole: Tensor | None) -> list[Tensor]:
            return run(x, *before, whole, *formats, *rest)

        return Contender(name, prepare, cast, moved, decoded)

    def one_by_one(x: Tensor, whole: Tensor | None) -> list[Tensor]:
        run = torch.ops.lowbit.quantize
        return [part for view in (x, x.mT) for part in run(view, None, None, whole, spec, *rest)]

    run, reference = getattr(torch.ops.lowbit, op), kernel(f"reference.{op}").run
    chosen, other = lowbits(call, contender("lowbit", run), contender("reference", reference), bound=False)
    along = "rows and columns" if both else "rows"
    told = "quantize, tensor scale given" if op == "quantize" else op
    two = (Contender("two casts", prepare, one_by_one, moved, decoded),) if both else ()
    return _told(given, shape, use, (told, along), moved, chosen, other, two)


def _told(
    given: Given,
    shape: Shape,
    use: Use,
    what: tuple[str, str],
    moved: float,
    candidate: Contender | Refusal,
    reference: Contender | None,
    peers: tuple[Contender | Refusal, ...],
) -> Case:
    return Case(
        {"op": what[0], "format": use.spec, "blocks along": what[1], "shape": f"{shape[0]}x{shape[1]}"},
        0,
        lambda kind: (normal(*shape, kind=kind, seed=0, device=given.device),),
        plain,
        candidate,
        Contender("copy of as many bytes", halves(moved), Tensor.copy_, moved),
        reference,
        peers,
    )


def _decoded(fmt: Format, op: str, parts: list[Tensor]) -> Tensor:
    """Values of parts, the first direction's."""
    data, scale, *rest = parts
    k = data.shape[-1] * 8 // fmt.element.bits
    if op == "quantize_blocked":
        scale = from_blocked(scale, fmt.scale_shape((data.shape[0], k)))
    zero = rest.pop(0) if fmt.zero is not None else None
    return decode(data, fmt, Scales(scale, zero, rest.pop(0) if fmt.tensor_scale else None), k)


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
    about="round a matrix to a format along its rows, its columns or both, and decode it",
    dims=(Dim("M", 256, 65536, 4096, grouped=True), Dim("K", 256, 16384, 4096, grouped=True)),
    formats=tuple(FORMATS),
    usual=_usual,
    quantized=lambda shape: [shape, shape[::-1]],
    cases=_cases,
)
