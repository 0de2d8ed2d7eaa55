"""The compiled library, loaded when this module is imported, and what its operators give without running."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("lowbit_x86.so")
"""The library: all that a process needs of this distribution, to run programs that call its operators."""


def isa() -> str:
    """The instruction set whose kernels run here: scalar, avx2, avx512, avx512_vnni, avx512_bf16 or amx.

    Raises:
        RuntimeError: LOWBIT_X86_ISA names none, or one that this machine lacks.
    """
    return torch.ops.lowbit_x86.isa()


def contiguous(args: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors of an operator as all of them are needed, contiguous."""
    return [None if arg is None else arg.contiguous() for arg in args]


def _linear(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[8])


def _embedding(ids: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    return qdata.new_empty((*ids.shape, rest[-2]), dtype=rest[-1])


def _embedding_bag(ids: Tensor, offsets: Tensor, weights: Tensor | None, qdata: Tensor, *rest: Any) -> Tensor:
    del ids, weights
    return qdata.new_empty((offsets.shape[0] - (1 if rest[-4] else 0), rest[-2]), dtype=rest[-1])


def _dequantize(qdata: Tensor, *rest: Any) -> Tensor:
    return qdata.new_empty((*qdata.shape[:-1], rest[-2]), dtype=rest[-1])


def _quantize(*args: Any) -> None:
    del args


if FILE.exists():
    torch.ops.load_library(FILE)
    for _fake in (_linear, _embedding, _embedding_bag, _dequantize, _quantize):
        torch.library.register_fake(f"lowbit_x86::{_fake.__name__[1:]}", _fake)
