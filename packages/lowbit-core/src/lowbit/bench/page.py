"""Results of `lowbit bench` as a page of HTML: one file, no requests, nothing in it that a name could run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from lowbit.bench.inputs import KINDS
from lowbit.bench.outcomes import Outcome, Run
from lowbit.bench.results import headlines, in_decibels, notes
from lowbit.bench.roofs import roofline
from lowbit.bench.speedups import speedups
from lowbit.errors import LowbitError
from lowbit.figures import count
from lowbit.journal import sync_path, writing
from lowbit.markup import Column, Markup, element, join, table
from lowbit.page import document, section

# Rows from which on a table is folded away until it is asked for.
_FOLDED: Final = 60
_COLOURS: Final = "\n".join(f".c{kind} {{ color: var(--k{kind}); }}" for kind in range(8))
_STYLE: Final = f"""
h3 {{ margin: 1.75rem 0 0.5rem; font-size: 1rem; line-height: 1.3; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem 2rem; }}
figure {{ margin: 0; max-width: 30rem; break-inside: avoid; }}
figcaption {{ margin-bottom: 0.5rem; font-size: 0.875rem; font-weight: 600; overflow-wrap: anywhere; }}
figure svg + svg {{ margin-top: 0.5rem; }}
.c {{ color: var(--other); }}
{_COLOURS}
.curve, .roof, .mark {{ fill: none; }}
.curve {{ stroke: currentColor; stroke-width: 1.5; stroke-linejoin: round; }}
.roof {{ stroke: var(--text); stroke-width: 1.5; }}
.mark {{ stroke: var(--soft); stroke-width: 1.5; }}
.hollow path:not(.curve) {{ fill: var(--page); stroke: currentColor; stroke-width: 1.25; }}
.plot .halo {{ paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; }}
.legend li {{ white-space: normal; }}
.dash {{ width: 2rem; height: 0.5rem; margin-right: 0.375rem; vertical-align: 0.125rem; color: var(--soft); }}
.notes {{ padding-left: 1.25rem; font-size: 0.875rem; overflow-wrap: anywhere; }}
@media print {{
  .scroll {{ overflow: visible; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  summary {{ display: none; }}
  table {{ font-size: 0.625rem; }}
  th, td {{ padding-block: 0.125rem; }}
}}
"""


def render(runs: Sequence[Run]) -> str:
    """Speedups, accuracy and rooflines of runs on one page, in light and dark, for screens from a phone's up.

    Raises:
        LowbitError: nothing was timed in one of them.
    """
    for run in runs:
        if not run.outcomes:
            raise LowbitError(
                f"{run.source}: there is nothing to draw, for no contender was timed; "
                f"`lowbit bench {run.benchmark} --json FILE` says why, and measures anew"
            )
    title = f"lowbit bench {', '.join(dict.fromkeys(run.benchmark for run in runs))}"
    header = element("header", element("h1", title), element("p", "What was measured, and what limits it."))
    return document(title, [header, *map(_section, runs)], _STYLE)


def check_place(path: Path, option: str, others: Iterable[Path | None]) -> None:
    """Check, before any work, that a page can go where an option says.

    Raises:
        LowbitError: there is no such folder, or something in the way that is no page: a folder, or one of the others.
    """
    if not path.absolute().parent.is_dir():
        raise LowbitError(f"{option} {path}: its folder does not exist")
    if path.is_dir() or path.resolve() in {other.resolve() for other in others if other is not None}:
        what = "is a folder" if path.is_dir() else "is the file of the results"
        raise LowbitError(f"{option} {path}: that {what}; name a file for the page")


def write(text: str, path: Path) -> None:
    """Put a page, or another text, where `path` says, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    # One name, so that killed runs leave one file at most.
    partial = path.with_name(f".{path.name}.partial")
    with writing(path, partial):
        try:
            partial.write_text(text, encoding="utf-8")
            sync_path(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _section(run: Run) -> Markup:
    drawn = [each for each in run.outcomes if each.role != "reference"]
    seed = "" if run.seed is None else f", shapes drawn by seed {run.seed}"
    parts = (speedups(run), _table(drawn), roofline(run, drawn), _notes(run), _machine(run))
    return section(f"{run.benchmark} on {run.device}, {run.date}{seed}", *parts)


def _table(drawn: Sequence[Outcome]) -> Markup:
    names = list(dict.fromkeys(name for each in drawn for name in each.case))
    told = [[each.case.get(name, "") for each in drawn] for name in names]
    cases = [
        Column(
            name,
            [value if isinstance(value, str) else f"{value:.12g}" for value in values],
            numeric=not any(isinstance(value, str) and value for value in values),
        )
        for name, values in zip(names, told, strict=True)
    ]
    times = [_digits(1e6 * each.seconds) for each in drawn]
    speedups = ["" if each.speedup is None else f"{each.speedup:.3g}" for each in drawn]
    normal, outliers = ([in_decibels(each.sqnr.get(kind)) for each in drawn] for kind in KINDS)
    shown = table(
        "Every case",
        Column("By", [each.by for each in drawn]),
        *cases,
        Column("Time, \N{MICRO SIGN}s", times, numeric=True, hint="median of one call"),
        Column("Over baseline", speedups, numeric=True, hint="the baseline's time over this one"),
        Column("SQNR, dB", normal, numeric=True, hint="on normal inputs"),
        Column("With outliers", outliers, numeric=True, hint="SQNR in dB on inputs with outliers"),
        sortable=True,
    )
    if len(drawn) > _FOLDED:
        shown = element("details", element("summary", count(len(drawn), "row")), shown)
    return join([element("h3", "Every case"), shown])


def _digits(number: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:#.3g}".rstrip(".")


def _notes(run: Run) -> Markup:
    told = notes(run.results)
    if not told:
        return Markup()
    listed = element("ul", *(element("li", line) for line in told), class_="notes")
    return join([element("h3", "What is not there, and what is timed otherwise"), listed])


def _machine(run: Run) -> Markup:
    device, versions, ceilings = headlines(run.results)
    pairs = {"device": device, "versions": versions, "ceilings": ceilings.removeprefix("ceilings: ")}
    pairs["source"] = Path(run.source).name
    listed = (part for name, value in pairs.items() for part in (element("dt", name), element("dd", value)))
    return join([element("h3", "Machine"), element("dl", *listed, class_="pairs")])
