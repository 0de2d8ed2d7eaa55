"""The step of AdamW on a GPU, which reads and writes tensors by a table, against the step in torch."""

from __future__ import annotations

import copy

import pytest
import torch

from lowbit_kernels_cuda.adamw import adamw
from lowbit_moe.states import BLOCKS, Item, decode, encode, step_in_torch, tables, values

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(3, 512), (2, 264), (5, 77), (1, 3000)]


def items(shapes, bits, dtype, device, *, seed=0):
    """Parameters with states of other steps, one of them with numbers far apart."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, shape in enumerate(shapes):
        p, g, m = (torch.randn(shape, generator=generator) for _ in range(3))
        v = torch.rand(shape, generator=generator) ** 2
        g[0, ::7] *= 1e3
        g[-1, 1::5] = 0
        m, v = 1e-2 * m, 1e-4 * v
        parts = [(m, None), (v, None)] if bits == 32 else [encode(m, bits, signed=True), encode(v, bits, signed=False)]
        on = [None if part is None else part.to(device) for pair in parts for part in pair]
        step = torch.tensor(5.0 + i, device=device)
        found.append(Item((p / 50).to(dtype).to(device), g.to(dtype).to(device), step, *on, i))
    return found


def means(item, bits):
    """Both means as numbers."""
    if bits == 32:
        return item.mean.cpu(), item.square.cpu()
    columns = item.parameter.shape[1]
    return (
        decode(item.mean, item.mean_scale, columns, bits, signed=True).cpu(),
        decode(item.square, item.square_scale, columns, bits, signed=False).cpu(),
    )


OPTIONS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": False, "seed": 3}


# Triton's interpreter cuts bfloat16s off.
@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        *((dtype, "cpu") for dtype in (torch.float32, torch.float16)),
        *(pytest.param(dtype, "cuda", marks=pytest.mark.gpu) for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4, 32])
def test_a_step_of_the_kernel_is_the_step_in_torch(bits, dtype, device):
    mine = items(SHAPES, bits, dtype, device)
    wanted = copy.deepcopy(mine)
    kept = {}
    for _ in range(2):
        adamw(kept, mine, **OPTIONS, bits=bits, block=BLOCKS[bits], values=tables(bits), stochastic=False)
        step_in_torch(wanted, **OPTIONS, bits=bits, stochastic=False)
    for item, right in zip(mine, wanted, strict=True):
        # Products and sums may be fused in other ways: a few units in the last place of float32, which is where a code
        # or a short float may turn to its neighbour, about once in 2^16 numbers; at most two here.
        tolerance = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(item.parameter.float(), right.parameter.float(), rtol=tolerance, atol=1e-6)
        assert dtype == torch.float32 or int((item.parameter != right.parameter).sum()) <= 2
        for found, exact in zip(means(item, bits), means(right, bits), strict=True):
            off = (found - exact).abs() > 1e-5 * exact.abs().amax()
            assert int(off.sum()) <= (0 if bits == 32 else 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_level_is_read_and_written_as_it_is(bits, device):
    """With a gradient of what the mean is, the mean stays, and with betas of 1 nearly, both do."""
    m, v = (table.repeat(2)[None, :] for table in (values(bits, signed=signed) for signed in (True, False)))
    # The code of -1 is never used.
    m = torch.where(m == -1, 0, m)
    columns = min(m.shape[1], v.shape[1])
    m, v = m[:, :columns].contiguous(), v[:, :columns].contiguous()
    block = BLOCKS[bits]
    pad = -columns % block
    m, v = (torch.nn.functional.pad(x, (0, pad)) for x in (m, v))
    parts = [part.to(device) for pair in (encode(m, bits, signed=True), encode(v, bits, signed=False)) for part in pair]
    zero = torch.zeros(m.shape, device=device)
    item = Item(zero.clone(), zero, torch.tensor(1.0, device=device), *parts, 0)
    before = [part.clone() for part in parts]
    options = OPTIONS | {"betas": (1 - 2**-40, 1 - 2**-40)}
    adamw({}, [item], **options, bits=bits, block=block, values=tables(bits), stochastic=False)
    codes, scales = (item.mean, item.square), (item.mean_scale, item.square_scale)
    assert all(map(torch.equal, codes, before[::2]))
    # The highest level times its inverse: two roundings.
    assert all(torch.allclose(part, was, rtol=2**-22, atol=0) for part, was in zip(scales, before[1::2], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_parameters_are_rounded_to_a_neighbour_and_right_on_average(device):
    p = torch.full((8, 4096), 1.0, dtype=torch.bfloat16, device=device)
    p[0, :2] = torch.tensor([torch.inf, torch.nan])
    g = torch.ones_like(p)
    state = [torch.zeros(p.shape, device=device) for _ in range(2)]
    item = Item(p, g, torch.tensor(1.0, device=device), state[0], None, state[1], None, 0)
    options = OPTIONS | {"lr": 2**-10, "weight_decay": 0.0}
    adamw({}, [item], **options, bits=32, block=256, values=tables(32), stochastic=True)
    # 1 - 2^-10 lies a quarter of the way from 1 to the bfloat16 below, 1 - 2^-8.
    finite = p[1:].float()
    assert set(finite.flatten().tolist()) == {1.0, 1 - 2**-8}
    share = float((finite != 1).float().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / finite.numel()) ** 0.5
    assert torch.isinf(p[0, 0])
    assert torch.isnan(p[0, 1])
    # Another step, and another parameter, draw otherwise.
    again = torch.ones_like(p)
    for step, number in ((2.0, 0), (1.0, 1)):
        other = again.clone()
        for part in state:
            part.zero_()
        item = Item(other, g, torch.tensor(step, device=device), state[0], None, state[1], None, number)
        adamw({}, [item], **options, bits=32, block=256, values=tables(32), stochastic=True)
        assert not torch.equal(other[1:], p[1:])
