"""Numbers in words, as the report shows them; units never part from their numbers."""

from __future__ import annotations

import math
from typing import Final

from lowbit.table import size

NBSP: Final = "\N{NO-BREAK SPACE}"
UNKNOWN: Final = "\N{EN DASH}"


def error_share(sqnr: float) -> float:
    """Size of the error over that of the signal (root mean squares), of an SQNR in dB."""
    return 10 ** min(-sqnr / 20, 300)


def percent(share: float) -> str:
    """A share with the two digits that count: `2.5 %`."""
    number = 100 * share
    if number > 10_000 or not number >= 0:
        text = "over 10,000" if number > 0 else UNKNOWN
    elif number < 1e-9:
        text = "0"
    else:
        text = f"{number:,.{max(0, 1 - math.floor(math.log10(number)))}f}"
    return f"{text}{NBSP}%"


def part(share: float) -> str:
    """A share of a whole: `86.9 %`."""
    return f"{fixed(100 * share, 1)}{NBSP}%"


def fixed(number: float | None, digits: int) -> str:
    """A number for a column; "" for None, ∞, and a dash for NaN."""
    if number is None:
        return ""
    if math.isnan(number):
        return UNKNOWN
    text = "∞" if math.isinf(number) else f"{abs(number):,.{digits}f}"
    return f"\N{MINUS SIGN}{text}" if number < 0 else text


def decibels(sqnr: float) -> str:
    """`32.0 dB`."""
    return f"{fixed(sqnr, 1)}{NBSP}dB"


def error(sqnr: float) -> str:
    """What an SQNR in dB says of the error, to stand after a colon."""
    if math.isnan(sqnr):
        return "the error could not be told"
    return "there is no error" if sqnr == math.inf else f"the error is {percent(error_share(sqnr))} of the signal"


def bytesize(count: float) -> str:
    """Bytes as `lowbit.table.size` has them, on one line."""
    return size(count).replace(" ", NBSP)


def duration(seconds: float) -> str:
    """`8.2 s`, `12 min 4 s`, `3 h 12 min`."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{fixed(seconds, 1)}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60:,}{NBSP}h {minutes % 60}{NBSP}min"


def count(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,}{NBSP}{noun}{'' if number == 1 else 's'}"
