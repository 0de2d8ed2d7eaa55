"""The page of `lowbit bench`: what is on it, for every file of results there is, and that nothing else gets into it."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowbit.bench.outcomes import read_run, run_of
from lowbit.bench.page import check_place, render, write
from lowbit.errors import CheckpointError, LowbitError

FILES = sorted((Path(__file__).parents[4] / "benchmarks").glob("bench-*.json"))
HOSTILE = "\"'><script>alert(1)</script></style></title><img src=x onerror=alert(2)>&lt;\u202e\udce9"


class _Page(HTMLParser):
    """The elements of a page with their attributes' names, and its text."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, *(name for name, _ in attrs)))
        if tag not in {"meta", "wbr"}:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in {"style", "script"}:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def table_of(page):
    """The cells of its tables, row by row, the heading first."""
    return [
        [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]


@pytest.fixture
def given(results, contender):
    def make(count=2, **changes):
        rows = []
        for i in range(count):
            timed = [
                contender("candidate", "lowbit", 2e-6 * (i + 1), sqnr=(18.91, 12.5)),
                contender("baseline", "base", 5e-6),
            ]
            timed += [contender("peer", "fast", 1.5e-3, sqnr=(200.0, -200.0)), contender("reference", "reference", 1.0)]
            timed += [{"role": "peer", "name": "absent", "refusal": "needs a\n moon"}]
            rows.append(({"format": "MXFP4", "m": 2**i}, 8, timed))
        return results(rows, **changes)

    return make


def test_every_case_is_in_the_table_with_its_numbers(given):
    heading, *rows = table_of(render([run_of(given(), "x")]))
    assert heading == ["By", "format", "m", "Time, \N{MICRO SIGN}s", "Over baseline", "SQNR, dB", "With outliers"]
    assert rows == [
        ["lowbit (cuda.linear)", "MXFP4", "1", "2.00", "2.5", "18.9", "12.5"],
        ["base", "MXFP4", "1", "5.00", "", "30.0", "20.0"],
        ["fast", "MXFP4", "1", "1,500", "0.00333", "the same", "not finite"],
        ["lowbit (cuda.linear)", "MXFP4", "2", "4.00", "1.25", "18.9", "12.5"],
        ["base", "MXFP4", "2", "5.00", "", "30.0", "20.0"],
        ["fast", "MXFP4", "2", "1,500", "0.00333", "the same", "not finite"],
    ]


def test_machine_refusals_and_seed_are_told(given):
    text = _Page(render([run_of(given(shapes_seed=7), "somewhere/x.json")])).text
    assert "lowbit bench linear" in text
    assert "linear on a GPU, 2026-11-27, shapes drawn by seed 7" in text
    assert "not absent: needs a moon (2 times)" in text
    assert "ceilingscopy of 1 GiB 1 TB/s, bfloat16 product of side 8192 100 TFLOP/s" in text
    assert "versionstorch 2.11" in text
    # Not the folder, which may be nobody's business.
    assert text.endswith("sourcex.json")


def test_several_runs_are_sections_of_one_page(given):
    runs = [run_of(given(), "x"), run_of(given(1, benchmark="cast", device="a CPU"), "y")]
    page = render(runs)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["linear on a GPU, 2026-11-27", "cast on a CPU, 2026-11-27"]
    assert "<h1>lowbit bench linear, cast</h1>" in page
    assert len(table_of(page)) == 1 + 6 + 1 + 3


@pytest.mark.parametrize(("count", "folded"), [(20, False), (21, True)])
def test_a_long_table_is_folded(given, count, folded):
    page = render([run_of(given(count), "x")])
    assert ("<details>" in page) is folded
    assert len(table_of(page)) == 1 + 3 * count


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_of_results_is_drawn(file, plots):
    run = read_run(file)
    page = render([run])
    assert not re.search(r'"[^"]*\b(?:nan|inf)\b[^"]*"', page)
    found = plots(page)
    assert {plot["class"] for plot in found[-2:]} == {"plot wide", "plot narrow"}
    shown = [each for each in run.outcomes if each.role != "reference"]
    assert len(table_of(page)) == 1 + len(shown)
    # Some are of one case: in other runs of it, or of shapes drawn twice.
    assert len(found[-1]["points"]) == len({each.words for each in shown if each.flops or not run.outcomes[0].flops})
    fast = [name for plot in found for name in plot["points"] if name.endswith(" over baseline")]
    assert len(fast) == sum(each.speedup is not None for each in shown)
    heights = [float(at) for at in re.findall(r"translate\([-\d.]+ ([-\d.]+)\)", page)]
    assert min(heights) >= 0
    for words in {each.reason for each in run.missing}:
        assert html.escape(words) in page


def test_results_without_a_time_are_refused(given):
    empty = given()
    for row in empty["rows"]:
        row["contenders"] = row["contenders"][-1:]
    for results in (empty, given(0)):
        with pytest.raises(LowbitError, match="y: there is nothing to draw, for no contender was timed; `lowbit bench"):
            render([run_of(given(), "x"), run_of(results, "y")])


def test_hostile_names_add_no_element_and_no_attribute(given):
    def poison(value):
        match value:
            case str():
                return HOSTILE + value if value else value
            case list():
                return [poison(item) for item in value]
            case dict():
                return {key: item if key == "role" else poison(item) for key, item in value.items()}
        return value

    harmless = given()
    hostile = poison(harmless) | {"version": 1}
    for row in hostile["rows"]:
        row["case"] = {HOSTILE + name: value for name, value in row["case"].items()}
    page = render([run_of(hostile, HOSTILE)])
    assert _Page(page).elements == _Page(render([run_of(harmless, "x")])).elements
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("alert(1)") > 30
    for closing in ("</style>", "</script>"):
        assert page.count(closing) == 1
    page.encode()


def test_a_page_asks_for_nothing_and_runs_nothing_but_its_own(given):
    page = render([run_of(given(), "x")])
    assert not re.search(r"""\b(?:src|href|on\w+)\s*=|url\(|@import|https?:""", page)
    assert "default-src &#x27;none&#x27;" in page
    assert " style=" not in page


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "x.html"
    file.write_text("old")
    write("new \N{MICRO SIGN}", file)
    assert file.read_text(encoding="utf-8") == "new \N{MICRO SIGN}"
    assert list(tmp_path.iterdir()) == [file]

    def full(self, text, **options):
        with self.open("w") as out:
            out.write(text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*x.html: .*No space left"):
        write("newer", file)
    assert file.read_text(encoding="utf-8") == "new \N{MICRO SIGN}"
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.json").touch()
    check_place(tmp_path / "x.html", "--out", [tmp_path / "x.json", None])
    for path, words in (
        (tmp_path / "no" / "x.html", "its folder does not exist"),
        (tmp_path, "that is a folder; name a file"),
        (tmp_path / "." / "x.json", "that is the file of the results; name a file"),
    ):
        with pytest.raises(LowbitError, match=words):
            check_place(path, "--out", [tmp_path / "x.json"])


def test_a_browser_fits_it_into_a_phone(measured, given):
    names = ("linear-h100", "cast-epyc-zen3", "bags-xeon", "attention-h100", "gptq-h100")
    pages = [render([read_run(next(file for file in FILES if f"bench-{name}" in file.name))]) for name in names]
    pages.append(render([run_of(given(device="a-very-long-name-" * 9), "x" * 200)]))
    for page in measured([(page, width) for page in pages for width in (360, 1000)]):
        assert page["plots"] >= 1
