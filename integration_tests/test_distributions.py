"""What is published: what lies in it, that anybody builds the same bytes, and that a package built on one part of it runs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROJECTS = sorted(file.parent for file in ROOT.glob("*/lowbit*/pyproject.toml"))
SIBLINGS = {project.name for project in PROJECTS}
PYTHONS = ["3.11", "3.12", "3.13"]
pytestmark = pytest.mark.slow


def version_of(project):
    return tomllib.loads((project / "pyproject.toml").read_text())["project"]["version"]


MINOR = version_of(ROOT / "packages" / "lowbit-core").rpartition(".")[0]


def copied(project, to, version=None):
    """A copy of a project as a clone has it, perhaps of another version."""
    shutil.copytree(project, to, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    if version is not None:
        file, old = to / "pyproject.toml", f'version = "{version_of(project)}"'
        file.write_text(file.read_text().replace(old, f'version = "{version}"'))
    return to


def build(project, to, *targets):
    """Build in this environment, which has what every build asks for."""
    options = [option for target in targets for option in ("--target", target)]
    command = [sys.executable, "-m", "hatchling", "build", *options, "--directory", str(to)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=900)
    return to


def files_of(source):
    return {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_what_is_built(project, tmp_path):
    source = copied(project, tmp_path / "here" / project.name)
    kept = files_of(source / "src")
    first = build(source, tmp_path / "first", "sdist", "wheel")
    (sdist,), (wheel,) = first.glob("*.tar.gz"), first.glob("*.whl")
    check_wheel(project, wheel, kept)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "there", filter="data")
    (unpacked,) = (tmp_path / "there").iterdir()
    check_sdist(project, unpacked, kept)
    check_no_machine(unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unzipped")
    check_no_machine(tmp_path / "unzipped", tmp_path)
    # In another folder, from what was published.
    second = build(unpacked, tmp_path / "second", "sdist", "wheel")
    digests = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in to.iterdir()} for to in (first, second)
    ]
    assert digests[0] == digests[1]


def check_wheel(project, wheel, kept):
    """The package's own files, those that describe it, and nothing else."""
    info = f"{project.name.replace('-', '_')}-{version_of(project)}.dist-info"
    described = {f"{info}/{file}" for file in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist()) - {f"{info}/entry_points.txt"}
        metadata = archive.read(f"{info}/METADATA").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    compiled = {"lowbit_kernels_x86/lowbit_x86.so"} if project.name == "lowbit-kernels-x86" else set()
    assert names == kept | described | compiled
    assert bool(kept) == any(file.endswith("/py.typed") for file in names)
    check_metadata(project, Parser().parsestr(metadata))


def check_metadata(project, told):
    assert told["Name"] == project.name
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == "<3.14,>=3.11"
    assert 20 < len(told["Summary"]) < 120
    assert told.get_payload() == (project / "README.md").read_text()
    classifiers = told.get_all("Classifier")
    assert [c.rpartition(" ")[2] for c in classifiers if "Language :: Python" in c] == PYTHONS
    for needed in told.get_all("Requires-Dist"):
        name = re.match(r"[\w-]+", needed)[0]
        assert name not in SIBLINGS or needed.startswith(f"{name}~={MINOR}.0"), needed


def check_sdist(project, unpacked, kept):
    listed = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", *(f"src/{file}" for file in kept)}
    if project.name == "lowbit-kernels-x86":
        listed |= {"hatch_build.py", *(f"csrc/{file}" for file in files_of(project / "csrc"))}
    assert files_of(unpacked) == listed


def check_no_machine(folder, tmp_path):
    """Nothing says where it was built."""
    places = [str(place).encode() for place in (tmp_path, ROOT, sys.prefix)]
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not any(place in content for place in places), file


# A framework that pins one distribution, in an environment with nothing else.

RUN = """
import sys
import framework, torch
weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
layer = framework.SmallLinear(weight)
# Half a step, and what the scale loses in bfloat16 of seven steps.
step = weight.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True) / 7
kept = layer.weight.dequantize(torch.float32)
assert ((kept - weight).unflatten(-1, (2, 32)).abs() <= step * (0.5 + 7 * 2**-8)).all()
x = torch.randint(-4, 5, (3, 64)).float()
assert torch.allclose(layer(x).double(), x.double() @ kept.double().T, rtol=0, atol=64 * 4 * 2**-20)
brought = {name.partition('.')[0] for name in sys.modules if name.startswith('lowbit')}
assert brought == {'lowbit'}, brought
"""
GPTQ = "import lowbit_algos, torch; lowbit_algos.gptq(torch.ones(4, 32), torch.eye(32), 'MXFP4')"


def environment(tmp_path, versions):
    """A folder with wheels of these versions and of the framework, and the Python of a new environment."""
    dist = tmp_path / "dist"
    for name, version in versions.items():
        build(copied(ROOT / "packages" / name, tmp_path / name, version), dist, "wheel")
    shutil.copytree(ROOT / "integration_tests" / "downstream", tmp_path / "framework")
    build(tmp_path / "framework", dist, "wheel")
    uv("venv", "--python", sys.executable, tmp_path / "env")
    return dist, tmp_path / "env" / "bin" / "python"


def uv(*words):
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(["uv", *map(str, words)], check=False, capture_output=True, text=True, timeout=600, env=env)


def installed(python, dist, *asked):
    # The torch that tests run on, which is at hand.
    pinned = f"torch=={torch.__version__.partition('+')[0]}"
    return uv("pip", "install", "--python", python, "--find-links", dist, *asked, pinned)


@pytest.mark.parametrize(("core", "algos"), [(".0", None), (".1", ".0"), (".0", ".7")], ids=["alone", "newer", "older"])
def test_a_package_on_one_distribution_runs(core, algos, tmp_path):
    versions = {"lowbit-core": MINOR + core} | ({"lowbit-algos": MINOR + algos} if algos else {})
    dist, python = environment(tmp_path, versions)
    done = installed(python, dist, "framework", *(f"{name}=={version}" for name, version in versions.items()))
    assert done.returncode == 0, done.stderr
    told = uv("pip", "list", "--python", python, "--format", "freeze").stdout
    assert dict(re.findall(r"^(lowbit\S*)==(\S+)$", told, re.MULTILINE)) == versions
    for code in [RUN, GPTQ] if algos else [RUN]:
        done = subprocess.run([python, "-I", "-c", code], check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_siblings_of_another_minor_version_are_refused(tmp_path):
    dist, python = environment(tmp_path, {"lowbit-core": "0.99.0", "lowbit-algos": f"{MINOR}.0"})
    done = installed(python, dist, "lowbit-core==0.99.0", f"lowbit-algos=={MINOR}.0")
    assert done.returncode == 1
    assert f"lowbit-core>={MINOR}.0,<" in "".join(done.stderr.split()), done.stderr
