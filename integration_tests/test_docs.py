"""The documentation holds: code runs, commands succeed, tables say what the code says, links lead somewhere."""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

import lowbit
from lowbit import backends, command
from lowbit.numerics import ScaleMode
from lowbit.testing import only_backends
from lowbit_hf.schemes import SCHEMES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")]
LANGUAGES = {"python", "bash", "console", "json", "toml", "text"}
FENCE = re.compile(r"^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)
# A block whose first line is a file's name is that file.
FILE = re.compile(r"# ([\w.-]+\.(?:py|toml))\n")
SHOWN = re.compile(r"# ->(?: (.*))?$")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    # Lines before the text.
    line: int


def blocks(page):
    text = page.read_text()
    return [Block(m["language"], m["text"], text.count("\n", 0, m.start("text"))) for m in FENCE.finditer(text)]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_runs(page, tmp_path, monkeypatch):
    for folder in ("docs", "integration_tests", "packages"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = ModuleType("documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backends.forget()
    before = set(sys.modules)
    # Pages show what the reference gives, whatever kernels for a machine's processor are installed.
    try:
        with only_backends("reference", "demo", "cuda", "flashinfer"):
            for block in blocks(page):
                run_block(block, page, vars(module))
    finally:
        # Backends and modules that the page wrote end with it.
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]
        monkeypatch.undo()
        backends.forget()


def run_block(block, page, namespace):
    where = f"{name_of(page)}:{block.line}"
    assert block.language in LANGUAGES, f"{where}: a block is one of {LANGUAGES}"
    if file := FILE.match(block.text):
        Path(file[1]).write_text(block.text)
    elif block.language == "python":
        run_python(block, page, namespace)
    elif block.language in {"bash", "console"}:
        run_shell(block, where)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)


# Python: every statement runs; what `# ->` shows after one is its value, or what it printed.


def run_python(block, page, namespace):
    tree, lines, checked = ast.parse(block.text), block.text.splitlines(), 0
    for statement in tree.body:
        end = statement.end_lineno
        printed = io.StringIO()
        with redirect_stdout(printed):
            value = run_statement(ast.increment_lineno(statement, block.line), str(page), namespace)
        if shown := shown_after(lines, end):
            checked += len(shown)
            results = [
                [line.rstrip() for line in text.splitlines()] for text in (printed.getvalue(), repr(value), str(value))
            ]
            assert shown in results, f"{name_of(page)}:{block.line + end} shows {shown}, but gives {results}"
    assert checked == sum(SHOWN.search(line) is not None for line in lines), (
        f"{name_of(page)}:{block.line}: unchecked # ->"
    )


def run_statement(statement, file, namespace):
    if isinstance(statement, ast.Expr):
        return eval(compile(ast.Expression(statement.value), file, "eval"), namespace)
    exec(compile(ast.Module([statement], []), file, "exec"), namespace)
    return None


def shown_after(lines, end):
    """What the comment at the end of line `end` (counted from 1), and those alone on the lines after it, show."""
    matches = [match] if (match := SHOWN.search(lines[end - 1])) else []
    matches += itertools.takewhile(bool, map(SHOWN.fullmatch, lines[end:]))
    return [(match[1] or "").rstrip() for match in matches]


# Shell: every line succeeds. In a console block, lines after a `$ command` are found in its output, spaces apart; `...`
# stands for digits that depend on the machine.


def run_shell(block, where):
    output = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            pattern = r"\d*".join(re.escape(part) for part in " ".join(line.split()).split("..."))
            assert re.search(pattern, " ".join(output.split())), f"{where}: no {line!r} in the output:\n{output}"
        elif line.strip() and not line.startswith("#"):
            output = "".join(run_command(part) for part in line.removeprefix("$ ").split(" && "))


def run_command(line):
    words = shlex.split(line, comments=True)
    for start, check in CHECKED.items():
        if words[: len(start)] == list(start):
            check(words[len(start) :])
            return ""
    words = words[2:] if words[:2] == ["uv", "run"] else words
    return run_lowbit(words[1:]) if words[0] == "lowbit" else run_in_shell(line.strip())


def run_lowbit(arguments):
    """Run what the `lowbit` script runs, in this process: to import transformers takes longer than most of the work.

    What evaluates models is cut to fewer tokens than the 300 kB of text that come with lowbit, what calibrates to fewer
    samples.
    """
    if arguments[0] in {"compare", "eval", "verify"} and not {"--tokens", "--help"} & set(arguments):
        arguments = [*arguments, "--tokens", "1024"]
    arguments = ["4" if before == "--samples" else each for before, each in pairwise(["", *arguments])]
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", ["lowbit", *arguments])
        code = command.main()
    assert code == 0, f"lowbit {shlex.join(arguments)} leaves with {code}:\n{output.getvalue()}"
    return output.getvalue()


def run_in_shell(line):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        check=False,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{line} leaves with {done.returncode}:\n{done.stdout}"
    return done.stdout


# Commands that install, or that run the tests these are part of: what they name must exist.


def check_packages(words):
    if words == ["-e", "."]:
        install_here()
        return
    known = {"uv"}
    for path in ROOT.glob("*/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        known |= {
            project["name"],
            *(f"{project['name']}[{extra}]" for extra in project.get("optional-dependencies", ())),
        }
    assert set(words) <= known


def check_paths(words):
    paths = [word.partition("::")[0] for word in words if "/" in word]
    assert all((ROOT / path).exists() for path in paths), paths


def check_session(words):
    _, name = words
    assert f"def {name.partition('(')[0].replace('-', '_')}(session" in (ROOT / "noxfile.py").read_text(), name


CHECKED = {
    ("pip", "install"): check_packages,
    ("uv", "sync"): check_paths,
    ("source", ".venv/bin/activate"): check_paths,
    ("uv", "run", "pytest"): check_paths,
    ("uv", "run", "nox"): check_session,
    ("uv", "run", "ruff"): check_paths,
    ("uv", "run", "basedpyright"): check_paths,
    ("uv", "run", "lint-imports"): check_paths,
    ("uv", "run", "zizmor"): check_paths,
    ("uv", "run", "vulture"): check_paths,
}


def install_here():
    """Give the project in the current folder what an editable install gives it: metadata on the path."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    folder = Path(f"{name.replace('-', '_')}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    backends.forget()


# Completeness: what the code has, the documentation has, and says the same of it.


def table(page, first):
    """Rows of the one table of `page` whose first column is headed `first`, as dicts without backticks."""
    lines = (ROOT / page).read_text().splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]


def test_every_format_is_specified():
    documented = {row["format"]: (row["spec"], row["bits"]) for row in table("docs/formats.md", "format")}
    named = {name: value for name, value in vars(lowbit).items() if isinstance(value, lowbit.Format)}
    assert {name.upper() for name in named} == set(lowbit.FORMATS)
    assert documented == {name: (str(fmt), f"{fmt.bits_per_element((4096, 4096)):.3f}") for name, fmt in named.items()}


def test_every_element_is_specified():
    rows = {row["element"]: row for row in table("docs/formats.md", "element")}
    assert list(rows) == list(lowbit.ELEMENTS)
    for name, element in lowbit.ELEMENTS.items():
        row = rows[name]
        fields = f"{element.exponent}, {element.mantissa}, {element.bias}" if element.kind == "float" else ""
        assert (row["bits"], row["exponent, mantissa, bias"]) == (str(element.bits), fields), name
        numbers = {part: eval(row[part].replace("^", "**")) for part in ("least", "greatest", "smallest above 0")}
        assert numbers == {"least": element.min, "greatest": element.max, "smallest above 0": element.smallest}, name
        assert row["NaN"].startswith("none") != element.has_nan, name


def test_every_scale_mode_is_specified():
    assert [row["mode"] for row in table("docs/formats.md", "mode")] == list(get_args(ScaleMode))


def test_every_op_is_described():
    page = " ".join((ROOT / "docs/ops.md").read_text().split())
    for name in lowbit.ops._SCHEMAS:
        assert str(getattr(torch.ops.lowbit, name).default._schema) in page, name


def test_every_scheme_is_described():
    documented = {row.pop("scheme"): row for row in table("docs/checkpoints.md", "scheme")}
    assert documented == {
        name: {
            "bits": f"{entry.bits_per_weight:.3f}",
            "weights": str(entry.weight),
            "inputs": "" if entry.activation is None else str(entry.activation),
            "file format": entry.file_format,
            "needs calibration": "yes" if entry.needs_data else "",
        }
        for name, entry in SCHEMES.items()
    }


def test_every_command_is_shown():
    shown = {word for page in PAGES for word in re.findall(r"\blowbit (\w+)", page.read_text())}
    assert {point.name for point in entry_points(group=command.GROUP)} <= shown


def test_every_module_is_in_the_design():
    parts = (ROOT / "docs/design.md").read_text().partition("## The parts")[2].partition("\n## ")[0]
    for part in re.split(r"\n(?=`lowbit-)", parts)[1:]:
        (package,) = ROOT.glob(f"*/{re.match('`(.*?)`', part)[1]}/src/*")
        modules = {each.stem for each in package.glob("*.py")} | {
            each.parent.name for each in package.glob("*/__init__.py")
        }
        assert modules - {"__init__"} <= set(re.findall(r"`(\w+)`", part)), package.name


def test_every_error_is_named():
    text = "".join(page.read_text() for page in PAGES)
    errors = [name for name, value in vars(lowbit).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert [name for name in errors if f"`{name}`" not in text] == []


# Links and paths.


@pytest.mark.parametrize("page", [*PAGES, ROOT / "integration_tests/README.md"], ids=name_of)
def test_links_resolve(page):
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_links_every_page():
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())}
    assert {name_of(page) for page in [*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]} <= links


def test_named_files_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:docs|integration_tests|kernels|packages)/[\w./-]+)`", page.read_text()):
            assert "NAME" in path or (ROOT / path).exists(), f"{name_of(page)} names {path}"
