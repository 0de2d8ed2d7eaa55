"""Packing against big-integer arithmetic: a row is one little-endian number, code k its bits k*b and up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.element import ELEMENTS, INT8
from lowbit.packing import pack, packed_bytes, unit, unpack

PACKED = [e for e in ELEMENTS.values() if e.packed]
WHOLE_BYTES = [e for e in ELEMENTS.values() if e.bits == 8]

each_packed = pytest.mark.parametrize("e", PACKED, ids=lambda e: e.name)


def make_codes(e, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = (int(e.min), int(e.max) + 1) if e.kind == "int" else (0, 2**e.bits)
    return torch.randint(low, high, shape, generator=generator).to(e.code_dtype)


def pack_row(row: list[int], bits: int) -> list[int]:
    """The bytes of a row: whole units, the rest zero."""
    number = sum((code % 2**bits) << (bits * k) for k, code in enumerate(row))
    unit_bytes = next(size for size in range(1, 9) if size * 8 % bits == 0)
    size = -(-len(row) * bits // (8 * unit_bytes)) * unit_bytes
    return list(number.to_bytes(size, "little"))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@each_packed
def test_a_row_is_one_little_endian_number(e):
    for k in (*range(20), 31, 33, 64, 100):
        codes = make_codes(e, (3, k), seed=k)
        expected = torch.tensor([pack_row(row, e.bits) for row in codes.tolist()], dtype=torch.uint8).reshape(3, -1)
        packed = pack(codes, e)
        assert_same(packed, expected)
        assert packed.shape[-1] == packed_bytes(k, e.bits)
        assert_same(unpack(packed, e, k), codes)


@each_packed
def test_every_code_stands_alone_in_every_place(e):
    run, size = unit(e.bits)
    assert run * e.bits == size * 8
    codes = make_codes(e, (1,)).new_zeros(2**e.bits, run, run)
    every = torch.arange(2**e.bits)
    if e.kind == "int" and e.signed:
        every = every - 2 ** (e.bits - 1)
    for place in range(run):
        codes[:, place, place] = every.to(e.code_dtype)
    packed = pack(codes, e)
    expected = [pack_row(row, e.bits) for row in codes.reshape(-1, run).tolist()]
    assert packed.reshape(-1, size).tolist() == expected
    assert_same(unpack(packed, e, run), codes)


@settings(max_examples=150, deadline=None)
@given(
    e=st.sampled_from(PACKED),
    shape=st.lists(st.integers(0, 5), max_size=3).flatmap(
        lambda lead: st.integers(0, 40).map(lambda k: (*lead, k)),
    ),
    seed=st.integers(0, 99),
)
def test_any_rank_and_size_comes_back(e, shape, seed):
    codes = make_codes(e, shape, seed)
    packed = pack(codes, e)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (*shape[:-1], packed_bytes(shape[-1], e.bits)))
    assert_same(unpack(packed, e, shape[-1]), codes)


@each_packed
def test_views_pack_like_their_copies(e):
    codes, run = make_codes(e, (24, 41)), unit(e.bits)[0]
    for view in (codes.t(), codes[1:, 3:], codes[::2, ::3], codes[5], codes[:, :run]):
        before = view.clone()
        packed = pack(view, e)
        assert_same(packed, pack(before.contiguous(), e))
        wide = torch.stack([packed, packed], -1)[..., 0]
        assert_same(unpack(wide, e, view.shape[-1]), before)
        assert_same(view, before)


@each_packed
def test_padding_and_bits_above_a_code_change_nothing(e):
    """A negative code packs by its low bits; what stands behind the last code is not read."""
    run, size = unit(e.bits)
    codes = make_codes(e, (4, 3 * run - 1))
    packed, k = pack(codes, e), codes.shape[-1]
    spoiled = packed.clone()
    spoiled[:, -1] |= 256 - (1 << (8 - e.bits))  # the last code of the last unit ends at the top of its last byte
    assert packed.shape[-1] == 3 * size
    assert_same(unpack(spoiled, e, k), codes)
    high = (codes.view(torch.uint8) | (255 - (2**e.bits - 1))).view(e.code_dtype)
    assert_same(pack(high, e), packed)


@pytest.mark.parametrize("e", WHOLE_BYTES, ids=lambda e: e.name)
def test_whole_bytes_pass_through(e):
    codes = torch.arange(256).to(torch.uint8).view(e.storage)
    for result in (pack(codes, e), unpack(codes, e, 256)):
        assert_same(result.view(torch.uint8), codes.view(torch.uint8))
        assert result.dtype == e.storage


def test_int4_puts_the_even_index_in_the_low_nibble():
    assert pack(torch.tensor([1, -8, 7], dtype=torch.int8), ELEMENTS["int4"]).tolist() == [0x81, 0x07]
    assert packed_bytes(5, INT8.bits) == 5
