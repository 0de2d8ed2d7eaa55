"""A step of AdamW over all tensors of a group in one launch, with the means of gradients in 8, 4 or 32 bits.

Programs find their tensor in a table of addresses, so that neither the number of tensors nor their sizes cost launches.
Codes of the means are decoded by a table, moved on and encoded in registers: each byte of a parameter, its gradient and
its states is read once and written once. What limits a step beside memory are operations on integers, of which a GPU
has half as many as on floats: so codes are made by products and logarithms, and end as the last bits of a float.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# Tiles of a program, which is one warp: what several would wait for each other for is longer than what they share.
_TILES = 8
# Beyond it the floats are whole numbers, and so are those below.
_MAGIC = tl.constexpr(12582912.0)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Item(Protocol):
    """A parameter as `lowbit_moe.states` has it: (R, C), whose states have scales of blocks of a row."""

    parameter: Tensor
    gradient: Tensor
    step: Tensor
    mean: Tensor
    mean_scale: Tensor | None
    square: Tensor
    square_scale: Tensor | None
    number: int


def _tables(items: Sequence[Item], block: int) -> tuple[Tensor, ...]:
    rows, counts = list[list[int]](), list[int]()
    for each in items:
        columns = each.parameter.shape[1]
        along = -(-columns // block)
        blocks = each.parameter.shape[0] * along
        parts = (each.parameter, each.gradient, each.mean, each.mean_scale, each.square, each.square_scale, each.step)
        addresses = [0 if part is None else part.data_ptr() for part in parts]
        rows.append([*addresses, columns, along, blocks, sum(counts), each.number])
        counts.append(-(-blocks // (_rows(block) * _TILES)))
    device = items[0].parameter.device
    pinned = device.type == "cuda"
    there = torch.tensor(rows, dtype=torch.int64, pin_memory=pinned)
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    owners = owners.pin_memory() if pinned else owners
    factors = torch.empty(len(rows), 4, dtype=torch.float32, device=device)
    # What is copied from must be there until it is, or for as long as a graph copies.
    return there.to(device, non_blocking=True), owners.to(device, non_blocking=True), factors, there, owners


def _rows(block: int) -> int:
    """Blocks of a tile, which are 256 numbers together."""
    return 256 // block


def adamw(
    kept: dict[Any, tuple[Tensor, ...]],
    items: Sequence[Item],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    bits: int,
    block: int,
    values: Tensor,
    stochastic: bool,
    seed: int,
) -> None:
    """See `lowbit_moe.states.step_in_torch`: the same, but for the order of products and what is drawn.

    `values` are what codes of the means, then of the squares, stand for; scales are of `block` columns of a row.
    `kept`, empty at first, lives as long as every tensor of the items stays where it is, as a graph that replays needs.
    """
    # One on another device is waited for.
    lr = lr if isinstance(lr, Tensor) and lr.device == items[0].parameter.device else float(lr)
    groups: dict[Any, list[Item]] = {}
    for each in items:
        columns, addresses = each.parameter.shape[1], (each.parameter.data_ptr(), each.gradient.data_ptr())
        aligned = columns % 8 == 0 and all(address % 16 == 0 for address in addresses)
        rows = "whole" if aligned and columns % block == 0 else "aligned" if aligned else "any"
        groups.setdefault((each.parameter.dtype, each.gradient.dtype, rows), []).append(each)
    for key, some in groups.items():
        if key not in kept:
            levels = values.to(some[0].parameter.device)
            kept[key] = (*_tables(some, block), levels)
        table, owners, factors, *_, levels = kept[key]
        of_parameter, of_gradient, rows = key
        corrected: Any = _corrected[(len(some),)]
        logs = (math.log(beta) if beta else -math.inf for beta in betas)
        corrected(table, factors, lr, *logs, weight_decay, ON_DEVICE=isinstance(lr, Tensor), num_warps=1)
        run: Any = _adamw[(owners.shape[0],)]
        run(
            *(table, owners, factors, levels, *(1 - beta for beta in betas), eps, seed),
            BITS=bits,
            BLOCK=block,
            ROWS=_rows(block),
            TILES=_TILES,
            P=_TYPES[of_parameter],
            G=_TYPES[of_gradient],
            BLOCKS=rows,
            MAXIMIZE=maximize,
            STOCHASTIC=stochastic and of_parameter == torch.bfloat16,
            NATIVE=not knobs.runtime.interpret,
            num_warps=1,
        )


@triton.jit
def _corrected(table, factors, lr, log1, log2, weight_decay, ON_DEVICE: tl.constexpr):
    """By what a step of each item is multiplied: its size, what makes a square a variance, what is kept of values."""
    item = tl.program_id(0)
    steps = tl.load(tl.load(table + item * 12 + 6).to(tl.pointer_type(tl.float32))).to(tl.float64)
    rate = lr
    if ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
    # 1 - beta^step in float64: where it is near 0, float32 has few digits left.
    tl.store(factors + item * 4, (rate / (1 - tl.exp(steps * log1))).to(tl.float32))
    tl.store(factors + item * 4 + 1, (1 / tl.sqrt(1 - tl.exp(steps * log2))).to(tl.float32))
    tl.store(factors + item * 4 + 2, 1 - rate * weight_decay)


@triton.jit
def _adamw(
    table,
    owners,
    factors,
    values,
    of_new1,
    of_new2,
    eps,
    seed,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    BLOCKS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NATIVE: tl.constexpr,
):
    program = tl.program_id(0)
    item = tl.load(owners + program)
    row = table + item * 12
    S: tl.constexpr = tl.float32 if BITS == 32 else tl.uint8
    parameters = tl.load(row).to(tl.pointer_type(P))
    gradients = tl.load(row + 1).to(tl.pointer_type(G))
    means = tl.load(row + 2).to(tl.pointer_type(S))
    mean_scales = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    squares = tl.load(row + 4).to(tl.pointer_type(S))
    square_scales = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    step = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32)))
    columns = tl.load(row + 7)
    along, blocks, first = tl.load(row + 8).to(tl.int32), tl.load(row + 9).to(tl.int32), tl.load(row + 10).to(tl.int32)
    number = tl.load(row + 11)
    if BLOCKS != "any":
        parameters, gradients = tl.multiple_of(parameters, 16), tl.multiple_of(gradients, 16)
        columns = tl.multiple_of(columns, 8)
        means, squares = tl.multiple_of(means, min(BITS, 16)), tl.multiple_of(squares, min(BITS, 16))
    size, shrink, keep = tl.load(factors + item * 4), tl.load(factors + item * 4 + 1), tl.load(factors + item * 4 + 2)
    # From here on a block is one of this program's, and so are addresses: their offsets are small.
    begin = (program - first) * (TILES * ROWS)
    mean_scales += begin
    square_scales += begin
    if BLOCKS == "whole":
        ahead = begin.to(tl.int64) * BLOCK
        parameters += ahead
        gradients += ahead
        means += ahead // 2 if BITS == 4 else ahead
        squares += ahead // 2 if BITS == 4 else ahead
    place, pairs = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK // 2)[None, :]
    for tile in range(TILES):
        block = tile * ROWS + tl.arange(0, ROWS)
        known = block < blocks - begin
        there = known[:, None]
        if BLOCKS == "whole":
            at, inside = block[:, None] * BLOCK + place, there
            packed, both = block[:, None] * (BLOCK // 2) + pairs, there
        else:
            of_row = ((begin + block) // along).to(tl.int64)
            start = ((begin + block) % along).to(tl.int64) * BLOCK
            length, at = tl.minimum(columns - start, BLOCK), of_row * columns + start
            # Rows of an odd number of columns end with half a byte.
            packed = of_row * ((columns + 1) // 2) + start // 2
            if BLOCKS == "aligned":
                at, length = tl.multiple_of(at, [8]), tl.multiple_of(length, [8])
                packed = tl.multiple_of(packed, [4])
            inside, at = there & (place < length[:, None]), at[:, None] + place
            both, packed = there & (pairs * 2 < length[:, None]), packed[:, None] + pairs
        p = tl.load(parameters + at, inside, 0).to(tl.float32)
        g = tl.load(gradients + at, inside, 0).to(tl.float32)
        if MAXIMIZE:
            g = -g
        if BITS == 32:
            m, v = tl.load(means + at, inside, 0), tl.load(squares + at, inside, 0)
        else:
            of_mean = tl.load(mean_scales + block, known, 0)[:, None]
            of_square = tl.load(square_scales + block, known, 0)[:, None]
            if BITS == 8:
                codes, square_codes = tl.load(means + at, inside, 0), tl.load(squares + at, inside, 0)
            else:
                codes = _nibbles(tl.load(means + packed, both, 0), ROWS, BLOCK)
                square_codes = _nibbles(tl.load(squares + packed, both, 0), ROWS, BLOCK)
            m = _looked_up(values, codes, NATIVE) * of_mean
            v = _looked_up(values + (1 << BITS), square_codes, NATIVE) * of_square
        m += of_new1 * (g - m)
        v += of_new2 * (g * g - v)
        p = p * keep - size * _over(m, _root(v, NATIVE) * shrink + eps, NATIVE)
        if STOCHASTIC:
            p = _by_chance(p, seed + number, step, begin + block, ROWS, BLOCK).to(P, bitcast=True)
        tl.store(parameters + at, p.to(P), inside)
        if BITS == 32:
            tl.store(means + at, m, inside)
            tl.store(squares + at, v, inside)
        else:
            of_mean, of_square = _scale(tl.max(tl.abs(m), 1), BITS - 1), tl.max(v, 1)
            codes = _codes(tl.abs(m), m, of_mean, BITS - 1, NATIVE)
            if BITS == 8:
                of_square = _scale(of_square, 8)
                tl.store(means + at, codes, inside)
                tl.store(squares + at, _codes(v, v, of_square, 8, NATIVE), inside)
            else:
                square_codes = tl.maximum(v * (_inverse(of_square) * 16)[:, None] - 1, 0) + _MAGIC
                tl.store(means + packed, _packed(codes & 15, ROWS, BLOCK), both)
                tl.store(squares + packed, _packed(_last(square_codes), ROWS, BLOCK), both)
            tl.store(mean_scales + block, of_mean, known)
            tl.store(square_scales + block, of_square, known)


@triton.jit
def _looked_up(table, codes, NATIVE: tl.constexpr):
    """What the table has for each code, in the registers where that is: a load's would be others."""
    if NATIVE:
        address = table.to(tl.int64) + codes.to(tl.int64) * 4
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [address], tl.float32, is_pure=True, pack=1
        )
    return tl.load(table + codes.to(tl.int32))


@triton.jit
def _near(x, INSTRUCTION: tl.constexpr):
    """What an instruction that is off in the last bits gives, and of numbers that are nearly 0 what it gives of 0."""
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _root(x, NATIVE: tl.constexpr):
    return _near(x, "sqrt.approx.ftz.f32 $0, $1;") if NATIVE else tl.sqrt(x)


@triton.jit
def _over(x, y, NATIVE: tl.constexpr):
    return x * _near(y, "rcp.approx.ftz.f32 $0, $1;") if NATIVE else x / y


@triton.jit
def _log2(x, NATIVE: tl.constexpr):
    return _near(x, "lg2.approx.ftz.f32 $0, $1;") if NATIVE else tl.log2(x)


@triton.jit
def _codes(x, signed, scale, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """The codes, uint8, of numbers x from 0 to the highest level, or nearly, times their scale; negated as `signed` is.

    An octave i begins at 8^i if x is divided by 8^-BITS, and has 2^i levels. A logarithm that is off by a little finds
    the octave below or above at its very end, and by the same code.
    """
    # What is below all octaves is in one of code 0.
    whole: tl.constexpr = 8**BITS
    a = tl.maximum(x * (_inverse(scale) * whole)[:, None], 0.99)
    # Added to a float of this size, a number is rounded to a whole one, in the last bits.
    octave = (_log2(a, NATIVE) * (1 / 3) - 0.5 + _MAGIC).to(tl.int32, bitcast=True)
    part = (a.to(tl.int32, bitcast=True) - octave * (3 << 23)).to(tl.float32, bitcast=True)
    levels = (octave * (1 << 23) + (127 << 23)).to(tl.float32, bitcast=True)
    code = (part * (1 / 7) + 6 / 7) * levels - 0.5
    sign = ((signed.to(tl.int32, bitcast=True) & -0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)
    return _last(code * sign + _MAGIC)


@triton.jit
def _last(x):
    return x.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _scale(most, BITS: tl.constexpr):
    """The scale by which `most` is the highest level."""
    over: tl.constexpr = 1 / (1 - 0.875 / (1 << BITS))
    return most * over


@triton.jit
def _inverse(scale):
    some = scale > 0
    return tl.where(some, 1 / tl.where(some, scale, 1), 0.0)


@triton.jit
def _nibbles(packed, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, BLOCK))


@triton.jit
def _packed(codes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    low, high = tl.split(tl.reshape(codes, (ROWS, BLOCK // 2, 2)))
    return low | (high << 4)


@triton.jit
def _by_chance(p, seed, step, block, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of a bfloat16 next to each number, the nearer the likelier; 16 bits of chance for each."""
    counter = (block.to(tl.int64) * (BLOCK // 8))[:, None] + tl.arange(0, BLOCK // 8)[None, :]
    none = tl.zeros_like(counter).to(tl.int32)
    a, b, c, d = tl.philox(
        (step.to(tl.int64) << 32) | (seed & 0xFFFFFFFF),
        counter.to(tl.int32),
        (counter >> 32).to(tl.int32),
        none,
        none,
        7,
    )
    # Words a, b, c, d, and of each its low half first.
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BLOCK // 2))
    halves = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (ROWS, BLOCK))
    moved = (p.to(tl.int32, bitcast=True) + halves) >> 16
    # What is no number would become one.
    return tl.where(p == p, moved, 0x7FC0).to(tl.int16)
