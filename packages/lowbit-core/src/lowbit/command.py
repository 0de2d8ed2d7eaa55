"""The `lowbit` command: finds subcommands by the entry-point group `lowbit.commands`, turns errors into exit codes.

Exit codes: 0 done, 1 the job found a problem, 2 wrong use.
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import EntryPoint, distributions, entry_points, version

from lowbit.errors import BackendError, LowbitError

GROUP = "lowbit.commands"
DONE, PROBLEM, WRONG_USE = 0, 1, 2
_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run `lowbit SUBCOMMAND ...` and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    speaker = " ".join(["lowbit", *arguments[:1]])
    try:
        code = _dispatch(arguments)
        # While it can still be told that nobody could be told.
        sys.stdout.flush()
    except LowbitError as error:
        sys.stderr.write(f"{speaker}: {error}\n")
        return PROBLEM
    except OSError as error:
        # What no file in particular is to blame for: a closed pipe, a full disk that stdout goes to, too long a name.
        sys.stderr.write(f"{speaker}: {error}\n")
        _forget_output()
        return PROBLEM
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{speaker}: interrupted\n")
        return _INTERRUPTED
    return code


def _forget_output() -> None:
    """Let what is left of the output go nowhere, or Python would try to write it once more on leaving."""
    with suppress(OSError), open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    commands = discover(GROUP, "lowbit")
    if not arguments or arguments[0] in {"-h", "--help"}:
        sys.stdout.write(_usage(commands))
        return DONE if arguments else WRONG_USE
    if arguments[0] == "--version":
        told = versions() | {"torch": version("torch"), "Python": platform.python_version()}
        sys.stdout.writelines(f"{name} {found}\n" for name, found in told.items())
        return DONE
    name, *rest = arguments
    if name not in commands:
        hint = "" if "quantize" in commands else " (checkpoints need: pip install lowbit-hf)"
        sys.stderr.write(f"lowbit: there is no command {name!r}{hint}; the commands are {', '.join(commands)}\n")
        return WRONG_USE
    return commands[name].load()(rest)


def versions() -> dict[str, str]:
    """Version of every installed distribution of lowbit, and of those by others that are named after it."""
    found = {each.name: each.version for each in distributions() if (each.name or "").startswith("lowbit")}
    return dict(sorted(found.items()))


def discover(group: str, speaker: str) -> dict[str, EntryPoint]:
    """What distributions bring under an entry-point group, by name; `speaker` is what a user writes before the name.

    Raises:
        BackendError: two bring one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        if point.name in found:
            msg = f"two distributions provide `{speaker} {point.name}`: {found[point.name].value} and {point.value}"
            raise BackendError(msg)
        found[point.name] = point
    return found


def _usage(commands: dict[str, EntryPoint]) -> str:
    lines = ["usage: lowbit COMMAND [ARGUMENTS]", "", "commands:"]
    for name, point in commands.items():
        lines.append(f"  {name:<10} {_about(point)}")
    return "\n".join(
        [*lines, "", "lowbit COMMAND --help tells more about each; lowbit --version, which versions are installed.", ""]
    )


def _about(point: EntryPoint) -> str:
    """The first line of a command's docstring."""
    try:
        lines = (point.load().__doc__ or "").strip().splitlines()
    except Exception as error:  # noqa: BLE001 - a command that cannot be imported must not hide the others
        return f"cannot be loaded: {type(error).__name__}: {error}"
    return lines[0] if lines else ""
