"""What uses a quantized weight, against the same use of the dequantized one: bit for bit, gradients included."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit import FormatError, RowError, UnsupportedOpError, quantize
from lowbit.testing import FORMAT_GRID, product_bound, sample, shapes

pytestmark = pytest.mark.usefixtures("through")
through_modules = pytest.mark.parametrize("through", ["reference", "loopback", "packed loopback"], indirect=True)
each_format = pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
modes = pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])


def weights(fmt, dtype=torch.float32):
    """Weights (N, K) of `fmt`: made so, and made as (K, N) and transposed."""
    shape = next(shape for shape in shapes(fmt) if len(shape) == 2)
    x = sample(shape, dtype=dtype)
    yield quantize(x, fmt)
    yield quantize(x.t().contiguous(), fmt, axis=0).t()


def linear(weight, bias=None):
    module = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


@each_format
@modes
@through_modules
def test_linear(fmt, mode, through):
    with mode():
        for q in (*weights(fmt, torch.float32), *weights(fmt, torch.bfloat16)):
            dtype, d = q.dtype, q.dequantize()
            n, k = q.shape
            bias = sample((n,), seed=1, dtype=dtype)
            module = through(linear(q, bias))
            for lead in ((), (1,), (5,), (0,), (2, 3)):
                x = sample((*lead, k), seed=2, dtype=dtype)
                assert torch.equal(functional.linear(x, q), functional.linear(x, d))
                assert torch.equal(functional.linear(x, q, bias), functional.linear(x, d, bias))
                assert torch.equal(module(x), functional.linear(x, d, bias))
            x = sample((5, k), seed=2, dtype=dtype)
            assert torch.equal(x @ q.t(), x @ d.t())
            assert torch.equal(sample((2, 3, k), dtype=dtype) @ q.mT, sample((2, 3, k), dtype=dtype) @ d.mT)
            assert torch.equal(torch.mm(x, q.t()), torch.mm(x, d.t()))
            assert torch.equal(torch.addmm(bias, x, q.t()), torch.addmm(bias, x, d.t()))


@each_format
def test_gradients_of_linear(fmt):
    for q in weights(fmt):
        n, k = q.shape
        for lead in ((), (5,), (2, 3)):
            found = []
            for weight in (q, q.dequantize()):
                x = sample((*lead, k), seed=1).requires_grad_()
                bias = sample((n,), seed=2).requires_grad_()
                functional.linear(x, weight, bias).backward(sample((*lead, n), seed=3))
                found.append((x.grad, bias.grad))
            (x_grad, bias_grad), (x_wanted, bias_wanted) = found
            assert torch.equal(x_grad, x_wanted)
            assert torch.equal(bias_grad, bias_wanted)


def test_gradient_passes_rounding_and_smoothing():
    x, weight = sample((5, 32)), sample((6, 32))
    pre_scale = torch.linspace(0.5, 2, 32)
    q = quantize(weight, "INT8_ROW", activation="dynamic:INT8_ROW")
    q = q.with_inner({**q.inner_tensors(), "pre_scale": pre_scale})
    x.requires_grad_()
    functional.linear(x, q).backward(torch.ones(5, 6))
    assert torch.equal(x.grad, torch.ones(5, 6) @ q.dequantize() * pre_scale)


@each_format
@modes
@through_modules
def test_embedding(fmt, mode, through):
    with mode():
        for q in weights(fmt, torch.bfloat16):
            d = q.dequantize()
            table = nn.Embedding(*q.shape, padding_idx=1)
            table.weight = nn.Parameter(q, requires_grad=False)
            table = through(table)
            for ids in (torch.tensor(3), torch.tensor([[0, 5], [1, 1]]), torch.zeros(0, 2, dtype=torch.int32)):
                assert torch.equal(functional.embedding(ids, q), functional.embedding(ids, d))
                assert torch.equal(table(ids), functional.embedding(ids, d))


def test_embedding_refuses_what_f_embedding_refuses():
    q = quantize(sample((6, 32)), "INT4_G32")
    for wrong in (-1, 6):
        with pytest.raises(RowError, match=f"row {wrong} is not in the table, which has 6 rows"):
            functional.embedding(torch.tensor([wrong]), q)
    with pytest.raises(UnsupportedOpError, match="max_norm"):
        functional.embedding(torch.tensor([0]), q, max_norm=1.0)


EXPERTS = [fmt for fmt in FORMAT_GRID if any(len(shape) == 3 for shape in shapes(fmt))]
OFFSETS = torch.tensor([2, 2, 7], dtype=torch.int32)


def experts(fmt):
    """Stacked experts that read as (E, K, N): stored K last and transposed, and made as (E, K, N)."""
    shape = next(shape for shape in shapes(fmt) if len(shape) == 3)
    x = sample(shape)
    yield quantize(x, fmt).mT
    yield quantize(x.mT.contiguous(), fmt, axis=1)


@pytest.mark.parametrize("fmt", EXPERTS, ids=str)
@modes
def test_grouped_mm(fmt, mode):
    with mode():
        for q in experts(fmt):
            d = q.dequantize()
            x = sample((9, q.shape[1]), seed=1)
            pieces = [functional.linear(part, w.t()) for part, w in zip(x.tensor_split([2, 2, 7])[:3], d, strict=True)]
            wanted = torch.cat([*pieces, torch.zeros(2, q.shape[2])])
            for use in (functional.grouped_mm, torch._grouped_mm):
                assert torch.equal(use(x, q, offs=OFFSETS), wanted)


def test_grouped_mm_agrees_with_torch():
    q = quantize(sample((3, 8, 32)), "MXFP8").mT
    x = sample((7, 32), seed=1)
    ours, torchs = (functional.grouped_mm(x, w, offs=OFFSETS) for w in (q, q.dequantize()))
    for e, rows in enumerate((slice(0, 2), slice(2, 2), slice(2, 7))):
        bound = 2 * product_bound(x[rows], q.dequantize()[e].t())
        assert ((ours[rows] - torchs[rows]).abs() <= bound).all()


@pytest.mark.parametrize("activation", [None, "dynamic:MXFP8"])
def test_gradient_of_grouped_mm(activation):
    q = quantize(sample((3, 8, 32)), "MXFP8", activation=activation).mT
    x, grad = sample((9, 32), seed=1).requires_grad_(), sample((9, 8), seed=2)
    functional.grouped_mm(x, q, offs=OFFSETS).backward(grad)
    pieces = [part @ w.t() for part, w in zip(grad.tensor_split([2, 2, 7])[:3], q.dequantize(), strict=True)]
    assert torch.equal(x.grad, torch.cat([*pieces, torch.zeros(2, 32)]))


def test_wrong_operands():
    q = quantize(sample((6, 30)), "int4:1x*:float32")
    x = sample((5, 30))
    for columns in (29, 31, 60):
        for activation in (None, "dynamic:INT8_ROW"):
            weight = quantize(sample((6, 30)), "int4:1x*:float32", activation=activation)
            with pytest.raises(FormatError, match=f"input has {columns} columns"):
                functional.linear(sample((5, columns)), weight)
    with pytest.raises(FormatError, match="input has 8 columns"):
        functional.grouped_mm(sample((5, 8)), quantize(sample((2, 6, 9)), "int4:1x*:float32").mT, offs=OFFSETS[:2])
    for use in (
        lambda: functional.linear(q, sample((6, 30))),
        lambda: functional.linear(x, q, bias=q),
        lambda: q @ x.t(),
        lambda: functional.embedding(q, q),
    ):
        with pytest.raises(UnsupportedOpError):
            use()
    for use in (
        lambda: functional.linear(x, q.t()),
        lambda: x.t() @ q,
        lambda: functional.grouped_mm(x, q.unsqueeze(0), offs=OFFSETS[:1]),
    ):
        with pytest.raises(UnsupportedOpError, match="contracts another axis"):
            use()
    with pytest.raises(UnsupportedOpError, match="alpha"):
        torch.addmm(torch.zeros(6), x, q.t(), alpha=2)
    with pytest.raises(UnsupportedOpError, match="no bias"):
        functional.grouped_mm(x, q.unsqueeze(0).mT)


AUTOCAST = [None, "dynamic:INT8_ROW_ASYM", "dynamic:MXFP8"]


@pytest.mark.parametrize("activation", AUTOCAST)
def test_autocast_casts_the_input_and_nothing_inside(activation):
    weight = quantize(
        sample((6, 64)), "MXFP8" if activation and "MX" in activation else "INT8_ROW", activation=activation
    )
    x, bias = sample((5, 64), seed=1), sample((6,), seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.linear(x, weight, bias)
    assert torch.equal(found, functional.linear(x.bfloat16(), weight, bias.bfloat16()))
    assert found.dtype == torch.bfloat16


def test_autocast_leaves_the_op_alone():
    weight = quantize(sample((6, 4096)), "INT8_ROW", activation="dynamic:INT8_ROW_ASYM")
    x = sample((5, 4096), seed=1)
    arguments = (
        *(getattr(weight, name) for name in ("qdata", "scale", "zero", "tensor_scale")),
        None,
        None,
        None,
        None,
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.ops.lowbit.linear(x, *arguments, "INT8_ROW", "dynamic:INT8_ROW_ASYM")
    assert torch.equal(found, functional.linear(x, weight))
    assert found.dtype == torch.float32
