"""Benchmarks that several processes run together: `torchrun --nproc-per-node N --no-python lowbit bench NAME`."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import distributed

from lowbit.errors import LowbitError


@contextmanager
def joined(device: torch.device) -> Generator[torch.device]:
    """The device of this process, within the group of those that torchrun started, or of this one alone.

    Raises:
        LowbitError: there are fewer GPUs than processes on this machine, or it was said which GPU all take.
    """
    started, backend, own = "RANK" in os.environ, "gloo", None
    if device.type == "cuda":
        device = _of_rank(device, int(os.environ["LOCAL_RANK"])) if started else torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        backend, own = "nccl", device
    if started:
        distributed.init_process_group(backend, device_id=own)
    else:
        store = vars(distributed)["HashStore"]()  # stubs do not export it
        distributed.init_process_group(backend, store=store, rank=0, world_size=1, device_id=own)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def several() -> bool:
    """Whether this is within `joined`, where calls wait for those of other processes."""
    return distributed.is_available() and distributed.is_initialized()


def speaks() -> bool:
    """Whether this process is the one that prints and writes."""
    return not several() or distributed.get_rank() == 0


def longest(seconds: float, device: torch.device) -> float:
    """The most that a process took."""
    found = torch.tensor(seconds, dtype=torch.float64, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return float(found)


def _of_rank(device: torch.device, rank: int) -> torch.device:
    count, named = torch.cuda.device_count(), ":" in str(device)
    if named or rank >= count:
        raise LowbitError(
            f"process {rank} of this machine needs a GPU of its own; torch finds {count}, and --device is {device}: "
            "start as many processes as there are GPUs, with --device cuda"
        )
    return torch.device("cuda", rank)
