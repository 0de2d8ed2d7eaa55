"""Products of tokens with packed experts, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import lowbit
from lowbit.backends import Description
from lowbit.testing import product_bound
from lowbit_kernels_cuda.packed import pack, run_grouped, unpack

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPECS = ("INT4_G128", "UINT4_G128", "INT8_ROW_ASYM", "FP8_ROW", "FP8_128x128", "MXFP8", "MXFP4", "NVFP4")


def experts(spec, e, n, k, *, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(e + n + k)
    values = torch.randn(e, n, k, generator=generator) / k**0.5
    # Experts unlike each other, so that one in the place of another shows.
    values *= 2.0 ** torch.arange(e).view(-1, 1, 1)
    values[:, :, ::97] *= 30
    return lowbit.quantize(values.to(device, dtype), spec)


def packed(q):
    return pack(q), Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))


def tokens(m, k, *, dtype=torch.bfloat16, device="cpu"):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    x[:, 5::61] *= 30
    return x.to(device, dtype)


def within(y, x, q, ends):
    """Whether `y` is each expert's product in float64, but for what `test_linear.within` allows; zeros beyond."""
    eps, start = torch.finfo(x.dtype).eps, 0
    values = q.dequantize(torch.float32)
    for e, end in enumerate(ends):
        rows, weight = x[start:end], values[e]
        size = rows.double().abs() @ weight.double().abs().T
        wanted = rows.double() @ weight.double().T
        error = product_bound(rows.float(), weight) + (eps / 2 + 4 * 2.0**-24) * size
        error = error + eps / 2 * (wanted.abs() + error)
        if not bool(((y[start:end].double() - wanted).abs() <= error).all()):
            return False
        start = end
    return bool((y[start:] == 0).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS)
def test_each_token_meets_its_experts_matrix(spec, device):
    # Experts without tokens, first, between and last; blocks that end within an expert; tokens that are nobody's.
    sizes = [((0, 5, 0, 17, 0), 2), ((0, 0, 0, 0, 0), 3), ((1, 1, 1, 1, 1), 0)]
    shapes = [(40, 256)]
    if device == "cuda":
        sizes += [((200, 0, 3, 64, 90), 7), ((16, 700, 300, 0, 1), 0), ((1000, 1000, 1000, 1000, 1000), 0)]
        shapes += [(1040, 1152), (256, 2048)]
    for n, k in shapes:
        q = experts(spec, 5, n, k, device=device)
        parts, description = packed(q)
        for counts, beyond in sizes:
            ends = torch.tensor(counts).cumsum(0)
            x = tokens(int(ends[-1]) + beyond, k, device=device)
            y = run_grouped(x, parts, description, ends.to(device, torch.int32))
            assert within(y, x, q, ends.tolist()), (n, k, counts)


@pytest.mark.parametrize("device", DEVICES)
def test_however_many_tokens_each_expert_has(device):
    """Ways to share tokens out, few and many to an expert; on a CPU, where each takes a second, a few of them."""
    generator = torch.Generator().manual_seed(0)
    q = experts("MXFP4", 6, 16, 64, device=device)
    parts, description = packed(q)
    for trial in range(4 if device == "cpu" else 200):
        counts = torch.randint(0, (2, 8, 40, 150)[trial % 4], (6,), generator=generator)
        ends = (counts * (torch.rand(6, generator=generator) < 0.7)).cumsum(0)
        x = tokens(int(ends[-1]) + trial % 3, 64, device=device)
        assert within(run_grouped(x, parts, description, ends.to(device, torch.int32)), x, q, ends.tolist()), ends


@pytest.mark.parametrize("spec", SPECS)
def test_packing_is_undone(spec):
    for q in (experts(spec, 3, 24, 256), experts(spec, 2, 128, 128).mT):
        parts, description = packed(q)
        back = unpack(parts, description)
        for name, part in q.inner_tensors().items():
            assert back[name].dtype == part.dtype
            assert torch.equal(back[name].contiguous().view(torch.uint8), part.contiguous().view(torch.uint8))


def test_scales_that_rows_share_are_each_experts():
    """A tensor scale a row, one for all experts, and one an expert."""
    q = experts("NVFP4", 3, 32, 64)
    x, ends = tokens(9, 64), torch.tensor([2, 5, 9], dtype=torch.int32)
    for shape in ((3, 1, 1), (1, 1, 1), (3, 32, 1), (1, 32, 1)):
        factor = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
        changed = q.with_inner(q.inner_tensors() | {"tensor_scale": factor})
        parts, description = packed(changed)
        assert within(run_grouped(x, parts, description, ends), x, changed, ends.tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["INT4_G128", "NVFP4"])
def test_bound_experts_compile_and_a_graph_follows_what_the_router_says(spec):
    module = nn.Module()
    q = experts(spec, 8, 512, 1024, device="cuda")
    module.weight = nn.Parameter(q, requires_grad=False)
    assert [row.kernel for row in lowbit.bind(module).rows] == ["cuda.grouped_mm"]

    def run(x, offs):
        return functional.grouped_mm(x, module.weight.transpose(-2, -1), offs=offs)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    some = [(0, 3, 3, 10, 20, 20, 30, 31), (1, 2, 3, 4, 5, 6, 7, 31), (0, 0, 0, 0, 0, 0, 0, 29)]
    with torch.no_grad():
        for m in (31, 400):
            x, ends = tokens(m, 1024, device="cuda"), torch.zeros(8, dtype=torch.int32, device="cuda")
            for _ in range(2):
                run(x, ends)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run(x, ends)
            for one in some:
                ends.copy_(torch.tensor(one))
                graph.replay()
                assert within(captured, x, q, one)
                assert torch.equal(captured, run(x, ends))
                assert torch.equal(captured, compiled(x, ends))
