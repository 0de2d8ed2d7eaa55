"""Benchmarks that take no longer than their tests need."""

from __future__ import annotations

import json

import pytest

from lowbit.bench import ceilings, command, timing


@pytest.fixture
def small(monkeypatch):
    """Ceilings and copies of a few kilobytes."""
    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": ((1 << 16,), 32)})
    monkeypatch.setattr(timing, "_ROTATED", 1 << 16)


@pytest.fixture
def bench(small, tmp_path, capsys):
    """`bench(name, ...)`: the exit code, the results read back, and what was printed."""

    def run(*argv):
        file = tmp_path / "results.json"
        code = command.main([*argv, "--seconds", "0.001", "--device", "cpu", "--json", f"{file}"])
        return code, json.loads(file.read_text()), capsys.readouterr()

    return run
