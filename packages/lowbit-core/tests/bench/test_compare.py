"""`lowbit bench compare`: what it calls slower, faster and less accurate, and with which numbers."""

from __future__ import annotations

import json
import math

import pytest

from lowbit.bench import command
from lowbit.bench.compare import compare
from lowbit.bench.outcomes import run_of
from lowbit.errors import LowbitError

# Of quartiles 2 % apart: three times that for each of two times, or of four.
TWO, FOUR = 0.06 * math.sqrt(2), 0.06 * 2


@pytest.fixture
def told(results, contender):
    """`told([(m, seconds, sqnr), ...], ...)`: results of lowbit beside a baseline that takes 3 s."""

    def make(rows, base=3.0, spread=0.02, samples=100, **changes):
        made = []
        for m, seconds, sqnr in rows:
            ours = {"role": "candidate", "name": "lowbit", "refusal": sqnr, "failed": True}
            if seconds:
                ours = contender("candidate", "lowbit", seconds, spread=spread, samples=samples, sqnr=sqnr)
            bases = [contender("baseline", "bfloat16", base, spread=spread, samples=samples)] if base else []
            made.append(({"format": "MXFP4", "m": m}, 1, [ours, *bases]))
        return results(made, **changes)

    return make


@pytest.fixture
def files(tmp_path, capsys):
    """`files(a, b, ...)`: the exit code of comparing them, what was printed, and the error."""

    def run(a, b, *options):
        for name, found in (("a", a), ("b", b)):
            (tmp_path / f"{name}.json").write_text(json.dumps(found))
        try:
            code = command.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def ours(a, b):
    return compare(run_of(a, "a.json"), run_of(b, "b.json")).ours


@pytest.mark.parametrize(
    ("seconds", "verdict", "code"),
    [
        (1.0, "same", 0),
        (1 + TWO - 0.001, "same", 0),
        (1 + TWO + 0.001, "slower", 1),
        (1 / (1 + TWO) + 0.001, "same", 0),
        (1 / (1 + TWO) - 0.001, "faster", 0),
    ],
)
def test_slower_is_more_than_the_quartiles_explain(told, files, seconds, verdict, code):
    a, b = told([(1, 1.0, (30, 20))]), told([(1, seconds, (30, 20))])
    (pair,) = ours(a, b)
    assert (pair.ratio, pair.noise, pair.fall) == (pytest.approx(seconds), pytest.approx(TWO), 0)
    assert pair.verdict == verdict
    found, out, _ = files(a, b)
    assert found == code
    assert f"{seconds:.3f}  8.5%" in out
    assert out.splitlines()[-1] == (
        f"1 row of lowbit in both: {int(verdict == 'slower')} slower, {int(verdict == 'faster')} faster, "
        "0 less accurate"
    )


def test_few_samples_count_by_the_error_of_their_median(told):
    # Four samples whose quartiles are 2 % apart: 1.4 times that; then thrice the median of all in the file.
    few = told([(1, 1.0, (30,))], samples=4)
    (pair,) = ours(few, told([(1, 1.0, (30,))]))
    assert pair.noise == pytest.approx(math.hypot(3 * 1.4 * 0.02, 3 * 0.02))


def test_a_row_of_wide_quartiles_is_as_uncertain_as_they_are(told, contender):
    a, b = told([(m, 1.0, (30,)) for m in range(4)]), told([(m, 1.0, (30,)) for m in range(4)])
    b["rows"][2]["contenders"][0] |= {"quartiles": [0.9, 1.2], "seconds": 1.0}
    assert [pair.noise for pair in ours(a, b)] == pytest.approx([TWO, TWO, math.hypot(0.06, 0.3), TWO])


@pytest.mark.parametrize(
    ("before", "after", "fall", "worse"),
    [
        ((30, 20), (29.1, 19.1), 0.9, False),
        ((30, 20), (28.9, 25), 1.1, True),
        ((30, 20), (35, 18.5), 1.5, True),
        ((30, 20), (31, 22), -1, False),
        ((200, 200), (200, -200), 400, True),
        ((30,), (30, 20), 0, False),
        ((), (30, 20), None, False),
    ],
)
def test_less_accurate_is_more_than_one_decibel_on_either_kind(told, files, before, after, fall, worse):
    a, b = told([(1, 1.0, before)]), told([(1, 1.0, after)])
    (pair,) = ours(a, b)
    assert pair.fall == (None if fall is None else pytest.approx(fall))
    assert pair.verdict == (f"same, SQNR {fall:.1f} dB lower" if worse else "same")
    code, out, _ = files(a, b)
    assert code == worse
    assert out.splitlines()[-1].endswith(f", {int(worse)} less accurate")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": "another GPU"}, "the devices differ: a GPU, and another GPU"),
        ({"clocks": {"clocks.sm": "1980", "temperature.gpu": "41"}}, "the clocks differ: clocks.sm unknown and 1980"),
    ],
)
def test_elsewhere_times_over_the_baseline_are_compared(told, files, changes, why):
    a = told([(1, 1.0, (30,)), (16, 1.0, (30,))])
    # Everything takes twice as long there, and the second row four times.
    b = told([(1, 2.0, (30,)), (16, 4.0, (30,))], base=6.0, **changes)
    same, slower = ours(a, b)
    assert (same.ratio, slower.ratio) == (pytest.approx(1), pytest.approx(2))
    assert (same.noise, slower.noise) == (pytest.approx(FOUR), pytest.approx(FOUR))
    assert (same.verdict, slower.verdict) == ("same", "slower")
    code, out, _ = files(a, b)
    assert code == 1
    assert f"compared: times over the baseline's, for {why}" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "format m by A B A over baseline B over baseline B/A noise verdict" in lines
    assert "MXFP4 16 lowbit 1 s 4 s 3 1.5 2.000 12% slower" in lines
    assert "MXFP4 16 bfloat16 3 s 6 s not compared: it is the baseline" in lines


def test_at_the_same_clocks_times_are_compared_however_warm_it_is(told, files):
    clocks = {"clocks.sm": "1980", "power.limit": "700"}
    a = told([(1, 1.0, (30,))], clocks=clocks | {"temperature.gpu": "41"})
    code, out, _ = files(a, told([(1, 1.0, (30,))], base=1.0, clocks=clocks | {"temperature.gpu": "55"}))
    assert code == 0
    assert "compared: times\n" in out
    # The baseline has become faster, which is nobody's fault.
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("MXFP4")] == ["same", "faster"]


@pytest.mark.parametrize(
    ("base", "words"), [(None, "B has no baseline"), ("eager", "the baselines are bfloat16 and eager")]
)
def test_what_has_not_the_same_baseline_elsewhere_is_not_compared(told, files, base, words):
    a = told([(1, 1.0, (30,)), (2, 1.0, (30,))])
    b = told([(1, 9.0, (30,)), (2, 1.0, (30,))], device="another GPU")
    if base is None:
        del b["rows"][0]["contenders"][1]
    else:
        b["rows"][0]["contenders"][1]["name"] = base
    code, out, _ = files(a, b)
    assert code == 0
    assert f"not compared: {words}" in out
    assert "2 rows of lowbit in both: 0 slower, 0 faster, 0 less accurate, 1 not compared" in out


def test_only_candidates_make_it_fail(told, files):
    a, b = told([(1, 1.0, (30,))]), told([(1, 1.0, (30,))], base=9.0)
    code, out, _ = files(a, b)
    assert code == 0
    assert "bfloat16  3 s  9 s  3.000  8.5%   slower" in out
    assert "1 row of lowbit in both: 0 slower, 0 faster, 0 less accurate" in out


def test_rows_of_one_file_are_listed_and_a_candidate_that_fails_is_a_problem(told, files, contender):
    a = told([(1, 1.0, (30,)), (2, 1.0, (30,)), (4, 1.0, (30,))])
    b = told([(1, 1.0, (30,)), (2, None, "MemoryError: too\n little"), (8, 1.0, (30,))])
    b["rows"][0]["contenders"].append(contender("peer", "a, b", 1.0))
    b["rows"][0]["contenders"].append(contender("peer", "c", 1.0))
    code, out, _ = files(a, b)
    assert code == 1
    lines = out.splitlines()
    assert "only in A: MXFP4, m 2: lowbit" in lines
    assert "only in A: MXFP4, m 4: lowbit; bfloat16" in lines
    assert "only in B: MXFP4, m 1: a, b; c" in lines
    assert "only in B: MXFP4, m 8: lowbit; bfloat16" in lines
    assert "FAILED in B: lowbit, MXFP4, m 2: MemoryError: too little" in lines
    assert lines[-1] == "1 row of lowbit in both: 0 slower, 0 faster, 0 less accurate, 1 failed"
    b["rows"][1]["contenders"][0]["failed"] = False
    code, out, _ = files(a, b)
    assert code == 0
    assert "not in B: lowbit, MXFP4, m 2: MemoryError: too little" in out.splitlines()


def test_a_case_that_stands_twice_is_matched_in_order(told):
    a, b = told([(1, 1.0, (30,)), (1, 2.0, (30,))]), told([(1, 1.0, (30,)), (1, 4.0, (30,)), (1, 9.0, (30,))])
    assert [pair.ratio for pair in ours(a, b)] == [1, 2]
    found = compare(run_of(a, "a"), run_of(b, "b"))
    assert [(each.name, each.seconds) for each in found.only_b] == [("lowbit", 9.0), ("bfloat16", 3.0)]


def test_as_json(told, files):
    a, b = told([(1, 1.0, (30, 20)), (2, 1.0, ())]), told([(1, 2.0, (30, 15))], device="another GPU")
    code, out, _ = files(a, b, "--json")
    found = json.loads(out)
    assert code == 1
    assert (found["benchmark"], found["compared"]) == ("linear", "speedup")
    assert [file.rpartition("/")[2] for file in found["files"]] == ["a.json", "b.json"]
    row = found["rows"][0]
    assert row == {
        "case": {"format": "MXFP4", "m": 1},
        "role": "candidate",
        "name": "lowbit",
        "seconds": [1.0, 2.0],
        "speedup": [3.0, 1.5],
        "sqnr": [{"normal": 30, "outliers": 20}, {"normal": 30, "outliers": 15}],
        "ratio": 2.0,
        "noise": pytest.approx(FOUR),
        "fall": 5,
        "verdict": "slower, SQNR 5.0 dB lower",
    }
    assert found["rows"][1]["ratio"] is None
    assert found["only_a"] == [
        {"case": {"format": "MXFP4", "m": 2}, "role": role, "name": name}
        for role, name in (("candidate", "lowbit"), ("baseline", "bfloat16"))
    ]
    assert (found["only_b"], found["failed"]) == ([], [])
    assert found["summary"] == "1 row of lowbit in both: 1 slower, 0 faster, 1 less accurate"


def test_runs_that_cannot_be_compared_are_refused(told, files):
    a = told([(1, 1.0, (30,))])
    for b, words in (
        (told([(1, 1.0, (30,))], benchmark="cast"), "a.json is of the benchmark linear, "),
        (told([(2, 1.0, (30,))]), "have no case and contender in common; run both on the same cases"),
        (told([(1, 1.0, (30,))], base=None, device="another GPU"), "can be compared: the devices differ: a GPU, and"),
        (told([(1, 1.0, (30,))], version=2), "b.json holds no results of version 1"),
    ):
        code, out, err = files(a, b)
        assert (code, out) == (2, "")
        assert words in err
    with pytest.raises(LowbitError, match="compare two runs of one"):
        ours(a, told([(1, 1.0, (30,))], benchmark="cast"))


def test_without_a_candidate_the_others_are_shown(told, files):
    a = told([(1, None, "not yet")])
    code, out, _ = files(a, a)
    assert code == 0
    assert out.splitlines()[-1] == "0 rows of candidates in both: 0 slower, 0 faster, 0 less accurate"
    assert "bfloat16  3 s  3 s  1.000" in out
