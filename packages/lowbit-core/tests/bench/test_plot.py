"""`lowbit bench plot`: files of results become a page, and what is none becomes nothing."""

from __future__ import annotations

import json

import pytest

from lowbit.bench import command
from lowbit.bench.outcomes import read_run
from lowbit.bench.page import render


@pytest.fixture
def file(results, contender, tmp_path):
    def make(name, **changes):
        timed = [contender("candidate", "lowbit", 1.0), contender("baseline", "bfloat16", 2.0)]
        path = tmp_path / name
        path.write_text(json.dumps(results([({"m": 1}, 1, timed)]) | changes))
        return path

    return make


def test_files_become_one_page(file, tmp_path, capsys):
    files, out = [file("a.json"), file("b.json", benchmark="cast")], tmp_path / "page.html"
    assert command.main(["plot", *map(str, files), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == render([read_run(file) for file in files])
    assert capsys.readouterr().out == f"{out}\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "b.json holds no results of version 1"),
        ({"rows": [{}]}, "b.json: rows[0].case is None, not an object"),
        ({"rows": []}, "b.json: there is nothing to draw"),
    ],
)
def test_nothing_is_written_of_what_holds_no_results(file, tmp_path, capsys, changes, words):
    out = tmp_path / "page.html"
    out.write_text("old")
    with pytest.raises(SystemExit) as caught:
        command.main(["plot", str(file("a.json")), str(file("b.json", **changes)), "--out", str(out)])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert out.read_text() == "old"


def test_results_are_not_written_over(file, capsys):
    path = file("a.json")
    before = path.read_text()
    with pytest.raises(SystemExit):
        command.main(["plot", str(path), "--out", str(path)])
    assert "that is the file of the results; name a file for the page" in capsys.readouterr().err
    assert path.read_text() == before
