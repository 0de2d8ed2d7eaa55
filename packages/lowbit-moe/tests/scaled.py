"""What `lowbit bench scale` compares, on the ranks of a group that is there already."""

from __future__ import annotations

import torch

from lowbit.bench import Given, sqnr
from lowbit_moe.bench import scale

SHAPE = (60, 64, 128, 4, 2)


def compared():
    """Of each case and contender the SQNR on this rank, and the loss after steps of all."""
    found = {}
    scale._STEPS = 5
    for case in scale.benchmark.cases(Given([SHAPE], [], torch.device("cpu"), False)):
        data = case.data("normal")
        exact = case.exact(*data)
        for each in (case.baseline, case.candidate, *case.peers):
            out = each.decode(each.run(*each.prepare(*data)(0)))
            told = each.tell() if each.tell else {}
            found[case.told["step"], each.name] = sqnr(exact, out), told.get("loss"), each.moved
    return found
