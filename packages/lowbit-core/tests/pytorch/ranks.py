"""Processes that run a function together, over gloo or each with a GPU over NCCL, kept for a whole test session: starting them takes seconds."""

from __future__ import annotations

import os
import socket
import traceback
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from torch import distributed, multiprocessing

# What takes seconds to import, or is imported when it is first used.
IMPORTED = ["lowbit", "pytest", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]


def _serve(rank, ranks, port, device, pipe):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=ranks)
    while (task := pipe.recv()) is not None:
        module, name, args = task
        try:
            pipe.send((True, getattr(import_module(module), name)(*args)))
        except BaseException as error:  # noqa: BLE001 - the test that asked raises it again
            pipe.send((False, f"rank {rank}: {''.join(traceback.format_exception(error))}"))
    distributed.destroy_process_group()


class Ranks:
    """`run(function, *args)` calls a function of a module in this folder on every rank; answers come back in order."""

    def __init__(self, ranks, device):
        # Of each of pytest's processes one more, which imports once for all ranks, and does nothing else before a fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, port, device, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args):
        # By file name: what pytest calls the module depends on where it was started.
        module = function.__module__.rpartition(".")[2]
        for pipe in self.pipes:
            pipe.send((module, function.__name__, args))
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(120):
                self.close()
                raise TimeoutError(f"{function.__name__}{args} hangs on {len(self.pipes)} ranks")
            answers.append(pipe.recv())
        for good, answer in answers:
            if not good:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            process.kill()


@contextmanager
def ranks(n, device="cpu"):
    """n ranks, ended afterwards."""
    if device == "cuda" and torch.cuda.device_count() < n:
        pytest.skip(f"needs {n} GPUs; here are {torch.cuda.device_count()}")
    started = Ranks(n, device)
    try:
        yield started
    finally:
        started.close()
