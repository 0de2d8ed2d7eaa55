"""`lowbit bench`: finds a benchmark, checks what it is asked for, measures, tables, and writes the results as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch

from lowbit.bench import compare, page, plot, ranks
from lowbit.bench.case import Benchmark, Given, Shape, Use
from lowbit.bench.ceilings import measure_ceilings
from lowbit.bench.environment import environment
from lowbit.bench.measure import measure
from lowbit.bench.outcomes import run_of
from lowbit.bench.results import VERSION, render
from lowbit.command import DONE, PROBLEM, discover
from lowbit.errors import BackendError, FormatError, LowbitError

GROUP = "lowbit.bench"
# What is done with results, in the place of a benchmark's name.
_WITH_RESULTS = {"compare": compare.main, "plot": plot.main}


def main(argv: list[str]) -> int:
    """Time an op beside its baseline, other libraries and what the machine can do at best."""
    points = discover(GROUP, "lowbit bench")
    for name in _WITH_RESULTS.keys() & points.keys():
        raise BackendError(
            f"{points[name].value} cannot be `lowbit bench {name}`, which does something else; rename it"
        )
    if argv and argv[0] in _WITH_RESULTS:
        return _WITH_RESULTS[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(
        "lowbit bench",
        description=main.__doc__,
        epilog=_listing(points) if {"-h", "--help"} & {*argv} else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=list(points), help="what to measure, as told below")
    parser.add_argument("--formats", metavar="F,...", help="formats, or with a slash those of weight and input")
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--shapes", metavar="AxB,...", help="shapes, as many lengths each as the benchmark has")
    shapes.add_argument(
        "--shapes-seed", type=int, metavar="N", help="ten shapes drawn at random, which nobody tuned for"
    )
    parser.add_argument("--device", help="where to run; default: cuda if there is one, otherwise cpu")
    parser.add_argument("--peers", action="store_true", help="measure other libraries, too, where they are installed")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each contender, about (0.5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there, once all cases are measured"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results there, as a page of HTML")
    named = next((word for word in argv if word in points), None)
    if named is not None and (own := _load(points[named]).options) is not None:
        own(parser)
    options = parser.parse_args(argv)
    benchmark = _load(points[options.name])
    try:
        given = _given(benchmark, options)
    except LowbitError as error:
        parser.error(str(error))
    return _run(options.name, benchmark, given, options)


def _run(name: str, benchmark: Benchmark, given: Given, options: argparse.Namespace) -> int:
    if not benchmark.together:
        return _measured(name, benchmark, given, options)
    with ranks.joined(given.device) as device:
        return _measured(name, benchmark, replace(given, device=device), options)


def _measured(name: str, benchmark: Benchmark, given: Given, options: argparse.Namespace) -> int:
    if given.device.type == "cuda":
        # Triton launches on the current device, whatever its operands are on.
        torch.cuda.set_device(torch.device("cuda", given.device.index or 0))
    ceilings = measure_ceilings(given.device, budget=options.seconds)
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "version": VERSION,
        "benchmark": name,
        "shapes_seed": options.shapes_seed,
        # Here, while the device is warm from the ceilings.
        "environment": environment(given.device),
        "ceilings": asdict(ceilings),
        "rows": rows,
    }
    for case in benchmark.cases(given):
        if ranks.speaks():
            sys.stderr.write(" ".join(map(str, case.told.values())) + "\n")
        rows.append(measure(case, given.device, ceilings, budget=options.seconds))
        if options.json is not None and ranks.speaks():
            # Each time, so that a run that is cut off leaves what it measured; elsewhere, since it is not the whole.
            _save(results, _unfinished(options.json))
    if not ranks.speaks():
        return DONE
    if options.json is not None:
        _save(results, options.json)
        _unfinished(options.json).unlink(missing_ok=True)
    sys.stdout.write(render(results) + "\n")
    if options.plot is not None:
        source = f"lowbit bench {name}" if options.json is None else str(options.json)
        page.write(page.render([run_of(results, source)]), options.plot)
    failed = [each for row in rows for each in row["contenders"] if each.get("failed") and each["role"] != "peer"]
    return PROBLEM if failed else DONE


def _save(results: dict[str, Any], path: Path) -> None:
    page.write(json.dumps(results, indent=1, allow_nan=False) + "\n", path)


def _unfinished(path: Path) -> Path:
    """Where results are until all cases are measured."""
    return path.with_name(f"{path.stem}.unfinished{path.suffix}")


def _listing(points: dict[str, EntryPoint]) -> str:
    """Every benchmark with its line, and an example."""
    lines: list[str] = []
    for name, point in points.items():
        try:
            lines.append(f"  {name:<10} {_load(point).about}")
        except LowbitError as error:
            lines.append(f"  {name:<10} {error}")
    example = "lowbit bench linear --formats INT4_G128,FP8_ROW/FP8_ROW --shapes 16x4096x4096 --peers"
    done = [f"  {name:<10} {run.__doc__.splitlines()[0]}" for name, run in _WITH_RESULTS.items() if run.__doc__]
    return "\n".join(
        ["benchmarks:", *lines, "", "with results, in the place of a benchmark:", *done, "", f"example: {example}"]
    )


def _load(point: EntryPoint) -> Benchmark:
    """What an entry point stands for.

    Raises:
        LowbitError: it cannot be loaded, or is no benchmark.
    """
    try:
        found = point.load()
    except Exception as error:
        raise LowbitError(f"{point.value} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(found, Benchmark):
        raise LowbitError(f"{point.value} must be a lowbit.bench.Benchmark; it is {found!r}")
    return found


def _uses(benchmark: Benchmark, formats: str | None) -> list[Use]:
    """Formats that were asked for, or the benchmark's own.

    Raises:
        LowbitError: they are none, or the benchmark has none, or none for inputs.
    """
    if formats is not None and not benchmark.formats:
        raise LowbitError("--formats: this benchmark has no formats")
    uses = [Use.parse(spec) for spec in (benchmark.formats if formats is None else formats.split(","))]
    for use in uses:
        if use.input is not None and not benchmark.inputs:
            raise FormatError(f"{use.spec}: this benchmark has no inputs to round; leave out what follows the slash")
    return uses


def _given(benchmark: Benchmark, options: argparse.Namespace) -> Given:
    """What was asked for.

    Raises:
        LowbitError: it cannot be done.
    """
    device = _device(options.device)
    if not 0 < options.seconds < math.inf:
        raise LowbitError(f"--seconds {options.seconds:g} must be positive and finite")
    if options.shapes_seed is not None and not 0 <= options.shapes_seed < 1 << 63:
        raise LowbitError(f"--shapes-seed {options.shapes_seed} must be from 0 to 2^63 - 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise LowbitError(f"--json {options.json}: its folder does not exist")
    if options.json is not None and options.json.is_dir():
        raise LowbitError(f"--json {options.json}: that is a folder; name a file for the results")
    if options.plot is not None:
        page.check_place(options.plot, "--plot", [options.json])
    uses = _uses(benchmark, options.formats)
    if options.shapes_seed is not None:
        blocked = [fmt for use in uses for fmt in (use.format, use.input) if fmt is not None]
        shapes = benchmark.shapes(options.shapes_seed, device.type, blocked)
    elif options.shapes is not None:
        shapes = [_shape(text, [dim.name for dim in benchmark.dims]) for text in options.shapes.split(",")]
    else:
        shapes = list(benchmark.usual(device.type))
    for shape in shapes:
        for use in uses:
            benchmark.check(shape, use)
    return Given(shapes, uses, device, options.peers, options)


def _shape(text: str, names: Sequence[str]) -> Shape:
    parts = text.lower().split("x")
    counts = [int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else 0 for part in parts]
    if len(parts) != len(names) or not all(counts):
        raise FormatError(
            f"shape {text!r} must be {'x'.join(names)}: whole numbers from 1 to 999999999, x between them"
        )
    return tuple(counts)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise LowbitError(f"--device {name}: torch knows no such device; use cpu or cuda") from error
    if device.type not in {"cpu", "cuda"}:
        raise LowbitError(f"--device {name}: calls are timed on cpu and cuda alone")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise LowbitError(f"--device {name}: torch finds {count} CUDA devices here")
    return device
