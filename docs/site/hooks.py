"""Brings to the site README.md, CONTRIBUTING.md, docs/*.md, and every file that these link to.

Each keeps its path, so links lead where they lead in the repository, and --strict says which do not.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and what they link to, under their paths in the repository."""
    pages = {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")}
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    for path in sorted(pages | {each for each in linked if each.is_file() and each.is_relative_to(ROOT)}):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=f"{path}"))
    return files
