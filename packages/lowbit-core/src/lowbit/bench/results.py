"""Results of benchmarks: read from JSON, and told as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lowbit.bench.inputs import EXACT
from lowbit.errors import LowbitError
from lowbit.table import align, size

VERSION: Final = 1


def read_results(path: Path) -> dict[str, Any]:
    """What `lowbit bench --json` wrote.

    Raises:
        LowbitError: the file cannot be read, or holds something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LowbitError(f"{path} cannot be read as results of `lowbit bench`: {error}") from error
    parts = {"benchmark", "environment", "ceilings", "rows"}
    if not isinstance(results, dict) or results.get("version") != VERSION or not parts <= results.keys():
        raise LowbitError(f"{path} holds no results of version {VERSION}; `lowbit bench NAME --json FILE` writes some")
    return results


def render(results: dict[str, Any]) -> str:
    """Results as text: the machine, a table, and why who is not in it."""
    return "\n".join([*headlines(results), *align(list(table(results))), *notes(results)])


def headlines(results: dict[str, Any]) -> list[str]:
    """What was measured on, and what that can do at best."""
    told, most = results["environment"], results["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    clocks = ", ".join(f"{name} {value}" for name, value in told["clocks"].items())
    copy = f"copy of {size(most['copied'])} {rate(most['bytes_per_s'], 'B/s')}"
    dtype = most.get("dtype", "bfloat16")  # older results do not tell
    product = f"{dtype} product of side {most['side']} {rate(most['flops_per_s'], 'FLOP/s')}"
    return [f"{told['device']}, {told['date']}{clocks and f' ({clocks})'}", versions, f"ceilings: {copy}, {product}"]


def table(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    """A row of text for every contender that was measured."""
    for row in results["rows"]:
        for each in row["contenders"]:
            if "seconds" in each:
                yield {name: str(value) for name, value in row["case"].items()} | _cells(each, row["flops"])


def notes(results: dict[str, Any]) -> list[str]:
    """Why contenders are not in the table, and what their times have beside the work: once each, with how often."""
    found: dict[str, int] = {}
    for row in results["rows"]:
        for each in row["contenders"]:
            if "refusal" in each:
                reason = " ".join(each["refusal"].split())
                line = f"{'FAILED' if each.get('failed') else 'not'} {each['name']}: {reason}"
            elif each.get("note"):
                line = f"{_name(each)} is timed call by call, launching included: it {each['note']}"
            else:
                continue
            found[line] = found.get(line, 0) + 1
    return [line if count == 1 else f"{line} ({count} times)" for line, count in found.items()]


def in_words(seconds: float) -> str:
    """`12.3 us`, `4.56 ms`, `7.89 s`."""
    scale, unit = next((pair for pair in ((1, "s"), (1e-3, "ms")) if seconds >= pair[0]), (1e-6, "us"))
    return f"{seconds / scale:.3g} {unit}"


def _name(each: dict[str, Any]) -> str:
    return each["name"] if each["kernel"] is None else f"{each['name']} ({each['kernel']})"


def _cells(each: dict[str, Any], flops: float) -> dict[str, str]:
    low, high = each["quartiles"]
    accuracy = each["sqnr"]
    return {
        "by": _name(each),
        "time": in_words(each["seconds"]),
        "quartiles": f"{in_words(low)} to {in_words(high)}",
        "GPU busy": f"{100 * each['busy_seconds'] / each['seconds']:.0f}%" if "busy_seconds" in each else "",
        "over baseline": "" if each["speedup"] is None else f"{each['speedup']:.3g}",
        "moves": rate(each["bytes_per_s"], "B/s"),
        "computes": rate(each["flops_per_s"], "FLOP/s") if flops else "",
        "of ceiling": f"{100 * each['of_ceiling']:.3g}%",
        "memory": size(each["peak_bytes"]) if "peak_bytes" in each else "",
        "SQNR, dB": decibels(accuracy, "normal", "exact"),
        "with outliers": decibels(accuracy, "outliers", "exact"),
        "to reference": decibels(accuracy, "normal", "reference"),
        "perplexity": f"{each['perplexity']:.4f}" if "perplexity" in each else "",
    }


def rate(number: float, unit: str) -> str:
    """`3.02 TB/s`, `1.5 GB/s`, `0.2 MB/s`."""
    scale, prefix = next((pair for pair in ((1e12, "T"), (1e9, "G")) if number >= pair[0]), (1e6, "M"))
    return f"{number / scale:.3g} {prefix}{unit}"


def decibels(accuracy: dict[str, dict[str, float]], kind: str, to: str) -> str:
    """An SQNR of a contender's, on inputs of a kind; "" where it was not measured."""
    return in_decibels(accuracy.get(kind, {}).get(to))


def in_decibels(value: float | None) -> str:
    """`18.9`, or in words what stands for no difference and for results that are not finite; "" for None."""
    if value is None or abs(value) == EXACT:
        return {None: "", EXACT: "the same", -EXACT: "not finite"}[value]
    return f"{value:.1f}"
