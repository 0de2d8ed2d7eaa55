"""Calls of every operator, with arguments and what they must give: what a backend is checked against.

The specification fixes the bits of quantize, dequantize and embedding. A bag's rows may be summed in float32, in any
order. A product may differ from the exact one (of the same values, in float64) by what an honest kernel loses:

- integer codes on both sides, under scales that do not vary along K: a float32 epilogue;
- any other rounded input: a float32 sum in any order, with scales applied to the values or to sums;
- an input in 8-bit floats, by codes that are some, too: what sums in tensor cores for these lose besides;
- an input that stays as it is: that, weights rounded to its dtype, and the product rounded before the bias;
- always: the result rounded to its dtype.

Nothing here calls an operator of `lowbit`, behind which the backend under test may stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, get_args

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.backends import Call
from lowbit.bags import pool
from lowbit.element import E8M0
from lowbit.errors import FormatError
from lowbit.format import INT8_ROW, Format
from lowbit.grid import product_bound, sample, shapes
from lowbit.groups import padded_rows
from lowbit.numerics import DEFAULT_MODE, ScaleMode, Scales, choose_scale, decode, encode, total_scale
from lowbit.packing import pack, unpack
from lowbit.reference import Matrix, quantize_input
from lowbit.reference import backend as reference
from lowbit.tensor import INNER, QuantizedTensor

_UNIT = 2.0**-24
# Roundings that an honest float32 kernel may add to those of the sum: of values, of scales and of their products.
_FEW = 8
_run = {kernel.op: kernel.run for kernel in reference.kernels() if kernel.pack is None}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that a call must give: within `bound` of the float64 `value`, or its very bits where there is none."""

    value: Tensor
    dtype: torch.dtype
    bound: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of a call, on the CPU, and what it must give."""

    # Shapes and whatever is special, in words.
    told: str
    # The operator's own, in order.
    arguments: tuple[Any, ...]
    wanted: tuple[Wanted, ...]
    # What a kernel that packs gets in the place of the parts.
    weight: QuantizedTensor | None = None
    bias: Tensor | None = None
    # Whether only a bound kernel may get this: an input of another dtype than the call's, as autocast makes it.
    autocast: bool = False
    # Places of arguments that the operator writes to: what they then are is wanted after its results.
    written: tuple[int, ...] = ()
    # What counts of the result, where that is not its bits.
    read: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None


Cases = Callable[[], Iterator[Case]]


def calls(
    fmt: Format,
    activations: Sequence[Activation],
    dtypes: Sequence[torch.dtype],
    matrices: Sequence[tuple[int, int]],
    device: str,
) -> Iterator[tuple[Call, Cases]]:
    """Calls on tensors of `fmt` of every rank, and on weights (N, K) of `matrices` that fit; each with its cases."""
    larger = [shape for matrix in matrices for shape in (matrix, (2, *matrix)) if _fits(fmt, shape)]
    for dtype in dtypes:
        for shape in (*shapes(fmt), *larger):
            weight, k = _Weight(fmt, shape, dtype), shape[-1]
            yield Call("quantize", fmt, None, device, dtype, k=k), weight.quantize
            yield Call("quantize_blocked", fmt, None, device, dtype, k=k), weight.quantize_blocked
            yield Call("quantize_rotated", fmt, None, device, dtype, k=k), weight.quantize_rotated
            if len(shape) > 1:
                yield Call("quantize_both", fmt, None, device, dtype, k=k), weight.quantize_both
            yield Call("dequantize", fmt, None, device, dtype, k=k), weight.dequantize
            if len(shape) == 2:
                yield Call("quantize_groups", fmt, None, device, dtype, k=k), weight.quantize_groups
                yield Call("embedding", fmt, None, device, dtype, *shape), weight.embedding
                yield Call("embedding_bag", fmt, None, device, dtype, *shape), weight.embedding_bag
            if len(shape) in {2, 3}:
                yield from _products(weight, activations, device)


def moves(dtypes: Sequence[torch.dtype], device: str) -> Iterator[tuple[Call, Cases]]:
    """Calls that move rows as they are, and their cases."""
    for dtype in (*dtypes, torch.uint8):
        for k in (5, 96):
            yield Call("pad_groups", None, None, device, dtype, k=k), partial(_padding, k, dtype, "pad_groups")
            yield Call("unpad_groups", None, None, device, dtype, k=k), partial(_padding, k, dtype, "unpad_groups")


def _padding(k: int, dtype: torch.dtype, op: str) -> Iterator[Case]:
    for sizes, align in (
        ([3, 0, 9, 1], 8),
        ([0, 40, 0], 32),
        ([7], 1),
        ([0, 0], 256),
        ([i % 4 for i in range(9)], 20),
    ):
        # Two rows more than are in groups.
        rows, offs = sum(sizes) + 2, torch.tensor(sizes).cumsum(0).to(torch.int32)
        x = torch.randint(100, (rows, k), generator=torch.Generator().manual_seed(k)).to(dtype)
        padded, ends = _run["pad_groups"](x, None, offs, align)
        if op == "pad_groups":
            yield Case(f"groups of {sizes}, {align=}", (x, None, offs, align), _bits(padded, ends))
            index = torch.arange(rows).flip(0).to(torch.int32)
            told = f"groups of {sizes}, {align=}, by an index"
            yield Case(told, (x, index, offs, align), _bits(*_run["pad_groups"](x, index, offs, align)))
        else:
            arguments = (padded, offs, align, rows)
            yield Case(f"groups of {sizes}, {align=}", arguments, _bits(_run["unpad_groups"](*arguments)))


def _products(weight: _Weight, activations: Sequence[Activation], device: str) -> Iterator[tuple[Call, Cases]]:
    fmt, dtype, (*stack, n, k) = weight.format, weight.dtype, weight.shape
    for activation in (None, *activations):
        if activation is not None and not _fits(activation.format, (1, k)):
            continue
        use, both = _Use(weight, activation), activation is not None and activation.scaling == "dynamic"
        if stack:
            yield Call("grouped_mm", fmt, activation, device, dtype, n, k), use.grouped_mm
            if both:
                yield Call("scaled_grouped_mm", fmt, activation, device, dtype, n, k), use.scaled_grouped_mm
            continue
        yield Call("linear", fmt, activation, device, dtype, n, k), use.linear
        if both:
            yield Call("scaled_mm", fmt, activation, device, dtype, n, k), use.scaled_mm
            yield Call("scaled_grouped_mm_k", fmt, activation, device, dtype, n), use.scaled_grouped_mm_k


class _Weight:
    """A quantized tensor with outliers in some rows, made when it is first needed."""

    def __init__(self, fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.format, self.shape, self.dtype = fmt, shape, dtype

    @cached_property
    def canonical(self) -> QuantizedTensor:
        x = sample(self.shape, dtype=self.dtype)
        scales = choose_scale(x, self.format)
        return self.of(encode(x, self.format, scales), scales)

    @cached_property
    def every_code(self) -> QuantizedTensor:
        element, k = self.format.element, self.shape[-1]
        generator = torch.Generator().manual_seed(1)
        raw = torch.randint(256, self.canonical.qdata.shape, dtype=torch.uint8, generator=generator)
        # Unpacked and packed again, so that padding is zero.
        return self.of(pack(unpack(raw.view(element.storage), element, k), element), self.canonical.scales)

    def of(self, data: Tensor, scales: Scales, activation: Activation | None = None, **use: Any) -> QuantizedTensor:
        k = self.shape[-1]
        return QuantizedTensor.from_parts(
            data, scales, self.format, k=k, dtype=self.dtype, activation=activation, **use
        )

    def quantize(self) -> Iterator[Case]:
        x, fmt = sample(self.shape, dtype=self.dtype), self.format
        near = choose_scale(x / 2, fmt)
        half, none = (near.scale, near.zero, near.tensor_scale), (None, None, None)
        uses: list[tuple[str, tuple[Any, ...]]] = [
            (f"scale mode {mode}", (x, *none, str(fmt), mode, "nearest", 0))
            for mode in (get_args(ScaleMode) if fmt.scale is E8M0 else (DEFAULT_MODE,))
        ]
        uses.append(("stochastic rounding", (x, *none, str(fmt), DEFAULT_MODE, "stochastic", 7)))
        uses.append(("given scales, half of what it needs", (x, *half, str(fmt), DEFAULT_MODE, "nearest", 0)))
        if fmt.tensor_scale:
            given = (None, None, near.tensor_scale)
            uses.append(("given tensor scale", (x, *given, str(fmt), DEFAULT_MODE, "nearest", 0)))
        for told, arguments in uses:
            yield Case(f"x {_shown(x)}, {told}", arguments, _bits(*_run["quantize"](*arguments)))
        arguments = (_extremes(x), *none, str(fmt), DEFAULT_MODE, "nearest", 0)
        # A block that is not finite may have any codes.
        yield Case(
            f"x {_shown(x)}, zeros, an infinity, a NaN",
            arguments,
            _bits(*self._decoded(_run["quantize"](*arguments))),
            read=self._decoded,
        )

    def quantize_blocked(self) -> Iterator[Case]:
        x = sample(self.shape, dtype=self.dtype)
        for rest in (("nearest", 0), ("stochastic", 7)):
            arguments = (x, None, str(self.format), DEFAULT_MODE, *rest)
            yield Case(f"x {_shown(x)}, {rest[0]}", arguments, _bits(*_run["quantize_blocked"](*arguments)))

    def quantize_rotated(self) -> Iterator[Case]:
        x, k = sample(self.shape, dtype=self.dtype), self.shape[-1]
        for size in sorted({min(k & -k, 16), k & -k}):
            for rest in (("nearest", 0), ("stochastic", 7, True)):
                arguments = (x, None, size, 5, str(self.format), DEFAULT_MODE, *rest)
                told = f"x {_shown(x)}, {size} channels at a time, {rest[0]}{', scales in tiles' * (len(rest) > 2)}"
                yield Case(told, arguments, _bits(*_run["quantize_rotated"](*arguments)))

    def quantize_both(self) -> Iterator[Case]:
        x, fmt = sample(self.shape, dtype=self.dtype), self.format
        tensor_scale = choose_scale(x / 2, fmt).tensor_scale
        for other in (fmt, INT8_ROW):
            if not _fits(other, tuple(x.mT.shape)):
                continue
            for rest in (("nearest", 0), ("nearest", 0, True), ("stochastic", 7)):
                arguments = (x, None, str(fmt), str(other), DEFAULT_MODE, *rest)
                told = f"x {_shown(x)}, x.mT in {other}, {rest[0]}{', scales in tiles' * (len(rest) > 2)}"
                yield Case(told, arguments, _bits(*_run["quantize_both"](*arguments)))
            if tensor_scale is not None:
                arguments = (x, tensor_scale, str(fmt), str(other), DEFAULT_MODE, "nearest", 0)
                told = f"x {_shown(x)}, x.mT in {other}, given tensor scale"
                yield Case(told, arguments, _bits(*_run["quantize_both"](*arguments)))

    def quantize_groups(self) -> Iterator[Case]:
        rows, k = self.shape
        align, fmt = max(self.format.block[0], 32), self.format
        index = torch.arange(rows, dtype=torch.int32).flip(0)
        offs = torch.tensor([1, 1, rows - 1], dtype=torch.int32)
        padded = padded_rows(rows, len(offs), align)
        x = sample(self.shape, dtype=self.dtype)
        for other, by in ((None, index), (INT8_ROW, None), (fmt, index)):
            if other is not None and not _fits(other, (k, padded)):
                continue
            arguments = (
                x,
                by,
                offs,
                align,
                None,
                str(fmt),
                None if other is None else str(other),
                DEFAULT_MODE,
                "nearest",
                0,
                by is None,
            )
            told = f"x {_shown(x)}, {align=}, columns in {other}{', by an index' * (by is not None)}"
            yield Case(told, arguments, _bits(*_run["quantize_groups"](*arguments)))

    def _decoded(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Values and scales of what quantize gave."""
        data, scale, *rest = parts
        zero = rest.pop(0) if self.format.zero is not None else None
        scales = Scales(scale, zero, rest.pop(0) if self.format.tensor_scale else None)
        return decode(data, self.format, scales, self.shape[-1]), scale

    def dequantize(self) -> Iterator[Case]:
        for told, weight in (("every code", self.every_code), *_variants(self.canonical)[1:]):
            values = _values(weight).to(self.dtype)
            arguments = (*_parts(weight), str(self.format), self.shape[-1], self.dtype)
            yield Case(f"values {_shown(weight)}, {told}", arguments, _bits(values))

    def embedding(self) -> Iterator[Case]:
        some = (
            torch.tensor(1),
            torch.tensor([[0, self.shape[0] - 1], [1, 1]], dtype=torch.int32),
            torch.zeros(0, 2).long(),
        )
        for told, weight in (("every code", self.every_code), *_variants(self.canonical)[1:]):
            values = _values(weight).to(self.dtype)
            for ids in some:
                arguments = (ids, *_parts(weight), str(self.format), self.shape[-1], self.dtype)
                words = f"{ids.dtype} ids {_shown(ids)}, table {_shown(weight)}, {told}"
                yield Case(words, arguments, _bits(values[ids.long()]), weight)

    def embedding_bag(self) -> Iterator[Case]:
        rows, k = self.shape
        ids = torch.arange(11) * 7 % rows
        some = torch.tensor([0, 4, 4, 5])
        for told, weight in _variants(self.canonical):
            values = _values(weight)[ids]
            for mode, offsets, padding, last, weighted in (
                ("sum", some, -1, False, False),
                ("sum", some.int(), 7 % rows, True, True),
                ("mean", some, 7 % rows, False, False),
                ("max", some, -1, True, False),
                ("mean", torch.zeros(0).long(), -1, False, False),
            ):
                by = sample((len(ids),), seed=3, dtype=torch.float32) if weighted else None
                picked = ids.to(offsets.dtype)
                arguments = (picked, offsets, by, *_parts(weight), mode, padding, last, str(self.format), k, self.dtype)
                words = f"{mode} of {offsets.dtype} bags {offsets.tolist()}, {padding=}, {last=}, {weighted=}, table "
                value = pool(values, ids, offsets, by, mode, padding, last=last)
                size = pool(values.abs(), ids, offsets, None if by is None else by.abs(), mode, padding, last=last)
                lost = 0 if mode == "max" else (len(ids) + _FEW) * _UNIT
                value, bound = rounded_to(value, lost * size, None, self.dtype)
                yield Case(f"{words}{_shown(weight)}, {told}", arguments, (Wanted(value, self.dtype, bound),), weight)


class _Use:
    """Products of tokens with a weight, the tokens rounded by an activation or not."""

    def __init__(self, weight: _Weight, activation: Activation | None) -> None:
        self.weight, self.activation, self.dtype = weight, activation, weight.dtype
        self.spec = "" if activation is None else str(activation)

    def linear(self) -> Iterator[Case]:
        plain, *others = _smoothed(_variants(self._used()))
        for lead, bias in (((5,), True), ((1,), False), ((), True), ((0,), True), ((2, 3), False), ((33,), True)):
            yield self._linear(*plain, self._tokens(*lead), bias=bias)
        for told, weight in others:
            yield self._linear(told, weight, self._tokens(5), bias=False)
        x = self._tokens(5)
        yield self._linear("x is a view", plain[1], x.t().contiguous().t(), bias=False)
        # Within float16, unless it meets codes that are not scaled yet.
        x[:, 0] = 1000
        yield self._linear("a column of 1000 in x", plain[1], x, bias=False)
        if self.dtype != torch.bfloat16:
            yield self._linear("autocast to bfloat16", plain[1], self._tokens(5).bfloat16(), bias=True)

    def _linear(self, told: str, weight: QuantizedTensor, x: Tensor, *, bias: bool) -> Case:
        n, k = weight.shape
        added = sample((n,), seed=2, dtype=x.dtype) if bias else None
        near = self._near(x.reshape(-1, k), _matrix(weight), weight, added)
        value, bound = (part.view(*x.shape[:-1], n) for part in near)
        inner = (getattr(weight, name) for name in INNER)
        words = f"x {_shown(x)}, weight {_shown(weight)}, {told}{', bias' * bias}"
        arguments = (x, *inner, added, str(weight.format), self.spec)
        wanted = Wanted(value, x.dtype, bound)
        return Case(words, arguments, (wanted,), weight, added, autocast=x.dtype != self.dtype)

    def grouped_mm(self) -> Iterator[Case]:
        plain, *others = _smoothed(_variants(self._used()))
        yield self._grouped_mm(*plain, rows=0, beyond=0)
        for told, weight in (plain, *others):
            yield self._grouped_mm(told, weight, rows=5, beyond=2)

    def _grouped_mm(self, told: str, weight: QuantizedTensor, *, rows: int, beyond: int) -> Case:
        """Every other expert has rows, and some rows follow the last one's."""
        experts, n, _ = weight.shape
        ends = [(e + 1) // 2 * rows for e in range(experts)]
        x, start = self._tokens(ends[-1] + beyond), 0
        value = torch.zeros(x.shape[0], n, dtype=torch.float64)
        bound = value.clone()
        for e, end in enumerate(ends):
            # Of other sizes than the next expert's, since each expert's are rounded by themselves.
            x[start:end] *= 2.0 ** (-2 * e)
            value[start:end], bound[start:end] = self._near(x[start:end], _expert(weight, e), weight, None)
            start = end
        inner = (getattr(weight, name) for name in INNER)
        arguments = (x, torch.tensor(ends, dtype=torch.int32), *inner, str(weight.format), self.spec)
        words = f"x {_shown(x)}, offs {ends}, weight {_shown(weight)}, {told}"
        return Case(words, arguments, (Wanted(value, self.dtype, bound),), weight)

    def scaled_mm(self) -> Iterator[Case]:
        plain, *others = _variants(self.weight.canonical)
        for m, bias in ((5, True), (1, False), (0, True), (33, False)):
            yield self._scaled_mm(*plain, m, bias=bias)
        for told, weight in others:
            yield self._scaled_mm(told, weight, 5, bias=True)

    def _scaled_mm(self, told: str, weight: QuantizedTensor, m: int, *, bias: bool) -> Case:
        assert self.activation is not None
        n, k = weight.shape
        a, added = quantize_input(self._tokens(m), self.activation, None, None), None
        if bias:
            added = sample((n,), seed=2, dtype=self.dtype)
        first = (a.qdata, a.scales.scale, a.scales.zero, a.scales.tensor_scale)
        value, bound = rounded_to(*_product(a, _matrix(weight)), added, self.dtype)
        words = f"a {(m, k)}, b {_shown(weight)}, {told}{', bias' * bias}"
        arguments = (*first, *_parts(weight), added, str(a.format), str(weight.format), k, self.dtype)
        return Case(words, arguments, (Wanted(value, self.dtype, bound),))

    def scaled_grouped_mm(self) -> Iterator[Case]:
        """Every other expert has rows, and some rows follow the last one's."""
        weight = self.weight.canonical
        experts, n, _ = weight.shape
        for rows, beyond in ((0, 3), (5, 2), (40, 0)):
            ends = [(e + 1) // 2 * rows for e in range(experts)]
            a, start = self._input(ends[-1] + beyond), 0
            value = torch.zeros(ends[-1] + beyond, n, dtype=torch.float64)
            bound = value.clone()
            for e, end in enumerate(ends):
                b = _expert(weight, e)
                product = _of_values(a.values()[start:end], b.values(), as_bytes=_meet_as_bytes(a, b))
                value[start:end], bound[start:end] = rounded_to(*product, None, self.dtype)
                start = end
            yield self._grouped(a, weight, ends, Wanted(value, self.dtype, bound))

    def scaled_grouped_mm_k(self) -> Iterator[Case]:
        """Groups begin at multiples of blocks and of 16."""
        weight, each = self.weight.canonical, max(self.weight.format.block[-1], 16)
        columns = weight.shape[1]
        for ends in ([columns // each * each], [0, each, each, min(3 * each, columns // each * each)]):
            a, b = self._input(24), _matrix(weight)
            values, found = (a.values(), b.values()), list[tuple[Tensor, Tensor]]()
            for start, end in zip([0, *ends], ends, strict=False):
                cut = (side[:, start:end] for side in values)
                found.append(rounded_to(*_of_values(*cut, as_bytes=_meet_as_bytes(a, b)), None, self.dtype))
            value, bound = (torch.stack(parts) for parts in zip(*found, strict=True))
            yield self._grouped(a, weight, ends, Wanted(value, self.dtype, bound))

    def _grouped(self, a: Matrix, weight: QuantizedTensor, ends: list[int], wanted: Wanted) -> Case:
        first = (a.qdata, a.scales.scale, a.scales.zero, a.scales.tensor_scale)
        words = f"a {tuple(a.qdata.shape)}, b {_shown(weight)}, offs {ends}"
        offs = torch.tensor(ends, dtype=torch.int32)
        arguments = (*first, *_parts(weight), offs, str(a.format), str(weight.format), a.k, self.dtype)
        return Case(words, arguments, (wanted,))

    def _input(self, rows: int) -> Matrix:
        assert self.activation is not None
        return quantize_input(self._tokens(rows), self.activation, None, None)

    def _tokens(self, *lead: int) -> Tensor:
        return sample((*lead, self.weight.shape[-1]), seed=1, dtype=self.dtype)

    def _used(self) -> QuantizedTensor:
        """The weight with its activation, whose stored scale, if it has one, lets half of the input saturate."""
        weight, activation = self.weight.canonical, self.activation
        if activation is None:
            return weight
        chosen = choose_scale(self._tokens(5) / 2, activation.format)
        stored: dict[str, Tensor | None] = {}
        if activation.scaling == "static":
            stored = {"act_scale": chosen.scale, "act_zero": chosen.zero}
        elif activation.scaling == "local":
            stored = {"act_scale": chosen.tensor_scale}
        use = {name: part.reshape(()) for name, part in stored.items() if part is not None}
        return self.weight.of(weight.qdata, weight.scales, activation, **use)

    def _near(self, x: Tensor, matrix: Matrix, use: QuantizedTensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Exact result (M, N) of tokens (M, K), and the bound on its error."""
        if not len(x):
            # No tokens have no scales either.
            return (nothing := torch.zeros(0, matrix.qdata.shape[0], dtype=torch.float64)), nothing
        if use.pre_scale is not None:
            x = x * use.pre_scale.to(x.dtype)
        if self.activation is not None:
            tokens = quantize_input(x, self.activation, use.act_scale, use.act_zero)
            return rounded_to(*_product(tokens, matrix), bias, x.dtype)
        values, info = matrix.values(), torch.finfo(x.dtype)
        product, error = _float_product(x.to(torch.float32), values)
        if x.dtype != torch.float32:
            size = values.abs().to(torch.float64) + info.smallest_normal
            error += info.eps / 2 * (x.abs().to(torch.float64) @ size.T)
            error += info.eps / 2 * (product.abs() + error)
        return rounded_to(product, error, bias, x.dtype)


def _product(a: Matrix, b: Matrix) -> tuple[Tensor, Tensor]:
    """Float64 `a @ b.T`, and what a kernel may err by before the bias."""
    if not (a.integer and b.integer):
        return _of_values(a.values(), b.values(), as_bytes=_meet_as_bytes(a, b))
    codes = _integers(a) @ _integers(b).T
    product = codes * total_scale(a.scales).to(torch.float64) * total_scale(b.scales).to(torch.float64).T
    return product, _FEW * _UNIT * product.abs()


def _of_values(a: Tensor, b: Tensor, *, as_bytes: bool) -> tuple[Tensor, Tensor]:
    """The same of values, of which tensor cores for 8-bit floats may multiply the codes."""
    product, error = _float_product(a, b)
    return product, error + tensor_core_error(a, b) if as_bytes and a.shape[-1] else error


def _float_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    left, right = a.to(torch.float64), b.to(torch.float64)
    return left @ right.T, product_bound(a, b) + _FEW * _UNIT * (left.abs() @ right.abs().T)


def _meet_as_bytes(a: Matrix, b: Matrix) -> bool:
    """Whether tensor cores for 8-bit floats may multiply the codes of an input and a weight."""
    weight = b.format.element
    return a.format.element.name in {"e4m3fn", "e5m2"} and (weight.kind == "float" or weight.bits <= 4)


def tensor_core_error(a: Tensor, b: Tensor) -> Tensor:
    """What a sum of products of 8-bit floats may lose in tensor cores, columns in order, in parts or not.

    They add 32 products at a time to a sum, and keep 13 bits below the largest of them and it.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", section 3.3.2.
    """
    left, right = a.to(torch.float64).split(32, -1), b.to(torch.float64).split(32, -1)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    most, products = total, total
    for one, other in zip(left, right, strict=True):
        total = total + one @ other.T
        most = torch.maximum(most, total.abs())
        products = products + one.abs().amax(-1, keepdim=True) * other.abs().amax(-1)
    # A part that begins later is the difference of two sums.
    return 33 * 2.0**-13 * (2 * len(left) * most + products)


def _integers(matrix: Matrix) -> Tensor:
    """Codes less zero points, exactly."""
    zero = matrix.scales.zero
    return matrix.codes().to(torch.float64) - (0 if zero is None else zero.to(torch.float64))


def rounded_to(product: Tensor, error: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Exact result and its bound, once the bias is added in float32 and the sum rounded to `dtype`."""
    info, exact = torch.finfo(dtype), product
    if bias is not None:
        exact = product + bias.to(torch.float64)
        error = error + _UNIT * (exact.abs() + error)
    return exact, error + info.eps / 2 * (exact.abs() + error + info.smallest_normal)


def _expert(weight: QuantizedTensor, e: int) -> Matrix:
    """One of stacked matrices."""
    per_scale, *block = weight.format.block_for(3)
    at = e // per_scale if per_scale else 0
    zero, whole = weight.zero, weight.tensor_scale
    whole = None if whole is None else whole[e if whole.shape[0] > 1 else 0]
    scales = Scales(weight.scale[at], None if zero is None else zero[at], whole)
    return Matrix(weight.qdata[e], scales, weight.format.with_block(*block), weight.shape[-1])


def _matrix(weight: QuantizedTensor) -> Matrix:
    return Matrix(weight.qdata, weight.scales, weight.format, weight.shape[-1])


def _variants(weight: QuantizedTensor) -> list[tuple[str, QuantizedTensor]]:
    """The weight as it is, and in every other form that a call does not tell."""
    inner, found = weight.inner_tensors(), [("contiguous parts", weight)]
    views = {name: _view(part) if name in {"qdata", "scale", "zero"} else part for name, part in inner.items()}
    found.append(("parts that are views", weight.with_inner(views)))
    if weight.tensor_scale is not None and weight.dim() > 1:
        rows = 2.0 ** (torch.arange(weight.scale.shape[-2]) % 3)
        unequal = weight.tensor_scale * rows.view(-1, 1)
        found.append(("a tensor scale a row", weight.with_inner({**inner, "tensor_scale": unequal})))
        if weight.dim() > 2:
            shared = weight.tensor_scale[(slice(1),) * (weight.dim() - 2)]
            found.append(("a tensor scale of all matrices", weight.with_inner({**inner, "tensor_scale": shared})))
    return found


def _smoothed(variants: list[tuple[str, QuantizedTensor]]) -> list[tuple[str, QuantizedTensor]]:
    """Besides, the weight with a `pre_scale` of powers of two, which multiplies without rounding."""
    weight = variants[0][1]
    powers = 2.0 ** (torch.arange(weight.shape[-1]) % 3 - 1)
    return [*variants, ("pre_scale", weight.with_inner({**weight.inner_tensors(), "pre_scale": powers}))]


def _view(part: Tensor) -> Tensor:
    """The same values, a part of wider rows."""
    raw = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
    return torch.cat((raw, raw), -1).narrow(-1, 0, raw.shape[-1]).view(part.dtype)


def _extremes(x: Tensor) -> Tensor:
    """Half of `x` made zero, and an infinity, a NaN, the largest and the smallest value put in."""
    flat, info = x.flatten(), torch.finfo(x.dtype)
    flat[: flat.numel() // 2] = 0
    for i, extreme in enumerate((torch.inf, torch.nan, info.max, info.smallest_normal)):
        flat[i * flat.numel() // 4] = extreme
    return flat.view(x.shape)


def _values(weight: QuantizedTensor) -> Tensor:
    return decode(weight.qdata, weight.format, weight.scales, weight.shape[-1])


def _parts(weight: QuantizedTensor) -> tuple[Tensor | None, ...]:
    return weight.qdata, weight.scale, weight.zero, weight.tensor_scale


def _bits(*tensors: Tensor) -> tuple[Wanted, ...]:
    return tuple(Wanted(tensor, tensor.dtype) for tensor in tensors)


def _fits(fmt: Format, shape: tuple[int, ...]) -> bool:
    try:
        fmt.block_of(shape)
    except FormatError:
        return False
    return True


def _shown(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
