"""Quantized models once their weights are packed, dense and with experts: the reference's greedy tokens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import lowbit
from lowbit.testing import Loopback, installed_backends
from lowbit_hf import load
from lowbit_hf.evaluate import tokenize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def greedy(model, ids):
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["W4A16", "MXFP4A16", "NVFP4A16", "W8A16"])
@pytest.mark.parametrize("model", ["lm-tiny", "moe-tiny"])
def test_bound_models_give_the_references_greedy_tokens(models, quantized, model, name, device):
    folder = quantized(model, name)
    ids = tokenize(folder, models / "calibration.txt")[: 4 * 40].view(4, 40).to(device)
    bound = load(folder, device=device)
    lowbit.bind(bound, prefer=("reference",))
    wanted = greedy(bound, ids)
    backend = Loopback("packing", packs=True)
    with installed_backends(backend) if device == "cpu" else nullcontext():
        rows = lowbit.bind(bound, prefer=("packing" if device == "cpu" else "cuda",)).rows
        assert {row.op for row in rows} == ({"linear", "grouped_mm"} if model == "moe-tiny" else {"linear"})
        assert all(row.packed for row in rows)
        assert torch.equal(greedy(bound, ids), wanted)
