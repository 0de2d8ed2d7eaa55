"""Damaged, lying and hostile input, and disks that fail: a clear error, exit code 1, and nothing half-done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit_hf import quantize, writing
from lowbit_hf.schemes import scheme

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-{number:05}-of-00002.safetensors" for number in range(2))
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def sound(llama, tmp_path_factory):
    """Folders of one small model: of two shards with an index, and of one file."""
    shards = llama(tmp_path_factory.mktemp("sound") / "shards", layers=1, hidden=128)
    one = shards.with_name("one")
    one.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(shards / name, one / name)
    save_file(load_file(shards / FIRST) | load_file(shards / SECOND), one / "model.safetensors", {"format": "pt"})
    return {"shards": shards, "one": one}


@pytest.fixture
def folder(sound, tmp_path):
    """`folder("one")`: a copy to damage."""

    def copy(kind):
        return shutil.copytree(sound[kind], tmp_path / "model")

    return copy


def split(path):
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(path, header, data, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def lie(**fields):
    """The header says something else of one tensor."""

    def edit(path):
        header, data = split(path)
        header[Q] |= fields
        join(path, header, data)

    return edit


def truncate(count):
    def edit(path):
        raw = path.read_bytes()
        path.write_bytes(raw[:count] if count >= 0 else raw[: len(raw) + count])

    return edit


def overlap(path):
    header, data = split(path)
    names = [name for name in header if name != "__metadata__"]
    header[Q]["data_offsets"] = next(
        header[n]["data_offsets"] for n in names if n != Q and header[n]["shape"] == [128, 128]
    )
    join(path, header, data)


def twice(path):
    header, data = split(path)
    entry = json.dumps(header[Q])
    join(path, f'{{"{Q}": {entry}, {json.dumps(header)[1:]}'.encode(), data)


def shrink(path):
    """A small span for a shape that overflows to it: 2^60 rows of 128 bfloat16 are 2^68 bytes, 0 in 64 bits."""
    header, data = split(path)
    header[Q] |= {"shape": [1 << 60, 128], "data_offsets": [header[Q]["data_offsets"][0]] * 2}
    join(path, header, data)


FILES = {
    "empty": (lambda p: p.write_bytes(b""), "holds 0 bytes, too few"),
    "a header cut short": (truncate(100), "is truncated: it holds 100 bytes, but its header alone needs"),
    "data cut short": (truncate(-1), "is truncated: it holds"),
    "half": (truncate(100_000), "is truncated: it holds 100000 bytes"),
    "more data": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "holds 1 bytes after its last tensor"),
    "a header of 2^63 bytes": (lambda p: join(p, *split(p), length=1 << 63), "header of 9223372036854775808 bytes"),
    "a header beyond the end": (lambda p: join(p, *split(p), length=99_000_000), "its header alone needs 99000008"),
    "a header that is no JSON": (lambda p: join(p, b"{" + b"x" * 63, b""), "is not the JSON it should be"),
    "a header of brackets": (lambda p: join(p, b"[" * 100_000, b""), "header of"),
    "a header that is a list": (lambda p: join(p, b"[]      ", b""), "is not a JSON object"),
    "text": (lambda p: p.write_text("model " * 100), "is not a safetensors file"),
    "a git-lfs pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "offsets beyond the end": (lie(data_offsets=[1 << 40, (1 << 40) + 32768]), "is truncated"),
    "offsets that overlap": (overlap, "overlap|unused"),
    "offsets in reverse": (lie(data_offsets=[32768, 0]), "two of them in order"),
    "negative offsets": (lie(data_offsets=[-32768, 0]), "must be whole numbers from 0"),
    "offsets of another size": (lie(shape=[128, 127]), r"is 32512 bytes, but data_offsets .* span 32768"),
    "a negative shape": (lie(shape=[-128, -128]), "must be whole numbers from 0"),
    "a shape that overflows": (shrink, "is larger than any tensor can be"),
    "a shape of words": (lie(shape=["128", 128]), "must be whole numbers"),
    "an unknown dtype": (lie(dtype="BF17"), "has dtype 'BF17'"),
    "a tensor twice": (twice, "stands twice"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "is not a regular file"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "is not a regular file"),
    "a link to nowhere": (lambda p: (p.unlink(), p.symlink_to("nothing")), "is missing; download it again"),
    "a link to itself": (lambda p: (p.unlink(), p.symlink_to(p)), "model.safetensors"),
    "a device": (lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "is a link to /dev/zero, outside the folder"),
    "missing": (lambda p: p.unlink(), "holds no .safetensors file"),
    "only a pickle": (
        lambda p: p.rename(p.with_name("pytorch_model.bin")),
        "pickles, which can run code and are never loaded",
    ),
    "several without an index": (
        lambda p: (shutil.copy(p, p.with_name("a.safetensors")), p.rename(p.with_name("b.safetensors"))),
        "add the index or name one file",
    ),
}


def lines(folder):
    """Every command that reads a checkpoint, on this one."""
    yield "quantize", folder, "--to", "W4A16", "-o", folder.parent / "out"
    yield "plan", folder, "--to", "W4A16"
    yield "inspect", folder
    yield "diff", folder, folder
    yield "eval", folder, "--tokens", "8"


def refused(lowbit, line, words):
    code, said, told = lowbit(*line)
    assert code == 1
    assert said == ""
    assert told.startswith(f"lowbit {line[0]}: ")
    assert told.count("\n") < 10
    assert pytest.raises(ValueError, match=words).matches(ValueError(told)), told


def nothing_left(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path.name.startswith((".out", "out"))) == []


@pytest.mark.parametrize("case", FILES)
def test_damaged_files(lowbit, folder, case):
    damage, words = FILES[case]
    damage((model := folder("one")) / "model.safetensors")
    for line in lines(model):
        refused(lowbit, line, words)
    assert nothing_left(model)


def mapped(edit):
    """The index's weight_map, edited in place."""

    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return change


def outside(name):
    """A shard is somewhere else, where it is perfectly sound."""

    def change(folder):
        (folder / SECOND).rename(folder.parent / SECOND)
        mapped(lambda names: names.update({k: name.format(folder.parent) for k, v in names.items() if v == SECOND}))(
            folder
        )

    return change


def linked(name, target):
    def change(folder):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(target.format(folder.parent))

    return change


def copied(folder):
    save_file(load_file(folder / FIRST) | {Q: torch.ones(128, 128)}, folder / FIRST)
    mapped(lambda names: names.update({Q: FIRST}))(folder)


INDICES = {
    "outside by dots": (outside(f"../{SECOND}"), "is not a plain file name"),
    "outside by an absolute name": (outside(f"{{}}/{SECOND}"), "is not a plain file name"),
    "a shard that links outside": (linked(SECOND, f"../{SECOND}"), "is a link to .*, outside the folder"),
    "a shard that links outside absolutely": (linked(SECOND, f"{{}}/{SECOND}"), "is a link to .*, outside the folder"),
    "an index that links outside": (linked(INDEX, f"../{INDEX}"), "is a link to .*, outside the folder"),
    "a missing shard": (lambda f: (f / SECOND).unlink(), f"'{SECOND}' is missing; download it again"),
    "a null byte": (mapped(lambda names: names.update({Q: "a\0b"})), "is not a plain file name"),
    "dots": (mapped(lambda names: names.update({Q: ".."})), "is not a plain file name"),
    "a tensor no shard has": (
        mapped(lambda names: names.update({"x": FIRST})),
        "names tensors that its shards lack: 'x'",
    ),
    "a tensor it does not name": (mapped(lambda names: names.pop(Q)), f"does not name '{Q}' of its shards"),
    "a tensor in two shards": (copied, f"'{Q}' is both in"),
    "no names": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "a list": (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), "has no weight_map"),
    "numbers": (mapped(lambda names: names.update({Q: 3})), "has no weight_map"),
    "no JSON": (lambda f: (f / INDEX).write_bytes(b"{\xff"), "is not the JSON it should be"),
    "nested without end": (lambda f: (f / INDEX).write_text('{"a":' * 100_000), "is not the JSON it should be"),
    "another file beside it": (
        lambda f: shutil.copy(f / FIRST, f / "model.safetensors"),
        "readers differ in which they take; delete one",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_lying_indices(lowbit, folder, case):
    damage, words = INDICES[case]
    damage(model := folder("shards"))
    for line in lines(model):
        refused(lowbit, line, words)
    assert nothing_left(model)


def test_the_folders_are_sound(lowbit, sound, tmp_path):
    for name, model in sound.items():
        assert lowbit("quantize", model, "--to", "W4A16", "-o", tmp_path / name)[0] == 0


def test_links_that_carry_a_secret_out(lowbit, folder, tmp_path):
    (tmp_path / "secret").write_text("my key")
    model = folder("one")
    (model / "notes.txt").symlink_to("../secret")
    refused(lowbit, next(lines(model)), "notes.txt is a link to .*secret, which is no file inside the folder")
    assert nothing_left(model)


def test_nonfinite_weights(lowbit, folder):
    model = folder("shards")
    state = load_file(model / SECOND)
    state[Q][3, 5] = torch.nan
    save_file(state, model / SECOND)
    line = next(lines(model))
    refused(lowbit, line, f"tensor '{Q}' holds NaN or infinity in rows 0 to 128")
    assert nothing_left(model)
    assert lowbit(*line, "--allow-nonfinite")[0] == 0
    kept = [name for name in load_file(model.parent / "out" / SECOND) if name.endswith("_proj.weight")]
    assert kept == [Q]


def test_int8_weights_that_no_config_explains(lowbit, folder, tmp_path):
    model = folder("one")
    assert lowbit("quantize", model, "--to", "W8A8", "-o", tmp_path / "once")[0] == 0
    config = json.loads((tmp_path / "once/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "once/config.json").write_text(json.dumps(config))
    refused(lowbit, ["quantize", tmp_path / "once", "--to", "W4A16", "-o", tmp_path / "out"], "is torch.int8")
    assert nothing_left(model)


# The output


def place(kind, tmp_path):
    out = tmp_path / "out"
    if kind == "a file":
        out.write_text("mine")
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to("elsewhere")
    elif kind == "a model":
        out.mkdir()
        (out / "config.json").write_text("{}")
    elif kind == "in no folder":
        out = tmp_path / "missing" / "out"
    elif kind == "under a file":
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
    return out


# Why not, without and with --overwrite.
EXISTS, NO_FOLDER, NO_PARENT = (
    "exists; pass --overwrite",
    "exists and is not a folder",
    "does not exist; create it first",
)
PLACES = {
    "a file": (EXISTS, NO_FOLDER),
    "a link": (EXISTS, NO_FOLDER),
    "a model": (EXISTS, None),
    "in no folder": (NO_PARENT, NO_PARENT),
    "under a file": (NO_PARENT, NO_PARENT),
}


@pytest.mark.parametrize("kind", PLACES)
def test_outputs_in_the_way(lowbit, folder, tmp_path, kind):
    model, out = folder("one"), place(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for option, words in zip(([], ["--overwrite"]), PLACES[kind], strict=True):
        line = ["quantize", model, "--to", "W4A16", "-o", out, *option]
        if words is not None:
            refused(lowbit, line, words)
            assert sorted(tmp_path.rglob("*")) == before
        else:
            assert lowbit(*line)[0] == 0
            assert (out / "model.safetensors").exists()


@pytest.fixture
def disk(tmp_path):
    """`disk("size=1m")`: an empty disk of its own."""
    mounted = []

    def mount(options):
        if os.geteuid() or not shutil.which("mount"):
            pytest.skip("only root can mount a small disk")
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_a_disk_that_cannot_be_written_to(lowbit, sound, disk):
    out = disk("size=1m,ro") / "out"
    refused(lowbit, ["quantize", sound["one"], "--to", "W4A16", "-o", out], "cannot write .*Read-only file system")


def test_a_folder_without_permission(lowbit, sound, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(lowbit, ["quantize", sound["one"], "--to", "W4A16", "-o", tmp_path / "locked/out"], "Permission denied")


def test_too_small_a_disk_is_told_before_work(lowbit, sound, disk):
    small = disk("size=128k")
    line = ["quantize", sound["one"], "--to", "W4A16", "-o", small / "out"]
    refused(lowbit, line, r"needs \d+ bytes and holds 0 of them, but its disk has only \d+ free; free \d+ more")
    assert list(small.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(lowbit, sound, disk, tmp_path, monkeypatch):
    small = disk("size=180k")  # which holds one shard of two
    line = ["quantize", sound["shards"], "--to", "W4A16", "-o", small / "out"]
    monkeypatch.setattr("lowbit.staging.Staging.require_space", lambda *_: None)
    refused(lowbit, line, "No space left on device.*the same command continues there once this is mended")
    assert not (small / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
    assert lowbit(*line)[0] == 0
    quantize.run(quantize.prepare(sound["shards"], scheme("W4A16"), mode="even"), tmp_path / "whole")
    ours, whole = (
        {p.name: p.read_bytes() for p in folder.iterdir() if p.stem != "report"}
        for folder in (small / "out", tmp_path / "whole")
    )
    assert ours == whole
    assert [path.name for path in small.iterdir()] == ["out"]


def test_a_shard_replaced_while_it_is_read(lowbit, folder, monkeypatch):
    model = folder("shards")
    write = writing._write_weight

    def replace(job, writer, entry, *rest):
        os.utime(model / SECOND, ns=(1, 1))
        return write(job, writer, entry, *rest)

    monkeypatch.setattr(writing, "_write_weight", replace)
    refused(lowbit, next(lines(model)), f"{SECOND} changed while it was read")
    assert not (model.parent / "out").exists()
