"""docs/performance.md has the plots and tables that benchmarks/performance_page.py makes of the committed results."""

from __future__ import annotations

import json
import math
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOWBIT, FIRST_OTHER = "#0072b2", "#e69f00"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("performance_page")


def test_the_page_has_the_results(script):
    text, files = script.PAGE.read_text(), sorted(ROOT.glob("benchmarks/bench-*.json"))
    assert script.page(text, files) == text, "run benchmarks/performance_page.py"


def test_the_plots_have_the_results(script):
    made = script.images(sorted(ROOT.glob("benchmarks/bench-*.json")))
    committed = {image.name: image.read_text() for image in script.IMAGES.glob("bench-*.svg")}
    assert committed.keys() == made.keys(), "run benchmarks/performance_page.py"
    # Names alone: of drawings themselves pytest would show every line.
    assert [name for name, image in made.items() if image != committed[name]] == [], (
        "run benchmarks/performance_page.py"
    )


def contender(role, name, seconds, speedup, decibels):
    sqnr = {"normal": {"exact": decibels}, "outliers": {"exact": decibels - 1}}
    told = {"role": role, "name": name, "kernel": "cuda.linear" if role == "candidate" else None, "sqnr": sqnr}
    return told | {"seconds": seconds, "speedup": speedup, "of_ceiling": 0.5, "note": ""}


@pytest.fixture
def results():
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
    return results | {"shapes_seed": 7}


def test_a_row_is_lowbit_beside_its_baseline_and_the_fastest_other(script, results, tmp_path):
    file = tmp_path / "bench-linear.json"
    file.write_text(json.dumps(results))
    before = f"a\n{script.BEGIN}old\n{script.END}b\n"
    lines = script.page(before, [file]).splitlines()
    assert lines[0] == "a"
    assert lines[-1] == "b"
    assert "old" not in lines
    assert "### `linear` on NVIDIA H100, shapes drawn by seed 7" in lines
    assert "![linear: speed, as a share of the ceiling](images/bench-linear.svg)" in lines
    assert list(script.images([file])) == ["bench-linear.svg"]
    assert (
        "<tr><td>INT4_G128</td><td>1</td><td>cuda.linear</td><td>10 us</td><td>4</td><td>50 %</td><td>18.9</td><td>17.9</td><td>fast</td><td>19.1</td><td>2</td></tr>"
        in lines
    )
    assert (
        "<tr><td>INT4_G128</td><td>16</td><td>cuda.linear</td><td>40 us</td><td>1</td><td>50 %</td><td>18.9</td><td>17.9</td><td>fast</td><td>19.1</td><td>0.5</td></tr>"
        in lines
    )
    assert "- over the baseline: 2 (geometric mean), 1 at worst" in lines
    assert "- over the fastest other: 1 (geometric mean), 0.5 at worst" in lines
    assert "- not absent: needs a moon (2 times)" in lines
    assert (
        "NVIDIA H100, 2026-11-27; torch 2.11; ceilings: copy of 1 GiB 3 TB/s, bfloat16 product of side 8192 752 TFLOP/s."
        in lines
    )
    assert script.page(script.page(before, [file]), [file]) == script.page(before, [file])
    assert script.NOTHING in script.page(before, [])


def spans(drawn, colour):
    """From where to where rectangles in the panels reach; those of the legend are clipped by nothing."""
    path = rf'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*" clip-path="[^"]*" style="fill: {colour}"'
    return [(float(start), float(end)) for start, end in re.findall(path, drawn)]


def test_a_bar_is_as_long_as_lowbit_or_the_fastest_other_is_fast(script, results):
    drawn = script.plot(results)
    bars = spans(drawn, LOWBIT) + spans(drawn, FIRST_OTHER)
    one = float(re.search(r'd="M ([\d.]+) [^"]*" [^>]*stroke-dasharray', drawn)[1])
    # Lowbit takes twice the least time in both panels; the other then takes twice, and half, as long as lowbit.
    assert [(end - start) / (one - bars[0][0]) for start, end in bars] == pytest.approx([0.5, 0.5, 0.25, 1], abs=1e-4)
    texts = set(re.findall(r"<text[^>]*>(.*)</text>", drawn))
    assert {"NVIDIA H100, 2026-11-27, shapes drawn by seed 7", "INT4_G128", "lowbit", "fast", "bfloat16"} <= texts
    assert not {"slow", "absent"} & texts


def test_times_of_gptq_are_drawn_by_their_logarithm(script, results):
    drawn = script.plot(results | {"benchmark": "gptq"})
    (ours_10, _), (ours_40, _) = spans(drawn, LOWBIT)
    (other_20, _), _ = spans(drawn, FIRST_OTHER)
    assert (other_20 - ours_10) / (ours_40 - ours_10) == pytest.approx(math.log(20 / 10) / math.log(40 / 10), abs=1e-4)


def test_where_lowbit_has_nothing_yet_the_baseline_is_what_there_is_to_beat(script, results, tmp_path):
    for row in results["rows"]:
        row["contenders"][0] = {"role": "candidate", "name": "lowbit", "refusal": "lowbit has no attention yet"}
    file = tmp_path / "bench-attention.json"
    file.write_text(json.dumps(results | {"benchmark": "attention"}))
    lines = script.page(f"{script.BEGIN}{script.END}", [file]).splitlines()
    row = "<td>bfloat16</td><td>40 us</td><td>50 %</td><td>55.7</td><td>54.7</td><td>fast</td><td>19.1</td><td>0.5</td>"
    assert [f"<tr><td>INT4_G128</td><td>{m}</td>{row}</tr>" in lines for m in (1, 16)] == [True, True]
    assert "- not lowbit: lowbit has no attention yet (2 times)" in lines
    assert not [line for line in lines if line.startswith("- over the")]
    drawn = script.images([file])["bench-attention.svg"]
    bars, one = spans(drawn, FIRST_OTHER), float(re.search(r'd="M ([\d.]+) [^"]*" [^>]*stroke-dasharray', drawn)[1])
    # The baseline takes twice the least time, and the other half as long as that.
    assert [(end - start) / (one - bars[0][0]) for start, end in bars] == pytest.approx([1, 1], abs=1e-4)
    assert ">lowbit<" not in drawn
