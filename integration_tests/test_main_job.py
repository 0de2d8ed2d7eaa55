"""The main job from end to end: quantize a real model, know what it cost, survive being stopped, stay small in memory."""

from __future__ import annotations

import filecmp
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_hf.evaluate import evaluate, tokenize
from lowbit_hf.loading import load
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme

TEXT = files("lowbit_hf") / "data" / "text.txt"
SHOWN = ["W8A8", "W4A16", "FP8_DYNAMIC", "MXFP8", "MXFP4A16", "NVFP4A16"]

# What it costs


def perplexity(folder, count):
    """Of the first `count` tokens, by transformers alone: windows of 512, a token after each but a window's last."""
    ids = torch.tensor(
        AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8"), verbose=False).input_ids
    )[:count]
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    loss = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0, :-1].double()
            loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
    return float((loss / (len(windows) * 511)).exp()), len(windows) * 511


@pytest.mark.parametrize("count", [8192, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_perplexity_is_what_transformers_alone_gives(models, lowbit, count):
    folder = models / "lm-tiny"
    wanted, tokens = perplexity(folder, count)
    code, said, _ = lowbit("eval", folder, "--json", *([] if count is None else ["--tokens", count]))
    found = json.loads(said)
    assert (code, found["tokens"]) == (0, tokens)
    # Batches of another size may be multiplied in another order, and logits are bfloat16.
    assert found["perplexity"] == pytest.approx(wanted, rel=2e-4)
    if count is None:
        assert tokens == 82271
        assert found["perplexity"] == pytest.approx(19.70, abs=0.02)  # as its makers measured, but for the text's end


def test_one_table_of_what_each_scheme_costs(models, lowbit):
    code, said, _ = lowbit("compare", models / "lm-tiny", "--tokens", "1024")
    assert code == 0
    head, plain, *rows = [re.split(r"  +", line) for line in said.splitlines()]
    assert head == ["scheme", "bits per weight", "size", "perplexity", "KL", "top-1"]
    assert plain[0] == "bfloat16"
    assert [row[0] for row in rows] == SHOWN
    cost = {row[0]: float(row[4]) for row in rows}
    # More bits cost less; 8-bit weights are close to free, and 4-bit ones of a model this small are not.
    assert max(cost[name] for name in ("W8A8", "FP8_DYNAMIC", "MXFP8")) < 0.03
    assert 0.03 < cost["NVFP4A16"] < min(cost["W4A16"], cost["MXFP4A16"]) < 0.3
    for row in rows:
        bits, stored, perplexed, top1 = float(row[1]), row[2], float(row[3]), float(row[5].removesuffix("%"))
        assert 4 < bits < 8.3
        assert stored.endswith(" MiB")
        assert float(plain[3]) * 0.99 < perplexed < float(plain[3]) * 1.2
        assert 75 < top1 < 100


def test_experts_too(models, quantized):
    ids = tokenize(models / "moe-tiny", TEXT)[:2048]
    base = load(models / "moe-tiny")
    cost = {
        name: evaluate(load(quantized("moe-tiny", name)), ids, context=512, base=base).kl
        for name in ("W8A8", "W4A16", "W2A16")
    }
    assert 0 < cost["W8A8"] < cost["W4A16"] < 0.3 < cost["W2A16"]


# Being stopped


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def same_trees(a, b):
    """Whether two folders hold the same, but for the reports, which tell how long things took."""
    compared = sorted(set(tree(a)) - {"report.json", "report.html"})
    _, different, unreadable = filecmp.cmpfiles(a, b, compared, shallow=False)
    return tree(a) == tree(b) and not different and not unreadable


def finished(partial):
    """Shards that a stopped run left whole, by the time of their last write."""
    journal = [
        json.loads(line)
        for line in (partial / "journal.jsonl").read_text().splitlines(keepends=False)
        if line[-1:] == "}"
    ]
    names = {record["finished"] for record in journal if "finished" in record}
    return {name: (partial / "files" / name).stat().st_mtime_ns for name in names}


def test_stopped_anywhere_it_continues_to_the_same_bytes(tmp_path, start, lowbit, llama):
    folder = llama(tmp_path / "model", layers=8, hidden=1024)  # 200 MB in nine shards
    run(prepare(folder, scheme("W4A16"), mode="even"), tmp_path / "whole")
    out, partial, seed = tmp_path / "out", tmp_path / ".out.partial", random.randrange(1 << 32)
    line, moments = ["quantize", folder, "--to", "W4A16", "-o", out], random.Random(seed)
    whole = {}
    for stop in (signal.SIGINT, signal.SIGKILL):
        process = start(*line)
        while process.poll() is None and holder(partial) != process.pid:  # it imports for seconds before it writes
            assert not out.exists()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.6))
        process.send_signal(stop)
        said, told = process.communicate()
        if out.exists():  # the moment came too late
            break
        assert said == ""
        assert process.returncode == (130 if stop == signal.SIGINT else -stop), told
        if stop == signal.SIGINT:
            assert "the same command continues where this one stopped" in told
            assert "Traceback" not in told
        now = finished(partial)
        assert whole.items() <= now.items(), seed  # what was whole was not written again
        whole = now
    if not out.exists() or partial.exists():
        code, said, told = lowbit(*line)
        assert code == 0, told
        assert "nothing lost: 56 tensors quantized, 19 carried bit for bit" in said
    assert same_trees(tmp_path / "whole", out), seed
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    assert not partial.exists()


def holder(partial):
    """The process that writes a folder, if any does."""
    with suppress(FileNotFoundError):
        return int((partial / "lock").read_text() or 0)
    return 0


# Memory

PEAK = """
    import resource, sys
    from pathlib import Path
    from lowbit_hf.quantize import prepare, run
    from lowbit_hf.schemes import scheme

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    before = peak()
    run(prepare(Path(sys.argv[1]), scheme(sys.argv[3]), mode="even"), Path(sys.argv[2]))
    print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_few_slices(tmp_path, llama):
    folder = llama(tmp_path / "model", layers=11, hidden=2048)  # 1.03 GiB
    assert sum(path.stat().st_size for path in folder.iterdir()) > 1 << 30
    for name in ("W4A16", "NVFP4A16", "W8A8"):
        script = [sys.executable, "-c", textwrap.dedent(PEAK), folder, tmp_path / name, name]
        done = subprocess.run(script, capture_output=True, text=True, check=True, env=os.environ)
        assert int(done.stdout) < 400, name  # MiB
