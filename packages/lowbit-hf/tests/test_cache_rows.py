from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit import Format
from lowbit.errors import FormatError
from lowbit_hf.cache_rows import TENSOR_SCALE_ROOM, Rows

BATCH, HEADS, TOKENS, K = 2, 3, 17, 64
# Elements in ml_dtypes; their largest value, lowest exponent and bits of mantissa.
FLOATS = {"e4m3fn": (ml_dtypes.float8_e4m3fn, 448, -6, 3), "e2m1": (ml_dtypes.float4_e2m1fn, 6, 0, 1)}
SCALES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "e4m3fn": ml_dtypes.float8_e4m3fn}


def states(kind, dtype=torch.float32, seed=0, tokens=TOKENS):
    x = torch.randn(BATCH, HEADS, tokens, K, generator=torch.Generator().manual_seed(seed))
    if kind == "outliers":  # some channels of every token, and some tokens
        x[..., 5] *= 60
        x[:, :, 3] *= 1000
        x[:, 1, 4] = 0
    return x.to(dtype)


def written(fmt, *pieces):
    rows = Rows(Format.parse(fmt), pieces[0], 0)
    rows.move(0, 0, sum(piece.shape[2] for piece in pieces))
    at = 0
    for piece in pieces:
        if not at:
            rows.fix_tensor_scale(piece)
        for part, new in zip(rows.parts, rows.encode(piece), strict=True):
            part[:, :, at : at + piece.shape[2]] = new
        at += piece.shape[2]
    return rows


def numbers(part, dtype):
    """A part's bytes, read by ml_dtypes."""
    return (
        part.view(torch.uint8).numpy().view(dtype).astype(np.float64)
        if part.dtype == torch.uint8
        else part.double().numpy()
    )


def half_gap(magnitude, lowest, mantissa):
    """Half the distance of a float's neighbours, float64, at `magnitude` in units of its scale."""
    exponent = np.floor(np.log2(np.maximum(magnitude, 2.0**lowest)))
    return 2.0 ** (exponent - mantissa - 1)


@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", ["FP8_ROW", "e4m3fn:1x32:bfloat16", "NVFP4", "INT8_ROW", "int8:1x16:bfloat16"])
def test_codes_and_values(fmt, dtype, kind):
    """Bytes as ml_dtypes and numpy give them, and values within half a gap of the element, in float64."""
    parsed, x = Format.parse(fmt), states(kind, dtype)
    rows = written(fmt, x)
    given, found = x.double().numpy(), rows.decode(0, TOKENS).double().numpy()
    group = parsed.block[-1] or K
    blocks = given.reshape(BATCH, HEADS, TOKENS, K // group, group)
    amax = np.abs(blocks).max(-1)
    name = parsed.element.name
    top = FLOATS[name][1] if name in FLOATS else 127.5
    whole = 1.0
    if parsed.tensor_scale:
        largest = np.abs(given).max((2, 3))[..., None, None] / top
        whole = 2.0 ** np.ceil(np.log2(largest / 448)) * TENSOR_SCALE_ROOM
        assert np.array_equal(rows.tensor_scale.double().numpy(), whole)
    # Quotients and products in float32, one rounding each, as formats.md has them.
    scale = (amax.astype(np.float32) / np.float32(top) / np.float32(whole)).astype(np.float32)
    least = 2.0**-9 if parsed.tensor_scale else 0  # e4m3's smallest: no scale becomes 0
    scale = np.where(scale == 0, 1, np.maximum(scale, least)).astype(SCALES[parsed.scale.name])
    assert np.array_equal(numbers(rows.parts[1], SCALES[parsed.scale.name]), scale.astype(np.float64))
    step = scale.astype(np.float32) * np.float32(whole)
    quotient = blocks.astype(np.float32) / step[..., None]
    if name in FLOATS:
        element, _, lowest, mantissa = FLOATS[name]
        codes = np.clip(quotient, -top, top).astype(element)
        bound = half_gap(np.abs(quotient), lowest, mantissa)
    else:
        codes, bound = np.clip(np.round(quotient), -128, 127).astype(np.int8), 0.5
    unpacked = codes.view(np.uint8).reshape(given.shape)
    if name == "e2m1":
        unpacked = unpacked[..., ::2] | (unpacked[..., 1::2] << 4)
    assert np.array_equal(rows.parts[0].view(torch.uint8).numpy(), unpacked)
    # The largest of a group may be half a step beyond the last code, and a scale rounded down by half its gap, which
    # is 2^-4 of it at most while it is none of e4m3's subnormals.
    beyond = np.maximum(np.abs(quotient) - (top if name in FLOATS else 127), 0)
    assert beyond[scale >= 2.0**-6].max(initial=0) <= top * 2.0**-4
    wide = step.astype(np.float64)[..., None]
    last = 2.0**-8 * np.abs(given) if dtype == torch.bfloat16 else 0
    error = np.abs(found - given) - last - 1e-6 * np.abs(given)
    assert (error.reshape(blocks.shape) <= np.maximum(bound, beyond) * wide).all()


def test_what_is_not_finite_stays_in_its_row():
    x = states("normal")
    x[0, 1, 2, 7], x[1, 0, 3, 1] = torch.nan, torch.inf
    for fmt in ("FP8_ROW", "NVFP4"):
        found = written(fmt, x).decode(0, TOKENS)
        lost = found.isnan()
        assert lost[0, 1, 2, 7]
        assert lost[1, 0, 3, 1]
        assert lost.sum() == 2 * (Format.parse(fmt).block[-1] or K)
        assert (found[~lost] - x[~lost]).abs().max() <= x[~lost].abs().max() / 6


def test_later_tokens_under_the_first_tensor_scale():
    """A first write leaves room of 128, and small values keep the bits of their scale down to as much less."""
    first = states("normal", tokens=1)
    for factor, fits in ((100.0, True), (0.02, True), (2000.0, False)):
        later = states("normal", seed=1, tokens=4) * factor
        found = written("NVFP4", first, later).decode(1, 5)
        # Half of the largest gap, 2 of 6, and half a gap of the scale.
        within = later.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True) * (1 / 6 + 1 / 16)
        kept = ((found - later).unflatten(-1, (-1, 16)).abs() <= within).all()
        assert kept == fits


def test_zeros_first_leave_the_tensor_scale_alone():
    later = states("normal", tokens=4)
    found = written("NVFP4", torch.zeros_like(later), later).decode(4, 8)
    assert (found - later).norm() < 0.12 * later.norm()


@pytest.mark.parametrize(("fmt", "k"), [("FP8_1x128", 64), ("INT4_G32", 48), ("NVFP4", 40)])
def test_groups_that_do_not_divide_a_head(fmt, k):
    with pytest.raises(
        FormatError, match=f"heads have {k} channels, which groups of {Format.parse(fmt).block[-1]} do not divide"
    ):
        Rows(Format.parse(fmt), torch.zeros(1, 1, 1, k), 4)


def test_four_bit_codes_of_an_odd_head():
    x = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    rows = written("int4:1x*:float32", x)
    assert rows.parts[0].shape == (1, 2, 3, 3)
    step = x.abs().amax(-1, keepdim=True) / 7.5
    assert ((rows.decode(0, 3) - x).abs() <= step * 0.5001).all()
