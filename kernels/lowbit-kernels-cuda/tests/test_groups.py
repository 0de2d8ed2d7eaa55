"""Rows moved by the kernels, against the reference's."""

from __future__ import annotations

import pytest
import torch

from lowbit.reference import backend as reference
from lowbit_kernels_cuda.casts import quantize_groups
from lowbit_kernels_cuda.groups import pad_groups, unpad_groups

RUN = {kernel.op: kernel.run for kernel in reference.kernels() if kernel.pack is None}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [[3, 0, 9, 1], [13], [0, 5, 8, 0, 0], [i * 7 % 5 for i in range(21)], [0, 0, 0]]


def raw(x):
    return x.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "k", "align"),
    [(torch.bfloat16, 96, 32), (torch.float32, 5, 8), (torch.uint8, 7, 1), (torch.float8_e4m3fn, 640, 20)],
    ids=str,
)
def test_rows_are_where_the_reference_has_them(sizes, dtype, k, align, device):
    generator = torch.Generator().manual_seed(0)
    rows = sum(sizes) + 2
    x = torch.randint(0, 120, (rows, k), generator=generator, dtype=torch.uint8)
    x = x.view(dtype) if dtype.itemsize == 1 else x.to(dtype)
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    index = torch.randint(0, rows, (rows,), generator=generator)
    on = [part.to(device) for part in (x, offs, index)]
    for by in (None, index, index.to(torch.int32)):
        wanted, wanted_ends = RUN["pad_groups"](x, by, offs, align)
        found, ends = pad_groups(on[0], None if by is None else by.to(device), on[1], align)
        assert torch.equal(raw(found), raw(wanted))
        assert torch.equal(ends.cpu(), wanted_ends)
        back = unpad_groups(found, on[1], align, rows)
        assert torch.equal(raw(back), raw(RUN["unpad_groups"](wanted, offs, align, rows)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spec", "other", "blocked", "rounding"),
    [
        ("MXFP8", "MXFP8", False, "nearest"),
        ("NVFP4", "MXFP4", True, "nearest"),
        ("FP8_ROW", None, False, "nearest"),
        ("FP8_1x128", "INT8_ROW", False, "stochastic"),
        ("FP8_TENSOR", None, False, "nearest"),
        ("FP8_TENSOR", "e4m3fn:*x*:e8m0", False, "nearest"),
        (None, "MXFP8", False, "stochastic"),
        (None, "e4m3fn:1x*:e8m0", False, "nearest"),
    ],
)
def test_rows_are_quantized_from_where_they_are(spec, other, blocked, rounding, device):
    generator = torch.Generator().manual_seed(0)
    for sizes in ([3, 0, 70, 1], [0, 0]):
        rows = sum(sizes) + 2
        x = torch.randn(rows, 256, generator=generator).to(torch.bfloat16)[:, :128]
        offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
        index = torch.randint(-1, rows, (rows,), generator=generator)
        for by in (None, index):
            rest = (32, None, spec, other, "even", rounding, 5, blocked)
            # The reference takes no row that is not there.
            kept = x if by is None else torch.cat((x, torch.zeros(1, 128, dtype=x.dtype)))
            wanted = RUN["quantize_groups"](kept, None if by is None else by % (rows + 1), offs, *rest)
            found = quantize_groups(x.to(device), None if by is None else by.to(device), offs.to(device), *rest)
            assert len(found) == len(wanted)
            for part, right in zip(found, wanted, strict=True):
                assert (part.dtype, part.shape) == (right.dtype, right.shape)
                assert torch.equal(raw(part), raw(right))


def test_a_view_with_gaps_is_moved():
    x = torch.arange(80.0).view(10, 8)[::2, 1:6]
    offs = torch.tensor([2, 5], dtype=torch.int32)
    assert torch.equal(pad_groups(x, None, offs, 4)[0], RUN["pad_groups"](x, None, offs, 4)[0])
