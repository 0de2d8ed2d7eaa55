"""Axes of plots, and that what is drawn stands where they say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import pytest

from lowbit.bench.charts import Axis, Ceiling, Dot, Trace, levels, lines, places, powers, ratios, roof, short, stack
from lowbit.bench.curves import DASHES


def named(axis):
    return [text for _, text in axis.ticks]


def test_places_are_ticks_half_an_octave_from_the_edges():
    axis = places("m", [64, 1, 16, 16])
    assert named(axis) == ["1", "16", "64"]
    assert (axis.low, axis.high) == pytest.approx((1 / math.sqrt(2), 64 * math.sqrt(2)))
    assert [axis.share(x) for x in (1, 64)] == pytest.approx([0.5 / 7, 6.5 / 7])
    assert places("m", [16]).share(16) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1.1], ["1", "1.25"]),
        ([1.0], ["1", "1.25"]),
        ([0.9, 1.9], ["0.875", "1", "1.25", "1.5", "1.75", "2"]),
        ([0.6, 3.5], ["0.5", "0.75", "1", "1.5", "2", "3", "4"]),
        ([0.15], ["1/8", "0.188", "0.25", "0.375", "0.5", "0.75", "1"]),
        ([0.2, 9], ["1/16", "0.25", "1", "4", "16"]),
        ([0.03, 4], ["1/64", "1/16", "0.25", "1", "4"]),
        ([2e-3], ["2⁻¹⁰", "1/256", "1/64", "1/16", "0.25", "1"]),
        ([1e-6, 2e4], ["2⁻²¹", "2⁻¹⁴", "1/128", "1", "128", "2¹⁴", "2²¹"]),
    ],
)
def test_ratios_are_round_and_hold_one(values, told):
    axis = ratios("", values)
    assert named(axis) == told
    at = [tick for tick, _ in axis.ticks]
    assert 1 in at
    assert 2 <= len(at) <= 7
    assert axis.low == at[0] <= min(values)
    assert axis.high == at[-1] >= max(values)
    for tick, text in axis.ticks:
        over, _, under = text.partition("/")
        if not set(text) & set("⁻¹⁰"):
            assert float(over) / float(under or 1) == pytest.approx(tick, rel=0.003)
        else:
            assert (2.0 ** int(text[1:].translate(str.maketrans("⁻⁰¹²⁴", "-0124")))) == tick


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([18.9, 41.2], ["10", "20", "30", "40", "50"]),
        ([30.1], ["30", "31"]),
        ([30], ["30", "31"]),
        ([-7.5, 3], ["\N{MINUS SIGN}10", "\N{MINUS SIGN}5", "0", "5"]),
    ],
)
def test_levels_are_round(values, told):
    axis = levels("", values)
    assert named(axis) == told
    assert axis.low <= min(values) <= max(values) <= axis.high


def test_powers_are_whole_decades_with_ticks_within_where_they_are_few():
    assert named(powers("", [3, 700])) == ["1", "10", "100", "1000"]
    assert named(powers("", [2, 30])) == ["1", "2", "5", "10", "20", "50", "100"]
    assert named(powers("", [10])) == ["10", "20", "50", "100"]
    axis = powers("", [0.02, 3e14])
    assert (axis.low, axis.high) == (0.01, 1e15)
    assert [round(math.log10(tick)) for tick, _ in axis.ticks] == [-2, 1, 4, 7, 10, 13]
    assert axis.share(1e15) == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.01, "0.01"),
        (264.55, "264.6"),
        (4096, "4096"),
        (99999, "99999"),
        (134217728, "134 M"),
        (1e5, "100 k"),
        (999_999, "1000 k"),
        (1e18, "1000 P"),
    ],
)
def test_numbers_in_few_letters(number, text):
    assert short(number).replace("\N{NO-BREAK SPACE}", " ") == text


LINEAR = Axis("up", ((0.0, "0"), (10.0, "10")), 0.0, 10.0)


def parsed(markup):
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", markup, re.DOTALL)]


def marks(svg):
    """Markers by what is told of them: where they are."""
    return {
        each.find("title").text: tuple(map(float, re.findall(r"[\d.]+", each.get("transform"))))
        for each in svg.iter("path")
        if each.get("transform")
    }


def test_traces_are_joined_dashed_and_hollow_as_they_say():
    a, b = Dot(1, 0, "a"), Dot(16, 10, "b")
    traces = [Trace(0, (a, b), dash=1), Trace(None, (a, b), joined=False), Trace(2, (b,), hollow=True), Trace(1, ())]
    (svg,) = parsed(lines(traces, places("m", [1, 16]), LINEAR, label="what", height=200, mark=5.0))
    assert svg.find("title").text == "what"
    groups = svg.findall("g")
    assert [group.get("class") for group in groups] == ["c0", "c", "c2 hollow", "c1"]
    curves = [[path for path in group if path.get("class") == "curve"] for group in groups]
    assert [len(each) for each in curves] == [1, 0, 0, 0]
    assert curves[0][0].get("stroke-dasharray") == DASHES[1]
    ends = [tuple(map(float, end.split())) for end in curves[0][0].get("d")[1:].split("L")]
    assert ends == list(marks(svg).values())
    # The plot's height of 200 has 24 above and 40 below; its width of 344 has 48 and 20, and 5 octaves.
    assert ends == [pytest.approx((48 + 276 * 0.1, 160), abs=0.06), pytest.approx((48 + 276 * 0.9, 24), abs=0.06)]
    (mark,) = (path for path in svg.iter("path") if path.get("class") == "mark")
    assert mark.get("d") == "M48 92.0H324"


def test_ticks_without_room_are_left_out():
    (svg,) = parsed(lines([], places("m", [1, 1.1, 1024, 4096]), LINEAR, label="", height=200))
    shown = [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle" and not text.get("class")]
    assert shown == ["1", "1024", "4096"]


def test_rows_lie_one_below_the_other_each_below_its_title():
    long = "a very long title " * 5
    rows = [("first", [Trace(0, (Dot(7, 2.5, "a"),))]), (long, [Trace(1, (Dot(7, 10, "b"), Dot(7, 0, "c")))])]
    (svg,) = parsed(stack(rows, LINEAR, label="", mark=10.0))
    found = marks(svg)
    assert {name: x for name, (x, _) in found.items()} == pytest.approx({"a": 28 + 296 / 4, "b": 324, "c": 28})
    titles = [text for text in svg.iter("text") if text.get("class") == "halo"]
    assert [title.find("title").text for title in titles] == ["first", long]
    cut = titles[1].find("title").tail
    assert (len(cut), cut[-1]) == (52, "\N{HORIZONTAL ELLIPSIS}")
    tops = [float(title.get("y")) for title in titles]
    assert tops[0] < found["a"][1] < tops[1] < found["b"][1] == found["c"][1] < int(svg.get("viewBox").split()[3]) - 40


def test_a_roof_is_drawn_for_both_widths():
    x, y = powers("a byte", [1, 1000]), powers("a second", [1, 1000])
    ceilings = [Ceiling("slope", ((1, 10), (100, 1000))), Ceiling("flat", ((100, 1000), (1000, 1000)))]
    found = parsed(roof([Trace(0, (Dot(10, 100, "on it"),), joined=False)], x, y, ceilings, label="what"))
    assert [svg.get("class") for svg in found] == ["plot wide", "plot narrow"]
    for svg in found:
        slope, flat = (path.get("d")[1:] for path in svg.iter("path") if path.get("class") == "roof")
        (left, low), (right, high) = (map(float, end.split()) for end in slope.split("L"))
        assert marks(svg)["on it"] == pytest.approx(((left + right) / 2, (low + high) / 2), abs=0.11)
        assert flat.split("L")[0] == slope.split("L")[1]
        texts = {text.text: text for text in svg.iter("text")}
        assert float(texts["flat"].get("y")) < high
        # Where the name of the slope ends, the slope is further right, and it is not above the name's letters.
        at = float(texts["slope"].get("y"))
        assert float(texts["slope"].get("x")) < right - (at - high) * (right - left) / (low - high)
        assert high < at < low
