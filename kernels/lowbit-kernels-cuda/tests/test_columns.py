"""GPTQ's loop over columns against the same loop in float64."""

from __future__ import annotations

import pytest
import torch

import lowbit as lb
from lowbit.numerics import Scales, choose_scales, total_scale
from lowbit.testing import FORMAT_GRID
from lowbit_kernels_cuda.columns import round_columns, round_groups
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


def problem(experts, n, width, generator):
    """Columns and the factors of Hessians that they are rounded by; the weights of one row are large."""
    w = torch.randn(experts, width, n, generator=generator).mT
    w[:, 3] *= 50
    x = w + torch.randn(experts, n, width, generator=generator) / 8
    m = (torch.eye(width) + torch.randn(experts, width, width, generator=generator).triu(1) / 16).mT.contiguous().mT
    return w, x, m, torch.rand(experts, width, generator=generator) + 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda fmt: str(fmt).replace(":", " "))
@pytest.mark.parametrize(("experts", "n", "g"), [(1, 9, 32), (2, 5, 24)])
def test_columns_are_rounded_as_one_by_one_in_float64_under_the_best_candidate(fmt, experts, n, g, device):
    fmt, element = fmt.with_block(1, g), fmt.element
    w, x, m, d = problem(experts, n, g, torch.Generator().manual_seed(n))
    candidates = choose_scales(
        x, fmt, torch.tensor([1.0, 0.75, 0.5]), tensor_scale=torch.ones(experts, 1, 1) if fmt.tensor_scale else None
    )
    scales = total_scale(candidates).squeeze(-1)
    zeros = torch.zeros_like(scales) if candidates.zero is None else candidates.zero.squeeze(-1).float()
    given = [part.to(device) for part in (w, x, m, d, scales, zeros)]
    targets, errors, losses = (part.cpu().double() for part in round_columns(*given, element))

    # Sums of g products in float32, each of two numbers no larger than these.
    close = {"rtol": 0.0, "atol": g * 2.0**-23 * float(x.abs().max())}
    for e in range(experts):
        wanted = [one_by_one(w[e], x[e], m[e], d[e], scales[c, e], zeros[c, e], element) for c in range(3)]
        torch.testing.assert_close(losses[:, e], torch.stack([each[2] for each in wanted]), rtol=1e-4, atol=0.0)
        for row in range(n):
            # A target at a tie to within that may go either way, and all after it with it; there are none in these.
            best = int(losses[:, e, row].argmin())
            torch.testing.assert_close(targets[e, row], wanted[best][0][row], **close)
            torch.testing.assert_close(errors[e, row], wanted[best][1][row], **close)


# The interpreter is slow: a format of every kind of scale, and on a GPU all.
INTERPRETED = [lb.INT4_G32, lb.UINT2_G32, lb.MXFP4, lb.NVFP4]
GROUPED = [fmt for fmt in FORMAT_GRID if fmt.block[:-1] == (1,) and fmt.block[-1] > 1]
CASES = [("cpu", fmt) for fmt in INTERPRETED]
CASES += [pytest.param("cuda", fmt, marks=pytest.mark.gpu) for fmt in GROUPED]


@pytest.mark.parametrize(("device", "fmt"), CASES, ids=lambda part: str(part).replace(":", " "))
@pytest.mark.parametrize(("mode", "shares"), [("even", (1.0, 0.8, 0.6)), ("ceil", (1.0,))])
def test_groups_get_the_scales_of_least_loss_that_numerics_offers(fmt, mode, shares, device):
    experts, n, g = 2, (9 if device == "cpu" else 1037), fmt.block[-1]
    w, x, m, d = problem(experts, n, 2 * g, torch.Generator().manual_seed(g))
    w[:, 4] = x[:, 4] = 0
    parts, shares = (slice(0, g), slice(g, 2 * g)), torch.tensor(shares)
    whole = torch.tensor([0.25, 0.5]).view(2, 1, 1) if fmt.tensor_scale else None
    inverses = torch.stack([torch.linalg.inv(m[:, part, part].double()).float() for part in parts], 1)
    moved = [part.to(device) for part in (w, x, m, d, inverses, shares)]

    # Parts of larger tensors, as a block's are of its weight's.
    scale = torch.zeros(experts, n, 4, dtype=fmt.scale.code_dtype, device=device)
    zero = None if fmt.zero is None else torch.zeros(experts, n, 4, dtype=fmt.zero.code_dtype, device=device)
    scales = Scales(scale[..., 1:3], None if zero is None else zero[..., 1:3], None)
    targets, errors = (torch.zeros(experts, 3 * g, n, device=device).mT for _ in range(2))
    moved[1] = moved[1].clone()
    on_device = None if whole is None else whole.to(device)
    round_groups(*moved, on_device, fmt, mode, scales, targets[..., g:], errors[..., : 2 * g])
    assert not raw(scale)[..., ::3].any()
    assert not targets[..., :g].any()

    targets, errors = targets[..., g:].cpu().double(), errors[..., : 2 * g].cpu().double()
    zeros = torch.zeros(experts, n, 2) if scales.zero is None else scales.zero.cpu().float()
    found = total_scale(Scales(scales.scale.cpu(), None, whole))
    close = 2 * g * 2.0**-23 * float(x.abs().max())
    for at, part in enumerate(parts):
        # The second group sees what the first one erred by.
        now = x[..., part] + errors[..., : at * g] @ m[:, : at * g, part].double()
        fitted = w[..., part] + (now - w[..., part]) @ torch.linalg.inv(m[:, part, part].double())
        offered = choose_scales(fitted.float(), fmt, shares, mode=mode, tensor_scale=whole)
        several = total_scale(offered)[..., 0]
        points = torch.zeros_like(several) if offered.zero is None else offered.zero[..., 0].float()
        for e in range(experts):
            given = w[e, :, part], now[e], m[e, part, part], d[e, part]
            losses = [one_by_one(*given, several[c, e], points[c, e], fmt.element)[2] for c in range(len(shares))]
            wanted = one_by_one(*given, found[e, :, at], zeros[e, :, at], fmt.element)
            # A target at a tie may go either way, and all after it with it, a loss too: in a row of hundreds.
            least = wanted[2] <= torch.stack(losses).amin(0) * (1 + 1e-4) + 1e-30
            assert float(least.double().mean()) > 0.99
            beside = (several[:, e] / found[e, :, at] - 1).abs().amin(0)
            # What is in the middle of two scales may get either.
            assert float((beside < 1e-5).double().mean()) > 0.99
            assert float(beside.max()) < max(1.01 * 2.0**-fmt.scale.mantissa, 1e-5)
            off = torch.maximum((targets[e, :, part] - wanted[0]).abs(), (errors[e, :, part] - wanted[1]).abs())
            assert float((off.amax(1) <= close).double().mean()) > 0.99
