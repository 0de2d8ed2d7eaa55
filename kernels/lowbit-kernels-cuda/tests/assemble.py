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
from lowbit_kernels_cuda.linear import Plan, _constants
from lowbit_kernels_cuda.weights import parts

N, K = 1024, 4096


def compiled(spec, tokens, plan, capability, *, even=True):
    """The kernel of the plan, for a weight of the format (N, K)."""
    fmt, kernel = Format.parse(spec), hopper.linear_wgmma if plan.depth else linear_dots
    torch.cuda.get_device_capability = lambda _=None: divmod(capability, 10)
    _constants.cache_clear()
    x = torch.zeros(tokens, K, dtype=torch.bfloat16)
    given = {
        "x": hopper.described(x, plan.tokens, plan.columns) if plan.depth else x,
        "words": tuple(torch.zeros(1, dtype=torch.int32) for _ in parts(fmt.element.bits)),
        "scale": torch.zeros(1, dtype=torch.int32),
        "tensor_row": 0,
        "out": torch.zeros(1, dtype=torch.int16),
        "m": tokens,
        "n": N,
        "k": K,
    }
    if plan.splits > 1:
        given |= {"parts": torch.zeros(1), "count": torch.zeros(1, dtype=torch.int32)}
    constants = _constants(fmt, torch.bfloat16, torch.device("cuda:0"), lifted=fmt.scale.powers_of_two)
    constants = constants | {name.upper(): value for name, value in asdict(plan).items()}
    constants |= {"BAND": 8, "EVEN": even, "num_warps": plan.warps}
    signature, known, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = constants.get(parameter.name, given.get(parameter.name))
        if parameter.is_constexpr or value is None:
            signature[parameter.name], known[i,] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(map(mangle_type, value))
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
        else:
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or parameter.name in {"n", "k"}:
                aligned[i,] = [["tt.divisibility", 16]]
    source = (GluonASTSource if plan.depth else ASTSource)(kernel, signature, known, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": plan.warps})


def overlap(kernel):
    """Whether nothing makes the assembler wait for each product, or put registers into memory."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(kernel.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", text, "-o", Path(folder) / "kernel.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "serialized" not in told and " 0 bytes spill stores" in told


if __name__ == "__main__":
    many = Plan(128, 256, 64, 8, 1, 4, depth=2)
    for name in ("INT4_G128", "MXFP4"):
        if overlap(compiled(name, 256, many, 90)):
            sys.stdout.write(f"90 {name}\n")
    for capability, name, plan, even in (
        (80, "INT4_G128", Plan(64, 16, 128, 4, 2, 4, exact=True), True),
        (80, "INT8_ROW", Plan(64, 64, 128, 4, 1, 3), False),
        (90, "NVFP4", Plan(64, 32, 128, 4, 1, 4), False),
        (100, "NVFP4", Plan(128, 128, 64, 8, 1, 3), True),
    ):
        if compiled(name, plan.tokens, plan, capability, even=even).asm["cubin"]:
            sys.stdout.write(f"{capability} {name}\n")
