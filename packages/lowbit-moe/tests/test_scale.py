"""`lowbit bench scale`: what ranks learn together is what one learns, and what is timed is what all of them take."""

from __future__ import annotations

import json
import time
from importlib.metadata import EntryPoint

import pytest
import torch
from ranks import ranks
from scaled import SHAPE, compared
from torch import distributed

from lowbit.bench import command
from lowbit.bench.ranks import joined
from lowbit.bench.timing import time_together
from lowbit.errors import FormatError, LowbitError
from lowbit_moe.bench import scale

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two():
    with ranks(2, "cpu") as started:
        yield started


def test_two_ranks_learn_what_one_learns(two, monkeypatch):
    monkeypatch.setattr(scale, "_STEPS", scale._STEPS)  # fewer, by what is compared
    with joined(CPU):
        alone = compared()
    for found in two.run(compared):
        assert found.keys() == alone.keys()
        for (step, name), (near, loss, moved) in found.items():
            rounded = name != "BF16 by BF16"
            # Four layers one after another, of numbers of 4 digits, gradients of 3, or 8 of bfloat16.
            assert near > (12 if rounded else 35)
            if step == "all-to-all":
                assert moved == pytest.approx(alone[step, name][2], rel=0.1)
                continue
            # AdamW's first steps are as long however small a gradient is, and one tensor's scale is that of a rank's tokens.
            assert loss == pytest.approx(alone[step, name][1], rel=0.02 if rounded else 0.001)
    sent = {name: moved for (step, name), (_, _, moved) in alone.items() if step == "all-to-all"}
    assert sent["BF16 by BF16"] == 2 * SHAPE[0] * SHAPE[1] * SHAPE[4]
    assert sent["BF16 by MXFP8"] == sent["BF16 by BF16"] / 2 * (1 + 1 / 32)


def test_a_router_prefers_experts_wherever_they_are():
    chosen, _ = scale.choose(8192, 8, 2, CPU, seed=0)
    rows = torch.bincount(chosen.flatten(), minlength=8) / (8192 * 2 / 8)
    assert rows.max() / rows.min() > 1.5
    # In order of preference, the second half would have 1.19 times its share.
    assert rows.view(2, 4).mean(1).max() < 1.1


def test_results_are_a_file_as_others_are(monkeypatch, tmp_path):
    for name in ("_EXPERTS", "_DENSE", "_MOVES"):
        monkeypatch.setattr(scale, name, (("BF16", None), ("MXFP8", "MXFP8")))
    monkeypatch.setattr(scale, "_STEPS", 1)
    point = EntryPoint("scale", "lowbit_moe.bench.scale:benchmark", command.GROUP)
    monkeypatch.setattr(command, "discover", lambda *_: {"scale": point})
    file = tmp_path / "results.json"
    shape = "x".join(map(str, SHAPE))
    assert command.main(["scale", "--device", "cpu", "--seconds", "0.01", "--shapes", shape, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"]["step"] for row in rows] == ["experts", "dense", "all-to-all"]
    for row in rows:
        assert row["case"]["ranks"] == 1
        assert {(each["how"], each["samples"]) for each in row["contenders"]} == {("together", 20)}
        assert all(each["seconds"] > 0 for each in row["contenders"])
    assert not distributed.is_initialized()


def test_a_call_lasts_until_the_last_is_done_and_what_it_raises_ends_the_run(monkeypatch):
    taken = []

    def run():
        taken.append(1)
        time.sleep(0.002)

    with joined(CPU):
        timing = time_together(run, 5, CPU, samples=3)
        assert (len(taken), timing.samples, timing.rotated) == (8, 3, 5)
        assert timing.median >= 0.002
        case = next(iter(scale.benchmark.cases(scale.Given([SHAPE], [], CPU, False))))
        monkeypatch.setattr(scale, "parallel_swiglu_experts", None)
        with pytest.raises(TypeError):
            command.measure(case, CPU, None, budget=0.01)


def test_what_ranks_cannot_divide_is_refused(monkeypatch):
    with joined(CPU), pytest.raises(FormatError, match="a token has no more than all experts"):
        list(scale.benchmark.cases(scale.Given([(8, 64, 64, 4, 5)], [], CPU, False)))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(LowbitError, match="process 1 of this machine needs a GPU of its own; torch finds 1"),
        joined(torch.device("cuda")),
    ):
        pass
