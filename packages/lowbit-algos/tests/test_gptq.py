"""GPTQ against a plain float64 one, against rounding to nearest on inputs it has not seen, and at its edges."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import lowbit as lb
from lowbit.testing import FORMAT_GRID, rounding_bound
from lowbit_algos import columns, gptq, solve
from lowbit_algos.factor import cholesky_by_panels

TWO_DIMS = [fmt for fmt in FORMAT_GRID if len(fmt.block) == 2 and fmt.element.signed | (fmt.zero is not None)]


def problem(n, k, *, seed=0, dtype=torch.float32, tokens=None):
    """A weight, and Hessians of correlated inputs with an outlier channel: to calibrate on, and of other tokens."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k) / 2
    hessians = []
    for _ in range(2):
        x = torch.randn(tokens or 4 * k, k, generator=generator) @ mix
        x[:, 3 * k // 4] *= 30
        hessians.append(x.T @ x)
    return weight, *hessians


def loss(q, weight, hessian):
    """`tr((W - Wq) H (W - Wq)^T)` in float64."""
    error = weight.double() - q.dequantize(torch.float64)
    return float(torch.einsum("nk,kj,nj->", error, hessian.double(), error))


# A plain GPTQ in float64, which knows nothing of blocks, factors or groups of candidates.


def plain_gptq(weight, hessian, fmt, *, damping=0.01):
    """Column by column with the inverse of what is left, scales by lowbit from the group as it is by then."""
    w, h = weight.double().clone(), hessian.double().clone()
    k = w.shape[1]
    h += torch.eye(k) * damping * h.diagonal().mean()
    group = fmt.block_of(tuple(w.shape))[1]
    out, scales = w.clone(), lb.choose_scale(weight, fmt)
    for j in range(k):
        if j % group == 0 and group < k:
            chosen = lb.choose_scale(w[:, j : j + group].float(), fmt, tensor_scale=scales.tensor_scale)
            scales.scale[:, j // group] = chosen.scale[:, 0]
            if chosen.zero is not None:
                scales.zero[:, j // group] = chosen.zero[:, 0]
        out[:, j] = w[:, j]
        q = lb.quantize(out.float(), fmt, scales.scale, scales.zero, scales.tensor_scale)
        inverse = torch.linalg.inv(h[j:, j:])
        error = (w[:, j] - q.dequantize(torch.float64)[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return q


@pytest.mark.parametrize("fmt", TWO_DIMS, ids=str)
def test_codes_are_those_of_a_plain_one(fmt):
    group = fmt.block_of((128, 1536))[1]
    k = {1: 40}.get(group, 48 if group >= 1536 else 2 * group)
    weight, hessian, _ = problem(32, k)
    wanted = plain_gptq(weight, hessian, fmt)
    found = gptq(
        weight,
        hessian,
        fmt,
        act_order=False,
        scale_search=False,
        block=None if group < k else 16,
    )
    same = (found.qdata.view(torch.uint8) == wanted.qdata.view(torch.uint8)).float().mean()
    # Float32 brings a few of thousands of weights to the other side of a tie, and their rows with them.
    assert float(same) > 0.99
    assert loss(found, weight, hessian) <= 1.01 * loss(wanted, weight, hessian)


CASES = [
    (lb.Format.parse(name), n, k)
    for name, n, k in (
        ("INT8_ROW", 64, 512), ("INT8_ROW_ASYM", 96, 1000), ("INT4_G32", 64, 256), ("INT4_G128", 48, 2048),
        ("UINT4_G128", 64, 512), ("UINT2_G32", 64, 512), ("FP8_ROW", 64, 768), ("FP8_TENSOR", 64, 300),
        ("FP8_1x128", 64, 512), ("FP8_128x128", 200, 456), ("MXFP8", 64, 512), ("MXFP8_E5M2", 33, 512),
        ("MXFP6_E2M3", 64, 512), ("MXFP6_E3M2", 64, 1024), ("MXFP4", 64, 512), ("MXFP4", 1, 2048),
        ("MXINT8", 64, 512), ("NVFP4", 64, 512), ("NVFP4", 17, 1040), ("INT8_TENSOR", 64, 256),
    )
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fmt", "n", "k"), CASES, ids=str)
def test_it_beats_rounding_to_nearest_on_inputs_it_has_not_seen(fmt, n, k, dtype):
    weight, seen, unseen = problem(n, k, seed=n + k, dtype=dtype)
    nearest = loss(lb.quantize(weight, fmt), weight, unseen)
    before = weight.clone(), seen.clone()
    for act_order in (False, True):
        for scale_search in (False, True):
            found = gptq(weight, seen, fmt, act_order=act_order, scale_search=scale_search)
            assert found.dtype == dtype
            assert loss(found, weight, unseen) <= nearest
    assert torch.equal(weight, before[0])
    assert torch.equal(seen, before[1])
    # Rounded to bfloat16 and given as float32 it is the same weight, and gives the same bits.
    if dtype == torch.bfloat16:
        wide = gptq(weight.float(), seen, fmt)
        assert torch.equal(wide.qdata.view(torch.uint8), gptq(weight, seen, fmt).qdata.view(torch.uint8))


@pytest.mark.parametrize("fmt", ["INT4_G32", "UINT4_G128", "NVFP4", "MXFP4", "INT8_ROW"])
def test_searching_scales_and_order_help_what_they_were_given(fmt):
    weight, hessian, _ = problem(128, 512)
    plain, search, both = (
        loss(gptq(weight, hessian, fmt, act_order=order, scale_search=search), weight, hessian)
        for order, search in ((False, False), (False, True), (True, True))
    )
    assert search < plain
    assert both < plain


STACKED = ("INT4_G32", "UINT4_G128", "INT8_ROW_ASYM", "FP8_ROW", "FP8_128x128", "INT8_TENSOR", "MXFP8", "NVFP4")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", STACKED)
def test_experts_get_the_bits_that_each_gets_alone(fmt, act_order, monkeypatch):
    k = 456 if fmt == "FP8_128x128" else 512
    matrices = [problem(96, k, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    weights, hessians = (torch.stack([m[i] for m in matrices]) for i in range(2))
    whole = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1) * 2.0**-10 if fmt == "NVFP4" else None
    alone = [
        solve(*m[:2], fmt, tensor_scale=None if whole is None else whole[e], act_order=act_order)
        for e, m in enumerate(matrices)
    ]
    # All at a time, and two.
    for elements in (3 * k * k, 2 * k * k):
        monkeypatch.setattr(sys.modules["lowbit_algos.gptq"], "_ELEMENTS", elements)
        found = solve(weights.mT, hessians, fmt, k_axis=1, tensor_scale=whole, act_order=act_order)
        for e, each in enumerate(alone):
            q, wanted = found.weight.mT[e], each.weight
            assert torch.equal(q.qdata.view(torch.uint8), wanted.qdata.view(torch.uint8))
            assert torch.equal(q.scale.float(), wanted.scale.float())
            assert q.zero is None or torch.equal(q.zero, wanted.zero)
            assert q.tensor_scale is None or torch.equal(q.tensor_scale, wanted.tensor_scale)


def test_the_order_of_groups_and_of_columns_in_them_does_not_change_where_columns_are():
    weight, hessian, _ = problem(64, 256)
    q = gptq(weight, hessian, "INT4_G32")
    error = (weight - q.dequantize()).abs()
    assert float(error.max()) < 0.5 * float(weight.abs().max())
    # A diagonal Hessian moves no error: codes are those of rounding under the scales that were chosen.
    q = gptq(weight, torch.diag(torch.rand(256) + 1), "INT4_G32", scale_search=False)
    nearest = lb.quantize(weight, "INT4_G32")
    assert torch.equal(q.qdata, nearest.qdata)
    assert torch.equal(q.scale, nearest.scale)


def test_it_leaves_torch_its_number_of_threads(monkeypatch):
    threads, compiled = torch.get_num_threads(), columns._compiled

    def first(*arrays):
        # As numba's first loop of a process does.
        torch.set_num_threads(2)
        compiled(*arrays)

    monkeypatch.setattr(columns, "_compiled", first)
    try:
        torch.set_num_threads(3)
        weight, hessian, _ = problem(8, 64)
        gptq(weight, hessian, "INT4_G32")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_columns_without_inputs_are_rounded_to_nearest():
    weight, hessian, _ = problem(16, 128)
    hessian[5], hessian[:, 5] = 0, 0
    q = gptq(weight, hessian, "INT8_ROW", scale_search=False)
    step = float(q.scale.max())
    assert float((weight - q.dequantize())[:, 5].abs().max()) <= step / 2 * (1 + 2.0**-20)
    assert gptq(weight, torch.zeros_like(hessian), "INT8_ROW", scale_search=False).qdata.equal(
        lb.quantize(weight, "INT8_ROW").qdata
    )


def test_damping_grows_where_the_hessian_is_indefinite():
    weight, _, _ = problem(8, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x
    hessian -= torch.eye(64) * 0.03 * hessian.diagonal().mean()
    found = solve(weight, hessian, "INT8_ROW")
    assert found.damping == (0.1,)
    assert solve(weight, x.T @ x, "INT8_ROW").damping == (0.01,)
    both = solve(torch.stack([weight] * 2), torch.stack([x.T @ x, hessian]), "INT8_ROW")
    assert both.damping == (0.01, 0.1)
    assert torch.equal(both.weight[1].qdata, found.weight.qdata)
    with pytest.raises(lb.LowbitError, match=r"not positive definite, not even with 1 of the mean"):
        gptq(weight, -torch.eye(64), "INT8_ROW")


def test_panels_give_the_factors_of_several_matrices():
    hessians = torch.stack([problem(1, 600, seed=seed)[1] for seed in range(3)]).double()
    hessians[1, 500, 500] *= -1
    found = hessians.float().mT.contiguous().mT
    assert [bool(failed) for failed in cholesky_by_panels(found)] == [False, True, False]
    for e in (0, 2):
        factor = found[e].tril().double()
        assert float((factor @ factor.mT - hessians[e]).norm() / hessians[e].norm()) < 2.0**-20


def test_siblings_may_share_a_tensor_scale():
    weight, hessian, _ = problem(32, 128)
    shared = torch.full((1, 1), 2.0**-3)
    q = gptq(weight, hessian, "NVFP4", tensor_scale=shared)
    assert torch.equal(q.tensor_scale, shared)
    assert float((weight - q.dequantize()).abs().max()) <= rounding_bound(lb.NVFP4) * 4 * float(weight.abs().max())


WRONG = {
    r"block=100 is not a multiple of the 32 columns .* use block=128": {"block": 100},
    r"the Hessian is torch.float32 \(3, 3\)": {"hessian": torch.eye(3)},
    r"weight holds a NaN": {"weight": torch.full((4, 64), math.nan)},
    r"Hessian holds a NaN": {"hessian": torch.full((64, 64), math.inf)},
    r"not torch.int64 \(4, 64\)": {"weight": torch.ones(4, 64, dtype=torch.int64)},
    r"not torch.float32 \(64,\)": {"weight": torch.ones(64)},
    r"k_axis=2 is no axis": {"k_axis": 2},
    r"damping=0 and block=None must be positive": {"damping": 0},
    r"damping=0.01 and block=0 must be positive": {"block": 0},
    r"tensor scale is \(3, 1, 1\); needed is \(1, 1\)": {"fmt": "NVFP4", "tensor_scale": torch.ones(3, 1, 1)},
    r"64 .* is not a multiple of block 128": {"fmt": "INT4_G128"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message):
    given = {"weight": torch.ones(4, 64), "hessian": torch.eye(64), "fmt": "INT4_G32", **WRONG[message]}
    with pytest.raises(lb.FormatError, match=message):
        gptq(**given)


@pytest.mark.parametrize("fmt", ["INT4_G32", "UINT4_G128", "INT8_ROW", "NVFP4", "FP8_128x128", "FP8_TENSOR"])
def test_rows_worked_on_apart_give_what_they_give_together(fmt, monkeypatch):
    weight, hessian, _ = problem(160, 256)
    whole = gptq(weight, hessian, fmt)
    monkeypatch.setattr(sys.modules["lowbit_algos.gptq"], "_ELEMENTS", 256 * 48)
    parts = gptq(weight, hessian, fmt)
    # Products of fewer rows may add up in another order, so that a code may change where it was close.
    assert (parts.dequantize() == whole.dequantize()).float().mean() > 0.95
    assert loss(parts, weight, hessian) == pytest.approx(loss(whole, weight, hessian), rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["INT4_G32", "UINT4_G128", "INT8_ROW", "FP8_128x128", "MXFP4", "NVFP4"])
def test_on_a_gpu(fmt):
    weight, seen, unseen = problem(64, 512)
    nearest = loss(lb.quantize(weight, fmt), weight, unseen)
    found = gptq(weight.cuda(), seen.cuda(), fmt)
    assert found.device.type == "cuda"
    assert loss(found.to("cpu"), weight, unseen) <= nearest
    # A diagonal Hessian moves no error, so there is no sum whose order could differ.
    diagonal = torch.diag(torch.rand(512, generator=torch.Generator().manual_seed(0)) + 1)
    alike = gptq(weight, diagonal, fmt, scale_search=False)
    assert torch.equal(
        gptq(weight.cuda(), diagonal.cuda(), fmt, scale_search=False).dequantize().cpu(), alike.dequantize()
    )
