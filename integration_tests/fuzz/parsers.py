"""What reads a text, a record or an argument that somebody gives, beside the files of a checkpoint (`hostile.py`).

Each target takes bytes and folders that it may write into; whatever it raises is a fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import typer
from safetensors.torch import save_file
from torch import ones

import lowbit
from lowbit import command
from lowbit.bench import command as bench
from lowbit.bench import compare, plot
from lowbit.bench.case import Use
from lowbit.errors import LowbitError
from lowbit.report import Report
from lowbit.staging import Staging
from lowbit_algos import Method
from lowbit_hf.commands.options import bytes_of, rule_of
from lowbit_hf.lint.gpus import capability_of
from lowbit_hf.release.card import front_of, speeds_of
from lowbit_hf.schemes import scheme, scheme_of_spec
from lowbit_hf.texts import _documents
from lowbit_moe import TrainRecipe

# Each with whether the value's text reads back as the value.
_SPECS: tuple[tuple[Callable[[str], object], bool], ...] = (
    (lowbit.Format.parse, True),
    (lowbit.Activation.parse, True),
    (lowbit.Scheme.parse, True),
    (Use.parse, False),
    (TrainRecipe.parse, False),
    (Method.of, False),
    (scheme, False),
    (scheme_of_spec, False),
    (rule_of, False),
    (capability_of, False),
    (bytes_of, False),
    (lambda text: bench._shape(text, "mnk"), False),
    (bench._device, False),
)


def spec(data: bytes, _: Mapping[str, Path]) -> None:
    """Formats, activations, schemes, algorithms, sizes, shapes, devices."""
    text = data.decode(errors="replace")
    for parse, reads_back in _SPECS:
        with suppress(LowbitError, typer.BadParameter):
            found = parse(text)
            assert not reads_back or parse(str(found)) == found, (parse, text)


def recipe(data: bytes, _: Mapping[str, Path]) -> None:
    """A recipe, and which rule is for a parameter."""
    with suppress(LowbitError):
        found = lowbit.Recipe.from_json(data.decode(errors="replace"))
        assert lowbit.Recipe.from_json(found.to_json()) == found
        if not any(rule.match.startswith("re:") for rule in found.rules):
            found.resolve("model.layers.0.mlp.down_proj.weight", ["Linear"])


def report(data: bytes, _: Mapping[str, Path]) -> None:
    """A report, and its page."""
    with suppress(LowbitError):
        found = Report.from_json(data.decode(errors="replace"))
        Report.from_json(found.to_json())
        found.to_html()


def results(data: bytes, folders: Mapping[str, Path]) -> None:
    """Results of benchmarks: their table, their page, and compared with themselves."""
    path, out = folders["plain"] / "results.json", folders["plain"] / "results.html"
    path.write_bytes(data)
    with suppress(SystemExit), _silent():
        plot.main([str(path), "--out", str(out)])
    with suppress(SystemExit), _silent():
        compare.main([str(path), str(path)])


def journal(data: bytes, folders: Mapping[str, Path]) -> None:
    """What a run that was killed left, whose output is then made."""
    out = folders["plain"] / "out"
    staged = out.with_name(".out.partial")
    (staged / "files").mkdir(parents=True, exist_ok=True)
    (staged / "files" / "x.safetensors").write_bytes(b"\0" * 200)
    (staged / "journal.jsonl").write_bytes(data)
    tensors, value = [("a", lowbit.FP8_ROW.scale.storage, (2, 3))], ones(2, 3)
    for overwrite in (False, True):
        with suppress(LowbitError), Staging.open(out, fingerprint="f", overwrite=overwrite) as staging:
            if not staging.published:
                staging.plan_file("x.safetensors", tensors, {}).write("a", value)
                staging.done("a")
                staging.publish()


def stored(data: bytes, folders: Mapping[str, Path]) -> None:
    """What a file of `lowbit.save` says of its tensors."""
    path = folders["plain"] / "own.safetensors"
    made = lowbit.quantize(ones(4, 32), "INT4_G32")
    parts = {f"a.{name}": part for name, part in made.inner_tensors().items()}
    save_file(parts | {"b": ones(2)}, path, {"lowbit": data.decode(errors="replace")})
    with suppress(LowbitError):
        for tensor in lowbit.load(path).values():
            if isinstance(tensor, lowbit.QuantizedTensor):
                tensor.dequantize()


def documents(data: bytes, folders: Mapping[str, Path]) -> None:
    """Text to calibrate on, of every kind."""
    for name in ("text.txt", "text.jsonl", "text.parquet"):
        path = folders["plain"] / name
        path.write_bytes(data)
        with suppress(LowbitError):
            assert all(isinstance(text, str) for text in _documents(path))


def speeds(data: bytes, folders: Mapping[str, Path]) -> None:
    """What `vllm bench` saved, and a model card."""
    for name, read in (("serve.json", speeds_of), ("README.md", lambda path: front_of(path.parent))):
        path = folders["plain"] / name
        path.write_bytes(data)
        with suppress(LowbitError):
            read(path)


def arguments(data: bytes, folders: Mapping[str, Path]) -> None:
    """A command line, a word a line: it is refused, asks for help, or names no model that there is."""
    words = data.decode(errors="replace").split("\n")
    here, ran = Path.cwd(), bench._run
    empty = folders["plain"] / "empty"
    empty.mkdir(exist_ok=True)
    os.chdir(empty)
    bench._run = lambda *_: 0
    try:
        with suppress(SystemExit), _silent():
            assert command.main(words) in (0, 1, 2)
    finally:
        bench._run = ran
        os.chdir(here)


class _silent(redirect_stdout):  # noqa: N801 - as contextlib's
    def __init__(self) -> None:
        self._nowhere = Path(os.devnull).open("w")  # noqa: SIM115
        super().__init__(self._nowhere)
        self._other = redirect_stderr(self._nowhere)

    def __enter__(self) -> object:
        self._other.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._other.__exit__(*error)
        self._nowhere.close()


TARGETS = {
    each.__name__: each for each in (spec, recipe, report, results, journal, stored, documents, speeds, arguments)
}
