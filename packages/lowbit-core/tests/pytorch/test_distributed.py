"""Sharded and tensor-parallel quantized parameters on gloo ranks, bit for bit against the whole ones."""

from __future__ import annotations

import copy

import pytest
import torch
from cells import HALF, OTHERS, ROWS, H, K, assert_same, column, inputs, model
from ranks import ranks
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from lowbit import QuantizedTensor, bind, unbind
from lowbit.packed import PackedTensor
from lowbit.testing import Loopback, installed_backends

TOKENS = 12
FULL = StateDictOptions(full_state_dict=True)


@pytest.fixture(scope="session")
def one():
    with ranks(1) as started:
        yield started


@pytest.fixture(scope="session")
def two():
    with ranks(2) as started:
        yield started


@pytest.fixture(scope="session")
def three():
    with ranks(3) as started:
        yield started


def mesh():
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def shard(made):
    """FSDP2 as users apply it: blocks, then the root."""
    for block in made.children():
        fully_shard(block, mesh=mesh())
    return fully_shard(made, mesh=mesh())


def sharded_on_meta(row):
    """The structure of a row's model without values, sharded, then given memory."""
    with torch.device("meta"):
        made = model(row, device="meta")
    return shard(made).to_empty(device="cpu")


def whole(state):
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def assert_state(state, wanted):
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        if isinstance(wanted[name], QuantizedTensor):
            assert_same(value, wanted[name])
        else:
            assert torch.equal(value, wanted[name]), name


def fsdp(row):
    wanted, x = model(row), inputs(row, TOKENS)
    state = wanted.state_dict()
    # A sharded model keeps its bits, in sharded and in full state dicts, before and after it ran.
    made = shard(copy.deepcopy(wanted))
    assert all(
        isinstance(p, DTensor) and isinstance(p.to_local(), QuantizedTensor)
        for p in made.parameters()
        if p.dim() == row.rank
    )
    assert sum(p.to_local().numel() for p in made.parameters()) <= sum(p.numel() for p in wanted.parameters()) / 2 + K
    for _ in range(3):
        assert torch.equal(made(*x), wanted(*x))
    assert_state(whole(made.state_dict()), state)
    full = get_model_state_dict(made, options=FULL)
    assert_state(full, state)
    # One made on meta gets its values from a full state dict, and from shards.
    for source in (full, made.state_dict()):
        fresh = sharded_on_meta(row)
        set_model_state_dict(fresh, source, options=FULL if source is full else StateDictOptions())
        assert torch.equal(fresh(*x), wanted(*x))
        assert_state(whole(fresh.state_dict()), state)
    gradients = []
    for m in (made, wanted):
        tokens = x[0].clone().requires_grad_()
        m(tokens, *x[1:]).square().sum().backward()
        gradients.append(tokens.grad)
    assert torch.equal(*gradients)


@column("FSDP2", HALF)
def test_fsdp(two, row):
    two.run(fsdp, row)


@pytest.mark.parametrize("row", OTHERS, ids=str)
def test_fsdp_of_rows_that_do_not_divide_by_the_ranks(three, row):
    """Rows of 171, 171 and 170, experts of 2, 2 and 0."""
    three.run(fsdp, row)


def halves(weight, dim):
    return [quantized.detach().clone() for quantized in weight.chunk(2, dim)]


def experts(made, x, offs):
    """Experts whose weights are DTensors, as a trainer calls them: local products, one sum over the ranks."""
    x = DTensor.from_local(x, mesh(), [Replicate()]).to_local(grad_placements=[Partial()])
    hidden = functional.silu(functional.grouped_mm(x, made.up.to_local().mT, offs=offs))
    out = functional.grouped_mm(hidden, made.down.to_local().mT, offs=offs)
    return DTensor.from_local(out, mesh(), [Partial()]).full_tensor()


def terms(row, made, x, offs=None):
    """What each rank adds to the output, from weights that this test cuts, and the bias."""
    ups = halves(made.up.weight if row.rank == 2 else made.up, row.rank - 2)
    downs = halves(made.down.weight if row.rank == 2 else made.down, row.rank - 1)
    if row.rank == 3:
        return [
            functional.grouped_mm(functional.silu(functional.grouped_mm(x, up.mT, offs=offs)), down.mT, offs=offs)
            for up, down in zip(ups, downs, strict=True)
        ]
    return [
        *(
            functional.linear(functional.silu(functional.linear(x, up, bias)), down)
            for up, down, bias in zip(ups, downs, made.up.bias.chunk(2), strict=True)
        ),
        made.down.bias,
    ]


def tensor_parallel(row):
    """Columns of the first layer and rows of the second on each rank; the oracle cuts the weights itself."""
    rank, wanted, x = distributed.get_rank(), model(row), inputs(row, TOKENS)
    made = model(row, seed=rank)  # rank 0's values are the ones that count
    if row.rank == 2:
        made = parallelize_module(made, mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    else:
        for name, placement in (("up", Shard(1)), ("down", Shard(2))):
            placed = distribute_tensor(getattr(made, name), mesh(), [placement])
            setattr(made, name, nn.Parameter(placed, requires_grad=False))
    for name, parameter in made.named_parameters():
        if parameter.dim() == row.rank:
            dim = parameter.placements[0].dim
            assert dim == row.rank - 2 + name.startswith("down")
            assert_same(parameter.to_local(), halves(wanted.get_parameter(name), dim)[rank])
    assert_state(whole(made.state_dict()), wanted.state_dict())

    tokens, plain = (x[0].clone().requires_grad_() for _ in range(2))
    out = made(tokens) if row.rank == 2 else experts(made, tokens, x[1])
    added = terms(row, wanted, plain, *x[1:])
    total = sum(added)
    # float32 sums of up to H terms in another order.
    torch.testing.assert_close(out, total, rtol=0, atol=H * 2.0**-24 * float(total.detach().abs().max()))
    out.sum().backward()
    total.sum().backward()
    torch.testing.assert_close(tokens.grad, plain.grad, rtol=0, atol=H * 2.0**-24 * float(plain.grad.abs().max()))


@column("DTensor column and row parallel")
def test_tensor_parallel(two, row):
    two.run(tensor_parallel, row)


def bind_parallel(row):
    """Each rank packs its own shard; a bound model gives the values, gradients and state of the canonical one."""
    x, results = inputs(row, TOKENS), []
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    made = parallelize_module(model(row), mesh(), plan)
    state = whole(made.state_dict())
    with installed_backends(Loopback(packs=True)):
        for bound in (False, True):
            if bound:
                assert [(r.kernel, r.packed) for r in bind(made).rows] == [("loopback.linear", True)] * 2
                assert isinstance(made.down.weight.to_local(), PackedTensor)
            tokens = x[0].clone().requires_grad_()
            out = made(tokens)
            out.square().sum().backward()
            # In inference mode DTensor of torch 2.15 gathers a weight that has a bias, plain ones too.
            with torch.no_grad():
                assert torch.equal(made(x[0]), out)
            results.append((out.detach(), tokens.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert_state(whole(made.state_dict()), state)
        unbind(made)
        assert_state(whole(made.state_dict()), state)
        assert torch.equal(made(x[0]), results[0][0])


def bind_gathered(row):
    """What FSDP gathers stays canonical, and says which kernel runs it."""
    made, x = shard(model(row)), inputs(row, TOKENS)
    wanted = made(*x)
    loopback = Loopback()
    with installed_backends(loopback, Loopback("packs", packs=True, priority=20)):
        assert [(r.kernel, r.packed) for r in bind(made).rows] == [("loopback.linear", False)] * 2
        assert torch.equal(made(*x), wanted)
        assert loopback.calls["linear"] == 2
        unbind(made)


@pytest.mark.parametrize("row", [row for row in ROWS if row.rank == 2], ids=str)
@pytest.mark.parametrize("function", [bind_parallel, bind_gathered])
def test_bind_after_sharding(two, function, row):
    two.run(function, row)


def save(row, folder):
    checkpoint.save(get_model_state_dict(shard(model(row))), checkpoint_id=folder)


def load(row, folder):
    """Into a model without values, and into one that has other values."""
    wanted, x = model(row), inputs(row, TOKENS)
    for made in (sharded_on_meta(row), *([model(row, seed=5)] if distributed.get_world_size() == 1 else [])):
        state = get_model_state_dict(made)
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(made, state)
        assert_state(whole(made.state_dict()), wanted.state_dict())
        assert torch.equal(made(*x), wanted(*x))


@column("distributed.checkpoint", HALF)
def test_checkpoint(one, two, three, tmp_path, row):
    two.run(save, row, tmp_path)
    one.run(load, row, tmp_path)
    three.run(load, row, tmp_path)
