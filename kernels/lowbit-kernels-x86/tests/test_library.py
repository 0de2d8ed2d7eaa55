"""What the library needs of a system: no newer glibc than its wheel says, and of torch the stable interface alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.testing import sample
from lowbit_kernels_x86 import casts, library, weights

pytestmark = pytest.mark.skipif(
    not library.FILE.exists() or shutil.which("objdump") is None, reason="there is no library, or nothing to read it by"
)
# Of symbols without a version: C functions of torch's stable interface, and what every library in C++ asks for.
STABLE = re.compile(r"(aoti_torch|torch)_\w+|_ITM_\w+|__gmon_start__|_Z(N[KOR]*)?St\w+")


def undefined():
    told = subprocess.run(("objdump", "-T", str(library.FILE)), check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in told.splitlines() if "*UND*" in line]
    return [(words[-1], words[-2].strip("()") if words[-2].startswith("(") else "") for words in lines]


def test_wheels_are_for_systems_of_2021_and_later():
    spec = spec_from_file_location("hatch_build_x86", Path(__file__).parents[1] / "hatch_build.py")
    built = module_from_spec(spec)
    spec.loader.exec_module(built)
    system, major, minor, machine = re.fullmatch(r"(\w+?)_(\d+)_(\d+)_(\w+)", built.platform_tag(library.FILE)).groups()
    assert (system, major, machine) == ("manylinux", "2", "x86_64")
    assert int(minor) <= 34
    # What PEP 600 lets libstdc++ have with that glibc.
    versions = [version for _, version in undefined() if version.startswith("GLIBCXX")]
    assert max(tuple(map(int, re.findall(r"\d+", version))) for version in versions) <= (3, 4, 29)


def test_torch_is_called_through_its_stable_interface_alone():
    foreign = [name for name, version in undefined() if not version and not STABLE.fullmatch(name)]
    assert foreign == []
    assert any(name.startswith("aoti_torch_") for name, _ in undefined())


OLD = """
    import sys, torch
    torch.ops.load_library(sys.argv[1])
    assert torch.ops.lowbit_x86.isa() == "scalar"
    for name, arguments, wanted in torch.load(sys.argv[2]):
        found = getattr(torch.ops.lowbit_x86, name)(*arguments)
        if name == "quantize":
            found = arguments[1]
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name
"""


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64, of Debian's package qemu-user")
def test_a_processor_of_2008_runs_what_it_has(tmp_path):
    """One without AVX, emulated: codes, values, rows and products of integers come out to the bit."""
    x, ids, spec = sample((5, 128)), torch.tensor([3, 0, 15]), "int4:1x*:float32"
    q = lowbit.quantize(sample((16, 128), seed=1), spec)
    product = x.round(), *weights.pack(q), *[None] * 5, spec, 16, "static:int8:*x*:float32", torch.ones(1)
    calls = [("linear", product), ("embedding", (ids, *q.stored, spec, 128, torch.bfloat16))]
    calls += [("dequantize", (*q.stored, spec, 128, torch.float16))]
    told = [(name, arguments, getattr(torch.ops.lowbit_x86, name)(*arguments)) for name, arguments in calls]
    for fmt in ("MXFP8", "NVFP4", "UINT4_G128"):
        codes, *parts = casts.quantize(x, None, None, None, str(lowbit.Format.parse(fmt)), "even", "nearest", 0)
        zero, whole = (parts[1], None) if fmt == "UINT4_G128" else (None, parts[1] if len(parts) > 1 else None)
        empty = torch.zeros_like(codes.view(torch.uint8)).view(codes.dtype)
        given = x, empty, parts[0], zero, whole, str(lowbit.Format.parse(fmt)), "even", True, False, None
        told.append(("quantize", given, codes))
    torch.save(told, tmp_path / "calls.pt")
    code = tmp_path / "old.py"
    code.write_text(textwrap.dedent(OLD))
    line = ["qemu-x86_64", "-cpu", "Nehalem", sys.executable, code, library.FILE, tmp_path / "calls.pt"]
    # It has not what a session may have asked for.
    environment = {name: value for name, value in os.environ.items() if name != "LOWBIT_X86_ISA"}
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
