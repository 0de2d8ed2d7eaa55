"""Tests of operators run once more through a backend that hands every call on to the reference.

Backends of other members, which are installed beside this one here, are not found: each has tests of its own.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lowbit import bind
from lowbit.testing import Loopback, installed_backends, only_backends

THROUGH = ["reference", "loopback", "packed loopback"]


# A fixture of a session would outlast these tests.
@pytest.fixture(autouse=True, scope="module")
def alone():
    with only_backends("reference"):
        yield


@pytest.fixture(params=THROUGH[:2])
def through(request):
    """`through(module)`: a module as it runs on the backend of this run, which is bound only if that packs weights.

    A test that asks for this must call an operator, and one parametrized with the packed loopback a bound module.
    """
    if request.param == "reference":
        yield lambda module: module
        return
    packs = request.param == "packed loopback"
    loopback = Loopback(packs=packs)

    def bound(module):
        assert all(row.kernel.startswith("loopback") and row.packed for row in bind(module).rows)
        return module

    with installed_backends(loopback):
        yield bound if packs else lambda module: module
    assert loopback.calls["linear"] + loopback.calls["embedding"] if packs else loopback.calls.total()


@pytest.fixture
def chromium(tmp_path):
    """`chromium(*arguments)`: what a headless browser prints."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("needs Chromium: apt-get install chromium")
    fixed = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars"
    )

    def run(*arguments):
        command = [found[0], *fixed.split(), f"--user-data-dir={tmp_path / 'profile'}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return run
