"""Scales in the tiles of tensor cores, against the place that NVIDIA's documentation gives each."""

from __future__ import annotations

import pytest
import torch

from lowbit import FormatError
from lowbit.blocked import blocked_shape, from_blocked, to_blocked


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float32])
@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 5), (2, 300, 9), (7,)])
def test_every_scale_stands_where_the_tiles_have_it(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    scale = torch.randint(1, 100, shape, dtype=torch.uint8, generator=generator)
    scale = scale.view(dtype) if dtype.itemsize == 1 else scale.to(dtype)
    tiles = to_blocked(scale)
    assert (tiles.dtype, tuple(tiles.shape), tiles.is_contiguous()) == (dtype, blocked_shape(shape), True)
    plain = scale.float().reshape(-1, *(shape[-2:] if len(shape) > 1 else (1, *shape)))
    _, rows, columns = plain.shape
    down, along = -(-rows // 128), -(-columns // 4)
    wanted = torch.zeros(len(plain), down * along * 512)
    if dtype == torch.float8_e8m0fnu:
        wanted.fill_(2.0**-127)
    for b in range(len(plain)):
        for r in range(rows):
            for c in range(columns):
                tile = r // 128 * along + c // 4
                wanted[b, tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = plain[b, r, c]
    assert torch.equal(tiles.float().reshape(wanted.shape), wanted)
    assert torch.equal(from_blocked(tiles, shape).float(), scale.float())


def test_tiles_of_another_shape_are_refused():
    with pytest.raises(FormatError, match=r"do not hold scales of \(129, 4\); needed is \(2, 1, 32, 16\)"):
        from_blocked(to_blocked(torch.ones(128, 4)), (129, 4))
