"""The `lowbit` command: its exit codes, its help, and what reaches standard error."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from lowbit import FormatError, command


@dataclass
class Point:
    name: str
    function: object
    value: str = "somewhere:main"

    def load(self):
        if isinstance(self.function, Exception):
            raise self.function
        return self.function


def good(argv):
    """Do good.

    Not shown.
    """
    return len(argv)


def nameless(argv):
    return 0


def fails(argv):
    """Fail."""
    raise FormatError("100 is not a multiple of 32")


def interrupted(argv):
    """Stop."""
    raise KeyboardInterrupt


POINTS = [Point("good", good), Point("fails", fails), Point("stops", interrupted), Point("nameless", nameless)]


@pytest.fixture
def commands(monkeypatch):
    def install(*points):
        monkeypatch.setattr(
            command, "entry_points", lambda *, group: list(points) if group == "lowbit.commands" else []
        )

    install(*POINTS)
    return install


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        ([], 2, "usage: lowbit COMMAND", ""),
        (["-h"], 0, "usage: lowbit COMMAND", ""),
        (["--help"], 0, "  good       Do good.\n", ""),
        (["good"], 0, "", ""),
        (["good", "--help", "x"], 2, "", ""),
        (["fails"], 1, "", "lowbit fails: 100 is not a multiple of 32\n"),
        (["stops"], 130, "", "\nlowbit stops: interrupted\n"),
        (
            ["nope"],
            2,
            "",
            "lowbit: there is no command 'nope' (checkpoints need: pip install lowbit-hf); the commands are fails,",
        ),
    ],
)
def test_exit_codes_and_streams(commands, capsys, argv, code, out, err):
    assert command.main(argv) == code
    told = capsys.readouterr()
    assert out in told.out
    assert bool(told.out) == bool(out)
    assert told.err.startswith(err)
    assert bool(told.err) == bool(err)


def test_version_is_that_of_all_that_counts(monkeypatch, capsys):
    names = ["lowbit-moon", "numpy", "lowbit-core", None]
    found = [SimpleNamespace(name=name, version=f"1.{i}") for i, name in enumerate(names)]
    monkeypatch.setattr(command, "distributions", lambda: found)
    assert command.main(["--version"]) == 0
    told = capsys.readouterr().out.splitlines()
    python = ".".join(map(str, sys.version_info[:3]))
    assert told == ["lowbit-core 1.2", "lowbit-moon 1.0", f"torch {version('torch')}", f"Python {python}"]


def test_the_command_line_is_the_default(commands, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lowbit", "good", "1"])
    assert command.main() == 1


def test_the_hint_is_for_those_without_lowbit_hf(commands, capsys):
    commands(Point("quantize", good))
    assert command.main(["evaluate"]) == 2
    assert capsys.readouterr().err == "lowbit: there is no command 'evaluate'; the commands are quantize\n"


def test_help_shows_what_cannot_be_loaded_among_the_rest(commands, capsys):
    commands(*POINTS, Point("broken", ImportError("no libmoon")))
    assert command.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  broken     cannot be loaded: ImportError: no libmoon" in lines
    assert "  good       Do good." in lines
    assert "  nameless" in [line.rstrip() for line in lines]
    with pytest.raises(ImportError, match="no libmoon"):
        command.main(["broken"])


@pytest.mark.parametrize("argv", [["good"], ["--help"], []])
def test_two_commands_of_one_name_are_a_problem(commands, capsys, argv):
    commands(Point("good", good, "a:main"), Point("good", good, "b:main"))
    assert command.main(argv) == 1
    assert "two distributions provide `lowbit good`: a:main and b:main" in capsys.readouterr().err


def test_the_installed_command_runs():
    lowbit = [sys.executable, "-c", "import sys; from lowbit.command import main; sys.exit(main())"]
    assert subprocess.run([*lowbit, "doctor", "--format", "MXFP4"], capture_output=True, check=True, text=True).stdout
    wrong = subprocess.run([*lowbit, "doctor", "--format", "nonsense"], capture_output=True, check=False, text=True)
    assert wrong.returncode == 2
    assert "format 'nonsense' is" in wrong.stderr
