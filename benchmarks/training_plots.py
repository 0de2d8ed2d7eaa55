"""Draw for docs/training.md how far models got by each recipe, from benchmarks/training-*.json of training.py.

    python benchmarks/training_plots.py

Left the validation loss of every run, right what recipes lose to the mean of the runs in bfloat16, by tokens. The
drawings are the same bytes from the same results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from performance_plots import BASELINE, MARGIN, RULE, STYLE, WIDTH

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
HEIGHT, TOP, BOTTOM = 180, 70, 40
# Panels from left to right, with room before each for its numbers, and after the last for what is asked.
LEFT, RIGHT, EACH = 30, 219, 149
# Colours of Okabe and Ito that thin lines can have on white; marks for who tells them apart by nothing else.
LOOKS = [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P")]
SEEDS = ["-", "--", ":", "-."]
RANGE = "#d9d9d9"
# Percent, by bits.
ASKED = {8: 0.5, 4: 1.5}


def main() -> None:
    """Write all drawings anew."""
    for old in IMAGES.glob("training-*.svg"):
        old.unlink()
    for name, image in images(sorted(ROOT.glob("benchmarks/training-*.json"))).items():
        (IMAGES / name).write_text(image, encoding="utf-8")


def images(files: Sequence[Path]) -> dict[str, str]:
    """The drawings of these files, by name."""
    return {f"{file.stem}.svg": plot(json.loads(file.read_text(encoding="utf-8"))) for file in files}


def plot(results: dict[str, Any]) -> str:
    """Two panels below a legend."""
    runs = results["runs"]
    styles = styles_of(runs)
    legend: list[Any] = [Line2D([], [], **style) for style in styles]
    legend.append(Patch(facecolor=RANGE, label="range of BF16's seeds"))
    rows = -(-len(legend) // 3)
    height = TOP + 15 * rows + HEIGHT + BOTTOM
    with rc_context(STYLE):
        figure = Figure((WIDTH / 72, height / 72), facecolor="white")

        def write(x: float, y: float, text: str, **style: Any) -> None:
            figure.text(x / WIDTH, y / height, text, va="center", **style)

        each = results["tokens"] // results["steps"]
        write(MARGIN, height - 14, f"training, {results['model']}: validation loss by tokens", weight="bold")
        write(MARGIN, height - 29, f"{results['device']}, {results['date']}, {results['steps']} steps of {each} tokens")
        place = (0, (height - 36) / height)
        figure.legend(handles=legend, loc="upper left", bbox_to_anchor=place, ncols=3, frameon=False, labelspacing=0.3)
        panels = [(LEFT, "mean loss, nats"), (RIGHT, "difference to the mean of BF16, %")]
        for x, title in panels:
            write(x, BOTTOM + HEIGHT + 12, title)
        left, right = (figure.add_axes((x / WIDTH, BOTTOM / height, EACH / WIDTH, HEIGHT / height)) for x, _ in panels)
        write(RIGHT + EACH, 12, "millions of tokens", ha="right")
        losses(left, results, styles)
        differences(right, results, styles)
        for axes in (left, right):
            frame(axes, results)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def styles_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How each run is drawn: a colour and a mark for its recipe, bfloat16 black, and dashes for further seeds."""
    looks = dict(zip(dict.fromkeys(run["recipe"] for run in runs if run["recipe"] != "BF16"), cycle(LOOKS)))
    looks["BF16"] = (BASELINE, "")
    styles, seen = [], []
    for run in runs:
        name = run["recipe"]
        (colour, mark), alone = looks[name], sum(other["recipe"] == name for other in runs) == 1
        styles.append(
            {
                "color": colour,
                "marker": mark,
                "markersize": 3.5,
                "linewidth": 1.2,
                "linestyle": SEEDS[seen.count(name) % len(SEEDS)],
                "label": name if alone else f"{name}, seed {run['seed']}",
            }
        )
        seen.append(name)
    return styles


def losses(axes: Axes, results: dict[str, Any], styles: Sequence[dict[str, Any]]) -> None:
    """Every run, bfloat16 above the others."""
    for run, style in zip(results["runs"], styles, strict=True):
        tokens, found = curve(run, results)
        axes.plot(tokens, found, **style, zorder=3 if run["recipe"] == "BF16" else 2)


def differences(axes: Axes, results: dict[str, Any], styles: Sequence[dict[str, Any]]) -> None:
    """What recipes lose to bfloat16, behind them the range of its seeds, and lines for what is asked."""
    plain = [curve(run, results)[1] for run in results["runs"] if run["recipe"] == "BF16"]
    means = [sum(found) / len(found) for found in zip(*plain, strict=True)]
    seeds = list(zip(*([percent(*pair) for pair in zip(found, means, strict=True)] for found in plain), strict=True))
    tokens, _ = curve(results["runs"][0], results)
    axes.fill_between(tokens, list(map(min, seeds)), list(map(max, seeds)), color=RANGE, linewidth=0)
    axes.axhline(0, color=BASELINE, linewidth=0.8)
    for run, style in zip(results["runs"], styles, strict=True):
        if run["recipe"] != "BF16":
            tokens, found = curve(run, results)
            axes.plot(tokens, list(map(percent, found, means)), **style)
    for bits, most in ASKED.items():
        axes.axhline(most, color=BASELINE, linewidth=0.8, linestyle=":")
        # Beside the panel, where nothing is drawn.
        axes.annotate(
            f"asked of\n{bits} bits",
            (1, most),
            (4, 0),
            ("axes fraction", "data"),
            textcoords="offset points",
            va="center",
        )
    # Room for the upper words.
    axes.set_ylim(top=max(axes.get_ylim()[1], max(ASKED.values()) + 0.4))


def curve(run: dict[str, Any], results: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Millions of tokens, and the loss after so many."""
    each = results["tokens"] / results["steps"] / 1e6
    return [step * each for step, _ in run["losses"]], [loss for _, loss in run["losses"]]


def percent(loss: float, mean: float) -> float:
    """How much more a loss is than the mean."""
    return 100 * (loss / mean - 1)


def frame(axes: Axes, results: dict[str, Any]) -> None:
    """Rules behind the lines, and all tokens from left to right."""
    axes.set_xlim(0, 1.03 * results["tokens"] / 1e6)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=True, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
