"""Quantized models once their weights are packed, dense and with experts: the reference's greedy tokens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import lowbit
from lowbit.backends import installed
from lowbit.testing import Loopback, installed_backends
from lowbit_hf import load
from lowbit_hf.evaluate import tokenize

NAMES = ("W4A16", "MXFP4A16", "NVFP4A16", "W8A16")
# On a CPU one scheme does.
CASES = [("W4A16", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in NAMES)]
PROMPT = 40


def greedy(model, ids):
    """The tokens (B, T) that a model adds, and the logits (B, T, V) that it chose each of."""
    with torch.inference_mode():
        # What would else be guessed masks token 0, which these texts begin with.
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, 1).double()


def differences(found, wanted, most_noise):
    """Where tokens part although the lead of the one chosen is more than rounding makes of two logits; in words.

    Logits are compared up to there. They are bfloat16s: the larger they are the more they are rounded, and rivals can
    be equal.
    """
    told = []
    for i, (one, other, near, exact) in enumerate(zip(found[0], wanted[0], found[1], wanted[1], strict=True)):
        apart = (one != other).nonzero().flatten().tolist()
        for t in range(apart[0] + 1 if apart else len(one)):
            errors, lead = (near[t] - exact[t]).abs(), float(exact[t][other[t]] - exact[t][one[t]])
            noise = float(errors.square().mean().sqrt() / exact[t].square().mean().sqrt())
            if noise > most_noise or lead > 2 * float(errors.max()):
                told.append(f"sequence {i}, token {t}: a lead of {lead:.3g}; {errors.max():.3g} at most, {noise:.2%}")
    return told


@pytest.mark.parametrize(("name", "device"), CASES)
@pytest.mark.parametrize("model", ["lm-tiny", "moe-tiny"])
def test_bound_models_give_the_references_greedy_tokens(models, quantized, model, name, device):
    folder = quantized(model, name)
    ids = tokenize(folder, models / "calibration.txt")[: 4 * PROMPT].view(4, PROMPT).to(device)
    bound = load(folder, device=device)
    lowbit.bind(bound, prefer=("reference",))
    wanted = greedy(bound, ids)
    # The one that is here for a moment comes last, since nothing else undoes its packing.
    for backend in ["x86", "packing"] if device == "cpu" else ["cuda"]:
        # Other processors than x86's have no such kernels.
        if backend == "x86" and installed()[backend].problem is not None:
            continue
        loopback = installed_backends(Loopback(backend, packs=True)) if backend == "packing" else nullcontext()
        with loopback:
            rows = lowbit.bind(bound, prefer=(backend,)).rows
            assert {row.op for row in rows} == ({"linear", "grouped_mm"} if model == "moe-tiny" else {"linear"})
            assert all(row.packed and row.kernel.startswith(backend) for row in rows)
            found = greedy(bound, ids)
        if backend == "packing":
            assert torch.equal(found[0], wanted[0])
        else:
            # A router's tie can go to another expert, which changes what follows by more than rounding does.
            assert not differences(found, wanted, 0.08 if model == "moe-tiny" else 0.03)
