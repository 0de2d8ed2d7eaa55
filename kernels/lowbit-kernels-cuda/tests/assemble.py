"""Compile products without a GPU: for Hopper, if the assembler lets them overlap, and for what is before and after it.

Prints the architecture and format of each that is as it should be.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from lowbit.activation import Activation
from lowbit.attending import Seen
from lowbit.attention import SCHEMES
from lowbit.format import Format
from lowbit_kernels_cuda import (
    byte_linear,
    cached_attention,
    expanded,
    general_attention,
    heads,
    hopper,
    hopper_attention,
    hopper_blocks,
    hopper_bytes,
    hopper_rows,
    inputs,
    plans,
)
from lowbit_kernels_cuda import cache_write as cache_writes
from lowbit_kernels_cuda.byte_dots import byte_dots
from lowbit_kernels_cuda.dots import linear_dots
from lowbit_kernels_cuda.general_heads import Sequences
from lowbit_kernels_cuda.lifts import lift
from lowbit_kernels_cuda.linear import constants
from lowbit_kernels_cuda.packed import folds
from lowbit_kernels_cuda.plans import Kind, Plan
from lowbit_kernels_cuda.scaling import spec as spec_of
from lowbit_kernels_cuda.weights import parts, places

N, K = 1024, 4096
FAKES = FakeTensorMode()


def compiled(spec, tokens, plan, capability, *, even=True, experts=0, others=0):
    """The kernel of the plan, for a weight of the format (N, K), or of as many experts, and for `others` beside it."""
    fmt, kind = Format.parse(spec), plan.kind
    kernel = hopper.linear_wgmma if kind.depth else linear_dots
    if kind.bytes:
        kernel = hopper_bytes.linear_wgmma_bytes
    torch.cuda.get_device_capability = lambda _=None: divmod(capability, 10)
    constants.cache_clear()
    x = torch.zeros(tokens, K, dtype=torch.float8_e4m3fn if kind.bytes else torch.bfloat16)
    given = {
        "x": hopper.described(x, kind.tokens, kind.columns) if kind.depth else x,
        "x_step": 0,
        "words": tuple(torch.zeros(1, dtype=torch.int32) for _ in parts(fmt.element.bits)),
        "scale": torch.zeros(1, dtype=torch.int16 if kind.bytes and fmt.scale.bits == 16 else torch.int32),
        "tensor_row": 0,
        "tensor_expert": 0,
        "out": torch.zeros(1, dtype=torch.int16),
        "m": tokens,
        "n": N,
        "k": K,
    }
    zero = torch.zeros(1, dtype=torch.int32) if fmt.zero is not None else None
    given |= {"zero": zero, "others": ()}
    if others:
        fields = given["out"], N, given["scale"], zero, None, None, *given["words"]
        given["others"] = tuple(() if field is None else (field,) * others for field in fields)
    if plan.splits > 1:
        given |= {"parts": torch.zeros(1), "count": torch.zeros(1, dtype=torch.int32)}
    if experts:
        given["offs"] = torch.zeros(1, dtype=torch.int32)
    known_as = constants(fmt, torch.bfloat16, torch.device("cuda:0"), lifted=bool(lift(fmt)))
    known_as = known_as | {name.upper(): value for name, value in asdict(kind).items()}
    known_as |= {"SPLITS": plan.splits, "BAND": 8, "EXPERTS": experts, "EVEN": even}
    known_as["num_warps"] = kind.warps // 2 if kind.bytes else kind.warps
    return built(kernel, given, known_as | {"SPAN": 0, "OVERLAPS": capability >= 90}, capability)


def rounding(activation, capability, *, producer="", codes=False):
    """The kernel that rounds inputs (K,), which may make them before."""
    how = Activation.parse(activation).format
    torch.cuda.get_device_capability = lambda _=None: divmod(capability, 10)
    group = how.block_for(2)[-1]
    given = {"x": torch.zeros(1, dtype=torch.int16), "k": K}
    given["out"] = torch.zeros(1, dtype=torch.int16)
    if not folds(how) or not group:
        given["scales"] = torch.zeros(1)
    if how.tensor_scale:
        given["whole"] = torch.zeros(1)
    if producer:
        given |= {name: torch.zeros(1, dtype=torch.int16) for name in ("more", "weight", "total")} | {"eps": 1e-5}
    known_as = {
        "SPEC": spec_of(how, device=torch.device("cuda:0")),
        "GROUP": group,
        "GIVEN": False,
        "num_warps": 4,
        "OVERLAPS": capability >= 90,
    }
    known_as |= {"SPAN": 0 if folds(how) and not codes else group, "COLUMNS": K if producer else max(group, 1024)}
    known_as |= {"PRODUCER": producer, "CODES": codes, "MOVED": False}
    return built(inputs.round_inputs, given, known_as, capability)


def by_bytes(name, tokens, plan, capability, experts=0):
    """The kernel for 8-bit codes of a format on both sides."""
    fmt = Format.parse(name)
    torch.cuda.get_device_capability = lambda _=None: divmod(capability, 10)
    kind, integer, group = fmt.element.storage, fmt.element.kind == "int", fmt.block_for(2)[-1]
    codes = [torch.zeros(size, K, dtype=torch.uint8).view(kind) for size in (tokens, N)]
    if plan.tiled:
        sizes = (plan.tokens, plan.rows)
        codes = [
            TensorDescriptor.from_tensor(each, [size, plan.columns]) for each, size in zip(codes, sizes, strict=True)
        ]
    else:
        codes = [each if integer else each.view(torch.uint8) for each in codes]
    given = {"x": codes[0], "w": codes[1], "x_scale": torch.zeros(1), "w_scale": torch.zeros(1)}
    given |= {"out": torch.zeros(1, dtype=torch.int16), "m": tokens, "n": N, "k": K, "tall": 2}
    if plan.splits > 1:
        given |= {"parts": torch.zeros(1, dtype=torch.int32 if integer else torch.float32)}
        given |= {"count": torch.zeros(1, dtype=torch.int32)}
    if experts:
        given["offs"] = torch.zeros(1, dtype=torch.int32)
    known_as = {name.upper(): value for name, value in asdict(plan).items()} | {"num_warps": plan.warps, "BAND": 8}
    known_as |= {"SPEC": spec_of(fmt, device=torch.device("cuda:0")), "SHARED": False, "GROUP": group, "EVEN": True}
    known_as |= {"INTEGER": integer, "EXPERTS": experts, "IMPRECISE": None, "OVERLAPS": capability >= 90}
    return built(byte_dots, given, known_as, capability)


def expanding(name):
    """The kernel that makes 4-bit codes e4m3."""
    fmt = Format.parse(name)
    integer = fmt.element.kind == "int"
    given = {"words": torch.zeros(1, dtype=torch.int32), "n": N, "k": K, "steps": K // 64}
    given |= {"out": torch.zeros(1, dtype=torch.uint8), "packed": torch.zeros(1, dtype=torch.int16)}
    given |= {"scales": torch.zeros(1), "factors": torch.zeros(1)}
    if not integer:
        given["packed"] = torch.zeros(1, dtype=torch.uint8)
    known_as = {"GROUP": fmt.block_for(2)[-1], "STEPS": 16, "LIFT": 126, "PLACES": places(fmt.element), "num_warps": 4}
    known_as["TO"] = spec_of(Format.parse("FP8_ROW"), device=torch.device("cuda:0"))
    return built(expanded.write_integers if integer else expanded.write_floats, given, known_as, 90)


def by_blocks(tall, wide, *, turned):
    """The kernel for scales of 128 columns of e4m3."""
    torch.cuda.get_device_capability = lambda _=None: (9, 0)
    a, b = (torch.zeros(size, K, dtype=torch.float8_e4m3fn) for size in (tall, wide))
    given = {"a": hopper.described(a, tall, 128), "b": hopper.described(b, wide, 128), "a_scale": torch.zeros(1)}
    given |= {"x_scale" if turned else "b_scale": torch.zeros(1), "a_row": 1, "a_group": N}
    given |= {"x_step": 1, "w_step": 1}
    out = torch.zeros(4096, N, dtype=torch.int16)
    given |= {"out": hopper.described(out, 64, 32 if wide == 64 else 64), "m": 4096, "n": N, "k": K}
    known_as = {"SPEC": spec_of(Format.parse("FP8_ROW"), device=torch.device("cuda:0")), "TURNED": turned}
    known_as |= {"TALL": tall, "WIDE": wide, "STAGES": 4 if wide > 128 else 6, "BAND": 8, "num_warps": 4}
    return built(hopper_blocks.blocks_wgmma, given, known_as, 90)


def by_rows(name, experts):
    """The kernel for scales of rows of 8-bit codes, and many tokens."""
    fmt = Format.parse(name)
    torch.cuda.get_device_capability = lambda _=None: (9, 0)
    x, w = (torch.zeros(size, K, dtype=torch.uint8).view(fmt.element.storage) for size in (4096, N * max(experts, 1)))
    out = torch.zeros(4096, N, dtype=torch.int16)
    given = {"x": hopper.described(x, 128, 128), "w": hopper.described(w, 256, 128), "x_scale": torch.zeros(1)}
    given |= {"w_scale": torch.zeros(1), "out": out, "blocks": hopper.described(out, 64, 64), "m": 4096, "n": N, "k": K}
    given["tall"] = 2
    if experts:
        given["offs"] = torch.zeros(1, dtype=torch.int32)
    known_as = {"SPEC": spec_of(Format.parse("FP8_ROW"), device=torch.device("cuda:0")), "SHARED": False}
    known_as |= {"INTEGER": fmt.element.kind == "int", "EXPERTS": experts, "STAGES": 4, "BAND": 8, "num_warps": 4}
    return built(hopper_rows.rows_wgmma, given, known_as, 90)


def attending(scheme, d, capability, *, mask=False, packed=False):
    """Every kernel that attention of codes launches: Hopper's without a mask or packed sequences, else any GPU's."""
    torch.cuda.get_device_capability = lambda _=None: divmod(capability, 10)
    spec_of.cache_clear()
    launched, how = [], SCHEMES[scheme]
    with FAKES, mock.patch.object(JITFunction, "run", lambda *given, **known: launched.append((given, known))):
        q, k, v = (torch.empty(1, heads, 512, d, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        if mask or packed:
            cu = torch.empty(3, dtype=torch.int32, device="cuda") if packed else None
            of = Sequences(2 if packed else 1, 512, cu)
            seen = torch.empty(512, 512, dtype=torch.bool, device="cuda") if mask else None
            general_attention.attend(q, k, v, of, of, Seen(seen, True, 300), 0.1, how)
        else:
            made, sums = heads.rounded(q, k, v, how), torch.empty(1, 4, 512, device="cuda")
            with mock.patch.object(hopper_attention, "multiprocessors", return_value=132):
                hopper_attention.attend(made, torch.empty_like(q), sums, 0.1, causal=True)
    for (kernel, *given), known in launched:
        names = [parameter.name for parameter in kernel.params]
        built(kernel, dict(zip(names, given, strict=False)), known, capability)
    return {kernel.__name__ for (kernel, *_), _ in launched}


def caching(name, capability, page):
    """The kernels that write a cache in a format, attend to it, and combine what their programs found."""
    torch.cuda.get_device_capability = lambda _=None: divmod(capability, 10)
    spec = spec_of(Format.parse(name), device=torch.device("cuda:0"))
    table = torch.zeros(1, dtype=torch.int32) if page else None
    codes, halves, numbers = (torch.zeros(1, dtype=dtype) for dtype in (torch.uint8, torch.int16, torch.float32))
    kernels = vars(cache_writes)["_write"], vars(cached_attention)["_attend"], vars(cached_attention)["_combine"]
    of_kinds = {"codes": codes, "scale": numbers, "pairs": halves}
    known_as = {"D": 128, "HALF": 64, "WIDTH": 128, "K_SPEC": spec, "V_SPEC": spec, "EACH": False, "SECOND": 64}
    known_as |= {"TOKENS": 64, "PAGE": page, "WINDOW": True, "SPLIT": True, "num_warps": 2}
    known_as |= {"MOST": 128, "PART": 64, "OVERLAPS": capability >= 90}
    for kernel, rows in zip(kernels, (8, 16, 0), strict=True):
        given = {each.name: 128 for each in kernel.params} | {"scale": 0.1, "parts": numbers, "stats": numbers}
        given |= {name: of_kinds[name[2:]] for name in given if name[2:] in of_kinds}
        given |= dict.fromkeys(("k", "v", "q", "cos", "sin", "out"), halves)
        given |= dict.fromkeys(("positions", "lengths"), torch.zeros(1, dtype=torch.int64)) | {"table": table}
        built(kernel, given, known_as | {"ROWS": rows}, capability)


def built(kernel, given, known_as, capability):
    """A kernel as launched with arguments and constants of these names."""
    signature, known, aligned = {}, {}, {}

    def told(value, place, *, constant=False):
        if constant or value is None:
            known[place] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(told(each, (*place, i)) for i, each in enumerate(value))
        if isinstance(value, torch.Tensor) or kernel.params[place[0]].name in {"n", "k", "others"}:
            aligned[place] = [["tt.divisibility", 16]]
        return mangle_type(value)

    for i, parameter in enumerate(kernel.params):
        value = known_as.get(parameter.name, given.get(parameter.name))
        signature[parameter.name] = told(value, (i,), constant=parameter.is_constexpr)
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(kernel, signature, known, aligned)
    options = {name: known_as[name] for name in ("num_warps", "num_stages") if name in known_as}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def overlap(kernel):
    """Whether nothing makes the assembler wait for each product, or put registers into memory."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(kernel.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", text, "-o", Path(folder) / "kernel.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "serialized" not in told and " 0 bytes spill stores" in told


if __name__ == "__main__":
    many = Plan(Kind(128, 256, 64, 8, 4, depth=2))
    for name in ("INT4_G128", "MXFP4"):
        if all(overlap(compiled(name, 256, many, 90, experts=experts)) for experts in (0, 6)):
            sys.stdout.write(f"90 {name}\n")
    for name, m in (("INT4_G128", 64), ("int4:1x*:float32", 1024)):
        each = plans.plan_of_bytes(m, N, K, 132)
        if overlap(compiled(name, each.kind.tokens, each, 90)):
            sys.stdout.write(f"90 {name} as bytes\n")
    for tall, wide, turned in ((64, 64, False), (128, 128, False), (128, 256, True)):
        if overlap(by_blocks(tall, wide, turned=turned)):
            sys.stdout.write(f"90 blocks of {tall} by {wide}\n")
    for name, experts in (("INT8_ROW", 0), ("FP8_ROW", 8)):
        if overlap(by_rows(name, experts)):
            sys.stdout.write(f"90 rows of {name}\n")
    few = Plan(Kind(64, 16, 128, 4, 4, exact=True), 2)
    for name in ("INT4_G128", "UINT4_G128"):
        if compiled(name, 16, few, 90, others=2).asm["cubin"]:
            sys.stdout.write(f"90 three {name}\n")
    for capability, name, plan, even, experts in (
        (80, "INT4_G128", few, True, 128),
        (80, "INT8_ROW", Plan(Kind(64, 64, 128, 4, 3)), False, 0),
        (90, "NVFP4", Plan(Kind(64, 32, 128, 4, 4)), False, 3),
        (100, "NVFP4", Plan(Kind(128, 128, 64, 8, 3)), True, 0),
    ):
        if compiled(name, plan.kind.tokens, plan, capability, even=even, experts=experts).asm["cubin"]:
            sys.stdout.write(f"{capability} {name}\n")
    few, many = (byte_linear._plan(m, N, K, 0, torch.device("cpu"), integer=True) for m in (16, 1024))
    many = replace(many, rows=128, tokens=256, warps=8, stages=4, tiled=True)
    for capability, name, tokens, plan, experts in (
        (80, "INT8_ROW", 16, few, 0),
        (90, "FP8_ROW", 1024, many, 8),
        (90, "FP8_1x128", 16, replace(few, columns=128, tiled=True), 0),
    ):
        by_bytes(name, tokens, plan, capability, experts)
        sys.stdout.write(f"{capability} {name} by bytes\n")
    for capability, name in ((80, "INT8_ROW_ASYM"), (90, "FP8_ROW"), (90, "NVFP4")):
        rounding(f"dynamic:{name}", capability)
        sys.stdout.write(f"{capability} {name} inputs\n")
    for producer, name in (("norm", "FP8_ROW"), ("silu", "FP8_1x128")):
        rounding(f"dynamic:{name}", 90, producer=producer, codes=True)
        sys.stdout.write(f"90 {name} {producer} inputs\n")
    for name in ("INT4_G128", "MXFP4"):
        expanding(name)
        sys.stdout.write(f"90 {name} expanded\n")
    for capability, scheme, d, more in (
        (80, "FP8", 64, {"packed": True}),
        (90, "INT8_FP8_ROTATED", 128, {}),
        (100, "INT8", 40, {"mask": True}),
    ):
        kernels = attending(scheme, d, capability, **more)
        sys.stdout.write(f"{capability} {scheme} by {' '.join(sorted(kernels))}\n")
    for capability, name, page in ((80, "FP8_ROW", 0), (90, "FP8_ROW", 64), (100, "INT8_ROW", 16)):
        caching(name, capability, page)
        sys.stdout.write(f"{capability} {name} caches\n")
