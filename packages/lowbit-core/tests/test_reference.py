"""The reference's products against float64 oracles made from codes, scales and zero points."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit import Activation, FormatError, bind, quantize, reference, unbind
from lowbit.format import Format
from lowbit.numerics import choose_scale, encode
from lowbit.packing import unpack
from lowbit.testing import product_bound, sample

pytestmark = pytest.mark.usefixtures("through")
through_modules = pytest.mark.parametrize("through", ["reference", "loopback", "packed loopback"], indirect=True)
K = 4096
OFFSETS = [0.0, 4.0, 20.0]
ACTIVATIONS = {
    "per token": "dynamic:INT8_ROW_ASYM",
    "per tensor": "dynamic:INT8_TENSOR_ASYM",
    "static": "static:INT8_TENSOR_ASYM",
    "symmetric": "dynamic:INT8_ROW",
    "uint8 per token": "dynamic:uint8:1x*:float32:zero=uint8",
    "uint8 static": "static:uint8:*x*:float32:zero=uint8",
    "int4 per token": "dynamic:int4:1x*:float32:zero=int4",
}
WEIGHTS = [
    "INT8_ROW",
    "INT8_ROW_ASYM",
    "INT8_TENSOR_ASYM",
    "uint8:1x*:float32:zero=uint8",
    "int4:1x*:float32",
    "int4:1x*:float32:zero=int4",
]


def prepare(weight, activation, x):
    """A weight and the codes, scales and zero points (float64, or 0) that the activation must come to on `x`."""
    q = quantize(sample((12, K), seed=3), weight, activation=activation)
    parsed = Activation.parse(activation)
    scales = choose_scale(x, parsed.format)
    if parsed.scaling == "static":
        q = q.with_inner(
            {**q.inner_tensors(), "act_scale": scales.scale.reshape(()), "act_zero": scales.zero.reshape(())}
        )
    return q, parsed.format, scales


def integers(data, fmt, scales, k):
    codes = unpack(data, fmt.element, k).to(torch.int64)
    zero = torch.zeros_like(scales.scale, dtype=torch.int64) if scales.zero is None else scales.zero.to(torch.int64)
    return codes - zero, scales.scale.to(torch.float64)


def layer(weight, bias):
    """A linear layer with this very weight and bias."""
    module = nn.Linear(*weight.shape[::-1])
    module.weight, module.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias)
    return module


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@through_modules
def test_integer_products_round_once(weight, activation, through):
    for offset, dtype in product(OFFSETS, (torch.float32, torch.bfloat16)):
        x = (sample((5, K), seed=1) + offset).to(dtype)
        bias = sample((12,), seed=2, dtype=dtype)
        q, fmt, scales = prepare(weight, ACTIVATIONS[activation], x)
        a, a_scale = integers(encode(x, fmt, scales), fmt, scales, K)
        b, b_scale = integers(q.qdata, q.format, q.scales, K)
        # Exact in int64; float64 then holds integer and scales to 2^-52, far below the result's own rounding.
        exact = (a @ b.T).to(torch.float64) * a_scale * b_scale.T + bias.to(torch.float64)
        half = torch.finfo(dtype).eps / 2
        found = through(layer(q, bias))(x)
        assert found.dtype == dtype
        slack = 2.0**-50 * ((a @ b.T).abs() * a_scale * b_scale.T + bias.abs())
        error = (found.to(torch.float64) - exact).abs()
        assert (error <= half * (1 + 2.0**-10) * exact.abs() + slack).all(), (offset, dtype)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_zero_points_of_weights_count(weight):
    x = sample((5, K)) + 4
    for activation in (None, "dynamic:INT8_ROW_ASYM", "dynamic:INT8_ROW"):
        q = quantize(sample((12, K), seed=3) + 10, weight, activation=activation)
        wanted = x.to(torch.float64) @ q.dequantize(torch.float64).T
        error = (functional.linear(x, q).to(torch.float64) - wanted).abs()
        assert error.max() <= 0.02 * wanted.abs().max()


def test_the_largest_sums_are_exact():
    k = 2**17
    codes = torch.full((1, k), 255.0)
    q = quantize(codes, "uint8:1x*:float32:zero=uint8", torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    a = reference.Matrix(q.qdata, q.scales, q.format, k)
    assert reference.multiply(a, a, None, torch.float64).item() == 255 * 255 * k


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("through", ["reference"], indirect=True)
def test_row_sums_are_computed_once_and_change_nothing(weight, monkeypatch):
    module = layer(quantize(sample((12, K), seed=3), weight, activation="dynamic:INT8_ROW_ASYM"), sample((12,), seed=2))
    before = module.weight.clone()
    counted = []
    summing = reference.Matrix.row_sum
    monkeypatch.setattr(
        reference.Matrix, "row_sum", lambda self: counted.append(self._row_sum is None and self.k) or summing(self)
    )
    inputs = [sample((m, K), seed=m) + 4 for m in (1, 3, 5)]
    with torch.no_grad():
        plain = [module(x) for x in inputs]
        sums = sum(1 for k in counted if k)
        assert sums >= len(inputs)
        counted.clear()
        row = bind(module).rows[0]
        assert (row.kernel, row.packed) == ("reference.linear_row_sums", True)
        assert [k for k in counted if k] == [K]
        counted.clear()
        for x, wanted in zip(inputs, plain, strict=True):
            assert torch.equal(module(x), wanted)
        # What is left to sum are the tokens, where the weight has zero points.
        assert len([k for k in counted if k]) == (len(inputs) if before.zero is not None else 0)
    unbind(module)
    for name, part in before.inner_tensors().items():
        assert torch.equal(getattr(module.weight, name), part)


FLOATS = [
    ("MXFP8", "dynamic:MXFP8"),
    ("MXFP8_E5M2", "dynamic:MXFP8"),
    ("MXFP6_E2M3", "dynamic:MXFP6_E2M3"),
    ("MXFP6_E3M2", "dynamic:MXFP8"),
    ("MXFP4", "dynamic:MXFP4"),
    ("MXFP4", "dynamic:MXFP8"),
    ("MXINT8", "dynamic:MXINT8"),
    ("NVFP4", "dynamic:NVFP4"),
    ("NVFP4", "local:NVFP4"),
    ("FP8_ROW", "dynamic:FP8_ROW"),
    ("FP8_TENSOR", "dynamic:FP8_TENSOR"),
    ("FP8_TENSOR", "static:FP8_TENSOR"),
    ("FP8_128x128", "dynamic:FP8_1x128"),
    ("INT4_G128", "dynamic:FP8_ROW"),
    ("INT4_G128", "dynamic:INT8_ROW"),
    ("UINT4_G128", "dynamic:INT8_ROW_ASYM"),
    ("int4:4x16:bfloat16", "dynamic:int8:1x16:float16"),
    ("int8:5x*:float32", "dynamic:INT8_ROW"),
]


@pytest.mark.parametrize(("weight", "activation"), FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smooth", [False, True])
@through_modules
def test_other_products_err_by_float32_accumulation_alone(weight, activation, dtype, smooth, through):
    k, parsed = 256, Activation.parse(activation)
    x, bias = sample((5, k), seed=1, dtype=dtype), sample((12,), seed=2, dtype=dtype)
    q = quantize(sample((12, k), seed=3), weight, activation=activation)
    extra = {}
    if smooth:
        extra["pre_scale"] = torch.linspace(0.5, 2, k)
    seen = x * extra["pre_scale"].to(dtype) if smooth else x
    if parsed.scaling == "static":
        # A stored scale that is not what the input would choose: half of it saturates.
        extra["act_scale"] = choose_scale(seen, parsed.format).scale.reshape(()) / 2
        tokens = quantize(seen, parsed.format, extra["act_scale"].reshape(1, 1))
    elif parsed.scaling == "local":
        extra["act_scale"] = torch.tensor(0.03125)
        tokens = quantize(seen, parsed.format, tensor_scale=extra["act_scale"])
    else:
        tokens = quantize(seen, parsed.format)
    q = q.with_inner({**q.inner_tensors(), **extra})
    a, b = tokens.dequantize(torch.float32), q.dequantize(torch.float32)
    exact = a.to(torch.float64) @ b.to(torch.float64).T + bias.to(torch.float64)
    found = through(layer(q, bias))(x)
    eps = torch.finfo(dtype).eps
    # One float32 rounding more for the bias, and the last one.
    bound = product_bound(a, b) + (eps + 2.0**-23) * (exact.abs() + product_bound(a, b))
    assert found.dtype == dtype
    assert ((found.to(torch.float64) - exact).abs() <= bound).all()


def test_a_scaled_mm_of_two_quantized_matrices_is_that_of_linear():
    for weight, activation in (("INT8_ROW_ASYM", "INT8_ROW_ASYM"), ("NVFP4", "NVFP4"), ("MXFP4", "MXFP8")):
        x, bias = sample((5, 256), seed=1), sample((12,), seed=2)
        q = quantize(sample((12, 256), seed=3), weight, activation=f"dynamic:{activation}")
        tokens = quantize(x, activation)
        both = [part for t in (tokens, q) for part in (t.qdata, t.scale, t.zero, t.tensor_scale)]
        found = torch.ops.lowbit.scaled_mm(*both, bias, str(tokens.format), str(q.format), 256, torch.float32)
        assert torch.equal(found, functional.linear(x, q, bias))


def test_every_leading_shape_is_served():
    q = quantize(sample((12, 256)), "MXFP8", activation="dynamic:MXFP8")
    x = sample((2, 3, 256), seed=1)
    flat = functional.linear(x.reshape(6, 256), q)
    assert torch.equal(functional.linear(x, q), flat.view(2, 3, 12))
    assert torch.equal(functional.linear(x[0, 0], q), flat[0])
    for activation in ("dynamic:MXFP8", "static:FP8_TENSOR", "dynamic:NVFP4"):
        q = quantize(sample((12, 256)), "MXFP8", activation=activation)
        for lead in ((0,), (0, 3), (2, 0)):
            assert functional.linear(x.new_empty(*lead, 256), q).shape == (*lead, 12)


def test_missing_static_parameters_are_named():
    x = sample((5, 256))
    for activation in ("static:INT8_TENSOR_ASYM", "local:NVFP4"):
        with pytest.raises(FormatError, match="needs a stored act_scale"):
            functional.linear(x, quantize(sample((12, 256)), "INT8_ROW", activation=activation))
    q = quantize(sample((12, 256)), "INT8_ROW", activation="static:INT8_TENSOR_ASYM")
    with pytest.raises(FormatError, match="needs zero points"):
        functional.linear(x, q.with_inner({**q.inner_tensors(), "act_scale": torch.tensor(0.1)}))


def test_the_op_checks_k_where_bytes_tell_it():
    q = quantize(sample((12, 64)), "int4:1x*:float32")
    with pytest.raises(FormatError, match=r"for k=32 in int4:1x\*:float32 needed is torch.uint8"):
        torch.ops.lowbit.linear(sample((5, 32)), q.qdata, q.scale, *(None,) * 6, str(q.format), "")
    assert Format.parse(str(q.format)) == q.format
