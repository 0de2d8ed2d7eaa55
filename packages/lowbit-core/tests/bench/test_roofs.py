"""The roofline: where points and ceilings stand."""

from __future__ import annotations

import html
import re

import pytest

from lowbit.bench.outcomes import run_of
from lowbit.bench.roofs import roofline


@pytest.fixture
def drawn(results, contender):
    """Two cases, of 4 and 1000 operations a byte, by lowbit, which moves half of what its baseline does."""

    def make(flops):
        rows = []
        for m, seconds in ((1, 2e-6), (512, 50e-6)):
            ours = contender("candidate", "lowbit", seconds, moved=1e6)
            base = contender("baseline", "bfloat16", 2 * seconds, moved=2e6)
            rows.append(({"m": m}, flops * m, [ours, base, contender("reference", "reference", 1.0)]))
        run = run_of(results(rows), "x")
        return roofline(run, [each for each in run.outcomes if each.role != "reference"])

    return make


def told(markup):
    return html.unescape(re.sub("<.*?>", "", markup)).replace("\N{NO-BREAK SPACE}", " ")


def test_points_stand_at_their_intensity_and_rate(drawn, plots):
    page = drawn(4e6)
    found = plots(page, x=10, y=10)
    assert [plot["class"] for plot in found] == ["plot wide", "plot narrow"]
    for plot in found:
        assert plot["axes"] == ["FLOP/s", "operations a byte"]
        points = {
            # 1 MB at 1 TB/s are 1 us of 2; 2048 million operations at 100 TFLOP/s are 20.48 us of 50.
            "lowbit (cuda.linear), m 1: 2 us, 50 % of what the ceiling allows": (4, 2e12, "c0"),
            "bfloat16, m 1: 4 us, 50 % of what the ceiling allows": (2, 1e12, "c"),
            "lowbit (cuda.linear), m 512: 50 us, 41 % of what the ceiling allows": (2048, 4.096e13, "c0"),
            "bfloat16, m 512: 100 us, 20.5 % of what the ceiling allows": (1024, 2.048e13, "c"),
        }
        assert plot["points"].keys() == points.keys()
        for name, (x, y, colour) in points.items():
            assert plot["points"][name] == (pytest.approx(x, rel=0.02), pytest.approx(y, rel=0.02), colour)
    assert "Left of 100 operations a byte memory is the limit" in told(page)
    # Ours are drawn last, over the others.
    assert re.findall(r'<g class="(.*?)"', page) == ["c", "c0"] * 2


def test_the_roof_is_that_of_the_measured_copy_and_product(drawn):
    for svg in re.findall(r'<svg [^>]*class="plot.*?</svg>', drawn(4e6), re.DOTALL):
        ticks = {
            text: float(at)
            for at, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">(.*?)<', svg)
        }
        levels = {
            text: float(at) - 4
            for at, text in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">(.*?)<', svg)
        }
        slope, flat = (
            [tuple(map(float, end.split())) for end in path.split("L")]
            for path in re.findall(r'<path d="M([^"]*)" class="roof"', svg)
        )
        # 1 TB/s of 1 and of 100 operations a byte; then 100 TFLOP/s, to the end.
        assert slope == [
            pytest.approx((ticks["1"], levels["1\N{NO-BREAK SPACE}T"]), abs=0.11),
            pytest.approx((ticks["100"], levels["100\N{NO-BREAK SPACE}T"]), abs=0.11),
        ]
        assert flat == [slope[1], pytest.approx((ticks["10000"], levels["100\N{NO-BREAK SPACE}T"]), abs=0.11)]
        assert ">copy 1 TB/s<" in svg
        assert ">bfloat16 product 100 TFLOP/s<" in svg


def test_what_computes_nothing_stands_under_the_copy(drawn, plots):
    page = drawn(0)
    assert "No operations are counted here, so memory alone is the limit" in told(page)
    for plot in plots(page, x=10, y=10):
        assert plot["axes"] == ["B/s", "bytes that must be moved"]
        assert plot["points"]["lowbit (cuda.linear), m 512: 50 us, 2 % of what the ceiling allows"] == (
            pytest.approx(1e6, rel=0.02),
            pytest.approx(2e10, rel=0.02),
            "c0",
        )
        assert len(plot["points"]) == 4
    assert page.count('class="roof"') == 2
    assert "product" not in page
