"""Starved experts are sent what came closest to being theirs: which tokens, what is known then, and what it gains."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from ranks import ranks
from torch import distributed, nn
from torch.nn import functional as F

import lowbit as lb
from lowbit import Recipe, Rule
from lowbit_algos import Method, calibrate_, walk
from lowbit_algos.blocks import Call
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Observing, Target
from lowbit_algos.moments import moments_of
from lowbit_algos.routing import top_up
from lowbit_algos.watch import Watch

E, TOP, K, N = 6, 2, 64, 96
STACKS = ("gate_up", "down")
RECIPE = Recipe(tuple(Rule.of(f"blocks.*.{name}", "int3:1x32:bfloat16") for name in STACKS))


class Moe(nn.Module):
    """Six experts, of which a token gets two; `kind` says what its router does besides."""

    def __init__(self, kind="plain"):
        super().__init__()
        self.router = nn.Linear(K, E)
        self.gate_up, self.down = nn.Parameter(torch.randn(E, 2 * N, K) / 8), nn.Parameter(torch.randn(E, K, N) / 10)
        if kind == "two":
            self.other = nn.Parameter(torch.randn(E, K))
        self.kind = kind

    def forward(self, x):
        rows = x.reshape(-1, K)
        weight = self.router.weight.double().float() if self.kind == "cast" else self.router.weight
        logits = F.linear(rows, weight, self.router.bias)
        if self.kind == "by rule":
            # Expert 0 gets these whatever the logits say.
            logits = logits.masked_fill((rows[:, :1] > 1) & (torch.arange(E) == 0), 1e4)
        share, chosen = logits.softmax(-1).topk(TOP)
        out = torch.zeros_like(rows)
        for e in range(E):
            token, place = (chosen == e).nonzero(as_tuple=True)
            gate, up = F.linear(rows[token], self.gate_up[e]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(gate) * up, self.down[e]) * share[token, place, None])
        return x + out.view(x.shape)


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def moe(kind="plain", starving=(-8.5, -7.5)):
    """Experts that tokens of six kinds go to; biases starve the first of them."""
    generator = torch.Generator().manual_seed(0)
    made = Moe(kind).eval()
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    # Each expert's hidden channels are large and small in an order of its own.
    for e in range(E):
        size = torch.logspace(0, -1, N)[torch.randperm(N, generator=generator)]
        made.gate_up.data[e] *= torch.cat((torch.ones(N), size))[:, None] * 3
    made.router.weight.data = kinds() * 0.5
    made.router.bias.data = torch.tensor([*starving, *[0.0] * (E - len(starving))])
    return made


def kinds():
    return torch.randn(E, K, generator=torch.Generator().manual_seed(7)) / 2


def tokens(batches=4, seed=1, length=80):
    """Batches (2, length, K) of tokens, each near one of six directions and spread in ways of its own kind's."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(E, K, K, generator=torch.Generator().manual_seed(8)) * torch.logspace(0, -2, K)
    found = []
    for _ in range(batches):
        kind = torch.randint(E, (2 * length,), generator=generator)
        noise = torch.einsum("tk,tjk->tj", torch.randn(2 * length, K, generator=generator), spread[kind])
        found.append((kinds()[kind] + 0.2 * noise).view(2, length, K))
    return found


@torch.no_grad()
def observe(block, batches, *, activation=None, least=None, more=True):
    """What is known of the stacks' inputs, with or without topping up."""
    targets = {name: Target(lb.Format.parse("INT4_G32"), activation) for name in STACKS}
    parameters = {name: block.get_parameter(name) for name in STACKS}
    seen, calls = Observing(parameters, targets, static="histogram", aware=True), [Call((None,), {}, 0)] * len(batches)
    for call, batch in zip(calls, batches, strict=True):
        seen.next_batch()
        with Watch(parameters, seen):
            call(block, batch)
    inputs = seen.finish()
    if more:
        top_up(block, inputs, targets, calls, Hidden.of(batches), {}, least=least)
    return inputs


def logits_of(block, batch):
    rows = batch.reshape(-1, K).double()
    return rows, rows @ block.router.weight.double().T + block.router.bias.double()


@torch.no_grad()
def closest(block, batches, counts, needed):
    """By expert, the rows that are sent to it besides, in float64: a plain statement of what is to happen."""
    sent = {e: [] for e in sorted(range(E), key=lambda e: counts[e]) if counts[e] < needed}
    for batch in batches:
        rows, logits = logits_of(block, batch)
        ordered = logits.sort(descending=True).values
        got = [0] * len(rows)
        for e, mine in sent.items():
            gaps = sorted((float(ordered[t, TOP - 1] - logits[t, e]), t) for t in range(len(rows)))
            able = [t for gap, t in gaps if gap > 0 and got[t] < TOP][: ceil((needed - counts[e]) / len(batches))]
            mine.append(rows[able])
            for t in able:
                got[t] += 1
    return {e: torch.cat(mine) for e, mine in sent.items()}


@torch.no_grad()
def through(block, e, rows):
    gate, up = (rows @ block.gate_up[e].double().T).chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("activation", [None, lb.Activation.parse("dynamic:INT8_ROW")])
def test_starved_experts_know_what_the_closest_tokens_tell(activation):
    block, batches = moe(), tokens()
    plain = observe(block, batches, activation=activation, more=False)
    fed = observe(block, batches, activation=activation)
    counts = plain["gate_up"].hessian.tokens.tolist()
    assert 0 < counts[0] < K > counts[1]
    assert all(count >= N for count in counts[2:])
    extra = closest(block, batches, counts, N)
    for name, needed in (("gate_up", K), ("down", N)):
        a, b = plain[name], fed[name]
        for e in range(E):
            parts = list(zip(a.by_expert(), b.by_expert(), strict=True))
            assert len(parts) == 2 if activation is None else 4
            if counts[e] >= needed:
                assert all(torch.equal(x[e], y[e]) for x, y in parts)
                continue
            x = extra[e] if name == "gate_up" else through(block, e, extra[e])
            q = x if activation is None else lb.quantize(x.float(), "INT8_ROW").dequantize().double()
            added = [q.T @ q, torch.tensor(len(x)), (x - q).T @ q, (x - q).square().sum(0)][: len(parts)]
            # A hidden value that is half way between two codes may go either way: one step, in one row.
            code = (
                float((x.abs().amax(1) / 127 * x.norm(dim=1)).amax()) * 2 * (activation is not None and name == "down")
            )
            for (old, new), more in zip(parts, added, strict=True):
                assert float((new[e] - old[e] - more).double().norm()) <= 1e-5 * float(more.double().norm()) + code
            assert int(b.hessian.tokens[e]) >= needed
        assert torch.equal(b.extra, b.hessian.tokens - a.hessian.tokens)
        assert torch.equal(a.channels.high, b.channels.high)
        # The mean fills what tokens of their own lack, as it does without.
        assert moments_of(b, None)[1] == tuple(e for e, count in enumerate(counts) if count < needed)
    # A stack takes what it needs itself.
    assert {e for e, count in enumerate(counts) if count < N} == set(fed["down"].extra.nonzero().flatten().tolist())


def run(batches, monkeypatch=None, blocks=1, **method):
    """A calibrated model, and what is told of its blocks."""
    model, told = Model([moe() for _ in range(blocks)]), []
    if monkeypatch is not None:
        monkeypatch.setattr(walk, "top_up", lambda *_, **__: None)
    calibrate_(model, RECIPE, batches, Method(**method), take=lambda block, _: told.append(block))
    if monkeypatch is not None:
        monkeypatch.undo()
    return model, told


def test_it_is_worth_it_and_touches_no_other(monkeypatch):
    block, batches = moe(), tokens()
    (better, told), (mean, before) = run(batches), run(batches, monkeypatch)
    first, other = told[0].layers[0], before[0].layers[0]
    assert (first.tokens, first.topped, first.starved) == (other.tokens, other.starved, other.starved)
    assert other.topped == ()
    assert 0 in first.topped
    # Held-out tokens that the model sends to the most starved.
    held = torch.cat([batch.reshape(-1, K) for batch in tokens(40, seed=2)])
    _, logits = logits_of(block, held)
    rows = held[(logits.topk(TOP).indices == 0).any(1)].double()
    assert len(rows) > 100

    @torch.no_grad()
    def outputs(values):
        """Of each matrix alone, and of the expert."""
        gate_up, down = (values(name).double() for name in STACKS)
        gate, up = (rows @ gate_up.T).chunk(2, -1)
        return rows @ gate_up.T, through(block, 0, rows) @ down.T, (F.silu(gate) * up) @ down.T

    original = outputs(lambda name: block.get_parameter(name)[0])
    made = [
        outputs(lambda name, model=model: model.blocks[0].get_parameter(name)[0].dequantize())
        for model in (better, mean)
    ]
    for true, a, b in zip(original, *made, strict=True):
        assert float((a - true).norm()) < 0.97 * float((b - true).norm())
    for layer in told[0].layers:
        name = layer.name.rpartition(".")[2]
        a, b = (model.blocks[0].get_parameter(name).dequantize() for model in (better, mean))
        assert {e for e in range(E) if not torch.equal(a[e], b[e])} == set(layer.topped)


@pytest.mark.parametrize("kind", ["cast", "two", "by rule"])
def test_where_no_router_is_found_all_stays(kind):
    block, batches = moe(kind), tokens()
    before, after = observe(block, batches, more=False), observe(block, batches, least=150)
    assert int(before["gate_up"].hessian.tokens[0]) < 150
    experts = [0] if kind == "by rule" else range(E)
    for name in STACKS:
        for a, b in zip(before[name].by_expert(), after[name].by_expert(), strict=True):
            assert all(torch.equal(a[e], b[e]) for e in experts)
        assert 0 in moments_of(after[name], 150)[1]


def test_an_expert_that_nobody_comes_near_never_stops_a_run():
    batches, far = tokens(), -torch.inf
    inputs = observe(moe(starving=(far, -7.5)), batches)
    assert inputs["down"].hessian.tokens[0] == 0
    assert moments_of(inputs["down"], None)[1] == (0, 1)
    model, told = Model([moe(starving=(far, -7.5))]), []
    calibrate_(model, RECIPE, batches, take=lambda block, _: told.append(block))
    assert [(layer.topped[0], layer.starved) for layer in told[0].layers] == [(1, (0, 1)), (1, (0, 1))]
    assert model(batches[0]).isfinite().all()


def test_where_all_are_starved_those_that_lack_least_take_what_is_sent_nowhere():
    block, batches = moe(), tokens(2, length=10)
    before, after = observe(block, batches, more=False), observe(block, batches)
    counts = before["down"].hessian.tokens.tolist()
    assert max(counts) < K
    least = sorted(range(E), key=lambda e: -counts[e])[:TOP]
    assert set((after["down"].extra == 0).nonzero().flatten().tolist()) == set(least)
    # Nobody sees a token twice.
    assert max(after["down"].hessian.tokens) <= 40
    run(batches)


@torch.no_grad()
def test_one_pass_feeds_the_next_block_what_the_original_makes():
    batches, block = tokens(), moe()
    both, told = run(batches, blocks=2, sequential=False)
    assert all(layer.topped for block in told for layer in block.layers)
    one, _ = run(batches)
    second, _ = run([block(batch) for batch in batches])
    for name in STACKS:
        for found, alone in ((both.blocks[0], one), (both.blocks[1], second)):
            assert torch.equal(found.get_parameter(name).dequantize(), alone.blocks[0].get_parameter(name).dequantize())


def on_a_rank():
    inputs = observe(moe(), tokens()[distributed.get_rank() :: 2])
    return {name: [*inputs[name].by_expert(), inputs[name].extra] for name in STACKS}


def test_two_ranks_know_what_one_knows():
    inputs = observe(moe(), tokens())
    with ranks(2) as two:
        first, second = two.run(on_a_rank)
    for name in STACKS:
        one = [*inputs[name].by_expert(), inputs[name].extra]
        for a, b, c in zip(first[name], second[name], one, strict=True):
            assert torch.equal(a, b)
            assert float((a - c).double().norm()) <= 1e-6 * float(c.double().norm())
        assert torch.equal(first[name][1], one[1])
