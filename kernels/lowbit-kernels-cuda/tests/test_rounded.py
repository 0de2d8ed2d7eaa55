"""Products of inputs that are rounded, too: against float64, the reference's bits of what they are rounded to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import lowbit
from lowbit.activation import Activation
from lowbit.backends import Call, Description
from lowbit.checking import ACTIVATIONS
from lowbit.element import element
from lowbit.errors import FormatError
from lowbit.format import Format
from lowbit.numerics import choose_scale
from lowbit.reference import quantize_input
from lowbit.tensor import QuantizedTensor
from lowbit.testing import check_backend
from lowbit_kernels_cuda import byte_linear, packed, plain_bytes
from lowbit_kernels_cuda.backend import backend
from lowbit_kernels_cuda.fragments import byte_words
from lowbit_kernels_cuda.inputs import rounded
from lowbit_kernels_cuda.weights import pack_tiles, side_by_side

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PRODUCTS = {
    *("cuda.linear", "cuda.linear_bytes", "cuda.grouped_mm", "cuda.grouped_mm_bytes", "cuda.scaled_mm"),
    *("cuda.scaled_grouped_mm", "cuda.scaled_grouped_mm_k"),
}
MORE = ("dynamic:FP8_TENSOR", "dynamic:int8:1x64:float32:zero=int8", "dynamic:MXINT8", "dynamic:MXFP8_E5M2")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [*map(str, ACTIVATIONS), *MORE])
def test_inputs_have_the_references_values(activation, device):
    how = Activation.parse(activation)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1))
    x[1, 7], x[2], x[3], x[4, 9] = 1e4, x[2] * 100, 0, torch.nan
    x = x.to(torch.bfloat16)
    chosen, scale, zero = choose_scale(x[:3] / 2, how.format), None, None
    if how.scaling == "static":
        scale, zero = chosen.scale.reshape(()), None if chosen.zero is None else chosen.zero.reshape(())
    elif how.scaling == "local":
        scale = chosen.tensor_scale.reshape(())
    whole = how.scaling == "dynamic" and (how.format.tensor_scale or how.format.block_for(2)[0] != 1)
    # One number that is none is in the way of all of a matrix.
    x = x[:4] if whole else x
    wanted = quantize_input(x, how, scale, zero).values()
    on = [None if part is None else part.to(device) for part in (x, scale, zero)]
    found = rounded(on[0], how, on[1], on[2])
    values = found.values.float().cpu()
    if found.scale is not None:
        by = found.scale.cpu()
        values *= by.repeat_interleave(found.span, 1) if found.span else by.view(-1, 1)
    assert torch.equal(values.nan_to_num(1e9), wanted.nan_to_num(1e9))


@triton.jit
def _store_byte_words(words, out):
    lane = tl.arange(0, 32)
    four = ()
    for j in tl.static_range(4):
        four = four + (tl.load(words + lane * 4 + j),)
    found = byte_words(four)
    for j in tl.static_range(8):
        tl.store(out + lane * 8 + j, found[j])


@pytest.mark.parametrize("device", DEVICES)
def test_integers_become_the_first_operand_of_tensor_cores_for_8_bit_floats(device):
    """Which lane has what is told by the PTX ISA, matrix fragments for `mma.m16n8k32`; `wgmma` has the same."""
    codes = torch.randint(16, (16, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moved = side_by_side(codes)
    assert torch.equal(side_by_side(moved, back=True), codes)
    (words,) = pack_tiles(moved, element("uint4"))
    found = torch.empty(32, 8, dtype=torch.int32, device=device)
    _store_byte_words[1,](words.to(device), found)
    # Registers of a product: rows g and g + 8, then those 16 columns beyond.
    values = found.cpu().view(torch.float8_e4m3fn).float().view(32, 2, 2, 2, 4) * 2**9
    for lane in range(32):
        for product, beyond, low, byte in np.ndindex(2, 2, 2, 4):
            row, column = lane // 4 + 8 * low, 32 * product + 16 * beyond + lane % 4 * 4 + byte
            assert values[lane, product, beyond, low, byte] == int(codes[row, column]) - 8


def checked(formats, activations, kernels, device, dtypes=(torch.bfloat16,), shapes=((24, 128),)):
    rows = tuple(row for row in backend.kernels() if row.name in kernels)
    if device == "cpu":
        rows = tuple(replace(row, device="cpu") for row in rows)
    found = SimpleNamespace(name="cuda", probe=lambda: None, kernels=lambda: rows)
    formats, activations = map(Format.parse, formats), tuple(map(Activation.parse, activations))
    return check_backend(
        found, formats=tuple(formats), activations=activations, dtypes=dtypes, shapes=shapes, devices=(device,)
    )


@pytest.mark.parametrize(
    ("weight", "activation", "kernels"),
    [
        ("INT4_G128", "dynamic:FP8_ROW", {"cuda.linear"}),
        ("UINT4_G128", "dynamic:INT8_ROW_ASYM", {"cuda.linear"}),
        ("MXFP4", "dynamic:FP8_1x128", {"cuda.linear"}),
        ("INT8_ROW_ASYM", "dynamic:FP8_1x128", {"cuda.linear"}),
        ("NVFP4", "local:NVFP4", {"cuda.grouped_mm"}),
        ("INT8_ROW_ASYM", "dynamic:INT8_ROW_ASYM", {"cuda.linear_bytes", "cuda.scaled_mm"}),
        ("INT8_ROW", "static:INT8_TENSOR_ASYM", {"cuda.grouped_mm", "cuda.grouped_mm_bytes"}),
        ("FP8_TENSOR", "static:FP8_TENSOR", {"cuda.linear", "cuda.linear_bytes"}),
        ("FP8_128x128", "dynamic:FP8_1x128", {"cuda.linear", "cuda.linear_bytes", "cuda.scaled_mm"}),
        ("FP8_128x128", "dynamic:FP8_1x128", {"cuda.grouped_mm_bytes"}),
        ("FP8_ROW", "dynamic:FP8_ROW", {"cuda.scaled_grouped_mm"}),
        ("e4m3fn:1x*:e8m0", "dynamic:e4m3fn:1x*:e8m0", {"cuda.scaled_mm"}),
    ],
)
def test_the_interpreted_kernels_pass(weight, activation, kernels):
    report = checked([weight], [activation], kernels, "cpu")
    assert {row.kernel for row in report.rows if row.runs > row.calls > 0} == kernels


@pytest.mark.gpu
@pytest.mark.parametrize(
    "weight",
    [
        *("INT4_G128", "UINT4_G128", "int3:1x64:bfloat16", "MXFP4", "NVFP4", "MXFP8", "MXFP6_E2M3"),
        *(
            "INT8_ROW",
            "INT8_ROW_ASYM",
            "INT8_TENSOR",
            "FP8_ROW",
            "FP8_TENSOR",
            "FP8_128x128",
            "int8:1x256:float32:zero=int8",
        ),
    ],
)
def test_the_kernels_pass(weight):
    shapes = ((136, 1152), (256, 4096))
    checked([weight], map(str, ACTIVATIONS), PRODUCTS, "cuda", (torch.bfloat16, torch.float16), shapes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("weight", "activation", "kernel"),
    [
        ("INT4_G128", "dynamic:FP8_ROW", packed),
        ("int4:1x*:float32", "dynamic:FP8_ROW", packed),
        ("MXFP4", "dynamic:FP8_ROW", packed),
        ("MXFP8", "dynamic:MXFP8", packed),
        ("NVFP4", "dynamic:NVFP4", packed),
        ("INT8_ROW", "dynamic:INT8_ROW_ASYM", plain_bytes),
        ("FP8_ROW", "dynamic:FP8_ROW", plain_bytes),
        ("FP8_TENSOR", "static:FP8_TENSOR", plain_bytes),
        ("FP8_128x128", "dynamic:FP8_1x128", plain_bytes),
        ("FP8_128x128-odd", "dynamic:FP8_1x128", plain_bytes),
    ],
)
def test_plans_for_any_number_of_tokens_agree(weight, activation, kernel):
    """With the exact product of what is multiplied, to what 8-bit floats lose in tensor cores and a bfloat16 rounds."""
    # Rows that are no whole blocks go by lowbit's kernels alone.
    weight, _, odd = weight.partition("-")
    n, k, how = 1152 + 8 * bool(odd), 2432, Activation.parse(activation)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4300, k, generator=generator).to("cuda", torch.bfloat16)
    values = (torch.randn(n, k, generator=generator) / k**0.5).to("cuda", torch.bfloat16)
    scale = choose_scale(x, how.format).scale.reshape(()) if how.scaling == "static" else None
    plain = lowbit.quantize(values, weight)
    q = QuantizedTensor.from_parts(
        *(plain.qdata, plain.scales, plain.format), k=k, dtype=torch.bfloat16, activation=how, act_scale=scale
    )
    parts, description = kernel.pack(q), Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    for name, part in kernel.unpack(parts, description).items():
        assert torch.equal(part.reshape(-1).view(torch.uint8), q.inner_tensors()[name].reshape(-1).view(torch.uint8))
    bias = torch.randn(n, generator=generator).to("cuda", torch.bfloat16)
    wide = q.dequantize(torch.float32).double().T
    # With the most, programs that stay have several tiles.
    for m in (1, 3, 16, 17, 64, 65, 130, 257, 600, 2100, 4300):
        wanted = quantize_input(x[:m], how, scale, None).values().double() @ wide + bias.double()
        error = (kernel.run(x[:m], parts, description, bias).double() - wanted).abs()
        # Sums that stay in tensor cores for 8-bit floats keep 13 bits of 2432 products.
        lost = 2e-2 if how.format.element.name == "e4m3fn" else 1e-3
        assert bool((error <= 2.0**-8 * wanted.abs() + lost * wanted.std()).all()), (m, float(error.max()))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("weight", "activation", "kernel"),
    [
        ("INT4_G128", "dynamic:FP8_ROW", packed),
        ("INT8_ROW", "dynamic:INT8_ROW_ASYM", plain_bytes),
        ("FP8_ROW", "dynamic:FP8_ROW", plain_bytes),
        ("FP8_128x128", "dynamic:FP8_1x128", plain_bytes),
    ],
)
@pytest.mark.parametrize("ends", [(300, 300, 301, 1000), (0, 7, 150, 190), (1000, 1001, 5000, 9001)])
def test_experts_with_many_tokens_have_their_own_product(weight, activation, kernel, ends):
    # Rows that are no whole blocks, and K in parts where experts are few.
    n, k, how = 392, 2048, Activation.parse(activation)
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(ends, dtype=torch.int32)
    x = torch.randn(int(ends[-1]) + 10, k, generator=generator).to("cuda", torch.bfloat16)
    values = (torch.randn(4, n, k, generator=generator) / k**0.5).to("cuda", torch.bfloat16)
    q = lowbit.quantize(values, weight, activation=how)
    parts, description = kernel.pack(q), Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    found = kernel.run_grouped(x, parts, description, ends.cuda()).double()
    start = 0
    for expert, end in zip(q.dequantize(torch.float32).double(), ends.tolist(), strict=True):
        if end > start:
            wanted = quantize_input(x[start:end], how, None, None).values().double() @ expert.T
            error = (found[start:end] - wanted).abs()
            assert bool((error <= 2.0**-8 * wanted.abs() + 2e-2 * wanted.std()).all()), (end, float(error.max()))
        start = end
    assert not bool(found[start:].any())


@pytest.mark.gpu
def test_nothing_waits_and_graphs_capture():
    for weight, activation, kernel in (
        ("INT4_G128", "dynamic:FP8_ROW", packed),
        ("INT8_ROW", "dynamic:INT8_ROW", plain_bytes),
        ("FP8_128x128", "dynamic:FP8_1x128", plain_bytes),
    ):
        values = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
        q = lowbit.quantize(values, weight, activation=activation)
        parts, description = kernel.pack(q), Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
        for m in (2, 300):
            x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
            wanted, graph = kernel.run(x, parts, description, None), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = kernel.run(x, parts, description, None)
            graph.replay()
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_sums_of_integers_are_exact(asymmetric):
    """As many large codes as float32 could not add up."""
    n, k, m = 24, 8192, 3
    how = Activation.parse(f"dynamic:INT8_ROW{'_ASYM' * asymmetric}")
    x = torch.rand(m, k, generator=torch.Generator().manual_seed(0)) + (0 if asymmetric else 1)
    q = lowbit.quantize(torch.rand(n, k, generator=torch.Generator().manual_seed(1)) + 1, "INT8_ROW", activation=how)
    description = Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    found = plain_bytes.run(x, plain_bytes.pack(q), description, None)
    tokens = quantize_input(x, how, None, None)
    zero = 0 if tokens.scales.zero is None else tokens.scales.zero.long()
    exact = ((tokens.codes().long() - zero) @ q.qdata.long().T).double()
    assert float(exact.max()) > 2**24
    wanted = exact * tokens.scales.scale.double() * q.scale.double().T
    assert bool(((found.double() - wanted).abs() <= 4 * 2.0**-24 * wanted.abs()).all())


@pytest.mark.parametrize(
    ("weight", "activation", "k", "reason"),
    [
        ("INT8_ROW", None, 64, "needs inputs that are rounded, too"),
        ("INT4_G128", "dynamic:FP8_ROW", 128, "needs int8 by int8, or e4m3fn by e4m3fn"),
        ("FP8_ROW", "dynamic:FP8_1x128", 128, "needs scales of rows or matrices, or of 128 columns"),
        ("MXFP8", "dynamic:MXFP8", 128, "needs scales of rows or matrices, or of 128 columns"),
        ("FP8_ROW", "dynamic:FP8_ROW", 72, "needs columns by the 16"),
        ("INT8_ROW_ASYM", "dynamic:INT8_ROW_ASYM", 33040, "needs integers whose sums 32 bits hold"),
    ],
)
def test_what_bytes_do_not_take_is_refused_with_the_reason(weight, activation, k, reason):
    how = None if activation is None else Activation.parse(activation)
    call = Call("linear", Format.parse(weight), how, "cpu", torch.bfloat16, 64, k)
    assert plain_bytes.refuses(call).startswith(reason)


@pytest.mark.parametrize(
    ("weight", "activation", "k", "reason"),
    [
        ("int7:1x*:float32", "dynamic:INT8_ROW", 4096, "needs integers whose sums"),
        ("INT4_G128", "dynamic:int8:1x32:float32", 128, "needs scales of inputs that are powers of two"),
        ("INT4_G128", "dynamic:FP8_128x128", 128, "needs inputs rounded under scales of rows"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_reason(weight, activation, k, reason):
    call = Call("linear", Format.parse(weight), Activation.parse(activation), "cpu", torch.bfloat16, 64, k)
    assert packed.refuses(call).startswith(reason)


@pytest.mark.parametrize(
    ("weight", "activation", "n", "told"),
    [
        ("FP8_ROW", "dynamic:FP8_ROW", 64, "beyond 16896 tokens torch's scaled_mm, which is faster there"),
        ("FP8_TENSOR", "dynamic:FP8_ROW", 1 << 16, "beyond 64 tokens torch's scaled_mm, which is faster there"),
        ("FP8_128x128", "dynamic:FP8_1x128", 128, "beyond 8448 tokens torch's scaled_mm, which is faster there"),
        ("FP8_128x128", "dynamic:FP8_1x128", 1 << 16, "beyond 32 tokens torch's scaled_mm, which is faster there"),
        ("FP8_128x128", "dynamic:FP8_1x128", 64, None),
        ("INT8_ROW", "dynamic:INT8_ROW", 64, None),
        ("INT4_G128", "dynamic:FP8_ROW", 64, "beyond 32 tokens codes become 8-bit floats"),
        ("MXFP4", "dynamic:FP8_ROW", 64, "from 512 tokens on the weight becomes 8-bit floats in memory for torch's"),
        ("MXFP4", "dynamic:FP8_ROW", 24, None),
        ("int4:1x256:bfloat16", "dynamic:FP8_ROW", 64, "beyond 32 tokens codes become 8-bit floats, up to them 16-bit"),
        ("INT4_G128", "dynamic:INT8_ROW", 64, None),
    ],
)
def test_what_runs_for_how_many_tokens_is_told(monkeypatch, weight, activation, n, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("lowbit_kernels_cuda.linear._device", lambda _: (132, True, True))
    monkeypatch.setattr("lowbit_kernels_cuda.byte_linear._device", lambda _: (132, True))
    call = Call("linear", Format.parse(weight), Activation.parse(activation), "cuda", torch.bfloat16, n, 128)
    module = packed if plain_bytes.refuses(call) else plain_bytes
    found = module.how(call)
    assert found is None if told is None else found.startswith(told)
    if weight == "INT4_G128" and told:
        # Experts' weights are never expanded, and each expert's tokens count.
        found = module.how(Call("grouped_mm", call.format, call.activation, "cuda", torch.bfloat16, n, 128))
        assert found.startswith("beyond 32 tokens an expert")
        assert "scaled_mm" not in found


@pytest.mark.parametrize("activation", ["dynamic:FP8_TENSOR", "dynamic:NVFP4"])
def test_one_scale_for_each_experts_rows_is_refused(activation):
    for kernel, weight in ((packed, "INT4_G128"), (plain_bytes, "FP8_TENSOR")):
        call = Call("grouped_mm", Format.parse(weight), Activation.parse(activation), "cpu", torch.bfloat16, 64, 128)
        assert kernel.refuses(call).startswith("needs inputs of experts rounded row by row, or under stored scales")


def test_a_scale_that_is_missing_is_asked_for():
    q = lowbit.quantize(torch.randn(16, 64), "FP8_ROW", activation="static:FP8_TENSOR")
    description = Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    for kernel in (packed, plain_bytes):
        with pytest.raises(FormatError, match="calibrate it"):
            kernel.run(torch.randn(2, 64), kernel.pack(q), description, None)


def test_no_tokens_give_no_rows():
    q = lowbit.quantize(torch.randn(16, 64), "FP8_ROW", activation="dynamic:FP8_ROW")
    description = Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    assert plain_bytes.run(torch.zeros(2, 0, 64), plain_bytes.pack(q), description, None).shape == (2, 0, 16)
    assert byte_linear.scaled_mm(*_nothing(q)).shape == (0, 16)


def _nothing(q):
    none = (torch.zeros(0, 64, dtype=torch.float8_e4m3fn), torch.zeros(0, 1), None, None)
    return (*none, q.qdata, q.scale, None, None, None, "FP8_ROW", "FP8_ROW", 64, torch.float32)
