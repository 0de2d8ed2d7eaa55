from __future__ import annotations

import io
import sys

import pytest

from lowbit_hf import progress
from lowbit_hf.progress import Meter


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time pass."""
    now = 100.0

    def wait(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    return wait


def test_silent_for_two_seconds(capsys, clock):
    with Meter("work", 100) as meter:
        for _ in range(19):
            clock(0.1)
            meter.advance(5)
    assert capsys.readouterr() == ("", "")


def test_plain_lines_with_the_time_left(capsys, clock):
    with Meter("work", 1000) as meter:
        for _ in range(40):
            clock(1.0)
            meter.advance(20)
    out, err = capsys.readouterr()
    assert out == ""  # which may be piped somewhere
    assert err.splitlines() == [
        "work: 4%, about 48 s left",  # after two seconds, then every ten
        "work: 24%, about 38 s left",
        "work: 44%, about 28 s left",
        "work: 64%, about 18 s left",
    ]


@pytest.mark.parametrize("done", [0, 50, 100, 150])
def test_the_share_is_never_more_than_all(clock, done):
    meter = Meter("work", 100)
    meter.advance(done)
    clock(10.0)
    share = min(done, 100)
    left = {0: "about", 50: "about 10 s left", 100: "about 0 s left", 150: "about 0 s left"}[done]
    assert meter.line(110.0).startswith(f"work: {share}%, {left}")


def test_nothing_to_do(capsys, clock):
    with Meter("work", 0) as meter:
        clock(3.0)
        meter.advance(0)
    assert capsys.readouterr().err.startswith("work: 0%")


def test_a_bar_on_a_terminal(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Meter("work", 100) as meter:
        meter.advance(10)
        assert terminal.getvalue() == ""
        clock(3.0)
        meter.advance(40)
        meter._bar.refresh()
        assert "work" in terminal.getvalue()
        assert "50%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, the line is gone


def test_the_bar_is_taken_away_after_an_error(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyError), Meter("work", 100) as meter:
        clock(3.0)
        meter.advance(40)
        raise KeyError
    assert meter._bar.finished is False
    assert not meter._bar.live.is_started
