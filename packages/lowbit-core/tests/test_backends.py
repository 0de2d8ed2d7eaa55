"""Which kernel is chosen, what refused and why, and what a broken or doubled backend does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from lowbit import INT8_ROW, MXFP8, BackendError, NoKernelError, backends, explain, quantize, select
from lowbit.activation import Activation
from lowbit.backends import Call, Kernel
from lowbit.testing import FORMAT_GRID, Loopback, installed_backends, sample, shapes

CALL = Call("linear", MXFP8, None, "cpu", torch.bfloat16, 64, 64)


@dataclass
class Point:
    """An entry point as importlib.metadata gives them."""

    name: str
    load: object
    value: str = "somewhere:backend"
    dist: object = None


@contextmanager
def points(monkeypatch, *given):
    real = backends.entry_points
    with monkeypatch.context() as patch:
        patch.setattr(backends, "entry_points", lambda *, group: [*real(group=group), *given])
        backends.forget()
        yield
    backends.forget()


@pytest.fixture(autouse=True)
def _found_anew():
    backends.forget()
    yield
    backends.forget()


class Choosy(Loopback):
    """Takes the calls whose n is at most `limit`."""

    def __init__(self, name, limit=1024, device="any", **options):
        super().__init__(name, **options)
        self.limit, self.device = limit, device

    def kernels(self):
        return tuple(
            Kernel(k.name, k.op, self.device, k.priority, k.run, self.refuses, k.pack, k.unpack)
            for k in super().kernels()
        )

    def refuses(self, call):
        return f"needs n up to {self.limit}; this is {call.n}" if call.n and call.n > self.limit else None


def told(selection):
    return [str(refusal) for refusal in selection.refusals]


def test_the_reference_takes_every_call():
    for fmt in FORMAT_GRID:
        for op in ("quantize", "dequantize", "linear", "scaled_mm", "grouped_mm", "embedding"):
            for activation in (None, Activation(fmt)):
                choice = select(Call(op, fmt, activation, "cpu", torch.float32, 8, 8), bound=False)
                assert choice.kernel.name == f"reference.{op}"


def test_the_highest_priority_that_takes_the_call_wins():
    with installed_backends(
        Choosy("low", priority=3), Choosy("high", limit=8, priority=7), Choosy("gpu", device="cuda")
    ):
        choice = select(CALL)
        assert choice.kernel.name == "low.linear"
        refusals = told(choice)
        assert "high.linear: needs n up to 8; this is 64" in refusals
        assert "gpu.linear: needs a cuda tensor; this one is on cpu" in refusals
        assert "reference.linear: priority 0; low.linear has 3" in refusals
        assert len(refusals) == 4  # and reference.linear_row_sums
        small = Call("linear", MXFP8, None, "cpu", torch.bfloat16, 8, 64)
        assert select(small).kernel.name == "high.linear"


def test_equal_priorities_are_decided_by_name():
    with installed_backends(Choosy("b"), Choosy("a")):
        assert select(CALL).kernel.name == "a.linear"


def test_operators_run_the_kernel_selected():
    loopback = Loopback()
    for fmt in FORMAT_GRID:
        shape = next(shape for shape in shapes(fmt) if len(shape) == 2)
        x = sample((3, shape[1]))
        q = quantize(sample(shape), fmt)
        wanted = (q.dequantize(), functional.linear(x, q), functional.embedding(torch.tensor([1]), q))
        with installed_backends(loopback):
            again = quantize(sample(shape), fmt)
            found = (again.dequantize(), functional.linear(x, again), functional.embedding(torch.tensor([1]), again))
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
    count = len(FORMAT_GRID)
    assert loopback.calls == {"quantize": count, "dequantize": count, "linear": count, "embedding": count}


def test_a_kernel_that_packs_waits_for_bind():
    with installed_backends(Loopback(packs=True)):
        assert select(CALL).kernel.name == "loopback.linear"
        choice = select(CALL, bound=False)
        assert choice.kernel.name == "reference.linear"
        assert "loopback.linear: needs its weight packed; call lowbit.bind(model)" in told(choice)


def test_explain_tells_the_choice_and_every_refusal(monkeypatch):
    with installed_backends(Choosy("picky", limit=8, priority=7)):
        story = explain(CALL)
        assert story.splitlines()[0] == str(CALL)
        assert "runs on reference.linear (priority 0)" in story
        assert "refused by picky.linear: needs n up to 8; this is 64" in story
        monkeypatch.setenv("LOWBIT_BACKENDS", "picky")
        backends.forget()
        assert "needs n up to 8" in explain(CALL)
        assert "runs on" not in explain(CALL)


def test_a_call_reads_as_a_line():
    call = Call("linear", INT8_ROW, Activation(INT8_ROW), "cpu", torch.bfloat16, 6, 8)
    assert str(call) == "linear int8:1x*:float32 x dynamic:int8:1x*:float32 on cpu, torch.bfloat16 n=6 k=8"


def test_the_variable_is_an_allow_list_and_an_order(monkeypatch):
    with installed_backends(Choosy("one", priority=1), Choosy("two", priority=2), Choosy("three", limit=8, priority=3)):
        for value, winner in (
            ("", "two"),
            ("one", "one"),
            (" reference , two", "reference"),
            ("one,two", "one"),
            ("two,one", "two"),
            ("three,one", "one"),
        ):
            monkeypatch.setenv("LOWBIT_BACKENDS", value)
            backends.forget()
            assert select(CALL).kernel.name == f"{winner}.linear", value
        assert "two: LOWBIT_BACKENDS=three,one leaves it out" in told(select(CALL))
        assert "three.linear: needs n up to 8; this is 64" in told(select(CALL))
        monkeypatch.setenv("LOWBIT_BACKENDS", "one,two")
        backends.forget()
        assert "two.linear: LOWBIT_BACKENDS puts one.linear first" in told(select(CALL))
        monkeypatch.setenv("LOWBIT_BACKENDS", "three")
        backends.forget()
        with pytest.raises(NoKernelError, match="no kernel of three takes"):
            select(CALL)


def test_an_unknown_name_is_an_error(monkeypatch):
    with pytest.raises(
        BackendError, match="prefer names the backend 'nope', which is not installed; installed are reference"
    ):
        select(CALL, prefer=("nope",))
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference,nope")
    backends.forget()
    with pytest.raises(BackendError, match="LOWBIT_BACKENDS names the backend 'nope'"):
        select(CALL)


def test_prefer_decides_or_lists_every_refusal(monkeypatch):
    with installed_backends(
        Choosy("a", priority=1), Choosy("b", limit=8, priority=9), Loopback("c", reason="needs a moon")
    ):
        assert select(CALL, prefer=("a",)).kernel.name == "a.linear"
        assert select(CALL, prefer=("b", "a")).kernel.name == "a.linear"
        assert select(CALL, prefer=("reference",)).kernel.name == "reference.linear"
        with pytest.raises(NoKernelError) as caught:
            select(CALL, prefer=("b", "c"))
        message = str(caught.value)
        assert "no kernel of b, c takes linear" in message
        assert "b.linear: needs n up to 8; this is 64" in message
        assert "c: needs a moon" in message
        assert "lowbit doctor" in message
        monkeypatch.setenv("LOWBIT_BACKENDS", "reference,b")
        backends.forget()
        with pytest.raises(NoKernelError, match="a: LOWBIT_BACKENDS=reference,b leaves it out"):
            select(CALL, prefer=("a",))


def test_a_choice_is_made_once():
    asked = []

    class Counting(Loopback):
        def kernels(self):
            return tuple(Kernel(k.name, k.op, "any", 5, k.run, asked.append) for k in super().kernels())

    with installed_backends(Counting()):
        first = select(CALL)
        assert select(Call("linear", MXFP8, None, "cpu", torch.bfloat16, 64, 64)) is first
        assert len(asked) == 1
        select(Call("linear", MXFP8, None, "cpu", torch.bfloat16, 64, 128))
        assert len(asked) == 2
        q = quantize(sample((64, 64)), MXFP8)
        for m in range(1, 20):
            functional.linear(sample((m, 64)), q)
        assert len([call for call in asked if call.op == "linear"]) == 3


def test_a_broken_backend_is_shown_and_warned_about_once(monkeypatch, recwarn):
    def load():
        raise ImportError("libmoon.so.4: cannot open shared object file")

    with points(monkeypatch, Point("moon", load, dist=SimpleNamespace(name="lowbit-moon", version="9.1"))):
        for _ in range(3):
            assert select(CALL).kernel.name == "reference.linear"
            explain(CALL)
            quantize(sample((4, 64)), MXFP8).dequantize()
        problem = "failed to load: ImportError: libmoon.so.4: cannot open shared object file"
        assert f"moon: {problem}" in told(select(CALL))
        assert backends.installed()["moon"].problem == problem
        assert backends.installed()["moon"].backend is None
        with pytest.raises(NoKernelError, match="libmoon"):
            select(CALL, prefer=("moon",))
    assert [str(w.message) for w in recwarn] == [f"lowbit backend 'moon' (lowbit-moon 9.1) {problem}"]


@pytest.mark.parametrize(
    ("backend", "problem"),
    [
        (SimpleNamespace(name="moon"), "must have name='moon', probe"),
        (Loopback("sun"), "must have name='moon', probe"),
        (SimpleNamespace(name="moon", kernels=tuple, probe=lambda: 1 / 0), "ZeroDivisionError"),
        (SimpleNamespace(name="moon", kernels=lambda: None, probe=lambda: None), "TypeError"),
    ],
)
def test_a_backend_that_breaks_its_contract_is_shown(monkeypatch, backend, problem):
    with points(monkeypatch, Point("moon", lambda: backend)):
        with pytest.warns(RuntimeWarning, match=problem):
            choice = select(CALL)
        assert any(problem in line for line in told(choice))


def test_a_machine_that_cannot_run_a_backend_is_no_error():
    with installed_backends(Loopback("moon", reason="needs a moon; this planet has none")):
        assert "moon: needs a moon; this planet has none" in told(select(CALL))
        assert backends.installed()["moon"].backend is not None


def test_two_backends_of_one_name_are_an_error(monkeypatch):
    owners = [SimpleNamespace(name=name, version="1.0") for name in ("lowbit-moon", "other-moon")]
    with (
        points(monkeypatch, *(Point("moon", lambda: Loopback("moon"), dist=owner) for owner in owners)),
        pytest.raises(BackendError, match=r"'moon': lowbit-moon 1.0 \(somewhere:backend\) and other-moon 1.0"),
    ):
        select(CALL)


def test_two_kernels_of_one_name_are_an_error():
    class Doubled(Loopback):
        def kernels(self):
            return super().kernels() * 2

    class Thief(Loopback):
        def kernels(self):
            return Loopback("honest").kernels()

    for given, owners in (
        ([Doubled("twice")], "'twice' and 'twice'"),
        ([Loopback("honest"), Thief("thief")], "'honest' and 'thief'"),
    ):
        with installed_backends(*given), pytest.raises(BackendError, match=f"is used twice, by backends {owners}"):
            select(CALL)


def test_kernels_are_found_by_name():
    assert backends.kernel("reference.linear").op == "linear"
    with pytest.raises(
        NoKernelError, match=r"no installed backend has the kernel 'moon.linear'; installed are reference"
    ):
        backends.kernel("moon.linear")


def test_backends_are_loaded_once_by_many_threads():
    loads = []

    class Slow(Loopback):
        def probe(self):
            loads.append(self.name)

    with installed_backends(Slow("slow")), ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: select(CALL).kernel.name, range(32)))
    assert (loads, set(names)) == (["slow"], {"slow.linear"})


def test_autocast_ends_where_a_kernel_begins():
    seen = []
    row = Kernel(
        "moon.linear", "linear", "any", 1, lambda: seen.append(torch.is_autocast_enabled("cpu")), lambda _: None
    )
    with torch.autocast("cpu", torch.bfloat16):
        backends.without_autocast(row.run, "cpu")
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]
