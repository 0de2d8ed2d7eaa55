"""The model card of a release: what it is, what it was made of and how, what it is worth, and how to serve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lowbit.errors import CheckpointError
from lowbit.report import Report
from lowbit.table import fold, size
from lowbit_hf.evaluate import Evaluation
from lowbit_hf.lint.finding import Report as Lint
from lowbit_hf.verify.checking import Verification

# Of the original's card, what holds for a copy in fewer bits too.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
# What the three kinds of `vllm bench` save, and what to call it.
# No speed is as high, and a larger whole number is no float.
_MOST = 1e15
_SPEEDS = {
    "max_concurrency": "requests at once, at most",
    "num_prompts": "requests",
    "request_throughput": "requests/s",
    "requests_per_second": "requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "input and output tokens/s",
    "tokens_per_second": "input and output tokens/s",
    "median_ttft_ms": "time to first token, median, ms",
    "p99_ttft_ms": "time to first token, 99th percentile, ms",
    "median_tpot_ms": "time for each further token, median, ms",
    "p99_tpot_ms": "time for each further token, 99th percentile, ms",
    "avg_latency": "time for a batch, mean, s",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a release is worth: the original on a text, and the release beside it."""

    text: str
    original: Evaluation
    released: Evaluation


@dataclass(frozen=True, slots=True)
class Card:
    """All that a model card tells."""

    name: str
    base: str
    # Whether the base is a repository of the hub, which the card can link to.
    linked: bool
    # The front matter of the original's own card.
    original: Mapping[str, Any]
    report: Report
    lint: Lint
    verification: Verification
    measured: Measured
    # Name, bytes and sha256 of every file that was read.
    inputs: Sequence[tuple[str, int, str]]
    # Speeds by what was measured, and by which file.
    speeds: Mapping[str, Mapping[str, float]]
    # How it was made, what it is called with, and the tokens it takes.
    command: str
    tp: int
    context: int

    def text(self) -> str:
        """The card, in Markdown with front matter."""
        report = self.report
        what = f"{self._base()} in {report.scheme}, by {report.algorithm}: {report.bits_per_weight:.4g} bits a weight"
        sizes = f"{size(report.bytes_before)} -> {size(report.bytes_after)}"
        parts = [f"---\n{self._front()}\n---", f"# {self.name}", f"{what}, {sizes}. Layout: compressed-tensors."]
        for section in (self._serving, self._quality, self._recipe, self._proof, self._inputs):
            parts += section()
        return "\n\n".join(parts) + "\n"

    def _front(self) -> str:
        kept = {key: self.original[key] for key in _KEPT if key in self.original}
        base = {"base_model": self.base, "base_model_relation": "quantized"} if self.linked else {}
        tags = ["lowbit", "compressed-tensors", *self.report.scheme.split(", ")]
        return ModelCardData(library_name="transformers", tags=tags, **base, **kept).to_yaml()

    def _base(self) -> str:
        return f"[{self.base}](https://huggingface.co/{self.base})" if self.linked else f"`{self.base}`"

    def _serving(self) -> Iterable[str]:
        yield "## Serve"
        yield _shell(serve_line(self.name, self.tp))
        for verdict in self.lint.verdicts:
            yield f"{verdict.runtime} {verdict.version}: {verdict.told()}. `lowbit lint` finds no error."
        yield "Speed, against a server that runs, and without one:"
        yield _shell(*bench_lines(self.name, self.tp, self.context))
        for source, speeds in self.speeds.items():
            yield f"Measured ({source}):"
            yield _table(("what", "value"), [(what, f"{value:,.4g}") for what, value in speeds.items()])

    def _quality(self) -> Iterable[str]:
        original, released = self.measured.original, self.measured.released
        yield "## Quality"
        yield _table(
            ("", "perplexity", "mean KL, nats a token", "top-1 agreement", "size"),
            [
                ("original", f"{original.perplexity:.4f}", "", "", size(self.report.bytes_before)),
                (
                    self.report.scheme,
                    f"{released.perplexity:.4f} ({released.perplexity / original.perplexity - 1:+.2%})",
                    f"{released.kl:.5f}",
                    f"{released.top1:.2%}",
                    size(self.report.bytes_after),
                ),
            ],
        )
        yield f"Over {released.tokens:,} tokens of {self.measured.text}, by `lowbit eval`."

    def _recipe(self) -> Iterable[str]:
        report = self.report
        yield "## Recipe"
        yield _shell(self.command)
        told = {"scheme": report.scheme, "algorithm": report.algorithm}
        told |= {f"calibration: {key}": value for key, value in report.calibration.items()}
        told |= {"left alone": "; ".join(f"`{name}`" for name, _ in fold([each.name for each in report.kept]))}
        yield _table(("what", "value"), [*told.items(), *report.environment.items()])
        yield "What became of every layer: [report.html](report.html), as JSON in `report.json`."

    def _proof(self) -> Iterable[str]:
        ours, theirs = self.verification.ours, self.verification.theirs
        told = [
            f"- {each.reader} reads the values that lowbit reads, of all {each.weights} quantized weights."
            if each.refused is None
            else f"- {each.reader} does not read it ({each.refused})."
            for each in self.verification.readings
        ]
        if ours is not None and theirs is not None:
            told.append(
                f"- Perplexity over {ours.tokens:,} tokens: {ours.perplexity:.4f} in lowbit, {theirs.perplexity:.4f} "
                f"in {self.verification.other}; mean KL {ours.kl:.5f} nats a token."
            )
        yield "## Checked"
        yield "\n".join(told)
        yield "`sha256sum --check SHA256SUMS` checks every file."

    def _inputs(self) -> Iterable[str]:
        yield "## Made of"
        rows = [(f"`{name}`", f"{nbytes:,}", f"`{digest}`") for name, nbytes, digest in self.inputs]
        yield _table(("file", "bytes", "sha256"), rows)


def serve_line(name: str, tp: int) -> str:
    """How to serve a release."""
    return shlex.join(["vllm", "serve", name, *_parallel(tp)])


def bench_lines(name: str, tp: int, context: int) -> list[str]:
    """How to measure its speed with texts that fit its context: a server's, a batch's, and a single request's.

    Source: `vllm bench serve --help`, `throughput` and `latency`.
    """
    after = min(context // 4, 256)
    before = min(context - after - 1, 1024)
    sizes = ["--input-len", str(before), "--output-len", str(after), *_parallel(tp)]
    served = ["--dataset-name", "random", "--random-input-len", str(before), "--random-output-len", str(after)]
    lines = [
        ["serve", "--model", name, *served, "--max-concurrency", "32", "--save-result", "--result-filename"],
        ["throughput", "--model", name, *sizes, "--output-json"],
        ["latency", "--model", name, *sizes, "--batch-size", "1", "--output-json"],
    ]
    return [shlex.join(["vllm", "bench", *line, f"{line[0]}.json"]) for line in lines]


def speeds_of(path: Path) -> dict[str, float]:
    """The speeds in a file that `vllm bench` saved, by what they are.

    Raises:
        CheckpointError: it cannot be read, or holds none.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    found = told if isinstance(told, dict) else {}
    read: dict[str, Any] = {what: found.get(key) for key, what in _SPEEDS.items()}
    # type(), for True is an int to isinstance.
    speeds = {what: float(speed) for what, speed in read.items() if type(speed) in (int, float) and 0 <= speed < _MOST}
    if not speeds:
        raise CheckpointError(f"{path} holds none of what `vllm bench` saves: {', '.join(_SPEEDS)}")
    return speeds


def front_of(folder: Path) -> dict[str, Any]:
    """The front matter of the model card in a folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return ModelCard(text).data.to_dict() if text.startswith("---") else {}
    except Exception as error:
        raise CheckpointError(f"the front matter of {path} cannot be read: {error}") from error


def _parallel(tp: int) -> list[str]:
    return ["--tensor-parallel-size", str(tp)] if tp > 1 else []


def _shell(*lines: str) -> str:
    return "\n".join(["```bash", *lines, "```"])


def _table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
