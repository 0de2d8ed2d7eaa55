"""The operators `quantize`, `_blocked`, `_rotated`, `_both` and `_groups`: scales, codes and packing from one read.

What a program does with its tile stands in `lowbit_kernels_cuda.tiles`. A scale of a matrix or of a row longer than a
tile, and a tensor scale that is not given, take one more read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from lowbit.blocked import blocked_shape
from lowbit.errors import FormatError
from lowbit.format import WHOLE, Format
from lowbit.groups import check_groups
from lowbit.hadamard import Rotation
from lowbit.numerics import Rounding, ScaleMode, Scales, check_choice, check_scales, data_shape
from lowbit.philox import offset_seed
from lowbit_kernels_cuda.groups import pad_groups, padded_sources
from lowbit_kernels_cuda.scaling import raw, spec
from lowbit_kernels_cuda.tile_sizes import Way, planes_of, smaller, smaller_both, tile_both, tile_of
from lowbit_kernels_cuda.tiles import cast_tiles, measure_tiles

# Values of a whole row that one program holds.
_LONGEST = 16384


_way = lru_cache(maxsize=1024)(Way)


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """What `_Out` holds of one format, for one shape."""

    way: Way
    fmt: Format
    # Shapes of the codes, and of scales where these are not in tiles.
    data: tuple[int, ...]
    natural: tuple[int, ...]
    # Of tensor scales, one a matrix.
    matrix: tuple[int, ...]
    chooses: bool


@lru_cache(maxsize=4096)
def _form(
    fmt: str,
    shape: tuple[int, ...],
    device: torch.device,
    mode: ScaleMode,
    tensor: str,
    *,
    dense: bool,
    given: bool,
    blocked: bool,
) -> _Form:
    """The form of values of a shape, whose columns are `dense` or not.

    `tensor`: the kind of tensor scale that is given, as in `Way`, or "". `given`: scales are, too.
    """
    parsed = Format.parse(fmt)
    height, group = parsed.block_for(max(len(shape), 2))[-2:]
    source = "tile"
    if given:
        source = "given"
    elif group == WHOLE and (height == WHOLE or shape[-1] > _LONGEST or not dense):
        source = "extent"
    chooses = parsed.tensor_scale and not tensor and not given
    tensor = "amax" if chooses else tensor
    form = spec(parsed, mode, device if device.type == "cuda" else None)
    short = parsed.scale.bits <= 16 and tensor in {"", "amax"}
    return _Form(
        _way(form, group, height, source, tensor, blocked, short),
        parsed,
        data_shape(shape, parsed),
        parsed.scale_shape(shape),
        (*shape[:-2], *(1,) * min(len(shape), 2)),
        chooses,
    )


def quantize(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    fmt: str,
    mode: ScaleMode,
    rounding: Rounding,
    seed: int,
    seed_offset: Tensor | None = None,
    *,
    soon: bool = True,
) -> list[Tensor]:
    """The operator `quantize`; unless `soon`, the kernel that follows may not start long before this ends.

    Raises:
        FormatError: as the operator.
    """
    given = None if scale is None else (scale, zero)
    out = _Out(x, fmt, tensor_scale, mode, rounding, given=given)
    return _run(x, out, None, rounding, offset_seed(seed, seed_offset), soon=soon)


def quantize_blocked(
    x: Tensor,
    tensor_scale: Tensor | None,
    fmt: str,
    mode: ScaleMode,
    rounding: Rounding,
    seed: int,
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    """The operator `quantize_blocked`.

    Raises:
        FormatError: as the operator.
    """
    out = _Out(x, fmt, tensor_scale, mode, rounding, blocked=True)
    return _run(x, out, None, rounding, offset_seed(seed, seed_offset))


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
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    """The operator `quantize_rotated`; in one read if a thread holds whole pieces, otherwise after they are rotated.

    Raises:
        FormatError: as the operator.
    """
    parsed, rotation = Format.parse(fmt), Rotation(size, sign_seed)
    if size not in {16, 32} or x.shape[-1] % size or not in_one_row(parsed) or parsed.block[-1] < size:
        x, size = rotation.in_order(x), 1
    out = _Out(x, fmt, tensor_scale, mode, rounding, blocked=blocked)
    turned = None if size == 1 else rotation
    return _run(x, out, None, rounding, offset_seed(seed, seed_offset), turned=turned)


def quantize_both(
    x: Tensor,
    tensor_scale: Tensor | None,
    fmt: str,
    other_format: str,
    mode: ScaleMode,
    rounding: Rounding,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    """The operator `quantize_both`; in one read where that is faster, see `_read_once`; otherwise one by one.

    Raises:
        FormatError: as the operator.
    """
    formats = Format.parse(fmt), Format.parse(other_format)
    if x.dim() < 2:
        msg = f"x of shape {tuple(x.shape)} has one direction; quantize_both needs two or more dimensions"
        raise FormatError(msg)
    given = [tensor_scale if each.tensor_scale else None for each in formats]
    if _read_once(formats):
        views = zip((x, x.mT), (fmt, other_format), given, strict=True)
        out, other = (_Out(*each, mode, rounding, blocked=blocked) for each in views)
        return _run(x, out, other, rounding, offset_seed(seed, seed_offset))
    parts: list[Tensor] = []
    for view, each, whole in zip((x, x.mT), formats, given, strict=True):
        if blocked:
            parts += torch.ops.lowbit.quantize_blocked(view, whole, str(each), mode, rounding, seed, seed_offset)
        else:
            parts += torch.ops.lowbit.quantize(view, None, None, whole, str(each), mode, rounding, seed, seed_offset)
    return parts


def quantize_groups(
    x: Tensor,
    index: Tensor | None,
    offs: Tensor,
    align: int,
    tensor_scale: Tensor | None,
    fmt: str | None,
    other_format: str | None,
    mode: ScaleMode,
    rounding: Rounding,
    seed: int,
    blocked: bool = False,  # noqa: FBT001, FBT002 - an operator's arguments
    seed_offset: Tensor | None = None,
) -> list[Tensor]:
    """The operator `quantize_groups`: rows are read from where they are; moved first where `quantize_both` reads twice.

    Raises:
        FormatError: as the operator.
    """
    check_groups(x, index, offs, align)
    formats = [Format.parse(each) for each in (fmt, other_format) if each is not None]
    if len(formats) == 2 and not _read_once(formats):
        padded, ends = pad_groups(x, index, offs, align)
        first, second = map(str, formats)
        return [*quantize_both(padded, tensor_scale, first, second, mode, rounding, seed, blocked, seed_offset), ends]
    source, ends = padded_sources(x, index, offs, align)
    x = (x if x.stride(1) == 1 else x.contiguous()) if x.shape[0] else x.new_zeros(1, x.shape[1])
    # As if all were one row, until it is read.
    view = x.as_strided((source.shape[0], x.shape[1]), (0, 1))
    views = [(each, named) for each, named in ((view, fmt), (view.mT, other_format)) if named is not None]
    given = [tensor_scale if each.tensor_scale else None for each in formats]
    outs = [_Out(*each, whole, mode, rounding, blocked=blocked) for each, whole in zip(views, given, strict=True)]
    first, second = outs[0], outs[1] if len(outs) == 2 else None
    return [*_run(views[0][0], first, second, rounding, offset_seed(seed, seed_offset), (x, source)), ends]


def in_one_row(fmt: Format) -> bool:
    """Whether blocks are parts of a row that tiles hold whole."""
    height, group = fmt.block_for(2)
    return len(fmt.block) == 2 and height == 1 and group in {16, 32, 64, 128, 256}


def _read_once(formats: Sequence[Format]) -> bool:
    """Whether one kernel writes both directions; it is slower than two where codes have 6 bits."""
    if any(each.element.bits == 6 for each in formats):
        return False
    return all(map(in_one_row, formats)) or all(each.block_for(2) == (WHOLE, WHOLE) for each in formats)


class _Out:
    """New tensors that a kernel writes for one format, and what it reads besides the values."""

    def __init__(
        self,
        x: Tensor,
        fmt: str,
        tensor_scale: Tensor | None,
        mode: ScaleMode,
        rounding: Rounding,
        *,
        given: tuple[Tensor, Tensor | None] | None = None,
        blocked: bool = False,
    ) -> None:
        check_choice("rounding", rounding, Rounding)
        check_choice("scale mode", mode, ScaleMode)
        shape, tensor = tuple(x.shape), ""
        if tensor_scale is not None:
            tensor = "rows" if tensor_scale.dim() > 1 and tensor_scale.shape[-2] > 1 else "matrix"
        how: dict[str, bool] = {"dense": x.stride(-1) == 1, "given": given is not None, "blocked": blocked}
        form = _form(fmt, shape, x.device, mode, tensor, **how)
        self.way, parsed = form.way, form.fmt
        # Of no values, it is 1; otherwise the kernel writes it.
        chosen = torch.ones if x.numel() == 0 else torch.empty
        self.tensor_scale = chosen(form.matrix, device=x.device) if form.chooses else tensor_scale
        scale, zero = given or (
            x.new_empty(form.natural, dtype=parsed.scale.storage),
            None if parsed.zero is None else x.new_empty(form.natural, dtype=parsed.zero.code_dtype),
        )
        if given is not None or tensor_scale is not None:
            check_scales(Scales(scale, zero, self.tensor_scale), parsed, shape)
        # An operator must not return its own input: one number is copied on the way.
        self.given_scale = None
        if tensor_scale is not None and tensor_scale.numel() == 1 and x.numel():
            self.given_scale, self.tensor_scale = tensor_scale, tensor_scale.new_empty(tensor_scale.shape)
        elif tensor_scale is not None:
            self.tensor_scale = tensor_scale.clone(memory_format=torch.contiguous_format)
        # Whether tiles of scales go beyond their end.
        self.padded = False
        if given is not None:
            scale = scale.clone(memory_format=torch.contiguous_format)
            zero = None if zero is None else zero.clone(memory_format=torch.contiguous_format)
        elif blocked:
            tiles = blocked_shape(form.natural)
            self.padded = prod(tiles) > scale.numel()
            scale = x.new_empty(tiles, dtype=parsed.scale.storage)
        self.data = x.new_empty(form.data, dtype=parsed.element.storage)
        self.scale, self.zero = scale, zero

    def parts(self) -> list[Tensor]:
        found = (self.data, self.scale, self.zero, self.tensor_scale)
        return [part for part in found if part is not None]

    def pointers(self, x: Tensor, measured: tuple[Tensor | None, Tensor | None] | None = None) -> tuple[Any, ...]:
        """What kernels take as their `out`, given x as (batch, rows, columns); `measured`: where its extent is."""
        high, low = measured or (None, None)
        if measured is None and self.way.tensor == "amax":
            high = x.new_zeros(x.shape[0], dtype=torch.int32)
        elif measured is None and self.way.source == "extent":
            count = x.shape[0] if self.way.height == WHOLE else x.shape[0] * x.shape[1]
            high = x.new_zeros(count, dtype=torch.int32)
            low = x.new_zeros(count, dtype=torch.int32) if self.way.spec.zero else None
        whole, strides = self.tensor_scale if self.given_scale is None else self.given_scale, (0, 0)
        copy = None if self.given_scale is None else self.tensor_scale
        if whole is not None:
            lead = (*self.data.shape[:-2], *whole.shape[-2:-1]) if whole.dim() > 1 else (1,)
            whole = whole.reshape(whole.shape[:-1]).expand(lead).reshape(x.shape[0], -1)
            strides = whole.stride()
        parts = (self.data, self.scale, self.zero)
        return (*(None if part is None else raw(part) for part in parts), whole, *strides, high, low, copy)


def _run(
    x: Tensor,
    out: _Out,
    other: _Out | None,
    rounding: Rounding,
    seed: int | Tensor,
    moved: tuple[Tensor, Tensor] | None = None,
    turned: Rotation | None = None,
    *,
    soon: bool = True,
) -> list[Tensor]:
    """Fill what `out` holds from x, and what `other` holds from `x.mT`; their parts.

    `moved`: a matrix and which of its rows each of x, or of x.mT, is; a negative one: a row of zeros. `turned`: rotates
    x first. `soon`: whether the next kernel may start while all programs run.
    """
    outs = [each for each in (out, other) if each is not None]
    parts = [part for each in outs for part in each.parts()]
    if x.numel() == 0:
        return parts
    # A view wherever strides allow.
    x = x.reshape(prod(x.shape[:-2]), *x.shape[-2:]) if x.dim() > 1 else x.reshape(1, 1, -1)
    ways = out.way, None if other is None else other.way
    launch = _launch(*ways, tuple(x.shape), x.stride(), x.device, turned, moved=moved is not None)
    if launch.flat:
        # Blocks are rows then, without a gap.
        x = x.view(x.shape[0], *launch.size)
    pointers, second = out.pointers(x), None
    if other is not None:
        # What is measured of a matrix is measured once.
        second = other.pointers(x, pointers[6:8] if launch.shared else None)
    for each, zeros in zip(outs, launch.zeros, strict=False):
        if each.padded and zeros:
            raw(each.scale).zero_()
    geometry: tuple[Any, ...] = (*launch.size, *x.stride())
    sources: tuple[Tensor | None, Tensor | None] = None, None
    if moved is not None:
        x, source = moved
        # Of x.mT columns are moved.
        across = launch.fixed["ACROSS"]
        strides, sources = (reversed(x.stride()), (None, source)) if across else (x.stride(), (source, None))
        geometry = (*launch.size, 0, *strides)
    given = raw(x), sources, pointers, second, *geometry
    if launch.measure is not None:
        measure: Any = measure_tiles[launch.grid]
        measure(*given, launch.signs, SOON=soon, **launch.measure)
    cast: Any = cast_tiles[launch.grid]
    cast(*given, launch.per, launch.signs, seed, SOON=soon, STOCHASTIC=rounding == "stochastic", **launch.fixed)
    return parts


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """How kernels are launched for some ways and one shape."""

    grid: tuple[int]
    # Rows and columns, and whether these are blocks, of which there are `per` in a row.
    size: tuple[int, int]
    flat: bool
    per: int
    signs: int
    # Whether both directions share what is measured of a matrix.
    shared: bool
    # Whether scales of tiles that go beyond their end have zeros there only if they are written first.
    zeros: tuple[bool, bool]
    # What `cast_tiles` and `measure_tiles` are compiled for; None: nothing is measured.
    fixed: dict[str, Any]
    measure: dict[str, Any] | None


@lru_cache(maxsize=4096)
def _launch(
    way: Way,
    other: Way | None,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    device: torch.device,
    turned: Rotation | None,
    *,
    moved: bool,
) -> _Launch:
    """The launch for matrices (batch, rows, columns) with such strides, whose rows or columns may be `moved`."""
    batch, rows, columns = shape
    per, gpu = 1, device.type == "cuda"
    # Where scales lie in tiles is found more easily from a row and a column than from a block's number.
    plain = not moved and other is None and not way.blocked
    flat = plain and way.height == 1 and way.group != WHOLE and strides[1:] == (columns, 1)
    if flat:
        per = columns // way.group
        rows, columns = rows * per, way.group
        strides = (strides[0], columns, 1)
    across = strides[2] != 1 and strides[1] == 1
    if other is None:
        tile = tile_of(rows, columns, way, across=across)
        tile = smaller(tile, batch, rows, columns, way) if gpu else tile
    else:
        tile = tile_both(columns, way, other)
        tile = smaller_both(tile, batch, rows, columns, way, other) if gpu else tile
    shared = other is not None and way.of_matrix is not None and way.of_matrix == other.of_matrix
    # Of a tile that is read twice, the rows must be the same.
    spread = not across and way.pieces(tile.columns) and (other is None or tile.rows == 128)
    zeros = (
        not (spread or (way.pieces(tile.columns) and tile.rows % 128 == 0)),
        other is not None and not (other.pieces(tile.rows) and tile.columns % 128 == 0),
    )
    tall = triton.cdiv(rows, 128) * (128 // tile.rows) if spread else triton.cdiv(rows, tile.rows)
    aligned = columns % 16 == 0 and (other is None or rows % 16 == 0)
    size, signs = (1, 0) if turned is None else (turned.size, _mask(turned))
    planes = planes_of(way, across=across, both=other is not None, aligned=aligned)
    # Hopper starts a kernel while the one before ends.
    overlaps = gpu and torch.cuda.get_device_capability(device) >= (9, 0)
    fixed: dict[str, Any] = {
        "WAY": way,
        "OTHER": other,
        "ACROSS": across,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PLANES": max(planes, size),
        "OTHER_PLANES": 1 if other is None else planes_of(other, across=not across, both=True, aligned=aligned),
        "TURN": size,
        "SPREAD": spread,
        "OVERLAPS": overlaps,
        "num_warps": tile.warps,
        "enable_fp_fusion": False,
        **({"launch_pdl": True} if overlaps else {}),
    }
    measured = any(each is not None and (each.tensor == "amax" or each.source == "extent") for each in (way, other))
    return _Launch(
        grid=(batch * tall * triton.cdiv(columns, tile.columns * tile.chunks),),
        size=(rows, columns),
        flat=flat,
        per=per,
        signs=signs,
        shared=shared,
        zeros=zeros,
        fixed=fixed | {"FLAT": flat, "ALIGNED": aligned, "CHUNKS": tile.chunks, "BACKWARDS": measured},
        measure=(fixed | {"OTHER": None} if shared else fixed) if measured else None,
    )


def _mask(rotation: Rotation) -> int:
    """Bits of an int32 that are 1 where a channel's sign is -1."""
    mask = sum((sign < 0) << i for i, sign in enumerate(rotation.signs().tolist()))
    return mask - (1 << 32) if mask >> 31 else mask
