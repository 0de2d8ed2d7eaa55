"""Compile the library once for every instruction set; hatchling calls this for a wheel and for an editable install."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# torch 2.11, the oldest that is supported: its stable ABI is what later ones keep.
TARGET = "0x020b000000000000"
FLAGS = (
    "-std=c++20",
    "-O2",
    # Sums of several tokens stay in registers only where their loops are written out.
    "-fpeel-loops",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
# Never -march=native: what runs is chosen on the machine that runs it.
SETS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ),
}
SETS["avx512_vnni"] = (*SETS["avx512"], "-mavx512vnni")
# These multiply bfloat16s, and tiles, and have the rest of the last set's kernels.
DOTS = {"avx512_bf16": (*SETS["avx512_vnni"], "-mavx512bf16", "-mavx512vbmi")}
DOTS["amx"] = (*DOTS["avx512_bf16"], "-mamx-tile", "-mamx-int8", "-mamx-bf16")
LIBRARY = "lowbit_x86.so"


class CustomBuildHook(BuildHookInterface):
    """Put the library beside the Python modules; on other processors, and other systems than Linux, there is none."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel for this platform and any Python."""
        if platform.machine() not in {"x86_64", "AMD64"} or sys.platform != "linux":
            return
        package = Path(self.root, "src/lowbit_kernels_x86")
        compile_library(Path(self.root, "csrc"), package / LIBRARY)
        if version != "editable":
            build_data["force_include"][str(package / LIBRARY)] = f"lowbit_kernels_x86/{LIBRARY}"
            build_data["tag"] = f"py3-none-{platform_tag(package / LIBRARY)}"
        build_data["pure_python"] = False


def compile_library(source: Path, target: Path) -> None:
    """Compile every file of `source` for its instruction sets and link `target`, which appears whole or not at all."""
    import torch

    root = Path(torch.__file__).parent
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    headers = ("-isystem", str(root / "include"), f"-DTORCH_TARGET_VERSION={TARGET}")
    with tempfile.TemporaryDirectory() as folder:
        jobs = {
            Path(folder, f"{name}.{isa}.o"): (f"{name}.cpp", f"-DLOWBIT_ISA={isa}", *flags)
            for name, sets in (("kernels", SETS), ("dots", DOTS))
            for isa, flags in sets.items()
        }
        jobs |= {
            Path(folder, f"{name}.o"): (f"{name}.cpp", *headers) for name in ("library", "products", "isa", "format")
        }

        def compile_one(job: tuple[Path, tuple[str, ...]]) -> None:
            to, (file, *flags) = job
            # Errors tell the file, not where it was built, so that all builds are the same bytes.
            names = (f"-ffile-prefix-map={source}=csrc", f"-ffile-prefix-map={root}=torch")
            _run(*compiler, *FLAGS, *names, *flags, "-c", str(source / file), "-o", str(to))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs.items()))
        whole = target.with_suffix(".part")
        libraries = (f"-L{root / 'lib'}", "-ltorch_cpu", "-ltorch")
        _run(*compiler, "-shared", *map(str, jobs), "-Wl,--no-as-needed", *libraries, "-o", str(whole))
        whole.replace(target)


def platform_tag(library: Path) -> str:
    """The tag of Linux systems that a library runs on: those with the newest glibc of which it uses anything.

    Source: PEP 600.
    """
    objdump = shutil.which("objdump")
    if objdump is None:
        raise SystemExit("a wheel of lowbit-kernels-x86 is tagged by what objdump tells: install binutils")
    told = subprocess.run((objdump, "-T", str(library)), check=True, capture_output=True, text=True).stdout
    newest = max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", told))
    return f"manylinux_2_{max(newest, 17)}_{platform.machine()}"


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise SystemExit(
            f"lowbit-kernels-x86 is built by a C++ compiler, and {command[0]!r} is not found: install g++ 12 or later, "
            "or set CXX, or install a wheel of it"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the C++ compiler failed with exit status {error.returncode}: {' '.join(command)}") from None
