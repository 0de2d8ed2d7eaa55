"""Regular expressions out of a checkpoint, none of which may keep its reader busy for ever.

Python's `re` cannot be stopped, and takes 2^40 steps for `(a+)+$` on a name of 40 letters. The `regex` package, which
transformers needs too, reads the same language and stops when told to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from time import process_time

import regex

from lowbit.errors import CheckpointError
from lowbit.header import quote

PREFIX = "re:"
"""What an expression starts with where names may stand too."""

_LONGEST = 1 << 16
# Seconds of work for all names of a checkpoint, each of which takes microseconds.
_SECONDS = 10.0


def fault_in(pattern: str) -> str | None:
    """Why a text is no regular expression that is used; None: it is one."""
    if len(pattern) > _LONGEST:
        return f"it has {len(pattern)} characters, more than {_LONGEST}"
    try:
        # What Python's does not take, other readers of the checkpoint do not take either.
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


class Pattern:
    """A regular expression, and the time that is left for it."""

    def __init__(self, pattern: str) -> None:
        """Compile it.

        Raises:
            CheckpointError: it is malformed or too long.
        """
        if (fault := fault_in(pattern)) is not None:
            msg = f"the config holds {quote(pattern)}, a malformed regular expression: {fault}"
            raise CheckpointError(msg)
        self._compiled, self._left = regex.compile(pattern), _SECONDS

    def starts(self, name: str) -> bool:
        """Whether `name` starts with what it stands for.

        Raises:
            CheckpointError: to tell takes too long.
        """
        return self._bounded(self._compiled.match, name)

    def fits(self, name: str) -> bool:
        """Whether it stands for all of `name`.

        Raises:
            CheckpointError: to tell takes too long.
        """
        return self._bounded(self._compiled.fullmatch, name)

    def _bounded(self, match: Callable[..., object], name: str) -> bool:
        started = process_time()
        try:
            found = match(name, timeout=max(self._left, 0.0))
        except TimeoutError as error:
            msg = (
                f"the config holds the regular expression {quote(self._compiled.pattern)}, which takes more than "
                f"{_SECONDS:g} s for names such as {quote(name)}; write one without repetitions inside repetitions"
            )
            raise CheckpointError(msg) from error
        self._left -= process_time() - started
        return found is not None
