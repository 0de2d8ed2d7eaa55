"""`check_backend` passes what is right, and names what is wrong: a backend for every mistake one can make."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowbit import BackendError, NoKernelError, backends, reference
from lowbit.activation import Activation
from lowbit.format import Format
from lowbit.testing import FORMAT_GRID, Loopback, check_backend, installed_backends

FEW = tuple(map(Format.parse, ("INT8_ROW_ASYM", "NVFP4", "int4:4x16:bfloat16")))
ACTIVATIONS = tuple(
    map(Activation.parse, ("dynamic:INT8_ROW_ASYM", "static:INT8_TENSOR_ASYM", "dynamic:NVFP4", "local:NVFP4"))
)
OPS = {kernel.op for kernel in reference.backend.kernels()}


def check(backend, formats=FEW, **options):
    """On formats that have zero points, tensor scales and blocks of rows, but no larger weights."""
    return check_backend(backend, formats=formats, activations=ACTIVATIONS, shapes=(), devices=("cpu",), **options)


class Twisted(Loopback):
    """Loopback's kernel of one op, whose `run` (and whatever else `changes` says) is made of the right one."""

    def __init__(self, of, twist=None, *, packs=False, **changes):
        super().__init__("twisted", packs=packs)
        self.op, self.twist, self.changes = of, twist, changes

    def kernels(self):
        (row,) = (row for row in super().kernels() if row.op == self.op)
        run = row.run if self.twist is None else lambda *args: self.twist(row.run, *args)
        return (replace(row, **{"run": run, **{name: change(row) for name, change in self.changes.items()}}),)


@pytest.mark.parametrize(
    "backend", [reference.backend, Loopback(), Loopback(packs=True)], ids=["reference", "loopback", "packs"]
)
def test_what_is_right_passes(backend):
    # Loopback hands on to the reference whatever the dtype.
    report = check(backend, **({"dtypes": (torch.bfloat16,)} if isinstance(backend, Loopback) else {}))
    if backend is reference.backend:
        row = report.rows[-1]
        assert row.kernel == "reference.linear_row_sums"
        assert row.refusals["needs integer weights with scales by row or tensor, not e2m1:1x16:e4m3fn:tensor"] > 0
    rows = {row.kernel: row for row in report.rows}
    assert set(rows) == {kernel.name for kernel in backend.kernels()}
    assert {name.partition(".")[2] for name in rows} >= OPS
    assert all(row.runs > row.calls > 0 for row in report.rows)
    if isinstance(backend, Loopback):
        assert {row.kernel.partition(".")[2]: row.runs for row in report.rows} == backend.calls


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_the_reference_passes_in_every_format(fmt):
    report = check_backend(reference.backend, formats=(fmt,))
    assert all(row.calls for row in report.rows if row.kernel != "reference.linear_row_sums")


def test_the_report_tells_what_was_refused_and_why():
    products = SimpleNamespace(
        name="products",
        probe=lambda: None,
        kernels=lambda: tuple(kernel for kernel in reference.backend.kernels() if kernel.op == "linear"),
    )
    report = check(products, formats=(Format.parse("MXFP4"),))
    lines = str(report).splitlines()
    assert lines[0].split() == ["kernel", "calls", "taken", "runs", "calls", "refused"]
    row = report.rows[0]
    assert lines[1].split() == ["reference.linear", str(row.calls), str(row.runs), "0"]
    # The one that took nothing was not checked, and says why.
    refusals = report.rows[-1].refusals
    assert lines[len(report.rows)].split() == ["reference.linear_row_sums", "0", "0", str(sum(refusals.values()))]
    assert lines[len(report.rows) + 1 :] == [f"reference.linear_row_sums: {reason}" for reason in refusals]


# Mistakes: the op, what its `run` does instead, and the words that name it.


def flip_the_last_bit(run, *args):
    out = run(*args)
    bits = out.view(torch.int16 if out.dtype.itemsize == 2 else torch.int32)
    return (bits ^ 1).view(out.dtype)


def drop_the_bias(run, *args):
    return run(*args[:8], None, *args[9:])


def round_to_bfloat16(run, *args):
    out = run(*args)
    return out.bfloat16().to(out.dtype)


def ignore(position):
    """A part of the weight or of its use, by its place among the arguments."""

    def run_without(run, *args):
        part = args[position]
        neutral = None if part is None else torch.ones_like(part)
        return run(*args[:position], neutral, *args[position + 1 :])

    return run_without


def ignore_zero_points(run, *args):
    return run(*args[:3], None if args[3] is None else torch.zeros_like(args[3]), *args[4:])


def transpose(run, *args):
    out = run(*args)
    return out.mT.reshape(out.shape) if out.dim() > 1 else out


def shift_single_tokens(run, *args):
    out = run(*args)
    return out.roll(1, -1) if out.numel() == out.shape[-1] else out


def leave_a_nan(run, *args):
    out = run(*args)
    out.view(-1)[-1:] = torch.nan
    return out


def fill_rows_beyond(run, x, offs, *rest):
    out = run(x, offs, *rest)
    out[int(offs[-1]) :] = 1
    return out


def round_half_up(run, x, scale, *rest):
    return run(torch.nextafter(x, x + 1), scale, *rest)


def change_the_input(run, x, *rest):
    out = run(x, *rest)
    x.mul_(2)
    return out


def overlook_views(run, x, qdata, *rest):
    return run(x, qdata.as_strided(qdata.shape, (qdata.shape[1], 1)), *rest)


def take_tokens_as_rows(run, x, *rest):
    return run(x.as_strided(x.shape, torch.empty(x.shape).stride()), *rest)


MISTAKES = {
    "last bit": ("dequantize", flip_the_last_bit, "the bound is 0 (the bits must be equal)"),
    "last bit of a row": ("embedding", flip_the_last_bit, "the bound is 0 (the bits must be equal)"),
    "codes one off": ("quantize", round_half_up, "where the bound is 0"),
    "rounding not stochastic": (
        "quantize",
        lambda run, *args: run(*args[:6], "nearest", 0),
        "x (21,), stochastic rounding: it errs",
    ),
    "scale mode": ("quantize", lambda run, *args: run(*args[:5], "floor", *args[6:]), "scale mode ceil"),
    "given scales": ("quantize", lambda run, x, *args: run(x, None, None, *args[2:]), "given scales, half of what"),
    "no bias": ("linear", drop_the_bias, "x (5, 21), weight (6, 21), contiguous parts, bias: it errs in 30 of 30"),
    "low precision": ("linear", round_to_bfloat16, "torch.float32 n=6 k=21"),
    "no tensor scale": ("linear", ignore(4), "e2m1:1x16:e4m3fn:tensor"),
    "no zero points": ("linear", ignore_zero_points, "int8:1x*:float32:zero=int8"),
    "no static scale": ("linear", ignore(5), "x static:"),
    "no smoothing": ("linear", ignore(7), "pre_scale: it errs"),
    "transposed": ("linear", transpose, "x (5, 21)"),
    "one token": ("linear", shift_single_tokens, "x (1, 21)"),
    "a NaN": ("linear", leave_a_nan, "errs in 1 of 30 values, most by nan at (4, 5)"),
    "wide parts": ("linear", overlook_views, "parts that are views"),
    "strided input": ("linear", take_tokens_as_rows, "x is a view"),
    "wrong dtype": (
        "linear",
        lambda run, *args: run(*args).double(),
        "gives torch.float64 of shape (5, 6); needed is torch.float32 of shape (5, 6)",
    ),
    "wrong shape": ("linear", lambda run, *args: run(*args)[..., :-1].clone(), "gives torch.float32 of shape (5, 5)"),
    "strides": ("linear", lambda run, *args: run(*args).t().contiguous().t(), "(1, 5) on cpu; needed is a contiguous"),
    "no tensor": ("linear", lambda run, *args: [run(*args)], "returns list; needed is a tensor"),
    "one part": ("quantize", lambda run, *args: run(*args)[:1], "returns 1 tensors; needed are 3"),
    "raises": ("linear", lambda run, *args: 1 // 0, "it raises ZeroDivisionError: integer"),
    "changed input": ("linear", change_the_input, "it changes its arguments"),
    "own input": ("quantize", lambda run, x, *args: [x, *run(x, *args)[1:]], "returns memory of its arguments"),
    "rows beyond": ("grouped_mm", fill_rows_beyond, "offs [0, 5, 5]"),
    "experts shifted": ("grouped_mm", lambda run, x, offs, *args: run(x, offs.flip(0), *args), "offs [0, 5, 5]"),
    "no second scale": ("scaled_mm", ignore(3), "e2m1:1x16:e4m3fn:tensor"),
    "no bias of scaled_mm": (
        "scaled_mm",
        lambda run, *args: run(*args[:8], None, *args[9:]),
        "b (6, 21), contiguous parts, bias",
    ),
    "first row": ("embedding", lambda run, ids, *args: run(ids * 0, *args), "torch.int64 ids ()"),
}


@pytest.mark.parametrize(("op", "twist", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_and_named(op, twist, words):
    formats = (*FEW, Format.parse("MXFP4")) if "mode" in words else FEW
    with pytest.raises(
        BackendError, match=f"backend 'twisted' is wrong:\n  twisted.{op}: {op} .* on cpu, torch.float32"
    ) as caught:
        check(Twisted(op, twist), formats=formats)
    message = str(caught.value)
    assert words in message
    # The first fault is enough.
    assert message.count("\n") == 1


PACKED = {
    "unpack loses a bit": (
        "unpack",
        lambda row: lambda parts, what: spoilt(row.unpack(parts, what)),
        "unpacks another qdata",
    ),
    "unpack loses a part": (
        "unpack",
        lambda row: lambda parts, what: {"qdata": parts[0][0]},
        "unpacks qdata; packed were qdata, scale, zero",
    ),
    "pack raises": ("pack", lambda row: lambda weight: weight.nothing, "it raises AttributeError"),
    "run spoils what is packed": (
        "run",
        lambda row: lambda x, parts, *rest: (row.run(x, parts, *rest), parts[1].mul_(2))[0],
        "it changes its arguments",
    ),
}


def spoilt(inner):
    inner["qdata"].view(torch.uint8).view(-1)[-1] ^= 1
    return inner


@pytest.mark.parametrize(("name", "change", "words"), PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("op", ["linear", "embedding"])
def test_mistakes_of_packing_are_found(op, name, change, words):
    with pytest.raises(BackendError, match=f"twisted.{op}: {op} .*{words}") as caught:
        check(Twisted(op, packs=True, **{name: change}))
    assert str(caught.value).count("\n") == 1


REFUSALS = {
    "raises": (lambda call: call.nothing, "refuses raises AttributeError"),
    "no reason": (lambda call: "", "refuses gives '', which is neither None nor a reason"),
    "no words": (lambda call: False, "refuses gives False"),
    "another answer": (
        lambda call, said=[]: said.append(0) or (str(len(said))),
        "refuses changes its answer, at first '1'",
    ),
}


@pytest.mark.parametrize(("refuses", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_checked(refuses, words):
    with pytest.raises(
        BackendError, match=f"twisted.linear: linear .* on cpu, torch.float32 n=6 k=21: {re.escape(words)}"
    ):
        check(Twisted("linear", refuses=lambda row: refuses))


def test_every_wrong_kernel_is_named_with_its_cause():
    class Hopeless(Loopback):
        def kernels(self):
            return tuple(replace(row, run=lambda *args: 1 // 0) for row in super().kernels())

    with pytest.raises(BackendError) as caught:
        check(Hopeless("hopeless"))
    assert {line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]} == {
        f"hopeless.{op}" for op in OPS
    }
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_one_that_checks_nothing_does_not_pass():
    with pytest.raises(NoKernelError, match=r"took no call.*\n  twisted.linear: needs a moon$"):
        check(Twisted("linear", refuses=lambda row: lambda call: "needs a moon"))
    with pytest.raises(NoKernelError, match="needs a cuda tensor; this one is on cpu"):
        check(Twisted("linear", device=lambda row: "cuda"))
    with pytest.raises(NoKernelError, match="bind packs for linear, embedding and grouped_mm alone"):
        check(Twisted("dequantize", pack=lambda row: lambda weight: ()))
    with pytest.raises(NoKernelError, match="it has no kernels"):
        check(SimpleNamespace(name="empty", probe=lambda: None, kernels=lambda: ()))
    with pytest.raises(NoKernelError, match="cannot run here, so nothing was checked: needs a moon"):
        check(Loopback(reason="needs a moon"))


def test_what_is_no_backend_is_told():
    with pytest.raises(BackendError, match=r"must have name, probe\(\) and kernels\(\)"):
        check(object())
    doubled = SimpleNamespace(name="twice", probe=lambda: None, kernels=lambda: Loopback().kernels() * 2)
    with pytest.raises(BackendError, match="two kernels of one name: loopback.quantize"):
        check(doubled)
    with pytest.raises(
        BackendError, match="'twisted.linear' has the op 'conv'; it must be one of quantize, dequantize"
    ):
        check(Twisted("linear", op=lambda row: "conv"))


def test_shapes_and_dtypes_are_what_a_kernel_is_asked():
    def refuses(call):
        return None if (call.n, call.k) == (64, 512) else f"needs 64 x 512; this is {call.n} x {call.k}"

    backend = Twisted("linear", refuses=lambda row: refuses)
    with pytest.raises(NoKernelError, match="needs 64 x 512; this is 6 x 21"):
        check_backend(backend, formats=FEW)
    report = check_backend(backend, formats=FEW, shapes=((64, 512),), dtypes=(torch.bfloat16,), activations=())
    assert report.rows[0].calls == len(FEW)


def test_the_backend_under_test_is_not_its_own_oracle():
    """An installed backend that is wrong in quantize would otherwise quantize what it is compared with."""
    wrong = Twisted("quantize", round_half_up)
    with installed_backends(wrong), pytest.raises(BackendError, match="twisted.quantize"):
        check(wrong)
    assert "twisted" not in backends.installed()
