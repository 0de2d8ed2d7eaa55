"""The two trained models, quantized once a scheme and session, and the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from lowbit import command
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme

MODELS = Path(__file__).parent / "models"


@pytest.fixture(scope="session")
def models():
    return MODELS


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """`quantized("lm-tiny", "W4A16")`: the folder it became, not to be written to."""
    made = {}

    def to(model, name):
        if (model, name) not in made:
            out = tmp_path_factory.mktemp(model) / name
            run(prepare(MODELS / model, scheme(name), mode="even"), out)
            made[model, name] = out
        return made[model, name]

    return to


@pytest.fixture
def lowbit(capsys, monkeypatch):
    """`lowbit("plan", folder, ...)`: exit code, stdout and stderr of the command, which never takes long enough to tell."""
    monkeypatch.setattr("lowbit_hf.progress._DELAY", inf)

    def called(*arguments):
        capsys.readouterr()
        code = command.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return called


@pytest.fixture(scope="session")
def start():
    """`start("plan", folder, ...)`: the command as a process of its own, its output piped."""
    script = shutil.which("lowbit", path=os.fspath(Path(sys.executable).parent))
    assert script is not None

    def process(*arguments, **options):
        return subprocess.Popen([script, *map(str, arguments)], stdout=-1, stderr=-1, text=True, **options)

    return process
