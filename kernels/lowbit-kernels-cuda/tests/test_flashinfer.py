"""NVFP4 in pure Python: lowbit's casts give its bits, and what is asked of flashinfer means the same.

Where flashinfer runs there is no test: it needs a GPU of compute capability 10. Here its call is bound to a signature, that
of the installed package in the session `flashinfer`, and answered by the encoder.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from bisect import bisect_left
from fractions import Fraction
from importlib import import_module
from math import copysign
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

import lowbit
from lowbit import NVFP4, FormatError, NoKernelError, backends
from lowbit.backends import Call
from lowbit.conventions import to_global_scale
from lowbit.numerics import tensor_scale_for_amax
from lowbit.reference import backend as reference
from lowbit.testing import sample
from lowbit_kernels_cuda import casts
from lowbit_kernels_cuda import flashinfer as ours

SPEC = str(NVFP4)
RUN = {kernel.op: kernel.run for kernel in reference.kernels() if kernel.pack is None}
E2M1 = [Fraction(value) / 2 for value in (0, 1, 2, 3, 4, 6, 8, 12)]
E4M3 = [Fraction(float(value)) for value in np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)]


def nearest(values, x):
    """The code of the value that is nearest to x >= 0, of two the even one; the last for what is larger."""
    above = min(bisect_left(values, x), len(values) - 1)
    below = max(above - 1, 0)
    return min(below, above, key=lambda code: (abs(values[code] - x), code % 2))


def single(x):
    """The float32 nearest to a product or quotient of two, as a fraction; float64 on the way changes none."""
    return Fraction(float(np.float32(float(x))))


def encode(rows, t):
    """Codes and scales, by row, of finite values under a tensor scale: float32 after every step, as `numerics` says."""
    codes, scales = [], []
    for row in rows:
        codes.append([])
        scales.append([])
        for start in range(0, len(row), 16):
            block = [Fraction(x) for x in row[start : start + 16]]
            amax = max(map(abs, block))
            scale = max(nearest(E4M3, single(single(amax / 6) / t)), 1) if amax else E4M3.index(1)
            whole = single(E4M3[scale] * t)
            signs = [8 * (copysign(1, x) < 0) for x in row[start : start + 16]]
            codes[-1] += [sign + nearest(E2M1, single(abs(x) / whole)) for x, sign in zip(block, signs, strict=True)]
            scales[-1].append(scale)
    return codes, scales


def packed(codes):
    return torch.tensor([[a | b << 4 for a, b in zip(row[::2], row[1::2], strict=True)] for row in codes]).to(
        torch.uint8
    )


def tiled(scales):
    """Scales (r, c) in tiles of 128x4, padded with zeros, as bytes (128 * ceil(r / 128), 4 * ceil(c / 4))."""
    down, along = -(-len(scales) // 128), -(-len(scales[0]) // 4)
    tiles = torch.zeros(down * along * 512, dtype=torch.uint8)
    for r, row in enumerate(scales):
        for c, scale in enumerate(row):
            tiles[(r // 128 * along + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale
    return tiles.reshape(down * 128, along * 4)


def given(kind, dtype=torch.bfloat16):
    x = sample((130, 80), seed=3) if kind == "outliers" else torch.randn(130, 80, generator=torch.manual_seed(1))
    return x.to(dtype)


def tensor_scale(x, *, power=True):
    amax = x.abs().amax().float().reshape(1, 1)
    return tensor_scale_for_amax(amax, NVFP4) if power else amax / (448 * 6)


def same(found, wanted):
    assert [(part.dtype, part.shape) for part in found] == [(part.dtype, part.shape) for part in wanted]
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("cast", [RUN["quantize_blocked"], casts.quantize_blocked], ids=["reference", "triton"])
@pytest.mark.parametrize("power", [True, False], ids=["a power of two", "amax over 2688"])
@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_codes_and_scales_in_tiles_are_those_of_the_encoder(kind, power, cast):
    x = given(kind)
    t = tensor_scale(x, power=power)
    codes, scales = encode(x.tolist(), Fraction(t.item()))
    data, tiles, whole = cast(x, t, SPEC, "even", "nearest", 0)
    assert torch.equal(data, packed(codes))
    assert torch.equal(tiles.view(torch.uint8).flatten(), tiled(scales).flatten())
    assert torch.equal(whole, t)


def documented(
    a, a_global_sf, sfLayout=0, do_shuffle=False, sf_vec_size=16, *, backend="cuda", nvfp4_4over6="variables"
):
    """What the call needs of the signature that flashinfer's documentation has."""


@pytest.fixture(params=["documented", pytest.param("installed", marks=pytest.mark.flashinfer)])
def calls(request, monkeypatch):
    """The arguments of every call of `nvfp4_quantize`, bound to its signature and answered by the encoder."""
    made, installed = [], request.param == "installed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those that it and its dependencies have for each other
        module = import_module("flashinfer") if installed else None
    signature = inspect.signature(module.nvfp4_quantize if installed else documented)
    layouts = module.SfLayout if installed else SimpleNamespace(layout_128x4=0, layout_linear=2)

    def nvfp4_quantize(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        a, g, layout = (bound.arguments[name] for name in ("a", "a_global_sf", "sfLayout"))
        # It takes strides of 1 between rows for a transposed matrix.
        assert (a.dim(), a.stride(), g.dtype, g.shape) == (2, (a.shape[1], 1), torch.float32, (1,))
        codes, scales = encode(a.tolist(), 1 / Fraction(g.item()))
        made.append(bound.arguments)
        linear = torch.tensor(scales).to(torch.uint8)
        return packed(codes), tiled(scales) if layout == layouts.layout_128x4 else linear

    stand_in = SimpleNamespace(nvfp4_quantize=nvfp4_quantize, SfLayout=layouts)
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_flashinfer_is_asked_for_is_what_the_reference_gives(calls, dtype):
    x = given("outliers", dtype)
    t = tensor_scale(x)
    for values in (x, x.T.contiguous().T, x[3].unsqueeze(1).T):
        blocked, plain = (values, t, SPEC, "even", "nearest", 0), (values, None, None, t, SPEC, "even", "nearest", 0)
        same(ours.quantize_blocked(*blocked), RUN["quantize_blocked"](*blocked))
        same(ours.quantize(*plain), RUN["quantize"](*plain))
    assert len(calls) == 6
    for call in calls:
        assert torch.equal(call["a_global_sf"], to_global_scale(t))
        assert (call["do_shuffle"], call["sf_vec_size"], call["backend"], call["nvfp4_4over6"]) == (
            False,
            16,
            "cuda",
            None,
        )


def test_what_a_call_alone_shows_is_refused_in_words(calls):
    x, t = given("normal"), torch.ones(1, 1)
    for values, whole, mode, rounding, error, words in (
        (
            x.reshape(2, 65, 80),
            t.reshape(1, 1, 1),
            "even",
            "nearest",
            NoKernelError,
            r"one matrix .*this is \(2, 65, 80\)",
        ),
        (x[:0], t, "even", "nearest", NoKernelError, r"one matrix with values; this is \(0, 80\)"),
        (x, None, "even", "nearest", NoKernelError, r"a tensor scale of shape \(1, 1\); this is none; give one"),
        (x, t.expand(130, 1), "even", "nearest", NoKernelError, r"this is of shape \(130, 1\)"),
        (x, t, "odd", "nearest", FormatError, "scale mode 'odd' is unknown"),
        (x, t, "even", "stochastic", NoKernelError, "needs rounding 'nearest'; this is 'stochastic'"),
    ):
        with pytest.raises(error, match=words):
            ours.quantize_blocked(values, whole, SPEC, mode, rounding, 0)
    with pytest.raises(NoKernelError, match="chooses block scales, and some are given"):
        ours.quantize(x, torch.ones(130, 5).to(torch.float8_e4m3fn), None, t, SPEC, "even", "nearest", 0)
    assert calls == []


def test_a_machine_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch.cuda.is_available() is False here" in ours.backend.probe()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert ours.backend.probe() == "needs a GPU of compute capability 10.0 or later; this one has 9.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    pip = "needs flashinfer, which is not installed here: pip install 'lowbit-kernels-cuda[flashinfer]'"
    assert ours.backend.probe() == pip
    monkeypatch.setattr(ours, "find_spec", lambda name: name)
    assert ours.backend.probe() is None


def test_it_is_chosen_by_name_alone(monkeypatch):
    call = Call("quantize_blocked", NVFP4, None, "cuda", torch.bfloat16, None, 64)
    monkeypatch.setattr(ours.Flashinfer, "probe", lambda self: None)
    try:
        backends.forget()
        found = lowbit.select(call)
        assert not found.kernel.name.startswith("flashinfer")
        assert any(str(refusal).startswith("flashinfer.quantize_blocked: priority -1;") for refusal in found.refusals)
        assert lowbit.select(call, prefer=("flashinfer",)).kernel.name == "flashinfer.quantize_blocked"
        monkeypatch.setenv(backends.VARIABLE, "flashinfer,reference")
        backends.forget()
        assert lowbit.select(call).kernel.name == "flashinfer.quantize_blocked"
        wide = Call("quantize_blocked", NVFP4, None, "cuda", torch.float32, None, 64)
        assert lowbit.select(wide).kernel.name == "reference.quantize_blocked"
    finally:
        monkeypatch.undo()
        backends.forget()


@pytest.mark.parametrize(
    ("fmt", "dtype", "k", "words"),
    [
        ("MXFP4", torch.float32, 20, "needs values in bfloat16 or float16; these are torch.float32"),
        ("MXFP4", torch.float16, 20, "needs NVFP4; this is e2m1:1x32:e8m0"),
        ("NVFP4", torch.float16, 20, "needs rows of a multiple of 16 values; these have 20"),
    ],
)
def test_calls_are_refused_in_words(fmt, dtype, k, words):
    for kernel in ours.backend.kernels():
        call = Call(kernel.op, lowbit.FORMATS[fmt], None, "cuda", dtype, None, k)
        assert kernel.refuses(call) == words
