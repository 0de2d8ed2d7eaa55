r"""Whatever an operator is given, it gives what it should or refuses: nothing is read or written that is not there.

`LOWBIT_EXAMPLES=10000 pytest kernels/lowbit-kernels-x86/tests/test_fuzz.py` draws that many, other ones each time. Under
AddressSanitizer, which sees every access:

    CXX="g++ -fsanitize=address" uv pip install --no-deps -e kernels/lowbit-kernels-x86
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
        LOWBIT_EXAMPLES=10000 pytest -n 0 kernels/lowbit-kernels-x86/tests/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.format import Format
from lowbit_kernels_x86 import library, weights

pytestmark = pytest.mark.skipif(not library.FILE.exists(), reason="there is no library for this processor or system")
EXAMPLES = os.environ.get("LOWBIT_EXAMPLES")
ELEMENTS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)]
ELEMENTS += ["e2m1", "e2m3", "e3m2", "e4m3fn", "e5m2"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16)


def drawn_format(draw):
    """A format with scales of one row, and a length that it divides."""
    element, columns = draw.choice(ELEMENTS), draw.choice([1, 3, 8, 16, 24, 32, 48, 64, 128, "*"])
    scale = draw.choice(["float32", "bfloat16", "float16", "e8m0", "e4m3fn"])
    zero = f":zero={element}" if "int" in element and scale != "e8m0" and draw.random() < 0.5 else ""
    tensor = ":tensor" if scale == "e4m3fn" and not zero and draw.random() < 0.5 else ""
    k = draw.randrange(1, 150) if columns == "*" else columns * draw.randrange(1, 5)
    return f"{element}:1x{columns}:{scale}{zero}{tensor}", k


def spoiled(draw, arguments):
    """The arguments with one of them made what it should not be."""
    arguments = list(arguments)
    at = draw.randrange(len(arguments))
    given = arguments[at]
    if isinstance(given, torch.Tensor):
        whole = given.clone()
        wrong = [whole.to(draw.choice(OTHERS)), whole[..., : whole.shape[-1] - 1].contiguous(), whole[..., ::2]]
        wrong += [whole[:0], whole.flatten()[:1], whole[None], torch.empty_like(whole, device="meta"), None]
        wrong.append(whole.view(torch.uint8).fill_(255).view(whole.dtype))  # ids and offsets that are nowhere, NaN
        arguments[at] = draw.choice([*wrong, whole.t()] if whole.dim() == 2 else wrong)
    elif isinstance(given, str):
        arguments[at] = draw.choice(["", "int4", "int4:1x32", given + ":x", given[1:], "sum", drawn_format(draw)[0]])
    elif isinstance(given, int):
        arguments[at] = draw.choice([-1, 0, 1, given + 1, given * 2, 2**40, -(2**63)])
    else:
        arguments[at] = torch.ones(3)
    return arguments


def calls(draw):
    """An operator and its arguments, right ones."""
    spec, k = drawn_format(draw)
    rows, ops, dtype = draw.randrange(1, 40), torch.ops.lowbit_x86, draw.choice(DTYPES)
    x = torch.randn(rows, k, dtype=dtype)
    q = lowbit.quantize(x, spec)
    kind = draw.choice(["quantize", "dequantize", "embedding", "embedding_bag", "linear"])
    if kind == "quantize":
        parts = [None if part is None else part.clone() for part in q.stored]
        chooses = draw.random() < 0.5, parts[3] is not None and draw.random() < 0.5
        return ops.quantize, (x, *parts, spec, "even", *chooses, draw.choice([None, 5]))
    if kind == "dequantize":
        return ops.dequantize, (*q.stored, spec, k, dtype)
    ids = torch.randint(rows, (draw.randrange(30),), dtype=draw.choice([torch.int32, torch.int64]))
    if kind == "embedding":
        return ops.embedding, (ids, *q.stored, spec, k, dtype)
    if kind == "embedding_bag":
        offsets = torch.randint(0, len(ids) + 1, (draw.randrange(1, 9),)).sort().values
        offsets[0] = 0
        mode = draw.choice(["sum", "mean", "max"])
        by = torch.rand(len(ids)) if mode == "sum" and draw.random() < 0.5 else None
        padding = draw.choice([-1, 0, rows])
        return ops.embedding_bag, (ids, offsets, by, *q.stored, mode, padding, draw.random() < 0.5, spec, k, dtype)
    fmt = Format.parse(spec)
    if fmt.block[-1] % 16:
        return calls(draw)
    packed = dict(zip(q.inner_tensors(), weights.pack(q), strict=True))
    parts = [packed.get(name) for name in ("qdata", "scale", "zero", "tensor_scale")]
    rounds = fmt.element.kind == "int" and 8 % fmt.element.bits == 0 and fmt.block[-1] % 32 == 0
    activation = draw.choice(["", *["dynamic:int8:1x*:float32", "dynamic:int8:1x*:float32:zero=int8"] * rounds])
    tokens = torch.randn(draw.choice([0, 1, 2, 5, 20]), k, dtype=dtype)
    return ops.linear, (tokens, *parts, None, None, None, spec, rows, activation)


@settings(
    max_examples=int(EXAMPLES or 300),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.integers(0, 1 << 32).map(random.Random))
def test_arguments_are_taken_or_refused(draw):
    torch.manual_seed(draw.randrange(1 << 31))
    run, arguments = calls(draw)
    if draw.random() < 0.5:
        run(*arguments)
        return
    # What is wrong may still do, as one row fewer; else it is refused in words.
    with contextlib.suppress(RuntimeError, NotImplementedError, TypeError, ValueError):
        run(*spoiled(draw, arguments))


ALONE = """
import runpy, sys
from lowbit_kernels_x86.backend import backend

if backend.probe() is None:
    runpy.run_path(sys.argv[1])["test_arguments_are_taken_or_refused"]()
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_so_do_older_processors(isa):
    """Their sums of bags are another text than those of vectors of 512 bits."""
    environment = {**os.environ, "LOWBIT_X86_ISA": isa}
    done = subprocess.run([sys.executable, "-c", ALONE, __file__], check=False, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
