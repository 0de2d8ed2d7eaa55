"""Several processes at one calibration: `torchrun --nproc-per-node N --no-python lowbit quantize ...`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.journal import sync_path
from lowbit_algos import Method
from lowbit_hf.budget import Budget
from lowbit_hf.calibrated import Calibrated, Progress
from lowbit_hf.job import Job


def join(device: str) -> str:
    """Join the processes that torchrun started, if it started any; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    mine = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    if mine.startswith("cuda"):
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.startswith("cuda") else "gloo")
    return mine


def leave() -> None:
    """Part from the processes that `join` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def require_windows(windows: Tensor) -> None:
    """Refuse more processes than there are windows of text.

    Raises:
        RecipeError: there are.
    """
    count = dist.get_world_size() if dist.is_initialized() else 1
    if len(windows) < count:
        raise RecipeError(
            f"{count} processes share {len(windows)} windows of text; give at least one each, by --samples"
        )


def together() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def follow(job: Job, calibrated: Calibrated, windows: Tensor, budget: Budget, scratch: Path) -> None:
    """Take part in the calibration that process 0 carries out and writes.

    That one makes the folder of `scratch`, or fails, upon which torchrun ends all.

    Raises:
        LowbitError: this process takes more memory than is allowed.
    """
    budget.agree(agree(0), held=bool(agree(0)))
    together()

    def done(blocks: Sequence[str], files: Sequence[Path]) -> None:
        del blocks
        for path in files:
            if path.suffix != ".json":
                sync_path(path)
        together()
        budget.check()

    def write(name: str, weight: Tensor | None) -> None:
        del name, weight

    progress = Progress(scratch, lambda _: False, done)
    calibrated.run(windows, job.method or Method(), progress, write, tokens=budget.tokens, held=budget.held)


def agree(tokens: int) -> int:
    """What process 0 says."""
    told = [tokens]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]
