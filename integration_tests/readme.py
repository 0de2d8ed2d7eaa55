"""Do as README.md and docs/quickstart.md say, line by line, as one who finds them: in a new clone and a new environment.

`python integration_tests/readme.py`, or `nox -s readme`. What is not committed is not in the clone. The first command that
fails ends it. Code in Python runs at the end of its page, in one program; blocks that name a file are written to it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/quickstart.md")
BLOCK = re.compile(r"^```(bash|console|python)\n((?:.*\n)*?)```$", re.MULTILINE)
FILE = re.compile(r"# ([\w.-]+\.py)\n")
# Tests have sessions of their own, and are not all run here.
TESTS = re.compile(r"uv run pytest$", re.MULTILINE)
# What tells a program where things are that a stranger does not have.
FOREIGN = ("LOWBIT_", "PYTHON", "VIRTUAL_ENV", "UV_PROJECT", "NOX_")


def script(page, clone):
    """The commands of a page, each shown before it runs; its Python becomes files in the clone."""
    lines, program = [], ""
    for language, text in BLOCK.findall((clone / page).read_text(encoding="utf-8")):
        if language != "python":
            lines += commands(text, language)
        elif file := FILE.match(text):
            (clone / file[1]).write_text(text, encoding="utf-8")
        else:
            program += text
    name = f"{Path(page).stem.lower()}_page.py"
    (clone / name).write_text(program, encoding="utf-8")
    return "\n".join(f"echo {shlex.quote(f'$ {line}')}\n{line}" for line in [*lines, f"python {name}"])


def commands(text, language):
    """The lines of a block that are commands."""
    lines = TESTS.sub("uv run pytest --collect-only -qq", text.replace("\\\n", " ")).splitlines()
    if language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip()]


def main():
    with tempfile.TemporaryDirectory(prefix="lowbit-readme-") as folder:
        clone, environment = Path(folder) / "lowbit", Path(folder) / "environment"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        venv.create(environment, with_pip=True)
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        path = [f"{environment / 'bin'}", *(each for each in own["PATH"].split(os.pathsep) if "/.nox/" not in each)]
        own |= {"PATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        for page in PAGES:
            shell = ["bash", "-euo", "pipefail", "-c", script(page, clone)]
            done = subprocess.run(shell, cwd=clone, env=own, check=False)
            if done.returncode:
                sys.exit(f"{page}: the last command above leaves with {done.returncode}")


if __name__ == "__main__":
    main()
