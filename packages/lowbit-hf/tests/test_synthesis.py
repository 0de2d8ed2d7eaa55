from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lowbit_hf import load
from lowbit_hf.synthesis import sample
from lowbit_hf.texts import Calibration

MODELS = Path(__file__).parents[3] / "integration_tests/models"
PROMPT, LENGTH, SAMPLES = 8, 128, 16


@pytest.fixture
def lowbit(command):
    return command


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """400 words, none of them the end token."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in torch.randint(2, 96, (400,)).tolist()))
    return path


# Sampling, on a trained model: what is drawn has the model's own probabilities.


@pytest.fixture(scope="module")
def model():
    return load(MODELS / "lm-tiny")


@pytest.fixture(scope="module")
def prompts():
    return Calibration((MODELS / "calibration.txt",), SAMPLES, PROMPT, seed=5).windows(MODELS / "lm-tiny")


@pytest.fixture(scope="module")
def drawn(model, prompts):
    return sample(model, prompts, LENGTH, seed=5)


def surprise(model, ids):
    """-log p of each drawn token, and the mean and variance that it has where tokens are drawn from p; float64."""
    with torch.inference_mode():
        logs = model(ids, use_cache=False).logits[:, PROMPT - 1 : -1].double().log_softmax(-1)
    found = -logs.gather(-1, ids[:, PROMPT:].unsqueeze(-1)).squeeze(-1)
    mean = -(logs.exp() * logs).sum(-1)
    return found, mean, (logs.exp() * logs.square()).sum(-1) - mean.square()


def test_the_first_token_has_the_model_s_probabilities(model, prompts):
    count = 2000
    ids = sample(model, prompts[:1].expand(count, -1), PROMPT + 1, seed=0)
    with torch.inference_mode():
        expected = model(prompts[:1], use_cache=False).logits[0, -1].double().softmax(-1) * count
    seen = torch.bincount(ids[:, -1], minlength=len(expected)).double()
    # Chi-square, over tokens seen often enough, and all others as one, without which a cut tail would go unnoticed.
    often = expected >= 5
    seen, expected = (torch.cat([x[often], x[~often].sum().view(1)]) for x in (seen, expected))
    free = len(seen) - 1
    assert free > 20
    assert abs(float(((seen - expected).square() / expected).sum()) - free) < 4 * (2 * free) ** 0.5


def test_documents_are_as_surprising_as_the_model_says(model, prompts, drawn):
    assert drawn.shape == (SAMPLES, LENGTH)
    assert torch.equal(drawn[:, :PROMPT], prompts)
    found, mean, variance = surprise(model, drawn)
    # What a token surprises by beyond the mean is a martingale: its sum has the sum of the variances.
    assert abs(float((found - mean).sum() / variance.sum().sqrt())) < 4


def test_the_file_gives_the_model_s_tokens_back(lowbit, model, drawn, tmp_path):
    out, folder, source = tmp_path / "more.jsonl", MODELS / "lm-tiny", MODELS / "calibration.txt"
    line = ["synthesize", folder, "--from", source, "-o", out, "--samples", SAMPLES, "--seq-len", LENGTH, "--seed", "5"]
    code, said, err = lowbit(*line, "--prompt-tokens", PROMPT, "--json")
    assert (code, err) == (0, "")
    assert json.loads(said) == {"out": str(out), "documents": SAMPLES, "tokens": SAMPLES * LENGTH, "seed": 5}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = [tokenizer(json.loads(line)["text"]).input_ids for line in out.read_text().splitlines()]
    pairs = zip(drawn.tolist(), read, strict=True)
    matchers = [SequenceMatcher(None, before, after, autojunk=False) for before, after in pairs]
    same = sum(block.size for matcher in matchers for block in matcher.get_matching_blocks())
    assert same / drawn.numel() > 0.98
    # As calibration reads it: documents between end and first tokens, cut into windows anywhere. What the model wrote
    # there, and has some of before it, surprises it by a few percent more, for want of what else it had before.
    windows = Calibration((out,), SAMPLES - 1, LENGTH).windows(folder)
    places = torch.arange(LENGTH).expand_as(windows)
    begun = torch.where(windows == tokenizer.bos_token_id, places, 0).cummax(1).values
    written = ((places - begun > 2 * PROMPT) & (windows != tokenizer.eos_token_id))[:, PROMPT:]
    assert written.float().mean() > 0.7
    found, mean, _ = surprise(model, windows)
    assert float(found[written].mean()) == pytest.approx(float(mean[written].mean()), rel=0.06)


# Documents, on random models whose tokens are words


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "gpt2"])
def test_documents(lowbit, worded, text, tmp_path, kind):
    out, folder = tmp_path / "more.jsonl", worded(kind)
    line = ["synthesize", folder, "--from", text, "--samples", "40", "--seq-len", "32", "--prompt-tokens", "4", "-o"]
    code, said, err = lowbit(*line, out)
    assert (code, err) == (0, "")
    assert said == f"{out}: 40 documents of 32 tokens\nnext: --calibrate {text} --calibrate {out}\n"
    documents = [json.loads(line)["text"].split() for line in out.read_text().splitlines()]
    assert [len(document) for document in documents] == [32] * 40
    # Each begins with a window of the text, no window twice.
    words = text.read_text().split()
    starts = [tuple(document[:4]) for document in documents]
    assert set(starts) <= {tuple(words[i : i + 4]) for i in range(0, 400, 4)}
    assert len(set(starts)) == 40
    # The end token, which a random model draws as often as others, ends nothing.
    after = [word for document in documents if "</s>" in document for word in document[document.index("</s>") + 1 :]]
    assert len(set(after)) > 30
    assert [path.name for path in tmp_path.iterdir()] == ["more.jsonl"]
    assert oct(out.stat().st_mode) == oct(text.stat().st_mode)


def test_the_same_seed_writes_the_same_text(lowbit, worded, text, tmp_path):
    line = ["synthesize", worded("llama"), "--from", text, "--samples", "8", "--seq-len", "16", "--seed"]
    before = torch.random.get_rng_state()
    for seed, name in (("3", "a.jsonl"), ("3", "b.jsonl"), ("4", "c.jsonl")):
        torch.rand(1)
        assert lowbit(*line, seed, "-o", tmp_path / name)[0] == 0
    first, second, other = (sorted((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in "abc")
    assert first == second
    assert not set(first) & set(other)
    torch.random.set_rng_state(before)
    numbers = torch.rand(4)
    torch.random.set_rng_state(before)
    sample(load(worded("llama")), torch.full((1, 2), 3), 4, seed=0)
    assert torch.equal(torch.rand(4), numbers)  # a caller's random numbers are its own


def test_what_the_folder_says_of_generation_changes_nothing(lowbit, worded, text, tmp_path, change):
    plain = worded("llama")
    other = change(plain, config=lambda values: values.update(temperature=0.1, top_k=1))
    (other / "generation_config.json").write_text(
        json.dumps(
            {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "repetition_penalty": 5.0}
            | {"no_repeat_ngram_size": 1, "eos_token_id": list(range(90)), "pad_token_id": 0, "max_new_tokens": 3}
            | {"suppress_tokens": list(range(50)), "num_beams": 2, "num_return_sequences": 2}
        )
    )
    for folder, name in ((plain, "a.jsonl"), (other, "b.jsonl")):
        line = ["synthesize", folder, "--from", text, "--samples", "8", "--seq-len", "32", "-o", tmp_path / name]
        assert lowbit(*line)[0] == 0
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_tokens_are_counted_as_they_come(worded, monkeypatch):
    monkeypatch.setattr("lowbit_hf.synthesis._BATCH_TOKENS", 48)
    told = []
    made = sample(load(worded("llama")), torch.randint(2, 96, (5, 2)), 16, seed=0, advance=told.append)
    assert made.shape == (5, 16)
    # Two batches of three and two documents: what they begin with, then a token of each at a time.
    assert told == [6, *[3] * 14, 4, *[2] * 14]


# What is refused, and what is left


def test_what_cannot_be_done_is_told_and_leaves_nothing(lowbit, make, worded, text, tmp_path, change):
    def spoil(state):
        state["model.norm.weight"].fill_(torch.nan)

    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "old.jsonl").write_text("old")
    (tmp_path / "short.txt").write_text("w2 w3 w4 w5 w6 w7 w8 w9 w10")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    llama, fits = worded("llama"), ["--samples", "2", "--seq-len", "16"]
    problems = [
        (make("bert"), text, "x.jsonl", fits, "is a BertForMaskedLM, which does not continue text"),
        (make("llama"), text, "x.jsonl", fits, "has no tokenizer"),
        (llama, text, "x.jsonl", ["--seq-len", "33"], "--seq-len 33 is beyond the context of"),
        (worded("gpt2"), text, "x.jsonl", ["--seq-len", "33"], "needed are 32 or fewer"),
        (llama, text, "x.jsonl", ["--seq-len", "8"], "leaves the model nothing to write after 8 tokens"),
        (llama, tmp_path / "none.txt", "x.jsonl", fits, "none.txt cannot be read as UTF-8 text"),
        (llama, tmp_path / "latin.txt", "x.jsonl", fits, "latin.txt cannot be read as UTF-8 text"),
        (llama, tmp_path / "short.txt", "x.jsonl", fits, "short.txt: 9 tokens, 1 windows of 8; --samples 2 needs 16"),
        (llama, text, "x.txt", fits, "x.txt will hold JSON lines, which are read by their name: call it x.jsonl"),
        (llama, text, "no/x.jsonl", fits, "no does not exist; create it first"),
        (llama, text, "folder.jsonl", [*fits, "--overwrite"], "folder.jsonl is a folder"),
        (llama, text, "old.jsonl", fits, "old.jsonl exists; pass --overwrite to replace it"),
        (change(llama, tensors=spoil), text, "old.jsonl", [*fits, "--overwrite"], "the model predicts NaN"),
    ]
    before = sorted(tmp_path.iterdir())
    for folder, source, out, options, words in problems:
        code, said, err = lowbit("synthesize", folder, "--from", source, "-o", tmp_path / out, *options)
        assert (code, said) == (1, ""), words
        assert err.startswith("lowbit synthesize: ")
        assert words in err
        assert sorted(tmp_path.iterdir()) == before
        assert (tmp_path / "old.jsonl").read_text() == "old"
    line = ["synthesize", llama, "--from", text, "-o", tmp_path / "old.jsonl", *fits]
    (tmp_path / "link").hardlink_to(tmp_path / "old.jsonl")
    assert lowbit(*line, "--overwrite")[0] == 0
    # Another file has taken the name: nobody ever saw a part of it.
    assert (tmp_path / "link").read_text() == "old"
    assert len((tmp_path / "old.jsonl").read_text().splitlines()) == 2
    for wrong in (["--samples", "0"], ["--prompt-tokens", "1"], ["--device", "tpu"]):
        assert lowbit(*line, *wrong)[0] == 2


def test_a_disk_that_fails_leaves_what_was_there(lowbit, worded, text, tmp_path, monkeypatch):
    out = tmp_path / "more.jsonl"
    out.write_text("old")
    line = ["synthesize", worded("llama"), "--from", text, "-o", out, "--samples", "2", "--seq-len", "9"]

    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowbit_hf.synthesis.sync_path", fail)
    code, _, err = lowbit(*line, "--overwrite")
    assert code == 1
    assert "cannot write" in err
    assert "No space left" in err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("more.jsonl", "old")]


KILL = """
import os, signal, sys
from lowbit_hf.synthesis import _Counter
_Counter.put = lambda self, value: os.kill(os.getpid(), signal.SIGKILL)
from lowbit.command import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_kill_leaves_nothing_that_looks_finished(lowbit, worded, text, tmp_path):
    out = tmp_path / "more.jsonl"
    line = ["synthesize", worded("llama"), "--from", text, "-o", out, "--samples", "2", "--seq-len", "16"]
    done = subprocess.run(
        [sys.executable, "-c", KILL, *map(str, line)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".more.jsonl.partial"]
    assert lowbit(*line)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["more.jsonl"]
