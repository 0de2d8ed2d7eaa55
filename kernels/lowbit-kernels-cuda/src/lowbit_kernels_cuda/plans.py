"""How a product runs for so many tokens: the plan of least time, by what kinds of programs were measured to cost.

The costs are data, `data/plans-9.0.json`, which `benchmarks/tuning.py` measures and fits. On other GPUs they are a
model: the same costs, for as many multiprocessors as there are, without the kinds that need Hopper.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import groupby, pairwise
from typing import Any

from lowbit.format import Format

# Where a ratio of two measured times is more than noise.
_NOISE = 1.03


@dataclass(frozen=True, slots=True)
class Kind:
    """What a program does: rows of the weight, tokens, columns at a time, warps, and steps of inputs on their way."""

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int
    # Whether scales are of sums of products rather than of codes.
    exact: bool = False
    # Steps whose words are read ahead, by the kernels for Hopper; 0: `linear_dots`.
    depth: int = 0
    # Steps that follow one another as one, in `linear_dots`.
    unroll: int = 1
    # Whether codes of weights and inputs meet as 8-bit floats, on Hopper.
    bytes: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product runs: the kind of its programs, and the parts that K is cut into."""

    kind: Kind
    splits: int = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """What programs of a kind take, in microseconds: the product of these numbers with `terms`."""

    # Programs at a time on a multiprocessor.
    resident: int
    start: float
    # Cutting K into parts, and a billion bytes of parts.
    split: float
    part: float
    # As many programs as are resident at a time.
    each: float
    # A step of a block that reaches beyond the last token, besides, by the kernel for Hopper.
    beyond: float
    # A step, while 1, 2, .. programs share a multiprocessor.
    steps: tuple[float, ...]


def terms(plan: Plan, blocks: int, m: int, n: int, k: int, resident: int, multiprocessors: int) -> list[float]:
    """What the numbers of a cost from `start` on are multiplied by, for m tokens in so many blocks."""
    kind, splits = plan.kind, plan.splits
    programs = math.ceil(n / kind.rows) * blocks * splits
    steps = math.ceil(math.ceil(k / kind.columns) / splits)
    full, rest = divmod(math.ceil(programs / multiprocessors), resident)
    shared = [0.0] * resident
    shared[-1] += full * steps
    if rest:
        shared[rest - 1] += steps
    cut = float(splits > 1)
    beyond = sum(shared) if kind.depth and m < kind.tokens else 0.0
    return [1.0, cut, cut * splits * m * n * 4e-9, float(full + (rest > 0)), beyond, *shared]


def needs_exactness(how: dict[str, Any], *, exact: bool = False) -> bool:
    """Whether a scale times a code need not be a number of the inputs' type, so that scales must be of sums.

    If it is `exact` numbers that are asked for, also where it is rounded to one otherwise.
    """
    fits = _product(how) if exact else _fits(how)
    return bool(how["GROUP"]) and (not fits or bool(how["SPEC"].zero and how["LINES"]))


def exactness(how: dict[str, Any], m: int, *, exact: bool = False) -> bool:
    """Whether scales are of sums in `linear_dots`: where they must be, and where it costs no time."""
    return needs_exactness(how, exact=exact) or (m <= 64 and not _product(how) and how["GROUP"] >= 64)


def _product(how: dict[str, Any]) -> bool:
    scale, element = how["SPEC"].scale, how["SPEC"].element
    bits = element.mantissa + 1 if element.kind == "float" else element.bits
    digits = 8 if how["BF16"] else 11
    return scale.bits == 8 and bits + scale.mantissa <= digits and (how["BF16"] or not scale.powers_of_two)


def _fits(how: dict[str, Any]) -> bool:
    scale = how["SPEC"].scale
    return _product(how) or (scale.bits == 16 and (scale.mantissa == 7) == how["BF16"])


def columns(how: dict[str, Any]) -> int:
    """Columns of a step, of which each sum has one scale in a row."""
    return 128 if how["GROUP"] % 128 == 0 else 64


def blocks_for(m: int) -> tuple[int, ...]:
    """Tokens of a program that are worth a thought for m tokens."""
    least = 1 << max(m - 1, 0).bit_length()
    return tuple(
        block for block in (16, 32, 64, 128, 256) if min(least, 128 if m > 128 else 64) <= block <= max(least, 16)
    )


def choose(
    fmt: Format,
    how: dict[str, Any],
    m: int,
    n: int,
    k: int,
    multiprocessors: int,
    experts: int = 0,
    *,
    hopper: bool,
    exact: bool = False,
    span: int = 0,
) -> tuple[float, Plan]:
    """Microseconds of the best plan for m tokens, which so many experts share as chance has it, and the plan.

    `exact`: weights must not be rounded; `span`: columns of inputs that have scales of their own, or 0.
    """
    read = min(m, experts) or 1
    mean = m / read
    # As many tokens as most experts have, and as many as is usual.
    most, usual = (math.ceil(mean + spread * math.sqrt(mean)) if experts else m for spread in (3, 1))
    of_sums, needed, blocks = exactness(how, most, exact=exact), needs_exactness(how, exact=exact), blocks_for(most)

    def timed(kind: Kind, cost: Cost, splits: int) -> tuple[float, Plan]:
        wide = columns(how) if kind.exact else kind.columns
        plan = Plan(replace(kind, columns=min(wide, span or wide)), splits)
        of = terms(plan, read * math.ceil(usual / kind.tokens), m, n, k, cost.resident, multiprocessors)
        numbers = (cost.start, cost.split, cost.part, cost.each, cost.beyond, *cost.steps)
        return sum(number * term for number, term in zip(numbers, of, strict=True)), plan

    found = [
        timed(kind, cost, splits)
        for kind, cost in _usable(fmt, blocks, exact=of_sums, hopper=hopper and not needed and not span)
        for splits in splits_for(kind, k)
    ]
    return min(found, key=lambda each: each[0])


def plan_of_bytes(m: int, n: int, k: int, multiprocessors: int, experts: int = 0) -> Plan:
    """The plan for m tokens, of as many experts, whose codes meet those of a weight as 8-bit floats.

    A program fills a multiprocessor.
    """
    read = min(m, experts) or 1
    each = math.ceil(m / read)
    few = each <= 64
    kind = Kind(128, 64 if few else 128, 128, 8, 6, depth=4 if few else 2, bytes=True)
    programs, splits = math.ceil(n / kind.rows) * math.ceil(each / kind.tokens) * read, 1
    while splits < 4 and 2 * programs * splits <= multiprocessors and k >= 4 * splits * kind.columns:
        splits *= 2
    return Plan(kind, splits)


def splits_for(kind: Kind, k: int) -> list[int]:
    """Parts that K may be cut into: of two steps at least, and no more than fit in registers when they are added."""
    most = 8 if kind.tokens <= 32 else 4
    return [
        splits for splits in (1, 2, 3, 4, 6, 8) if splits == 1 or (splits <= most and k >= 2 * splits * kind.columns)
    ]


@cache
def _usable(fmt: Format, blocks: tuple[int, ...], *, exact: bool, hopper: bool) -> list[tuple[Kind, Cost]]:
    """Kinds of programs with so many tokens, and their costs: those of the most similar format that has some."""

    def unlike(name: str) -> float:
        other = Format.parse(name)
        groups = [math.log2(min(each.block_for(2)[-1] or 1 << 14, 128)) for each in (fmt, other)]
        return (
            abs(fmt.element.bits - other.element.bits)
            + abs(groups[0] - groups[1])
            + 2 * (fmt.element.kind != other.element.kind)
            + 2 * ((fmt.zero is None) != (other.zero is None))
        )

    for name in sorted(_data()["formats"], key=unlike):
        kinds = [
            (kind, cost)
            for kind, cost in _costs(name)
            if kind.tokens in blocks and _fits_in(kind, exact=exact, hopper=hopper)
        ]
        if kinds:
            return kinds
    raise AssertionError(f"the data has no programs of {blocks} tokens")


def _fits_in(kind: Kind, *, exact: bool, hopper: bool) -> bool:
    """Whether programs of a kind are for products; of many tokens on Hopper, its kernel's alone are."""
    return hopper if kind.depth else kind.exact == exact and not (hopper and kind.tokens >= 128)


def ratios(fmt: Format, how: dict[str, Any], n: int, k: int, *, hopper: bool) -> tuple[tuple[int, float], ...]:
    """Numbers of tokens, and what of the time with a plain weight a product takes, by the matrix measured nearest.

    On the GPU that was measured; without `hopper`, as if it were none.
    """
    data = _data()
    near = min(_plain(), key=lambda shape: abs(math.log(shape[0] / n)) + abs(math.log(shape[1] / k)))
    times = zip(data["tokens"], _plain()[near], strict=True)
    return tuple(
        (m, choose(fmt, how, m, *near, data["multiprocessors"], hopper=hopper)[0] / plain) for m, plain in times
    )


def is_slower(found: tuple[tuple[int, float], ...], m: int) -> bool:
    """Whether `ratios` say so of m tokens; between those that were measured, on a line over the logarithm of tokens."""
    before, after = found[0], found[-1]
    for one, other in pairwise(found):
        if one[0] <= m <= other[0]:
            before, after = one, other
    if m >= after[0] or before == after:
        return after[1] > _NOISE
    at = math.log(max(m, before[0]) / before[0]) / math.log(after[0] / before[0])
    return before[1] + at * (after[1] - before[1]) > _NOISE


def slower_tokens(found: tuple[tuple[int, float], ...]) -> str | None:
    """The numbers of tokens at which `ratios` say that it is slower, in words; None: at none."""
    spans = [[m for m, _ in run] for slow, run in groupby(found, lambda each: each[1] > _NOISE) if slow]
    last = found[-1][0]

    def told(span: list[int]) -> str:
        if span[-1] == last:
            return f"{span[0]} and more"
        return f"about {span[0]}" if len(span) == 1 else f"{span[0]} to {span[-1]}"

    return f"{', '.join(map(told, spans))} tokens" if spans else None


@cache
def _data() -> dict[str, Any]:
    return json.loads(files("lowbit_kernels_cuda").joinpath("data/plans-9.0.json").read_text())


@cache
def _costs(name: str) -> tuple[tuple[Kind, Cost], ...]:
    rows: list[dict[str, dict[str, Any]]] = _data()["formats"][name]
    return tuple((Kind(**row["kind"]), replace(Cost(**row["cost"]), steps=tuple(row["cost"]["steps"]))) for row in rows)


@cache
def _plain() -> dict[tuple[int, int], list[float]]:
    """Microseconds with a plain weight (N, K), for each number of tokens."""
    found: dict[tuple[int, int], list[float]] = {}
    for name, times in _data()["plain"].items():
        n, k = map(int, name.split("x"))
        found[n, k] = times
    return found
