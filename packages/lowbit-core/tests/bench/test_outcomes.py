"""Results as values: what is read, and that nothing is drawn or compared which is not what it should be."""

from __future__ import annotations

import copy
import json
import math

import pytest

from lowbit.bench.outcomes import Missing, Outcome, in_line, read_run, run_of
from lowbit.errors import LowbitError

CASE = {"format": "MXFP4", "m": 16, "choice": ""}


@pytest.fixture
def told(results, contender):
    refusal = {"role": "peer", "name": "absent", "refusal": "needs a\n  moon", "failed": True}
    ours = contender("candidate", "lowbit", 2e-6, samples=7, sqnr=(18.9,), moved=300.0)
    return results([(CASE, 600, [ours, contender("baseline", "bfloat16", 5e-6), refusal])], shapes_seed=3)


def test_a_run_is_what_the_file_says(told, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(told))
    run = read_run(file)
    assert (run.source, run.benchmark, run.seed, run.device, run.date) == (
        str(file),
        "linear",
        3,
        "a GPU",
        "2026-11-27",
    )
    assert (run.bandwidth, run.compute, run.dtype) == (1e12, 1e14, "bfloat16")
    ours, base = run.outcomes
    assert ours == Outcome(
        case=CASE,
        role="candidate",
        name="lowbit",
        kernel="cuda.linear",
        seconds=2e-6,
        low=2e-6 * 0.99,
        high=2e-6 * 1.01,
        samples=7,
        flops=600,
        moved=300.0,
        sqnr={"normal": 18.9},
        baseline=base,
    )
    assert ours.speedup == pytest.approx(2.5)
    assert base.speedup is None
    assert ours.words == "lowbit (cuda.linear), MXFP4, m 16: 2 us"
    assert run.missing == (Missing(case=CASE, role="peer", name="absent", reason="needs a moon", failed=True),)


def test_older_results_do_not_tell_the_dtype_of_the_product(told):
    del told["ceilings"]["dtype"]
    assert run_of(told, "x").dtype == "bfloat16"


def test_without_a_time_of_the_baseline_there_is_no_speedup(told):
    told["rows"][0]["contenders"][1] = {"role": "baseline", "name": "bfloat16", "refusal": "out of memory"}
    (ours,) = run_of(told, "x").outcomes
    assert (ours.baseline, ours.speedup) == (None, None)


def test_a_case_in_a_line():
    assert in_line({"format": "MXFP4", "n": "", "shape": "16x32", "k": 4096, "share": 0.5}) == (
        "MXFP4, 16x32, k 4096, share 0.5"
    )


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["environment"], [], "x: environment is [], not an object"),
        (["environment", "device"], 3, "x: environment.device is 3, not a string"),
        (["environment", "clocks"], None, "x: environment.clocks is None, not an object"),
        (["environment", "versions"], {"torch": 2}, "x: environment.versions.torch is 2, not a string"),
        (["ceilings", "bytes_per_s"], 0, "x: ceilings.bytes_per_s is 0, not a positive number"),
        (["ceilings", "flops_per_s"], math.inf, "x: ceilings.flops_per_s is inf, not a finite number"),
        (["ceilings", "copied"], None, "x: ceilings.copied is None, not a finite number"),
        (["benchmark"], None, "x: benchmark is None, not a string"),
        (["rows"], {}, "x: rows is {}, not a list"),
        (["rows", 0], 1, "x: rows[0] is 1, not an object"),
        (["rows", 0, "case"], [], "x: rows[0].case is [], not an object"),
        (["rows", 0, "case"], {"m": [1]}, "x: rows[0].case.m is [1], not a string or a finite number"),
        (["rows", 0, "flops"], True, "x: rows[0].flops is True, not a finite number"),
        (["rows", 0, "contenders"], None, "x: rows[0].contenders is None, not a list"),
        (["rows", 0, "contenders", 1], "y", "x: rows[0].contenders[1] is 'y', not an object"),
        (["rows", 0, "contenders", 0, "role"], "moon", "x: rows[0].contenders[0].role is 'moon', not one of candidate"),
        (["rows", 0, "contenders", 0, "name"], 1, "x: rows[0].contenders[0].name is 1, not a string"),
        (["rows", 0, "contenders", 0, "kernel"], 1, "x: rows[0].contenders[0].kernel is 1, not a string"),
        (["rows", 0, "contenders", 0, "seconds"], 0.0, "contenders[0].seconds is 0.0, not a positive number"),
        (["rows", 0, "contenders", 0, "seconds"], math.nan, "contenders[0].seconds is nan, not a finite number"),
        (["rows", 0, "contenders", 0, "seconds"], "1", "contenders[0].seconds is '1', not a finite number"),
        (["rows", 0, "contenders", 0, "quartiles"], [1], "contenders[0].quartiles is [1], not a list of two numbers"),
        (["rows", 0, "contenders", 0, "samples"], None, "contenders[0].samples is None, not a whole number from 1 on"),
        (["rows", 0, "contenders", 0, "moved_bytes"], -1, "contenders[0].moved_bytes is -1, not a positive number"),
        (["rows", 0, "contenders", 0, "sqnr"], [], "contenders[0].sqnr is [], not an object"),
        (["rows", 0, "contenders", 0, "sqnr", "normal"], 3, "contenders[0].sqnr.normal is 3, not an object"),
        (["rows", 0, "contenders", 0, "sqnr", "normal"], {"exact": ""}, "sqnr.normal.exact is '', not a finite number"),
        (["rows", 0, "contenders", 2, "refusal"], 1, "x: rows[0].contenders[2].refusal is 1, not a string"),
    ],
)
def test_what_is_not_as_it_should_be_is_named(told, path, value, words):
    damaged = copy.deepcopy(told)
    part = damaged
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    with pytest.raises(LowbitError) as caught:
        run_of(damaged, "x")
    assert words in str(caught.value)
    assert "`lowbit bench NAME --json FILE` writes what can be read here" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '{"version": 2}', "\udcff"])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LowbitError, match="x.json"):
        read_run(file)
