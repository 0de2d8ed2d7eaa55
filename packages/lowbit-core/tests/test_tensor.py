"""QuantizedTensor itself: made, described, copied, stored and written to."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
from dataclasses import replace

import pytest
import torch
from torch import nn

from lowbit import (
    FORMATS,
    Activation,
    CheckpointError,
    FormatError,
    QuantizedTensor,
    Scales,
    UnsupportedOpError,
    quantize,
)
from lowbit.format import Format
from lowbit.tensor import INNER, SCHEMA_VERSION
from lowbit.testing import FORMAT_GRID, sample, shapes

each_format = pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)


def full(seed=0):
    """Two weights that between them have every inner tensor there is."""
    weight = sample((6, 32), seed=seed)
    asym = quantize(weight, "INT8_ROW_ASYM", activation="static:INT8_TENSOR_ASYM")
    extra = {"act_scale": torch.tensor(0.5), "act_zero": torch.tensor(3, dtype=torch.int8), "pre_scale": torch.rand(32)}
    nvfp4 = quantize(weight, "NVFP4", activation="local:NVFP4")
    return (
        asym.with_inner({**asym.inner_tensors(), **extra}),
        nvfp4.with_inner({**nvfp4.inner_tensors(), "act_scale": torch.tensor(0.25)}),
    )


def grid(fmt):
    """Tensors of `fmt` of each rank, blocked along each axis, and everything `full` makes of it."""
    for shape in shapes(fmt):
        for axis in range(len(shape)):
            yield quantize(sample(shape, dtype=torch.bfloat16).movedim(-1, axis), fmt, axis=axis)
    yield from (weight for weight in full() if weight.format == fmt)


def check_equal(result, wanted):
    assert type(result) is QuantizedTensor
    assert result.storage_layout == wanted.storage_layout
    assert result.shape == wanted.shape
    assert result.inner_tensors().keys() == wanted.inner_tensors().keys()
    for name, part in wanted.inner_tensors().items():
        found = getattr(result, name)
        assert (found.dtype, found.shape) == (part.dtype, part.shape)
        assert torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (found, part))), name


@each_format
def test_what_a_tensor_says_of_itself(fmt):
    for q in grid(fmt):
        assert q.format == fmt
        assert q.dtype == q.dequantize().dtype
        assert q.stored_bytes == sum(t.numel() * t.element_size() for t in q.inner_tensors().values())
        assert q.canonical_shape == tuple(q.permute([q.permutation.index(d) for d in range(q.dim())]).shape)
        assert str(fmt) in repr(q)
        assert f"shape={tuple(q.shape)}" in repr(q)
        assert "QuantizedTensor" in repr(nn.Parameter(q, requires_grad=False))
        names, layout = q.__tensor_flatten__()
        check_equal(QuantizedTensor.__tensor_unflatten__({n: getattr(q, n) for n in names}, layout, None, None), q)


def test_parts_that_do_not_fit():
    q = quantize(sample((4, 64)), "MXFP4")
    parts = {"qdata": q.qdata, "scales": q.scales, "fmt": q.format, "k": 64, "dtype": torch.float32}
    check_equal(QuantizedTensor.from_parts(**parts), quantize(sample((4, 64)), "MXFP4"))
    for wrong in (
        {"k": 62},
        {"qdata": q.qdata.view(torch.int8)},
        {"qdata": q.qdata[:, :-1]},
        {"scales": Scales(q.scale.t())},
        {"fmt": Format.parse("MXINT8")},
        {"pre_scale": torch.ones(63)},
        {"act_scale": torch.ones(2)},
        {"act_zero": torch.ones(2)},
    ):
        with pytest.raises(FormatError):
            QuantizedTensor.from_parts(**parts | wrong)


@each_format
def test_deepcopy_and_pickle_are_exact(fmt):
    for q in grid(fmt):
        check_equal(copy.deepcopy(q), q)
        check_equal(pickle.loads(pickle.dumps(q)), q)
        assert all(
            a.data_ptr() != b.data_ptr()
            for a, b in zip(copy.deepcopy(q).inner_tensors().values(), q.inner_tensors().values(), strict=True)
        )


@each_format
def test_torch_save_is_exact(fmt):
    for q in grid(fmt):
        stored = io.BytesIO()
        torch.save({"plain": q, "parameter": nn.Parameter(q, requires_grad=False)}, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=True)
        check_equal(loaded["plain"], q)
        check_equal(loaded["parameter"].detach(), q)
        assert isinstance(loaded["parameter"], nn.Parameter)
        assert not isinstance(loaded["plain"], nn.Parameter)


def test_tied_parameters_and_modules_survive_copies():
    model = nn.ModuleDict({"a": nn.Linear(32, 6, bias=False), "b": nn.Linear(32, 6, bias=False)})
    model.a.weight = model.b.weight = nn.Parameter(full()[0], requires_grad=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.a.weight is other.b.weight
        assert other.a.weight is not model.a.weight
        check_equal(other.a.weight.detach(), model.a.weight.detach())


def test_a_pickle_names_no_class_of_lowbit():
    for q in full():
        names = [arg for op, arg, _ in pickletools.genops(pickle.dumps(q, protocol=2)) if op.name == "GLOBAL"]
        loaded = {name for name in names if "lowbit" in name}
        assert loaded == {"lowbit.tensor rebuild"}


def test_a_newer_pickle_names_the_version(monkeypatch):
    monkeypatch.setattr("lowbit.tensor.SCHEMA_VERSION", SCHEMA_VERSION + 6)
    stored = io.BytesIO()
    torch.save(full()[0], stored)
    monkeypatch.undo()
    stored.seek(0)
    with pytest.raises(Exception, match=f"reads schema {SCHEMA_VERSION + 6}") as caught:
        torch.load(stored, weights_only=True)
    assert isinstance(caught.value, CheckpointError)


@each_format
def test_copy_writes_everything(fmt):
    for q in grid(fmt):
        other = copy.deepcopy(q).to(torch.float32)
        for part in other.inner_tensors().values():
            part.view(torch.uint8).reshape(-1)[:1].fill_(1) if part.dim() else part.fill_(1)
        assert q.copy_(other) is q
        check_equal(q.to(torch.float32), other)


@pytest.mark.parametrize("inference", [False, True])
def test_copy_into_a_cut_changes_that_cut_alone(inference):
    with torch.inference_mode(inference):
        for spec, index in (
            ("INT8_ROW", slice(1, 3)),
            ("MXFP4", (slice(None), slice(32, 64))),
            ("int4:1x*:float32", slice(2, 4)),
        ):
            q, other = (quantize(sample((6, 96), seed=seed), spec) for seed in (0, 1))
            wanted = q.dequantize()
            wanted[index] = other.dequantize()[index]
            q[index] = other[index]
            assert torch.equal(q.dequantize(), wanted)


@pytest.mark.parametrize("inference", [False, True])
def test_copy_into_a_cut_that_shares_parts_is_refused(inference):
    rows, columns, odd = slice(0, 2), (slice(None), slice(0, 48)), (slice(None), slice(1, 49))
    with torch.inference_mode(inference):
        for spec, index, part in (
            ("INT8_TENSOR", rows, "scale"),
            ("INT8_ROW", columns, "scale"),
            ("INT8_ROW_ASYM", columns, "scale"),
            ("NVFP4", rows, "tensor_scale"),
            ("int4:1x*:float32", odd, "qdata"),
        ):
            q, other = (quantize(sample((6, 96), seed=seed) * 3.0**seed, spec) for seed in (0, 3))
            before = q.clone()
            with pytest.raises(FormatError, match=f"cannot change {part}"):
                q[index].copy_(other[index])
            check_equal(q, before)
            # The very same values change nothing that others share.
            q[index].copy_(q.clone()[index])
            check_equal(q, before)


def test_copy_refuses_what_would_round_or_half_write():
    q = quantize(sample((6, 96)), "NVFP4")
    before = q.clone()
    for other in (q.dequantize(), 0 * q.dequantize()):
        with pytest.raises(UnsupportedOpError, match="would round or dequantize unseen"):
            q.copy_(other)
        with pytest.raises(UnsupportedOpError, match="would round or dequantize unseen"):
            other.copy_(q)
    rowwise = torch.cat([quantize(sample((3, 96)) * 9**i, "NVFP4") for i in (0, 3)])
    for other in (rowwise, q[:1], quantize(sample((6, 96)), "MXFP4"), quantize(sample((96, 6)), "NVFP4", axis=0)):
        with pytest.raises(FormatError, match="copy_ needs equal formats and shapes"):
            q.copy_(other)
        check_equal(q, before)


def test_modules_move_load_and_share():
    weight = full()[0]
    model = nn.Linear(32, 6)
    model.weight = nn.Parameter(weight.clone(), requires_grad=False)
    for dtype in (torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        assert isinstance(model.weight, nn.Parameter)
        check_equal(model.weight.detach(), weight.to(dtype))
    other = nn.Linear(32, 6)
    other.weight = nn.Parameter(full(seed=1)[0], requires_grad=False)
    other.load_state_dict(model.state_dict())
    check_equal(other.weight.detach(), weight)
    assert model.share_memory().weight.is_shared()
    check_equal(model.weight.detach(), weight)
    assert not other.weight.is_shared()
    assert model.to("meta").weight.qdata.is_meta


def test_what_would_leave_the_codes_behind_is_refused():
    q = full()[0]
    with pytest.raises(UnsupportedOpError, match="use copy_ or a new Parameter"):
        nn.Parameter(q, requires_grad=False).data = full(seed=1)[0]
    check_equal(q.data, q)
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.bool):
        with pytest.raises(UnsupportedOpError, match="reads as a floating point tensor"):
            q.to(dtype)
    for use in (q.numpy, q.tolist):
        with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
            use()


def test_pin_memory_does_what_torch_does_here():
    q = quantize(sample((6, 96)), "NVFP4")
    try:
        plain = q.scale.pin_memory()
    except (RuntimeError, AssertionError) as error:
        with pytest.raises(type(error)):
            q.pin_memory()
        assert not q.is_pinned()
    else:
        assert plain.is_pinned()
        assert q.pin_memory().is_pinned()
        check_equal(q.pin_memory(), q)


def test_activations_and_formats_are_read_back():
    for q in full():
        assert q.activation == Activation.parse(q.storage_layout.activation)
        assert tuple(q.inner_tensors()) == tuple(name for name in INNER if getattr(q, name) is not None)
    assert quantize(sample((6, 32)), FORMATS["MXFP8"]).activation is None
    assert replace(q.storage_layout, dtype=torch.float16) != q.storage_layout
    assert (
        q._stable_hash_for_caching()
        == copy.deepcopy(q)._stable_hash_for_caching()
        != q.half()._stable_hash_for_caching()
    )
