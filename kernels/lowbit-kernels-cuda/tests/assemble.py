"""Compile products without a GPU: for Hopper, if the assembler lets them overlap, and for what is before and after it.

Prints the architecture and format of each that is as it should be.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import mangle_type

from lowbit.format import Format
from lowbit_kernels_cuda import hopper
from lowbit_kernels_cuda.dots import linear_dots
from lowbit_kernels_cuda.lifts import lift
from lowbit_kernels_cuda.linear import constants
from lowbit_kernels_cuda.plans import Kind, Plan
from lowbit_kernels_cuda.weights import parts

N, K = 1024, 4096


def compiled(spec, tokens, plan, capability, *, even=True, experts=0):
    """The kernel of the plan, for a weight of the format (N, K), or of as many experts."""
    fmt, kind = Format.parse(spec), plan.kind
    kernel = hopper.linear_wgmma if kind.depth else linear_dots
    torch.cuda.get_device_capability = lambda _=None: divmod(capability, 10)
    constants.cache_clear()
    x = torch.zeros(tokens, K, dtype=torch.bfloat16)
    given = {
        "x": hopper.described(x, kind.tokens, kind.columns) if kind.depth else x,
        "words": tuple(torch.zeros(1, dtype=torch.int32) for _ in parts(fmt.element.bits)),
        "scale": torch.zeros(1, dtype=torch.int32),
        "tensor_row": 0,
        "tensor_expert": 0,
        "out": torch.zeros(1, dtype=torch.int16),
        "m": tokens,
        "n": N,
        "k": K,
    }
    if plan.splits > 1:
        given |= {"parts": torch.zeros(1), "count": torch.zeros(1, dtype=torch.int32)}
    if experts:
        given["offs"] = torch.zeros(1, dtype=torch.int32)
    known_as = constants(fmt, torch.bfloat16, torch.device("cuda:0"), lifted=bool(lift(fmt)))
    known_as = known_as | {name.upper(): value for name, value in asdict(kind).items()}
    known_as |= {"SPLITS": plan.splits, "BAND": 8, "EXPERTS": experts, "EVEN": even, "num_warps": kind.warps}
    signature, known, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = known_as.get(parameter.name, given.get(parameter.name))
        if parameter.is_constexpr or value is None:
            signature[parameter.name], known[i,] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(map(mangle_type, value))
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
        else:
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or parameter.name in {"n", "k"}:
                aligned[i,] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kind.depth else ASTSource)(kernel, signature, known, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kind.warps})


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
    for capability, name, plan, even, experts in (
        (80, "INT4_G128", Plan(Kind(64, 16, 128, 4, 4, exact=True), 2), True, 128),
        (80, "INT8_ROW", Plan(Kind(64, 64, 128, 4, 3)), False, 0),
        (90, "NVFP4", Plan(Kind(64, 32, 128, 4, 4)), False, 3),
        (100, "NVFP4", Plan(Kind(128, 128, 64, 8, 3)), True, 0),
    ):
        if compiled(name, plan.kind.tokens, plan, capability, even=even, experts=experts).asm["cubin"]:
            sys.stdout.write(f"{capability} {name}\n")
