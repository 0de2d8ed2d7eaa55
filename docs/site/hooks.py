"""Brings to the site README.md, CONTRIBUTING.md, docs/*.md, and every file that these and what they link to link to.

Each keeps its path, so links lead where they lead in the repository, and --strict says which do not. The README of a
distribution is its page of the reference: what its docstrings say follows.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)")
# Public modules besides what a distribution is imported as.
MODULES = {
    "lowbit-core": ("backends", "bench", "blocked", "conventions", "hadamard", "observer", "packing", "testing"),
    "lowbit-kernels-cuda": ("backend",),
    "lowbit-kernels-x86": ("backend",),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and what they link to, under their paths in the repository."""
    pages = {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")}
    readmes = {source.parent / "README.md" for source in (*ROOT.glob("packages/*/src"), *ROOT.glob("kernels/*/src"))}
    found, fresh = set[Path](), pages | readmes
    while fresh:
        found |= fresh
        texts = {path: path.read_text("utf-8") for path in fresh if path.suffix == ".md"}
        linked = {(path.parent / link).resolve() for path, text in texts.items() for link in LINK.findall(text)}
        fresh = {path for path in linked - found if path.is_file() and path.is_relative_to(ROOT)}
    for path in sorted(found - readmes):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=f"{path}"))
    for path in sorted(readmes):
        text = f"{path.read_text('utf-8')}\n{reference(path.parent)}"
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), content=text))
    return files


def reference(distribution: Path) -> str:
    """What mkdocstrings makes a distribution's reference of."""
    (package,) = (distribution / "src").iterdir()
    asked = [f"::: {package.name}"]
    tree = ast.parse((package / "__init__.py").read_text("utf-8"))
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    # Functions in modules of their own names, which is what mkdocstrings takes these names for.
    shadowed = sorted(named & {module.stem for module in package.glob("*.py")})
    option = "\n    options:\n      heading: "
    asked += [f"::: {package.name}.{name}.{name}{option}{package.name}.{name}" for name in shadowed]
    asked += [f"::: {package.name}.{module}" for module in MODULES.get(distribution.name, ())]
    return "\n\n".join(asked)
