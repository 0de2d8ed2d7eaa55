"""GPTQ's loop over columns against the same loop in float64."""

from __future__ import annotations

import pytest
import torch

import lowbit as lb
from lowbit.numerics import Scales, choose_scales, total_scale
from lowbit.testing import FORMAT_GRID
from lowbit_kernels_cuda.columns import round_columns, round_group
from lowbit_kernels_cuda.scaling import raw

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ELEMENTS = {fmt.element.name: fmt for fmt in FORMAT_GRID if fmt.block == (1, 32) or fmt.zero}.values()


def one_by_one(w, x, m, d, scale, zero, element):
    """Targets, errors and losses under one candidate, in float64 but for what is rounded."""
    w, x, m, d = (part.double().clone() for part in (w, x, m, d))
    errors, losses = torch.empty_like(w), torch.zeros(len(w), dtype=torch.float64)
    for j in range(w.shape[1]):
        code = (x[:, j].float() / scale).double()
        if element.kind == "int":
            value = (code.round() + zero).clamp(element.min, element.max) - zero
        else:
            value = element.decode(element.encode(code.float()))
        errors[:, j] = w[:, j] - value * scale
        losses += d[j] * (x[:, j] - value * scale) ** 2
        x[:, j + 1 :] += errors[:, j, None] * m[j, j + 1 :]
    return x, errors, losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda fmt: str(fmt).replace(":", " "))
@pytest.mark.parametrize(("n", "g"), [(9, 32), (5, 48)])
def test_columns_are_rounded_as_one_by_one_in_float64_under_the_best_candidate(n, g, fmt, device):
    generator = torch.Generator().manual_seed(n)
    fmt, element = fmt.with_block(1, g), fmt.element
    w = torch.randn(g, n, generator=generator).mT
    w[3] *= 50
    x = w + torch.randn(n, g, generator=generator) / 8
    m = torch.eye(g) + torch.randn(g, g, generator=generator).triu(1) / 8
    d = torch.rand(g, generator=generator) + 0.1
    candidates = choose_scales(
        x, fmt, torch.tensor([1.0, 0.75, 0.5]), tensor_scale=torch.ones(1, 1) if fmt.tensor_scale else None
    )
    scales = total_scale(candidates).squeeze(-1)
    zeros = torch.zeros_like(scales) if candidates.zero is None else candidates.zero.squeeze(-1).float()
    given = [part.to(device) for part in (w, x, m, d, scales, zeros)]
    targets, errors, losses = (part.cpu().double() for part in round_columns(*given, element))

    wanted = [one_by_one(w, x, m, d, *pair, element) for pair in zip(scales, zeros, strict=True)]
    # Sums of g products in float32, each of two numbers no larger than these.
    close = {"rtol": 0.0, "atol": g * 2.0**-23 * float(x.abs().max())}
    for row in range(n):
        # A target at a tie to within that may go either way, and all after it with it; there are none in these rows.
        best = int(losses[:, row].argmin())
        torch.testing.assert_close(targets[row], wanted[best][0][row], **close)
        torch.testing.assert_close(errors[row], wanted[best][1][row], **close)
    torch.testing.assert_close(losses, torch.stack([each[2] for each in wanted]), rtol=1e-4, atol=0.0)


# The interpreter is slow: a format of every kind of scale, and on a GPU all.
INTERPRETED = [lb.INT4_G32, lb.UINT2_G32, lb.MXFP4, lb.NVFP4]
GROUPED = [fmt for fmt in FORMAT_GRID if fmt.block[:-1] == (1,) and fmt.block[-1] > 1]
CASES = [("cpu", fmt) for fmt in INTERPRETED]
CASES += [pytest.param("cuda", fmt, marks=pytest.mark.gpu) for fmt in GROUPED]


@pytest.mark.parametrize(("device", "fmt"), CASES, ids=lambda part: str(part).replace(":", " "))
@pytest.mark.parametrize("mode", ["even", "ceil"])
def test_a_group_gets_the_scales_of_least_loss_that_numerics_offers(fmt, mode, device):
    n, g = (9 if device == "cpu" else 1037), fmt.block[-1]
    generator = torch.Generator().manual_seed(g)
    w = torch.randn(g, n, generator=generator).mT
    w[3], w[4] = w[3] * 50, 0
    x, free = w + torch.randn(n, g, generator=generator) / 8, torch.randn(g, n, generator=generator).mT / 8
    m = torch.eye(g) + torch.randn(g, g, generator=generator).triu(1) / 16
    d, shares = torch.rand(g, generator=generator) + 0.1, torch.tensor([1.0, 0.8, 0.6])
    whole = torch.full((1, 1), 0.25) if fmt.tensor_scale else None
    moved = [part.to(device) for part in (w, x, m, d, free, shares)]

    # A column of larger tensors, as a group's is of its weight's.
    scale = torch.zeros(n, 3, dtype=fmt.scale.code_dtype, device=device)
    zero = None if fmt.zero is None else torch.zeros(n, 3, dtype=fmt.zero.code_dtype, device=device)
    scales = Scales(scale[:, 1:2], None if zero is None else zero[:, 1:2], None)
    targets, errors = torch.zeros(2 * g, n, device=device).mT, torch.zeros(n, 2 * g, device=device)
    on_device = None if whole is None else whole.to(device)
    round_group(*moved, on_device, fmt, mode, scales, targets[:, g:], errors[:, :g])

    candidates = choose_scales(w + free, fmt, shares, mode=mode, tensor_scale=whole)
    values = total_scale(candidates).squeeze(-1).to(device)
    zeros = torch.zeros_like(values) if candidates.zero is None else candidates.zero.squeeze(-1).float().to(device)
    wanted = round_columns(*moved[:4], values, zeros, fmt.element)
    best, rows = wanted[2].argmin(0).cpu(), torch.arange(n)
    assert torch.equal(targets[:, g:], wanted[0])
    assert torch.equal(errors[:, :g], wanted[1])
    assert torch.equal(scale[:, 1].cpu().float(), candidates.scale[best, rows, 0].float())
    assert not raw(scale)[:, 0].any()
    if zero is not None:
        assert torch.equal(zero[:, 1].cpu(), candidates.zero[best, rows, 0])
