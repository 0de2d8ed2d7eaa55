"""Results of `lowbit bench` as values: each part that is drawn or compared is checked as it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from lowbit.bench.inputs import KINDS
from lowbit.bench.results import in_words, read_results
from lowbit.errors import LowbitError
from lowbit.header import as_object, quote

# No number of results is as large, none that is positive as small, and quotients of others would overflow.
_MOST: Final = 1e30
_ROLES: Final = ("candidate", "baseline", "reference", "peer")

Told = Mapping[str, str | float]
"""What a case is: names with lengths, and with words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A contender that was timed in a case."""

    case: Told
    role: str
    name: str
    kernel: str | None
    # Seconds a call: the median, the first and the third quartile.
    seconds: float
    low: float
    high: float
    samples: int
    # Of the case, and the bytes that a call must at least read and write.
    flops: float
    moved: float
    # dB to the exact result, by kind of inputs.
    sqnr: Mapping[str, float]
    # Of the same case; None: it is this one, or was not timed.
    baseline: Outcome | None = None

    @property
    def speedup(self) -> float | None:
        """The baseline's time over this one's."""
        return None if self.baseline is None else self.baseline.seconds / self.seconds

    @property
    def by(self) -> str:
        """The name, and the kernel where lowbit has chosen one."""
        return self.name if self.kernel is None else f"{self.name} ({self.kernel})"

    @property
    def words(self) -> str:
        """All of it on a line."""
        return f"{self.by}, {in_line(self.case)}: {in_words(self.seconds)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A contender that was not timed in a case, and why; `failed`: it raised."""

    case: Told
    role: str
    name: str
    reason: str
    failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of a benchmark measured, and on what."""

    source: str
    benchmark: str
    seed: int | None
    device: str
    date: str
    clocks: Mapping[str, str]
    versions: Mapping[str, str]
    # Bytes and operations a second: what was measured of a copy, and of a product in `dtype`.
    bandwidth: float
    compute: float
    dtype: str
    outcomes: tuple[Outcome, ...]
    missing: tuple[Missing, ...]
    # As the file has it.
    results: dict[str, Any]


def read_run(path: Path) -> Run:
    """What `lowbit bench --json` wrote.

    Raises:
        LowbitError: the file cannot be read, or holds something else.
    """
    return run_of(read_results(path), str(path))


def run_of(results: dict[str, Any], source: str) -> Run:
    """Results as values.

    Raises:
        LowbitError: a part of them is none of `lowbit bench`; the message names it.
    """
    told = _object(results["environment"], f"{source}: environment")
    most = _object(results["ceilings"], f"{source}: ceilings")
    for name in ("copied", "side"):
        _positive(most.get(name), f"{source}: ceilings.{name}")
    rows = enumerate(_list(results["rows"], f"{source}: rows"))
    found = [each for i, row in rows for each in _contenders(row, f"{source}: rows[{i}]")]
    seed = results.get("shapes_seed")
    return Run(
        source=source,
        benchmark=_text(results["benchmark"], f"{source}: benchmark"),
        seed=seed if type(seed) is int else None,
        device=_text(told.get("device"), f"{source}: environment.device"),
        date=_text(told.get("date"), f"{source}: environment.date"),
        clocks=_texts(told.get("clocks"), f"{source}: environment.clocks"),
        versions=_texts(told.get("versions"), f"{source}: environment.versions"),
        bandwidth=_positive(most.get("bytes_per_s"), f"{source}: ceilings.bytes_per_s"),
        compute=_positive(most.get("flops_per_s"), f"{source}: ceilings.flops_per_s"),
        dtype=_text(most.get("dtype", "bfloat16"), f"{source}: ceilings.dtype"),  # older results do not tell
        outcomes=tuple(each for each in found if isinstance(each, Outcome)),
        missing=tuple(each for each in found if isinstance(each, Missing)),
        results=results,
    )


def in_line(case: Told) -> str:
    """`MXFP4, m 16, n 4096`: words by themselves, lengths after their names."""
    parts = [value if isinstance(value, str) else f"{name} {value:.12g}" for name, value in case.items()]
    return ", ".join(filter(None, parts))


def _contenders(value: object, where: str) -> Iterator[Outcome | Missing]:
    """The contenders of a row."""
    row = _object(value, where)
    case = _case(row.get("case"), f"{where}.case")
    flops = _number(row.get("flops"), f"{where}.flops")
    found: list[Outcome | Missing] = []
    for i, item in enumerate(_list(row.get("contenders"), f"{where}.contenders")):
        here = f"{where}.contenders[{i}]"
        each = _object(item, here)
        found.append(_outcome(each, case, flops, here) if "refusal" not in each else _missing(each, case, here))
    base = next((each for each in found if isinstance(each, Outcome) and each.role == "baseline"), None)
    for each in found:
        yield each if isinstance(each, Missing) or each is base else replace(each, baseline=base)


def _outcome(each: Mapping[str, object], case: Told, flops: float, where: str) -> Outcome:
    kernel, quartiles = each.get("kernel"), _list(each.get("quartiles"), f"{where}.quartiles")
    if len(quartiles) != 2:
        raise _wrong(f"{where}.quartiles", quartiles, "a list of two numbers")
    accuracy = _object(each.get("sqnr"), f"{where}.sqnr")
    exact = {kind: _object(accuracy[kind], f"{where}.sqnr.{kind}").get("exact") for kind in KINDS if kind in accuracy}
    return Outcome(
        case=case,
        role=_role(each, where),
        name=_text(each.get("name"), f"{where}.name"),
        kernel=None if kernel is None else _text(kernel, f"{where}.kernel"),
        seconds=_positive(each.get("seconds"), f"{where}.seconds"),
        low=_positive(quartiles[0], f"{where}.quartiles[0]"),
        high=_positive(quartiles[1], f"{where}.quartiles[1]"),
        samples=_count(each.get("samples"), f"{where}.samples"),
        flops=flops,
        moved=_positive(each.get("moved_bytes"), f"{where}.moved_bytes"),
        sqnr={kind: _number(value, f"{where}.sqnr.{kind}.exact") for kind, value in exact.items() if value is not None},
    )


def _missing(each: Mapping[str, object], case: Told, where: str) -> Missing:
    return Missing(
        case=case,
        role=_role(each, where),
        name=_text(each.get("name"), f"{where}.name"),
        reason=" ".join(_text(each["refusal"], f"{where}.refusal").split()),
        failed=bool(each.get("failed")),
    )


def _role(each: Mapping[str, object], where: str) -> str:
    role = each.get("role")
    if role not in _ROLES:
        raise _wrong(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    return cast("str", role)


def _case(value: object, where: str) -> Told:
    told = _object(value, where)
    return {
        name: item if isinstance(item, str) else _number(item, f"{where}.{name}", "a string or a finite number")
        for name, item in told.items()
    }


def _object(value: object, where: str) -> dict[str, object]:
    members = as_object(value)
    if members is None:
        raise _wrong(where, value, "an object")
    return members


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    return cast("list[object]", value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, value, "a string")
    return value


def _texts(value: object, where: str) -> dict[str, str]:
    return {name: _text(item, f"{where}.{name}") for name, item in _object(value, where).items()}


def _number(value: object, where: str, needed: str = "a finite number") -> float:
    # type(), for True is an int to isinstance.
    if type(value) not in (int, float) or not abs(cast("float", value)) < _MOST:
        raise _wrong(where, value, needed)
    return cast("float", value)


def _positive(value: object, where: str) -> float:
    number = _number(value, where)
    if number < 1 / _MOST:
        raise _wrong(where, value, "a positive number")
    return number


def _count(value: object, where: str) -> int:
    if type(value) is not int or not 0 < value < _MOST:
        raise _wrong(where, value, "a whole number from 1 on")
    return value


def _wrong(where: str, value: object, needed: str) -> LowbitError:
    return LowbitError(
        f"{where} is {quote(value)}, not {needed}; `lowbit bench NAME --json FILE` writes what can be read here"
    )
