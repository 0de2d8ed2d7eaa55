"""bind chooses once, says why, packs or leaves alone, and unbind undoes it bit for bit."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from to_bind import ASYM, IDS, Model, bind_and_tell, parameter
from torch import nn
from torch.nn import functional

from lowbit import (
    FormatError,
    LowbitError,
    NoKernelError,
    NotPortableError,
    QuantizedTensor,
    UnsupportedOpError,
    backends,
    bind,
    quantize,
    unbind,
)
from lowbit.backends import Kernel
from lowbit.packed import PackedTensor
from lowbit.testing import FORMAT_GRID, Loopback, installed_backends, sample, shapes


def bind_state():
    return importlib.import_module("lowbit.bind")._STATE


def parts(model):
    return {
        name: {n: t.clone() for n, t in p.inner_tensors().items()}
        for name, p in model.named_parameters()
        if isinstance(p, QuantizedTensor)
    }


def check_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        for part, tensor in tensors.items():
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (found[name][part], tensor))), (name, part)


def test_convolutions_have_nothing_to_bind():
    # Of linear layers this is what a kernel packs.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 5))
    spec = "INT8_ROW_ASYM", "dynamic:int8:*x*:float32:zero=int8"
    for layer in (model[0], model[2]):
        fmt, activation = spec
        layer.weight = nn.Parameter(quantize(layer.weight, fmt, activation=activation), requires_grad=False)
    x = sample((2, 3, 5, 5))
    y, weight = model(x), model[0].weight
    assert [(row.name, row.packed) for row in bind(model).rows] == [("2.weight", True)]
    assert model[0].weight is weight
    assert torch.equal(model(x), y)


def test_bind_changes_no_result_and_unbind_restores_every_bit():
    model = Model()
    before, weights = parts(model), dict(model.named_parameters())
    wanted = model(IDS)
    table = bind(model)
    for found, y in zip(model(IDS), wanted, strict=True):
        assert torch.equal(found, y)
    assert isinstance(model.up.weight, PackedTensor)
    assert isinstance(model.up.weight, nn.Parameter)
    assert model.down.weight is weights["down.weight"]
    # Its two uses have no kernel in common that packs.
    assert model.table.weight is model.head.weight is weights["table.weight"]
    assert {row.name: (row.op, row.kernel, row.packed) for row in table.rows} == {
        "table.weight": ("embedding", "reference.embedding", False),
        "head.weight": ("linear", "reference.linear", False),
        "up.weight": ("linear", "reference.linear_row_sums", True),
        "down.weight": ("linear", "reference.linear", False),
    }
    unbind(model)
    check_same(parts(model), before)
    assert model.table.weight is model.head.weight


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_every_format_binds_to_a_backend_and_back(fmt, packs):
    shape = next(shape for shape in shapes(fmt) if len(shape) == 2)
    module = nn.Linear(*reversed(shape))
    module.weight = parameter(fmt, shape=shape)
    before, x = parts(module), sample((3, shape[1]), seed=1)
    wanted = module(x)
    loopback = Loopback(packs=packs)
    with installed_backends(loopback):
        row = bind(module).rows[0]
        assert (row.kernel, row.packed) == ("loopback.linear", packs)
        assert torch.equal(module(x), wanted)
        assert loopback.calls["linear"] == 1
        unbind(module)
    check_same(parts(module), before)


def test_the_table_reads_as_text_and_as_json():
    table = bind(Model())
    lines = str(table).splitlines()
    assert lines[0].split() == ["parameter", "op", "format", "kernel"]
    assert lines[3].split() == ["up.weight", "linear", "int8:1x*:float32", "reference.linear_row_sums", "(packed)"]
    assert (
        len(
            {
                line.index(cell)
                for line, cell in zip(lines[1:], ["embedding", "linear", "linear", "linear"], strict=True)
            }
        )
        == 1
    )
    rows = {row["name"]: row for row in json.loads(table.to_json())}
    assert rows["up.weight"]["activation"] == "dynamic:int8:1x*:float32:zero=int8"
    assert rows["down.weight"]["activation"] is None
    assert any("needs asymmetric integer activations" in line for line in rows["down.weight"]["refusals"])
    assert str(bind(nn.Linear(2, 2))) == ""


def test_tied_parameters_of_one_kind_are_packed_once():
    model = nn.ModuleDict({"a": nn.Linear(32, 6, bias=False), "b": nn.Linear(32, 6, bias=False)})
    model["a"].weight = model["b"].weight = parameter("INT8_ROW", ASYM)
    # The same parameter twice in one module is one more use.
    model["a"].twin = model["a"].weight
    assert [row.packed for row in bind(model).rows] == [True] * 3
    assert model["a"].weight is model["b"].weight is model["a"].twin
    assert isinstance(model["a"].twin, PackedTensor)
    unbind(model)
    assert model["a"].weight is model["b"].weight is model["a"].twin
    assert isinstance(model["a"].twin, QuantizedTensor)


def test_binding_again_starts_afresh():
    model = Model()
    wanted, before = model(IDS), parts(model)
    first = bind(model)
    assert bind(model) == first
    with installed_backends(Loopback(packs=True)):
        kernels = {row.name: row.kernel for row in bind(model).rows}
        assert kernels["up.weight"] == "loopback.linear"
        assert {row.name: row.kernel for row in bind(model, prefer=("reference",)).rows} == {
            r.name: r.kernel for r in first.rows
        }
        unbind(model)
    check_same(parts(model), before)
    for found, y in zip(model(IDS), wanted, strict=True):
        assert torch.equal(found, y)


@pytest.mark.parametrize("packs", [False, True])
def test_prefer_is_what_runs_even_where_another_has_priority(packs):
    module = nn.Linear(32, 6)
    module.weight = parameter("MXFP4")
    x = sample((3, 32), seed=1)
    wanted, modest, loud = module(x), Loopback("modest", priority=1, packs=packs), Loopback("loud", priority=9)
    with installed_backends(modest, loud):
        row = bind(module, prefer=("modest",)).rows[0]
        assert (row.kernel, row.packed) == ("modest.linear", packs)
        assert torch.equal(module(x), wanted)
        assert (modest.calls["linear"], loud.calls["linear"]) == (1, 0)
        assert bind(module).rows[0].kernel == "loud.linear"
        assert isinstance(module.weight, QuantizedTensor)
        assert torch.equal(module(x), wanted)
        assert (modest.calls["linear"], loud.calls["linear"]) == (1, 1)


class LinearOnly(Loopback):
    def kernels(self):
        return tuple(k for k in super().kernels() if k.op == "linear")


@pytest.mark.parametrize("packs", [False, True])
def test_a_preference_that_cannot_be_met_binds_nothing(packs):
    model = Model()
    weights, wanted = dict(model.named_parameters(remove_duplicate=False)), model(IDS)
    with installed_backends(LinearOnly("lines", packs=packs), Loopback("all", priority=1, packs=packs)):
        with pytest.raises(
            NoKernelError, match=r"no kernel of lines takes embedding .*\n  no backend has a kernel for this op"
        ):
            bind(model, prefer=("lines",))
        # The tied table would need a kernel for each of its uses.
        with pytest.raises(NoKernelError, match="needs its weight packed" if packs else "cannot carry all.linear"):
            bind(model, prefer=("all",))
        assert dict(model.named_parameters(remove_duplicate=False)) == weights
    for found, y in zip(model(IDS), wanted, strict=True):
        assert torch.equal(found, y)


def test_refusals_name_every_other_kernel():
    class Shy(Loopback):
        def kernels(self):
            return tuple(
                Kernel(k.name, k.op, "any", 5, k.run, lambda call: f"needs K of 64; this is {call.k}")
                for k in super().kernels()
            )

    with installed_backends(Shy("shy")):
        rows = {row.name: row for row in bind(Model()).rows}
    assert "shy.linear: needs K of 64; this is 32" in rows["up.weight"].refusals
    assert "shy.embedding: needs K of 64; this is 32" in rows["table.weight"].refusals


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = parameter("MXFP4", shape=(3, 6, 32))


@pytest.mark.parametrize("packs", [True, False])
def test_experts_are_packed_and_used_either_way_round(packs):
    """As (E, N, K), which users transpose, and as (E, K, N)."""
    x, offs = sample((4, 32)), torch.tensor([1, 3, 4], dtype=torch.int32)
    for turned in (False, True):
        model = Experts()
        if turned:
            model.gate_up_proj = nn.Parameter(model.gate_up_proj.mT, requires_grad=False)

        def run(x, offs, *, model=model, turned=turned):
            weight = model.gate_up_proj
            return functional.grouped_mm(x, weight if turned else weight.transpose(-2, -1), offs=offs)

        wanted = run(x, offs)
        state = model.state_dict()
        with installed_backends(backend := Loopback("other", packs=packs, priority=-1)):
            row = bind(model, prefer=("other",)).rows[0]
            assert (row.name, row.op, row.kernel) == ("gate_up_proj", "grouped_mm", "other.grouped_mm")
            assert row.packed == packs
            assert isinstance(model.gate_up_proj, PackedTensor)
            calls = backend.calls["grouped_mm"]
            assert torch.equal(run(x, offs), wanted)
            # Traced, the reference multiplies all tokens by each expert, which may sum in another order.
            compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x, offs), wanted)
            with torch.inference_mode():
                assert torch.equal(run(x, offs), wanted)
                weight = model.gate_up_proj if turned else model.gate_up_proj.mT
                assert torch.equal(functional.grouped_mm(x, weight, offs=offs), wanted)
            assert backend.calls["grouped_mm"] >= calls + 3
            weight = model.gate_up_proj if turned else model.gate_up_proj.mT
            assert tuple(weight.shape) == (3, 32, 6)
            assert torch.equal(torch._grouped_mm(x, weight, offs=offs), wanted)
            with pytest.raises(NotPortableError, match="no way to use"):
                functional.grouped_mm(x, weight.mT, offs=offs)
            with pytest.raises(FormatError, match="the tokens have 31 columns"):
                functional.grouped_mm(x[:, :31], weight, offs=offs)
            with pytest.raises(UnsupportedOpError, match="takes 2-D tokens and offs"):
                functional.grouped_mm(x, weight)
            with pytest.raises(NotPortableError, match="no meaning for a weight packed"):
                weight.transpose(0, 1)
            check_same(
                {"w": model.state_dict()["gate_up_proj"].inner_tensors()}, {"w": state["gate_up_proj"].inner_tensors()}
            )


def test_a_policy_that_does_not_exist_is_refused_before_anything_is_bound():
    model = Model()
    bind(model)
    with pytest.raises(LowbitError, match="policy 'quickest' is unknown; use one of smallest, fastest"):
        bind(model, policy="quickest")
    assert isinstance(model.up.weight, PackedTensor)


def test_kernels_that_keep_plain_values_are_for_those_who_ask():
    class Keeps(Loopback):
        def kernels(self):
            rows = super().kernels()
            return tuple(
                replace(k, keeps=k.op == "linear", slower=lambda _: "9 tokens", how=lambda _: "as it likes")
                for k in rows
            )

    with installed_backends(Keeps("kept", priority=30, packs=True)):
        rows = {row.name: row for row in bind(Model()).rows}
        assert rows["up.weight"].kernel.startswith("reference")
        assert any("policy=" in refusal for refusal in rows["up.weight"].refusals)
        table = bind(model := Model(), policy="fastest")
        assert {row.name: row.kernel for row in table.rows}["up.weight"] == "kept.linear"
        lines = str(table).splitlines()
        assert lines[0].endswith("slower than plain at")
        assert all(line.endswith("9 tokens") for line in lines if "kept.linear" in line)
        assert "  as it likes\n  slower than a plain weight at 9 tokens" in backends.explain(
            backends.Call("embedding", model.table.weight.format, None, "cpu", torch.float32, 50, 32)
        )


def test_gradients_flow_through_bound_experts():
    x, offs = sample((4, 32)).requires_grad_(), torch.tensor([1, 3, 4], dtype=torch.int32)
    found, model = [], Experts()
    with installed_backends(Loopback("other", packs=True)):
        for bound in (False, True):
            if bound:
                bind(model)
            functional.grouped_mm(x, model.gate_up_proj.mT, offs=offs).square().sum().backward()
            found.append(x.grad.clone())
            x.grad = None
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_a_bound_model_learns_through_frozen_weights():
    found, model = [], Model()
    for bound in (False, True):
        if bound:
            bind(model)
        adapter = nn.Parameter(torch.zeros(1, 3, 32))
        y = model.up(model.down(functional.embedding(IDS, model.table.weight) + adapter))
        y.square().sum().backward()
        found.append(adapter.grad)
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_the_state_dict_of_a_bound_model_is_the_portable_one():
    model = Model()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    bind(model)
    for state, prefix in (
        (model.state_dict(), ""),
        (model.up.state_dict(), "up."),
        (model.state_dict(keep_vars=True), ""),
    ):
        names = {name for name in wanted if name.startswith(prefix)}
        assert {prefix + name for name in state} == names
        for name in names:
            value = state[name.removeprefix(prefix)]
            if name == "up.bias":
                assert torch.equal(value, wanted[name])
            else:
                check_same({name: value.inner_tensors()}, {name: wanted[name].inner_tensors()})
    assert isinstance(model.up.weight, PackedTensor)
    fresh = Model()
    fresh.load_state_dict(model.state_dict())
    for found, y in zip(fresh(IDS), model(IDS), strict=True):
        assert torch.equal(found, y)
    with pytest.raises(RuntimeError, match=r"unbind\(model\)"):
        model.load_state_dict(wanted)
    unbind(model)
    assert not model.up._state_dict_hooks


def test_threads_bind_and_run_together():
    """Eight threads bind, run and unbind eight models of their own and one that they share."""
    shared, wanted = Model(), [y.clone() for y in Model()(IDS)]
    start = threading.Barrier(8)

    def work(seed):
        own = Model()
        start.wait()
        for turn in range(6):
            for model in (own, shared):
                bind(model)
                for found, y in zip(model(IDS), wanted, strict=True):
                    assert torch.equal(found, y)
                if (turn + seed) % 3 == 0:
                    unbind(model)
        return bind(own)

    backends.forget()
    before = parts(shared)
    with installed_backends(Loopback(packs=True, priority=1)), ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(work, range(8)))
        assert all(table == tables[0] for table in tables)
        unbind(shared)
    check_same(parts(shared), before)


class Reentrant(Loopback):
    """Packing asks lowbit in turn: for another model's binding, and for what it would choose itself."""

    def kernels(self):
        def pack(row):
            def packing(weight):
                other = nn.Linear(32, 6)
                other.weight = parameter("MXFP4")
                assert bind(other, prefer=("reference",)).rows[0].kernel == "reference.linear"
                return row.pack(weight)

            return packing

        return tuple(replace(k, pack=pack(k)) if k.pack else k for k in super().kernels())


def test_packing_may_bind_in_turn():
    model = Model()
    wanted = model(IDS)
    with installed_backends(Reentrant("reentrant", packs=True)):
        assert {row.name: row.kernel for row in bind(model).rows}["up.weight"] == "reentrant.linear"
        for found, y in zip(model(IDS), wanted, strict=True):
            assert torch.equal(found, y)
        unbind(model)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_process_binds_what_it_is_given(monkeypatch, method):
    # A new process finds the backends of other members, too.
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    model = Model()
    with torch.no_grad():
        wanted = [y.clone() for y in model(IDS)]
    kernels = [row.kernel for row in bind(model).rows]
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    if method == "spawn":
        with pytest.raises(NotPortableError, match=r"unbind\(model\)"):
            context.Process(target=bind_and_tell, args=(model, wanted, theirs)).start()
        unbind(model)
    # A fork takes the bound model along, and whatever lock another thread holds just then.
    holds, done = threading.Event(), threading.Event()

    def hold():
        with bind_state().lock, backends._REGISTRY._lock:
            holds.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    child = context.Process(target=bind_and_tell, args=(model, wanted, theirs))
    child.start()
    try:
        assert ours.poll(60)
        before, found, after = ours.recv()
    finally:
        done.set()
        thread.join()
        child.join(5)
        child.kill()
    assert all(before)
    assert all(after)
    assert found == kernels
