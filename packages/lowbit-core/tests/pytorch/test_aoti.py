"""AOTInductor: a program exported with quantized weights compiles as it is, and runs where lowbit never was imported."""

from __future__ import annotations

import pytest
import torch
from cells import ROWS, column, inputs, model
from test_export import exported
from tolerance import assert_computed

TOKENS = (2, 5, 12, 40)
# A package takes 20 s to compile: one of integers, and one of floats with scales of two levels.
QUICK = [row for row in ROWS if str(row) in {"int8-row-2d", "nvfp4-2d"}]


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch 2.11's own
@column("AOTInductor", QUICK)
def test_a_package_runs_without_lowbit(row, run_elsewhere, tmp_path):
    made = model(row)
    package = torch._inductor.aoti_compile_and_package(exported(row, made), package_path=f"{tmp_path}/model.pt2")
    xs = [inputs(row, m) for m in TOKENS]
    for x, found in zip(xs, run_elsewhere(package, xs), strict=True):
        assert_computed(row, made, found, x)
