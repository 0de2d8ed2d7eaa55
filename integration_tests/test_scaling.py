"""benchmarks/scaling.py: what it predicts of one rank is what was measured, and of more what links and routers add."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

CASE = {"ranks": 1, "m": 64, "k": 256, "between": 128, "experts": 8, "chosen": 2}
NAMES = {"experts": "FP8_ROW by MXFP8", "dense": "FP8_TENSOR by FP8_TENSOR", "all-to-all": "BF16 by BF16"}


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return import_module("scaling")


@pytest.fixture
def one():
    rows = [
        {
            "case": {"step": step, **CASE},
            "contenders": [{"name": name, "seconds": 0.01, "busy_seconds": 0.01}, {"name": "none", "refusal": ""}],
        }
        for step, name in NAMES.items()
    ]
    return {"ceilings": {"bytes_per_s": 1e9}, "rows": rows}


def seconds(rows):
    return {row["case"]["step"]: row["contenders"][0]["seconds"] for row in rows}


def test_of_one_rank_it_is_what_was_measured_but_for_what_nothing_hides(scaling, one):
    free = scaling.Machine(start=0, alone=0)
    assert seconds(scaling.predicted(one, 1, free)) == pytest.approx(dict.fromkeys(NAMES, 0.01))


def test_of_more_ranks_bytes_take_links_and_the_busiest_waits(scaling, one):
    machine = scaling.Machine(link=1e6, start=1e-3, alone=1e-4, network=5e5, hop=1e-2, per_host=2)
    rows = CASE["m"] * CASE["chosen"] * CASE["k"]
    two, four = (scaling.predicted(one, ranks, machine) for ranks in (2, 4))
    assert [len(row["contenders"]) for row in two] == [1, 1, 1]
    # Half of 2 bytes a number leaves; the other half is copied, as all was by one rank.
    moved = 0.01 - 1e-4 - 2 * 2 * rows / 1e9 + 2 * rows / 1e9 + 1e-3 + rows / 1e6
    assert seconds(two)["all-to-all"] == pytest.approx(moved)
    # Of four on two hosts a quarter stays on the host, and half takes the network.
    far = 1e-3 + 1e-2 + 2 * rows / 4 / 1e6 + 2 * rows / 2 / 5e5
    assert seconds(four)["all-to-all"] == pytest.approx(0.01 - 1e-4 - 2 * 2 * rows / 1e9 + 4 * rows / 4 / 1e9 + far)
    # Codes and a scale for each 32 of them, there and back twice.
    codes, scales = rows, rows / 32
    once = sum(2 * size / 1e9 + 1e-4 for size in (codes, scales))
    now = sum(size / 1e9 + 1e-3 + size / 2 / 1e6 for size in (codes, scales))
    chosen, _ = import_module("lowbit_moe.bench.scale").choose(64, 8, 2, torch.device("cpu"), seed=0)
    late = float((chosen >= 4).sum()) / (CASE["m"] * CASE["chosen"]) * 2
    rounded = 4 * 8 * 3 * CASE["k"] * CASE["between"] / 1e9 / 2
    wanted = (0.01 - 4 * once) * max(late, 2 - late) + 4 * now + 1e-3 - rounded
    assert seconds(two)["experts"] == pytest.approx(wanted)
    # Weights as codes, twice, and gradients in bfloat16: of four layers all is longer than the step, and one is bare.
    numbers = 3 * CASE["k"] * CASE["between"]
    gathered, scattered = (1e-3 + bytes_ * numbers / 2 / 1e6 for bytes_ in (1, 2))
    assert seconds(two)["dense"] == pytest.approx(4 * (2 * gathered + scattered) + gathered + scattered)


def test_a_step_that_waits_for_python_takes_as_long_with_more_ranks(scaling, one):
    for row in one["rows"]:
        row["contenders"][0]["seconds"] = 1.0
    assert seconds(scaling.predicted(one, 2, scaling.Machine())) == dict.fromkeys(NAMES, 1.0)


def test_what_was_measured_is_judged_by_what_was_predicted(scaling, one):
    prediction = {"rows": scaling.predicted(one, 1, scaling.Machine())}
    measured = {
        "rows": [row | {"contenders": [{"name": NAMES[row["case"]["step"]], "seconds": 0.02}]} for row in one["rows"]]
    }
    found = scaling.judged(prediction, measured)
    assert [row["over predicted"] for row in found] == [0.02 / row["predicted"] for row in found]
    assert len(found) == 3
    measured["rows"] = [row | {"case": row["case"] | {"m": 32}} for row in measured["rows"]]
    assert scaling.judged(prediction, measured) == []
