"""docs/performance.md has the tables that benchmarks/performance_page.py makes of the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("performance_page", ROOT / "benchmarks" / "performance_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_results(script):
    text = script.PAGE.read_text()
    assert script.page(text, sorted(ROOT.glob("benchmarks/bench-*.json"))) == text, "run benchmarks/performance_page.py"


def contender(role, name, seconds, speedup, decibels):
    sqnr = {"normal": {"exact": decibels}, "outliers": {"exact": decibels - 1}}
    told = {"role": role, "name": name, "kernel": "cuda.linear" if role == "candidate" else None, "sqnr": sqnr}
    return told | {"seconds": seconds, "speedup": speedup, "of_ceiling": 0.5, "note": ""}


def test_a_row_is_lowbit_beside_its_baseline_and_the_fastest_other(script, tmp_path):
    rows = [
        {
            "case": {"format": "INT4_G128", "m": m},
            "flops": 1,
            "contenders": [
                contender("candidate", "lowbit", ours, 40e-6 / ours, 18.9),
                contender("baseline", "bfloat16", 40e-6, 1.0, 55.7),
                contender("peer", "slow", 30e-6, 4 / 3, 18.0),
                contender("peer", "fast", 20e-6, 2.0, 19.1),
                {"role": "peer", "name": "absent", "refusal": "needs a\n  moon"},
            ],
        }
        for m, ours in ((1, 10e-6), (16, 40e-6))
    ]
    told = {"device": "NVIDIA H100", "date": "2026-11-27", "clocks": {}, "versions": {"torch": "2.11"}}
    ceilings = {"copied": 2**30, "bytes_per_s": 3e12, "side": 8192, "flops_per_s": 752e12}
    results = {"version": 1, "benchmark": "linear", "environment": told, "ceilings": ceilings, "rows": rows}
    results |= {"shapes_seed": 7}
    file = tmp_path / "bench-linear.json"
    file.write_text(json.dumps(results))
    before = f"a\n{script.BEGIN}old\n{script.END}b\n"
    lines = script.page(before, [file]).splitlines()
    assert lines[0] == "a"
    assert lines[-1] == "b"
    assert "old" not in lines
    assert "### `linear` on NVIDIA H100, shapes drawn by seed 7" in lines
    assert "| INT4_G128 | 1 | cuda.linear | 10 us | 4 | 50 % | 18.9 | 17.9 | fast | 19.1 | 2 |" in lines
    assert "| INT4_G128 | 16 | cuda.linear | 40 us | 1 | 50 % | 18.9 | 17.9 | fast | 19.1 | 0.5 |" in lines
    assert "- over the baseline: 2 (geometric mean), 1 at worst" in lines
    assert "- over the fastest other: 1 (geometric mean), 0.5 at worst" in lines
    assert "- not absent: needs a moon (2 times)" in lines
    assert (
        "NVIDIA H100, 2026-11-27; torch 2.11; ceilings: copy of 1 GiB 3 TB/s, bfloat16 product of side 8192 752 TFLOP/s."
        in lines
    )
    assert script.page(script.page(before, [file]), [file]) == script.page(before, [file])
    assert script.NOTHING in script.page(before, [])
