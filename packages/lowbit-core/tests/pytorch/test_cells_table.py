"""The table in docs/pytorch.md is what was recorded, and every cell was recorded on the oldest and newest torch."""

from __future__ import annotations

import test_aoti
import test_compile
import test_cuda_graphs
import test_distributed
import test_export
import test_modules
from cells import REFUSED, ROWS
from cells_table import COLUMNS, PAGE, page, runs

MODULES = (test_aoti, test_compile, test_cuda_graphs, test_distributed, test_export, test_modules)


def columns():
    """Names of the columns that tests stand for."""
    marks = [mark for module in MODULES for f in vars(module).values() for mark in getattr(f, "pytestmark", [])]
    return {mark.args[0] for mark in marks if mark.name == "cell"}


def test_the_page_has_what_was_recorded():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, runs()) == text


def test_every_cell_ran_on_the_oldest_and_the_newest_torch():
    assert columns() == set(COLUMNS)
    recorded = runs()
    versions = {(run["torch"], run["device"] == "cpu") for run in recorded}
    oldest, newest = (pick(torch for torch, cpu in versions if cpu) for pick in (min, max))
    assert oldest.startswith("2.11.")
    assert newest > oldest
    for column in COLUMNS:
        ran = {run["torch"]: run["cells"][column] for run in recorded if column in run["cells"]}
        # No machine with a GPU and the newest torch was to be had.
        assert ran.keys() >= ({oldest} if column == "CUDA graphs" else {oldest, newest})
        for cells in ran.values():
            assert cells == {str(row): "refused" if (column, str(row)) in REFUSED else "passed" for row in ROWS}
