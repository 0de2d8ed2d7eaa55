"""lowbit.quantize: within the bound of the format, exact under given scales, and clear about what does not fit."""

from __future__ import annotations

import pytest
import torch

from lowbit import FormatError, QuantizedTensor, quantize
from lowbit.testing import FORMAT_GRID, rounding_bound, sample, shapes

each_format = pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
MX = [fmt for fmt in FORMAT_GRID if fmt.scale.name == "e8m0"]
MODES = ["floor", "ceil", "even", "rceil"]


def check_equal(result, wanted):
    assert type(result) is QuantizedTensor
    assert result.storage_layout == wanted.storage_layout
    assert result.inner_tensors().keys() == wanted.inner_tensors().keys()
    for name, part in wanted.inner_tensors().items():
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (getattr(result, name), part))), name


@each_format
def test_quantize_rounds_within_the_bound_of_the_format(fmt):
    for shape in shapes(fmt):
        x = sample(shape)
        blocks = fmt.block_of(shape)
        amax = x.abs()
        for dim, block in enumerate(blocks):
            amax = torch.cat([b.amax(dim, keepdim=True).expand_as(b) for b in amax.split(block, dim)], dim)
        for axis in range(len(shape)):
            q = quantize(x.movedim(-1, axis), fmt, axis=axis)
            assert q.shape == x.movedim(-1, axis).shape
            error = (q.dequantize() - x.movedim(-1, axis)).abs()
            assert (error <= rounding_bound(fmt) * amax.movedim(-1, axis)).all()


def test_quantize_takes_no_gradient_and_leaves_its_input():
    x = sample((6, 32)).requires_grad_()
    before = x.detach().clone()
    q = quantize(x, "INT8_ROW")
    assert not any(part.requires_grad for part in q.inner_tensors().values())
    assert torch.equal(x, before)


@pytest.mark.parametrize("fmt", MX, ids=str)
def test_given_scales_are_idempotent(fmt):
    x = sample((4, 64), dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda v, s: quantize(v, fmt, s).dequantize(), backend="aot_eager", fullgraph=True)
    for mode in MODES:
        first = quantize(x, fmt, mode=mode)
        for scale in (first.scale, first.scale.view(torch.uint8)):
            check_equal(quantize(x, fmt, scale), first)
            check_equal(quantize(first.dequantize(), fmt, scale), first)
            for given in (x, first.dequantize()):
                assert torch.equal(compiled(given, scale), first.dequantize()), mode
        assert quantize(x, fmt, first.scale).scale.data_ptr() != first.scale.data_ptr()


@each_format
def test_given_scales_of_any_format(fmt):
    for shape in shapes(fmt):
        x = sample(shape)
        q = quantize(x, fmt)
        check_equal(quantize(x, fmt, q.scale, q.zero, q.tensor_scale), q)
        check_equal(quantize(q.dequantize(), fmt, q.scale, q.zero, q.tensor_scale), q)


def test_a_tensor_scale_may_be_given_alone_and_without_dimensions():
    x = sample((3, 6, 32))
    q = quantize(x, "NVFP4", tensor_scale=torch.tensor(0.125))
    assert torch.equal(q.tensor_scale, torch.full((1, 1, 1), 0.125))
    assert (q.dequantize() - x).abs().max() <= rounding_bound(q.format) * x.abs().max()


SCALE = torch.full((4, 2), 127, dtype=torch.uint8)
WRONG = {
    "needed is torch.float8_e8m0fnu of shape .4, 2.": {"scale": SCALE[:, :1]},
    "scale is torch.float32": {"scale": SCALE.float()},
    "scale is torch.int8": {"scale": SCALE.view(torch.int8)},
    "has no zero points": {"scale": SCALE, "zero": torch.zeros(4, 2, dtype=torch.int8)},
    "a zero needs its scale": {"zero": torch.zeros(4, 2, dtype=torch.int8)},
    "would leave it unused": {"scale": SCALE, "tensor_scale": torch.tensor(1.0)},
    "axis 2 does not exist": {"axis": 2},
    "scale mode 'up' is unknown": {"mode": "up"},
    "rounding 'up' is unknown": {"rounding": "up"},
    "must be 'dynamic:'": {"activation": "MXFP8"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_of_quantize(message):
    with pytest.raises(FormatError, match=message):
        quantize(sample((4, 64)), "MXFP4", **WRONG[message])


def test_wrong_inputs_of_quantize():
    with pytest.raises(FormatError, match="100 .* is not a multiple of block 32"):
        quantize(sample((4, 100)), "MXFP4")
    with pytest.raises(FormatError, match=r"x is torch\.int64"):
        quantize(torch.ones(4, 64, dtype=torch.int64), "MXFP4")
    with pytest.raises(FormatError, match="uint8"):
        quantize(sample((4, 64)), "INT8_ROW", torch.ones(4, 1, dtype=torch.uint8))
    with pytest.raises(FormatError, match="needs zero points"):
        quantize(sample((4, 64)), "INT8_ROW_ASYM", torch.ones(4, 1))
    with pytest.raises(FormatError, match="needs tensor scale"):
        quantize(sample((4, 64)), "NVFP4", torch.ones(4, 4).to(torch.float8_e4m3fn))
