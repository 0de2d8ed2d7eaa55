"""`lowbit bench llama3`: a whole model by 8-bit attention, and by low-bit linear layers beside that; its options.

What is measured is in `lowbit_hf.llama3`, which needs transformers, and is imported when it runs.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lowbit.bench import Benchmark, Case, Dim, Given
from lowbit.errors import LowbitError


def _cases(given: Given) -> Iterator[Case]:
    if find_spec("transformers") is None:
        msg = "lowbit bench llama3 needs transformers, which is not installed; pip install 'transformers>=5.17,<6'"
        raise LowbitError(msg)
    from lowbit_hf.llama3 import cases  # noqa: PLC0415 - imports transformers, which may be absent

    yield from cases(given)


def _options(parser: ArgumentParser) -> None:
    own = parser.add_argument_group("of llama3")
    own.add_argument("--attention", default="INT8_FP8", metavar="SCHEME,...", help="schemes of attention (INT8_FP8)")
    own.add_argument("--layers", type=int, default=32, metavar="N", help="of the random model (32)")
    own.add_argument("--tiny", action="store_true", help="a narrow random model, to try it")
    told = "a checkpoint in place of the random model: perplexity, too, all lengths in codes"
    own.add_argument("--model", type=Path, metavar="FOLDER", help=told)
    own.add_argument("--text", type=Path, metavar="FILE", help="for --model; default: the text of lowbit eval")
    own.add_argument("--tokens", type=int, metavar="N", help="use only the text's first N tokens")


benchmark = Benchmark(
    about="prefill and decode of Llama-3-8B by 8-bit attention, alone and with low-bit linear layers",
    dims=(Dim("S", 128, 32768, 512),),
    formats=("FP8_ROW/FP8_ROW", "FP8_128x128/FP8_1X128", "INT8_ROW/INT8_ROW", "INT4_G128"),
    usual=lambda device: [(2**i,) for i in (range(10, 16) if device == "cuda" else (7,))],
    quantized=lambda _: [],
    cases=_cases,
    inputs=True,
    options=_options,
)
