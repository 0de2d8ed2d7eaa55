"""`lowbit bench plot FILE...`: a page of what was measured before."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowbit.bench.outcomes import read_run
from lowbit.bench.page import check_place, render, write
from lowbit.command import DONE
from lowbit.errors import LowbitError


def main(argv: list[str]) -> int:
    """Draw files of `lowbit bench NAME --json FILE`: speedups by size, accuracy, rooflines, on one page of HTML."""
    parser = argparse.ArgumentParser("lowbit bench plot", description=main.__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results, as --json wrote them")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the page goes")
    options = parser.parse_args(argv)
    try:
        check_place(options.out, "--out", options.files)
        page = render([read_run(file) for file in options.files])
    except LowbitError as error:
        parser.error(str(error))
    write(page, options.out)
    sys.stdout.write(f"{options.out}\n")
    return DONE
