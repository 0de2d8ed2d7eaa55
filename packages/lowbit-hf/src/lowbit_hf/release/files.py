"""The files of a release, and what went in and came out of it by sha256."""

from __future__ import annotations

from hashlib import file_digest
from pathlib import Path

from lowbit.shards import INDEX_NAME
from lowbit.staging import Staging
from lowbit_hf.carrying import other_files
from lowbit_hf.job import Job

SUMS = "SHA256SUMS"
_CARD, _BASE_CARD = "README.md", "BASE_README.md"


def inputs_of(job: Job) -> list[tuple[str, int, str]]:
    """Name, bytes and sha256 of every file that went in."""
    folder, files = job.folder, [job.folder]
    if folder.is_dir():
        carried, _ = other_files(folder, job.checkpoint)
        names = {*job.checkpoint.shards, "config.json", INDEX_NAME, *carried}
        files = sorted(path for path in folder.rglob("*") if str(path.relative_to(folder)) in names)
    texts = job.calibration.files if job.calibration is not None else ()
    return [(path.name, path.stat().st_size, _digest(path)) for path in (*files, *texts)]


def lay_down(staging: Staging, checkpoint: Path, card: str) -> None:
    """The checkpoint's files, the card in place of the original's, and what all of them hash to."""
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        # An original that was released itself has such files too, which speak of other bytes.
        if path.is_file() and name not in (SUMS, _BASE_CARD):
            staging.link_file(path, _BASE_CARD if name == _CARD else name)
    staging.write_text(_CARD, card)
    files = sorted(path for path in staging.files.rglob("*") if path.is_file())
    staging.write_text(SUMS, "".join(f"{_digest(path)}  {path.relative_to(staging.files)}\n" for path in files))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
