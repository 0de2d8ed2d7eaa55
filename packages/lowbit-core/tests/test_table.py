from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.table import align, fold, size


def _unfold(name):
    """The names that a folded one stands for, by expanding each brace."""
    choices = []
    for part in re.split(r"(\{.*?\})", name):
        if not part.startswith("{"):
            choices.append([part])
            continue
        runs = [run.split("..") for run in part[1:-1].split(",")]
        choices.append([str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)])
    return ["".join(parts) for parts in product(*choices)]


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b1", "0", "1", "2", "7", "10", "01"]), min_size=1, max_size=4), unique_by=tuple
    )
)
def test_folded_names_stand_for_each_name_once(names):
    names = [".".join(parts) for parts in names]
    folded = fold(names)
    assert sorted(name for text, _ in folded for name in _unfold(text)) == sorted(names)
    assert all(len(_unfold(text)) == count for text, count in folded)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["lm_head.weight"], [("lm_head.weight", 1)]),
        ([f"layers.{i}.q" for i in range(6)], [("layers.{0..5}.q", 6)]),
        ([f"layers.{i}.q" for i in (0, 1, 2, 5, 8, 9)], [("layers.{0..2,5,8..9}.q", 6)]),
        ([f"l.{i}.e.{j}.w" for i in range(3) for j in range(4)], [("l.{0..2}.e.{0..3}.w", 12)]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0"], [("l.0.e.{0..1}", 2), ("l.1.e.0", 1)]),
        (["conv1.w", "conv2.w"], [("conv1.w", 1), ("conv2.w", 1)]),
        (["l.3.q", "l.3.k"], [("l.3.q", 1), ("l.3.k", 1)]),
    ],
)
def test_names_that_differ_in_numbers_only_are_written_once(names, expected):
    assert fold(names) == expected


def test_columns_line_up_and_empty_ones_are_left_out():
    rows = [{"name": "a", "none": "", "size": "1 B"}, {"name": "longer", "none": "", "size": "12 KiB"}]
    assert align(rows) == ["name    size", "a       1 B", "longer  12 KiB"]
    assert align([]) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5 MiB"), (3 << 30, "3 GiB"), (5 << 50, "5120 TiB")],
)
def test_sizes_are_in_binary_units(count, text):
    assert size(count) == text


def test_numbers_that_count_nothing_stay_as_they_are():
    name = f"a.{'9' * 5000}"
    assert fold([name, "a.1", "a.2"]) == [(name, 1), ("a.{1..2}", 2)]
