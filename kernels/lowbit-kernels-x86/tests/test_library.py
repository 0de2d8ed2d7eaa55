"""What the library needs of a system: no newer glibc than its wheel says, and of torch the stable interface alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from lowbit_kernels_x86 import library

pytestmark = pytest.mark.skipif(
    not library.FILE.exists() or shutil.which("objdump") is None, reason="there is no library, or nothing to read it by"
)
# Of symbols without a version: C functions of torch's stable interface, and what every library in C++ asks for.
STABLE = re.compile(r"(aoti_torch|torch)_\w+|_ITM_\w+|__gmon_start__|_ZN[KOR]*St\w+")


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
