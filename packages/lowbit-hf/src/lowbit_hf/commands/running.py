"""How a subcommand is run, and how it speaks."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from math import isfinite
from typing import Any

import typer

from lowbit.command import DONE


def subcommand(name: str, example: str) -> Callable[[Callable[..., int]], Callable[[list[str]], int]]:
    """Make a function of typed options the subcommand `name`, a function of arguments; help ends with `example`.

    Wrong arguments leave with exit code 2 (typer's), LowbitErrors go up to `lowbit`.
    """

    def made(command: Callable[..., int]) -> Callable[[list[str]], int]:
        @wraps(command)
        def leave(*args: Any, **kwargs: Any) -> None:
            raise typer.Exit(command(*args, **kwargs))

        def run(argv: list[str]) -> int:
            app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            app.command(name, epilog=f"example: {example}")(leave)
            try:
                typer.main.get_command(app).main(argv, prog_name=f"lowbit {name}")
            except SystemExit as error:
                return error.code if isinstance(error.code, int) else DONE
            return DONE

        run.__doc__ = command.__doc__
        return run

    return made


def command_line() -> str:
    """What the user typed."""
    return shlex.join(["lowbit", *sys.argv[1:]])


def say(text: str) -> None:
    """Print a result."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Say something beside the result, which may be JSON."""
    sys.stderr.write(text + "\n")


def say_json(value: Any) -> None:
    """Print JSON, which has no NaN and no infinity: they become null."""
    say(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
