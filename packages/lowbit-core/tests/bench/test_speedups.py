"""Speedups and accuracy on a page: every number at its place."""

from __future__ import annotations

import html
import re

import pytest

from lowbit.bench.inputs import EXACT
from lowbit.bench.outcomes import run_of
from lowbit.bench.speedups import speedups

# Microseconds of lowbit, of its baseline and of a peer, by m; and lowbit's SQNR on both kinds of inputs.
TIMES = {1: (1.0, 3.0, 12.0), 16: (2.0, 3.0, 1.25), 4096: (50.0, 40.0, 40.0)}
ACCURACY = {1: (18.9, 12.5), 16: (19.1, 7.25), 4096: (18.7, -3.5)}


@pytest.fixture
def told(results, contender):
    def row(form, n, m):
        ours, base, other = TIMES[m]
        return (
            {"format": form, "m": m, "n": n},
            8,
            [
                contender("candidate", "lowbit", ours * 1e-6, sqnr=ACCURACY[m]),
                contender("baseline", "bfloat16", base * 1e-6, sqnr=(55.0, 55.0)),
                contender("reference", "reference", 1.0),
                contender("peer", "other", other * 1e-6, sqnr=(20.0,)),
                {"role": "peer", "name": "absent", "refusal": "needs a moon"},
            ],
        )

    def make(*forms, lengths=(64,)):
        return results([row(form, n, m) for form in forms for n in lengths for m in TIMES])

    return make


def section(results):
    return speedups(run_of(results, "x"))


def text_of(markup):
    return html.unescape(re.sub("<.*?>", "", markup)).replace("\N{NO-BREAK SPACE}", " ")


def test_speedups_stand_at_their_size_and_ratio_with_accuracy_beneath(told, plots):
    found = plots(section(told("MXFP4", "MXFP8")), x=2, y=2)
    assert [plot["title"] for plot in found] == [
        f"{what}: {form}" for form in ("MXFP4", "MXFP8") for what in ("Speedup over the baseline", "SQNR")
    ]
    for form, plot in zip(("MXFP4", "MXFP8"), found[::2], strict=True):
        assert plot["axes"] == ["over baseline", "m"]
        points = {}
        for m, (ours, base, other) in TIMES.items():
            case = f"{form}, m {m}, n 64"
            points[f"lowbit (cuda.linear), {case}: {ours:.3g} us, {base / ours:.3g} over baseline"] = (
                m,
                base / ours,
                "c0",
            )
            points[f"other, {case}: {other:.3g} us, {base / other:.3g} over baseline"] = (m, base / other, "c1")
        assert plot["points"].keys() == points.keys()
        for name, (m, ratio, colour) in points.items():
            assert plot["points"][name] == (pytest.approx(m, rel=0.01), pytest.approx(ratio, rel=0.01), colour)


def test_accuracy_is_of_the_same_cases_hollow_with_outliers(told, plots):
    plot = plots(section(told("MXFP4")), x=2)[1]
    assert plot["axes"] == ["SQNR, dB", "m"]
    points = {}
    for m, values in ACCURACY.items():
        kinds = ("on normal inputs", "c0"), ("with outliers", "c0 hollow")
        for value, (words, colour) in zip(values, kinds, strict=True):
            points[f"lowbit (cuda.linear), MXFP4, m {m}, n 64: {value:.1f} dB, {words}"] = (m, value, colour)
        # Nobody measured the other on outliers.
        points[f"other, MXFP4, m {m}, n 64: 20.0 dB, on normal inputs"] = (m, 20, "c1")
    assert plot["points"].keys() == points.keys()
    for name, (m, value, colour) in points.items():
        assert plot["points"][name] == (pytest.approx(m, rel=0.01), pytest.approx(value, abs=0.05), colour)


def test_the_legend_has_the_geometric_mean_and_the_least_of_each_and_what_dashes_mean(told):
    page = section(told("MXFP4", lengths=(64, 32)))
    legend = text_of(page.partition('class="legend"')[2].partition("</div>")[0])
    # The cubic roots of 3 x 1.5 x 0.8, and of 0.25 x 2.4 x 1.
    assert "lowbit 1.53, 0.8 at worst" in legend
    assert "other 0.843, 0.25 at worst" in legend
    assert legend.endswith("n 64n 32")
    assert "bfloat16" not in legend
    assert "the baseline (bfloat16), by m" in text_of(page)
    dashes = re.findall(r'class="curve"( stroke-dasharray="[^"]*")?', page)
    # In the legend, of lowbit and the other in speedups, of lowbit twice and the other once in accuracy.
    assert (dashes.count(""), len(dashes)) == (1 + 2 + 3, 2 * (1 + 2 + 3))
    assert "stroke-dasharray" not in section(told("MXFP4"))


def test_what_has_one_size_is_stacked_by_its_words(results, contender, plots):
    rows = [
        ({"op": op, "shape": "16x32"}, 0, [contender("candidate", "lowbit", 1e-6), contender("baseline", "copy", base)])
        for op, base in (("quantize", 0.5e-6), ("dequantize", 4e-6))
    ]
    page = section(results(rows))
    fast, near = plots(page, x=2)
    assert (fast["title"], fast["axes"]) == ("Speedup over the baseline", [None, "over baseline"])
    assert [point[0] for point in fast["points"].values()] == pytest.approx([0.5, 4], rel=0.01)
    assert "all at one size" in text_of(page)
    near = plots(page)[1]
    assert (near["title"], near["axes"]) == ("SQNR", [None, "SQNR, dB"])
    assert [point[0] for point in near["points"].values()] == pytest.approx([30, 20, 30, 20], abs=0.05)


def test_accuracy_that_is_no_number_is_told_and_not_drawn(told, plots):
    given = told("MXFP4")
    for row, value in zip(given["rows"], (EXACT, EXACT, -EXACT), strict=True):
        row["contenders"][0]["sqnr"]["normal"]["exact"] = value
    page = section(given)
    assert "Not drawn: 2 SQNRs of results that are the same to the bit, 1 SQNR of results that are not finite." in (
        text_of(page)
    )
    assert not [name for name in plots(page)[1]["points"] if name.startswith("lowbit") and "normal" in name]
    assert "Not drawn" not in section(told("MXFP4"))


def test_without_any_accuracy_there_are_speedups_alone(told, plots):
    given = told("MXFP4")
    for row in given["rows"]:
        for each in row["contenders"][:4]:
            each["sqnr"] = {}
    page = section(given)
    assert [plot["title"] for plot in plots(page)] == ["Speedup over the baseline: MXFP4"]
    assert "accuracy" not in text_of(page)


def test_where_only_the_baseline_was_timed_the_page_says_so(results, contender):
    refusal = {"role": "candidate", "name": "lowbit", "refusal": "not yet"}
    page = section(results([({"m": 1}, 1, [refusal, contender("baseline", "bfloat16", 1.0)])]))
    assert "Nothing to draw: neither lowbit nor another library was timed beside a baseline." in text_of(page)
    assert "<svg" not in page
