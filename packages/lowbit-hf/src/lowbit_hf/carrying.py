"""What a new folder takes over from an old one besides tensors, and what its config says of those left alone."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.shards import INDEX_NAME, Checkpoint, lies_inside
from lowbit_hf.reporting import REPORTS
from lowbit_hf.skeleton import Owner, Skeleton

# The same weights in forms that other programs load; keeping them would double the folder and contradict its config.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")


def check_target(folder: Path, out: Path) -> None:
    """Refuse an output that would replace the input, or a folder that is no model.

    Raises:
        CheckpointError: it would.
    """
    source, target = folder.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        msg = f"the output {out} and the input {folder} lie in one another; write to a folder beside the input"
        raise CheckpointError(msg)
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        msg = f"{out} exists and is no model folder (it has no config.json), so it is never replaced; choose another"
        raise CheckpointError(msg)


def other_files(folder: Path, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Files to carry over (relative names), and those of the original alone: its weights in other forms, its report.

    Raises:
        CheckpointError: a link leads out of the folder.
    """
    carried, left = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            _check_link(folder, path)
        if not path.is_file() or name in {*checkpoint.shards, "config.json", INDEX_NAME} or name.startswith(".git/"):
            continue
        other = path.suffix in _OTHER_WEIGHTS or name.endswith(".index.json") or name in REPORTS
        (left if other else carried).append(name)
    return carried, left


def _check_link(folder: Path, path: Path) -> None:
    """Refuse a link that would carry a file from elsewhere into a folder that is going to be shared, or that is lost.

    Raises:
        CheckpointError: the link leads outside the folder, to a folder, or nowhere.
    """
    real = path.resolve()
    if not real.is_file() or not lies_inside(folder.resolve(), real):
        msg = f"{path} is a link to {real}, which is no file inside the folder; replace it by a copy if you trust it"
        raise CheckpointError(msg)


def ignored_modules(
    checkpoint: Checkpoint, skeleton: Skeleton, owners: Mapping[str, Owner | None], quantized: AbstractSet[str]
) -> list[str]:
    """Modules that a reader might take for quantized by their class, but that are not, by checkpoint name.

    Engines have classes of their own, a router that transformers spells out being a Linear in vLLM; only embeddings are
    embeddings everywhere.
    """
    stored = {
        name.removesuffix(".weight")
        for name, owner in owners.items()
        if name.endswith(".weight")
        and name not in quantized
        and len(checkpoint.entries[name].shape) > 1
        and (owner is None or "Embedding" not in owner.classes)
    }
    held = {owner.name for owner in owners.values() if owner is not None}
    # A tied head is in the model, but not in the file.
    tied = {name for name in skeleton.linears if f"{name}.weight" not in held}
    return sorted(stored | tied)
