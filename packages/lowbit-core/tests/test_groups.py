"""Rows moved apart by group against a loop over groups; `unpad_groups` as the transpose of `pad_groups`."""

from __future__ import annotations

import pytest
import torch

from lowbit import FormatError
from lowbit.groups import padded_rows

SIZES = {
    "some": [3, 0, 9, 1],
    "one": [13],
    "none in front, none behind": [0, 5, 8, 0, 0],
    "many": [i * 7 % 5 for i in range(70)],
    "no row": [0, 0],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn]
pad, unpad = torch.ops.lowbit.pad_groups, torch.ops.lowbit.unpad_groups


def group_by_group(rows, sizes, align):
    """Groups one after the other, each filled up with zeros, and all up to what any sizes could need."""
    pieces, ends, start = [], [], 0
    for size in sizes:
        filling = -size % align
        pieces += [rows[start : start + size], rows.new_zeros(filling, rows.shape[1])]
        start += size
        ends.append((ends[-1] if ends else 0) + size + filling)
    whole = padded_rows(len(rows), len(sizes), align)
    return torch.cat([*pieces, rows.new_zeros(whole - ends[-1], rows.shape[1])]), ends


def ends_of(sizes):
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def numbered(rows, k, dtype):
    x = torch.arange(1, rows * k + 1).reshape(rows, k)
    return (x % 251).to(torch.uint8).view(dtype) if dtype.itemsize == 1 else x.to(dtype)


def raw(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("align", [1, 8, 100, 256])
def test_groups_begin_at_multiples_and_the_rest_is_zero(sizes, align, dtype):
    # Two rows more than groups have.
    x, offs = numbered(sum(sizes) + 2, 5, dtype), ends_of(sizes)
    padded, ends = pad(x, None, offs, align)
    wanted, wanted_ends = group_by_group(x.view(torch.uint8 if dtype.itemsize == 1 else dtype), sizes, align)
    assert (padded.dtype, ends.tolist()) == (dtype, wanted_ends)
    assert torch.equal(raw(padded), raw(wanted))
    back = unpad(padded, offs, align, len(x))
    assert torch.equal(raw(back[:-2]), raw(x[:-2]))
    assert not raw(back[-2:]).any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_are_taken_by_an_index(index_dtype):
    x, sizes = numbered(6, 4, torch.bfloat16), [3, 0, 5]
    index = torch.tensor([5, 0, 0, 2, 1, 5, 3, 4], dtype=index_dtype)
    padded, _ = pad(x, index, ends_of(sizes), 4)
    assert torch.equal(padded, group_by_group(x[index.long()], sizes, 4)[0])


def test_no_rows_are_all_filling():
    padded, ends = pad(torch.ones(0, 3), None, torch.zeros(2, dtype=torch.int32), 8)
    assert (padded.shape, ends.tolist()) == (torch.Size([8, 3]), [0, 0])
    assert not padded.any()


def test_rows_beyond_those_that_are_there_are_zero():
    x, offs = numbered(8, 3, torch.float32), ends_of([3, 9])
    assert torch.equal(unpad(x, offs, 4, 12)[:7], x[[0, 1, 2, 4, 5, 6, 7]])
    assert not unpad(x, offs, 4, 12)[7:].any()


@pytest.mark.parametrize("indexed", [False, True])
def test_gradients_are_the_transpose(indexed):
    generator = torch.Generator().manual_seed(0)
    sizes, align = [3, 0, 9, 1], 8
    index = torch.randint(0, 10, (13,), generator=generator) if indexed else None
    x = torch.randn(10 if indexed else 13, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(padded_rows(13, len(sizes), align), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: pad(x, index, ends_of(sizes), align)[0], x)
    torch.autograd.gradcheck(lambda y: unpad(y, ends_of(sizes), align, 13), y)


def test_compiled_without_a_break_for_any_sizes():
    @torch.compile(fullgraph=True, dynamic=True)
    def there_and_back(x, offs):
        padded, ends = pad(x, None, offs, 16)
        return padded * 2, ends, unpad(padded * 2, offs, 16, x.shape[0])

    for sizes in ([3, 0, 9, 1], [40, 2, 7, 7]):
        x, offs = torch.randn(sum(sizes), 8), ends_of(sizes)
        padded, ends, back = there_and_back(x, offs)
        wanted, wanted_ends = group_by_group(x, sizes, 16)
        assert ends.tolist() == wanted_ends
        assert torch.equal(padded, wanted * 2)
        assert torch.equal(back, x * 2)


OFFS = torch.tensor([2], dtype=torch.int32)
BAD = {
    r"rows of groups are a matrix \(M, K\); these have shape \(2,\)": (torch.ones(2), None, OFFS, 8),
    r"offs are \(G,\) int32.* these are torch.int64 \(1,\)": (torch.ones(2, 2), None, OFFS.long(), 8),
    r"offs are \(G,\) int32.* these are torch.int32 \(0,\)": (torch.ones(2, 2), None, OFFS[:0], 8),
    r"index is \(M,\) int32 or int64, rows of x; this is torch.float32 \(2,\)": (
        torch.ones(2, 2),
        torch.ones(2),
        OFFS,
        8,
    ),
    "align=0 is not from 1 to 256": (torch.ones(2, 2), None, OFFS, 0),
    "align=257 is not from 1 to 256": (torch.ones(2, 2), None, OFFS, 257),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_moved_is_refused(message):
    with pytest.raises(FormatError, match=message):
        pad(*BAD[message])
