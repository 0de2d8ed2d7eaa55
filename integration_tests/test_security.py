"""What SECURITY.md promises of the source itself: nothing in it can load a pickle, run what it reads or ask a network."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for part in ("packages", "kernels") for path in (ROOT / part).glob("*/src/**/*.py"))
# Calls that run what they are given, or load what can.
RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "np.load"}
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "urllib",
    "http",
    "requests",
    "socket",
    "ftplib",
}
# A peer's own source, of a package that is installed, in a benchmark on a CPU.
PEERS = {"packages/lowbit-algos/src/lowbit_algos/bench.py": {"exec", "compile"}}
# Where a network is asked at all, by the hub's client: for a model that is named by its hub id, and to upload.
HUB = {"packages/lowbit-hf/src/lowbit_hf/hub.py": {"snapshot_download"}}
HUB |= {"packages/lowbit-hf/src/lowbit_hf/release/upload.py": {"HfApi"}}
# A process that is started, of a fixed command: what a GPU's clocks are.
STARTS = {"packages/lowbit-core/src/lowbit/bench/environment.py"}


def faults(text, name):
    """What a source must not do."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield from of_call(ast.unparse(node.func), name, {k.arg: ast.unparse(k.value) for k in node.keywords})
        elif isinstance(node, ast.Import):
            yield from of_import("", {each.name for each in node.names}, name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from of_import(node.module, {each.name for each in node.names}, name)


def of_call(called, name, options):
    if called in RUNS - PEERS.get(name, set()):
        yield called
    if options.get("trust_remote_code", "False") != "False" or "shell" in options:
        yield f"{called} is told to run code"
    # Options that are passed on as a whole are those of the function around it.
    if called.startswith("Auto") and called.endswith(".from_pretrained") and None not in options:
        kept = {"trust_remote_code": "False", "local_files_only": "True"}
        if not kept.items() <= options.items():
            yield f"{called} may run code or ask a network"


def of_import(home, names, name):
    for module in {home} if home else names:
        top = module.split(".")[0]
        if top in MODULES or (top == "subprocess" and name not in STARTS):
            yield f"import of {module}"
    asking = names & {"snapshot_download", "hf_hub_download", "HfApi"} if home == "huggingface_hub" else set()
    if not asking <= HUB.get(name, set()):
        yield f"import of {sorted(asking)}"


@pytest.mark.parametrize("member", sorted({path.relative_to(ROOT).parts[1] for path in SOURCES}))
def test_no_source_loads_pickles_runs_what_it_reads_or_asks_a_network(member):
    found = {
        name: wrong
        for path in SOURCES
        if path.relative_to(ROOT).parts[1] == member
        and (wrong := list(faults(path.read_text(encoding="utf-8"), name := str(path.relative_to(ROOT)))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "torch.load(file)",
        "eval(text)",
        "AutoModel.from_pretrained(folder)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True)",
        "run(line, shell=True)",
        "from huggingface_hub import snapshot_download",
        "import subprocess",
    ],
)
def test_what_is_looked_for_is_found(text):
    assert list(faults(text, "packages/x.py"))
