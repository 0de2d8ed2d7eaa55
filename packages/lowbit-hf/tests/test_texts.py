"""Text to calibrate on: from files of every kind the same windows."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest
import torch
from pyarrow import parquet, table
from transformers import AutoTokenizer

from lowbit.command import main
from lowbit.errors import CheckpointError, RecipeError
from lowbit_hf.texts import Calibration

LINES = ["the first of a few texts", "another one, a little\u2028longer than the first", "and a third"]


def test_text_of_every_kind_gives_the_same_windows(speaking, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(speaking)
    ids = []
    for line in LINES * 20:
        ids += ([tokenizer.eos_token_id] if ids else []) + tokenizer(line).input_ids
    whole = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": line, "id": 1}, ensure_ascii=False) for line in LINES * 20) + "\n"
    )
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(line) for line in LINES * 20))
    parquet.write_table(table({"text": LINES * 20, "other": [1] * 60}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl", "c.parquet"):
        found = Calibration((tmp_path / name,), len(whole), 16).windows(speaking)
        assert torch.equal(found, whole)
        few = Calibration((tmp_path / name,), 5, 16, seed=3).windows(speaking)
        assert all(any(torch.equal(row, each) for each in whole) for row in few)
        assert torch.equal(few, Calibration((tmp_path / name,), 5, 16, seed=3).windows(speaking))
        assert not torch.equal(few, Calibration((tmp_path / name,), 5, 16, seed=4).windows(speaking))
    (tmp_path / "d.txt").write_text(" ".join(LINES * 20))
    text = torch.tensor(tokenizer(" ".join(LINES * 20)).input_ids)
    every = Calibration((tmp_path / "d.txt",), len(text) // 16, 16).windows(speaking)
    assert torch.equal(every.flatten(), text[: len(text) // 16 * 16])


def test_windows_of_one_file_are_what_they_always_were(speaking, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a little model that was asked to be smaller. " * 80)
    ids = torch.tensor(AutoTokenizer.from_pretrained(speaking)(file.read_text()).input_ids)
    whole = len(ids) // 32
    chosen = torch.randperm(whole, generator=torch.Generator().manual_seed(7))[:10].sort().values
    found = Calibration((file,), 10, 32, 7)
    assert torch.equal(found.windows(speaking), ids[: whole * 32].view(whole, 32)[chosen])
    assert found.fingerprint() == f"{sha256(file.read_bytes()).hexdigest()}:10:32:7"


def test_several_files_are_read_one_after_another(speaking, tmp_path):
    first, second, whole = (tmp_path / name for name in ("a.jsonl", "b.txt", "whole.jsonl"))
    last = "and what stands in another file. " * 40
    first.write_text("\n".join(json.dumps(line) for line in LINES * 10))
    second.write_text(last)
    whole.write_text("\n".join(json.dumps(line) for line in [*LINES * 10, last]))
    both = Calibration((first, second), 20, 16, 1)
    assert torch.equal(both.windows(speaking), Calibration((whole,), 20, 16, 1).windows(speaking))
    assert not torch.equal(both.windows(speaking), Calibration((second, first), 20, 16, 1).windows(speaking))
    assert both.described() == {
        "files": "a.jsonl, b.txt",
        "samples": 20,
        "sequence length": 16,
        "tokens": 320,
        "seed": 1,
    }
    with pytest.raises(
        CheckpointError, match=r"a.jsonl, \S*b.txt: \d+ tokens, \d+ windows of 16; --samples 999 needs 15984"
    ):
        Calibration((first, second), 999, 16).windows(speaking)
    with pytest.raises(CheckpointError, match="none.txt cannot be read as UTF-8 text"):
        Calibration((first, tmp_path / "none.txt"), 2, 16).windows(speaking)
    # Each text and their order count.
    texts = [(first, second), (second, first), (first,), (second,), (first, first), (whole,)]
    assert len({Calibration(files, 20, 16, 1).fingerprint() for files in texts}) == len(texts)


@pytest.mark.parametrize("name", ["quantize", "compare"])
def test_commands_take_several_texts(speaking, tmp_path, monkeypatch, name):
    seen = []
    for file in ("a.txt", "b.txt"):
        (tmp_path / file).write_text("a few words")

    def prepared(*args, calibration, **options):
        seen.append(calibration)
        raise RecipeError("enough")

    monkeypatch.setattr("lowbit_hf.job.prepare", prepared)
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    line = [name, str(speaking), "--to", "W8A8", "--samples", "3", "--seq-len", "5", "--seed", "6", "-o", "out"]
    assert main([*line, *(word for file in files for word in ("--calibrate", str(file)))]) == 1
    assert main(line) == 1
    assert seen == [Calibration(files, 3, 5, 6), None]
    assert main([*line, "--calibrate", str(files[0]), "--calibrate", "none.txt"]) == 2


def test_text_that_does_not_do_is_told(speaking, tmp_path, make):
    short = tmp_path / "short.txt"
    short.write_text("a few words only")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"content": "bad"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "go')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    parquet.write_table(table({"content": ["x"]}), tmp_path / "other.parquet")
    parquet.write_table(table({"text": [None]}), tmp_path / "null.parquet")
    problems = {
        r"short.txt: \d+ tokens, 0 windows of 16; --samples 4 needs 64: give a longer text": short,
        "bad.jsonl, line 2 has no text": tmp_path / "bad.jsonl",
        "torn.jsonl, line 1 is not JSON": tmp_path / "torn.jsonl",
        "bad.parquet cannot be read as parquet with a column 'text'": tmp_path / "bad.parquet",
        "other.parquet cannot be read as parquet": tmp_path / "other.parquet",
        "null.parquet, row 1 holds NoneType": tmp_path / "null.parquet",
        "none.txt cannot be read as UTF-8 text": tmp_path / "none.txt",
    }
    for message, file in problems.items():
        with pytest.raises(CheckpointError, match=message):
            Calibration((file,), 4, 16).windows(speaking)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Calibration((short,), 4, 16).windows(make())
    with pytest.raises(CheckpointError, match="needed are 1 and 2 or more"):
        Calibration((short,), 0, 16).windows(speaking)
