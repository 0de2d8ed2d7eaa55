"""AdamW with states of few bits: against torch's and float64, over ranks, and from one width to another."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import ranks
from stepping import model, stepped
from torch import nn

from lowbit import FormatError
from lowbit_moe import AdamW
from lowbit_moe.states import BLOCKS, decode, encode, levels, values


def with_gradients(parameters, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def decibels(exact, found):
    return float(10 * torch.log10(exact.double().square().sum() / (exact.double() - found.double()).square().sum()))


@pytest.mark.parametrize("bits", [3, 7, 8])
def test_levels_are_in_the_middle_of_what_their_codes_stand_for(bits):
    """Octaves begin at powers of 8, the i-th has 2^i levels, and the last ends at 1."""
    found = levels(bits).double()
    edges = [0.0]
    for octave in range(bits):
        begin = 8.0 ** (octave - bits)
        edges += [begin * (1 + 7 * j / 2**octave) for j in range(2**octave)]
    middles = [(low + high) / 2 for low, high in zip(edges[1:], [*edges[2:], 1.0], strict=True)]
    assert found[1:].tolist() == middles
    assert 0 < found[0] < edges[1]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_is_of_what_it_stands_for(bits, signed):
    table = values(bits, signed=signed)
    # -1 has a code that nothing is encoded to.
    kept = torch.where(table == -1, 0, table)
    x = torch.cat((kept, -kept if signed else kept)).repeat(3)[None, :]
    codes, scale = encode(x, bits, signed=signed)
    torch.testing.assert_close(decode(codes, scale, x.shape[1], bits, signed=signed), x, rtol=2**-22, atol=0)


@given(
    st.integers(1, 3), st.integers(1, 700), st.sampled_from([8, 4]), st.booleans(), st.integers(-30, 30), st.integers(0)
)
def test_numbers_are_off_by_half_of_what_levels_are_apart_at_most(rows, columns, bits, signed, exponent, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    x = torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator) ** 4
    x[:, ::50] *= 100
    x = x * 2.0**exponent
    x = x if signed else x.square()
    codes, scale = encode(x, bits, signed=signed)
    assert codes.shape == (rows, columns if bits == 8 else -(-columns // 2))
    found = decode(codes, scale, columns, bits, signed=signed).double()
    unit = scale.double().repeat_interleave(BLOCKS[bits], 1)[:, :columns]
    # What the finest of an octave's levels, and the lowest of all, are apart by.
    if bits == 4 and not signed:
        apart = torch.full_like(unit, 1 / 16)
        # There is none below the first.
        apart[(x / unit) < 1 / 16] = 2 / 16
    else:
        magnitude_bits = bits - signed
        octave = (x.abs().double() / unit).clamp_min(8.0**-magnitude_bits).log2().div(3).floor()
        apart = 8**octave * 7 / 2 ** (octave + magnitude_bits)
        apart = torch.where(x.abs() / unit < 8.0**-magnitude_bits, 2 * 8.0**-magnitude_bits, apart)
    assert ((found - x.double()).abs() <= unit * apart * 0.5 * (1 + 1e-4)).all()
    # The largest of each block is itself.
    most = torch.nn.functional.pad(x.abs(), (0, -columns % BLOCKS[bits])).view(rows, -1, BLOCKS[bits]).amax(-1)
    top = torch.nn.functional.pad(found.abs(), (0, -columns % BLOCKS[bits])).view(rows, -1, BLOCKS[bits]).amax(-1)
    torch.testing.assert_close(top.float(), most, rtol=2**-21, atol=0)


@pytest.mark.parametrize("maximize", [False, True])
def test_states_of_32_bits_are_torchs(maximize):
    mine, theirs = model(), model()
    groups = [list(m[:2].parameters()) for m in (mine, theirs)], [list(m[2:].parameters()) for m in (mine, theirs)]
    made = []
    for i, cls in enumerate((AdamW, torch.optim.AdamW)):
        options = [{"params": groups[0][i], "lr": 0.03}, {"params": groups[1][i], "weight_decay": 0.5}]
        made.append(cls(options, betas=(0.8, 0.95), eps=1e-6, maximize=maximize, **({} if i else {"bits": 32})))
    for step in range(20):
        for m, optimizer in zip((mine, theirs), made, strict=True):
            with_gradients(m.parameters(), step)
            optimizer.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    saved = made[1].state_dict()["state"]
    for i, state in made[0].state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(state[name], saved[i][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("bits", "least"), [(8, 20), (4, 4)])
def test_rounded_states_follow_those_of_float64(bits, least):
    """Gradients whose columns differ a hundredfold, for 50 steps, by the change of the parameters.

    Of 4 bits a square is a sixteenth of the block's largest at least, and steps of small gradients are shorter for it.
    """
    torch.manual_seed(0)
    start = torch.randn(64, 512)
    p, exact = nn.Parameter(start.clone()), nn.Parameter(start.double())
    mine, theirs = AdamW([p], lr=1e-2, bits=bits), torch.optim.AdamW([exact], lr=1e-2)
    scale = torch.randn(512).exp()
    for _ in range(50):
        grad = (torch.randn(64, 512) + 0.5) * scale
        p.grad, exact.grad = grad, grad.double()
        mine.step()
        theirs.step()
    found, wanted = (each.detach().double() - start.double() for each in (p, exact))
    assert decibels(wanted, found) > least


def test_small_steps_of_bfloat16s_are_lost_to_nearest_and_kept_by_chance():
    changes = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=2**-12, weight_decay=0.0, rounding=rounding)
        for _ in range(64):
            p.grad = torch.ones_like(p)
            optimizer.step()
        changes[rounding] = float((1 - p.detach().float()).mean())
    assert changes["nearest"] == 0
    # 64 steps of 2^-12, each of 16384 numbers a draw.
    assert changes["stochastic"] == pytest.approx(64 * 2**-12, rel=0.02)


@pytest.fixture(scope="module")
def several():
    with ranks(3) as started:
        yield started


@pytest.mark.parametrize("bits", [8, 4, 32])
def test_ranks_with_a_share_of_the_rows_have_the_states_that_one_has(several, bits):
    wanted, states = stepped(False, bits, 3)
    for found, of_ranks in several.run(stepped, True, bits, 3):
        assert all(map(torch.equal, found, wanted))
        for one, other in zip(of_ranks, states, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bits", [8, 4, 32])
def test_what_was_saved_goes_on_as_if_nothing_had_happened(bits):
    whole, _ = stepped(False, bits, 3)
    torch.manual_seed(0)
    m = model()
    optimizer = AdamW(m.parameters(), lr=0.01, bits=bits)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        for p in m.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * torch.randn(p.shape[-1:], generator=generator).exp()
        optimizer.step()
        saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
        optimizer = (copy.deepcopy if step == 1 else lambda each: each)(AdamW(m.parameters(), lr=0.5, bits=bits))
        if step == 1:
            # A copy's parameters are copies.
            m = copy.deepcopy(m)
            optimizer = AdamW(m.parameters(), lr=0.5, bits=bits)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.01
    assert all(map(torch.equal, [p.detach() for p in m.parameters()], whole))


@pytest.mark.parametrize("to", [8, 4, 32])
@pytest.mark.parametrize("of", [8, 4, 32, "torch"])
def test_states_of_one_width_are_taken_by_another(of, to):
    m = model()
    first = torch.optim.AdamW(m.parameters()) if of == "torch" else AdamW(m.parameters(), bits=of)
    for step in range(3):
        with_gradients(m.parameters(), step)
        first.step()
    second = AdamW(m.parameters(), bits=to)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["bits"] == to
    # Through 32 bits, which torch's own takes.
    third, plain = AdamW(m.parameters(), bits=32), torch.optim.AdamW(m.parameters())
    third.load_state_dict(second.state_dict())
    plain.load_state_dict(third.state_dict())
    exact = AdamW(m.parameters(), bits=32)
    exact.load_state_dict(first.state_dict())
    for p in m.parameters():
        for name, least in (("exp_avg", {8: 35, 4: 12, 32: 300}[to]), ("exp_avg_sq", {8: 40, 4: 12, 32: 300}[to])):
            assert decibels(exact.state[p][name], plain.state[p][name]) > least
        assert float(plain.state[p]["step"]) == 3


def test_a_step_is_the_same_wherever_numbers_lie():
    """Parameters and gradients with gaps, without a gradient, of no numbers, and a scalar; and gradients that move."""
    torch.manual_seed(0)
    start = torch.randn(80, 96)
    plain = nn.Parameter(start.clone())
    apart = nn.Parameter(start.T.contiguous().T)
    idle, empty, scalar = (nn.Parameter(torch.randn(shape)) for shape in ((3, 70), (0, 70), ()))
    optimizer = AdamW([plain, idle, empty, scalar], lr=0.1)
    other = AdamW([apart], lr=0.1)
    before, kept = scalar.item(), idle.detach().clone()
    for step in range(3):
        grad = torch.randn(80, 96, generator=torch.Generator().manual_seed(step))
        plain.grad, apart.grad = grad.clone(), grad.T.contiguous().T
        empty.grad, scalar.grad = torch.zeros(0, 70), torch.ones(())
        assert optimizer.step(lambda: 7.0) == 7.0
        other.step()
    assert torch.equal(plain, apart)
    assert torch.equal(idle, kept)
    assert idle not in optimizer.state or not optimizer.state[idle]
    assert scalar.item() == pytest.approx(before - 0.3, abs=0.01 + 0.003 * abs(before))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits=5; needed is 8, 4 or 32"),
        ({"rounding": "up"}, "rounding of parameters"),
        ({"lr": -1.0}, "lr=-1.0; needed is at least 0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"amsgrad": True}, "no amsgrad"),
        ({"differentiable": True}, "not differentiable"),
    ],
)
def test_what_it_has_not_is_refused(options, words):
    with pytest.raises(FormatError, match=words):
        AdamW([nn.Parameter(torch.zeros(2, 2))], **options)
    with pytest.raises(FormatError, match="parameters of AdamW are float32"):
        AdamW([nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))])


def test_states_that_are_not_these_are_refused_before_anything_changes():
    p = nn.Parameter(torch.zeros(4, 70))
    with_gradients([p])
    optimizer = AdamW([p])
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    odd = nn.Parameter(torch.zeros(4, 80))
    with_gradients([odd])
    for other in (AdamW([odd]), torch.optim.SGD([p], momentum=0.9), torch.optim.AdamW([p], amsgrad=True)):
        other.step()
        with pytest.raises(FormatError, match="was saved as|needed are those of AdamW"):
            optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][0][name], part) for name, part in before["state"][0].items())
    table = nn.Embedding(5, 70, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(FormatError, match=r"parameters \[0\] have sparse gradients"):
        AdamW(table.parameters()).step()
