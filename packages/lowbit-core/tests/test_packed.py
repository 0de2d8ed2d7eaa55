"""A weight bound to one kernel: it runs, differentiates and unpacks, and refuses everything else in words."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit import FormatError, NotPortableError, quantize
from lowbit.backends import Kernel
from lowbit.packed import PackedTensor
from lowbit.testing import FORMAT_GRID, Loopback, installed_backends, sample, shapes

ROW_SUMS = "reference.linear_row_sums"


def weight(spec="INT8_ROW_ASYM", activation="dynamic:INT8_ROW_ASYM"):
    return quantize(sample((6, 32)), spec, activation=activation)


def check_parts(found, wanted):
    assert found.storage_layout == wanted.storage_layout
    assert found.inner_tensors().keys() == wanted.inner_tensors().keys()
    for name, part in wanted.inner_tensors().items():
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (getattr(found, name), part))), name


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_linear_and_embedding_run_and_unpack_exactly(fmt, packs):
    loopback = Loopback(packs=packs)
    shape = next(shape for shape in shapes(fmt) if len(shape) == 2)
    q = quantize(sample(shape), fmt)
    q = q.with_inner({**q.inner_tensors(), "pre_scale": torch.linspace(0.5, 2, shape[1])})
    x, bias, ids = sample((3, shape[1]), seed=1), sample(shape[:1], seed=2), torch.tensor([[0, 5]])
    wanted = functional.linear(x, q, bias), functional.embedding(ids, q)
    with installed_backends(loopback):
        line, table = (PackedTensor.from_quantized(q, f"loopback.{op}") for op in ("linear", "embedding"))
        assert torch.equal(functional.linear(x, line, bias), wanted[0])
        assert torch.equal(functional.linear(x, weight=line, bias=bias), wanted[0])
        assert torch.equal(functional.embedding(ids, table, padding_idx=1, norm_type=2.0), wanted[1])
        module = nn.Embedding(*shape, padding_idx=0)
        module.weight = nn.Parameter(table, requires_grad=False)
        assert torch.equal(module(ids), wanted[1])
        assert loopback.calls == {"linear": 2, "embedding": 2}
        for packed in (line, table, line.detach()):
            assert (packed.shape, packed.dtype) == (q.shape, q.dtype)
            check_parts(packed.unpack(), q)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("spec", ["INT8_ROW", "INT8_ROW_ASYM"])
def test_gradients_are_those_of_the_portable_weight(spec, lead):
    q = weight(spec)
    q = q.with_inner({**q.inner_tensors(), "pre_scale": torch.linspace(0.5, 2, 32)})
    found = []
    for w in (q, PackedTensor.from_quantized(q, ROW_SUMS)):
        x, bias = sample((*lead, 32), seed=1).requires_grad_(), sample((6,), seed=2).requires_grad_()
        y = functional.linear(x, w, bias)
        y.backward(sample((*lead, 6), seed=3))
        found.append((y.detach(), x.grad, bias.grad))
    for wanted, tensor in zip(*found, strict=True):
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("spec", ["INT8_ROW", "INT8_ROW_ASYM"])
def test_the_products_that_linear_decomposes_to(spec):
    q = weight(spec)
    q = q.with_inner({**q.inner_tensors(), "pre_scale": torch.linspace(0.5, 2, 32)})
    packed, bias, x = PackedTensor.from_quantized(q, ROW_SUMS), sample((6,), seed=2), sample((5, 32), seed=1)
    assert torch.equal(x @ packed.t(), functional.linear(x, q))
    assert torch.equal(torch.addmm(bias, x, packed.t()), functional.linear(x, q, bias))
    check_parts(packed.t().t().unpack(), q)
    found = []
    for w in (q, packed):
        y = x.clone().requires_grad_()
        (y @ w.t()).backward(sample((5, 6), seed=3))
        found.append(y.grad)
    assert torch.equal(found[0], sample((5, 6), seed=3) @ (q.dequantize() * q.pre_scale))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=6 * 2.0**-23 * float(found[0].abs().max()))


def test_a_weight_that_lies_sideways_is_multiplied_as_it_lies():
    """As transformers' Conv1D has it: (K, N), and K is what is summed over."""
    q = quantize(sample((32, 6)), "INT8_ROW_ASYM", axis=0, activation="dynamic:INT8_ROW_ASYM")
    packed, bias, x = PackedTensor.from_quantized(q, ROW_SUMS), sample((6,), seed=2), sample((5, 32), seed=1)
    assert packed.shape == (32, 6)
    assert torch.equal(x @ packed, x @ q)
    assert torch.equal(torch.addmm(bias, x, packed), torch.addmm(bias, x, q))
    assert torch.equal(functional.linear(x, packed.t(), bias), functional.linear(x, q.t(), bias))
    check_parts(packed.unpack(), q)
    y = x.clone().requires_grad_()
    (y @ packed).backward(sample((5, 6), seed=3))
    wanted = sample((5, 6), seed=3) @ q.dequantize().t()
    torch.testing.assert_close(y.grad, wanted, rtol=0, atol=6 * 2.0**-23 * float(wanted.abs().max()))
    for refused in (lambda: functional.linear(torch.zeros(2, 6), packed), lambda: torch.zeros(2, 6) @ packed.t()):
        with pytest.raises(NotPortableError):
            refused()


def test_gradient_to_the_bias_alone():
    bias = sample((6,), seed=2).requires_grad_()
    functional.linear(sample((5, 32)), PackedTensor.from_quantized(weight(), ROW_SUMS), bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 5.0))


REFUSED = {
    "slice": lambda w: w[0:2],
    "select": lambda w: w[0],
    "the transpose used as a weight": lambda w: functional.linear(torch.zeros(2, 6), w.t()),
    "the transpose cut": lambda w: w.t()[0:2],
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
    "to": lambda w: w.to(torch.float16),
    "cuda or meta": lambda w: w.to("meta"),
    "cat": lambda w: torch.cat([w, w]),
    "view": lambda w: w.view(-1),
    "add": lambda w: w + 1,
    "mm": lambda w: torch.mm(torch.zeros(2, 6), w),
    "copy_": lambda w: w.copy_(w),
    "pickle": pickle.dumps,
    "save": lambda w: torch.save(w, io.BytesIO()),
    "share_memory_": lambda w: w.share_memory_(),
    "embedding": lambda w: functional.embedding(torch.tensor([0]), w),
    "two packed": lambda w: functional.linear(w, w),
    "packed input": lambda w: functional.linear(w, torch.zeros(6, 32)),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("inference", [False, True])
def test_everything_else_is_refused_in_words(what, inference):
    with torch.inference_mode(inference):
        packed = PackedTensor.from_quantized(weight(), ROW_SUMS)
        with pytest.raises(NotPortableError, match=r"unbind\(model\)"):
            REFUSED[what](packed)


def test_setting_data_is_refused():
    packed = nn.Parameter(PackedTensor.from_quantized(weight(), ROW_SUMS), requires_grad=False)
    with pytest.raises(NotPortableError, match="no meaning"):
        packed.data = torch.zeros(6, 32)


def test_wrong_inputs_are_refused():
    with pytest.raises(FormatError, match="input has 31 columns"):
        functional.linear(sample((5, 31)), PackedTensor.from_quantized(weight(), ROW_SUMS))
    with installed_backends(Loopback(packs=True)):
        table = PackedTensor.from_quantized(weight(), "loopback.embedding")
        with pytest.raises(NotPortableError, match="max_norm"):
            functional.embedding(torch.tensor([0]), table, max_norm=1.0)


def test_a_kernel_without_a_way_back_says_so():
    class OneWay(Loopback):
        def kernels(self):
            return tuple(Kernel(k.name, k.op, k.device, 5, k.run, k.refuses, k.pack) for k in super().kernels())

    with installed_backends(OneWay("oneway", packs=True)):
        packed = PackedTensor.from_quantized(weight(), "oneway.linear")
        assert functional.linear(sample((5, 32)), packed).shape == (5, 6)
        with pytest.raises(NotPortableError, match=r"oneway.linear keeps no way back .* load the checkpoint again"):
            packed.unpack()


def test_it_says_what_it_is():
    packed = PackedTensor.from_quantized(weight(), ROW_SUMS)
    text = f"PackedTensor(shape=(6, 32), kernel={ROW_SUMS!r}, format='int8:1x*:float32:zero=int8')"
    assert repr(packed) == text
    names, context = packed.__tensor_flatten__()
    again = PackedTensor.__tensor_unflatten__({name: getattr(packed, name) for name in names}, context, None, None)
    check_parts(again.unpack(), weight())
    assert again._stable_hash_for_caching() == packed._stable_hash_for_caching()


def test_autocast_casts_the_input_and_nothing_inside():
    q = weight()
    packed = PackedTensor.from_quantized(q, ROW_SUMS)
    x, bias = sample((5, 32), seed=1), sample((6,), seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (functional.linear(x, w, bias) for w in (packed, q))
    assert torch.equal(found, wanted)
    assert found.dtype == torch.bfloat16
