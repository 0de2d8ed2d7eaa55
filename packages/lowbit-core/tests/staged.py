"""A run that stages one output, and such runs killed: before each of their changes to the disk, and at random times.

Run as a script, it kills them and tells how often: `test_killed_anywhere_and_at_any_time` in test_staging.py.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from lowbit import journal as journal_module
from lowbit.errors import CheckpointError
from lowbit.staging import Staging

METADATA = {"format": "pt"}
FILES = {
    "a.safetensors": {"x": torch.arange(12.0).view(4, 3), "empty": torch.zeros(0, 2), "scalar": torch.tensor(7)},
    "sub/b.safetensors": {"y": torch.arange(8, dtype=torch.uint8)},
}
# Every call by which a run changes what others see on the disk.
CHANGES = {
    *("ftruncate", "mkdir", "open", "posix_fallocate", "pwrite"),
    *("rename", "rmdir", "sendfile", "unlink", "write"),
}


def planned(tensors):
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def stage(out, fingerprint="f", *, overwrite=False, did=id, pause=lambda: None):
    """What a command does: two files in units, one of them in row slices, a copy and a text."""
    with Staging.open(out, fingerprint=fingerprint, overwrite=overwrite, command="make it") as staging:
        if staging.published:
            return
        for file, tensors in FILES.items():
            writer = staging.plan_file(file, planned(tensors), METADATA)
            for name, tensor in tensors.items():
                if staging.is_done(name):
                    continue
                for row in range(tensor.shape[0] if tensor.dim() else 1):
                    writer.write(name, tensor[row : row + 1] if tensor.dim() else tensor, row)
                    pause()
                staging.done(name)
                did(name)
            writer.finish()
        staging.copy_file(__file__, "code.py")
        staging.write_text("sub/deep/note.txt", "ä\r\n")
        staging.publish()


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forked(job, kill_after=None):
    """Exit status of `job` in a child, killed after so many seconds; -SIGKILL where it was killed."""
    child = os.fork()
    if child:
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        job()
    except CheckpointError as error:
        os._exit(3 if "exists" in str(error) else 4)
    except BaseException:  # noqa: BLE001 - the child must never return into pytest's or the script's own code
        sys.excepthook(*sys.exc_info())
        os._exit(5)
    os._exit(0)


def killed_before(change, job):
    """`job`, killed just before the change of this number to the disk."""
    left = change

    def count(frame, event, function):
        nonlocal left
        if event == "c_call" and function.__name__ in CHANGES:
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    def run():
        sys.setprofile(count)
        job()
        sys.setprofile(None)

    return run


def half_done(out):
    """Leave the partial folder of another run."""
    with Staging.open(out, fingerprint="other") as staging:
        writer = staging.plan_file("other.safetensors", [("t", torch.uint8, (2,))], {})
        writer.write("t", torch.ones(1, dtype=torch.uint8))
        staging.done("t")


def kill_everywhere(root, scenario):
    """Kill a run before each of its changes to the disk, look, run it again, look again; the number of kills."""
    root.mkdir()
    stage(root / "whole")
    new, old = tree(root / "whole"), {"old.txt": b"old"}
    overwrite = scenario != "fresh"
    log = root / "done"
    for change in range(1000):
        folder = root / str(change)
        out = folder / "out"
        folder.mkdir()
        log.write_bytes(b"")
        if scenario == "overwrite":
            out.mkdir()
            (out / "old.txt").write_bytes(b"old")
        elif scenario == "discard":
            half_done(out)
        first = partial(stage, out, overwrite=overwrite, did=partial(append, log))
        status = forked(killed_before(change, first))
        finished = out.exists() and tree(out) == new
        if status == 0:
            assert finished
            return change
        assert status == -signal.SIGKILL
        if scenario == "overwrite":
            assert finished or tree(out if out.exists() else folder / ".out.replaced") == old
        else:
            assert finished or not out.exists()
        # What was journalled is not done again; once the output is in place and the journal gone, it only exists.
        gone = finished and not (folder / ".out.partial" / "journal.jsonl").exists()
        known = [] if gone else log.read_text().split()
        second = partial(stage, out, overwrite=overwrite, did=partial(refuse, known))
        assert not existed(second) or (gone and not overwrite)
        assert tree(out) == new
        assert [path.name for path in folder.iterdir()] == ["out"]
        shutil.rmtree(folder)
    raise AssertionError("a run never came to its end")


def existed(job):
    """Whether the output that `job` was to make is there already."""
    try:
        job()
    except CheckpointError as error:
        if "exists" not in str(error):
            raise
        return True
    return False


def append(log, unit):
    with log.open("a") as file:
        file.write(f"{unit}\n")


def refuse(known, unit):
    assert unit not in known, f"{unit} was done before the kill"


def kill_at_random(root, seed):
    """Kill one output's runs from outside at random times until one gets through; the number of kills."""
    rng = random.Random(seed)
    root.mkdir()
    stage(root / "whole")
    out = root / "out"
    for kills in range(100):
        status = forked(partial(stage, out, pause=lambda: time.sleep(0.01)), rng.uniform(0, 0.02 * (kills + 1)))
        if out.exists():
            assert tree(out) == tree(root / "whole")
        # A run that was killed after its last change to the disk got through as well: the next finds that it exists.
        assert status in (-signal.SIGKILL, 0, 3)
        if status != -signal.SIGKILL:
            assert sorted(path.name for path in root.iterdir()) == ["out", "whole"]
            return kills
    raise AssertionError("no run came to its end")


if __name__ == "__main__":
    journal_module.SYNC_SECONDS = 0.0
    os.fsync = id  # a killed process loses nothing that it wrote, and waiting for the disk is most of the time
    root = Path(sys.argv[1])
    everywhere = [kill_everywhere(root / scenario, scenario) for scenario in ("fresh", "overwrite", "discard")]
    sys.stdout.write(" ".join(map(str, [*everywhere, kill_at_random(root / "random", 1)])))
