"""Notes how each cell of the table went in the JSON file that LOWBIT_CELLS names; a process without lowbit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cells import REFUSED

_outcomes: dict[str, dict[str, str]] = {}
_on_gpu: set[bool] = set()


@pytest.fixture(autouse=True)
def _cell(request, record_property):
    mark = request.node.get_closest_marker("cell")
    if mark is not None:
        on_gpu = request.node.get_closest_marker("gpu") is not None
        record_property("cell", (*mark.args, str(request.node.callspec.params["row"]), on_gpu))


def pytest_runtest_logreport(report):
    """Keep a cell's outcome; a test process of xdist sends its reports here."""
    cell = dict(report.user_properties).get("cell")
    if cell is None or (report.when != "call" and report.outcome == "passed"):
        return
    name, row, on_gpu = cell
    _on_gpu.add(on_gpu)
    outcome = "refused" if (name, row) in REFUSED and report.passed else report.outcome
    _outcomes.setdefault(name, {})[row] = outcome


def pytest_sessionfinish(session):
    """Write the outcomes where the session asks for them."""
    path = os.environ.get("LOWBIT_CELLS")
    if path is None or hasattr(session.config, "workerinput"):
        return
    device = " and ".join(torch.cuda.get_device_name() if on_gpu else "cpu" for on_gpu in sorted(_on_gpu))
    told = {"torch": torch.__version__.partition("+")[0], "device": device, "cells": _outcomes}
    Path(path).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n", encoding="utf-8")


CHILD = """
import sys
import torch
for line in sys.stdin:
    package, inputs, libraries, output = eval(line)
    for library in libraries:
        torch.ops.load_library(library)
    run = torch._inductor.aoti_load_package(package)
    results = [run(*x) for x in torch.load(inputs)]
    assert not [name for name in sys.modules if name.startswith("lowbit")]
    torch.save(results, output)
    print("done", flush=True)
"""


@pytest.fixture(scope="session")
def run_elsewhere(tmp_path_factory):
    """A process that runs packages and never imports lowbit: (package, inputs, libraries of operators) -> outputs."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(package, xs, libraries=()):
            torch.save(xs, folder / "inputs")
            told = (str(package), str(folder / "inputs"), [*map(str, libraries)], str(folder / "outputs"))
            process.stdin.write(f"{told!r}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            return torch.load(folder / "outputs")

        yield run
        process.stdin.close()
