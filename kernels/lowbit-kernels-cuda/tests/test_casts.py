"""The casts against the reference, bit for bit, and against ml_dtypes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit import FormatError
from lowbit.backends import Call
from lowbit.blocked import to_blocked
from lowbit.format import Format
from lowbit.numerics import ScaleMode, Scales, choose_scale, decode
from lowbit.reference import backend as reference
from lowbit.testing import check_backend, sample
from lowbit_kernels_cuda.backend import backend
from lowbit_kernels_cuda.casts import quantize, quantize_blocked, quantize_both, quantize_rotated
from lowbit_kernels_cuda.values import dequantize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUN = {kernel.op: kernel.run for kernel in reference.kernels() if kernel.pack is None}
FORMATS = (
    *("MXFP8", "MXFP8_E5M2", "MXFP6_E2M3", "MXFP6_E3M2", "MXFP4", "MXINT8", "NVFP4"),
    *("FP8_ROW", "FP8_1x128", "FP8_128x128", "FP8_TENSOR"),
    *("INT8_ROW", "INT8_ROW_ASYM", "INT8_TENSOR_ASYM", "INT4_G32", "UINT4_G128", "UINT2_G32"),
    *("int4:1x*:float32:zero=int4", "int5:1x*:float16", "int3:1x256:float16", "e3m2:1x16:e4m3fn"),
    *("e4m3fn:1x*:e8m0", "e5m2:*x*:e8m0", "e4m3fn:128x128:e8m0"),
    *("e2m1:16x16:e4m3fn:tensor", "int4:16x16:bfloat16:zero=int4", "int8:128x128:bfloat16"),
    "e2m1:128x128:e4m3fn:tensor",
)
PLAIN = (None, None, None)
# What casts and moves; other operators have tests of their own.
CASTS = {
    *("quantize", "quantize_blocked", "quantize_both", "quantize_rotated", "quantize_groups", "dequantize"),
    *("pad_groups", "unpad_groups"),
}
# The interpreter is slow: formats of every kind of scale, and on a GPU all.
QUICK = {"MXFP8", "MXFP6_E3M2", "NVFP4", "FP8_TENSOR", "FP8_128x128", "INT4_G32", "UINT4_G128", "e3m2:1x16:e4m3fn"}
QUICK |= {"e2m1:16x16:e4m3fn:tensor"}


def hard(shape, dtype, seed=0):
    """Rows of very different sizes, and blocks of zeros, subnormals, the largest numbers, an infinity and a NaN."""
    x = sample(shape, seed=seed)
    x[..., 0, :16] = 0
    if len(x.flatten()) > 2048:
        x[..., 1, :256] = 0
        x[..., 2, :] *= 2.0**-136
        x[..., 3, 5] = 1e30
        x = x.to(dtype)
        x[..., 4, 17] = torch.finfo(dtype).max
        x[..., 5, 1] = torch.inf
        x[..., 6, 2] = -torch.nan
        x[..., 7, 3] = torch.finfo(dtype).smallest_normal / 4
    return x.to(dtype)


def views(shape, dtype):
    """The same kind of values in every order that memory can have them."""
    yield "rows", hard(shape, dtype)
    yield "columns", hard((*shape[:-2], shape[-1], shape[-2]), dtype, 1).mT
    yield "neither", hard((*shape[:-1], 2 * shape[-1]), dtype, 2)[..., ::2]


def same(found, wanted):
    assert len(found) == len(wanted)
    for part, right in zip((each.cpu() for each in found), wanted, strict=True):
        assert (part.dtype, part.shape, part.is_contiguous()) == (right.dtype, right.shape, True)
        wide, right_wide = part.float(), right.float()
        unlike = (wide != right_wide) & ~(wide.isnan() & right_wide.isnan())
        assert not unlike.any(), f"{int(unlike.sum())} of {unlike.numel()}, the first at {unlike.nonzero()[0].tolist()}"
        # Of numbers, the sign of zero too.
        assert torch.equal(wide.signbit()[~wide.isnan()], right_wide.signbit()[~wide.isnan()])


def as_is(x, device):
    """A copy in the same strides, unlike that of `to`."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def on(device, arguments):
    return [part.to(device) if isinstance(part, torch.Tensor) else part for part in arguments]


@pytest.mark.parametrize(
    ("spec", "device"),
    [pytest.param(spec, "cpu", marks=() if spec in QUICK else pytest.mark.slow) for spec in FORMATS]
    + [pytest.param(spec, "cuda", marks=pytest.mark.gpu) for spec in FORMATS],
)
def test_every_format_has_the_references_bits_in_every_order_of_memory(spec, device):
    fmt = Format.parse(spec)
    k = 3 * max(fmt.block[-1], 32) if fmt.block[0] == 1 and fmt.block[-1] else 300
    for i, (_, given) in enumerate(views((2, 37, k) if spec == "NVFP4" else (37, k), torch.bfloat16)):
        x = given.to((torch.bfloat16, torch.float32, torch.float16)[i])
        for rounding in ("nearest", "stochastic") if i else ("nearest",):
            arguments = (x, *PLAIN, spec, "even", rounding, 2**40 + 5)
            wanted = RUN["quantize"](*arguments)
            same(quantize(as_is(x, device), *arguments[1:]), wanted)
        parts = (*wanted[:2], wanted[2] if fmt.zero else None, wanted[2] if fmt.tensor_scale else None)
        arguments = (*parts, spec, k, x.dtype)
        same([dequantize(*on(device, arguments))], [RUN["dequantize"](*arguments)])


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_may_stay_on_its_device(device):
    x, seed = hard((33, 96), torch.float32), 2**61 + 12345
    arguments = (x, *PLAIN, "NVFP4", "even", "stochastic")
    wanted = RUN["quantize"](*arguments, seed + 3)
    same(quantize(*on(device, (*arguments, 3, torch.tensor(seed)))), wanted)
    same(RUN["quantize"](*arguments, 3, torch.tensor(seed)), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", ["MXFP8", "MXFP4", "MXINT8"])
def test_every_scale_mode_has_the_references_bits(spec, device):
    x = hard((33, 96), torch.float32)
    for mode in get_args(ScaleMode):
        arguments = (x, *PLAIN, spec, mode, "nearest", 0)
        same(quantize(*on(device, arguments)), RUN["quantize"](*arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "spec", ["MXFP4", "NVFP4", "MXFP6_E2M3", "MXFP6_E3M2", "FP8_ROW", "FP8_1x128", "INT8_ROW", "INT4_G128"]
)
def test_every_mantissa_is_rounded_right_under_the_scale_of_every_other(spec, dtype, device):
    # Where quotients are computed with no more steps than their rounding needs, all there can be are tried.
    every = 1 if device == "cuda" else 1 << (7 if dtype == torch.float16 else 4)
    sizes = torch.arange(1, 2, torch.finfo(dtype).eps)[::every]
    smaller = torch.cat([size * 2.0**-e for e in range(-1, 11) for size in (sizes, -sizes)])
    fmt = Format.parse(spec)
    group = fmt.block[-1] or len(smaller) + 1
    blocks = torch.nn.functional.pad(smaller, (0, -len(smaller) % (group - 1))).view(-1, group - 1)
    x = torch.cat([torch.nn.functional.pad(blocks, (1, 0), value=4 * size) for size in sizes.tolist()])
    x = x.reshape(len(sizes), -1).to(dtype)
    whole = torch.tensor([[2.0**-3]]) if fmt.tensor_scale else None
    rest = (None, None, whole, spec, "rceil", "nearest", 0)
    wanted = RUN["quantize"](x, *rest)
    for view in (x, x.mT.contiguous().mT):
        same(quantize(*on(device, (as_is(view, device), *rest))), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_given_scales_are_used_and_come_back_as_copies(device):
    x = hard((40, 128), torch.bfloat16)
    for spec in ("NVFP4", "UINT4_G128", "INT8_ROW_ASYM", "FP8_128x128", "FP8_TENSOR"):
        fmt = Format.parse(spec)
        near = choose_scale(sample((40, 128)), fmt)
        whole = None if near.tensor_scale is None else near.tensor_scale * 2.0 ** (torch.arange(40) % 3).view(-1, 1)
        arguments = on(device, (x, near.scale, near.zero, whole, spec, "even", "nearest", 0))
        found = quantize(*arguments)
        same(found, RUN["quantize"](*on("cpu", arguments)))
        given = {part.data_ptr() for part in arguments if isinstance(part, torch.Tensor)}
        assert not given & {part.data_ptr() for part in found}


@pytest.mark.parametrize(
    ("rows", "columns", "device"), [(64, 256, "cpu"), pytest.param(32800, 65536, "cuda", marks=pytest.mark.gpu)]
)
def test_the_last_rows_of_a_matrix_are_found(rows, columns, device):
    # On a GPU beyond what 32 bits count.
    x = hard((8, columns), torch.bfloat16).to(device).repeat(rows // 8, 1)
    rest = (*PLAIN, "MXFP8", "even", "nearest", 0)
    for view in (x, x.mT):
        found = [part[-8:] for part in quantize(view, *rest)]
        same(found, RUN["quantize"](view[-8:].cpu().contiguous(), *rest))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_longer_than_a_tile_have_one_scale(device):
    arguments = (hard((8, 16389), torch.bfloat16), *PLAIN, "int4:1x*:float32:zero=int4", "even", "nearest", 0)
    same(quantize(*on(device, arguments)), RUN["quantize"](*arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", ["MXFP8", "NVFP4", "FP8_1x128"])
def test_tiles_of_scales_are_written_as_they_are_laid_out(spec, device):
    for _, x in views((2, 130, 128), torch.bfloat16):
        data, scale, *rest = RUN["quantize"](x, *PLAIN, spec, "even", "nearest", 0)
        found = quantize_blocked(as_is(x, device), None, spec, "even", "nearest", 0)
        same(found, [data, to_blocked(scale), *rest])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spec", "size"), [("NVFP4", 16), ("MXFP8", 32), ("MXFP4", 16), ("NVFP4", 32), ("INT8_ROW", 16)]
)
def test_channels_are_rotated_before_they_are_rounded(spec, size, device):
    for i, (_, x) in enumerate(views((2, 37, 96), torch.bfloat16)):
        rest = (size, 7, spec, "even", ("nearest", "stochastic", "nearest")[i], 3, i == 2)
        whole = torch.full((2, 1, 1), 0.0173) if spec == "NVFP4" and i else None
        found = quantize_rotated(as_is(x, device), None if whole is None else whole.to(device), *rest)
        same(found, RUN["quantize_rotated"](x, whole, *rest))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spec", "other"),
    [
        ("MXFP8", "MXFP8"),
        ("NVFP4", "MXFP6_E3M2"),
        ("FP8_1x128", "UINT4_G128"),
        ("MXFP4", "NVFP4"),
        ("NVFP4", "NVFP4"),
        ("MXFP8", "INT8_ROW"),
        ("FP8_TENSOR", "e5m2:*x*:e8m0"),
        ("INT8_TENSOR_ASYM", "INT8_TENSOR_ASYM"),
        ("FP8_TENSOR", "INT8_TENSOR_ASYM"),
    ],
)
def test_both_directions_are_those_of_quantize(spec, other, device):
    blocked = other != "UINT4_G128" and "TENSOR" not in spec
    for i, (_, x) in enumerate(views((128, 128) if blocked else (2, 128, 128), torch.bfloat16)):
        rounding = ("nearest", "stochastic", "nearest")[i]
        arguments = (x, None, spec, other, "even", rounding, 3, blocked)
        same(quantize_both(as_is(x, device), *arguments[1:]), RUN["quantize_both"](*arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spec", "dtype", "top"),
    [
        ("MXFP8", ml_dtypes.float8_e4m3fn, 8),
        ("MXFP8_E5M2", ml_dtypes.float8_e5m2, 15),
        ("MXFP4", ml_dtypes.float4_e2m1fn, 2),
        ("MXFP6_E2M3", ml_dtypes.float6_e2m3fn, 2),
        ("MXFP6_E3M2", ml_dtypes.float6_e3m2fn, 4),
    ],
)
def test_mx_codes_are_those_of_ml_dtypes(spec, dtype, top, device):
    x = sample((16, 128))
    data, scale = (part.cpu() for part in quantize(x.to(device), *PLAIN, spec, "floor", "nearest", 0))
    blocks = x.numpy().reshape(16, 4, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))) - top
    assert np.array_equal(scale.view(torch.uint8).numpy(), exponents + 127)
    limit = float(ml_dtypes.finfo(dtype).max)
    codes = np.clip(blocks / 2.0 ** exponents[..., None], -limit, limit).astype(np.float32).astype(dtype)
    bits = ml_dtypes.finfo(dtype).bits
    stream = np.unpackbits(codes.view(np.uint8).reshape(16, 128, 1), axis=-1, bitorder="little")[..., :bits]
    packed = np.packbits(stream.reshape(16, -1), axis=-1, bitorder="little")
    assert np.array_equal(data.view(torch.uint8).numpy(), packed)
    values = (codes.astype(np.float32) * 2.0 ** exponents[..., None]).reshape(16, 128)
    found = dequantize(data.to(device), scale.to(device), None, None, spec, 128, torch.float32)
    assert np.array_equal(found.cpu().numpy(), values)


@pytest.mark.slow
def test_the_interpreted_backend_passes():
    interpreted = SimpleNamespace(
        name="cuda",
        probe=lambda: None,
        kernels=lambda: tuple(replace(row, device="cpu") for row in backend.kernels() if row.op in CASTS),
    )
    report = check_backend(
        interpreted,
        formats=(Format.parse("NVFP4"),),
        activations=(),
        dtypes=(torch.bfloat16,),
        shapes=(),
        devices=("cpu",),
    )
    assert all(row.runs > row.calls > 0 for row in report.rows)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["NVFP4", "MXFP8", "INT8_ROW_ASYM", "INT4_G128", "FP8_128x128"])
def test_the_backend_passes(spec):
    report = check_backend(
        backend, formats=(Format.parse(spec),), activations=(), dtypes=(torch.bfloat16,), shapes=(), devices=("cuda",)
    )
    casts = {kernel.name for kernel in backend.kernels() if kernel.op in CASTS}
    assert all(row.runs > row.calls > 0 for row in report.rows if row.kernel in casts), report


def test_what_is_not_taken_is_refused_with_the_reason():
    (row,) = (row for row in backend.kernels() if row.op == "quantize")
    for spec in (
        "int4:4x16:bfloat16",
        "int1:1x24:float32",
        "e2m1:1x*:e4m3fn:tensor",
        "int8:1x*x*x*:float32",
        "int4:1x512:float16",
    ):
        reason = row.refuses(Call("quantize", Format.parse(spec), None, "cuda", torch.bfloat16, k=1536))
        assert reason == (
            "needs blocks of one row by 16, 32, 64, 128 or 256, of 16x16 or 128x128, or, without a tensor scale, whole "
            f"rows or whole matrices; this is {Format.parse(spec)}"
        )
    call = Call("quantize", Format.parse("MXFP8"), None, "cuda", torch.float64, k=64)
    assert row.refuses(call) == "needs values in float32, bfloat16 or float16; these are torch.float64"


def test_bad_arguments_are_refused_as_by_the_reference():
    x = torch.ones(4, 64)
    for bad in (
        (x, *PLAIN, "MXFP8", "up", "nearest", 0),
        (x, *PLAIN, "MXFP8", "even", "down", 0),
        (x, *PLAIN, "FP8_1x128", "even", "nearest", 0),
        (x, None, None, torch.ones(1, 1), "MXFP8", "even", "nearest", 0),
        (x, torch.ones(4, 2), None, None, "MXFP8", "even", "nearest", 0),
    ):
        for run in (quantize, RUN["quantize"]):
            with pytest.raises(FormatError):
                run(*bad)
    with pytest.raises(FormatError, match="needs two or more dimensions"):
        quantize_both(x[0], None, "MXFP8", "MXFP8", "even", "nearest", 0)
    data, scale = quantize(x, *PLAIN, "MXFP8", "even", "nearest", 0)
    with pytest.raises(FormatError, match="for k=32 in"):
        dequantize(data, scale, None, None, "MXFP8", 32, torch.float32)
    assert torch.equal(decode(data, Format.parse("MXFP8"), Scales(scale), 64), x)
