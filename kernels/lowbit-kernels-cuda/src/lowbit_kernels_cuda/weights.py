"""Codes of a weight in the order that tensor cores take them from registers.

A warp's tile is 16 rows by 64 columns, and each of its lanes has 32 codes of it: for each of four products of 16 x 16,
two codes side by side for each of the four registers of the first operand of `mma.m16n8k16`, which `wgmma` shares.

Codes of 3, 5, 6 and 7 bits are cut into parts of 4, 2 and 1 bits, low bits first. In the words of a part, each of the
two codes of a pair stands in its own half, at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.element import Element

ROWS, COLUMNS, LANES = 16, 64, 32
_PAIRS = 16


def parts(bits: int) -> tuple[int, ...]:
    """Bits of the parts that codes are cut into, from the low bits on."""
    return (8,) if bits == 8 else tuple(size for size in (4, 2, 1) if bits & size)


# Where bits of floats are in half a word, the lowest first, for each of its codes: of those in a bfloat16's places one
# instruction takes what it needs. A shift brings the next two of 4 bits there, and two bring the second of 8.
_ARRANGED = {
    "e2m1": ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14)),
    "e4m3fn": ((4, 5, 6, 7, 8, 9, 10, 15), (0, 1, 2, 3, 12, 13, 14, 11)),
}


def places(element: Element) -> tuple[tuple[int, ...], ...]:
    """Of the codes in half a word of a 4- or 8-bit element, where its bits are, the lowest first."""
    bits = element.bits
    plain = tuple(tuple(range(bits * i, bits * (i + 1))) for i in range(16 // bits))
    return _ARRANGED.get(element.name, plain)


def pack_tiles(codes: Tensor, element: Element) -> tuple[Tensor, ...]:
    """Int32 (N / 16, K / 64, 32, p) for each part of p bits, of uint8 codes (N, K); beyond the ends codes are 0."""
    n, k = codes.shape
    bits = element.bits
    codes = torch.nn.functional.pad(codes, (0, -k % COLUMNS, 0, -n % ROWS))
    tiles = codes.view(-1, 2, 8, codes.shape[1] // COLUMNS, 4, 2, 4, 2)
    # Tile, lane, product and register, of its two codes.
    pairs = tiles.permute(0, 3, 2, 6, 4, 5, 1, 7).reshape(tiles.shape[0], tiles.shape[3], LANES, _PAIRS, 2)
    found: list[Tensor] = []
    at = 0
    for size in parts(bits):
        field = ((pairs >> at) & ((1 << size) - 1)).view(*pairs.shape[:3], size, _PAIRS // size, 2)
        words = torch.zeros(field.shape[:4], dtype=torch.int64, device=codes.device)
        for i in range(_PAIRS // size):
            for half in range(2):
                words |= field[..., i, half].to(torch.int64) << (size * i + 16 * half)
        # As the bits that they are: values of 2^31 and more become negative.
        found.append(words.to(torch.int32))
        at += size
    return (_moved(found[0], element, back=False), *found[1:])


def _moved(words: Tensor, element: Element, *, back: bool) -> Tensor:
    """Bits of codes that follow one another in each half of words, to where `_ARRANGED` has them, or back."""
    if element.name not in _ARRANGED:
        return words
    moved = torch.zeros_like(words)
    for i, place in enumerate(place for code in _ARRANGED[element.name] for place in code):
        source, to = (place, i) if back else (i, place)
        moved |= ((words >> source) & 0x10001) << to
    return moved


def unpack_tiles(words: tuple[Tensor, ...], element: Element, n: int, k: int) -> Tensor:
    """Undo `pack_tiles`."""
    bits = element.bits
    words = (_moved(words[0], element, back=True), *words[1:])
    tall, wide = words[0].shape[:2]
    pairs = torch.zeros(tall, wide, LANES, _PAIRS, 2, dtype=torch.uint8, device=words[0].device)
    at = 0
    for size, part in zip(parts(bits), words, strict=True):
        field = pairs.view(tall, wide, LANES, size, _PAIRS // size, 2)
        for i in range(_PAIRS // size):
            for half in range(2):
                field[..., i, half] |= (((part >> (size * i + 16 * half)) & ((1 << size) - 1)) << at).to(torch.uint8)
        at += size
    tiles = pairs.view(tall, wide, 8, 4, 4, 2, 2, 2).permute(0, 6, 2, 1, 4, 5, 3, 7)
    return tiles.reshape(tall * ROWS, wide * COLUMNS)[:n, :k]


def side_by_side(codes: Tensor, *, back: bool = False) -> Tensor:
    """Columns such that the four of 16 that a lane has are side by side in the weight, or back; 0 beyond the end.

    A lane then has the bytes of a word of the first operand of `mma.m16n8k32`, which `wgmma` shares.
    """
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 16))
    if back:
        return codes.unflatten(-1, (-1, 2, 4, 2)).movedim(-3, -1).flatten(-4)
    return codes.unflatten(-1, (-1, 4, 2, 2)).movedim(-1, -3).flatten(-4)


def repeated(part: Tensor, blocks: Sequence[int], shape: Sequence[int]) -> Tensor:
    """What blocks have, once for each row, or column, or whatever `blocks` are lengths of; 0: as long as `shape`."""
    for dim, block in enumerate(blocks):
        part = part.repeat_interleave(block or shape[dim], dim).narrow(dim, 0, shape[dim])
    return part


def pack_scales(scales: Tensor, group: int) -> Tensor:
    """Scales (N, K / group; 1 of whole rows, for which group is 0) as a lane reads them; beyond the ends they are 0.

    (N / 16, spans, 8, 2, p): of rows g and g + 8 of a tile, the p scales that 64 columns have, or the one of a group of
    64 or more.
    """
    per = COLUMNS // group if 0 < group < COLUMNS else 1
    scales = torch.nn.functional.pad(scales, (0, -scales.shape[1] % per, 0, -scales.shape[0] % ROWS))
    tiles = scales.view(-1, 2, 8, scales.shape[1] // per, per)
    return tiles.permute(0, 3, 2, 1, 4).contiguous()


def unpack_scales(packed: Tensor, n: int, count: int) -> Tensor:
    """Undo `pack_scales` of (n, count)."""
    return packed.permute(0, 3, 2, 1, 4).reshape(packed.shape[0] * ROWS, -1)[:n, :count]
