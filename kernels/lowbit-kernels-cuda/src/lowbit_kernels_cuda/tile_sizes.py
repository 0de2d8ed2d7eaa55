"""How much a program of `lowbit_kernels_cuda.casts` takes: its tile, its warps, and what a thread has side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

from lowbit.format import WHOLE
from lowbit_kernels_cuda.scaling import Spec

# Programs that keep a GPU busy, if not all of its memory.
_BUSY = 512


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """What a kernel is compiled for besides its tile: a format, and where its scales come from and go to.

    There is one of a kind, see `casts._way`: a launch finds its kernel by what it is, not by all that it says.
    """

    spec: Spec
    # Columns and rows of a block; WHOLE: all.
    group: int
    height: int
    # "tile": of the values in it; "extent": of `measure_tiles`; "given".
    source: str
    # "": none; "matrix" or "rows": given; "amax": of `measure_tiles`.
    tensor: str
    # Whether scales lie in tiles of 128x4, see `lowbit.blocked`.
    blocked: bool
    # Whether scales are short, see `divide`: those of blocks, unless one is given for the tensor.
    short: bool

    @property
    def of_matrix(self) -> str | None:
        """What is measured of a whole matrix, if anything is."""
        if self.tensor == "amax":
            return "amax"
        if self.source == "extent" and self.height == WHOLE:
            return "range" if self.spec.zero else "magnitude"
        return None

    def pieces(self, columns: int) -> bool:
        """Whether tiles of so many columns have all of what they write of tiles of 128x4 scales, if of enough rows."""
        return self.blocked and self.height == 1 and self.group != WHOLE and columns % (4 * self.group) == 0


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of values that a program takes, how often side by side, and its warps."""

    rows: int
    columns: int
    warps: int
    chunks: int = 1


def tile_of(rows: int, columns: int, way: Way, *, across: bool) -> Tile:
    """The tile for matrices of canonical `rows` x `columns`; `across`: rows lie side by side in memory, not columns.

    These numbers and those of the two functions below are all there is to tune.
    """
    if way.height not in {1, WHOLE}:
        return Tile(way.height, max(way.group, 128), max(way.height * way.group // (4096 if across else 2048), 2))
    if way.source == "tile" and way.group == WHOLE:
        # Whole rows, with as little beyond their ends as can be.
        chunks = min(range(1, 9), key=lambda n: (n * _length(columns, n), n))
        length = _length(columns, chunks)
        warps = min(max(_power(length * chunks // 1792), 1), 8)
        return Tile(_at_most(max(_power(2048 // (length * chunks)), 1), rows), length, warps, chunks)
    if across:
        return _tile_across(way)
    if way.pieces(128):
        return Tile(32, 128, 4)
    length = max(_at_most(128, columns), way.group, 16)
    size = 4096 if way.spec.element.bits > 4 or way.group == 32 else 8192
    return Tile(_at_most(size // length, rows), length, 4)


def _tile_across(way: Way) -> Tile:
    """The tile for blocks of one row where rows lie side by side."""
    bits = way.spec.element.bits
    if way.group not in {16, 32} or (way.group == 16 and not way.blocked):
        return Tile(64, max(128, way.group), 4)
    if way.blocked:
        return Tile(128, 128, 8) if bits > 4 else Tile(128, 4 * way.group, 4)
    if bits == 6:
        return Tile(64, 256, 8)
    return Tile(128, 128, 8) if bits > 4 else Tile(128, 64, 4)


def smaller(tile: Tile, batch: int, rows: int, columns: int, way: Way) -> Tile:
    """The tile, lower where a small matrix would keep but some of a GPU's processors busy."""
    while (
        way.height == 1
        and tile.rows > (4 if way.blocked else 1)
        and tile.rows * tile.columns * tile.chunks > 512 * tile.warps
        and batch * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns * tile.chunks) < _BUSY
    ):
        tile = replace(tile, rows=tile.rows // 2)
    return tile


def smaller_both(tile: Tile, batch: int, rows: int, columns: int, way: Way, other: Way) -> Tile:
    """As `smaller`, with as many values for a thread."""
    while (
        tile.warps > 1
        and not way.blocked
        and batch * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) < _BUSY // 2
    ):
        if tile.columns > max(tile.rows, way.group):
            tile = replace(tile, columns=tile.columns // 2, warps=tile.warps // 2)
        elif tile.rows > other.group:
            tile = replace(tile, rows=tile.rows // 2, warps=tile.warps // 2)
        else:
            break
    return tile


def _length(columns: int, chunks: int) -> int:
    """The power of two that is long enough for so many `chunks` of a row, 16 or more."""
    return max(triton.next_power_of_2(triton.cdiv(columns, chunks)), 16)


def _power(number: int) -> int:
    """The largest power of two no larger than the number, 0 for 0."""
    return 1 << number.bit_length() >> 1


def tile_both(columns: int, way: Way, other: Way) -> Tile:
    """The tile for both directions of matrices of `columns`."""
    if max(way.group, other.group) > 32:
        return Tile(max(128, other.group), max(_at_most(128, columns), way.group), 8)
    if max(way.spec.element.bits, other.spec.element.bits) > 4:
        return Tile(128, 128, 8) if way.blocked else Tile(64, max(_at_most(256, columns), 32), 8)
    if way.blocked:
        return Tile(128, 64, 4)
    return Tile(64, max(_at_most(128, columns), 32), 4) if way.group == 32 else Tile(64, 64, 2)


def planes_of(way: Way, *, across: bool, both: bool, aligned: bool) -> int:
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
