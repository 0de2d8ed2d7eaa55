"""Quantized models once their weights are packed, dense and with experts: the reference's greedy tokens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import lowbit
from lowbit.testing import Loopback, installed_backends
from lowbit_hf import load
from lowbit_hf.evaluate import tokenize

NAMES = ("W4A16", "MXFP4A16", "NVFP4A16", "W8A16")
# On a CPU, where one backend stands for all, one scheme does.
CASES = [("W4A16", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in NAMES)]
PROMPT = 40


def greedy(model, ids):
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits.double()


def same_but_for_ties(found, wanted, near, exact):
    """Whether sequences are the same up to a token whose rival is nearer than what rounding makes of logits.

    `near` and `exact` are what both models make of `wanted`. Logits are bfloat16s, so that rivals can be equal.
    """
    for i, (one, other) in enumerate(zip(found.tolist(), wanted.tolist(), strict=True)):
        at = next((t for t, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if at is not None:
            here = exact[i, at - 1]
            noise = (near[i, at - 1] - here).square().mean().sqrt()
            if noise > 0.03 * here.square().mean().sqrt() or here[other[at]] - here[one[at]] > 4 * noise:
                return False
    return True


@pytest.mark.parametrize(("name", "device"), CASES)
@pytest.mark.parametrize("model", ["lm-tiny", "moe-tiny"])
def test_bound_models_give_the_references_greedy_tokens(models, quantized, model, name, device):
    folder = quantized(model, name)
    ids = tokenize(folder, models / "calibration.txt")[: 4 * PROMPT].view(4, PROMPT).to(device)
    bound = load(folder, device=device)
    lowbit.bind(bound, prefer=("reference",))
    wanted = greedy(bound, ids)
    exact = logits(bound, wanted)
    backend = Loopback("packing", packs=True)
    with installed_backends(backend) if device == "cpu" else nullcontext():
        rows = lowbit.bind(bound, prefer=("packing" if device == "cpu" else "cuda",)).rows
        assert {row.op for row in rows} == ({"linear", "grouped_mm"} if model == "moe-tiny" else {"linear"})
        assert all(row.packed for row in rows)
        found = greedy(bound, ids)
        if device == "cpu":
            assert torch.equal(found, wanted)
        else:
            assert same_but_for_ties(found, wanted, logits(bound, wanted), exact)
