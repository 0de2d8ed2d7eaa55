"""What is the x axis of speedups, what shares a plot, and what a line."""

from __future__ import annotations

from itertools import product

import pytest

from lowbit.bench.curves import DASHES, MOST_LINES, curves, kinds, lengths
from lowbit.bench.outcomes import run_of


@pytest.fixture
def drawn(results, contender):
    """`drawn(cases, ...)`: the curves of cases with lowbit twice as fast as its baseline, and peers."""

    def make(cases, peers=()):
        rows = []
        for case in cases:
            timed = [contender("candidate", "lowbit", 1e-6), contender("baseline", "bfloat16", 2e-6)]
            timed += [contender("reference", "reference", 1.0)]
            rows.append((case, 1, [*timed, *(contender("peer", name, 4e-6) for name in peers)]))
        return curves(run_of(results(rows), "x").outcomes)

    return make


def at(line):
    return [x for x, _ in line.points]


def test_the_axis_is_the_length_that_most_cases_differ_in_alone(drawn):
    wide = [{"m": m, "n": 64, "k": 32} for m in (64, 1, 16)]
    found = drawn([*wide, {"m": 1, "n": 128, "k": 32}, {"m": 1, "n": 128, "k": 64}])
    assert (found.axis, found.joined) == ("m", True)
    assert found.fixed == ("n 64, k 32", "n 128, k 32", "n 128, k 64")
    (panel,) = found.panels
    assert [(line.kind, line.fixed, at(line)) for line in panel.lines] == [
        (0, 0, [1, 16, 64]),
        (0, 1, [1]),
        (0, 2, [1]),
    ]
    assert all(each.case["m"] == x for line in panel.lines for x, each in line.points)


def test_cases_of_other_words_have_a_plot_of_their_own_and_contenders_a_line(drawn):
    found = drawn([{"format": f, "op": "", "m": m} for f, m in product(("MXFP4", "MXFP8"), (1, 2))], ["other"])
    assert [panel.title for panel in found.panels] == ["MXFP4", "MXFP8"]
    assert [[line.kind for line in panel.lines] for panel in found.panels] == [[0, 1], [0, 1]]
    assert [line.points[0][1].name for line in found.panels[1].lines] == ["lowbit", "other"]
    assert found.fixed == ("",)


def test_shapes_that_share_no_length_lie_by_their_product_and_are_not_joined(drawn):
    found = drawn([{"m": 5, "n": 64, "k": 7}, {"m": 2, "n": 32, "k": 7}])
    assert (found.axis, found.joined) == ("m \N{MULTIPLICATION SIGN} n", False)
    assert at(found.panels[0].lines[0]) == [64, 320]
    assert found.fixed == ("",)


def test_a_shape_in_words_is_its_number_of_elements(drawn):
    assert lengths({"shape": "16x256", "heads": "32/8", "m": 4, "n": "", "none": 0, "2x": "x"}) == {
        "shape": 4096,
        "m": 4,
    }
    found = drawn([{"op": "quantize", "shape": shape} for shape in ("64x64", "16x16")])
    assert (found.axis, found.joined) == ("shape", True)
    assert at(found.panels[0].lines[0]) == [256, 4096]


def test_a_length_that_not_all_cases_have_is_no_axis(drawn):
    found = drawn([{"n": 8, "k": 2}, {"n": "", "k": 2}, {"n": 16, "k": 2}, {"n": 32, "k": 2}, {"n": 16, "k": 4}])
    assert found.axis == "k"


@pytest.mark.parametrize("case", [{}, {"format": "MXFP4"}, {"m": 16}])
def test_one_size_is_drawn_too(drawn, case):
    found = drawn([case])
    assert found.axis == ("m" if "m" in case else "")
    assert at(found.panels[0].lines[0]) == [case.get("m", 1)]


def test_more_lines_than_can_be_told_apart_are_plots_of_their_own(drawn):
    few = [{"m": m, "n": n} for n in range(1, len(DASHES) + 1) for m in range(1, 10)]
    assert len(drawn(few).panels) == 1
    more = drawn([*few, *({"m": m, "n": 99} for m in range(1, 10))])
    assert [panel.title for panel in more.panels] == [f"n {n}" for n in (*range(1, len(DASHES) + 1), 99)]
    assert more.fixed == ()
    assert {line.fixed for panel in more.panels for line in panel.lines} == {0}
    crowd = [f"other {i}" for i in range(MOST_LINES // len(DASHES))]
    assert len(drawn(few, crowd).panels) == len(DASHES)


def test_lowbit_has_the_first_colour_and_baselines_that_of_the_rest(results, contender):
    timed = [contender("baseline", "base", 1.0), *(contender("peer", f"p{i}", 1.0) for i in range(9))]
    found = kinds(run_of(results([({}, 0, [*timed, contender("candidate", "lowbit", 1.0)])]), "x").outcomes)
    assert found == {"base": None, "lowbit": 0} | {f"p{i}": i + 1 if i < 7 else None for i in range(9)}


def test_without_a_baseline_there_is_nothing_to_draw(results, contender):
    run = run_of(results([({"m": 1}, 1, [contender("candidate", "lowbit", 1.0)])]), "x")
    assert curves(run.outcomes).panels == ()
