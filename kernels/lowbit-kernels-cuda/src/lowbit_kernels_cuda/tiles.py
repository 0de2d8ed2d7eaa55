"""Triton kernels of `lowbit_kernels_cuda.casts`: scales, codes and packing of a tile.

A tile of values is read along whichever dim is contiguous in memory, and all else follows while it is in registers. It
is there as planes, each of every n-th column: a thread has side by side what makes a word of codes, and a whole block
where that is no longer than its planes, so that it finds the scale alone.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportUnnecessaryComparison=false

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels_cuda.codes import encode_planes, split_planes, store_words, to_float32, uniform
from lowbit_kernels_cuda.scaling import (
    divide,
    divisor_of,
    from_ordered,
    magnitude,
    ordered,
    scale_of_amax,
    scale_of_range,
    scale_value,
    tensor_scale_of_amax,
)


@triton.jit(do_not_specialize=["seed", "signs"])
def cast_tiles(
    x,
    sources,
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
    BACKWARDS: tl.constexpr,
    SPREAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SOON: tl.constexpr,
):
    """Write what `out` holds of `_Out.pointers` from x, and `other` from its transpose; see `casts._run`."""
    begin(OVERLAPS, SOON)
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    if FLAT:
        # As the compiler does not know.
        columns, x_row = COLUMNS, COLUMNS
    tile = tl.program_id(0)
    if BACKWARDS:
        # What was measured last is still in the cache.
        tile = tl.num_programs(0) - 1 - tile
    batch, row, column = _place(tile, rows, columns, ROWS, COLUMNS * CHUNKS, ACROSS, OTHER is not None, SPREAD)
    x += batch * x_batch
    matrix = (rows, columns, x_row, x_column), sources, (per, signs, seed)
    _cast_tile(
        *(x, out, batch, row, column, matrix),
        *(WAY, FLAT, ACROSS, STOCHASTIC, ALIGNED, ROWS, COLUMNS, CHUNKS, PLANES, TURN, SPREAD),
    )
    if OTHER is not None:
        # The tile is near now: read again, each direction has it in the order it needs.
        matrix = (columns, rows, x_column, x_row), (sources[1], sources[0]), (per, signs, seed)
        _cast_tile(
            *(x, other, batch, column, row, matrix),
            *(OTHER, FLAT, not ACROSS, STOCHASTIC, ALIGNED, COLUMNS, ROWS, 1, OTHER_PLANES, TURN, False),
        )


@triton.jit(do_not_specialize=["signs"])
def measure_tiles(
    x,
    sources,
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
    SPREAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SOON: tl.constexpr,
):
    """Fill in what scales are chosen from that are no tile's own."""
    begin(OVERLAPS, SOON)
    batch, row, column = _place(tl.program_id(0), rows, columns, ROWS, COLUMNS, ACROSS, False, SPREAD)
    x += batch * x_batch
    extents = rows, columns, x_row, x_column
    r = _rows(row, ROWS, SPREAD)
    planes = _read_planes(x, r, column, extents, sources, ACROSS, ROWS, COLUMNS, PLANES)
    planes = _turn(planes, signs, PLANES, TURN)
    _extend(planes, out, batch, r, rows, WAY, ROWS, COLUMNS // PLANES, PLANES)
    if OTHER is not None:
        extents = columns, rows, x_column, x_row
        r = _rows(column, COLUMNS, False)
        planes = _read_planes(x, r, row, extents, (sources[1], sources[0]), not ACROSS, COLUMNS, ROWS, OTHER_PLANES)
        _extend(planes, other, batch, r, columns, OTHER, COLUMNS, ROWS // OTHER_PLANES, OTHER_PLANES)


# Up to so many programs leave room everywhere for those of the kernel that follows.
_LONE = tl.constexpr(4)


@triton.jit
def begin(OVERLAPS: tl.constexpr, SOON: tl.constexpr):
    """Wait for the kernel before, if this one may start while that one ends, and let the next one do the same.

    Unless SOON, the next starts beside a few programs or none: beside many, those of a product would be spread
    unevenly, and the multiprocessors with most of them take up to half as long again.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        if SOON or tl.num_programs(0) * tl.num_programs(1) <= _LONE:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _place(
    tile,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACROSS: tl.constexpr,
    BOTH: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Batch, first row and first column of a tile, by its number; neighbours in memory run one after the other.

    Where what is written lies across what is read, some neighbours only, and then those beyond them, so that a row that
    is written fills before it leaves the cache.
    """
    tall, wide = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    if SPREAD:
        tall = tl.cdiv(rows, 128) * (128 // ROWS)
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
def _rows(row, ROWS: tl.constexpr, SPREAD: tl.constexpr):
    """Rows (ROWS, 1) of a tile that starts at `row`.

    If SPREAD, of 128 rows those whose scales lie side by side where these are in tiles of 128 x 4: every 32nd.
    """
    i = tl.arange(0, ROWS)[:, None]
    if SPREAD:
        row = row // 128 * 128 + row % 128 // 4
        i = i % 4 * 32 + i // 4
    return row + i


@triton.jit
def _grouped(tile, fast, slow):
    """Indices of a tile along `fast`, of which 16 run one after the other, and along `slow`."""
    tiles = 16 * slow
    first = tile // tiles * 16
    size = tl.minimum(fast - first, 16)
    tile = tile % tiles
    return first + tile % size, tile // size


@triton.jit
def _read(x, r, column, extents, sources, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Float32 tile of rows `r` (ROWS, 1) and columns that are a step apart, zero beyond the matrix.

    `extents` are its rows, columns and their strides; `sources`, where not None, the rows or columns that each is.
    """
    rows, columns, x_row, x_column = extents
    r, in_rows = _source(r, rows, sources[0])
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
    r,
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
            planes = planes + (_read(x, r, column + i, extents, sources, COLUMNS // PLANES, PLANES),)
    elif PLANES <= CHUNK:
        planes = split_planes(_read(x, r, column, extents, sources, COLUMNS, 1), ROWS, COLUMNS, PLANES)
    else:
        rows, columns, x_row, x_column = extents
        WIDTH: tl.constexpr = COLUMNS // PLANES * CHUNK
        r, inside = _source(r, rows, sources[0])
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
    r,
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
    SPREAD: tl.constexpr,
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
    r = _rows(row, ROWS, SPREAD)
    for i in tl.static_range(CHUNKS):
        planes = planes + _read_planes(x, r, column + i * COLUMNS, extents, sources, ACROSS, ROWS, COLUMNS, PLANES)
    planes = _turn(planes, signs, PLANES * CHUNKS, TURN)
    most = 0
    least = 0
    if WAY.source == "tile":
        most, least = _extent(planes, WAY, ROWS, WIDTH, PLANES * CHUNKS)
    scale, zero, whole = _scale_tile(
        *(most, least, out, batch, row, r, column, rows, columns, per), *(WAY, FLAT, ROWS, BLOCKS, SPREAD)
    )

    # What `divide` needs to be right; scales are short too if what is given for the tensor is a power of two. Of 16-bit
    # numbers and the scales that they have, once is enough for every pair: a test tries them all (where scales are
    # subnormal, of few pairs the quotient may be its own neighbour, and both have one code).
    FAST: tl.constexpr = SPEC.fused and WAY.source != "given" and not STOCHASTIC
    FEW: tl.constexpr = TURN == 1 and x.dtype.element_ty.primitive_bitwidth == 16
    ONCE: tl.constexpr = (0 if FEW and len(SPEC.near) > 0 else 1) if FAST else -1
    TWICE: tl.constexpr = (1 if FEW and WAY.tensor == "" and not SPEC.zero else 2) if FAST else -1
    size = rows, columns, seed
    if FAST and SPEC.scale.bits <= 16 and WAY.tensor == "matrix":
        if magnitude(whole) & 0x7FFFFF == 0:
            _write_codes(
                *(planes, scale, zero, out[0], batch, r, column, size),
                *(WAY, FLAT, STOCHASTIC, ALIGNED, ROWS, COLUMNS, CHUNKS, PLANES, ONCE),
            )
        else:
            _write_codes(
                *(planes, scale, zero, out[0], batch, r, column, size),
                *(WAY, FLAT, STOCHASTIC, ALIGNED, ROWS, COLUMNS, CHUNKS, PLANES, TWICE),
            )
    else:
        _write_codes(
            *(planes, scale, zero, out[0], batch, r, column, size),
            *(WAY, FLAT, STOCHASTIC, ALIGNED, ROWS, COLUMNS, CHUNKS, PLANES, ONCE if WAY.short else TWICE),
        )


@triton.jit
def _write_codes(
    planes,
    scale,
    zero,
    data,
    batch,
    r,
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
    CORRECTIONS: tl.constexpr,
):
    """Codes of tiles as by `_cast_tile`, with scales and zero points as by `_scale_tile`."""
    SPEC: tl.constexpr = WAY.spec
    WIDTH: tl.constexpr = COLUMNS // PLANES
    BLOCKS: tl.constexpr = COLUMNS // WAY.group if WAY.group else 1
    rows, columns, seed = size
    by = divisor_of(scale, SPEC, CORRECTIONS)
    by = _of_blocks(by[0], ROWS, BLOCKS), _of_blocks(by[1], ROWS, BLOCKS), _of_blocks(by[2], ROWS, BLOCKS)
    sound = _of_blocks((scale == scale).to(tl.float32), ROWS, BLOCKS)
    if SPEC.zero:
        zero = _of_blocks(zero, ROWS, BLOCKS)
    inside = r < rows
    r = batch * rows + r
    for n in tl.static_range(CHUNKS):
        noise = planes
        if STOCHASTIC:
            noise = uniform(seed, r * columns + (column + n * COLUMNS), COLUMNS, PLANES, ALIGNED)
        quotients, kept, bits = (), (), ()
        for i in tl.static_range(PLANES):
            v = divide(tl.reshape(planes[n * PLANES + i], (ROWS, BLOCKS, WIDTH // BLOCKS)), by, SPEC, CORRECTIONS)
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
        words = encode_planes(quotients, kept, zero, bits, SPEC, STOCHASTIC, PLANES, CORRECTIONS)
        store_words(words, data, r, inside, column + n * COLUMNS, columns, SPEC, FLAT, ALIGNED, ROWS, WIDTH, PLANES)


@triton.jit
def _scale_tile(
    most,
    least,
    out,
    batch,
    row,
    r,
    column,
    rows,
    columns,
    per,
    WAY: tl.constexpr,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Float32 scales and zero points of a tile, chosen and written or read, and tensor scales.

    `most` and `least` are `_extent` of the tile.
    """
    SPEC: tl.constexpr = WAY.spec
    TENSOR: tl.constexpr = WAY.tensor
    # Rows of scales in the tile.
    TALL: tl.constexpr = ROWS if WAY.height == 1 else 1
    scales, zeros = out[1], out[2]
    tensor_scales, tensor_batch, tensor_row, high, low, copy = out[3], out[4], out[5], out[6], out[7], out[8]

    # Where the scales of the tile stand: canonical rows and columns of blocks, and those of them that there are.
    if WAY.height == 0:
        r, scale_rows = tl.zeros([1, 1], tl.int32), 1
    else:
        if WAY.height > 1:
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
        r, scale_rows = r // per, scale_rows // per

    tensor_scale = 1.0
    if WAY.tensor == "amax":
        tensor_scale = tensor_scale_of_amax(tl.load(high + batch), SPEC)
        tl.store(tensor_scales + batch, tensor_scale, (row == 0) & (column == 0))
    if WAY.tensor == "matrix":
        tensor_scale = tl.load(tensor_scales + batch * tensor_batch)
        if copy is not None:
            tl.store(copy, tensor_scale, (batch == 0) & (row == 0) & (column == 0))
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
        if WAY.blocked and TALL % 128 == 0 and BLOCKS % 4 == 0 and not SPREAD:
            # Whole pieces of 128 x 4, with zeros beyond the end.
            i = tl.arange(0, TALL * BLOCKS)
            down, along = row // 128 + i // (128 * BLOCKS), column // (4 * WAY.group) + i % (128 * BLOCKS) // 512
            tall, wide = tl.cdiv(scale_rows, 128), tl.cdiv(scale_columns, 4)
            at, first = ((batch * tall + down) * wide + along) * 512 + i % 512, (down < tall) & (along < wide)
            stored = tl.reshape(tl.where(there, stored, 0), (TALL // 128, 4, 32, BLOCKS // 4, 4))
            stored = tl.reshape(tl.permute(stored, (0, 3, 2, 1, 4)), (TALL * BLOCKS,))
        elif WAY.blocked:
            if SPREAD:
                # Zeros beyond the end.
                stored, first = tl.where(there, stored, 0), c < tl.cdiv(scale_columns, 4) * 4
            at = ((batch * tl.cdiv(scale_rows, 128) + r // 128) * tl.cdiv(scale_columns, 4) + c // 4) * 512
            at += r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        tl.store(scales + at, stored, first)
    return scale, zero, tensor_scale


@triton.jit
def _of_blocks(x, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    return tl.broadcast_to(x, (ROWS, BLOCKS))[:, :, None]
