"""MXFP8 by MXFP8 and NVFP4 by NVFP4 as Blackwell's library is called: against a stand-in that takes what it takes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import ScalingType, SwizzleType

import lowbit
from lowbit.activation import Activation
from lowbit.backends import Call, Description
from lowbit.blocked import from_blocked
from lowbit.format import Format
from lowbit.testing import check_backend
from lowbit_kernels_cuda import block_scaled, casts
from lowbit_kernels_cuda.backend import backend

KERNELS = {"cuda.linear_block_scaled", "cuda.scaled_mm_block_scaled"}


def numbers(codes, scales, recipes, orders):
    """Float64 of one side's codes (rows, K), K side by side, and its scales."""
    packed = codes.dtype == torch.float4_e2m1fn_x2
    assert packed or codes.dtype == torch.float8_e4m3fn
    assert codes.is_contiguous()
    rows, k = codes.shape[0], codes.shape[1] * (1 + packed)
    assert k % 32 == 0
    group = 16 if packed else 32
    assert recipes[0] == (ScalingType.BlockWise1x16 if packed else ScalingType.BlockWise1x32)
    assert orders[0] == SwizzleType.SWIZZLE_32_4_4
    down, along = -(-rows // 128), -(-k // group // 4)
    assert scales[0].is_contiguous()
    assert scales[0].numel() == down * along * 512
    assert scales[0].dtype == (torch.float8_e4m3fn if packed else torch.float8_e8m0fnu)
    by = from_blocked(scales[0].view(down, along, 32, 16), (rows, k // group)).double()
    if packed:
        assert (recipes[1:], orders[1:]) == ([ScalingType.TensorWise], [SwizzleType.NO_SWIZZLE])
        assert scales[1].dtype == torch.float32
        assert scales[1].numel() == 1
        by = by * scales[1].double()
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        both = torch.stack([codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4], -1).flatten(1).int()
        values = table[both & 7] * (1 - 2.0 * (both >> 3))
    else:
        values = codes.double()
    return values * by.repeat_interleave(group, 1)


def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, order_a, order_b, *, bias, output_dtype):
    """What torch's does on Blackwell, with its demands."""
    found = numbers(a, scale_a, recipe_a, order_a) @ numbers(b.T, scale_b, recipe_b, order_b).T
    assert found.shape[1] % 16 == 0
    if bias is not None:
        assert bias.dtype == output_dtype
        found += bias.double()
    return found.to(output_dtype)


@pytest.fixture(autouse=True)
def _on_blackwell(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (10, 0))
    # The cast has tests of its own, and takes long where Triton interprets it.
    monkeypatch.setattr(casts, "quantize_blocked", torch.ops.lowbit.quantize_blocked)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [("MXFP8", "dynamic:MXFP8"), ("NVFP4", "dynamic:NVFP4"), ("NVFP4", "local:NVFP4")],
)
def test_the_kernels_pass(weight, activation):
    rows = tuple(replace(row, device="cpu") for row in backend.kernels() if row.name in KERNELS)
    found = SimpleNamespace(name="cuda", probe=lambda: None, kernels=lambda: rows)
    report = check_backend(
        found,
        formats=(Format.parse(weight),),
        activations=(Activation.parse(activation),),
        dtypes=(torch.bfloat16,),
        shapes=((32, 128), (144, 160)),
        devices=("cpu",),
    )
    # Both sides of `scaled_mm` are rounded before, under no stored scale.
    wanted = {name for name in KERNELS if not (activation.startswith("local") and "scaled_mm" in name)}
    assert {row.kernel for row in report.rows if row.runs > row.calls > 0} == wanted


def test_a_tensor_scale_for_each_row_is_multiplied_in_on_both_sides():
    sides = [lowbit.quantize(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)), "NVFP4") for n in (5, 16)]
    wholes = [torch.rand(len(side), 1) + 0.5 for side in sides]
    given = [part for side, by in zip(sides, wholes, strict=True) for part in (side.qdata, side.scale, None, by)]
    found = block_scaled.scaled_mm(*given, None, "NVFP4", "NVFP4", 64, torch.float32)
    a, b = (
        side.dequantize(torch.float32).double() / side.tensor_scale.double() * by.double()
        for side, by in zip(sides, wholes, strict=True)
    )
    assert torch.allclose(found.double(), a @ b.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fmt", ["MXFP8", "NVFP4"])
def test_a_packed_weight_is_unpacked_to_the_bit(fmt):
    q = lowbit.quantize(torch.randn(48, 160), fmt, activation=f"dynamic:{fmt}")
    description = Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    found = block_scaled.unpack(block_scaled.pack(q), description)
    for name, part in q.inner_tensors().items():
        assert found[name].dtype == part.dtype
        assert torch.equal(found[name].view(torch.uint8), part.view(torch.uint8))


@pytest.mark.parametrize(
    ("weight", "activation", "n", "k", "capability", "reason"),
    [
        ("MXFP8", None, 32, 64, (10, 0), "needs MXFP8 by MXFP8, or NVFP4 by NVFP4; this is plain inputs by"),
        ("MXFP4", "dynamic:MXFP4", 32, 64, (10, 0), "needs MXFP8 by MXFP8, or NVFP4 by NVFP4"),
        ("MXFP8", "dynamic:MXFP8", 24, 64, (10, 0), "needs columns by the 32 and rows by the 16"),
        ("NVFP4", "dynamic:NVFP4", 32, 80, (10, 0), "needs columns by the 32 and rows by the 16"),
        ("MXFP8", "dynamic:MXFP8", 32, 64, (9, 0), "needs tensor cores that read scales of blocks, of compute"),
    ],
)
def test_what_it_does_not_take_is_refused_with_the_reason(monkeypatch, weight, activation, n, k, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    how = None if activation is None else Activation.parse(activation)
    call = Call("linear", Format.parse(weight), how, "cuda", torch.bfloat16, n, k)
    assert block_scaled.refuses(call).startswith(reason)
