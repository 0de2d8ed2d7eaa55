"""Rounded operands of matrix products, and the products: on tensor cores' kernels, or of decoded values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import NoKernelError
from lowbit.activation import Activation
from lowbit.backends import Call, explain, select
from lowbit.element import E4M3FN, E8M0
from lowbit.experts import grouped_product
from lowbit.format import Format
from lowbit.groups import padded_rows
from lowbit.numerics import Rounding, ScaleMode
from lowbit_moe.recipe import Kernels

Parts = tuple[Tensor, Tensor, Tensor | None]
"""Codes, scales and the tensor scale."""


class Operand(NamedTuple):
    """Values (.., R, K) rounded along K, as the operators take them."""

    parts: Parts
    format: str
    k: int

    def values(self, dtype: torch.dtype) -> Tensor:
        """The values (.., R, K) in `dtype`."""
        codes, scale, whole = self.parts
        return torch.ops.lowbit.dequantize(codes, scale, None, whole, self.format, self.k, dtype)


class Rounded(NamedTuple):
    """How operands are rounded: the scale mode, to nearest or by chance, and the seed (), int64, of the latter."""

    mode: ScaleMode
    rounding: Rounding = "nearest"
    seed: Tensor | None = None

    def along(self, x: Tensor, fmt: Format, align: int, scale: Tensor | None = None) -> Operand:
        """`x` (.., R, K) rounded along K, which zeros fill up to a multiple of `align`; by a `scale` that is known."""
        x = filled(x, align)
        parts = torch.ops.lowbit.quantize(x, scale, None, None, str(fmt), self.mode, self.rounding, 0, self.seed)
        return Operand(_parts(parts), str(fmt), x.shape[-1])

    def both(self, x: Tensor, fmt: Format, align: int, other: Format, other_align: int) -> tuple[Operand, Operand]:
        """`x` (R, K) rounded along K, and `x.mT` along R, in one pass over it where kernels do that."""
        x = filled(x, align, other_align)
        parts = torch.ops.lowbit.quantize_both(
            x, None, str(fmt), str(other), self.mode, self.rounding, 0, seed_offset=self.seed
        )
        first, second = split_parts(parts, fmt)
        return Operand(first, str(fmt), x.shape[1]), Operand(second, str(other), x.shape[0])

    def moved(self, x: Tensor, tokens: Tensor, offs: Tensor, fmt: Format) -> Operand:
        """`x[tokens]` rounded along K, in groups that end at `offs`; zeros beyond."""
        *parts, _ = torch.ops.lowbit.quantize_groups(
            *(x, tokens, offs, 1, None, str(fmt), None, self.mode, self.rounding, 0), seed_offset=self.seed
        )
        return Operand(_parts(parts), str(fmt), x.shape[1])

    def apart(self, x: Tensor, tokens: Tensor | None, offs: Tensor, align: int, fmt: Format) -> tuple[Operand, Tensor]:
        """`x.mT`, or `x[tokens].mT`, rounded along R once groups of rows begin at multiples of `align`; their ends."""
        *parts, ends = torch.ops.lowbit.quantize_groups(
            *(x, tokens, offs, align, None, None, str(fmt), self.mode, self.rounding, 0), seed_offset=self.seed
        )
        rows = x.shape[0] if tokens is None else tokens.shape[0]
        return Operand(_parts(parts), str(fmt), padded_rows(rows, offs.shape[0], align)), ends

    def rotated(self, x: Tensor, fmt: Format, align: int, size: int) -> Operand:
        """`x` (R, K) once pieces of `size` along K are multiplied by a random Hadamard matrix, rounded along K."""
        x = filled(x, align)
        parts = torch.ops.lowbit.quantize_rotated(
            x, None, size, 0, str(fmt), self.mode, self.rounding, 0, seed_offset=self.seed
        )
        return Operand(_parts(parts), str(fmt), x.shape[-1])


def split_parts(parts: list[Tensor], fmt: Format) -> tuple[Parts, Parts]:
    """The parts of `fmt`, and those of another format that follow if there are some, of a quantizing operator."""
    first = 2 + fmt.tensor_scale
    return _parts(parts[:first]), _parts(parts[first:])


def _parts(parts: list[Tensor]) -> Parts:
    return tuple(parts + [None] * (3 - len(parts)))  # pyright: ignore[reportReturnType] - three of them


def filled(x: Tensor, align: int, rows: int = 1) -> Tensor:
    """`x` (.., R, K) with zeros that fill up K and R to multiples."""
    right, below = -x.shape[-1] % align, -x.shape[-2] % rows
    return torch.nn.functional.pad(x, (0, right, 0, below)) if right or below else x


def product(a: Operand, b: Operand, bias: Tensor | None, dtype: torch.dtype, kernels: Kernels) -> Tensor:
    """`a @ b.T + bias` (R, N) of a (R, K) and b (N, K), rounded once to `dtype`.

    Raises:
        NoKernelError: `kernels` is "native", and this machine has none.
    """
    if _runs("scaled_mm", a, b, dtype, kernels):
        return torch.ops.lowbit.scaled_mm(*_given(a), *_given(b), bias, a.format, b.format, a.k, dtype)
    wide = _wide(a, b, dtype)
    found = a.values(wide) @ b.values(wide).mT
    return as_dtype(found if bias is None else found + bias, dtype)


def grouped(a: Operand, b: Operand, offs: Tensor, dtype: torch.dtype, kernels: Kernels) -> Tensor:
    """Products of groups that end at `offs` (E,) int32, as `lowbit.experts.grouped_product` has them, in `dtype`.

    Raises:
        NoKernelError: `kernels` is "native", and this machine has none.
    """
    op = "scaled_grouped_mm" if b.parts[0].dim() == 3 else "scaled_grouped_mm_k"
    if _runs(op, a, b, dtype, kernels):
        return getattr(torch.ops.lowbit, op)(*_given(a), *_given(b), offs, a.format, b.format, a.k, dtype)
    wide = _wide(a, b, dtype)
    return as_dtype(grouped_product(a.values(wide), b.values(wide), offs, apart=True), dtype)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; itself if it is, which a graph of torch 2.11 must not see as a second result of a layer.

    Every tensor that a function of autograd makes is a result to that graph, and of two that are one the first has no
    gradient.
    """
    return x if x.dtype == dtype else x.to(dtype)


_counts: list[Counter[str]] = []


@contextmanager
def count_products() -> Generator[Counter[str]]:
    """How many products of layers run within, by what they are of: "native", "emulated", and "plain".

    What `torch.compile` compiled is not counted.
    """
    counts: Counter[str] = Counter()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts.remove(counts)


def counted(kind: str) -> None:
    """Note a product."""
    if not torch.compiler.is_compiling():
        for counts in _counts:
            counts[kind] += 1


def _runs(op: str, a: Operand, b: Operand, dtype: torch.dtype, kernels: Kernels) -> bool:
    native = kernels != "emulated" and _native(
        op, a.format, b.format, a.parts[0].device.type, dtype, kernels == "native"
    )
    counted("native" if native else "emulated")
    return native


@torch.compiler.assume_constant_result
def _native(op: str, a: str, b: str, device: str, dtype: torch.dtype, must: bool) -> bool:  # noqa: FBT001 - as Dynamo calls it
    """Whether a backend has a kernel for an operator.

    Raises:
        NoKernelError: none has, and one `must`.
    """
    # Of how many rows and columns does not decide: operands are filled up.
    columns = None if op == "scaled_grouped_mm_k" else 1024
    call = Call(op, Format.parse(b), Activation(Format.parse(a)), device, dtype, 1024, columns)
    found = not select(call, bound=False).kernel.name.startswith("reference.")
    if must and not found:
        raise NoKernelError(f"no kernel of a backend runs this product, and only such were asked for:\n{explain(call)}")
    return found


def _given(operand: Operand) -> tuple[Tensor | None, ...]:
    codes, scale, whole = operand.parts
    return codes, scale, None, whole


def _wide(a: Operand, b: Operand, dtype: torch.dtype) -> torch.dtype:
    """The dtype that holds the values of both as they are: bfloat16 if it can, and is what is wanted."""
    return dtype if dtype == torch.bfloat16 and _are_short(a.format, b.format) else torch.float32


@torch.compiler.assume_constant_result
def _are_short(*specs: str) -> bool:
    return all(_is_short(Format.parse(spec)) for spec in specs)


def _is_short(fmt: Format) -> bool:
    """Whether codes times scales have at most the 8 digits of a bfloat16; tensor scales are powers of two."""
    element = fmt.element
    digits = element.mantissa + 1 if element.kind == "float" else element.bits - element.signed
    return fmt.scale is E8M0 or (fmt.scale is E4M3FN and digits + 4 <= 8)
