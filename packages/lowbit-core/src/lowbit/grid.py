"""What tests run over: a grid of formats, shapes that fit them, values, and bounds that follow from the format alone.

A test that needs more slack than these bounds give has found something.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from lowbit.element import E8M0
from lowbit.errors import FormatError
from lowbit.format import FORMATS, WHOLE, Format

FORMAT_GRID: tuple[Format, ...] = (
    *FORMATS.values(),
    *map(
        Format.parse,
        (
            "int1:1x24:float32",
            "uint2:1x12:float32:zero=uint2",
            "int3:1x8:float16",
            "int4:4x16:bfloat16",
            "int4:1x*:float32:zero=int4",
            "int5:1x*:float32",
            "uint8:1x*:float32:zero=uint8",
            "e3m2:1x*:float32",
            "int8:1x*x*x*:float32",
        ),
    ),
)
"""Every named format, and composed ones for what those lack.

Odd widths, rows that end inside a byte, 2-D blocks with sub-byte codes, unsigned codes, and one scale over three
dimensions (a convolution's output channel).
"""


def shapes(fmt: Format) -> tuple[tuple[int, ...], ...]:
    """Canonical shapes that fit `fmt`, one of each rank from 1 to 4 that its block allows.

    A grouped dimension holds several blocks, a 2-D block ends in a partial one, a row ends inside a byte.
    """
    found: list[tuple[int, ...]] = []
    for rank in range(1, 5):
        try:
            block = fmt.block_for(rank)
        except FormatError:
            continue
        partial = any(b > 1 for b in block[:-1])
        small = (2, 3, 6, 21)[4 - rank :]
        found.append(tuple(_length(b, n, partial=partial) for b, n in zip(block, small, strict=True)))
    return tuple(found)


def sample(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, some rows (of the last dimension) far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-3, 4, (*shape[:-1], 1), generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), rows).to(dtype)


def rounding_bound(fmt: Format) -> float:
    """Largest `|x - dequantize(quantize(x))|`, as a fraction of the largest magnitude in x's block.

    It covers every scale mode: half a step of the element, and what saturates under a scale that was rounded down, as
    long as that scale is a normal number. Unsigned codes without zero points lose all negative values: infinity.
    """
    element, lost = fmt.element, 2.0 ** -(fmt.scale.mantissa + 1)
    # The float32 division, multiplication and scale round on their own.
    lost += 2.0**-22
    if fmt.zero is not None:
        # The range may be twice the largest magnitude, and rounding the zero point moves its ends by half a step.
        return 2 / (element.max - element.min) + 2 * lost
    if not element.signed:
        return inf
    if fmt.scale is E8M0:
        # The largest value stands anywhere between two powers of two.
        lost = 1 - element.max / 2.0 ** (element.max_exponent + 1)
        return max(2.0**-element.max_exponent if element.kind == "int" else 2.0 ** -(element.mantissa + 1), lost)
    return (1 / (2**element.bits - 1) if element.kind == "int" else 2.0 ** -(element.mantissa + 1)) + lost


def product_bound(a: Tensor, b: Tensor) -> Tensor:
    """Largest error of float32 `a @ b.T` against the exact product, in whatever order it was summed; float64 (M, N).

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1: `|error| <= gamma_K |a| @ |b|.T` with
    `gamma_K = K u / (1 - K u)`, `u = 2^-24`.
    """
    ku = a.shape[-1] * 2.0**-24
    return ku / (1 - ku) * (a.to(torch.float64).abs() @ b.to(torch.float64).abs().T)


def _length(block: int, small: int, *, partial: bool) -> int:
    if block in {1, WHOLE}:
        return small
    return 2 * block - block // 2 if partial else (3 if block <= 32 else 2) * block
