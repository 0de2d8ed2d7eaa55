"""Checkpoints read against the safetensors library, and folders that try to lead the reader astray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError
from lowbit.shards import (
    DTYPES,
    INDEX_NAME,
    Checkpoint,
    TensorEntry,
    byte_view,
    contained_file,
    read_header,
    row_slices,
)

SHAPES = [(), (1,), (7,), (0,), (5, 3), (3, 0), (0, 4), (2, 3, 5)]


def random_tensor(dtype, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def same_bits(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and bytes(byte_view(a)) == bytes(byte_view(b))


def write_shards(folder, shards, weight_map=None):
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt", "file": file})
    names = {name: file for file, tensors in shards.items() for name in tensors}
    write_index(folder, names if weight_map is None else weight_map)
    return folder


def write_index(folder, weight_map, **more):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **more}))


TWO = {"b.safetensors": {"x": torch.arange(3.0)}, "a.safetensors": {"y": torch.ones(2, 2), "z": torch.zeros(1)}}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reads_what_the_library_wrote(dtype, tmp_path):
    tensors = {f"t{i}": random_tensor(dtype, shape, i) for i, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "f.safetensors", {"k": "v"})
    with Checkpoint.open(tmp_path / "f.safetensors") as checkpoint:
        assert checkpoint.metadata == {"k": "v"}
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert set(checkpoint.entries) == set(tensors)
        for name, tensor in tensors.items():
            assert same_bits(checkpoint.read(checkpoint.entries[name]), tensor)
            assert same_bits(load_file(tmp_path / "f.safetensors")[name], tensor)


@given(data=st.data())
def test_row_slices_cover_once_and_read_the_same_rows(data, tmp_path_factory):
    shape = data.draw(st.sampled_from(SHAPES))
    max_bytes, align = data.draw(st.integers(0, 100)), data.draw(st.integers(1, 4))
    tensor = random_tensor(torch.float32, shape)
    path = tmp_path_factory.getbasetemp() / "rows.safetensors"
    save_file({"t": tensor}, path)
    with Checkpoint.open(path) as checkpoint:
        entry = checkpoint.entries["t"]
        slices = list(row_slices(entry, max_bytes, align))
        assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(entry.rows))
        assert all(rows.start % align == 0 for rows in slices)
        for rows in slices:
            part = checkpoint.read(entry, rows)
            assert same_bits(part, tensor[rows] if shape else tensor)
            assert part.nbytes <= max_bytes or rows.stop - rows.start <= align


def test_row_slices_are_as_large_as_allowed():
    entry = TensorEntry("t", torch.float32, (100, 8), Path("f"), 0, 3200)
    assert list(row_slices(entry, 32 * 33, align=16)) == [slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 100)]
    assert list(row_slices(entry, 1, align=64)) == [slice(0, 64), slice(64, 100)]


def test_read_into_out(tmp_path):
    tensor = random_tensor(torch.bfloat16, (6, 3))
    save_file({"t": tensor}, tmp_path / "f.safetensors")
    buffer = torch.zeros(4, 3, dtype=torch.bfloat16)
    with Checkpoint.open(tmp_path / "f.safetensors") as checkpoint:
        entry = checkpoint.entries["t"]
        assert checkpoint.read(entry, slice(2, 4), out=buffer[1:3]).data_ptr() == buffer[1:3].data_ptr()
        assert same_bits(buffer[1:3].clone(), tensor[2:4].clone())
        assert not buffer[0].any()
        assert not buffer[3].any()
        assert same_bits(checkpoint.read(entry, slice(-2, None)), tensor[4:].clone())
        for out in (buffer, buffer.half()[:2], torch.zeros(3, 2, dtype=torch.bfloat16).t()):
            with pytest.raises(CheckpointError):
                checkpoint.read(entry, slice(0, 2), out=out)
        with pytest.raises(CheckpointError, match="no consecutive rows"):
            checkpoint.read(entry, slice(None, None, 2))


def test_shards_and_their_order(tmp_path):
    folder = write_shards(tmp_path / "m", TWO)
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.shards) == ["a.safetensors", "b.safetensors"]
        assert [entry.name for entry in checkpoint.shards["a.safetensors"]] == ["y", "z"]
        assert list(checkpoint.entries) == ["y", "z", "x"]
        assert checkpoint.metadata == {"format": "pt"}  # "file" differs from shard to shard
        assert checkpoint.nbytes == 32
        for tensors in TWO.values():
            for name, tensor in tensors.items():
                assert same_bits(checkpoint.read(checkpoint.entries[name]), tensor)


def test_closed_and_foreign_entries_are_refused(tmp_path):
    save_file({"t": torch.ones(2)}, tmp_path / "f.safetensors")
    save_file({"t": torch.ones(2)}, tmp_path / "g.safetensors")
    foreign = read_header(tmp_path / "g.safetensors")[0]["t"]
    with (
        Checkpoint.open(tmp_path / "f.safetensors") as checkpoint,
        pytest.raises(CheckpointError, match="not of an open checkpoint"),
    ):
        checkpoint.read(foreign)
    with pytest.raises(CheckpointError, match="not of an open checkpoint"):
        checkpoint.read(checkpoint.entries["t"])


def test_files_are_closed_even_after_an_error(tmp_path):
    before = sorted(Path("/proc/self/fd").iterdir())
    folder = write_shards(tmp_path / "m", TWO, {"x": "b.safetensors"})
    write_index(folder, {"x": "b.safetensors", "y": "a.safetensors"})
    with pytest.raises(CheckpointError, match="does not name 'z'"):
        Checkpoint.open(folder)
    write_index(folder, {"x": "b.safetensors"})
    Checkpoint.open(folder).close()
    assert sorted(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("change", ["cut", "grown", "rewritten"])
def test_a_file_that_changes_under_the_reader_is_noticed(change, tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({"t": torch.ones(1000)}, path)
    with Checkpoint.open(path) as checkpoint:
        if change == "cut":
            os.truncate(path, 1000)
        elif change == "grown":
            os.truncate(path, 10_000)
        else:
            content = path.read_bytes()
            path.write_bytes(content)
            os.utime(path, ns=(0, 0))
        with pytest.raises(CheckpointError, match="changed while it was read"):
            checkpoint.read(checkpoint.entries["t"])


def test_folder_without_index(tmp_path):
    save_file({"t": torch.ones(1)}, tmp_path / "only.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.shards) == ["only.safetensors"]
    save_file({"t": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'only.safetensors', 'other.safetensors' and no model.safetensors.index"
    ):
        Checkpoint.open(tmp_path)
    save_file({"u": torch.zeros(2)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.entries) == ["u"]
    write_index(tmp_path, {"t": "only.safetensors"})
    with pytest.raises(CheckpointError, match="readers differ"):
        Checkpoint.open(tmp_path)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=r"'pytorch_model.bin', pickles.*save_pretrained"):
        Checkpoint.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "x\0",
        "x\ny",
        "a\\b",
        "./x",
        "x/",
        "e" * 300,
    ],
)
def test_index_cannot_lead_outside_the_folder(name, tmp_path):
    save_file({"t": torch.ones(1)}, tmp_path / "x.safetensors")
    folder = write_shards(tmp_path / "m", {}, {"t": name})
    (folder / "sub").mkdir()
    save_file({"t": torch.ones(1)}, folder / "sub" / "x.safetensors")
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


INDEXES = {
    "not JSON": (b"{", "not the JSON"),
    "list": (b"[]", "no weight_map"),
    "no map": (b"{}", "no weight_map"),
    "empty map": (b'{"weight_map":{}}', "no weight_map"),
    "map of numbers": (b'{"weight_map":{"x":1}}', "no weight_map"),
    "map is a list": (b'{"weight_map":["x"]}', "no weight_map"),
    "twice": (b'{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}', "'x' stands twice"),
    "deep": (b'{"weight_map":' + b"[" * 100_000 + b"}", "more than 64 deep"),
    "surrogate": (b'{"weight_map":{"x":"\\ud800"}}', "surrogates"),
    "missing shard": (b'{"weight_map":{"x":"c.safetensors"}}', "'c.safetensors' is missing"),
    "absent tensor": (b'{"weight_map":{"x":"b.safetensors","gone":"b.safetensors"}}', "shards lack: 'gone'"),
    "wrong shard": (
        b'{"weight_map":{"x":"a.safetensors","y":"a.safetensors","z":"a.safetensors"}}',
        "shards lack: 'x'",
    ),
    "unnamed tensor": (b'{"weight_map":{"y":"a.safetensors"}}', "does not name 'z'"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_bad_indexes(case, tmp_path):
    content, words = INDEXES[case]
    folder = write_shards(tmp_path / "m", TWO)
    (folder / INDEX_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(folder)


def test_index_too_large(tmp_path):
    folder = write_shards(tmp_path / "m", TWO)
    os.truncate(folder / INDEX_NAME, 1 << 40)
    with pytest.raises(CheckpointError, match="1099511627776 bytes, more than 67108864"):
        Checkpoint.open(folder)


def test_tensor_in_two_shards(tmp_path):
    shards = {"a.safetensors": {"x": torch.ones(1)}, "b.safetensors": {"x": torch.ones(1), "y": torch.ones(1)}}
    folder = write_shards(tmp_path / "m", shards, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"'x' is both in .*a.safetensors and in .*b.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_special_files(make, tmp_path):
    make(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / INDEX_NAME):
        with pytest.raises(CheckpointError):
            Checkpoint.open(path)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "model.safetensors")
    make(tmp_path / INDEX_NAME)
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)


def test_missing_path(tmp_path):
    for path in ("gone", "gone/model.safetensors", "x" * 300):
        with pytest.raises(CheckpointError, match="cannot read"):
            Checkpoint.open(tmp_path / path)


def hub_cache(root):
    """A hub cache as huggingface_hub lays it out: links from the snapshot into the blobs."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    save_file({"t": torch.arange(3.0)}, repo / "blobs" / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    return snapshot


def test_hub_cache_links_are_followed(tmp_path):
    snapshot = hub_cache(tmp_path)
    (tmp_path / "alias").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "alias"):
        with Checkpoint.open(folder) as checkpoint:
            assert checkpoint.read(checkpoint.entries["t"]).tolist() == [0, 1, 2]


def outside(folder, tmp_path):
    save_file({"t": torch.ones(1)}, tmp_path / "secret")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")


def other_repository(folder, tmp_path):
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    save_file({"t": torch.ones(1)}, other / "f00d")
    (folder / "model.safetensors").symlink_to(other / "f00d")


def blobs_are_a_link(folder, tmp_path):
    blobs = folder.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to("../../blobs/f00d")


def through_blobs(folder, tmp_path):
    save_file({"t": torch.ones(1)}, tmp_path / "secret")
    (folder.parent.parent / "blobs" / "link").symlink_to(tmp_path / "secret")
    (folder / "model.safetensors").symlink_to("../../blobs/link")


def below_blobs(folder, tmp_path):
    (folder / "model.safetensors").symlink_to("../../refs")


def loop(folder, tmp_path):
    (folder / "model.safetensors").symlink_to("model.safetensors")


def dangling(folder, tmp_path):
    (folder / "model.safetensors").symlink_to("../../blobs/none")


@pytest.mark.parametrize(
    "trick", [outside, other_repository, blobs_are_a_link, through_blobs, below_blobs, loop, dangling]
)
def test_link_tricks(trick, tmp_path):
    snapshot = hub_cache(tmp_path)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot / "model.safetensors").unlink()
    trick(snapshot, tmp_path)
    with pytest.raises(CheckpointError):
        Checkpoint.open(snapshot)
    if (snapshot / "model.safetensors").exists():
        (snapshot / INDEX_NAME).symlink_to("model.safetensors")
        with pytest.raises(CheckpointError, match="outside the folder"):
            Checkpoint.open(snapshot)


@pytest.mark.parametrize("parts", [("models--a--b", "snapshots"), ("data", "snapshots"), ("models--a--b", "revisions")])
def test_blobs_are_trusted_only_in_a_hub_layout(parts, tmp_path):
    folder = tmp_path.joinpath(*parts, "rev")
    folder.mkdir(parents=True)
    blobs = tmp_path / parts[0] / "blobs"
    blobs.mkdir()
    (blobs / "f00d").write_bytes(b"x")
    (folder / "config.json").symlink_to("../../blobs/f00d")
    if parts == ("models--a--b", "snapshots"):
        assert contained_file(folder, "config.json") == blobs / "f00d"
    else:
        with pytest.raises(CheckpointError, match="outside the folder"):
            contained_file(folder, "config.json")


def test_link_within_the_folder(tmp_path):
    save_file({"t": torch.ones(1)}, tmp_path / "weights")
    (tmp_path / "model.safetensors").symlink_to("weights")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.shards) == ["model.safetensors"]


def test_fingerprint_changes_with_name_size_time_header_and_index(tmp_path):
    def fingerprint(folder):
        with Checkpoint.open(folder) as checkpoint:
            return checkpoint.fingerprint()

    folder = write_shards(tmp_path / "m", TWO)
    seen = [fingerprint(folder)]
    assert fingerprint(folder) == seen[0]
    os.utime(folder / "a.safetensors", ns=(5, 5))
    seen.append(fingerprint(folder))
    write_shards(folder, {**TWO, "b.safetensors": {"x": torch.arange(3)}})
    os.utime(folder / "b.safetensors", ns=(5, 5))
    seen.append(fingerprint(folder))
    write_index(folder, {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}, more=1)
    seen.append(fingerprint(folder))
    (folder / "b.safetensors").rename(folder / "c.safetensors")
    write_index(folder, {"x": "c.safetensors", "y": "a.safetensors", "z": "a.safetensors"}, more=1)
    seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen)


def test_byte_view_wants_plain_memory():
    assert bytes(byte_view(torch.tensor([1, 2], dtype=torch.int16))) == b"\1\0\2\0"
    complex_view = torch.tensor([1 + 2j], dtype=torch.complex64).conj()
    for tensor in (torch.zeros(2, device="meta"), torch.zeros(2, 3).t(), complex_view, complex_view.imag):
        with pytest.raises(CheckpointError, match="contiguous CPU tensor"):
            byte_view(tensor)


PEAK = """
    import re, sys
    from pathlib import Path
    from lowbit.shards import Checkpoint, row_slices

    def resident():
        return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

    with Checkpoint.open(sys.argv[1]) as checkpoint:
        before, peak, total = resident(), 0, 0
        for entry in checkpoint.entries.values():
            for rows in row_slices(entry, 4 << 20):
                total += int(checkpoint.read(entry, rows)[:, 0].sum())
                peak = max(peak, resident())
        print(total, peak - before)
"""


def test_streaming_keeps_file_pages_out_of_resident_memory(tmp_path):
    rows = 256
    tensor = torch.zeros(rows, 1 << 20, dtype=torch.uint8)
    tensor[:, 0] = 1
    save_file({"t": tensor}, tmp_path / "f.safetensors")
    command = [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / "f.safetensors")]
    total, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert total == rows
    assert grown < 24 << 20  # 256 MiB read in slices of 4 MiB
