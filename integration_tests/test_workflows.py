"""GitHub's workflows, the hardware table of CONTRIBUTING.md and noxfile.py name the same sessions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HARDWARE = ROOT / ".github/workflows/hardware.yml"


def nox(*arguments, **env):
    command = [sys.executable, "-m", "nox", "--noxfile", str(ROOT / "noxfile.py"), "--no-venv", *arguments]
    path = {"PATH": str(Path(sys.executable).parent)}
    return subprocess.run(command, cwd=ROOT, env=path | env, text=True, capture_output=True, check=False)


@pytest.fixture(scope="module")
def matrix():
    return yaml.safe_load(HARDWARE.read_text())["jobs"]["session"]["strategy"]["matrix"]["session"]


def test_the_matrix_the_table_and_nox_agree(matrix):
    listed = {session["name"] for session in json.loads(nox("--list", "--json").stdout)}
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Hardware\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)`", section, re.MULTILINE) == matrix
    assert set(matrix) <= listed


def test_actionlint_knows_the_labels(matrix):
    config = yaml.safe_load((ROOT / ".github/actionlint.yaml").read_text())
    assert config["self-hosted-runner"]["labels"] == matrix


# There is no nvidia-smi on this PATH, whatever the machine has.
@pytest.mark.parametrize(("promised", "code", "outcome"), [("", 0, "skipped"), ("required", 1, "aborted")])
def test_a_session_without_its_hardware_is_skipped_and_fails_where_that_was_promised(promised, code, outcome):
    done = nox("--session", "cuda-sm90", LOWBIT_HARDWARE=promised)
    assert done.returncode == code, done.stderr
    assert "needs an NVIDIA GPU and its driver; there is no nvidia-smi on this machine" in done.stderr
    assert re.search(rf"cuda-sm90.*{outcome}", done.stderr), done.stderr
