"""docs/*.md have the tables, and docs/images the plots, that benchmarks/pages.py makes of the committed results."""

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
    return import_module("pages")


@pytest.fixture
def results_of(script):
    return import_module("pages_results")


@pytest.fixture
def advice(script):
    return import_module("pages_advice")


@pytest.fixture
def decide(script):
    return import_module("pages_decide")


@pytest.fixture
def summary(script):
    return import_module("pages_summary")


def test_the_pages_have_the_results(script):
    marked = set()
    for page in script.PAGES:
        text = page.read_text()
        assert script.filled(text) == text, "run benchmarks/pages.py"
        marked |= {found["name"] for found in script.MARKED.finditer(text)}
        # Whatever looks like a marker is one.
        assert len(re.findall(r"by benchmarks/pages\.py -->|<!-- end -->", text)) == 2 * len(
            script.MARKED.findall(text)
        )
    assert marked == script.TABLES.keys()


@pytest.mark.parametrize("name", ["performance", "should-i-quantize"])
def test_no_table_is_written_by_hand(script, name):
    text = script.MARKED.sub("", (ROOT / "docs" / f"{name}.md").read_text())
    assert re.findall(r"^\s*\|.*|<table.*", text, re.MULTILINE) == [], "give benchmarks/pages.py a function for it"


def test_what_was_changed_by_hand_is_seen(script):
    text = (ROOT / "docs" / "attention.md").read_text()
    assert script.filled(text.replace("| 8192 | 32 | 1.18", "| 8192 | 32 | 1.81")) == text


def test_the_plots_have_the_results(script):
    made = script.images(script.runs())
    committed = {image.name: image.read_text() for image in script.IMAGES.glob("bench-*.svg")}
    assert committed.keys() == made.keys(), "run benchmarks/pages.py"
    # Names alone: of drawings themselves pytest would show every line.
    assert [name for name, image in made.items() if image != committed[name]] == [], "run benchmarks/pages.py"


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
    return results | {"shapes_seed": None}


@pytest.fixture
def run_of(results_of, results, tmp_path):
    """The points of the made-up results, some of them changed."""

    def points(name="bench-linear-h100-2026-11-27", faster=1.0, **changes):
        told = json.loads(json.dumps(results | changes))
        for row in told["rows"]:
            for each in row["contenders"]:
                if each["role"] == "candidate" and "seconds" in each:
                    each |= {"seconds": each["seconds"] / faster, "speedup": each["speedup"] * faster}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(told))
        return list(results_of.points_of(file))

    return points


def test_a_kind_of_cases_is_beside_its_baseline_and_the_fastest_other(summary, run_of):
    (row,) = summary.kinds(run_of())
    assert row == ("INT4_G128", "2", "2.00", "1.00 (16)", "fast", "1.00", "**0.50** (16)", "0.50")


def test_a_newer_run_counts_and_others_stay_beside_the_lowbit_of_their_own(summary, run_of, results):
    alone = [row | {"contenders": [c for c in row["contenders"] if c["role"] != "peer"]} for row in results["rows"]]
    both = [*run_of(), *run_of("bench-linear-h100-2026-11-28", faster=2, rows=alone)]
    (row,) = summary.kinds(both)
    assert row == ("INT4_G128", "2", "4.00", "2.00 (16)", "fast", "1.00", "**0.50** (16)", "0.50")


def test_runs_are_in_the_order_of_their_days_and_kernels(results_of):
    first, second = (Path(f"bench-linear-rounded-{name}-h200-2026-11-29.json") for name in ("peers", "few"))
    older, newer = Path("bench-linear-zzz-2026-11-28.json"), Path("bench-linear-aaa-2026-11-30.json")
    assert sorted([newer, second, first, older], key=results_of.age) == [older, first, second, newer]
    assert [stem for stem in results_of.ORDER if not (results_of.BENCHMARKS / f"{stem}.json").exists()] == []


def test_machines_have_names(results_of):
    assert results_of.machine_of("NVIDIA H100 80GB HBM3", "bench-linear-h100-2026-11-28") == "NVIDIA H100"
    assert results_of.machine_of("AMD EPYC, 2 cores, AVX2, 1 thread", "bench-cast-epyc-2026-11-28") == "AMD EPYC, AVX2"
    xeon = "Intel(R) Xeon(R) Processor, 2 cores, AVX512, 1 thread"
    assert results_of.machine_of(xeon, "bench-linear-xeon-amx-2026-11-29") == "Intel Xeon, AVX-512 and AMX"
    assert results_of.machine_of(xeon, "bench-linear-xeon-no-amx-2026-11-29") == "Intel Xeon, AVX-512, AMX left aside"
    assert results_of.machine_of("NVIDIA B200", "bench-linear-b200-2026-12-01") == "NVIDIA B200"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1.05,), "yes"),
        ((0.98, 1.2), "yes"),
        ((0.979, 1.2), "it depends"),
        ((0.6, 1.05), "it depends"),
        ((0.9, 1.04), "no"),
        ((0.979,), "no"),
        ((0.98,), "no difference"),
        ((1.049,), "no difference"),
    ],
)
def test_verdicts(advice, ratios, expected):
    assert advice.verdict(ratios) == expected


@pytest.fixture
def ratio(advice):
    def made(size, value, scheme="W8A8", bits=8, shape=""):
        return advice.Ratio(size, scheme, bits, value, "bench-made-up", shape)

    return made


def test_the_fastest_scheme_answers_by_the_shapes_that_all_have(advice, ratio):
    # FP8 was measured at a small shape, too, which pulls down its mean alone.
    both = [ratio(1, 1.5, shape="big"), ratio(1, 1.4, shape="wide")]
    fp8 = [ratio(1, value, "FP8", shape=shape) for shape, value in (("big", 1.7), ("wide", 1.6), ("small", 1.0))]
    found = advice.answer([*both, *fp8])
    assert (found.scheme, found.verdict) == ("FP8", "yes")
    assert found.means == (pytest.approx((1.7 * 1.6 * 1.0) ** (1 / 3)),)
    # One shape of three is not enough to be asked.
    assert advice.answer([*both, *fp8, ratio(1, 9.0, "MXFP8", shape="big")]).scheme == "FP8"
    assert advice.answer([]) is None


def test_crossovers(advice, ratio):
    below = [ratio(size, 1.0) for size in (512, 2048)]
    above = [ratio(size, value) for size, value in ((8192, 1.1), (16384, 1.2))]
    found = advice.spans([*above, *below])
    assert [(advice.sizes_of(span), str(span.answers[8])) for span in found] == [
        ("512 to 2,048", "no difference: 1.00"),
        ("8,192 to 16,384", "**yes** 1.10 to 1.20, `W8A8`"),
    ]
    assert advice.yes_for([*below, *above], ()) == "8,192 to 16,384"
    # Gains that end, and come back.
    assert advice.yes_for([*above, *below, ratio(256, 2.0), ratio(32768, 0.9)], ()) == "256; 8,192 to 16,384"
    assert advice.yes_for(below, ()) == "none"


def test_sizes_of_a_bin_are_one_and_bits_change_rows_together(advice, ratio):
    four = [ratio(size, value, "W4A16", 4) for size, value in ((1, 2.6), (2, 2.5), (8, 2.4), (64, 0.9))]
    eight = [ratio(size, 1.5) for size in (1, 8, 64)]
    found = advice.spans([*four, *eight], (1, 8, 128))
    assert [(span.sizes, span.answers[4].verdict, span.answers[8].verdict) for span in found] == [
        ((1, 2, 8), "yes", "yes"),
        ((64,), "no", "yes"),
    ]
    assert found[0].answers[4].means == (pytest.approx(2.6), pytest.approx(math.sqrt(2.5 * 2.4)))
    assert str(found[1].answers[4]) == "no: 0.90, `W4A16`"


def test_decisions_are_made_of_measured_points(decide, run_of, monkeypatch):
    made = run_of("bench-linear-h100-2031-01-01")
    monkeypatch.setattr(decide, "points", lambda: made)
    monkeypatch.setattr(decide, "models", lambda machine: [])
    assert decide.decisions("NVIDIA H100")[2:] == [
        "| linear layers: tokens at a time | 1 |  | **yes** 4.00, `W4A16` |",
        "| linear layers: tokens at a time | 16 |  | no difference: 1.00 |",
    ]
    assert decide.schemes("NVIDIA H100", "linear")[2:] == ["| `W4A16` | 4.00 | 1.00 | 1 |"]
    # Shapes that nobody chose have no say.
    made[:] = run_of("bench-linear-h100-2031-01-01", shapes_seed=7)
    assert decide.decisions("NVIDIA H100")[2:] == []


def spans(drawn, colour):
    """From where to where rectangles in the panels reach; those of the legend are clipped by nothing."""
    path = rf'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*" clip-path="[^"]*" style="fill: {colour}"'
    return [(float(start), float(end)) for start, end in re.findall(path, drawn)]


def test_a_bar_is_as_long_as_lowbit_or_the_fastest_other_is_fast(script, results):
    drawn = script.plot(results | {"shapes_seed": 7})
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
    drawn = script.images([file])["bench-attention.svg"]
    bars, one = spans(drawn, FIRST_OTHER), float(re.search(r'd="M ([\d.]+) [^"]*" [^>]*stroke-dasharray', drawn)[1])
    # The baseline takes twice the least time, and the other half as long as that.
    assert [(end - start) / (one - bars[0][0]) for start, end in bars] == pytest.approx([1, 1], abs=1e-4)
    assert ">lowbit<" not in drawn


def test_a_run_says_who_was_not_there(summary, results, tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "BENCHMARKS", tmp_path)
    (tmp_path / "bench-linear.json").write_text(json.dumps(results | {"shapes_seed": 7}))
    assert summary.run("bench-linear") == (
        "- [bench-linear](../benchmarks/bench-linear.json) ([drawn](images/bench-linear.svg)): torch 2.11; "
        "ceilings: copy of 1 GiB 3 TB/s, bfloat16 product of side 8192 752 TFLOP/s; shapes drawn by seed 7; "
        "not there: absent."
    )
