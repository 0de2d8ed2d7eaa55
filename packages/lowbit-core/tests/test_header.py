"""Headers against the safetensors library, and against everything a hostile file can claim."""

from __future__ import annotations

import json
import re
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from lowbit.errors import CheckpointError
from lowbit.header import DTYPE_NAMES, DTYPES, HEADER_LIMIT, lay_out, parse_json
from lowbit.shards import read_header


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def file_bytes(header, data=b"\0" * 4):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def nested(depth):
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


VALID = {"a": entry()}

# What the file holds, and what the message must say.
HOSTILE = {
    "empty file": (b"", "0 bytes, too few"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "7 bytes, too few"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "zero length": (bytes(8) + b"{}", "header of 0 bytes"),
    "length over the limit": ((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}", "header of 100000001 bytes"),
    "largest length": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "length beyond the end": ((1000).to_bytes(8, "little") + b"{}", "holds 10 bytes, but its header alone needs 1008"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "can't decode"),
    "UTF-16": (file_bytes(json.dumps(VALID).encode("utf-16")), "can't decode"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf" + json.dumps(VALID).encode()), "not the JSON"),
    "not JSON": (file_bytes(b"{'a': 1}"), "not the JSON"),
    "cut JSON": (file_bytes(b'{"a":{"dtype":"U8","sh'), "not the JSON"),
    "unterminated string": (file_bytes(b'{"' + rb"\"" * 100_000), "not the JSON"),
    "text after": (file_bytes(b"{} {}"), "Extra data"),
    "NUL padding": (file_bytes(json.dumps(VALID).encode() + b"\0\0"), "Extra data"),
    "leading space": (file_bytes(b" " + json.dumps(VALID).encode()), "first byte"),
    "deep": (file_bytes(nested(100_000)), "not the JSON"),
    "deep within the count": (file_bytes(nested(20_000) + b" " * 2_000_000), "more than 64 deep"),
    "a name as long as a book": (file_bytes({"a" * 5000: entry()}), "name of 5000 characters"),
    "deep in strings is fine but no entry": (file_bytes({"a": "[" * 1000}), "not an object of dtype"),
    "twice one tensor": (file_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)), "'a' stands twice"),
    "twice one field": (
        file_bytes(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}'),
        "'dtype' stands",
    ),
    "lone surrogate": (file_bytes(b'{"\\ud800":%b}' % json.dumps(entry()).encode()), "surrogates"),
    "lone surrogate in metadata": (file_bytes(b'{"__metadata__":{"a":"\\udfff"}}', b""), "surrogates"),
    "list": (file_bytes([entry()]), "not a JSON object"),
    "number": (file_bytes(b"1"), "not a JSON object"),
    "null": (file_bytes(b"null"), "not a JSON object"),
    "entry is a number": (file_bytes({"a": 1}), "not an object of dtype"),
    "entry is null": (file_bytes({"a": None}), "not an object of dtype"),
    "no dtype": (file_bytes({"a": {"shape": [4], "data_offsets": [0, 4]}}), "not an object of dtype"),
    "no shape": (file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}), "not an object of dtype"),
    "no offsets": (file_bytes({"a": {"dtype": "U8", "shape": [4]}}), "not an object of dtype"),
    "unknown field": (file_bytes({"a": entry(strides=[1])}), "not an object of dtype"),
    "unknown dtype": (file_bytes({"a": entry("F3")}), "dtype 'F3'; known are F64"),
    "dtype is a list": (file_bytes({"a": entry(["U8"])}), "known are"),
    "F4": (file_bytes({"a": entry("F4", (8,))}), "F4, which torch cannot hold"),
    "F6_E2M3": (file_bytes({"a": entry("F6_E2M3")}), "F6_E2M3, which"),
    "F6_E3M2": (file_bytes({"a": entry("F6_E3M2")}), "F6_E3M2, which"),
    "shape of true": (file_bytes({"a": entry(shape=[True], offsets=[0, 1])}, b"\0"), "whole numbers"),
    "shape of floats": (file_bytes({"a": entry(shape=[4.0])}), "whole numbers"),
    "shape of an infinite float": (file_bytes(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,4]}}'), "whole"),
    "shape of NaN": (file_bytes(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}'), "whole numbers"),
    "shape of strings": (file_bytes({"a": entry(shape=["4"])}), "whole numbers"),
    "shape is a string": (file_bytes(b'{"a":{"dtype":"U8","shape":"4","data_offsets":[0,4]}}'), "whole numbers"),
    "negative shape": (file_bytes({"a": entry(shape=[-2, -2])}), "whole numbers"),
    "negative offset": (file_bytes({"a": entry(offsets=[-4, 0])}), "whole numbers"),
    "reversed offsets": (file_bytes({"a": entry(offsets=[4, 0])}), "in order"),
    "one offset": (file_bytes({"a": entry(offsets=[4])}), "whole numbers"),
    "three offsets": (file_bytes({"a": entry(offsets=[0, 4, 4])}), "whole numbers"),
    "shape of 2^63": (file_bytes({"a": entry(shape=[1 << 63], offsets=[0, 1 << 63])}), "whole numbers"),
    "offset of 2^64": (file_bytes({"a": entry(offsets=[1 << 64, (1 << 64) + 4])}), "whole numbers"),
    "5000 digits": (file_bytes(b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,4]}}' % (b"1" * 5000)), "digits"),
    "product wraps to 4": (file_bytes({"a": entry(shape=[(1 << 62) + 1, 4])}), "larger than any tensor"),
    "bytes wrap to 0": (file_bytes({"a": entry("F64", [1 << 61], [0, 0])}, b""), "larger than any tensor"),
    "strides overflow": (file_bytes({"a": entry(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0])}, b""), "larger than any"),
    "65 dimensions": (file_bytes({"a": entry(shape=[1] * 65, offsets=[0, 1])}, b"\0"), "larger than any tensor"),
    "a million dimensions": (file_bytes({"a": entry(shape=[1] * 1_000_000, offsets=[0, 1])}, b"\0"), "larger than any"),
    "too few bytes": (file_bytes({"a": entry("F32", [2])}), "is 8 bytes, but data_offsets [0, 4] span 4"),
    "too many bytes": (file_bytes({"a": entry("U8", [3])}), "is 3 bytes"),
    "data missing": (file_bytes(VALID, b"\0" * 3), r"truncated: it holds 71 bytes of 72 promised"),
    "all data missing": (file_bytes({"a": entry("F32", [1 << 40], [0, 1 << 42])}, b""), "of 4398046511197 promised"),
    "overlap": (file_bytes({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "'a' and tensor 'b' overlap"),
    "the same bytes twice": (file_bytes({"a": entry(), "b": entry()}), "overlap"),
    "empty inside another": (file_bytes({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}), "overlap"),
    "hole": (file_bytes({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9)), "leave 1 bytes unused"),
    "hole at the start": (file_bytes({"a": entry(offsets=[1, 5])}, bytes(5)), "the header and tensor 'a' leave 1"),
    "trailing bytes": (file_bytes(VALID, bytes(5)), "holds 1 bytes after its last tensor"),
    "data without tensors": (file_bytes({}), "holds 4 bytes after"),
    "metadata is a list": (file_bytes({"__metadata__": [], **VALID}), "__metadata__ is"),
    "metadata is null": (file_bytes({"__metadata__": None, **VALID}), "__metadata__ is None"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}, **VALID}), "__metadata__ is"),
    "metadata of objects": (file_bytes({"__metadata__": {"a": {}}, **VALID}), "__metadata__ is"),
    "metadata is a tensor": (file_bytes({"__metadata__": entry()}), "__metadata__ is"),
    "memory bomb": (file_bytes(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), "objects and lists"),
    "bomb of entries": (file_bytes(b"{" + b'"":{},' * 500_000 + b'"":{}}'), "objects and lists"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_words_and_little_memory(case, tmp_path):
    content, words = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=re.escape(words)) as raised:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert peak < 1_000_000 + 8 * len(content)


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_library_reads_only_what_is_refused_for_a_stated_reason(case):
    # Where the library accepts what lowbit refuses, lowbit is stricter on purpose; the list is complete.
    stricter = {
        "leading space",  # the format: "the header must begin with {"
        "unknown field",  # it may change what the bytes mean
        "F4",
        "F6_E2M3",
        "F6_E3M2",
        "65 dimensions",
        "a million dimensions",
        "a name as long as a book",
        "metadata is null",
        "strides overflow",
        "twice one tensor",
    }
    try:
        deserialize(HOSTILE[case][0])
    except SafetensorError:
        assert case not in stricter - {"F4", "F6_E2M3", "F6_E3M2"}
    else:
        assert case in stricter


def library_view(raw):
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in deserialize(raw)}


SEED = save(
    {"a": torch.arange(6, dtype=torch.int16).view(2, 3), "b": torch.tensor(1.5), "c": torch.zeros(0, 2)}, {"k": "v"}
)


@settings(max_examples=400)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(SEED) - 1),
            st.integers(0, 3),
            st.one_of(
                st.sampled_from([b"0", b"9", b"[", b"]", b"{", b"}", b'"', b",", b"\\", b"e", b"-", b"."]),
                st.binary(max_size=3),
            ),
        ),
        max_size=3,
    ),
    fix_length=st.booleans(),
)
def test_whatever_is_accepted_reads_as_in_the_library(edits, fix_length, tmp_path_factory):
    raw = bytearray(SEED)
    for position, removed, added in edits:
        raw[position : position + removed] = added
    if fix_length:
        # Edits of the header must not all die at the length field.
        length = int.from_bytes(SEED[:8], "little") + len(raw) - len(SEED)
        raw[:8] = max(length, 0).to_bytes(8, "little")
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    try:
        entries, _ = read_header(path)
    except CheckpointError:
        return
    content = bytes(raw)
    ours = {
        name: (DTYPE_NAMES[e.dtype], e.shape, content[e.offset : e.offset + e.nbytes]) for name, e in entries.items()
    }
    assert ours == library_view(content)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_keeps_its_name(name):
    tensor = (
        torch.zeros(3, dtype=torch.uint8).view(DTYPES[name])
        if DTYPES[name].itemsize == 1
        else torch.zeros(3, dtype=DTYPES[name])
    )
    assert f'"dtype":"{name}"'.encode() in save({"a": tensor})
    assert DTYPE_NAMES[DTYPES[name]] == name


def test_layout_is_aligned_padded_and_independent_of_order(tmp_path):
    tensors = [
        ("u", torch.uint8, (3,)),
        ("w", torch.float32, (5, 2)),
        ("z", torch.complex64, ()),
        ("h", torch.bfloat16, (0, 7)),
        ("b", torch.bool, (1,)),
        ("ä", torch.float32, (1,)),
    ]
    metadata = {"format": "pt", "a": '{"json": [1]}'}
    first, entries = lay_out(tensors, metadata, tmp_path / "f")
    second, _ = lay_out(tensors[::-1], dict(reversed(metadata.items())), tmp_path / "f")
    assert first == second
    assert len(first) % 8 == 0
    assert list(entries) == ["z", "w", "ä", "h", "b", "u"]
    assert [entry.offset - len(first) for entry in entries.values()] == [0, 8, 48, 52, 52, 53]
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in entries.values())
    assert library_view(first + bytes(56)).keys() == entries.keys()


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ([("a", torch.uint8, (1,)), ("a", torch.int8, (1,))], {}, "name taken"),
        ([("__metadata__", torch.uint8, (1,))], {}, "name taken"),
        ([("a", torch.complex128, (1,))], {}, "no safetensors dtype"),
        ([("\ud800", torch.uint8, (1,))], {}, "surrogates"),
        ([("a", torch.uint8, (-1,))], {}, "whole numbers"),
        ([("a", torch.uint8, (1 << 40, 1 << 40))], {}, "whole numbers"),
        ([("a", torch.float64, (0, 1 << 31, 1 << 31))], {}, "larger than any tensor"),
        ([], {"a": 1}, "not an object of strings"),
    ],
)
def test_layout_refuses_what_the_reader_would(tensors, metadata, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        lay_out(tensors, metadata, tmp_path / "f")


def test_json_may_be_64_deep():
    assert parse_json(b"[" * 64 + b"]" * 64, "x", 100)
    assert parse_json(b'["[[]]",' + b"[]," * 90 + b'"]"]', "x", 100)
    with pytest.raises(CheckpointError, match="x is not .* more than 64 deep"):
        parse_json(b"[" * 65 + b"]" * 65, "x", 100)


@pytest.mark.parametrize("text", [r'["\ud800"]', r'{"a": ["\uDC00\ud800"]}', r'{"\udfff": 1}'])
def test_lone_surrogates_are_refused_wherever_they_stand(text):
    with pytest.raises(CheckpointError, match="surrogates"):
        parse_json(text.encode(), "x", 10)


def test_pairs_of_surrogates_are_one_character():
    assert parse_json(rb'["\ud83d\ude00"]', "x", 10) == ["\N{GRINNING FACE}"]


def test_container_limit_counts_outside_strings_only():
    assert parse_json(b'{"[[[": "{\\"[", "b": [1]}', "x", 2) == {"[[[": '{"[', "b": [1]}
    with pytest.raises(CheckpointError, match="more than 1 objects"):
        parse_json(b'{"b": [1]}', "x", 1)
