"""The `lowbit::*` operators as torch sees them: schemas, fakes, autograd and compiled graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit import INT8_ROW_ASYM, MXFP4, MXFP8, NVFP4, UINT4_G128, bind, quantize, reference
from lowbit.attention import SCHEMES
from lowbit.format import Format
from lowbit.numerics import DEFAULT_MODE
from lowbit.ops import _SCHEMAS
from lowbit.testing import FORMAT_GRID, sample, shapes

pytestmark = pytest.mark.usefixtures("through")
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
RUN = {kernel.op: kernel.run for kernel in reference.backend.kernels() if kernel.pack is None}
FEW = [Format.parse(spec) for spec in ("INT8_ROW_ASYM", "NVFP4", "int4:4x16:bfloat16")]


def parts(q):
    return q.qdata, q.scale, q.zero, q.tensor_scale


def use(activation):
    """act_scale, act_zero and pre_scale for an activation spec."""
    static = activation.startswith("static")
    zero = (
        torch.tensor(3, dtype=torch.uint8 if "zero=u" in activation else torch.int8) if "zero" in activation else None
    )
    return (torch.tensor(0.05), zero, None) if static else (None, None, None)


def activations(fmt):
    """Weight only, and the input in the same kind of format, dynamic and static."""
    tensor = fmt.with_block(0, 0)
    yield ""
    if fmt.block[0] <= 1:
        yield f"dynamic:{fmt}"
    if fmt.scale.name == "float32" and not fmt.tensor_scale:
        yield f"static:{tensor}"


def calls(fmt, dtype=torch.bfloat16):
    """Arguments of every operator on a weight of `fmt`."""
    by_rank = {len(shape): shape for shape in shapes(fmt)}
    n, k = by_rank[2]
    weight = quantize(sample((n, k), dtype=dtype), fmt)
    x, bias = sample((5, k), seed=1, dtype=dtype), sample((n,), seed=2, dtype=dtype)
    spec = str(fmt)
    yield "quantize", (sample((n, k), dtype=dtype), None, None, None, spec, DEFAULT_MODE, "nearest", 0)
    yield (
        "quantize",
        (weight.dequantize(), weight.scale, weight.zero, weight.tensor_scale, spec, "even", "stochastic", 7),
    )
    yield "quantize_blocked", (sample((n, k), dtype=dtype), None, spec, DEFAULT_MODE, "nearest", 0)
    yield "quantize_both", (sample((n, k), dtype=dtype), None, spec, "INT8_ROW_ASYM", DEFAULT_MODE, "nearest", 0)
    yield "quantize_both", (sample((n, k), dtype=dtype), None, spec, "FP8_ROW", "even", "stochastic", 7, True)
    size = k & -k
    yield "quantize_rotated", (sample((n, k), dtype=dtype), None, size, 3, spec, DEFAULT_MODE, "nearest", 0)
    yield "quantize_rotated", (sample((n, k), dtype=dtype), None, 1, 0, spec, "even", "stochastic", 7, True)
    rows = sample((5, k), dtype=dtype), torch.tensor([4, 0, 0, 2, 1]), OFFSETS, max(fmt.block[0], 8)
    yield "quantize_groups", (*rows, None, spec, None, DEFAULT_MODE, "nearest", 0, True)
    yield "quantize_groups", (*rows, None, spec, "INT8_ROW_ASYM", "even", "stochastic", 7)
    yield "quantize_groups", (*rows, None, None, "INT8_ROW", "even", "stochastic", 7, False, torch.tensor(3))
    yield "dequantize", (*parts(weight), spec, k, dtype)
    yield "pad_groups", (sample((5, k), dtype=dtype), torch.tensor([4, 0, 0, 2, 1]), OFFSETS, 8)
    yield "unpad_groups", (sample((40, k), dtype=dtype), OFFSETS, 8, 5)
    heads = [sample((2, each, 9, 64), seed=i, dtype=dtype) for i, each in enumerate((4, 2, 2))]
    yield "attention", (*heads, None, True, 5, 0.125, str(SCHEMES["INT8_FP8"]), "")
    packed = [each.transpose(1, 2).flatten(0, 1) for each in heads]
    ends = torch.tensor([0, 7, 7, 18], dtype=torch.int32)
    yield "varlen_attention", (*packed, ends, ends, 11, 11, True, 5, 0.125, str(SCHEMES["INT8_FP8"]), "")
    cache = (
        *(torch.zeros(2, 16, 2, *width, dtype=of) for of, width in 2 * ((torch.uint8, (64,)), (torch.float32, ()))),
    )
    table, rows = torch.tensor([[1], [0]], dtype=torch.int32), ("int8:1x*:float32", "e4m3fn:1x*:float32")
    turns = sample((1, 9, 64), seed=4, dtype=dtype).cos(), sample((1, 9, 64), seed=4, dtype=dtype).sin()
    yield "cache_write", (heads[1], heads[2], heads[0], *turns, *cache, torch.tensor([7, -1]), table, *rows)
    yield "cache_write", (heads[1], heads[2], None, None, None, *cache, torch.tensor([7, -1]), None, *rows)
    yield "cached_attention", (heads[0], *cache, torch.tensor([16, 8], dtype=torch.int32), table, 0, 0.125, *rows)
    yield "embedding", (torch.tensor([[1, 0, 5]]), *parts(weight), spec, k, dtype)
    by = torch.tensor([0.5, -2.0, 3.0])
    bags = (torch.tensor([1, 0, 5]), torch.tensor([0, 2, 2]))
    yield "embedding_bag", (*bags, by, *parts(weight), "sum", -1, False, spec, k, dtype)
    for activation in activations(fmt):
        yield "linear", (x, *parts(weight), *use(activation), bias, spec, activation)
        yield "linear", (x.view(1, 5, k), *parts(weight), *use(activation), None, spec, activation)
        stack = quantize(sample(by_rank[3], dtype=dtype), fmt)
        yield "grouped_mm", (x, OFFSETS, *parts(stack), *use(activation), spec, activation)
    tokens = quantize(x, fmt) if fmt.block[0] <= 1 else quantize(x, fmt.with_block(1, 0))
    yield "scaled_mm", (*parts(tokens), *parts(weight), bias, str(tokens.format), spec, k, dtype)
    yield "scaled_grouped_mm", (*parts(tokens), *parts(stack), OFFSETS, str(tokens.format), spec, k, dtype)
    yield "scaled_grouped_mm_k", (*parts(tokens), *parts(weight), OFFSETS, str(tokens.format), spec, k, dtype)


def test_every_operator_is_called():
    assert {op for op, _ in calls(MXFP4)} == set(_SCHEMAS)


@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_operators_give_what_kernels_give(fmt):
    for op, arguments in calls(fmt):
        found = getattr(torch.ops.lowbit, op)(*arguments)
        wanted = RUN[op](*arguments)
        pairs = zip(found, wanted, strict=True) if isinstance(found, (list, tuple)) else [(found, wanted)]
        for tensor, right in pairs:
            assert tensor.dtype == right.dtype, op
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, right))), op


@pytest.mark.parametrize(
    ("through", "dtype"),
    [("reference", torch.float32), ("reference", torch.bfloat16), ("loopback", torch.bfloat16)],
    indirect=["through"],
)
@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_fakes_tell_what_the_operators_return(fmt, dtype):
    for op, arguments in calls(fmt, dtype):
        found = getattr(torch.ops.lowbit, op)(*arguments)
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            told = getattr(torch.ops.lowbit, op)(*faked)
        pairs = zip(found, told, strict=True) if isinstance(found, (list, tuple)) else [(found, told)]
        for real, fake in pairs:
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride()), op


@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_operators_neither_change_nor_return_their_arguments(fmt):
    for op, arguments in calls(fmt):
        # One writes to a cache.
        kept = (*arguments[:5], *arguments[9:]) if op == "cache_write" else arguments
        given = [a for a in kept if isinstance(a, torch.Tensor)]
        before = [a.clone() for a in given]
        found = getattr(torch.ops.lowbit, op)(*arguments)
        for tensor, copy in zip(given, before, strict=True):
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, copy))), op
            assert tensor.data_ptr() not in [
                t.data_ptr() for t in (found if isinstance(found, (list, tuple)) else [found])
            ], op


# opcheck itself asks an intermediate tensor for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_opcheck(fmt):
    utils = {"test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"}
    if any(element.kind == "float" and element.bits == 8 for element in (fmt.element, fmt.scale)):
        # It multiplies every tensor, which 8-bit floats cannot; the test above stands in for it.
        utils -= {"test_schema"}
    for op, arguments in calls(fmt, torch.float32):
        differentiable = op in {"linear", "grouped_mm", "pad_groups", "unpad_groups"}
        x = arguments[0].clone().requires_grad_() if differentiable else arguments[0]
        # Tracing the gradient of grouped_mm would need the values of offs.
        less = {"test_aot_dispatch_dynamic"} if op == "grouped_mm" else set()
        overload = getattr(torch.ops.lowbit, op).default
        torch.library.opcheck(overload, (x, *arguments[1:]), test_utils=tuple(utils - less))


def linear(fmt, activation):
    module = nn.Linear(256, 6, dtype=torch.bfloat16)
    weight = quantize(sample((6, 256), dtype=torch.bfloat16), fmt, activation=activation)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("fmt", "activation"),
    [(UINT4_G128, None), (NVFP4, "dynamic:NVFP4"), (INT8_ROW_ASYM, "dynamic:INT8_ROW_ASYM")],
    ids=str,
)
def test_a_compiled_linear_serves_every_number_of_tokens(fmt, activation):
    torch._dynamo.reset()
    module = linear(fmt, activation)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 7, 33):
        x = sample((m, 256), seed=m, dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("through", ["reference", "packed loopback"], indirect=True)
def test_a_bound_linear_compiles():
    torch._dynamo.reset()
    module = linear(INT8_ROW_ASYM, "dynamic:INT8_ROW_ASYM")
    inputs = [sample((m, 256), seed=m, dtype=torch.bfloat16) for m in (2, 7, 33)]
    wanted = [module(x) for x in inputs]
    assert bind(module).rows[0].packed
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for x, y in zip(inputs, wanted, strict=True):
        with torch.no_grad():
            assert torch.equal(compiled(x), y)


def test_a_model_of_quantized_tensors_exports_to_neutral_operators():
    module = linear(MXFP8, "dynamic:MXFP8")
    x = sample((3, 256), dtype=torch.bfloat16)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
    assert torch.ops.lowbit.linear.default in [node.target for node in exported.graph.nodes]
    for m in (2, 9):
        x = sample((m, 256), seed=m, dtype=torch.bfloat16)
        assert torch.equal(exported.module()(x), module(x))
