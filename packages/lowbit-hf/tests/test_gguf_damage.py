"""GGUF files that are damaged, made to harm, or of a kind that lowbit does not read, are refused in words."""

from __future__ import annotations

import random
import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest
from gguf_files import SPECIAL, TOKENS, add_tokens, finish, write_foreign

from lowbit.errors import CheckpointError
from lowbit_hf.evaluate import load_tokenizer
from lowbit_hf.gguf.header import parse
from lowbit_hf.gguf.source import open_checkpoint
from lowbit_hf.hub import find_model


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small file, and its bytes."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_foreign(path, "mixtral", 3, "Q4_0")
    return path.read_bytes()


def changed(raw, old, new, count=1):
    assert old in raw
    return raw.replace(old, new, count)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


DAMAGE = {
    "nothing": (lambda raw: raw[:0], "truncated or corrupt"),
    "another magic": (lambda raw: b"GGML" + raw[4:], "no GGUF file"),
    "a pointer": (lambda raw: b"version https://git-lfs" + raw, "git lfs pull"),
    "big-endian": (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "big-endian"),
    "a newer version": (lambda raw: raw[:4] + b"\x09\0\0\0" + raw[8:], "GGUF 9"),
    "many tensors": (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "has 0 dims"),
    "much metadata": (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "corrupt"),
    "a long key": (lambda raw: raw[:24] + b"\xff" * 8 + raw[32:], "truncated or corrupt"),
    "half of it": (lambda raw: raw[: len(raw) // 2], "truncated"),
    "a byte less": (lambda raw: raw[:-64], "truncated"),
    "no UTF-8": (lambda raw: changed(raw, b"general.architecture", b"general.\xff\xferchitecture"), "corrupt|UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(small, tmp_path, case):
    damage, words = DAMAGE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(small))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path).close()


def test_any_byte_of_a_header_may_be_wrong(small, tmp_path):
    """Nothing but a CheckpointError comes of it, and nothing is read from outside the file."""
    path, draw = tmp_path / "model.gguf", random.Random(0)
    with (tmp_path / "whole.gguf").open("wb") as stream:
        stream.write(small)
    with (tmp_path / "whole.gguf").open("rb") as stream:
        end = min(each.offset for each in parse(stream, path, len(small)).tensors.values())
    refused = 0
    for _ in range(400):
        raw = bytearray(small)
        start = draw.randrange(end)
        for i in range(start, min(start + draw.choice([1, 1, 8]), end)):
            raw[i] = draw.choice([0, 1, 0x7F, 0xFF, draw.randrange(256)])
        path.write_bytes(raw)
        try:
            with open_checkpoint(path) as checkpoint:
                for entry in checkpoint.entries.values():
                    assert entry.offset + entry.nbytes <= len(small)
                for name in list(checkpoint.entries)[:3]:
                    checkpoint.read(checkpoint.entries[name])
            with suppress(CheckpointError):
                load_tokenizer(path)
        except CheckpointError:
            refused += 1
    assert refused > 40


def write_llama(path, tensors, **metadata):
    """A file of a llama of one block with other tensors or metadata."""
    writer = gguf.GGUFWriter(path, str(metadata.pop("architecture", "llama")))
    sizes = {"block_count": 1, "context_length": 8, "embedding_length": 32, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 1, "attention.head_count_kv": 1}
    for key, value in (sizes | metadata).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key if key.startswith(("general", "split")) else f"llama.{key}", value)
    embedding = {"token_embd.weight": (np.zeros((4, 32), np.float16), None)}
    for name, (data, kind) in (embedding | tensors).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


ODD = {
    "another architecture": ({}, {"architecture": "gemma3"}, "'gemma3', which lowbit does not read"),
    "unknown metadata": ({}, {"logit_scale": 3}, "llama.logit_scale is metadata that lowbit does not know"),
    "a size in words": ({}, {"context_length": "many"}, "'context_length' is 'many'; needed is a count"),
    "no heads": ({}, {"attention.head_count": 0}, "needed is a count"),
    "two sizes of heads": ({}, {"attention.value_length": 16}, "heads of one size"),
    "one of many": ({}, {"split.count": 3}, "join them first"),
    "a tensor without place": ({"blk.0.ssm_a": (np.zeros((4,), np.float32), None)}, {}, "ssm_a.*has no place"),
    "a flat matrix": ({"blk.0.attn_q.weight": (np.zeros((32,), np.float32), None)}, {}, "has no place"),
    "odd heads": ({"blk.0.attn_q.weight": (np.zeros((31, 32), np.float32), None)}, {}, "no multiple of 2 x 1 heads"),
    "factors of nobody": (
        {"rope_freqs.weight": (np.full((16,), 3.0, np.float32), None)},
        {},
        "factors of none of Llama 3",
    ),
    "factors in half": ({"rope_freqs.weight": (np.ones((16,), np.float16), None)}, {}, "needed are a head's factors"),
    "another scaling": ({}, {"rope.scaling.type": "longrope"}, "'longrope'; lowbit reads none, linear and yarn"),
    "another type": (
        {"blk.0.ffn_up.weight": (np.zeros((2, 210), np.uint8), gguf.GGMLQuantizationType.Q6_K)},
        {},
        "is Q6_K; lowbit reads F32, F16, Q4_0, Q8_0, BF16",
    ),
    "quantized biases": (
        {"blk.0.attn_q.bias": (np.zeros((34,), np.uint8), gguf.GGMLQuantizationType.Q8_0)},
        {},
        "lowbit reads matrices of it",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_files_that_lowbit_cannot_read_are_refused(tmp_path, case):
    tensors, metadata, words = ODD[case]
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(write_llama(tmp_path / "model.gguf", tensors, **metadata)).close()


def test_experts_that_are_too_few(tmp_path):
    file = tmp_path / "model.gguf"
    stack = {"blk.0.ffn_up_exps.weight": (np.zeros((2, 32, 32), np.float32), None)}
    with pytest.raises(CheckpointError, match="holds 2 experts; the metadata say 4"):
        open_checkpoint(write_llama(file, stack, expert_count=4, expert_used_count=2))


def test_tensors_that_overlap(small, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small)
    names = [t.name for t in gguf.GGUFReader(path).tensors]
    where = small.index(text(names[1])) + len(text(names[1]))
    dims = struct.unpack_from("<I", small, where)[0]
    raw = bytearray(small)
    struct.pack_into("<Q", raw, where + 8 + 8 * dims, 0)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="overlap; the header is corrupt"):
        open_checkpoint(path)
    struct.pack_into("<Q", raw, where + 8 + 8 * dims, 1 << 63)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(path)


def test_which_file_of_a_folder(small, tmp_path):
    (tmp_path / "a.gguf").write_bytes(small)
    assert find_model(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(small)
    with pytest.raises(CheckpointError, match="holds 2 GGUF files; name one"):
        find_model(str(tmp_path))
    inner, outer = tmp_path / "inner", tmp_path / "b.gguf"
    inner.mkdir()
    (inner / "model.gguf").symlink_to(outer)
    with pytest.raises(CheckpointError, match="outside the folder"):
        find_model(str(inner))
    (tmp_path / "pipe.gguf").mkdir()
    with pytest.raises(CheckpointError, match="holds no"):
        open_checkpoint(tmp_path / "pipe.gguf")


def test_tokenizers_of_files(tmp_path):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    add_tokens(writer, "llama-bpe")
    writer.add_chat_template("{{ messages }}")
    finish(writer)
    found = load_tokenizer(file)
    assert found("ab b").input_ids == [0, TOKENS.index("ab"), TOKENS.index("Ġ"), TOKENS.index("b")]
    assert (found.bos_token, found.eos_token) == tuple(SPECIAL)
    raw = file.read_bytes()
    file.write_bytes(changed(raw, b"llama-bpe", b"tekken-xx"))
    with pytest.raises(CheckpointError, match="'gpt2' cut by 'tekken-xx'; lowbit reads"):
        load_tokenizer(file)
    file.write_bytes(changed(raw, b"tokenizer.ggml.merges", b"tokenizer.ggml.murges"))
    with pytest.raises(CheckpointError, match="merges' is no list of strings"):
        load_tokenizer(file)
    write_llama(file, {})
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(file)
