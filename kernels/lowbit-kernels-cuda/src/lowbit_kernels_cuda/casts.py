"""The operators `quantize`, `_blocked`, `_rotated`, `_both` and `_groups`: scales, codes and packing from one read.

A tile of values is read along whichever dim is contiguous in memory, and all else follows while it is in registers. It
is there as planes, each of every n-th column: a thread has side by side what makes a word of codes, and a whole block
where that is no longer than its planes, so that it finds the scale alone.

A scale of a matrix or of a row longer than a tile, and a tensor scale that is not given, take one more read before.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportUnnecessaryComparison=false

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.blocked import blocked_shape
from lowbit.errors import FormatError
from lowbit.format import WHOLE, Format
from lowbit.groups import check_groups
from lowbit.hadamard import Rotation
from lowbit.numerics import Rounding, ScaleMode, Scales, check_choice, check_scales, data_shape
from lowbit_kernels_cuda.groups import pad_groups, padded_sources
from lowbit_kernels_cuda.scaling import (
    Spec,
    divide,
    divisor_of,
    encode_planes,
    from_ordered,
    join_planes,
    magnitude,
    ordered,
    raw,
    scale_of_amax,
    scale_of_range,
    scale_value,
    spec,
    split_planes,
    tensor_scale_of_amax,
    to_float32,
    uniform,
)

# Values of a whole row that one program holds.
_LONGEST = 16384
# Programs that keep a GPU busy, if not all of its memory.
_BUSY = 512


@dataclass(frozen=True, slots=True)
class _Way:
    """What a kernel is compiled for besides its tile: a format, and where its scales come from and go to."""

    spec: Spec
    # Columns and rows of a block; WHOLE: all.
    group: int
    height: int
    # "tile": of the values in it; "extent": of `_measure`; "given".
    source: str
    # "": none; "matrix" or "rows": given; "amax": of `_measure`.
    tensor: str
    # Whether scales lie in tiles of 128x4, see `lowbit.blocked`.
    blocked: bool
    # Whether scales are short, see `divide`: those of blocks, unless one is given for the tensor.
    short: bool


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows and columns of values that a program takes, how often side by side, and its warps."""

    rows: int
    columns: int
    warps: int
    chunks: int = 1


def _tile(rows: int, columns: int, way: _Way, *, across: bool) -> _Tile:
    """The tile for matrices of canonical `rows` x `columns`; `across`: rows lie side by side in memory, not columns.

    These numbers and those of `_tile_both` are all there is to tune.
    """
    if way.height not in {1, WHOLE}:
        return _Tile(way.height, way.group, 8)
    if way.source == "tile" and way.group == WHOLE:
        # Whole rows, with as little beyond their ends as can be.
        chunks = min(range(1, 9), key=lambda n: (n * _length(columns, n), n))
        length = _length(columns, chunks)
        warps = min(max(_power(length * chunks // 1792), 1), 8)
        return _Tile(_at_most(max(_power(2048 // (length * chunks)), 1), rows), length, warps, chunks)
    wide = way.spec.element.bits > 4
    if across:
        if way.group == 32:
            return _Tile(128, 128, 8) if wide else _Tile(64, 128, 2)
        return _Tile(64, max(128, way.group), 4)
    length = max(_at_most(128, columns), way.group, 16)
    size = 4096 if wide or way.group == 32 else 8192
    return _Tile(_at_most(size // length, rows), length, 4)


def _spread(tile: _Tile, batch: int, rows: int, columns: int, way: _Way) -> _Tile:
    """The tile, lower where a small matrix would keep but some of a GPU's processors busy."""
    while (
        way.height == 1
        and tile.rows > 1
        and tile.rows * tile.columns * tile.chunks > 512 * tile.warps
        and batch * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns * tile.chunks) < _BUSY
    ):
        tile = replace(tile, rows=tile.rows // 2)
    return tile


def _length(columns: int, chunks: int) -> int:
    """The power of two that is long enough for so many `chunks` of a row, 16 or more."""
    return max(triton.next_power_of_2(triton.cdiv(columns, chunks)), 16)


def _power(number: int) -> int:
    """The largest power of two no larger than the number, 0 for 0."""
    return 1 << number.bit_length() >> 1


def _tile_both(columns: int, way: _Way, other: _Way) -> _Tile:
    """The tile for both directions of matrices of `columns`."""
    wide = max(way.spec.element.bits, other.spec.element.bits) > 4
    down = max(128 if wide else 64, other.group)
    return _Tile(down, max(_at_most(128, columns), way.group), 8 if wide else 4)


def _planes(way: _Way, *, across: bool, both: bool, aligned: bool) -> int:
    """Values of a row that a thread has side by side, whose codes make words: a multiple of a run.

    The more, the fewer threads find the scale of one block.
    """
    bits, run = way.spec.element.bits, way.spec.run
    if bits == 6:
        return 16 if aligned else 4
    if bits not in {1, 2, 4, 8}:
        return max(run, 4)
    block = way.group if way.height == 1 and way.group != WHOLE else 4
    if across:
        return max(run, min(block, 32))
    return max(run, min(block, 16)) if both or bits < 8 else 4


def _at_most(length: int, needed: int) -> int:
    """A power of two, `length` or what covers the `needed`."""
    return max(min(length, triton.next_power_of_2(needed)), 1)


def quantize(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    fmt: str,
    mode: ScaleMode,
    rounding: Rounding,
    seed: int,
) -> list[Tensor]:
    """The operator `quantize`.

    Raises:
        FormatError: as the operator.
    """
    given = None if scale is None else (scale, zero)
    out = _Out(x, Format.parse(fmt), tensor_scale, mode, rounding, given=given)
    return _run(x, out, None, rounding, seed)


def quantize_blocked(
    x: Tensor, tensor_scale: Tensor | None, fmt: str, mode: ScaleMode, rounding: Rounding, seed: int
) -> list[Tensor]:
    """The operator `quantize_blocked`.

    Raises:
        FormatError: as the operator.
    """
    out = _Out(x, Format.parse(fmt), tensor_scale, mode, rounding, blocked=True)
    return _run(x, out, None, rounding, seed)


def quantize_rotated(
    x: Tensor,
    tensor_scale: Tensor | None,
    size: int,
    sign_seed: int,
    fmt: str,
    mode: ScaleMode,
    rounding: Rounding,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
) -> list[Tensor]:
    """The operator `quantize_rotated`; in one read if a thread holds whole pieces, otherwise after they are rotated.

    Raises:
        FormatError: as the operator.
    """
    parsed, rotation = Format.parse(fmt), Rotation(size, sign_seed)
    if size not in {16, 32} or x.shape[-1] % size or not in_one_row(parsed) or parsed.block[-1] < size:
        x, size = rotation.in_order(x), 1
    out = _Out(x, parsed, tensor_scale, mode, rounding, blocked=blocked)
    return _run(x, out, None, rounding, seed, turned=None if size == 1 else rotation)


def quantize_both(
    x: Tensor,
    tensor_scale: Tensor | None,
    fmt: str,
    other_format: str,
    mode: ScaleMode,
    rounding: Rounding,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
) -> list[Tensor]:
    """The operator `quantize_both`; in one read where both formats have blocks `in_one_row`, otherwise one by one.

    Raises:
        FormatError: as the operator.
    """
    formats = Format.parse(fmt), Format.parse(other_format)
    if x.dim() < 2:
        msg = f"x of shape {tuple(x.shape)} has one direction; quantize_both needs two or more dimensions"
        raise FormatError(msg)
    given = [tensor_scale if each.tensor_scale else None for each in formats]
    if all(in_one_row(each) for each in formats):
        views = zip((x, x.mT), formats, given, strict=True)
        return _run(x, *(_Out(*each, mode, rounding, blocked=blocked) for each in views), rounding, seed)
    parts: list[Tensor] = []
    for view, each, whole in zip((x, x.mT), formats, given, strict=True):
        if blocked:
            parts += torch.ops.lowbit.quantize_blocked(view, whole, str(each), mode, rounding, seed)
        else:
            parts += torch.ops.lowbit.quantize(view, None, None, whole, str(each), mode, rounding, seed)
    return parts


def quantize_groups(
    x: Tensor,
    index: Tensor | None,
    offs: Tensor,
    align: int,
    tensor_scale: Tensor | None,
    fmt: str,
    other_format: str | None,
    mode: ScaleMode,
    rounding: Rounding,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
) -> list[Tensor]:
    """The operator `quantize_groups`: rows are read from where they are; moved first where `quantize_both` reads twice.

    Raises:
        FormatError: as the operator.
    """
    check_groups(x, index, offs, align)
    formats = [Format.parse(each) for each in (fmt, other_format) if each is not None]
    if len(formats) == 2 and not all(in_one_row(each) for each in formats):
        padded, ends = pad_groups(x, index, offs, align)
        return [*quantize_both(padded, tensor_scale, *map(str, formats), mode, rounding, seed, blocked), ends]
    source, ends = padded_sources(x, index, offs, align)
    x = (x if x.stride(1) == 1 else x.contiguous()) if x.shape[0] else x.new_zeros(1, x.shape[1])
    # As if all were one row, until it is read.
    view = x.as_strided((source.shape[0], x.shape[1]), (0, 1))
    given = [tensor_scale if each.tensor_scale else None for each in formats]
    outs = [
        _Out(*each, mode, rounding, blocked=blocked)
        for each in zip((view, view.mT)[: len(formats)], formats, given, strict=True)
    ]
    return [*_run(view, outs[0], outs[1] if len(outs) == 2 else None, rounding, seed, (x, source)), ends]


def in_one_row(fmt: Format) -> bool:
    """Whether blocks are parts of a row that tiles hold whole."""
    height, group = fmt.block_for(2)
    return len(fmt.block) == 2 and height == 1 and group in {16, 32, 64, 128, 256}


class _Out:
    """New tensors that a kernel writes for one format, and what it reads besides the values."""

    def __init__(
        self,
        x: Tensor,
        fmt: Format,
        tensor_scale: Tensor | None,
        mode: ScaleMode,
        rounding: Rounding,
        *,
        given: tuple[Tensor, Tensor | None] | None = None,
        blocked: bool = False,
    ) -> None:
        check_choice("rounding", rounding, Rounding)
        check_choice("scale mode", mode, ScaleMode)
        shape = tuple(x.shape)
        natural = fmt.scale_shape(shape)
        matrix = (*shape[:-2], *(1,) * min(len(shape), 2))
        scale, zero = given or (
            x.new_empty(natural, dtype=fmt.scale.storage),
            None if fmt.zero is None else x.new_empty(natural, dtype=fmt.zero.code_dtype),
        )
        chooses = fmt.tensor_scale and tensor_scale is None and given is None
        self.tensor_scale = torch.ones(matrix, device=x.device) if chooses else tensor_scale
        check_scales(Scales(scale, zero, self.tensor_scale), fmt, shape)
        if not chooses and tensor_scale is not None:
            # An operator must not return its own input.
            self.tensor_scale = tensor_scale.clone(memory_format=torch.contiguous_format)
        if given is not None:
            scale, zero = (
                None if part is None else part.clone(memory_format=torch.contiguous_format) for part in given
            )
        elif blocked:
            scale = x.new_empty(blocked_shape(natural), dtype=fmt.scale.storage)
            if scale.numel() > prod(natural):
                raw(scale).zero_()
        self.data = x.new_empty(data_shape(shape, fmt), dtype=fmt.element.storage)
        self.scale, self.zero = scale, zero
        height, group = fmt.block_for(max(len(shape), 2))[-2:]
        source = "tile"
        if given is not None:
            source = "given"
        elif group == WHOLE and (height == WHOLE or shape[-1] > _LONGEST or x.stride(-1) != 1):
            source = "extent"
        tensor = ""
        if self.tensor_scale is not None:
            tensor = (
                "amax"
                if chooses
                else "rows"
                if self.tensor_scale.dim() > 1 and self.tensor_scale.shape[-2] > 1
                else "matrix"
            )
        form = spec(fmt, mode, x.device if x.is_cuda else None)
        short = fmt.scale.bits <= 16 and tensor in {"", "amax"}
        self.way = _Way(form, group, height, source, tensor, blocked, short)

    def parts(self) -> list[Tensor]:
        found = (self.data, self.scale, self.zero, self.tensor_scale)
        return [part for part in found if part is not None]

    def pointers(self, x: Tensor) -> tuple[Any, ...]:
        """What kernels take as their `out`, given x as (batch, rows, columns)."""
        high = low = None
        if self.way.tensor == "amax":
            high = x.new_zeros(x.shape[0], dtype=torch.int32)
        elif self.way.source == "extent":
            count = x.shape[0] if self.way.height == WHOLE else x.shape[0] * x.shape[1]
            high = x.new_zeros(count, dtype=torch.int32)
            low = x.new_zeros(count, dtype=torch.int32) if self.way.spec.zero else None
        whole, strides = self.tensor_scale, (0, 0)
        if whole is not None:
            lead = (*self.data.shape[:-2], *whole.shape[-2:-1]) if whole.dim() > 1 else (1,)
            whole = whole.reshape(whole.shape[:-1]).expand(lead).reshape(x.shape[0], -1)
            strides = whole.stride()
        parts = (self.data, self.scale, self.zero)
        return (*(None if part is None else raw(part) for part in parts), whole, *strides, high, low)


def _run(
    x: Tensor,
    out: _Out,
    other: _Out | None,
    rounding: Rounding,
    seed: int,
    moved: tuple[Tensor, Tensor] | None = None,
    turned: Rotation | None = None,
) -> list[Tensor]:
    """Fill what `out` holds from x, and what `other` holds from `x.mT`; their parts.

    `moved`: a matrix and which of its rows each of x is; -1: a row of zeros. `turned`: rotates x first.
    """
    outs = [each for each in (out, other) if each is not None]
    parts = [part for each in outs for part in each.parts()]
    if x.numel() == 0:
        return parts
    # A view wherever strides allow.
    x = x.reshape(prod(x.shape[:-2]), *x.shape[-2:]) if x.dim() > 1 else x.reshape(1, 1, -1)
    batch, rows, columns = x.shape
    way, pointers, per = out.way, out.pointers(x), 1
    # Where scales lie in tiles is found more easily from a row and a column than from a block's number.
    plain = moved is None and other is None and not way.blocked
    flat = plain and way.height == 1 and way.group != WHOLE and x.stride()[1:] == (columns, 1)
    if flat:
        # Blocks are rows then, without a gap.
        per = columns // way.group
        rows, columns = rows * per, way.group
        x = x.view(batch, rows, columns)
    across = x.stride(2) != 1 and x.stride(1) == 1
    stochastic = rounding == "stochastic"
    if other is None:
        tile = _tile(rows, columns, way, across=across)
        if x.is_cuda:
            tile = _spread(tile, batch, rows, columns, way)
        second, other_way = None, None
    else:
        tile = _tile_both(columns, way, other.way)
        second, other_way = other.pointers(x), other.way
    grid = (batch * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns * tile.chunks),)
    geometry: tuple[Any, ...] = (rows, columns, *x.stride())
    source = None
    if moved is not None:
        x, source = moved
        geometry = (rows, columns, 0, *x.stride())
    aligned = columns % 16 == 0 and (other is None or rows % 16 == 0)
    size, signs = (1, 0) if turned is None else (turned.size, _mask(turned))
    planes = _planes(way, across=across, both=other is not None, aligned=aligned)
    fixed: dict[str, Any] = {
        "WAY": way,
        "OTHER": other_way,
        "ACROSS": across,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PLANES": max(planes, size),
        "OTHER_PLANES": 1 if other is None else _planes(other.way, across=not across, both=True, aligned=aligned),
        "TURN": size,
        "num_warps": tile.warps,
        "enable_fp_fusion": False,
    }
    given = raw(x), source, pointers, second, *geometry
    if any(each.way.tensor == "amax" or each.way.source == "extent" for each in outs):
        measure: Any = _measure[grid]
        measure(*given, signs, **fixed)
    cast: Any = _cast[grid]
    cast(*(*given, per, signs, seed), FLAT=flat, STOCHASTIC=stochastic, ALIGNED=aligned, CHUNKS=tile.chunks, **fixed)
    return parts


def _mask(rotation: Rotation) -> int:
    """Bits of an int32 that are 1 where a channel's sign is -1."""
    mask = sum((sign < 0) << i for i, sign in enumerate(rotation.signs().tolist()))
    return mask - (1 << 32) if mask >> 31 else mask


@triton.jit(do_not_specialize=["seed", "signs"])
def _cast(
    x,
    source,
    out,
    other,
    rows,
    columns,
    x_batch,
    x_row,
    x_column,
    per,
    signs,
    seed,
    WAY: tl.constexpr,
    OTHER: tl.constexpr,
    FLAT: tl.constexpr,
    ACROSS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLANES: tl.constexpr,
    OTHER_PLANES: tl.constexpr,
    TURN: tl.constexpr,
):
    if FLAT:
        # As the compiler does not know.
        columns, x_row = COLUMNS, COLUMNS
    batch, row, column = _place(rows, columns, ROWS, COLUMNS * CHUNKS, ACROSS, OTHER is not None)
    x += batch * x_batch
    matrix = (rows, columns, x_row, x_column), (source, None), (per, signs, seed)
    _cast_tile(
        *(x, out, batch, row, column, matrix),
        *(WAY, FLAT, ACROSS, STOCHASTIC, ALIGNED, ROWS, COLUMNS, CHUNKS, PLANES, TURN),
    )
    if OTHER is not None:
        # The tile is near now: read again, each direction has it in the order it needs.
        matrix = (columns, rows, x_column, x_row), (None, source), (per, signs, seed)
        _cast_tile(
            *(x, other, batch, column, row, matrix),
            *(OTHER, FLAT, not ACROSS, STOCHASTIC, ALIGNED, COLUMNS, ROWS, 1, OTHER_PLANES, TURN),
        )


@triton.jit(do_not_specialize=["signs"])
def _measure(
    x,
    source,
    out,
    other,
    rows,
    columns,
    x_batch,
    x_row,
    x_column,
    signs,
    WAY: tl.constexpr,
    OTHER: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    OTHER_PLANES: tl.constexpr,
    TURN: tl.constexpr,
):
    """Fill in what scales are chosen from that are no tile's own."""
    batch, row, column = _place(rows, columns, ROWS, COLUMNS, ACROSS, False)
    x += batch * x_batch
    extents = rows, columns, x_row, x_column
    planes = _read_planes(x, row, column, extents, (source, None), ACROSS, ROWS, COLUMNS, PLANES)
    planes = _turn(planes, signs, PLANES, TURN)
    _extend(planes, out, batch, row, rows, WAY, ROWS, COLUMNS // PLANES, PLANES)
    if OTHER is not None:
        extents = columns, rows, x_column, x_row
        planes = _read_planes(x, column, row, extents, (None, source), not ACROSS, COLUMNS, ROWS, OTHER_PLANES)
        _extend(planes, other, batch, column, columns, OTHER, COLUMNS, ROWS // OTHER_PLANES, OTHER_PLANES)


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr, BOTH: tl.constexpr):
    """Batch, first row and first column of this program's tile; neighbours in memory run one after the other.

    Where what is written lies across what is read, some neighbours only, and then those beyond them, so that a row that
    is written fills before it leaves the cache.
    """
    tall, wide = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0)
    batch = (tile // (tall * wide)).to(tl.int64)
    tile = tile % (tall * wide)
    if ACROSS:
        i, j = _grouped(tile, tall, wide)
    elif BOTH:
        j, i = _grouped(tile, wide, tall)
    else:
        i, j = tile // wide, tile % wide
    return batch, i * ROWS, j * COLUMNS


@triton.jit
def _grouped(tile, fast, slow):
    """Indices of a tile along `fast`, of which 16 run one after the other, and along `slow`."""
    tiles = 16 * slow
    first = tile // tiles * 16
    size = tl.minimum(fast - first, 16)
    tile = tile % tiles
    return first + tile % size, tile // size


@triton.jit
def _read(x, row, column, extents, sources, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Float32 tile of columns that are a step apart, zero beyond the matrix.

    `extents` are its rows, columns and their strides; `sources`, where not None, the rows or columns that each is.
    """
    rows, columns, x_row, x_column = extents
    r, in_rows = _source(row + tl.arange(0, ROWS)[:, None], rows, sources[0])
    c, in_columns = _source(column + tl.arange(0, COLUMNS)[None, :] * STEP, columns, sources[1])
    return to_float32(tl.load(x + r.to(tl.int64) * x_row + c.to(tl.int64) * x_column, in_rows & in_columns, 0))


@triton.jit
def _source(i, count, source):
    """Where to read what stands at `i`, and whether there is something."""
    there = i < count
    if source is not None:
        i = tl.load(source + i, there, -1)
        there = i >= 0
    return i, there


@triton.jit
def _read_planes(
    x,
    row,
    column,
    extents,
    sources,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """A tile as by `split_planes`, so that a thread has the same values of all planes."""
    # Values of the 16 bytes that a thread reads at once.
    CHUNK: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    planes = ()
    if ACROSS:
        for i in tl.static_range(PLANES):
            planes = planes + (_read(x, row, column + i, extents, sources, ROWS, COLUMNS // PLANES, PLANES),)
    elif PLANES <= CHUNK:
        planes = split_planes(_read(x, row, column, extents, sources, ROWS, COLUMNS, 1), ROWS, COLUMNS, PLANES)
    else:
        rows, columns, x_row, x_column = extents
        WIDTH: tl.constexpr = COLUMNS // PLANES * CHUNK
        r, inside = _source(row + tl.arange(0, ROWS)[:, None], rows, sources[0])
        for i in tl.static_range(PLANES // CHUNK):
            c = tl.arange(0, WIDTH)[None, :]
            c, there = _source(column + (c // CHUNK * PLANES + (c % CHUNK + i * CHUNK)), columns, sources[1])
            v = tl.load(x + r.to(tl.int64) * x_row + c.to(tl.int64) * x_column, inside & there, 0)
            planes = planes + split_planes(to_float32(v), ROWS, WIDTH, CHUNK)
    return planes


@triton.jit
def _turn(planes, signs, PLANES: tl.constexpr, TURN: tl.constexpr):
    """Each TURN of the planes rotated, as by `Rotation.in_order`; bits of `signs` are 1 where a sign is -1."""
    if TURN > 1:
        turned = ()
        for i in tl.static_range(PLANES):
            turned = turned + (planes[i] * (1 - 2 * ((signs >> (i % TURN)) & 1)).to(tl.float32),)
        # Five stages are those of 32.
        for stage in tl.static_range(5):
            if 1 << stage < TURN:
                turned = _sums(turned, 1 << stage, PLANES)
        planes = ()
        for i in tl.static_range(PLANES):
            planes = planes + (turned[i] * TURN**-0.5,)
    return planes


@triton.jit
def _sums(x, APART: tl.constexpr, PLANES: tl.constexpr):
    """Of planes that are so far apart, the sums and the differences, in their places."""
    sums = ()
    for i in tl.static_range(PLANES):
        if i & APART:
            sums = sums + (x[i - APART] - x[i],)
        else:
            sums = sums + (x[i] + x[i + APART],)
    return sums


@triton.jit
def _extend(
    planes,
    out,
    batch,
    row,
    rows,
    WAY: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
):
    high, low = out[6], out[7]
    most, least = _extent(planes, WAY, ROWS, WIDTH, PLANES)
    if WAY.tensor == "amax":
        # A block that is not finite is NaN by its own scale, and leaves the others theirs.
        tl.atomic_max(high + batch, tl.max(tl.where(most < 0x7F800000, most, 0)), sem="relaxed")
    if WAY.source == "extent":
        if WAY.height == 0:
            at, there = batch + tl.zeros_like(most), most == most
        else:
            r = row + tl.arange(0, ROWS)[:, None]
            at, there = batch * rows + r, r < rows
        tl.atomic_max(high + at, most, there, sem="relaxed")
        if WAY.spec.zero:
            tl.atomic_min(low + at, least, there, sem="relaxed")


@triton.jit
def _extent(planes, WAY: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Of the blocks of PLANES tiles (ROWS, WIDTH), (rows of blocks, columns of blocks): the largest `magnitude`, twice.

    With zero points, the largest and the smallest `ordered`.
    """
    BLOCKS: tl.constexpr = WIDTH * PLANES // WAY.group if WAY.group else 1
    if WAY.spec.zero:
        high = ordered(planes[0])
        low = high
        for i in tl.static_range(1, PLANES):
            numbers = ordered(planes[i])
            high, low = tl.maximum(high, numbers), tl.minimum(low, numbers)
        low = tl.min(tl.reshape(low, (ROWS, BLOCKS, WIDTH // BLOCKS)), 2)
    else:
        high = tl.abs(planes[0])
        for i in tl.static_range(1, PLANES):
            high = tl.maximum(high, tl.abs(planes[i]), propagate_nan=tl.PropagateNan.ALL)
        high = magnitude(high)
    high = tl.max(tl.reshape(high, (ROWS, BLOCKS, WIDTH // BLOCKS)), 2)
    if not WAY.spec.zero:
        low = high
    if WAY.height != 1:
        high = tl.max(high, 0, keep_dims=True)
        low = tl.min(low, 0, keep_dims=True)
    return high, low


@triton.jit
def _cast_tile(
    x,
    out,
    batch,
    row,
    column,
    matrix,
    WAY: tl.constexpr,
    FLAT: tl.constexpr,
    ACROSS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLANES: tl.constexpr,
    TURN: tl.constexpr,
):
    """Scales and codes of CHUNKS canonical tiles (ROWS, COLUMNS) side by side, the first at (row, column)."""
    SPEC: tl.constexpr = WAY.spec
    WIDTH: tl.constexpr = COLUMNS // PLANES
    # Blocks of a tile in one row.
    BLOCKS: tl.constexpr = COLUMNS // WAY.group if WAY.group else 1
    extents, sources, others = matrix
    rows, columns, _, _ = extents
    per, signs, seed = others
    planes = ()
    for i in tl.static_range(CHUNKS):
        planes = planes + _read_planes(*(x, row, column + i * COLUMNS, extents, sources, ACROSS, ROWS, COLUMNS, PLANES))
    planes = _turn(planes, signs, PLANES * CHUNKS, TURN)
    most = 0
    least = 0
    if WAY.source == "tile":
        most, least = _extent(planes, WAY, ROWS, WIDTH, PLANES * CHUNKS)
    scale, zero, whole = _scale_tile(most, least, out, batch, row, column, rows, columns, per, WAY, FLAT, ROWS, BLOCKS)

    # Whether `divide` may be fast; scales are short too if what is given for the tensor is a power of two.
    FAST: tl.constexpr = SPEC.fused and WAY.source != "given" and not STOCHASTIC
    size = rows, columns, seed
    if FAST and SPEC.scale.bits <= 16 and WAY.tensor == "matrix":
        if magnitude(whole) & 0x7FFFFF == 0:
            _write_codes(
                *(planes, scale, zero, out[0], batch, row, column, size),
                *(WAY, FLAT, STOCHASTIC, ALIGNED, ROWS, COLUMNS, CHUNKS, PLANES, FAST, True),
            )
        else:
            _write_codes(
                *(planes, scale, zero, out[0], batch, row, column, size),
                *(WAY, FLAT, STOCHASTIC, ALIGNED, ROWS, COLUMNS, CHUNKS, PLANES, FAST, False),
            )
    else:
        _write_codes(
            *(planes, scale, zero, out[0], batch, row, column, size),
            *(WAY, FLAT, STOCHASTIC, ALIGNED, ROWS, COLUMNS, CHUNKS, PLANES, FAST, WAY.short),
        )


@triton.jit
def _write_codes(
    planes,
    scale,
    zero,
    data,
    batch,
    row,
    column,
    size,
    WAY: tl.constexpr,
    FLAT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLANES: tl.constexpr,
    FAST: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Codes of tiles as by `_cast_tile`, with scales and zero points as by `_scale_tile`."""
    SPEC: tl.constexpr = WAY.spec
    WIDTH: tl.constexpr = COLUMNS // PLANES
    BLOCKS: tl.constexpr = COLUMNS // WAY.group if WAY.group else 1
    rows, columns, seed = size
    by = divisor_of(scale, SPEC, FAST, SHORT)
    by = _of_blocks(by[0], ROWS, BLOCKS), _of_blocks(by[1], ROWS, BLOCKS), _of_blocks(by[2], ROWS, BLOCKS)
    sound = _of_blocks((scale == scale).to(tl.float32), ROWS, BLOCKS)
    if SPEC.zero:
        zero = _of_blocks(zero, ROWS, BLOCKS)
    r = row + tl.arange(0, ROWS)[:, None]
    inside = r < rows
    r = batch * rows + r
    for n in tl.static_range(CHUNKS):
        noise = planes
        if STOCHASTIC:
            noise = uniform(seed, r * columns + (column + n * COLUMNS), COLUMNS, PLANES, ALIGNED)
        quotients, kept, bits = (), (), ()
        for i in tl.static_range(PLANES):
            v = divide(tl.reshape(planes[n * PLANES + i], (ROWS, BLOCKS, WIDTH // BLOCKS)), by, SPEC, FAST, SHORT)
            ok = sound
            # Where scales are chosen, nothing but they divides to a NaN.
            if WAY.source == "given" and SPEC.element.kind == "int":
                ok = (v == v).to(tl.float32)
            elif WAY.source == "given" and not SPEC.element.has_nan:
                v = tl.where(v == v, v, 0.0)
            if SPEC.zero and not ALIGNED:
                # What a row's last byte has beyond its columns is 0.
                c = (column + n * COLUMNS + i) + tl.arange(0, WIDTH)[None, :] * PLANES
                ok = ok * tl.reshape((c < columns).to(tl.float32), (1, BLOCKS, WIDTH // BLOCKS))
            quotients, kept = quotients + (v,), kept + (ok,)
            bits = bits + (tl.reshape(noise[i], (ROWS, BLOCKS, WIDTH // BLOCKS)),)
        words = encode_planes(quotients, kept, zero, bits, SPEC, STOCHASTIC, PLANES)
        _store_words(words, data, r, inside, column + n * COLUMNS, columns, SPEC, FLAT, ALIGNED, ROWS, WIDTH, PLANES)


@triton.jit
def _scale_tile(
    most,
    least,
    out,
    batch,
    row,
    column,
    rows,
    columns,
    per,
    WAY: tl.constexpr,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Float32 scales and zero points of a tile, chosen and written or read, and tensor scales.

    `most` and `least` are `_extent` of the tile.
    """
    SPEC: tl.constexpr = WAY.spec
    TENSOR: tl.constexpr = WAY.tensor
    # Rows of scales in the tile.
    TALL: tl.constexpr = ROWS if WAY.height == 1 else 1
    scales, zeros = out[1], out[2]
    tensor_scales, tensor_batch, tensor_row, high, low = out[3], out[4], out[5], out[6], out[7]

    # Where the scales of the tile stand: canonical rows and columns of blocks, and those of them that there are.
    if WAY.height == 0:
        r, scale_rows = tl.zeros([1, 1], tl.int32), 1
    else:
        r = row // WAY.height + tl.arange(0, TALL)[:, None]
        scale_rows = tl.cdiv(rows, WAY.height)
    if WAY.group == 0:
        c, scale_columns = tl.zeros([1, 1], tl.int32), 1
    else:
        c = column // WAY.group + tl.arange(0, BLOCKS)[None, :]
        scale_columns = tl.cdiv(columns, WAY.group)
    there = (r < scale_rows) & (c < scale_columns)
    at = (batch * scale_rows + r) * scale_columns + c
    # Of the tiles that share a scale, the first writes it.
    first = there
    if WAY.group == 0:
        first = first & (column + tl.zeros([1, 1], tl.int32) == 0)
    if WAY.height == 0:
        first = first & (row + tl.zeros([1, 1], tl.int32) == 0)
    if FLAT:
        r, c, scale_rows, scale_columns = r // per, r % per, scale_rows // per, per

    tensor_scale = 1.0
    if WAY.tensor == "amax":
        tensor_scale = tensor_scale_of_amax(tl.load(high + batch), SPEC)
        tl.store(tensor_scales + batch, tensor_scale, (row == 0) & (column == 0))
    if WAY.tensor == "matrix":
        tensor_scale = tl.load(tensor_scales + batch * tensor_batch)
    if WAY.tensor == "rows":
        tensor_scale = tl.load(tensor_scales + batch * tensor_batch + r.to(tl.int64) * tensor_row, r < scale_rows, 1.0)

    zero = 0.0
    if WAY.source == "given":
        scale = scale_value(tl.load(scales + at, there, 0), tensor_scale, SPEC)
        if SPEC.zero:
            zero = tl.load(zeros + at, there, 0).to(tl.int32)
            if SPEC.signed_zero:
                zero = (zero << 24) >> 24
            zero = zero.to(tl.float32)
    else:
        if WAY.source == "extent":
            most = tl.load(high + at, there, 0)
            least = tl.load(low + at, there, 0) if SPEC.zero else most
        if SPEC.zero:
            stored, scale, zero = scale_of_range(from_ordered(least), from_ordered(most), SPEC)
            tl.store(zeros + at, zero.to(tl.int32).to(tl.uint8), first)
        else:
            amax = most.to(tl.float32, bitcast=True)
            stored, scale = scale_of_amax(amax, tensor_scale, SPEC, TENSOR)
        if WAY.blocked:
            at = ((batch * tl.cdiv(scale_rows, 128) + r // 128) * tl.cdiv(scale_columns, 4) + c // 4) * 512
            at += r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        tl.store(scales + at, stored, first)
    return scale, zero, tensor_scale


@triton.jit
def _store_words(
    words,
    data,
    row,
    inside,
    column,
    columns,
    SPEC: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Write what `encode_planes` gave, WIDTH of it in rows of `columns` codes."""
    # Bytes of a word and its codes, and words.
    BITS: tl.constexpr = SPEC.element.bits
    SIZE: tl.constexpr = min(BITS * PLANES, 32) // 8 if 32 % BITS == 0 or BITS * PLANES == 96 else BITS * PLANES // 8
    COUNT: tl.constexpr = BITS * PLANES // 8 // SIZE
    at = column // PLANES + tl.arange(0, WIDTH)[None, :]
    # In terms that tell the compiler how stores align.
    there = WIDTH if FLAT else columns // PLANES
    if COUNT == 3:
        # A store for all three, so that threads side by side fill a line.
        word = join_planes((words[0], words[1], words[2], words[2]), ROWS, WIDTH * 4, 4, 0, 1)
        word = tl.reshape(word, (ROWS, WIDTH, 4))
        part = tl.arange(0, 4)[None, None, :]
        data = data.to(tl.pointer_type(tl.int32)) + (row * there + at)[:, :, None] * 3 + part
        tl.store(data, word, (inside & (at < there))[:, :, None] & (part < 3))
    elif ALIGNED and SIZE <= 4 and SIZE != 3:
        word = join_planes(words, ROWS, WIDTH * COUNT, COUNT, 0, 1)
        data = data.to(tl.pointer_type(_integer(SIZE)))
        at = column // PLANES * COUNT + tl.arange(0, WIDTH * COUNT)[None, :]
        tl.store(data + row * (there * COUNT) + at, word.to(data.dtype.element_ty), inside & (at < there * COUNT))
    else:
        length = tl.cdiv(columns, SPEC.run) * SPEC.run_bytes
        for n in tl.static_range(COUNT):
            word = tl.reshape(words[n], (ROWS, WIDTH))
            for i in tl.static_range(SIZE):
                byte = (at * COUNT + n) * SIZE + i
                tl.store(data + row * length + byte, (word >> (8 * i)).to(tl.uint8), inside & (byte < length))


@triton.constexpr_function
def _integer(size):
    """The type of integers of `size` bytes."""
    return {1: tl.uint8, 2: tl.int16, 4: tl.int32}[size]


@triton.jit
def _of_blocks(x, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    return tl.broadcast_to(x, (ROWS, BLOCKS))[:, :, None]
