"""Every kernel on every instruction set of this machine, against what the formats say must come out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.backends import Description, kernel
from lowbit.errors import FormatError
from lowbit.testing import sample
from lowbit_kernels_x86 import casts, library, weights
from lowbit_kernels_x86.backend import backend

FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
SETS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"},
}
SETS["avx512_vnni"] = SETS["avx512"] | {"avx512_vnni"}
SETS["avx512_bf16"] = SETS["avx512_vnni"] | {"avx512_bf16", "avx512vbmi"}
SETS["amx"] = SETS["avx512_bf16"] | {"amx_tile", "amx_int8", "amx_bf16"}
HERE = [name for name, needed in SETS.items() if needed <= set(FLAGS)]
# Of Intel's processors, those without AMX multiply pairs of bfloat16s more slowly than float32s.
BEST = "avx512_vnni" if HERE and HERE[-1] == "avx512_bf16" and "GenuineIntel" in FLAGS else HERE[-1] if HERE else ""
# Products of their own, and all else of the set before.
OF_PRODUCTS = {"avx512_bf16", "amx"}
pytestmark = pytest.mark.skipif(not library.FILE.exists(), reason="there is no library for this processor or system")

CHECK = """
    import sys
    from types import SimpleNamespace
    import torch
    from lowbit.activation import Activation
    from lowbit.testing import check_backend
    from lowbit_kernels_x86 import library
    from lowbit_kernels_x86.backend import backend
    print(library.isa())
    # Slow without wide registers, whose integers EXACT has.
    rounded = [] if library.isa() == "scalar" else [Activation.parse("dynamic:INT8_ROW_ASYM")]
    # Sets differ in how they multiply, not in how they read inputs; some multiply bfloat16s as they are.
    dtypes = (torch.bfloat16,) if library.isa() in {"avx512_bf16", "amx"} else (torch.float32,)
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if "best" in sys.argv else dtypes
    if "products" in sys.argv:
        products = tuple(kernel for kernel in backend.kernels() if kernel.op in {"linear", "grouped_mm"})
        backend = SimpleNamespace(name="x86", probe=backend.probe, kernels=lambda: products)
    report = check_backend(backend, activations=rounded, dtypes=dtypes)
    assert all(row.runs > row.calls > 0 for row in report.rows), report
"""


# Scales of 1, sums below 2^24: float32 has every bit, of the largest codes and of those that are cut off.
EXACT = """
    import torch, lowbit
    from lowbit_kernels_x86 import library
    from lowbit_kernels_x86.weights import pack

    x = torch.randint(-128, 128, (45, 256), generator=torch.Generator().manual_seed(0)).float()
    x[0], x[1], x[2] = 127, -128, 1000
    codes = x.clamp(-135, 120).long()
    act = "static:int8:*x*:float32:zero=int8", torch.ones(1), torch.tensor([7], dtype=torch.int8)
    for spec in ("int8:1x*:float32", "int8:16x128:float32", "int8:1x*:float32:zero=int8", "int4:1x*:float32",
                 "uint4:1x*:float32:zero=uint4", "int2:1x*:float32", "uint1:1x*:float32:zero=uint1", "int4:1x64:float32",
                 "uint8:1x32:float32:zero=uint8"):
        for k in (256,) if spec in {"int4:1x64:float32", "uint8:1x32:float32:zero=uint8"} else (160, 200, 256):
            q = lowbit.quantize(torch.randn(37, k, generator=torch.Generator().manual_seed(1)), spec)
            q.scale.fill_(1)
            wanted = codes[:, :k] @ q.dequantize(torch.float32).long().T
            packed, scale, *zero = pack(q)
            for tokens in (1, 3, 11, 45):
                rest = *(zero or [None]), *[None] * 4, spec, 37, *act
                found = torch.ops.lowbit_x86.linear(x[:tokens, :k].contiguous(), packed, scale, *rest)
                assert torch.equal(found.long(), wanted[:tokens]), (spec, k, tokens)
"""

# Few tokens meet integers without being rounded: inputs far apart, all 0, too small for digits, and not finite.
DIGITS = """
    import torch, lowbit
    from lowbit_kernels_x86.weights import pack

    x = torch.randn(6, 4096, generator=torch.Generator().manual_seed(0))
    x[1, 7], x[2] = 1e4, 0
    x[3, 100], x[4] = -3e4, 1e-35
    for spec in ("int8:1x*:float32", "int8:1x*:float32:zero=int8", "int4:1x128:bfloat16", "uint4:1x32:float32:zero=uint4",
                 "int2:1x64:bfloat16", "uint1:1x*:float32:zero=uint1"):
        w = torch.randn(37, 4096, generator=torch.Generator().manual_seed(1))
        bias = torch.randn(37, generator=torch.Generator().manual_seed(2))
        for k in (4096, 160 if "x*" in spec else 4096 - 128):
            q = lowbit.quantize(w[:, :k].contiguous(), spec)
            packed, scale, *zero = pack(q)
            values = q.dequantize(torch.float32).double()
            for first, last in ((0, 1), (1, 2), (0, 2), (1, 4), (0, 4), (4, 5), (3, 5)):
                some = x[first:last, :k].contiguous()
                rest = *(zero or [None]), None, None, bias, None, spec, 37, "", None, None
                found = torch.ops.lowbit_x86.linear(some, packed, scale, *rest).double()
                # What float32 loses of sums of so many, and what digits lose of the largest input.
                size = some.double().abs()
                bound = 2.0**-16 * (size @ values.abs().T + bias.double().abs())
                bound += 2.0**-30 * size.amax(1, keepdim=True) * values.abs().sum(1)
                error = (found - some.double() @ values.T - bias.double()).abs()
                assert bool((error <= bound).all()), (spec, k, first, last, float((error / bound).max()))
            some = x[:2, :k].clone()
            some[1, 5] = float("nan")
            found = torch.ops.lowbit_x86.linear(some, packed, scale, *rest)
            assert bool(found[1].isnan().all()), spec
            assert bool(found[0].isfinite().all()), spec
"""

# More scales than a vector has, with zero points, and without any, which are 0 then.
BAGS = """
    import torch, lowbit
    from lowbit_kernels_x86 import library

    library.isa()
    ids, offsets = torch.arange(40).repeat(3)[:111], torch.tensor([0, 1, 1, 30])
    for bits in range(1, 9):
        for end in ("", ":zero=uint8", *[":zero=int8"] * (bits < 8)):
            for group in (8, 24):
                spec = f"uint{bits}:1x{group}:float32{end}"
                q = lowbit.quantize(torch.randn(40, group * 35, generator=torch.Generator().manual_seed(0)), spec)
                rows = q.dequantize(torch.float32)
                rest = -1, False, spec, rows.shape[1], torch.float32
                for mode in ("sum", "max"):
                    found = torch.ops.lowbit_x86.embedding_bag(ids, offsets, None, *q.stored, mode, *rest)
                    wanted = torch.nn.functional.embedding_bag(ids, rows.double(), offsets, mode=mode)
                    assert bool((found - wanted).abs().amax() <= 2**-18 * wanted.abs().amax()), (spec, mode)
                found = torch.ops.lowbit_x86.embedding(ids, *q.stored, spec, rows.shape[1], torch.float32)
                assert torch.equal(found, rows[ids]), spec
"""


def in_process(code, isa, *arguments):
    environment = {**os.environ, "LOWBIT_X86_ISA": isa, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    line = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(line, check=False, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", HERE)
def test_every_set_of_instructions_passes(isa):
    """In one process each: it takes seconds to import torch."""
    code = [CHECK, EXACT, DIGITS, *([] if isa in OF_PRODUCTS else [BAGS])]
    told = ["best"] if isa == BEST else ["products"] if isa in OF_PRODUCTS else []
    done = in_process("".join(map(textwrap.dedent, code)), isa, *told)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_the_best_set_runs_and_others_are_refused():
    assert backend.probe() is None
    assert library.isa() == os.environ.get("LOWBIT_X86_ISA", BEST)
    done = in_process("from lowbit_kernels_x86.backend import backend\nprint(backend.probe())", "avx9")
    assert done.stdout.strip() == f"LOWBIT_X86_ISA is avx9; it must be one of {', '.join(reversed(SETS))}"


def packed(spec, shape, dtype=torch.float32):
    q = lowbit.quantize(sample(shape, dtype=dtype), spec)
    return q, weights.pack(q), Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))


MANY = ("INT4_G128", "UINT4_G128", "int3:1x64:float32:zero=int3", "MXFP6_E2M3", "NVFP4", "MXFP8", "FP8_ROW")
MANY += ("e5m2:1x96:float32", "int2:1x32:bfloat16", "int1:1x16:e8m0", "uint1:1x48:float32:zero=uint1", "INT8_ROW_ASYM")
MANY += ("uint8:1x64:float32:zero=uint8", "int4:1x16:e4m3fn", "int4:1x48:float16", "int5:1x*:float32")


@pytest.mark.parametrize("spec", MANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_many_tokens_and_long_rows(spec, dtype):
    """Beyond one chunk of tokens, one panel of columns, and not by whole tiles or panels."""
    q, parts, description = packed(spec, (77, 1152))
    right = q.dequantize(torch.float32).double()
    for tokens in (1, 2, 4, 7, 13, 33, 96, 97, 257, 300):
        x, bias = sample((tokens, 1152), seed=1, dtype=dtype), sample((77,), seed=2, dtype=dtype)
        found, left = weights.run(x, parts, description, bias), x.double()
        wanted, size = left @ right.T + bias.double(), left.abs() @ right.abs().T + bias.double().abs()
        # Scales on sums or on values, and sums in any order; of codes before their zero points are taken away.
        lost = (1152 + 8) * 2.0**-24 * size
        if q.format.zero is not None:
            lost = lost + 1152 * 2.0**-24 * left.abs() @ (right.abs() + 256 * q.scale.float().max().double()).T
        rounded = torch.finfo(dtype).eps / 2 * (wanted.abs() + lost)
        assert ((found.double() - wanted).abs() <= lost + rounded).all(), tokens


@pytest.mark.skipif("avx512_bf16" not in HERE[:-1], reason="needs a processor with AMX, whose second best set this is")
def test_pairs_of_bfloat16s_are_multiplied_without_tiles_too():
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "many_tokens",
    ]
    environment = {**os.environ, "LOWBIT_X86_ISA": "avx512_bf16"}
    done = subprocess.run(line, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_numbers_too_small_for_pairs_are_kept():
    """A multiplication of pairs would take subnormal numbers for 0."""
    _, parts, description = packed("FP8_ROW", (16, 64), torch.bfloat16)
    for tokens in (1, 20):
        x = torch.full((tokens, 64), 2.0**-130, dtype=torch.bfloat16)
        assert weights.run(x, parts, description, None).count_nonzero() > 0


SPECS = [
    *("int8:1x*:float32", "int4:1x40:bfloat16", "uint3:1x8:float16:zero=uint3", "int5:1x24:float32:zero=int8"),
    *("uint1:1x5:float32", "int1:1x16:e8m0", "e2m1:1x16:e4m3fn:tensor", "e2m3:1x32:e8m0", "e5m2:1x*:float32"),
    *("e4m3fn:1x48:e8m0", "e3m2:1x64:e4m3fn", "uint4:1x128:e4m3fn:zero=uint4"),
]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_the_references(spec, rounding):
    """To the bit, of rows that end within a vector, of tiny and huge numbers and of those halfway between codes."""
    run, reference, fmt = casts.quantize, kernel("reference.quantize").run, lowbit.Format.parse(spec)
    group = fmt.block[-1] or 7
    generator = torch.Generator().manual_seed(0)
    for trial, magnitude in enumerate((1.0, 3e-38, 2e38, 1e-3, 40.0)):
        shape = (*((2, 3)[: trial % 3]), group * (2 * trial + 1))
        x = torch.randn(shape, generator=generator) * magnitude
        x = x.round() / 2 if magnitude == 40 else x
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # Of what is not finite any codes will do.
            most = torch.finfo(dtype).max / 4
            values = x.clamp(-most, most).to(dtype)
            for mode in ("floor", "ceil", "even", "rceil") if fmt.scale.powers_of_two else ("even",):
                how = spec, mode, rounding, trial - 2
                found, wanted = run(values, None, None, None, *how), reference(values, None, None, None, *how)
                assert all(map(same_bits, found, wanted)), (shape, dtype, mode)
            scale, *rest = wanted[1:]
            given = scale, rest.pop(0) if fmt.zero else None, rest.pop(0) if fmt.tensor_scale else None
            assert all(map(same_bits, run(values * 2, *given, *how), reference(values * 2, *given, *how)))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_values_without_a_row_and_bad_arguments():
    for shape in ((0, 32), (3, 0), (2, 0, 32)):
        spec = "int8:1x*:float32" if shape[-1] == 0 else "e2m1:1x32:e8m0"
        arguments = torch.ones(shape), None, None, None, spec, "even", "nearest", 0
        assert all(map(same_bits, casts.quantize(*arguments), kernel("reference.quantize").run(*arguments)))
    x, scale = torch.ones(2, 64), torch.ones(2, 1)
    for words, arguments in {
        "scale mode 'up' is unknown": (x, None, None, None, "e2m1:1x32:e8m0", "up", "nearest", 0),
        "rounding 'up' is unknown": (x, None, None, None, "e2m1:1x32:e8m0", "even", "up", 0),
        "not a multiple of block 32": (x[:, :40], None, None, None, "e2m1:1x32:e8m0", "even", "nearest", 0),
        "scale is torch.float32": (x, scale, None, None, "int8:1x32:float32", "even", "nearest", 0),
        "has no tensor scale": (x, None, None, scale, "int8:1x*:float32", "even", "nearest", 0),
        "needs zero points": (x, scale, None, None, "int8:1x*:float32:zero=int8", "even", "nearest", 0),
        "needs tensor scale": (x, torch.ones(2, 4).to(torch.float8_e4m3fn), None, None, "NVFP4", "even", "nearest", 0),
    }.items():
        with pytest.raises(FormatError, match=re.escape(words)):
            casts.quantize(*arguments)


def test_values_that_are_not_finite_stay():
    """NaN and infinity among codes and scales come out where the format has them, padding or not."""
    q = lowbit.quantize(torch.ones(3, 40), "e5m2:1x*:float32")
    q.qdata.view(torch.uint8)[0, 3], q.qdata.view(torch.uint8)[1, 39] = 0x7C, 0x7F
    description = Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    for tokens in (1, 8):
        found = weights.run(torch.ones(tokens, 40), weights.pack(q), description, None)
        assert (found[:, 0] == torch.inf).all()
        assert found[:, 1].isnan().all()
        assert found[:, 2].isfinite().all()
    q = lowbit.quantize(torch.ones(2, 48), "e4m3fn:1x16:e8m0")
    q.scale.view(torch.uint8)[0, 2] = 255
    q.qdata.view(torch.uint8)[1, 47] = 0x7F
    description = Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    assert weights.run(torch.ones(1, 48), weights.pack(q), description, None).isnan().all()


def test_zero_points_may_be_signed_where_codes_are_not():
    q = lowbit.quantize(sample((20, 64)), "uint4:1x32:float32:zero=int8")
    q.zero.copy_(torch.arange(-20, 20).view(20, 2))
    description = Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    wide = (q.qdata[..., None] >> torch.tensor([0, 4]) & 15).flatten(-2).float()
    values = (wide.view(20, 2, 32) - q.zero[..., None]) * q.scale[..., None]
    assert torch.equal(
        torch.ops.lowbit_x86.dequantize(*q.stored, str(q.format), 64, torch.float32), values.view(20, 64)
    )
    for tokens in (1, 8):
        x = sample((tokens, 64), seed=1)
        found = weights.run(x, weights.pack(q), description, None)
        torch.testing.assert_close(found, x @ values.view(20, 64).T, rtol=1e-5, atol=1e-3)


def test_bad_arguments_are_refused_before_anything_runs():
    linear, embedding = torch.ops.lowbit_x86.linear, torch.ops.lowbit_x86.embedding
    _, (codes, scale), _ = packed("INT4_G128", (20, 256))
    rest, x, spec = (None,) * 5, torch.ones(2, 256), "int4:1x128:bfloat16"
    assert linear(x, codes, scale, *rest, spec, 20).shape == (2, 20)
    for words, arguments in {
        "codes must have 512 numbers; it has shape (1, 2, 32, 16)": (
            x[:, :128].contiguous(),
            codes,
            scale,
            *rest,
            spec,
            20,
        ),
        "codes must have 1024 numbers": (x, codes[..., :15].contiguous(), scale, *rest, spec, 20),
        "scale must have 96 numbers": (x, torch.cat([codes, codes[:, :1]], 1), scale, *rest, spec, 40),
        "scale has a dtype": (x, codes, scale.float(), *rest, spec, 20),
        "x has a dtype": (x.double(), codes, scale, *rest, spec, 20),
        "x must be contiguous": (torch.ones(256, 2).t(), codes, scale, *rest, spec, 20),
        "bias must have 20 numbers": (x, codes, scale, *rest[:3], torch.ones(3), None, spec, 20),
        "bias has a dtype": (x, codes, scale, *rest[:3], torch.ones(20).bfloat16(), None, spec, 20),
        "zero points must be given": (x, codes, scale, codes, *rest[1:], spec, 20),
        "offs must not fall": (x, codes, scale, *rest[:4], torch.tensor([3], dtype=torch.int32), spec, 20),
        "a block of length '-16'": (x, codes, scale, *rest, "int4:1x-16:bfloat16", 20),
        "a block of length '0'": (x, codes, scale, *rest, "int4:1x0:bfloat16", 20),
        "multiples of 16 columns": (x, codes, scale, *rest, "int4:1x8:bfloat16", 20),
        "takes no format 'int9:1x128:bfloat16': element int9": (x, codes, scale, *rest, "int9:1x128:bfloat16", 20),
    }.items():
        with pytest.raises(RuntimeError, match=re.escape(words)):
            linear(*arguments)
    table = lowbit.quantize(torch.ones(4, 32), "INT8_ROW")
    for ids in ([4], [-1], [0, 1, 2**40]):
        with pytest.raises(RuntimeError, match=f"row {ids[-1]} is not in the table, which has 4 rows"):
            embedding(torch.tensor(ids), *table.stored[:2], None, None, "int8:1x*:float32", 32, torch.float32)


def test_rows_beyond_two_gigabytes_are_found(tmp_path):
    """A file of holes, but for three rows, stands for a table whose offsets 32 bits do not hold."""
    rows, spec = 2**31 // 64 + 1000, "int4:1x*:float32"
    codes = torch.from_file(str(tmp_path / "codes"), shared=True, size=rows * 64, dtype=torch.uint8).view(rows, 64)
    scale = torch.from_file(str(tmp_path / "scale"), shared=True, size=rows, dtype=torch.float32).view(rows, 1)
    q = lowbit.quantize(sample((3, 128)), spec)
    ids = torch.tensor([5, 2**31 // 64, rows - 1])
    codes[ids], scale[ids] = q.qdata, q.scale
    found = torch.ops.lowbit_x86.embedding(ids, codes, scale, None, None, spec, 128, torch.float32)
    assert torch.equal(found, q.dequantize())
    bags = torch.tensor([0, 1, 3]), None, codes, scale, None, None, "sum", -1, True, spec, 128, torch.float32
    pooled = torch.ops.lowbit_x86.embedding_bag(ids, *bags)
    torch.testing.assert_close(pooled, torch.stack([found[0], found[1] + found[2]]))


def test_compilers_see_one_operator_whatever_the_tokens():
    _, parts, description = packed("MXFP4", (48, 64))
    run = torch.compile(lambda x: weights.run(x, parts, description, None) + 1, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        x = sample((tokens, 64), seed=tokens)
        torch.testing.assert_close(run(x), weights.run(x, parts, description, None) + 1)
    x, rest = sample((3, 64)), (None,) * 5
    torch.library.opcheck(
        torch.ops.lowbit_x86.linear, (x, parts[0], parts[1].view(torch.uint8), *rest, "e2m1:1x32:e8m0", 48)
    )


def test_the_library_asks_for_nothing_but_the_stable_abi():
    asked = subprocess.run(["nm", "-D", "--undefined-only", library.FILE], check=True, capture_output=True, text=True)
    names = [line.split()[-1] for line in asked.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.match(r"_?Py|_ZNK?(2at|3c10|5torch)", name)]
