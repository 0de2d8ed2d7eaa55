"""Expressions out of a config match what Python's do, and are refused where those cannot be compiled or stopped."""

from __future__ import annotations

import re

import pytest

from lowbit.errors import CheckpointError
from lowbit_hf.patterns import Pattern, fault_in

NAMES = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj.weight", "up_proj", ""]


@pytest.mark.parametrize(
    "pattern",
    [r".*\.up_proj", r"model\.layers\.(0|1)\.", r"^(?!lm_head)\w+$", r"(?i)LM_HEAD", "", r".*proj$", r"\d+|lm"],
)
def test_names_match_as_in_python(pattern):
    found = Pattern(pattern)
    assert [found.starts(name) for name in NAMES] == [re.match(pattern, name) is not None for name in NAMES]
    assert [found.fits(name) for name in NAMES] == [re.fullmatch(pattern, name) is not None for name in NAMES]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", r"missing \)"),
        (r"\p{L}", "bad escape"),
        ("a{99999999999999999999}", "repetition number"),
        ("(" * 5000, "recursion"),
        ("a" * 70_000, "70000 characters, more than 65536"),
    ],
)
def test_faults_are_told(pattern, words):
    assert re.search(words, fault_in(pattern) or "")
    with pytest.raises(CheckpointError, match=f"malformed regular expression: .*{words}"):
        Pattern(pattern)


def test_time_is_bounded_for_all_names_together(monkeypatch):
    monkeypatch.setattr("lowbit_hf.patterns._SECONDS", 0.05)
    found = Pattern("(.|..|...)*(?<!a)$")
    with pytest.raises(CheckpointError, match="takes more than 0.05 s for names such as 'a+'"):
        for _ in range(1000):
            found.fits("a" * 18)
