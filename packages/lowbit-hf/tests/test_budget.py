"""Memory of calibrated runs: planned, told, kept to, and what happens where it does not do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_calibrated import Windows, job_of, tree
from typer import BadParameter

from lowbit.errors import LowbitError, RecipeError
from lowbit.report import Report
from lowbit.table import size
from lowbit_algos import Method
from lowbit_algos.walk import Walk
from lowbit_hf import footprint
from lowbit_hf.budget import Budget
from lowbit_hf.calibrated import BATCH_TOKENS, Calibrated
from lowbit_hf.commands.options import bytes_of
from lowbit_hf.quantize import foresee, prepare, run
from lowbit_hf.schemes import scheme


def test_a_run_that_memory_cannot_hold_is_refused_with_the_numbers(make, tmp_path):
    for job in (job_of(make(), max_memory=1 << 20), prepare(make(), scheme("W8A8"), mode="even", max_memory=1 << 20)):
        with pytest.raises(
            RecipeError, match=r"needs .* of memory, of which the program itself holds .*B, and may take"
        ):
            run(job, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def bare(monkeypatch):
    """Plans that count what blocks take alone: in a model this small, all else is more."""
    for name in ("_STREAMING", "_A_THREAD", "_CODE"):
        monkeypatch.setattr(footprint, name, 0)
    monkeypatch.setattr("lowbit_hf.budget.memory_in_use", lambda: 0)
    # What the process really holds is not what this plans.
    monkeypatch.setattr(Budget, "check", lambda self: None)


@pytest.mark.usefixtures("bare")
def test_fewer_tokens_run_at_once_where_that_fits(make, tmp_path):
    job = job_of(make())
    whole = Calibrated(job.checkpoint, job.skeleton, job.owners, job.schemes)
    few, many = (whole.memory(job.method, tokens, Windows.length).host for tokens in (Windows.length, BATCH_TOKENS))
    assert few < many
    tight = job_of(make(), max_memory=(few + many) // 2)
    budget = foresee(tight, "cpu")
    assert Windows.length <= budget.tokens < BATCH_TOKENS
    assert budget.planned.host <= tight.max_memory
    assert str(budget).startswith("takes at most ")
    assert f"({size(tight.max_memory)} allowed), with {budget.tokens} tokens at once" in str(budget)
    run(tight, tmp_path / "out")
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert (report.max_memory, report.planned_memory) == (tight.max_memory, budget.planned.host)
    assert (report.max_gpu, report.planned_gpu, report.peak_gpu) == (None, None, None)


@pytest.mark.usefixtures("bare")
def test_as_many_tokens_as_the_run_that_is_continued_began_with(make):
    job = job_of(make())
    whole = Calibrated(job.checkpoint, job.skeleton, job.owners, job.schemes)
    few, many = (whole.memory(job.method, tokens, Windows.length).host for tokens in (Windows.length, BATCH_TOKENS))
    budget = foresee(job_of(make(), max_memory=(few + many) // 2), "cpu")
    budget.agree(Windows.length, held=False)
    assert (budget.tokens, budget.planned.host) == (Windows.length, few)
    with pytest.raises(RecipeError, match=r"needs .* may take .* continues began with 4096 tokens at once"):
        budget.agree(BATCH_TOKENS, held=False)


def test_a_run_that_takes_more_than_it_may_ends_and_continues(make, tmp_path, monkeypatch):
    folder = make()
    run(job_of(folder), tmp_path / "whole")
    limit = foresee(job_of(folder), "cpu").planned.host + (64 << 20)
    with monkeypatch.context() as patch:
        # As the run begins, before the first block, and after it.
        marks = iter([0, 0, limit + 1])
        patch.setattr("lowbit_hf.budget.peak_memory", lambda: next(marks))
        message = (
            r"has taken .* of memory, where .* were planned and .* are allowed; .* a larger --max-memory continues"
        )
        with pytest.raises(LowbitError, match=message):
            run(job_of(folder, max_memory=limit), tmp_path / "out")
    scratch = tmp_path / ".out.partial" / "scratch"
    assert (scratch / "block-0.json").exists()
    assert not (scratch / "block-1.json").exists()
    seen = []
    monkeypatch.setattr(
        Walk,
        "step",
        lambda walk, name, *args, step=Walk.step, **more: (seen.append(name), step(walk, name, *args, **more)),
    )
    run(job_of(folder, max_memory=2 * limit), tmp_path / "out")
    assert seen == ["model.layers.1"]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_may_be_taken_is_no_part_of_what_is_done(make):
    jobs = [job_of(make(), max_memory=most, max_gpu=most) for most in (None, 1 << 30)]
    assert jobs[0].fingerprint() == jobs[1].fingerprint()


def test_a_gpus_memory_is_not_bounded_where_there_is_none(make, tmp_path):
    with pytest.raises(RecipeError, match="bounds a GPU's memory, and this run computes on cpu"):
        run(job_of(make(), max_gpu=1 << 30), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "algorithm"),
    [
        ("llama", "W4A16", "gptq"),
        ("llama", "W8A8", "smoothquant+gptq"),
        ("llama", "W4A16", "rotation+gptq"),
        ("mixtral", "W4A16", "gptq"),
    ],
)
def test_a_process_takes_what_was_planned(make, speaking, tmp_path, kind, name, algorithm):
    text = speaking.parent / "calibration.txt"
    vocabulary = json.loads((speaking / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 1024, "intermediate_size": 4096 if kind == "llama" else 1024, "vocab_size": vocabulary}
    folder = shutil.copytree(make(kind, num_hidden_layers=1, max_position_embeddings=128, **sizes), tmp_path / "model")
    for path in speaking.glob("tokenizer*"):
        shutil.copy(path, folder)
    line = [
        Path(sys.executable).parent / "lowbit",
        "quantize",
        folder,
        "--to",
        name,
        "--algorithm",
        algorithm,
        "--calibrate",
        text,
    ]
    line += ["--samples", "32", "--seq-len", "128", "--device", "cpu", "-o", tmp_path / "out"]
    process = subprocess.Popen(line)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    # Kilobytes on Linux.
    assert report.peak_memory <= used.ru_maxrss * 1024 <= report.planned_memory


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "name", "algorithm"),
    [
        ("llama", "W4A16_G32", "gptq"),
        ("llama", "W4A16_G32", "rotation+gptq+learned"),
        ("llama", "W8A8", "smoothquant+gptq"),
        ("mixtral", "W4A16_G32", "gptq"),
    ],
)
def test_a_gpus_memory_is_planned_and_kept_to(make, tmp_path, kind, name, algorithm):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    folder, method = make(kind, **sizes), Method.of(algorithm, pre_scale=False)
    most = foresee(job_of(folder, name, method), "cuda").planned.gpu + (1 << 20)
    run(job_of(folder, name, method, max_gpu=most), tmp_path / "out", device="cuda")
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert report.peak_gpu <= report.planned_gpu <= report.max_gpu == most
    assert report.peak_memory <= report.planned_memory
    # Block weights and Hessians lie there.
    assert report.peak_gpu > 1 << 24
    # The bound is this run's own.
    torch.empty(2 * most, dtype=torch.uint8, device="cuda")
    with pytest.raises(RecipeError, match=r"needs .* of the GPU's memory, .* may take 1 MiB; allow .* by --max-gpu"):
        run(job_of(folder, name, method, max_gpu=1 << 20), tmp_path / "small", device="cuda")
    assert not (tmp_path / "small").exists()


@pytest.mark.gpu
def test_what_a_gpu_has_no_room_for_ends_a_run_that_continues(make, tmp_path, monkeypatch):
    folder = make(hidden_size=1024, intermediate_size=2048)
    run(job_of(folder), tmp_path / "whole", device="cuda")
    with monkeypatch.context() as patch:
        # A plan that promises too much.
        patch.setattr(Calibrated, "memory", lambda *_: footprint.Footprint(0, 0))
        held = torch.cuda.memory_allocated()
        with pytest.raises(LowbitError, match=r"needs more of the GPU's memory .* a larger --max-gpu"):
            run(job_of(folder, max_gpu=held + (24 << 20)), tmp_path / "out", device="cuda")
    run(job_of(folder), tmp_path / "out", device="cuda")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 << 30), ("1.5 GB", 15 * 10**8), ("300m", 3 * 10**8), ("1e9", 10**9), ("64KiB", 1 << 16)],
)
def test_sizes_are_read(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "four", "-1", "0", "4 GiBs", "1..2"])
def test_what_is_no_size_is_wrong_use(text):
    with pytest.raises(BadParameter, match="is not a size, such as 4GiB"):
        bytes_of(text)
