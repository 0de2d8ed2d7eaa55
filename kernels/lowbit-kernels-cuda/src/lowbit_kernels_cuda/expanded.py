"""Packed 4-bit weights as e4m3 in memory, for torch's products of 8-bit floats, which are faster with many tokens.

An integer is an e4m3. So is a 4-bit float times the power of two by which its group's scale exceeds a factor of its
row, if the scales of a row are not too far apart: `row_factors` says so.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.format import FORMATS, Format
from lowbit_kernels_cuda.codes import encode_float, to_float32
from lowbit_kernels_cuda.scaling import raw, spec
from lowbit_kernels_cuda.weights import places

# 6 times 2^6 is the largest e4m3 of a bit of mantissa, and half of 2^-5 the least that is not subnormal.
_UP, _DOWN = 6, 5
# Times 64 columns that a program writes.
_STEPS = 16


def row_factors(scale: Tensor, codes: Tensor) -> Tensor | None:
    """Float32 (N,) of e2m1 `codes` (N, K), a byte each, with e8m0 scales (N, K / group): powers of two.

    A code times its scale over its row's factor is an e4m3. None: not of every code.
    """
    exponents = raw(scale).int()
    used = (codes.unflatten(1, (exponents.shape[1], -1)) & 7 != 0).any(-1)
    most = torch.where(used, exponents, 0).amax(1)
    least = torch.where(used, exponents, 255).amin(1).minimum(most)
    # As the exponent of a float32, of which 0 has other meanings.
    fields = (most - _UP).clamp_min(1)
    if bool((used.any(1) & (fields - least > _DOWN)).any()):
        return None
    return (fields << 23).view(torch.float32)


def expand(
    words: Tensor, scale: Tensor, factors: Tensor | None, fmt: Format, n: int, k: int, lift: int
) -> tuple[Tensor, Tensor]:
    """E4m3 (N, K) of packed words, and float32 (K / group, N) that they are to be multiplied by, or (1, N).

    Words are of columns that were `side_by_side`: of integers, or of floats with `row_factors`, whose scales are packed
    `lift` powers of two larger. Groups of integers are of a multiple of 128 columns.
    """
    out = torch.empty(n, k, dtype=torch.uint8, device=words.device)
    grid = words.shape[0], triton.cdiv(words.shape[1], _STEPS)
    kernel: Any = write_floats
    group = fmt.block_for(2)[-1]
    if factors is not None:
        scales = factors[None]
        kernel[grid](
            *(words, raw(scale), factors, out, n, k, words.shape[1]),
            PLACES=places(fmt.element),
            GROUP=group,
            LIFT=lift,
            STEPS=_STEPS,
        )
    else:
        scales, kernel = torch.empty(k // group if group else 1, n, device=words.device), write_integers
        to = spec(FORMATS["FP8_ROW"], device=words.device if words.is_cuda else None)
        kernel[grid](words, raw(scale), scales, out, n, k, words.shape[1], GROUP=group, TO=to, STEPS=_STEPS)
    return out.view(torch.float8_e4m3fn), scales


@triton.jit
def write_integers(words, packed, scales, out, n, k, steps, GROUP: tl.constexpr, TO: tl.constexpr, STEPS: tl.constexpr):
    """STEPS times 64 columns of a tile's 16 rows, and the scales that begin there."""
    tile, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * STEPS
    word = _words(words, tile, first, steps, STEPS)
    for half in tl.static_range(2):
        codes = word >> (4 * half)
        x = ()
        for i in tl.static_range(4):
            x = x + ((((codes >> (8 * i)) & 15) - 8).to(tl.float32),)
        if TO.convert != "":
            # Rather than conversions one by one, of whose codes a ptxas loses some.
            four = tl.inline_asm_elementwise(TO.convert, "=r,f,f,f,f", [x[0], x[1], x[2], x[3]], tl.int32, True, 1)
        else:
            four = tl.zeros_like(word)
            for i in tl.static_range(4):
                four |= encode_float(x[i], x[i], TO.element, False) << (8 * i)
        _write(four, out, tile * 16 + half * 8, first, n, k, STEPS)
    row, column = tl.arange(0, 16)[None, :], (first + 2 * tl.arange(0, STEPS // 2)[:, None]) * 64
    group, groups, begins = 0 * column, 1, column == 0
    if GROUP:
        group, groups, begins = column // GROUP, tl.cdiv(k, GROUP), column % GROUP == 0
    inside = begins & (column < k) & (tile * 16 + row < n)
    scale = tl.load(packed + (tile * groups + group) * 16 + row % 8 * 2 + row // 8, inside, 0)
    tl.store(scales + group * n + tile * 16 + row, to_float32(scale), inside)


@triton.jit
def write_floats(
    words,
    packed,
    factors,
    out,
    n,
    k,
    steps,
    PLACES: tl.constexpr,
    GROUP: tl.constexpr,
    LIFT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS times 64 columns of a tile's 16 rows, times their scales over the factors of rows."""
    EACH: tl.constexpr = max(64 // GROUP, 1)
    SPAN: tl.constexpr = max(GROUP // 64, 1)
    tile, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * STEPS
    word = _words(words, tile, first, steps, STEPS)
    step = first + tl.arange(0, STEPS)[:, None, None, None]
    row = tl.arange(0, 8)
    which = tl.arange(0, 4)[None, None, None, :] * 16 // GROUP % EACH
    for half in tl.static_range(2):
        place = (tile * tl.cdiv(steps, SPAN) + step // SPAN) * 16 + row[None, :, None, None] * 2 + half
        field = tl.load(packed + place * EACH + which, step < steps, 0).to(tl.int32) - LIFT
        at = tile * 16 + half * 8 + row
        factor = tl.load(factors + at, at < n, 1.0).to(tl.int32, bitcast=True) >> 23
        # Bits of four codes among those of e4m3s, which are then 2^-6 of what they stand for.
        size, four = tl.zeros_like(word), tl.zeros_like(word)
        for i in tl.static_range(2):
            for bit in tl.static_range(3):
                size |= _moved(word, PLACES[2 * i + half][bit], 8 * i + 2 + bit)
            four |= _moved(word, PLACES[2 * i + half][3], 8 * i + 7)
        # All that are not 0 get as much more exponent, but half, a subnormal, becomes a power of two.
        large = (size | (size << 1)) & 0x10101010
        small = (size & 0x04040404) & ~(large >> 2)
        more = (field - factor[None, :, None, None] + 6) << 3
        four |= size - small + ((large >> 4) | (small >> 2)) * more
        _write(four, out, tile * 16 + half * 8, first, n, k, STEPS)


@triton.jit
def _moved(word, FROM: tl.constexpr, TO: tl.constexpr):
    """A bit of both halves of words, elsewhere in them."""
    if FROM < TO:
        word = word << (TO - FROM)
    else:
        word = word >> (FROM - TO)
    return word & (0x10001 << TO if TO < 15 else -0x7FFF8000)


@triton.jit
def _words(words, tile, first, steps, STEPS: tl.constexpr):
    """(STEPS, 8, 4, 4): of a tile's steps from the first on, the four words that each lane has."""
    step = first + tl.arange(0, STEPS)[:, None, None, None]
    lane = tl.arange(0, 8)[None, :, None, None] * 4 + tl.arange(0, 4)[None, None, :, None]
    place = ((tile * steps + step) * 32 + lane) * 4 + tl.arange(0, 4)[None, None, None, :]
    return tl.load(words + place, step < steps, 0)


@triton.jit
def _write(four, out, top, first, n, k, STEPS: tl.constexpr):
    """Words of four codes that follow one another in a row, (STEPS, 8, 4, 4) as `_words` has them."""
    four = tl.reshape(tl.permute(four, (1, 0, 3, 2)), (8, STEPS * 16))
    row = (top + tl.arange(0, 8))[:, None]
    column = first * 16 + tl.arange(0, STEPS * 16)[None, :]
    tl.store((out + row * k).to(tl.pointer_type(tl.int32)) + column, four, (row < n) & (column * 4 < k))
