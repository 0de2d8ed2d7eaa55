"""The journal against a torn, damaged or absent file, and its row ranges against sets of rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit import journal as journal_module
from lowbit.journal import Journal, add_rows


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6))))
def test_row_ranges_are_the_union_of_rows(written):
    spans = {}
    rows = set()
    for start, count in written:
        add_rows(spans, "t", start, start + count)
        rows |= set(range(start, start + count))
    ranges = spans.get("t", [])
    assert {row for start, stop in ranges for row in range(start, stop)} == rows
    assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))


def reopened(path):
    journal = Journal(path)
    journal.close()
    return journal


def two_units(path):
    journal = Journal(path)
    journal.append({"owner": {"fingerprint": "f"}})
    journal.append({"planned": "a"})
    journal.wrote_rows("a", "t", 0, 4)
    journal.done("one")
    journal.sync()
    first = path.stat().st_size
    journal.wrote_rows("a", "t", 4, 6)
    journal.wrote_rows("b", "u", 1, 2)
    journal.done("two")
    journal.sync()
    journal.close()
    return first


def test_what_was_synced_is_read_back(tmp_path):
    two_units(tmp_path / "journal")
    journal = reopened(tmp_path / "journal")
    assert journal.owner == {"fingerprint": "f"}
    assert journal.rows == {"a": {"t": [(0, 6)]}, "b": {"u": [(1, 2)]}}
    assert journal.is_done("one")
    assert journal.is_done("two")
    assert not journal.is_done("three")
    assert (journal.planned, journal.finished) == ({"a"}, set())


def test_a_line_torn_anywhere_is_dropped_and_overwritten(tmp_path):
    path = tmp_path / "journal"
    first = two_units(path)
    whole = path.read_bytes()
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        assert journal.is_done("one")
        assert not journal.is_done("two")
        assert journal.rows == {"a": {"t": [(0, 4)]}}
        journal.done("three")
        journal.sync()
        journal.close()
        assert reopened(path).is_done("three")


@pytest.mark.parametrize("damage", [b"\0" * 50, b"1\n", b"{}\n", b"[]\n", b"\xff\xff\n", b'{"unit":\n'])
def test_damage_ends_what_is_trusted(damage, tmp_path):
    path = tmp_path / "journal"
    first = two_units(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:first] + damage + whole[first:])
    journal = reopened(path)
    assert journal.is_done("one")
    assert not journal.is_done("two")
    assert path.read_bytes() == whole[:first]


def test_units_wait_for_enough_bytes_or_seconds(tmp_path, monkeypatch):
    def journalled(nbytes):
        journal.wrote(tmp_path, nbytes)
        journal.done(f"unit of {nbytes}")
        return reopened(tmp_path / "journal").is_done(f"unit of {nbytes}")

    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 1e9)
    journal = Journal(tmp_path / "journal")
    assert not journalled(journal_module.SYNC_BYTES - 2)
    assert not journalled(1)
    assert journal.is_done("unit of 1")
    assert journalled(5)
    assert reopened(tmp_path / "journal").is_done("unit of 1")
    assert not journalled(7)
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.0)
    assert journalled(8)
    journal.close()


def test_bytes_are_synced_before_their_unit_is_journalled(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error", str(path))

    journal = Journal(tmp_path / "journal")
    journal.wrote(tmp_path / "data", 1)
    journal.done("one")
    monkeypatch.setattr(journal_module, "sync_path", fail)
    with pytest.raises(OSError, match="Input/output"):
        journal.sync()
    assert (tmp_path / "journal").stat().st_size == 0
    journal.close()


def test_clear_forgets(tmp_path):
    two_units(tmp_path / "journal")
    journal = Journal(tmp_path / "journal")
    journal.clear()
    assert (journal.owner, journal.rows, journal.planned) == ({}, {}, set())
    assert not journal.is_done("one")
    journal.close()
    assert reopened(tmp_path / "journal").owner == {}


def test_planned_anew_is_not_finished(tmp_path):
    journal = Journal(tmp_path / "journal")
    for record in ({"planned": "a"}, {"finished": "a"}, {"planned": "a"}):
        journal.append(record)
    journal.close()
    assert reopened(tmp_path / "journal").finished == set()
