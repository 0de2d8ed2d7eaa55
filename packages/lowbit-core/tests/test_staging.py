"""Output folders that are killed, starved, contended and damaged: whole or not there, and the same bytes in the end."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import staged
import torch
from safetensors.torch import load_file
from staged import FILES, half_done, planned, stage, tree

from lowbit import journal as journal_module
from lowbit.errors import CheckpointError
from lowbit.shards import DTYPES, byte_view, read_header
from lowbit.staging import Staging


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    stage(out)
    return tree(out)


@pytest.fixture(autouse=True)
def sync_at_once(monkeypatch):
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.0)


def test_output_is_what_was_staged_and_nothing_is_left_beside_it(tmp_path):
    stage(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files = tree(tmp_path / "out")
    assert set(files) == {*FILES, "code.py", "sub/deep/note.txt"}
    assert files["code.py"] == Path(staged.__file__).read_bytes()
    assert files["sub/deep/note.txt"] == "ä\r\n".encode()
    for file, tensors in FILES.items():
        loaded = load_file(tmp_path / "out" / file)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_library_reads_every_dtype_and_shape_bit_for_bit(tmp_path):
    shapes = [(), (1,), (7,), (0,), (5, 3), (3, 0), (2, 3, 5)]
    tensors = {}
    for name, dtype in DTYPES.items():
        for shape in shapes:
            raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
            tensors[f"{name} {shape}"] = raw.view(dtype).reshape(shape)
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        writer = staging.plan_file("f.safetensors", planned(tensors), {"k": "ä"})
        for name in sorted(tensors):
            writer.write(name, tensors[name])
        writer.finish()
        staging.publish()
    loaded = load_file(tmp_path / "out" / "f.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(byte_view(loaded[name])) == bytes(byte_view(tensor))
    assert read_header(tmp_path / "out" / "f.safetensors")[1] == {"k": "ä"}


def test_killed_anywhere_and_at_any_time():
    # A kill needs no real disk, and one in memory makes the many runs quick. A fresh process, for it forks.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        done = subprocess.run([sys.executable, staged.__file__, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *everywhere, at_random = map(int, done.stdout.split())
    assert min(everywhere) > 40
    assert at_random > 2


def test_interrupt_propagates_and_the_next_run_continues(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out", did=lambda unit: interrupt() if unit == "scalar" else None)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    redone = []
    stage(tmp_path / "out", did=redone.append)
    assert redone == ["y"]
    assert tree(tmp_path / "out") == whole


def test_existing_output_needs_overwrite(whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="pass --overwrite"):
        stage(tmp_path / "out")
    assert tree(tmp_path) == {"out/mine": b"mine"}
    stage(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_only_a_folder_is_overwritten(kind, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    out.write_text("mine") if kind == "file" else out.symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="not a folder"):
        stage(out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        (tmp_path / "out").mkdir()
        with pytest.raises(CheckpointError, match="pass --overwrite"):
            staging.publish()
    assert staging.partial.exists()


def test_missing_parent(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; create it first"):
        stage(tmp_path / "gone" / "out")
    assert not list(tmp_path.iterdir())


def test_another_run_is_named_and_discarded_only_with_overwrite(whole, tmp_path):
    half_done(tmp_path / "out")
    with Staging.open(tmp_path / "out", fingerprint="other") as staging:
        assert staging.is_done("t")
    with pytest.raises(CheckpointError, match=r"another run: another command.*\.out\.partial"):
        stage(tmp_path / "out")
    stage(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == whole


def test_command_of_the_other_run_is_told(tmp_path):
    Staging.open(tmp_path / "out", fingerprint="f", command="lowbit quantize m").close()
    with pytest.raises(CheckpointError, match="another run: lowbit quantize m; run that again"):
        stage(tmp_path / "out", "g")


def test_one_process_at_a_time(tmp_path):
    with Staging.open(tmp_path / "out", fingerprint="f"):
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match=f"being written by process {os.getpid()};"):
                Staging.open(tmp_path / "out", fingerprint="f", overwrite=overwrite)
    Staging.open(tmp_path / "out", fingerprint="f").close()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_partial_folder_that_is_not_ours_is_kept(kind, tmp_path):
    folder = tmp_path / ".out.partial"
    if kind == "folder":
        folder.mkdir()
        (folder / "mine").write_text("mine")
    elif kind == "file":
        folder.write_text("mine")
    else:
        (tmp_path / "mine").mkdir()
        folder.symlink_to("mine")
    with pytest.raises(CheckpointError, match=r"not of lowbit|in the way"):
        stage(tmp_path / "out", overwrite=True)
    assert (folder / "mine").exists() or kind != "folder"


def interrupt(*arguments, **more):
    raise KeyboardInterrupt


def test_killed_between_the_renames_the_old_output_comes_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    staging = Staging.open(tmp_path / "out", fingerprint="f", overwrite=True)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: interrupt() if old == staging.files else rename(old, new))
    with pytest.raises(KeyboardInterrupt), staging:
        staging.publish()
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="another run"):
        Staging.open(tmp_path / "out", fingerprint="g")
    assert tree(tmp_path / "out") == {"mine": b"mine"}


@pytest.mark.parametrize("how", ["discard", "overwrite"])
def test_a_discarded_run_is_not_trusted_even_if_discarding_was_killed(how, tmp_path, monkeypatch):
    half_done(tmp_path / "out")
    monkeypatch.setattr(os, "rmdir", interrupt)  # its files are gone by then
    fingerprint = "other" if how == "discard" else "f"
    with (
        pytest.raises(KeyboardInterrupt),
        Staging.open(tmp_path / "out", fingerprint=fingerprint, overwrite=True) as staging,
    ):
        staging.discard()
    monkeypatch.undo()
    with Staging.open(tmp_path / "out", fingerprint="other") as staging:
        assert not staging.is_done("t")
        assert not list(staging.files.iterdir())


def test_a_lock_of_a_folder_just_published_is_noticed(tmp_path, monkeypatch):
    lock = fcntl.flock

    def lock_too_late(fd, operation):
        (tmp_path / ".out.partial" / "lock").unlink()
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with pytest.raises(CheckpointError, match="just finished"):
        Staging.open(tmp_path / "out", fingerprint="f")


def test_discard_leaves_nothing(tmp_path):
    staging = Staging.open(tmp_path / "out", fingerprint="f")
    staging.write_text("a", "a")
    staging.discard()
    assert not list(tmp_path.iterdir())


def test_only_journalled_rows_survive(tmp_path):
    rows = torch.arange(6, dtype=torch.int16).view(3, 2)
    plan = [("t", torch.int16, (3, 2))]
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        writer = staging.plan_file("f", plan, {})
        writer.write("t", rows[2:], 2)
        staging.done("last")
        writer.write("t", rows[:1])
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        writer = staging.plan_file("f", plan, {})
        writer.write("t", rows[1:2], 1)
        with pytest.raises(CheckpointError, match="rows of 't' were not written"):
            writer.finish()
        with pytest.raises(CheckpointError, match="'f' not finished"):
            staging.publish()
        writer.write("t", rows[:1])
        writer.finish()
        staging.publish()
    assert torch.equal(load_file(tmp_path / "out" / "f")["t"], rows)


def test_a_file_of_an_earlier_run_must_be_finished_too(tmp_path):
    half_done(tmp_path / "out")
    with (
        Staging.open(tmp_path / "out", fingerprint="other") as staging,
        pytest.raises(CheckpointError, match=r"'other\.safetensors' not finished"),
    ):
        staging.publish()


@pytest.mark.parametrize("damage", ["gone", "cut", "other header", "other plan"])
def test_a_file_changed_between_runs_is_noticed(damage, tmp_path):
    half_done(tmp_path / "out")
    path = tmp_path / ".out.partial" / "files" / "other.safetensors"
    plan = [("t", torch.uint8, (2,))]
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "other header":
        path.write_bytes(path.read_bytes().replace(b'"t"', b'"u"'))
    else:
        plan = [("t", torch.int8, (2,))]
    with (
        Staging.open(tmp_path / "out", fingerprint="other") as staging,
        pytest.raises(CheckpointError, match="not as this run left it"),
    ):
        staging.plan_file("other.safetensors", plan, {})


@pytest.mark.parametrize(
    ("name", "tensor", "row"),
    [
        ("u", torch.zeros(4, 2), 0),
        ("t", torch.zeros(4, 2).half(), 0),
        ("t", torch.zeros(4, 3), 0),
        ("t", torch.zeros(2), 0),
        ("t", torch.zeros(5, 2), 0),
        ("t", torch.zeros(2, 2), 3),
        ("t", torch.zeros(2, 2), -1),
        ("t", torch.zeros(2, 4).t(), 0),
        ("t", torch.zeros(4, 2, device="meta"), 0),
        ("scalar", torch.tensor(1.0), 1),
        ("scalar", torch.zeros(1), 0),
    ],
)
def test_what_does_not_fit_is_not_written(name, tensor, row, tmp_path):
    plan = [("t", torch.float32, (4, 2)), ("scalar", torch.float32, ())]
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        writer = staging.plan_file("f", plan, {})
        before = (staging.files / "f").read_bytes()
        with pytest.raises(CheckpointError):
            writer.write(name, tensor, row)
        assert (staging.files / "f").read_bytes() == before


def test_nothing_is_written_through_a_closed_file(tmp_path):
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        done, left = (staging.plan_file(name, [("t", torch.uint8, (1,))], {}) for name in "ab")
        done.write("t", torch.ones(1, dtype=torch.uint8))
        done.finish()
    for writer in (done, left):
        with pytest.raises(CheckpointError, match="finished or closed"):
            writer.write("t", torch.ones(1, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../x", "a//b", "./x", "x/", ".", "..", "a\\b", "a\0b", "\ud800"])
def test_names_stay_inside(name, tmp_path):
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        for write in (
            lambda: staging.write_text(name, ""),
            lambda: staging.copy_file(__file__, name),
            lambda: staging.plan_file(name, [], {}),
        ):
            with pytest.raises(CheckpointError, match="plain path inside"):
                write()
        assert not list(staging.files.iterdir())


def test_a_name_is_used_once(tmp_path):
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        staging.plan_file("f", [], {})
        with pytest.raises(CheckpointError, match="already written"):
            staging.write_text("f", "")
        staging.write_text("a", "")
        with pytest.raises(CheckpointError, match="cannot write"):
            staging.write_text("a/b", "")


def test_only_regular_files_are_copied(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(__file__)
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        for number, source in enumerate((tmp_path, tmp_path / "fifo", tmp_path / "gone", "/dev/zero")):
            with pytest.raises(CheckpointError, match="not a regular file"):
                staging.copy_file(source, str(number))
        staging.copy_file(tmp_path / "link", "copy")
        assert not (staging.files / "copy").is_symlink()
        assert (staging.files / "copy").read_bytes() == Path(__file__).read_bytes()


def test_space_already_held_counts(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        staging.plan_file("f", [("t", torch.uint8, (8 << 20,))], {})
        held = (staging.files / "f").stat().st_blocks * 512
        assert held >= 8 << 20  # reserved, though nothing was written
        blocks = os.statvfs_result((*free[:4], (1 << 20) // free.f_frsize, *free[5:]))
        monkeypatch.setattr(os, "statvfs", lambda path: blocks)
        staging.require_space(9 << 20)
        with pytest.raises(CheckpointError, match=rf"needs {64 << 20} bytes and holds \d+ .* only {1 << 20} free"):
            staging.require_space(64 << 20)


def test_a_file_system_without_reservation(tmp_path, monkeypatch, whole):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    stage(tmp_path / "out")
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "rename", "write"])
def test_a_failing_disk_is_told_and_the_next_run_continues(code, call, tmp_path, monkeypatch, whole):
    real = getattr(os, call)
    started = []

    def fail(*arguments, **more):
        if started:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **more)

    # Once the first tensor is done, or from the start for what happens only there.
    if call == "posix_fallocate":
        started.append(True)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match=rf"{os.strerror(code)}.*\.out\.partial is kept, and the same command"):
        stage(tmp_path / "out", did=started.append)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    stage(tmp_path / "out")
    assert tree(tmp_path / "out") == whole


def test_a_limit_on_file_size(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Staging.open(tmp_path / "out", fingerprint="f") as staging:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(CheckpointError, match="File too large"):
                staging.plan_file("f", [("t", torch.uint8, (2 << 20,))], {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not (staging.files / "f").exists()


@pytest.fixture
def mount(tmp_path):
    """Mount a tmpfs of 2 MiB with further options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount_tmpfs(options=""):
        if os.geteuid() or not shutil.which("mount"):
            pytest.skip("only root can mount a small disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size=2m{options}", "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount_tmpfs
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_full_disk(mount, tmp_path, whole):
    disk = mount()
    with Staging.open(disk / "out", fingerprint="f") as staging:
        with pytest.raises(CheckpointError, match=r"only \d+ free; free"):
            staging.require_space(4 << 20)
        with pytest.raises(CheckpointError, match="No space left"):
            staging.plan_file("f", [("t", torch.uint8, (4 << 20,))], {})
        assert not list(staging.files.iterdir())
        (tmp_path / "large").write_bytes(bytes(4 << 20))
        with pytest.raises(CheckpointError, match=r"No space left.*is kept"):
            staging.copy_file(tmp_path / "large", "large")
        staging.discard()

    def fill(unit):
        filler = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        with suppress(OSError):
            while os.write(filler, bytes(4096)):
                pass
        os.close(filler)

    with pytest.raises(CheckpointError, match=r"No space left.*is kept"):
        stage(disk / "out", did=fill)
    assert not (disk / "out").exists()
    (disk / "filler").unlink()
    redone = []
    stage(disk / "out", did=redone.append)
    assert "x" not in redone
    assert tree(disk / "out") == whole


def test_read_only_disk_is_told_before_work(mount):
    with pytest.raises(CheckpointError, match="Read-only file system"):
        Staging.open(mount(",ro") / "out", fingerprint="f")


def test_folder_without_permission_is_told_before_work(tmp_path):
    if not os.geteuid():
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Staging.open(tmp_path / "out", fingerprint="f")
