"""Convolutions with a quantized weight, against integer arithmetic written out in numpy."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit import FormatError, UnsupportedOpError, quantize
from lowbit.testing import FORMAT_GRID, sample, shapes

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

# (rank of the windows, shape of x, shape of the weight, how)
CALLS = {
    "1d": (1, (2, 4, 9), (6, 4, 3), {}),
    "1d same, even window": (1, (2, 4, 9), (6, 4, 4), {"padding": "same"}),
    "1d of one": (1, (4, 9), (6, 4, 3), {"padding": 2, "stride": 2}),
    "2d": (2, (2, 4, 7, 8), (6, 4, 3, 2), {"padding": (1, 2)}),
    "2d of one": (2, (4, 7, 8), (6, 4, 3, 3), {"padding": 1}),
    "2d stride": (2, (2, 4, 7, 8), (6, 4, 3, 3), {"padding": 1, "stride": (2, 3)}),
    "2d same, dilated": (2, (2, 4, 7, 8), (6, 4, 3, 3), {"padding": "same", "dilation": 2}),
    "2d same, even window": (2, (2, 4, 7, 8), (6, 4, 2, 4), {"padding": "same"}),
    "2d valid": (2, (2, 4, 7, 8), (6, 4, 3, 3), {"padding": "valid"}),
    "2d groups": (2, (2, 4, 7, 8), (6, 2, 3, 3), {"padding": 1, "groups": 2}),
    "2d depthwise": (2, (2, 4, 7, 8), (8, 1, 3, 3), {"padding": 2, "groups": 4}),
    "2d long sums": (2, (1, 300, 5, 5), (2, 300, 3, 3), {"padding": 1}),
}
each_call = pytest.mark.parametrize("call", list(CALLS))
# For every format of one scale a channel of the output: its spec, which a matrix gives no name.
CHANNEL = "int8:1x*x*x*:float32"


def convolve(x, w, *, stride=1, padding=0, dilation=1, groups=1):
    """The sums of a convolution in whatever numpy dtype x (N, C, ..) and w (O, C / groups, ..) have; pads with 0."""
    dims = w.ndim - 2
    stride, dilation = (n if isinstance(n, tuple) else (n,) * dims for n in (stride, dilation))
    reach = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
    if padding == "same":
        # What does not halve goes to the end.
        pads = [(r // 2, r - r // 2) for r in reach]
    else:
        each = 0 if padding == "valid" else padding
        pads = [(p, p) for p in (each if isinstance(each, tuple) else (each,) * dims)]
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    sizes = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    x = x.reshape(len(x), groups, -1, *x.shape[2:])
    w = w.reshape(groups, -1, *w.shape[1:])
    total = np.zeros((len(x), groups, w.shape[1], *sizes), x.dtype)
    for at in itertools.product(*(range(k) for k in w.shape[3:])):
        cut = [slice(i * d, i * d + s * (n - 1) + 1, s) for i, d, s, n in zip(at, dilation, stride, sizes, strict=True)]
        total += np.einsum("ngc...,goc->ngo...", x[(..., *cut)], w[(..., *at)])
    return total.reshape(len(x), -1, *sizes)


def rounded(x, scale, zero=None):
    """Int8 codes less their zero point, int64."""
    codes = np.rint(x / scale) + (0 if zero is None else zero)
    return np.clip(codes, -128, 127).astype(np.int64) - (0 if zero is None else zero)


def asymmetric(x):
    """Int8 scale and zero point for a range."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = high / np.float32(255) - low / np.float32(255)
    return scale, np.int64(np.clip(-128 - np.rint(low / scale), -128, 127))


def rows(w, find):
    """What `find` says of each channel of the output, in the shape of a scale."""
    found = [find(channel) for channel in w]
    return np.array(found).reshape(-1, *(1,) * (w.ndim - 1))


def operands(call):
    """X with an outlier, and shifted; a weight some of whose rows are far larger; a bias."""
    _, shape, weight, how = CALLS[call]
    x = sample(shape, seed=1) / 4 + 1
    x.view(-1)[5] = 90
    return x, sample(weight, seed=2), torch.linspace(-3, 3, weight[0]), how


def run(call, x, q, bias, how):
    return (functional.conv1d, functional.conv2d)[CALLS[call][0] - 1](x, q, bias, **how)


def with_static(q, scale, zero=None):
    zero = {} if zero is None else {"act_zero": torch.tensor([[zero]], dtype=torch.int8)}
    return q.with_inner({**q.inner_tensors(), "act_scale": torch.tensor([[scale]]), **zero})


def expected(call, sums, scale, bias):
    """Float32 of exact sums under their float64 scale (O, 1, ..)."""
    y = sums * np.float64(scale).reshape(-1, *(1,) * (sums.ndim - 2))
    y = torch.from_numpy((y + bias.double().numpy().reshape(-1, *(1,) * (sums.ndim - 2))).astype(np.float32))
    return y[0] if len(CALLS[call][1]) == CALLS[call][0] + 1 else y


def batched(call, x):
    return x.numpy() if len(CALLS[call][1]) > CALLS[call][0] + 1 else x[None].numpy()


def fmt_of(call, fmt):
    """The format with one scale for all of a channel's window, however many dims that has."""
    element, rest = fmt.split(":", 1)
    return f"{element}:1x{'x'.join('*' * (CALLS[call][0] + 1))}:{rest}"


@each_call
@pytest.mark.parametrize("scaling", ["static", "dynamic"])
def test_symmetric_integers_are_exact(call, scaling):
    x, w, bias, how = operands(call)
    plain = batched(call, x)
    scale = np.float32(0.02) if scaling == "static" else np.float32(np.abs(plain).max()) / np.float32(127.5)
    q = quantize(w, fmt_of(call, "int8:float32"), activation=f"{scaling}:INT8_TENSOR")
    q = with_static(q, float(scale)) if scaling == "static" else q
    w = w.numpy()
    w_scale = rows(w, lambda channel: np.abs(channel).max() / np.float32(127.5))
    sums = convolve(rounded(plain, scale), rounded(w, w_scale), **how)
    y = run(call, x, q, bias, how)
    assert torch.equal(y, expected(call, sums, np.float64(scale) * w_scale, bias))


@each_call
@pytest.mark.parametrize("scaling", ["static", "dynamic"])
def test_asymmetric_integers_are_exact_and_padding_is_zero(call, scaling):
    x, w, bias, how = operands(call)
    plain, w = batched(call, x), w.numpy() + np.float32(0.5)
    scale, zero = (np.float32(0.03), np.int64(-100)) if scaling == "static" else asymmetric(plain)
    q = quantize(torch.from_numpy(w), fmt_of(call, "int8:float32:zero=int8"), activation=f"{scaling}:INT8_TENSOR_ASYM")
    q = with_static(q, float(scale), int(zero)) if scaling == "static" else q
    w_scale, w_zero = (rows(w, lambda channel, i=i: asymmetric(channel)[i]) for i in (0, 1))
    assert zero
    assert w_zero.any()
    sums = convolve(rounded(plain, scale, zero), rounded(w, w_scale, w_zero), **how)
    y = run(call, x, q, bias, how)
    assert torch.equal(y, expected(call, sums, np.float64(scale) * w_scale, bias))


def test_a_constant_keeps_its_value_at_the_border():
    q = quantize(torch.ones(1, 1, 3, 3), CHANNEL, activation="static:INT8_TENSOR_ASYM")
    # Code 0 would stand for 0.5 * 28 = 14.
    y = functional.conv2d(torch.full((1, 1, 4, 4), 2.0), with_static(q, 0.5, -28), padding=1)
    one = float(q.dequantize()[0, 0, 0, 0])
    assert torch.equal(y[0, 0, 0], torch.tensor([4, 6, 6, 4]) * 2 * torch.tensor(one))


@each_call
def test_fp8(call):
    x, w, bias, how = operands(call)
    q = with_static(quantize(w, fmt_of(call, "e4m3fn:float32"), activation="static:FP8_TENSOR"), 0.1)
    plain, w, scale = batched(call, x), w.numpy(), np.float32(0.1)
    # The outlier saturates.
    assert plain.max() / scale > 448
    w_scale = rows(w, lambda channel: np.abs(channel).max() / np.float32(448))
    codes = [
        np.clip(v / s, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        for v, s in ((plain, scale), (w, w_scale))
    ]
    # Products of codes are whole multiples of 2^-18 below 2^18, so that float64 sums them exactly.
    wanted = expected(call, convolve(*codes, **how), np.float64(scale) * w_scale, bias)
    assert torch.equal(run(call, x, q, bias, how), wanted)


def test_groups_along_the_channels_of_the_input():
    x, w, bias = sample((2, 64, 5, 6)), sample((3, 64, 3, 3), seed=1), torch.tensor([1.0, -2.0, 3.0])
    q = with_static(quantize(w, "INT4_G32", axis=1, activation="static:INT8_TENSOR"), 0.05)
    groups = w.numpy().reshape(3, 2, 32, 3, 3)
    scale = (np.abs(groups).max(2, keepdims=True) / np.float32(7.5)).astype(ml_dtypes.bfloat16).astype(np.float32)
    # A code of 4 bits times a bfloat16 is exact in float32, and its product with a code of 8 bits in float64.
    values = (np.clip(np.rint(groups / scale), -8, 7) * scale).reshape(3, 64, 3, 3).astype(np.float64)
    sums = convolve(rounded(x.numpy(), np.float32(0.05)).astype(np.float64), values, padding=1)
    wanted = sums * np.float64(np.float32(0.05)) + bias.double().numpy()[:, None, None]
    y = functional.conv2d(x, q, bias, padding=1)
    # Float64 sums in another order: beyond the last rounding to float32 there is nothing to see.
    assert (np.abs(y.double().numpy() - wanted) <= 2.0**-24 * (1 + 2.0**-20) * np.abs(wanted) + 1e-9).all()


@pytest.mark.parametrize("fmt", ["int8:1x*x*x*:e4m3fn:tensor", "int8:1x*x*x*:e8m0", "NVFP4"])
def test_other_scales_are_multiplied_in_with_the_weight(fmt):
    x, w = sample((2, 32, 5, 6)), sample((3, 32, 3, 3), seed=1)
    q = with_static(quantize(w, fmt, axis=1, activation="static:INT8_TENSOR"), 0.05)
    # What a format decodes to is held to other oracles elsewhere.
    sums = convolve(rounded(x.numpy(), np.float32(0.05)).astype(np.float64), q.dequantize().double().numpy())
    wanted = torch.from_numpy(sums) * float(np.float32(0.05))
    # Each of 288 values of the weight was rounded to float32.
    bound = 2.0**-24 * (wanted.abs() + functional.conv2d(x.abs() + 0.05, q.dequantize().abs()).double())
    assert ((functional.conv2d(x, q).double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_alone_are_decoded_in_the_inputs_dtype(fmt, dtype):
    for shape in shapes(fmt):
        if len(shape) < 3:
            continue
        # Blocked along the windows' last dim, and along the channels of the input.
        for q in (quantize(sample(shape), fmt), quantize(sample(shape).movedim(-1, 1), fmt, axis=1)):
            convolution = functional.conv1d if len(shape) == 3 else functional.conv2d
            x = sample((2, q.shape[1], *(n + 1 for n in q.shape[2:])), seed=1, dtype=dtype)
            bias = sample((q.shape[0],), seed=2, dtype=dtype)
            assert torch.equal(convolution(x, q, bias), convolution(x, q.dequantize(dtype), bias))


WAYS = {
    "weight only": (CHANNEL, None),
    "dynamic": (CHANNEL, "dynamic:INT8_TENSOR_ASYM"),
    "fp8": ("MXFP8", "dynamic:FP8_TENSOR"),
    "e8m0": ("e4m3fn:1x*x*x*:e8m0", "dynamic:INT8_TENSOR"),
    "tensor scale": ("NVFP4", "dynamic:INT8_TENSOR"),
}


def made(way):
    """A weight (6, 32, 3, 3)."""
    fmt, activation = WAYS[way]
    return quantize(sample((6, 32, 3, 3)), fmt, axis=1, activation=activation)


@pytest.mark.parametrize("way", list(WAYS))
def test_gradients_pass_rounding_as_if_it_were_the_identity(way):
    q, found = made(way), []
    for weight in (q, q.dequantize()):
        x, bias = sample((2, 32, 5, 6), seed=1).requires_grad_(), torch.ones(6, requires_grad=True)
        y = functional.conv2d(x, weight, bias, padding="same", dilation=2)
        y.backward(sample(tuple(y.shape), seed=3))
        found.append((x.grad, bias.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("way", list(WAYS))
def test_no_mode_changes_a_bit(way):
    layer = nn.Conv2d(32, 6, 3, padding=1)
    layer.weight = nn.Parameter(made(way), requires_grad=False)
    x = sample((2, 32, 5, 6), seed=1)
    y = layer(x)
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    parts = (part.bfloat16() for part in (x, layer.weight, layer.bias))
    assert torch.equal(low, functional.conv2d(*parts, padding=1))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_padding_is_put_on_before(mode):
    layer = nn.Conv2d(32, 6, 3, padding=2, padding_mode=mode)
    layer.weight = nn.Parameter(made("dynamic"), requires_grad=False)
    x = sample((2, 32, 5, 6), seed=1)
    padded = functional.conv2d(functional.pad(x, (2, 2, 2, 2), mode=mode), layer.weight, layer.bias)
    assert torch.equal(layer(x), padded)


@pytest.mark.parametrize("way", list(WAYS))
def test_an_empty_batch(way):
    assert functional.conv2d(torch.zeros(0, 32, 5, 6), made(way), padding=1).shape == (0, 6, 5, 6)


REFUSED = {
    "rows": (lambda q, x: functional.conv2d(x, quantize(q.dequantize(), CHANNEL, activation="dynamic:INT8_ROW"))),
    "blocks": (lambda q, x: functional.conv2d(x, quantize(q.dequantize(), CHANNEL, activation="dynamic:MXFP8"))),
    "a tensor scale": (lambda q, x: functional.conv2d(x, quantize(q.dequantize(), CHANNEL, activation="local:NVFP4"))),
    "a quantized input": lambda q, x: functional.conv2d(quantize(x, CHANNEL), q),
    "a quantized input alone": lambda q, x: functional.conv2d(quantize(x, CHANNEL), q.dequantize()),
    "a transposed convolution": lambda q, x: functional.conv_transpose2d(x[:, :6], q),
    "three dimensions": lambda q, x: functional.conv3d(x[None], quantize(torch.ones(2, 2, 1, 1, 1), CHANNEL)),
    "smoothing": lambda q, x: functional.conv2d(x, q.with_inner({**q.inner_tensors(), "pre_scale": torch.ones(32)})),
}
WORDS = {
    "rows": "one scale a tensor .*, not as dynamic:int8:1x",
    "blocks": "one scale a tensor .*, not as dynamic:e4m3fn:1x32:e8m0",
    "a tensor scale": "one scale a tensor .*, not as local:e2m1:1x16",
    "a quantized input": "takes a QuantizedTensor as its weight and plain tensors elsewhere",
    "a quantized input alone": "takes a QuantizedTensor as its weight and plain tensors elsewhere",
    "a transposed convolution": "not transposed",
    "three dimensions": "not in three dimensions",
    "smoothing": "without a pre_scale",
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_has_no_meaning_is_refused_in_words(case):
    with pytest.raises(UnsupportedOpError, match=WORDS[case]):
        REFUSED[case](made("weight only"), sample((2, 32, 5, 6)))


def test_a_static_scale_that_was_never_found_is_told():
    q = quantize(sample((6, 32, 3, 3)), CHANNEL, activation="static:INT8_TENSOR")
    with pytest.raises(FormatError, match="needs a stored act_scale"):
        functional.conv2d(sample((2, 32, 5, 6)), q)
