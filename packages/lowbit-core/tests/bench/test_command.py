"""`lowbit bench`: what it refuses before anything runs, and what becomes of contenders that fail."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from lowbit import backends
from lowbit.backends import Refusal
from lowbit.bench import Benchmark, Case, Contender, Dim, command, copies, plain
from lowbit.bench.outcomes import read_run
from lowbit.bench.page import render
from lowbit.bench.results import read_results
from lowbit.errors import BackendError, LowbitError


def halves(x):
    return x / 2


def fails(x):
    raise MemoryError("not enough of it\nby far")


def benchmark(candidate=halves, peers=()):
    def cases(given):
        for (n,) in given.shapes:
            yield Case(
                {"n": n, "peers": str(given.peers)},
                2 * n,
                lambda kind, n=n: (torch.arange(1.0, n + 1),),
                halves,
                candidate if isinstance(candidate, Refusal) else Contender("lowbit", copies, candidate, n, plain),
                Contender("plain", copies, halves, n, plain),
                peers=peers,
            )

    return Benchmark(
        about="halve",
        dims=(Dim("N", 8, 64, 64, grouped=True),),
        formats=("MXFP8",),
        usual=lambda device: [(32,), (64,)],
        quantized=lambda shape: [(1, *shape)],
        cases=cases,
    )


@pytest.fixture
def given(monkeypatch):
    def install(found):
        point = SimpleNamespace(name="halves", value="somewhere:halves", load=lambda: found)
        monkeypatch.setattr(command, "discover", lambda group, speaker: {"halves": point})

    return install


def test_results_come_back_from_the_file_with_machine_versions_and_ceilings(bench, given, tmp_path):
    given(benchmark())
    code, results, printed = bench("halves", "--peers")
    assert code == 0
    assert results == read_results(tmp_path / "results.json")
    assert [row["case"] for row in results["rows"]] == [{"n": n, "peers": "True"} for n in (32, 64)]
    told = results["environment"]
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0] or told["versions"]["torch"]
    assert "lowbit-core" in told["versions"]
    assert told["device"] in printed.out
    assert results["ceilings"]["bytes_per_s"] == pytest.approx(2 * 2**16 / results["ceilings"]["copy"]["median"])
    assert results["ceilings"]["flops_per_s"] == pytest.approx(2 * 32**3 / results["ceilings"]["product"]["median"])
    for row in results["rows"]:
        for each in row["contenders"]:
            low, high = each["quartiles"]
            assert low <= each["seconds"] <= high
            assert each["how"] == "rotated"
            assert each["rotated"] > 2**16


def test_a_seed_draws_ten_shapes(bench, given):
    given(benchmark())
    _, results, _ = bench("halves", "--shapes-seed", "7")
    assert results["shapes_seed"] == 7
    assert [row["case"]["n"] for row in results["rows"]] == [
        n for (n,) in benchmark().shapes(7, "cpu", [backends.Format.parse("MXFP8")])
    ]


def test_a_peer_that_fails_or_is_missing_is_told_and_the_rest_is_measured(bench, given):
    given(benchmark(peers=(Refusal("absent", "needs a moon"), Contender("broken", copies, fails, 1, plain))))
    code, results, printed = bench("halves", "--shapes", "32")
    assert code == 0
    assert "not absent: needs a moon" in printed.out
    assert "FAILED broken: MemoryError: not enough of it\n" in printed.out
    assert ["seconds" in each for each in results["rows"][0]["contenders"]] == [True, True, False, False]


def test_a_candidate_that_fails_is_a_problem_and_one_without_a_kernel_is_not(bench, given):
    given(benchmark(fails))
    code, results, printed = bench("halves")
    assert code == 1
    assert "FAILED lowbit: MemoryError: not enough of it (2 times)" in printed.out
    assert all("seconds" in row["contenders"][1] for row in results["rows"])
    given(benchmark(Refusal("lowbit", "no kernel takes it")))
    code, _, printed = bench("halves")
    assert code == 0
    assert "not lowbit: no kernel takes it (2 times)" in printed.out


def test_a_benchmark_has_options_and_contenders_tell_of_themselves(bench, given):
    """Also how often it measures, and on which kinds of data."""

    def cases(asked):
        for case in benchmark().cases(asked):
            baseline = replace(case.baseline, tell=lambda: {"perplexity": 7.25 * asked.options.twice})
            yield replace(case, baseline=baseline, kinds=("normal",), samples=4)

    given(replace(benchmark(), cases=cases, options=lambda parser: parser.add_argument("--twice", type=int, default=1)))
    _, results, printed = bench("halves", "--shapes", "32", "--twice", "2")
    lowbit, plain_ = results["rows"][0]["contenders"]
    assert ("perplexity" in lowbit, plain_["perplexity"]) == (False, 14.5)
    assert "14.5000" in printed.out
    assert [each["samples"] for each in (lowbit, plain_)] == [4, 4]
    assert list(lowbit["sqnr"]) == ["normal"]
    given(benchmark())
    with pytest.raises(SystemExit):
        bench("halves", "--twice", "2")


def test_results_are_on_disk_after_every_case(small, given, tmp_path):
    calls = []

    def counts(x):
        calls.append(len(x))
        if len(x) == 64:
            raise KeyboardInterrupt
        return x / 2

    given(benchmark(counts))
    file = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        command.main(["halves", "--seconds", "0.001", "--device", "cpu", "--json", f"{file}"])
    assert not file.exists()
    unfinished = tmp_path / "results.unfinished.json"
    assert [row["case"]["n"] for row in json.loads(unfinished.read_text())["rows"]] == [32]
    given(benchmark())
    command.main(["halves", "--seconds", "0.001", "--device", "cpu", "--json", f"{file}"])
    assert len(json.loads(file.read_text())["rows"]) > 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["moon"], "invalid choice: 'moon'"),
        (["halves", "--shapes", "32x32"], "shape '32x32' must be N"),
        (["halves", "--shapes", "32,0"], "shape '0' must be N"),
        (["halves", "--shapes", "-32"], "shape '-32' must be N"),
        (["halves", "--shapes", "33"], "last dimension 33"),
        (["halves", "--shapes", "32", "--shapes-seed", "1"], "not allowed with"),
        (["halves", "--shapes-seed", "one"], "invalid int value"),
        (["halves", "--formats", "nonsense"], "format 'nonsense' is not one of"),
        (["halves", "--formats", "MXFP8/INT8_ROW"], "MXFP8/INT8_ROW: this benchmark has no inputs"),
        (["halves", "--device", "moon"], "--device moon: torch knows no such device"),
        (["halves", "--device", "meta"], "--device meta: calls are timed on cpu and cuda alone"),
        (["halves", "--device", "cuda:99"], "--device cuda:99: torch finds"),
        (["halves", "--seconds", "0"], "--seconds 0 must be positive"),
        (["halves", "--seconds", "nan"], "--seconds nan must be positive"),
        (["halves", "--seconds", "inf"], "--seconds inf must be positive and finite"),
        (["halves", "--shapes-seed", "-1"], "--shapes-seed -1 must be from 0"),
        (["halves", "--shapes", "9" * 5000], "must be N: whole numbers"),
        (["halves", "--json", "nowhere/x.json"], "--json nowhere/x.json: its folder does not exist"),
        (["halves", "--plot", "nowhere/x.html"], "--plot nowhere/x.html: its folder does not exist"),
        (["halves", "--json", "x", "--plot", "./x"], "--plot x: that is the file of the results"),
        (["plot", "x.json"], "the following arguments are required: --out"),
        (["plot", "nowhere/x.json", "--out", "x.html"], "nowhere/x.json cannot be read as results"),
        (["compare", "x.json"], "the following arguments are required: B.json"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(given, monkeypatch, capsys, words, said):
    given(benchmark(fails))
    monkeypatch.setattr(command, "measure_ceilings", fails)
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run_is_drawn_as_its_file_is(bench, given, tmp_path):
    given(benchmark(peers=(Refusal("absent", "needs a moon"),)))
    page = tmp_path / "page.html"
    assert bench("halves", "--plot", f"{page}")[0] == 0
    file = tmp_path / "results.json"
    assert page.read_text(encoding="utf-8") == render([read_run(file)])
    command.main(["halves", "--seconds", "0.001", "--device", "cpu", "--plot", f"{page}"])
    assert "<dt>source</dt><dd>lowbit bench halves</dd>" in page.read_text(encoding="utf-8")


def test_a_run_that_timed_nothing_is_told_and_leaves_no_page(small, given, tmp_path, capsys):
    given(replace(benchmark(), usual=lambda device: []))
    with pytest.raises(LowbitError, match="lowbit bench halves: there is nothing to draw"):
        command.main(["halves", "--seconds", "0.001", "--device", "cpu", "--plot", f"{tmp_path / 'page.html'}"])
    assert "ceilings: copy" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_no_benchmark_takes_the_name_of_what_is_done_with_results(monkeypatch):
    point = SimpleNamespace(name="plot", value="somewhere:plot")
    monkeypatch.setattr(command, "discover", lambda group, speaker: {"plot": point})
    with pytest.raises(BackendError, match="somewhere:plot cannot be `lowbit bench plot`"):
        command.main(["plot"])


def test_a_benchmark_that_cannot_be_loaded_or_is_none_says_so(given, monkeypatch):
    given("words")
    with pytest.raises(LowbitError, match="somewhere:halves must be a lowbit.bench.Benchmark; it is 'words'"):
        command.main(["halves"])

    def load():
        raise ImportError("no moon")

    point = SimpleNamespace(name="halves", value="somewhere:halves", load=load)
    monkeypatch.setattr(command, "discover", lambda group, speaker: {"halves": point})
    with pytest.raises(LowbitError, match="somewhere:halves cannot be loaded: ImportError: no moon"):
        command.main(["halves"])


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "rows": []}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(LowbitError, match="x.json"):
        read_results(tmp_path / "x.json")


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = capsys.readouterr().out
    for name in ("attention", "bags", "cast", "embedding", "grouped", "linear", "pad"):
        found = import_module(f"lowbit.bench.{name}").benchmark
        assert f"  {name:<10} {found.about}\n" in said
    assert "\nwith results, in the place of a benchmark:\n  compare    Compare two files" in said
    assert "\n  plot       Draw files" in said
