"""Codes of elements and back, and packing, for every format: Triton functions that kernels share.

All give the bits of `lowbit.element`. Integers do what hardware may not have (8-bit floats before compute capability
8.9) or what Triton's interpreter rounds otherwise (bfloat16); a `Spec` says when a compiled kernel has it natively.
"""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_float32(x):
    """Float32 of what `raw` gave of a float32, float16 or bfloat16 tensor."""
    if x.dtype == tl.int16:
        value = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def from_float32(x, like: tl.constexpr, SPEC: tl.constexpr):
    """Float32 `x` rounded once to what a pointer of type `like`, to a `raw` tensor, takes."""
    if like != tl.int16:
        value = x.to(like)
    elif SPEC.native:
        value = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
    return value


@triton.jit
def encode_float(x, noise, ELEMENT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes, as int32, of float32 `x` in a float element; `noise` is read where STOCHASTIC. See `Element.encode`."""
    bits = x.to(tl.int32, bitcast=True)
    SIGN: tl.constexpr = 1 << (ELEMENT.bits - 1)
    size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), ELEMENT.max)
    field = field_of(size, ELEMENT)
    if STOCHASTIC:
        exact = size * ((254 + ELEMENT.mantissa - field) << 23).to(tl.float32, bitcast=True)
        floor = tl.floor(exact)
        steps = floor.to(tl.int32) + (exact - floor > noise).to(tl.int32)
    else:
        steps, _ = in_steps(size, field, ELEMENT)
    # A carry out of the steps ends up in the exponent by itself.
    steps += (field - (128 - ELEMENT.bias)) << ELEMENT.mantissa
    steps |= (bits >> (32 - ELEMENT.bits)) & SIGN
    NAN: tl.constexpr = SIGN - 1 if ELEMENT.has_nan else 0
    return tl.where(x == x, steps, NAN)


@triton.jit
def decode(code, ELEMENT: tl.constexpr):
    """Exact float32 values of uint8 codes whose other bits are 0."""
    code = code.to(tl.int32)
    if ELEMENT.kind == "int":
        if ELEMENT.signed:
            code = (code << (32 - ELEMENT.bits)) >> (32 - ELEMENT.bits)
        value = code.to(tl.float32)
    else:
        size = code & ((1 << (ELEMENT.bits - 1)) - 1)
        # The fields as those of a float32, whose subnormals are the element's once the biases are made equal.
        value = (size << (23 - ELEMENT.mantissa)).to(tl.float32, bitcast=True) * 2.0 ** (127 - ELEMENT.bias)
        bits = value.to(tl.int32, bitcast=True)
        if ELEMENT.name == "e4m3fn":
            bits = tl.where(size == 0x7F, 0x7FC00000, bits)
        if ELEMENT.name == "e5m2":
            bits = tl.where(size > 0x7C, 0x7FC00000, tl.where(size == 0x7C, 0x7F800000, bits))
        value = (bits | ((code >> (ELEMENT.bits - 1)) << 31)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def split_planes(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr):
    """Of a tile (ROWS, COLUMNS), PLANES (a power of two) tiles: the columns that are 0, 1... modulo PLANES."""
    if PLANES == 1:
        planes = (x,)
    elif PLANES == 2:
        planes = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    else:
        even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
        even = split_planes(even, ROWS, COLUMNS // 2, PLANES // 2)
        odd = split_planes(odd, ROWS, COLUMNS // 2, PLANES // 2)
        planes = (even[0], odd[0])
        for i in tl.static_range(1, PLANES // 2):
            planes = planes + (even[i], odd[i])
    return planes


@triton.jit
def encode_planes(
    x, sound, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr, PLANES: tl.constexpr, CORRECTIONS: tl.constexpr
):
    """Codes of float32 `x` of `divide`, tuples of PLANES tiles, one after another in the bits of words.

    A word is an int32, full where runs of codes end on its last bit; if PLANES codes are no such run, one word holds
    them, an int64 if need be. `sound` is 0 where x is NaN and 1 elsewhere, in float32, read for elements without a NaN;
    `zero` is read where the format has zero points, `noise` where rounding is stochastic. See `Element.encode`.
    """
    BITS: tl.constexpr = SPEC.element.bits
    words = ()
    if SPEC.convert != "" and not STOCHASTIC and (BITS == 8 or CORRECTIONS >= 0):
        for i in tl.static_range(0, PLANES, 4):
            # Rather than conversions one by one, of whose codes a ptxas loses some that are used twice.
            of = [x[i], x[i + 1], x[i + 2], x[i + 3]]
            word = tl.inline_asm_elementwise(SPEC.convert, "=r,f,f,f,f", of, tl.int32, True, 1)
            words = words + (word if BITS == 8 else _six_bits(word, sound[i]),)
        if BITS == 6 and PLANES == 16:
            a, b, c, d = words
            words = a | (b << 24), (b >> 8) | (c << 16), (c >> 16) | (d << 8)
    elif BITS == 6 and PLANES == 16:
        first = _word(x, sound, zero, noise, SPEC, STOCHASTIC, 0, 8)
        second = _word(x, sound, zero, noise, SPEC, STOCHASTIC, 8, 8)
        words = first.to(tl.int32), ((first >> 32) | (second << 16)).to(tl.int32), (second >> 16).to(tl.int32)
    elif CORRECTIONS == 0 and PLANES == 4:
        of = [x[0], x[1], x[2], x[3]]
        word = tl.inline_asm_elementwise(SPEC.near[0], "=r,f,f,f,f", of, tl.int32, True, 1)
        words = (tl.where(sound[0] > 0, word, 0),)
    elif CORRECTIONS == 0:
        for i in tl.static_range(0, PLANES, 8):
            of = [x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5], x[i + 6], x[i + 7]]
            word = tl.inline_asm_elementwise(SPEC.near[1], "=r,f,f,f,f,f,f,f,f", of, tl.int32, True, 1)
            words = words + (tl.where(sound[i] > 0, word, 0),)
    else:
        COUNT: tl.constexpr = min(PLANES, 32 // BITS) if 32 % BITS == 0 else PLANES
        for i in tl.static_range(0, PLANES, COUNT):
            words = words + (_word(x, sound, zero, noise, SPEC, STOCHASTIC, i, COUNT),)
    return words


@triton.jit
def _six_bits(word, sound):
    """Side by side, four 6-bit codes of 8-bit ones that differ in the place of the sign and may be one too large."""
    word = ((word & 0x3F3F3F3F) - ((word >> 5) & 0x01010101)) | ((word >> 2) & 0x20202020)
    word = (word & 0x003F003F) | ((word >> 2) & 0x0FC00FC0)
    word = (word & 0xFFF) | ((word >> 4) & 0xFFF000)
    return tl.where(sound > 0, word, 0)


@triton.jit
def _word(
    x, sound, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr
):
    """COUNT codes, from plane FIRST on."""
    ELEMENT: tl.constexpr = SPEC.element
    BITS: tl.constexpr = ELEMENT.bits
    INTEGER: tl.constexpr = ELEMENT.kind == "int"
    LINES: tl.constexpr = not INTEGER and BITS - ELEMENT.mantissa == 3 and not STOCHASTIC
    # What is added to signed integers so that none is negative; its bit is their sign's.
    OFFSET: tl.constexpr = 1 << (BITS - 1) if INTEGER and ELEMENT.signed else 0
    SIGN: tl.constexpr = 1 << (BITS - 1)
    TYPE: tl.constexpr = tl.int32 if BITS * COUNT <= 32 else tl.int64
    for i in tl.static_range(COUNT):
        v = x[FIRST + i]
        if INTEGER:
            number = _around_integer(v, sound[FIRST + i], zero, noise[FIRST + i], SPEC, STOCHASTIC, OFFSET)
        elif LINES:
            number = _around_lines(v, sound[FIRST + i], ELEMENT)
        else:
            number = encode_float(v, noise[FIRST + i], ELEMENT, STOCHASTIC)
        number = number.to(TYPE) << (BITS * i)
        if i == 0:
            word = number
        else:
            word += number
        if LINES:
            # Bits that land where the codes have their sign.
            sign = v.to(tl.int32, bitcast=True)
            if BITS * (i + 1) <= 32:
                sign = sign >> (32 - BITS * (i + 1))
            sign = sign.to(TYPE)
            if BITS * (i + 1) > 32:
                sign = sign << (BITS * (i + 1) - 32)
            sign &= _repeated(SIGN, BITS, i, i + 1, COUNT)
            if i == 0:
                signs = sign
            else:
                signs |= sign
    if INTEGER or LINES:
        # Their sum starts with that of 1.5 * 2^23 in every place.
        word -= _repeated(0x4B400000, BITS, 0, COUNT, COUNT)
    if OFFSET:
        word ^= _repeated(OFFSET, BITS, 0, COUNT, COUNT)
    if LINES:
        word |= tl.where(sound[FIRST] > 0, signs, 0)
    return word


@triton.constexpr_function
def _repeated(number, bits, first, end, count):
    """The sum of a number in places from `first` to `end` of a word of `count`, as the integer that it is."""
    width = 32 if bits * count <= 32 else 64
    total = sum(number << (bits * i) for i in range(first, end)) % (1 << width)
    return total - (1 << width) if total >> (width - 1) else total


@triton.jit
def _around_integer(x, sound, zero, noise, SPEC: tl.constexpr, STOCHASTIC: tl.constexpr, OFFSET: tl.constexpr):
    """Bits of float32 1.5 * 2^23 + OFFSET + x as an integer of the element: float32 has no others around there."""
    if STOCHASTIC:
        floor = tl.floor(x)
        x = floor + (x - floor > noise).to(tl.float32)
    if OFFSET == 1:
        # An odd number would change which of two as near is even.
        value = (x + 12582912.0) + 1.0
    else:
        value = x + (12582912.0 + OFFSET)
    if SPEC.zero:
        value += zero
    # Of a number and a NaN, these are the number.
    value = tl.maximum(value, (12582912.0 + OFFSET) + SPEC.element.min * sound)
    value = tl.minimum(value, (12582912.0 + OFFSET) + SPEC.element.max * sound)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _around_lines(x, sound, ELEMENT: tl.constexpr):
    """Bits of float32 1.5 * 2^23 + the code of |x| in an element with two bits of exponent.

    Codes grow with numbers, half as fast from 2 on and again from 4 on: of three lines, the lowest at a number.
    """
    STEPS: tl.constexpr = 1 << ELEMENT.mantissa
    size = tl.abs(x)
    first = tl.fma(size, STEPS, 12582912.0)
    second = tl.fma(size, STEPS / 2, 12582912.0 + STEPS)
    third = tl.fma(size, STEPS / 4, 12582912.0 + 2 * STEPS)
    # Of a number and a NaN, these are the number.
    last = tl.minimum(third, 12582912.0 + (4 * STEPS - 1) * sound)
    return tl.minimum(tl.minimum(first, second), last).to(tl.int32, bitcast=True)


@triton.jit
def join_planes(
    x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr
):
    """Undo `split_planes`: the tile (ROWS, COLUMNS) of PLANES tiles, each STEP-th of a tuple from FIRST on."""
    if PLANES == 1:
        tile = tl.reshape(x[FIRST], (ROWS, COLUMNS))
    else:
        even = join_planes(x, ROWS, COLUMNS // 2, PLANES // 2, FIRST, 2 * STEP)
        odd = join_planes(x, ROWS, COLUMNS // 2, PLANES // 2, FIRST + STEP, 2 * STEP)
        tile = tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))
    return tile


@triton.jit
def store_words(
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
def split_apart(word, SPEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Undo `merge`: codes (ROWS, COLUMNS) of integers that hold a run each."""
    BITS: tl.constexpr = SPEC.element.bits
    if SPEC.run >= 8:
        word = tl.reshape(tl.join(word, word >> (4 * BITS)), (ROWS, COLUMNS // 4))
    if SPEC.run >= 4:
        word = tl.reshape(tl.join(word, word >> (2 * BITS)), (ROWS, COLUMNS // 2))
    word = tl.reshape(tl.join(word, word >> BITS), (ROWS, COLUMNS))
    return (word & ((1 << BITS) - 1)).to(tl.uint8)


@triton.jit
def uniform(seed, starts, COLUMNS: tl.constexpr, PLANES: tl.constexpr, ALIGNED: tl.constexpr):
    """`lowbit.philox.uniform` of elements at `starts + column`, int64 (ROWS, 1): a tuple as of `split_planes`.

    Where all `starts` are multiples of 4 (ALIGNED), each counter is used for four elements, otherwise for one.
    """
    first = starts + tl.arange(0, COLUMNS // PLANES)[None, :] * PLANES
    numbers = ()
    for i in tl.static_range(PLANES // 4):
        if ALIGNED:
            a, b, c, d = _philox(seed, (first + 4 * i) >> 2)
            numbers = numbers + (_fraction(a), _fraction(b), _fraction(c), _fraction(d))
        else:
            for j in tl.static_range(4):
                at = first + (4 * i + j)
                a, b, c, d = _philox(seed, at >> 2)
                lane = at & 3
                word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
                numbers = numbers + (_fraction(word),)
    return numbers


@triton.jit
def _philox(seed, counter):
    low = counter.to(tl.int32)
    none = tl.zeros_like(low)
    return tl.philox(seed, low, (counter >> 32).to(tl.int32), none, none)


@triton.jit
def _fraction(word):
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def field_of(size, ELEMENT: tl.constexpr):
    """Field of the exponent of float32 `size`, no lower than that of the element's subnormals."""
    return tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 128 - ELEMENT.bias)


@triton.jit
def in_steps(size, field, ELEMENT: tl.constexpr):
    """Float32 `size`, of that `field_of`, in the element's steps of its binade, and the float32 that this is."""
    # Float32 numbers from here on are as far apart as the element's around x: the sum rounds as it does.
    shifter = (field + (23 - ELEMENT.mantissa)) << 23
    total = size + shifter.to(tl.float32, bitcast=True)
    return total.to(tl.int32, bitcast=True) - shifter, total - shifter.to(tl.float32, bitcast=True)
