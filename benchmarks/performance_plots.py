"""What `lowbit bench` measured, drawn as SVG for docs/performance.md; pages.py writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import product
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from lowbit.bench.results import headlines, in_words

STYLE: dict[Any, Any] = {
    # The same bytes from the same results; text stays text, which is small and has the reader's own font.
    "svg.hashsalt": "lowbit",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
}
# In units of the text's size: so wide that a phone shows the text at 8 pixels.
WIDTH = 430
ROW, MARGIN, GAP = 14, 8, 6
BASELINE, RULE = "#000000", "#cccccc"
# Of lowbit and of others; colours of Okabe and Ito, which the colour-blind tell apart, too; then the same five hatched.
_LOOKS: list[dict[str, Any]] = [
    {"facecolor": colour, "edgecolor": "white", "linewidth": 0, "hatch": hatch}
    for hatch, colour in [
        ("", "#0072b2"),
        *product(("", "/////"), ("#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")),
    ]
]
LOWBIT, *OTHERS = _LOOKS


@dataclass(frozen=True, slots=True)
class Case:
    """A case of a benchmark: the panel and the line that it stands on, and values of what was timed, by name."""

    shape: str
    # Format and other words; no words: the name of the format, above the lines of that.
    line: tuple[str, str | None]
    # Of lowbit and of the fastest other.
    bars: dict[str, float]
    baseline: dict[str, float]


def plot(results: dict[str, Any]) -> str:
    """A line for each case; shapes side by side, as many as there is room for."""
    told, logarithmic = results["environment"], by_time(results)
    cases = [case_of(row, logarithmic=logarithmic) for row in timed(results)]
    lines, shapes = lines_of(cases), list(dict.fromkeys(case.shape for case in cases))
    names = dict.fromkeys(name for case in cases for name in case.bars)
    looks = {"lowbit": LOWBIT} if "lowbit" in names else {}
    looks |= {name: OTHERS[i] for i, name in enumerate(name for name in names if name != "lowbit")}
    legend: list[Any] = [Patch(**look, label=name) for name, look in looks.items()]
    if names := dict.fromkeys(name for case in cases for name in case.baseline):
        legend.append(Line2D([], [], color=BASELINE, linestyle="", marker="|", markersize=10, label="; ".join(names)))

    left = 2 * MARGIN + max(width_of(words or form, "bold" if words is None else "normal") for form, words in lines)
    across = min(len(shapes), max(1, int((WIDTH - left) // (GAP + max(map(width_of, shapes))))))
    width = (WIDTH - left) / across
    bands = [shapes[i : i + across] for i in range(0, len(shapes), across)]
    lines_in = [lines_of([case for case in cases if case.shape in band]) for band in bands]
    y = height = 60 + 15 * len(legend) + sum(ROW * len(lines) + 40 for lines in lines_in)
    with rc_context(STYLE):
        figure = Figure((WIDTH / 72, height / 72), facecolor="white")

        def write(x: float, y: float, text: str, **style: Any) -> None:
            figure.text(x / WIDTH, y / height, text, va="center", **style)

        write(MARGIN, y - 14, f"{results['benchmark']}: {measure(results)}", weight="bold")
        write(MARGIN, y - 29, f"{told['device']}, {told['date']}{seed(results)}")
        write(WIDTH - MARGIN, 10, unit(results), ha="right")
        y -= 36
        figure.legend(handles=legend, loc="upper left", bbox_to_anchor=(0, y / height), frameon=False, labelspacing=0.3)
        y -= 15 * len(legend) + 8
        first = None
        for band, lines in zip(bands, lines_in, strict=True):
            y -= ROW * len(lines) + 18
            for i, shape in enumerate(band):
                x, deep = left + width * i, ROW * len(lines)
                write(x, y + deep + 8, shape)
                place = (x / WIDTH, y / height, (width - 18) / WIDTH, deep / height)
                axes = figure.add_axes(place, sharex=first, ylim=(len(lines) - 0.5, -0.5))
                if first is None:
                    first = axes
                    scale(axes, cases, logarithmic=logarithmic)
                frame(axes, lines if i == 0 else [])
                draw(axes, lines, [case for case in cases if case.shape == shape], looks)
            y -= 22
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def width_of(text: str, weight: str = "normal") -> float:
    """How wide a text is."""
    font = FontProperties(family=STYLE["font.sans-serif"][0], size=STYLE["font.size"], weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def scale(axes: Axes, cases: Sequence[Case], *, logarithmic: bool) -> None:
    """Values from left to right: times by their logarithm, shares from zero and beyond 1."""
    values = [value for case in cases for value in (case.bars | case.baseline).values()]
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2, max(values) * 2)
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.xaxis.set_major_formatter(lambda seconds, _: in_words(seconds))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.03 * max(1, *values))
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))


def frame(axes: Axes, lines: Sequence[tuple[str, str | None]]) -> None:
    """Names of lines, and rules behind the bars, a strong one at 1."""
    axes.set_yticks(range(len(lines)), [words or form for form, words in lines])
    for label, (_, words) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if words is None else "normal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.grid(visible=True, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_xscale() == "linear":
        axes.axvline(1, color=BASELINE, linewidth=0.8, linestyle=":")


def draw(
    axes: Axes, lines: Sequence[tuple[str, str | None]], cases: Sequence[Case], looks: dict[str, dict[str, Any]]
) -> None:
    """Lowbit, the fastest other below it, and a stroke for the baseline."""
    for name, look in looks.items():
        here = [case for case in cases if name in case.bars]
        values, high = [case.bars[name] for case in here], [0.8 / len(case.bars) for case in here]
        middle = [
            lines.index(case.line) - 0.4 + deep * (list(case.bars).index(name) + 0.5)
            for case, deep in zip(here, high, strict=True)
        ]
        if axes.get_xscale() == "linear":
            axes.barh(middle, values, high, **look)
        else:
            axes.scatter(values, middle, marker="s", s=25, **look)
    here = [case for case in cases if case.baseline]
    values, middle = [min(case.baseline.values()) for case in here], [lines.index(case.line) for case in here]
    axes.plot(values, middle, "|", color=BASELINE, markersize=0.8 * ROW)


def case_of(row: dict[str, Any], *, logarithmic: bool) -> Case:
    """What is drawn of a case: times; or the least time that the ceilings allow what it is about, over each time."""
    ours, theirs, base = (fastest(row, role) for role in ("candidate", "peer", "baseline"))
    first = subject(row)

    def value(each: dict[str, Any]) -> float:
        return each["seconds"] if logarithmic else first["of_ceiling"] * first["seconds"] / each["seconds"]

    told = row["case"]
    # As `--shapes` takes them.
    shape = "x".join(str(length) for name, length in told.items() if name == "shape" or isinstance(length, int))
    words = [text for name, text in told.items() if name not in {"format", "shape"} and isinstance(text, str) and text]
    if logarithmic:  # so one panel has all
        words, shape = [*words, shape], ""
    return Case(
        shape,
        (told.get("format", ""), ", ".join(words)),
        {each["name"]: value(each) for each in (ours, theirs) if each is not None},
        {} if base is None else {base["name"]: value(base)},
    )


def lines_of(cases: Sequence[Case]) -> list[tuple[str, str | None]]:
    """The lines of these cases, each format's together, below its name where they have words of their own."""
    found = dict.fromkeys(case.line for case in cases)
    lines: list[tuple[str, str | None]] = []
    for form in dict.fromkeys(form for form, _ in found):
        of_form = [line for line in found if line[0] == form]
        lines += of_form if form == "" or of_form == [(form, "")] else [(form, None), *of_form]
    return lines


def by_time(results: dict[str, Any]) -> bool:
    """Whether ceilings say little, since most of the time is spent on waiting."""
    return results["benchmark"] == "gptq"


def measure(results: dict[str, Any]) -> str:
    """What is drawn."""
    return "time" if by_time(results) else "speed, as a share of the ceiling"


def unit(results: dict[str, Any]) -> str:
    """What the axis counts."""
    if by_time(results):
        return "logarithmic, less is better"
    if any(row["flops"] for row in results["rows"]):
        return "1 is what the measured copy and product allow"
    return f"1 is the ceiling: {headlines(results)[-1].removeprefix('ceilings: ').partition(', ')[0]}"


def seed(results: dict[str, Any]) -> str:
    """What a heading says of shapes that nobody chose."""
    return "" if results["shapes_seed"] is None else f", shapes drawn by seed {results['shapes_seed']}"


def timed(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of which lowbit has a time; if it has none of any, those of which the baseline has one."""
    role = "candidate" if any(fastest(row, "candidate") for row in results["rows"]) else "baseline"
    return [row for row in results["rows"] if fastest(row, role) is not None]


def subject(row: dict[str, Any]) -> dict[str, Any]:
    """What a case is about: lowbit, or the baseline where lowbit has nothing yet."""
    found = fastest(row, "candidate") or fastest(row, "baseline")
    assert found is not None
    return found


def fastest(row: dict[str, Any], role: str) -> dict[str, Any] | None:
    """The fastest contender of that role, if any was timed."""
    found = [each for each in row["contenders"] if each["role"] == role and "seconds" in each]
    return min(found, key=lambda each: each["seconds"], default=None)
