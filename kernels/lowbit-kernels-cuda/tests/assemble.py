"""Compile the kernel for Hopper without a GPU, and name the formats whose products the assembler lets overlap."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import mangle_type

from lowbit.format import Format
from lowbit_kernels_cuda import hopper
from lowbit_kernels_cuda.linear import _constants
from lowbit_kernels_cuda.weights import parts

N, K, TOKENS = 1024, 4096, 256


def compiled(spec):
    """The kernel for a weight of the format (N, K)."""
    fmt = Format.parse(spec)
    how = _constants(fmt, torch.bfloat16, torch.device("cuda:0"))
    x = torch.zeros(TOKENS, K, dtype=torch.bfloat16)
    given = {
        "x": hopper.described(x, TOKENS, 64),
        "words": tuple(torch.zeros(1, dtype=torch.int32) for _ in parts(fmt.element.bits)),
        "scale": torch.zeros(1, dtype=torch.int32),
        "tensor_row": 0,
        "out": torch.zeros(1, dtype=torch.int16),
        "m": TOKENS,
        "n": N,
        "k": K,
    }
    constants = how | {"ROWS": 128, "TOKENS": TOKENS, "COLUMNS": 64, "SPLITS": 1, "STAGES": 4, "DEPTH": 2, "BAND": 8}
    constants["num_warps"] = 8
    signature, known, aligned = {}, {}, {}
    for i, parameter in enumerate(hopper.linear_wgmma.params):
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
    source = GluonASTSource(hopper.linear_wgmma, signature, known, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})


if __name__ == "__main__":
    torch.cuda.get_device_capability = lambda _=None: (9, 0)
    assembler = get_ptxas(90).path
    for name in ("INT4_G128", "MXFP4"):
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "kernel.ptx"
            text.write_text(compiled(name).asm["ptx"])
            command = [assembler, "-v", "--gpu-name=sm_90a", text, "-o", Path(folder) / "kernel.cubin"]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        if "serialized" not in told and " 0 bytes spill stores" in told:
            sys.stdout.write(f"{name}\n")
