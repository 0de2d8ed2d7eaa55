"""Products with weights that alone are in low precision, against float64 and the order of tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowbit
from lowbit.backends import Call, Description
from lowbit.element import element
from lowbit.errors import FormatError
from lowbit.format import Format
from lowbit.grid import product_bound
from lowbit.testing import FORMAT_GRID, check_backend
from lowbit_kernels_cuda import linear
from lowbit_kernels_cuda.backend import backend
from lowbit_kernels_cuda.packed import pack, refuses, run, unpack
from lowbit_kernels_cuda.weights import pack_scales, pack_tiles, parts, unpack_scales, unpack_tiles

PRODUCTS = {"linear", "grouped_mm"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPECS = (
    "INT4_G128",
    "UINT4_G128",
    "INT8_ROW_ASYM",
    "int8:1x64:bfloat16:zero=int8",
    "FP8_ROW",
    "FP8_128x128",
    "MXFP8_E5M2",
    "MXFP6_E2M3",
    "MXFP4",
    "NVFP4",
    "MXINT8",
    "int2:1x32:bfloat16",
    "uint3:1x192:float16:zero=uint3",
    "int5:1x*:float32",
    "int7:1x16:float32",
)
# The interpreter is slow: every way to read codes and scales, and on a GPU all.
QUICK = {"UINT4_G128", "INT8_ROW_ASYM", "FP8_ROW", "FP8_128x128", "MXFP8_E5M2", "MXFP4", "NVFP4", "int7:1x16:float32"}


def weight(spec, n, k, *, dtype=torch.bfloat16, device="cpu", outliers=False):
    generator = torch.Generator().manual_seed(n + k)
    values = torch.randn(n, k, generator=generator)
    if outliers:
        values[:, ::97] *= 50
    return lowbit.quantize((values / k**0.5).to(device, dtype), spec)


def packed(q):
    return pack(q), Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))


def within(y, x, q, bias=None):
    """Whether `y` is the product in float64, but for sums in float32, weights rounded to x's type, and one rounding."""
    values, eps = q.dequantize(torch.float32).double(), torch.finfo(x.dtype).eps
    size = x.double().abs() @ values.abs().T
    wanted = x.double() @ values.T
    error = product_bound(x.float(), values) + eps / 2 * size + 4 * 2.0**-24 * size
    if bias is not None:
        wanted = wanted + bias.double()
        error = error + 2.0**-24 * wanted.abs()
    # Below the smallest normal number steps are no finer.
    error = error + eps / 2 * (wanted.abs() + error).clamp_min(torch.finfo(x.dtype).smallest_normal)
    return bool(((y.double() - wanted).abs() <= error).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_the_first_operand_of_tensor_cores(bits):
    """Which lane has what is told by the PTX ISA, matrix fragments for `mma.m16n8k16`; `wgmma` has the same."""
    n, k, kind = 32, 128, element(f"uint{bits}")
    codes = torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_tiles(codes, kind)
    assert [word.shape[-1] for word in words] == list(parts(bits))
    for lane in range(32):
        for step in range(4):
            for register in range(4):
                for half in range(2):
                    row = lane // 4 + 8 * (register % 2)
                    column = 16 * step + lane % 4 * 2 + half + 8 * (register // 2)
                    found, at = torch.zeros(2, 2, dtype=torch.int64), 0
                    for size, word in zip(parts(bits), words, strict=True):
                        pair = step * 4 + register
                        shift = size * (pair % (16 // size)) + 16 * half
                        field = word[:, :, lane, pair // (16 // size)].to(torch.int64) >> shift & (1 << size) - 1
                        found |= field << at
                        at += size
                    assert torch.equal(found, codes[row::16, column::64].to(torch.int64))
    assert torch.equal(unpack_tiles(words, kind, n, k), codes)


@pytest.mark.parametrize("name", ["e2m1", "e4m3fn"])
def test_bits_of_floats_are_few_shifts_from_those_of_bfloat16(name):
    kind = element(name)
    codes = torch.arange(1 << kind.bits, dtype=torch.uint8).repeat(16 * 64 >> kind.bits).view(16, 64)
    plain, found = (pack_tiles(codes, element(each))[0].to(torch.int64) for each in (f"uint{kind.bits}", name))
    assert torch.equal(unpack_tiles((found.to(torch.int32),), kind, 16, 64), codes)
    sign, size, to = 1 << kind.bits - 1, (1 << kind.bits - 1) - 1, 7 - kind.mantissa
    for half in (0, 16):
        for code in range(16 // kind.bits):
            wanted = plain >> (half + kind.bits * code)
            word = found >> half & 0xFFFF
            if name == "e4m3fn":
                bits = word & 0x87F0 if code == 0 else (word << 4 & 0x80F0) | (word >> 4 & 0x700)
            elif code < 3:
                bits = word << 3 * code & 0x81C0
            else:
                bits = (word << 1 & 0x8000) | (word >> 4 & 0xC0) | (word >> 5 & 0x100)
            assert torch.equal(bits, (wanted & sign) << 16 - kind.bits | (wanted & size) << to)


@pytest.mark.parametrize("group", [0, 16, 32, 64, 128])
def test_scales_are_beside_those_of_eight_rows_below(group):
    n, count = 40, 1 if group == 0 else 256 // group
    scales = torch.arange(n * count).view(n, count)
    found = pack_scales(scales, group)
    per = max(64 // group, 1) if group else 1
    for row in (0, 7, 8, 21, 39):
        for at in range(count):
            assert found[row // 16, at // per, row % 8, row // 8 % 2, at % per] == scales[row, at]
    assert torch.equal(unpack_scales(found, n, count), scales)


@pytest.mark.parametrize("spec", SPECS)
def test_packing_is_undone_and_takes_no_more_room(spec):
    q = weight(spec, 128, 384)
    parts_, description = packed(q)
    back = unpack(parts_, description)
    for name, part in q.inner_tensors().items():
        assert back[name].dtype == part.dtype
        assert torch.equal(back[name].contiguous().view(torch.uint8), part.contiguous().view(torch.uint8))
    if q.format.block_for(2)[0] == 1:
        size = [sum(part.numel() * part.itemsize for part in found) for found in (parts_, q.inner_tensors().values())]
        assert size[0] <= 1.1 * size[1]


@pytest.mark.parametrize(
    ("spec", "device"),
    [pytest.param(spec, "cpu", marks=() if spec in QUICK else pytest.mark.slow) for spec in SPECS]
    + [pytest.param(spec, "cuda", marks=pytest.mark.gpu) for spec in SPECS],
)
def test_products_are_those_of_float64(spec, device):
    generator = torch.Generator().manual_seed(1)
    group = Format.parse(spec).block_for(2)[-1]
    # Rows that end within a tile, columns that end within a step, and one group; tokens of every plan.
    cases = [
        (torch.bfloat16, 72, 384, (1, 17), False),
        (torch.float16, 40, 384, (20,), True),
        (torch.bfloat16, 16, group or 64, (70,), True),
    ]
    if device == "cuda":
        cases += [(torch.bfloat16, 1040, 1152, (1, 16, 32, 64, 130, 300), outliers) for outliers in (False, True)]
        cases += [(torch.float16, 1040, 1152, (5, 64, 300), False)]
    for dtype, n, k, ms, outliers in cases:
        q = weight(spec, n, k, dtype=dtype, device=device, outliers=outliers)
        parts_, description = packed(q)
        for m in ms:
            bias = torch.randn(n, generator=generator).to(device, dtype) if m % 2 else None
            x = torch.randn(m, k, generator=generator)
            if outliers:
                x[:, 5::61] *= 30
            x = x.to(device, dtype)
            assert within(run(x[None], parts_, description, bias)[0], x, q, bias), (dtype, n, k, m)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", ["MXFP4", "MXFP8", "MXFP6_E3M2"])
def test_scales_make_up_for_exponents_of_codes_where_they_can(spec, device):
    """Up to 2, or a few times that: scales are packed so that they are one product with what codes lack."""
    generator = torch.Generator().manual_seed(2)
    for by in (1, 2.0**14):
        values = (torch.randn(32, 128, generator=generator) * by).to(torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float16):
            q = lowbit.quantize(values.to(device), spec)
            parts_, description = packed(q)
            assert (parts_[len(parts(q.format.element.bits))].dtype == torch.uint8) == (by == 1)
            back = unpack(parts_, description)["scale"]
            assert back.dtype == q.scale.dtype
            assert torch.equal(back.view(torch.uint8), q.scale.view(torch.uint8))
            x = (torch.randn(20, 128, generator=generator) / by).to(device, dtype)
            assert within(run(x, parts_, description, None), x, q)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", ["NVFP4", "e2m3:1x16:e4m3fn"])
def test_e4m3_scales_are_packed_without_subnormals(spec, device):
    """All of them, subnormal ones and 0 too; but not where codes under 0 would become numbers."""
    generator = torch.Generator().manual_seed(3)
    n, k = 16, 128
    q = lowbit.quantize(torch.randn(n, k, generator=generator).to(device, torch.bfloat16), spec)
    every = torch.arange(127, dtype=torch.uint8, device=device).repeat(2)[: n * k // 16].view(n, -1)
    scale = every.view(torch.float8_e4m3fn)
    count = len(parts(q.format.element.bits))
    for zeros in (True, False):
        inner = q.inner_tensors() | {"scale": scale}
        if zeros:
            plain = q.with_inner(inner).dequantize(torch.float32)
            codes = lowbit.quantize(plain, spec, scale, tensor_scale=q.tensor_scale).qdata
            inner["qdata"] = torch.where(
                scale.float().repeat_interleave(8 * q.format.element.bits // 4, 1) > 0, codes, 0
            )
        changed = q.with_inner(inner)
        parts_, description = packed(changed)
        assert (parts_[count].dtype == torch.uint8) == zeros
        back = unpack(parts_, description)
        for name, part in changed.inner_tensors().items():
            assert torch.equal(back[name].view(torch.uint8), part.contiguous().view(torch.uint8))
        for dtype in (torch.bfloat16, torch.float16):
            # Small enough for float16.
            x = (torch.randn(20, k, generator=generator) / 512).to(device, dtype)
            assert within(run(x, parts_, description, None), x, changed)


def test_a_scale_of_minus_zero_is_packed_as_it_is():
    q = lowbit.quantize(torch.zeros(16, 64, dtype=torch.bfloat16), "NVFP4")
    scale = q.scale.view(torch.uint8).fill_(0x80).view(q.scale.dtype)
    parts_, description = packed(q.with_inner(q.inner_tensors() | {"scale": scale}))
    assert torch.equal(unpack(parts_, description)["scale"].view(torch.uint8), scale.view(torch.uint8))
    assert bool((run(torch.ones(1, 64, dtype=torch.bfloat16), parts_, description, None) == 0).all())


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_may_begin_anywhere(device):
    q = weight("INT4_G128", 32, 128, device=device)
    parts_, description = packed(q)
    for m in (3, 70):
        x = (
            torch.randn(m * 128 + 3, generator=torch.Generator().manual_seed(0))
            .to(device, torch.bfloat16)[3:]
            .view(m, 128)
        )
        assert within(run(x, parts_, description, None), x, q)
        assert within(run(x[:, :64].repeat(1, 2), parts_, description, None), x[:, :64].repeat(1, 2), q)


def test_no_tokens_give_no_rows():
    parts_, description = packed(weight("MXFP4", 32, 64))
    assert run(torch.zeros(2, 0, 64, dtype=torch.bfloat16), parts_, description, None).shape == (2, 0, 32)


@pytest.mark.parametrize("spec", ["INT4_G128", "NVFP4"])
def test_the_interpreted_kernels_pass(spec):
    rows = tuple(
        replace(row, device="cpu") for row in backend.kernels() if row.name in {"cuda.linear", "cuda.grouped_mm"}
    )
    interpreted = SimpleNamespace(name="cuda", probe=lambda: None, kernels=lambda: rows)
    report = check_backend(
        interpreted,
        formats=(Format.parse(spec),),
        activations=(),
        dtypes=(torch.bfloat16,),
        shapes=(),
        devices=("cpu",),
    )
    assert all(row.runs > row.calls > 0 for row in report.rows)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [str(fmt) for fmt in FORMAT_GRID if not refuses(Call("linear", fmt, None, "cuda", torch.bfloat16, 64, 1152))],
)
def test_the_kernels_pass(spec):
    found = SimpleNamespace(
        name="cuda", probe=lambda: None, kernels=lambda: tuple(r for r in backend.kernels() if r.op in PRODUCTS)
    )
    formats, dtypes = (Format.parse(spec),), (torch.bfloat16, torch.float16)
    check_backend(found, formats=formats, activations=(), dtypes=dtypes, shapes=((136, 1152),), devices=("cuda",))


def test_compilers_see_one_operator_whatever_the_tokens():
    q = weight("INT4_G128", 80, 256)
    parts_, description = packed(q)
    arguments = [list(parts_), description.names[1:], str(q.format), "", (80, 256), None, None, None]
    x = torch.randn(7, 256).to(torch.bfloat16)
    torch.library.opcheck(torch.ops.lowbit_cuda.linear.default, ("linear", x, *arguments))
    count = 0

    def counted(graph, _):
        nonlocal count
        count += 1
        assert [node.target for node in graph.graph.nodes if node.op == "call_function"].count(
            torch.ops.lowbit_cuda.linear.default
        ) == 1
        return graph.forward

    compiled = torch.compile(
        lambda x: run(x, parts_, description, None) + 1, backend=counted, fullgraph=True, dynamic=True
    )
    for m in (7, 8, 9):
        x = torch.randn(m, 256).to(torch.bfloat16)
        assert torch.equal(compiled(x), run(x, parts_, description, None) + 1)
    assert count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["INT4_G128", "MXFP4"])
def test_a_bound_layer_compiles_is_captured_and_repeats_itself(spec):
    layer = nn.Linear(1024, 512, dtype=torch.bfloat16, device="cuda")
    q = lowbit.quantize(layer.weight.detach(), spec)
    layer.weight = nn.Parameter(q, requires_grad=False)
    assert [row.kernel for row in lowbit.bind(layer).rows] == ["cuda.linear"]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (1, 2, 16, 33, 64, 200):
            x = torch.randn(m, 1024, dtype=torch.bfloat16, device="cuda")
            y = layer(x)
            assert within(y, x, q, layer.bias)
            assert torch.equal(layer(x), y)
            assert torch.equal(compiled(x), y)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(x)
            captured.zero_()
            graph.replay()
            graph.replay()
            assert torch.equal(captured, y)


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other():
    parts_, description = packed(weight("INT4_G128", 4096, 4096, device="cuda"))
    x = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda")
    wanted = run(x, parts_, description, None)
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(x, parts_, description, None))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in found)


def test_what_is_not_taken_is_refused_with_the_reason():
    def reason(spec, k=768, dtype=torch.bfloat16):
        return refuses(Call("linear", Format.parse(spec), None, "cuda", dtype, 64, k))

    assert reason("INT4_G128") is None
    assert reason("MXFP4", dtype=torch.float32) == "needs inputs in bfloat16 or float16; these are torch.float32"
    assert reason("int4:1x24:bfloat16").startswith(
        "needs scales of 16 or 32 columns, or of multiples of 64; this is int4"
    )
    assert reason("INT8_ROW", k=100) == "needs columns by the 8; this weight has 100"


def test_what_is_no_number_is_refused_before_it_is_packed():
    q = weight("FP8_ROW", 16, 64)
    broken = q.with_inner(q.inner_tensors() | {"qdata": torch.full((16, 64), float("nan")).to(q.qdata.dtype)})
    with pytest.raises(FormatError, match="codes of e4m3fn that are no numbers"):
        pack(broken)
    q = weight("NVFP4", 16, 64)
    for value in (float("nan"), -1.0):
        scale = torch.full(q.scale.shape, value).to(q.scale.dtype)
        with pytest.raises(FormatError, match="scales that are no numbers, or negative ones"):
            pack(q.with_inner(q.inner_tensors() | {"scale": scale}))


@pytest.mark.gpu
def test_graphs_keep_their_counters(monkeypatch):
    """Also once there are new ones, which calls beside it take."""
    parts_, description = packed(weight("INT4_G128", 4096, 4096, device="cuda"))
    x = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(linear, "_SPARE", {})
    monkeypatch.setattr(linear, "_STOCK", 1 << 10)
    wanted, graphs = run(x, parts_, description, None), []
    for _ in range(8):
        run(x, parts_, description, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(x, parts_, description, None)
        graphs.append((graph, captured))
    # Where counters of graphs stood, if nobody kept them, others may write now.
    noise = [torch.full((1 << 10,), 7, dtype=torch.int32, device="cuda") for _ in range(64)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(10):
        for (graph, captured), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                captured.zero_()
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(captured, wanted) for _, captured in graphs)
    assert all(bool((each == 7).all()) for each in noise)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the assembler in Triton's wheels for Linux")
def test_kernels_are_assembled_for_every_architecture():
    """Without a GPU they do not run, but it is known what Triton makes of them."""
    script = Path(__file__).with_name("assemble.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = ["90 INT4_G128", "90 MXFP4", *(f"90 {name} as bytes" for name in ("INT4_G128", "int4:1x*:float32"))]
    wanted += [f"90 blocks of {size}" for size in ("64 by 64", "128 by 128", "128 by 256")]
    wanted += ["90 rows of INT8_ROW", "90 rows of FP8_ROW"]
    wanted += ["90 three INT4_G128", "90 three UINT4_G128"]
    wanted += ["80 INT4_G128", "80 INT8_ROW", "90 NVFP4", "100 NVFP4"]
    wanted += [f"{each} by bytes" for each in ("80 INT8_ROW", "90 FP8_ROW", "90 FP8_1x128")]
    rounded = ("80 INT8_ROW_ASYM", "90 FP8_ROW", "90 NVFP4", "90 FP8_ROW norm", "90 FP8_1x128 silu")
    wanted += [f"{each} inputs" for each in rounded]
    wanted += ["90 INT4_G128 expanded", "90 MXFP4 expanded"]
    wanted += ["80 FP8 by _mean _round attend_codes", "90 INT8_FP8_ROTATED by _mean _round attention_wgmma"]
    wanted += ["100 INT8 by _mean _round attend_codes"]
    wanted += [f"{each} caches" for each in ("80 FP8_ROW", "90 FP8_ROW", "100 INT8_ROW")]
    assert done.stdout.splitlines() == wanted, done.stderr[-2000:]
