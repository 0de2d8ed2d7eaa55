"""Formats: specs that parse back, every refusal, and shapes counted out by hand."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import format as formats
from lowbit.element import ELEMENTS, Element
from lowbit.errors import FormatError
from lowbit.format import FORMATS, WHOLE, Format

INTEGERS = [e for e in ELEMENTS.values() if e.kind == "int"]
SMALL_FLOATS = [ELEMENTS[name] for name in ("e2m1", "e2m3", "e3m2", "e4m3fn", "e5m2")]
SCALES = [ELEMENTS[name] for name in ("e8m0", "e4m3fn", "float16", "bfloat16", "float32")]


def holds(zero: Element, codes: Element) -> bool:
    return zero.min <= codes.min and zero.max >= codes.max


@st.composite
def valid_formats(draw) -> Format:
    element = draw(st.sampled_from(INTEGERS + SMALL_FLOATS))
    scale = draw(st.sampled_from(SCALES))
    zeros = [z for z in INTEGERS if element.kind == "int" and scale.name != "e8m0" and holds(z, element)]
    zero = draw(st.sampled_from([None, *zeros]))
    length = st.one_of(st.just(WHOLE), st.just(1), st.integers(2, 256), st.integers(1, 10**9 - 1))
    return Format(
        element=element,
        block=tuple(draw(st.lists(length, min_size=1, max_size=5))),
        scale=scale,
        zero=zero,
        tensor_scale=scale.name == "e4m3fn" and zero is None and draw(st.booleans()),
    )


def make(spec: dict) -> Format:
    parts = {"element": "int4", "block": (1, 32), "scale": "float32", "zero": None, "tensor_scale": False} | spec
    for name in ("element", "scale", "zero"):
        parts[name] = ELEMENTS.get(parts[name])
    return Format(**parts)


@settings(deadline=None)
@given(valid_formats())
def test_the_spec_of_a_format_parses_back_to_it(fmt):
    parsed = Format.parse(str(fmt))
    assert parsed == fmt
    assert hash(parsed) == hash(fmt)
    assert str(parsed) == str(fmt)


@settings(deadline=None)
@given(valid_formats(), st.lists(st.just(1), max_size=3))
def test_equal_meanings_are_equal_formats(fmt, ones):
    assert fmt.with_block(*ones, *fmt.block) == fmt
    assert len(fmt.block) >= 2
    assert fmt.block[0] != 1 or len(fmt.block) == 2


def test_normalised_blocks():
    for given_block, kept in {
        (32,): (1, 32),
        (1,): (1, 1),
        (WHOLE,): (1, WHOLE),
        (1, 1, 1, 32): (1, 32),
        (1, 4, 1, 32): (4, 1, 32),
        (1, WHOLE, WHOLE): (WHOLE, WHOLE),
    }.items():
        assert make({"block": given_block}).block == kept


def test_named_formats_are_the_constants():
    assert {getattr(formats, name) for name in dir(formats) if isinstance(getattr(formats, name), Format)} == {
        *FORMATS.values()
    }
    for name, fmt in FORMATS.items():
        assert Format.parse(name) is Format.parse(name.lower()) is fmt
        assert Format.parse(str(fmt)) == fmt
    for name, spec in {
        "MXFP4": "e2m1:1x32:e8m0",
        "NVFP4": "e2m1:1x16:e4m3fn:tensor",
        "INT4_G128": "int4:1x128:bfloat16",
        "UINT4_G128": "uint4:1x128:bfloat16:zero=uint4",
        "FP8_128X128": "e4m3fn:128x128:float32",
        "INT8_TENSOR": "int8:*x*:float32",
    }.items():
        assert str(FORMATS[name]) == spec


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"block": ()}, r"block \(\) must be one or more lengths"),
        ({"block": (1, -2)}, r"block \(1, -2\) must be one or more lengths"),
        ({"block": (1, 10**9)}, "from 1 to 999999999"),
        *(({"element": wide}, f"{wide} cannot hold") for wide in ("float32", "float16", "bfloat16", "e8m0")),
        *(({"scale": bad}, f"{bad} cannot be a scale") for bad in ("int8", "uint8", "int4", "e2m1", "e3m2", "e5m2")),
        ({"element": "e2m1", "zero": "int8"}, "integer codes and integer zeros, not e2m1 and int8"),
        ({"element": "int8", "zero": "e4m3fn"}, "integer codes and integer zeros, not int8 and e4m3fn"),
        ({"element": "int8", "zero": "int7"}, "int7 does not cover"),
        ({"element": "uint4", "zero": "int4"}, "int4 does not cover"),
        ({"element": "int4", "zero": "uint8"}, "uint8 does not cover"),
        ({"element": "int8", "zero": "int8", "scale": "e8m0"}, "neither e8m0 scales nor a tensor scale"),
        ({"zero": "int4", "scale": "e4m3fn", "tensor_scale": True}, "neither e8m0 scales nor a tensor scale"),
        ({"scale": "float32", "tensor_scale": True}, "float32 does not need one"),
        ({"scale": "e8m0", "tensor_scale": True}, "e8m0 does not need one"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(FormatError, match=message):
        make(parts)


@pytest.mark.parametrize(
    "spec",
    [
        *("", "int4", "int4:1x32", "int4::float32", "int4:1x0:float32", "int4:1x:float32", "int4:x32:float32"),
        *("int4:01x32:float32", "int4:1x-1:float32", "int4:1x32:float32:", "int4:1x32:float32:zero", "MXFP5"),
        *("int4:1x32:float32:zero=", "e2m1:1x16:tensor:e4m3fn", "int4:1x32:float32\n", "int4:1x1000000000:float32"),
        *("int4:1x32:e4m3fn:tensor:zero=int4", " int4:1x32:float32", "int4:1X32:float32", "INT4:1x32:float32"),
    ],
)
def test_specs_outside_the_grammar_are_refused(spec):
    with pytest.raises(FormatError):
        Format.parse(spec)


def test_a_refusal_says_what_there_is():
    with pytest.raises(FormatError, match=r"'MXFP5' is .*MXFP4.* nor 'element:block:scale"):
        Format.parse("MXFP5")
    with pytest.raises(FormatError, match=r"no element is named 'int9'"):
        Format.parse("int9:1x32:float32")


@pytest.mark.parametrize(
    ("block", "rank", "expected"),
    [
        ((1, 32), 1, (32,)),
        ((1, 32), 2, (1, 32)),
        ((1, 32), 4, (1, 1, 1, 32)),
        ((WHOLE, WHOLE), 1, (WHOLE,)),
        ((WHOLE, WHOLE), 3, (1, WHOLE, WHOLE)),
        ((128, 128), 3, (1, 128, 128)),
        ((WHOLE, 1, 4), 2, (1, 4)),
        ((128, 128), 1, None),
        ((2, 1, 4), 2, None),
        ((1, 32), 0, None),
    ],
)
def test_blocks_by_rank(block, rank, expected):
    fmt = make({"block": block})
    if expected is None:
        with pytest.raises(FormatError, match=f"tensor of {rank} dimensions is too small for block {fmt.block_name}"):
            fmt.block_for(rank)
    else:
        assert fmt.block_for(rank) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_scales_count_the_blocks(shape, block):
    fmt, missing = make({"block": tuple(block)}), max(len(block) - len(shape), 0)
    full = [1] * (len(shape) - len(block)) + block[missing:]
    if any(b > 1 for b in block[:missing]) or (shape[-1] % (full[-1] or 1) and set(full[:-1]) <= {1}):
        for method in (fmt.block_of, fmt.scale_shape, fmt.bits_per_element):
            with pytest.raises(FormatError):
                method(tuple(shape))
        return
    found = fmt.scale_shape(tuple(shape))
    # The block that index i falls in is i // b, and a whole dimension is one block.
    assert found == tuple(len({i // b if b else 0 for i in range(n)}) for n, b in zip(shape, full, strict=True))
    for n, b, filled in zip(shape, full, fmt.block_of(tuple(shape)), strict=True):
        assert filled == (b or max(n, 1))


def test_a_group_that_does_not_divide_is_refused_by_name():
    with pytest.raises(FormatError, match=r"dimension 100 of shape \(8, 100\) is not a multiple of block 32 of e2m1"):
        FORMATS["MXFP4"].scale_shape((8, 100))
    assert FORMATS["FP8_128X128"].scale_shape((3, 130, 257)) == (3, 2, 3)
    # Whether a 2-D block may end early depends on the format, not on how many rows there happen to be.
    assert [make({"block": (WHOLE, 8)}).scale_shape((rows, 12)) for rows in (1, 2)] == [(1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("fmt", "shape", "bits"),
    [
        ("MXFP4", (8, 64), 4 + 8 / 32),
        ("MXFP6_E2M3", (8, 64), 6 + 8 / 32),
        ("NVFP4", (8, 64), 4 + 8 / 16 + 32 / 512),
        ("NVFP4", (3, 8, 64), 4 + 8 / 16 + 32 / 512),
        ("NVFP4", (64,), 4 + 8 / 16 + 32 / 64),
        ("INT8_ROW", (8, 64), 8 + 32 / 64),
        ("INT8_ROW_ASYM", (8, 64), 8 + (32 + 8) / 64),
        ("INT8_TENSOR", (8, 64), 8 + 32 / 512),
        ("UINT4_G128", (8, 256), 4 + (16 + 4) / 128),
        ("FP8_128X128", (129, 130), 8 + 4 * 32 / (129 * 130)),
        ("int3:1x8:float16", (2, 2, 2, 8), 3 + 16 / 8),
        ("INT8_ROW", (0, 64), 8),
    ],
)
def test_bits_per_element_by_hand(fmt, shape, bits):
    assert Format.parse(fmt).bits_per_element(shape) == pytest.approx(bits, rel=1e-15)


def test_formats_are_values():
    fmt = FORMATS["MXFP4"]
    assert fmt.symmetric
    assert not FORMATS["UINT4_G128"].symmetric
    assert fmt.with_block(1, 16) == Format.parse("e2m1:1x16:e8m0")
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.block = (1, 16)
    assert all((a == b) == (str(a) == str(b)) for a, b in itertools.product(FORMATS.values(), repeat=2))
