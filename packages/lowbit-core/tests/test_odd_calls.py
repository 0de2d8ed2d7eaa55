"""Operators called with what does not belong together: right results or a LowbitError, and the same from fakes.

`LOWBIT_EXAMPLES=100000 pytest packages/lowbit-core/tests/test_odd_calls.py` draws that many, other ones each time.
"""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowbit

_PATH = Path(__file__).with_name("test_ops.py")
_SPEC = importlib.util.spec_from_file_location("calls_of_ops", _PATH)
ops = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(ops)

EXAMPLES = os.environ.get("LOWBIT_EXAMPLES")
FORMATS = [lowbit.MXFP4, lowbit.INT4_G32, lowbit.INT8_ROW_ASYM, lowbit.FP8_ROW, lowbit.NVFP4, lowbit.FP8_128x128]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]
DTYPES += [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64]
WORDS = ["", "none", "MXFP4", "INT8_ROW", "int8:1x*:float32", "dynamic:INT8_ROW", "static:INT8_TENSOR", "floor", "max"]
WORDS += [
    "nearest",
    "stochastic",
    "mean",
    "9" * 100,
    "e2m1:1x16:e4m3fn:tensor",
    "FP8_HEAD",
    "int4:1x0:float16",
]
NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 31, 32, 33, 128, 256, 2**31, 2**40, 2**62, -(2**63)]


def bytes_of(tensor):
    """What any dtype can be moved as."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def odd_tensor(x, draw):  # noqa: C901, PLR0911 - a change a line
    dim = draw.randrange(x.dim()) if x.dim() else 0
    match draw.randrange(10):
        case 0:
            return None
        case 1:
            return x.reshape(-1)
        case 2:
            return x.unsqueeze(dim)
        case 3 if x.dim():
            return x.narrow(dim, 0, draw.choice([0, max(x.shape[dim] - 1, 0)]))
        case 4 if x.dim():
            return torch.cat([bytes_of(x)] * 2, dim).view(x.dtype)
        case 5:
            return x.float().to(draw.choice(DTYPES))
        case 6 if x.dim() > 1:
            return x.transpose(0, -1)
        case 7 if x.numel() and x.is_floating_point() and x.dtype.itemsize > 1:
            x.view(-1)[0] = draw.choice([float("nan"), float("inf"), -1e30])
        case 8 if x.numel() and not x.is_floating_point() and x.dtype.itemsize > 1:
            x.view(-1)[draw.randrange(x.numel())] = draw.choice([0, 1, 100, -1])
        case 9 if x.dim():
            return torch.repeat_interleave(bytes_of(x), 2, 0)[::2].view(x.dtype)
    return x


def odd(value, draw):  # noqa: PLR0911 - a type a line
    match value:
        case torch.Tensor():
            return odd_tensor(value, draw)
        case None:
            return draw.choice(
                [None, torch.ones(1), torch.ones(5), torch.zeros(5, dtype=torch.int64), torch.tensor(0.5)]
            )
        case bool():
            return not value
        case int():
            return draw.choice(NUMBERS)
        case float():
            return draw.choice([0.0, -1.0, 1e30, float("nan"), float("inf")])
        case str():
            return draw.choice(WORDS)
    return draw.choice(DTYPES)


def told(value):
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else value


def tensors(found):
    return found if isinstance(found, (list, tuple)) else [found]


@pytest.fixture(scope="module")
def calls():
    return [(op, arguments) for fmt in FORMATS for op, arguments in ops.calls(fmt)]


@pytest.mark.filterwarnings("ignore")
def test_odd_arguments_give_results_or_lowbit_errors(calls):
    @settings(
        max_examples=int(EXAMPLES or 200),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 1 << 32).map(random.Random))
    def run(draw):
        op, whole = draw.choice(calls)
        arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in whole]
        for _ in range(draw.choice([1, 1, 2])):
            at = draw.randrange(len(arguments))
            arguments[at] = odd(arguments[at], draw)
        call = getattr(torch.ops.lowbit, op)
        try:
            found = tensors(call(*arguments))
        except lowbit.LowbitError:
            return
        except RuntimeError as error:
            # torch's own, of arguments that are not of the schema.
            if "Expected a value of type" in str(error):
                return
            raise
        faked = tensors(call(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)))
        for real, fake in zip(found, faked, strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype), (op, [*map(told, arguments)])

    run()


REFUSED = {
    "no weight": ("linear", 1, lambda _: None, "linear needs a tensor qdata, and None was given"),
    "scales of another weight": ("linear", 2, lambda x: x[:1], "scale is .* of shape .1,"),
    "a bias that broadcasts": ("linear", 8, lambda x: x[:1], r"bias is .*needed are floats \(6,\)"),
    "a tensor scale that there is not": ("linear", 4, lambda _: torch.ones(1, 1), "has no tensor scale"),
    "ends of fewer experts": ("grouped_mm", 1, lambda x: x[:-1], r"needed is torch.int32 \(3,\)"),
    "a zero point without its scale": ("quantize", 2, lambda _: torch.ones(6, 1), "given without scales"),
    "a seed of several": ("quantize", 8, lambda _: torch.ones(2, dtype=torch.int64), r"needed is torch.int64 of shape \(\)"),
    "rows that are not there": ("pad_groups", 1, lambda x: x + 5, "row 9 is not in the table, which has 5 rows"),
    "more rows than int32 can tell": ("unpad_groups", 3, lambda _: 1 << 40, "0 to 2.31 - 1"),
    "heads that do not divide": ("attention", 0, lambda q: q[:, :3], "heads of keys must divide those of queries"),
    "a mask of another length": ("attention", 3, lambda _: torch.ones(5, 8), "does not broadcast|dtype must be bool"),
    "weights for other bags": ("embedding_bag", 2, lambda x: x[:1], r"needed are floats \(3,\), one an id"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_broadcast_or_read_beyond_is_refused(case):
    op, at, change, words = REFUSED[case]
    found = next(list(arguments) for name, arguments in ops.calls(lowbit.INT8_ROW) if name == op)
    found += [None] * (at + 1 - len(found))
    found[at] = change(found[at])
    with pytest.raises(lowbit.LowbitError, match=words):
        getattr(torch.ops.lowbit, op)(*found)


def test_formats_may_be_named():
    x = torch.randn(4, 32)
    by_name = torch.ops.lowbit.quantize(x, None, None, None, "MXFP4", "even", "stochastic", 7)
    by_spec = torch.ops.lowbit.quantize(x, None, None, None, str(lowbit.MXFP4), "even", "stochastic", 7)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(by_name, by_spec, strict=True))
