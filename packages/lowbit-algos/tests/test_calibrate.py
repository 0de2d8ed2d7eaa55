"""Block by block: what each weight is rounded by, what the next block is fed, and what becomes of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import ranks
from torch import distributed, nn
from torch.nn import functional as F

import lowbit as lb
from lowbit import FormatError, LowbitError, QuantizedTensor, Recipe, RecipeError, Rule
from lowbit.numerics import choose_scale, decode, encode
from lowbit_algos import Method, calibrate_, gptq
from lowbit_algos.blocks import capture, find_blocks
from lowbit_algos.gptq import Options

K = 64
ALL = Recipe((Rule.of("*", "INT4_G32"),))


class Experts(nn.Module):
    """Four experts of two matrices each; a token's is told by its first value."""

    def __init__(self, *, run="grouped"):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 96, K) / 8), nn.Parameter(torch.randn(4, K, 96) / 8)
        self.run = run

    def forward(self, x):
        rows = x.reshape(-1, K)
        expert = (rows[:, 0] > 0).long() * 2 + (rows[:, 1] > 0).long()
        order = expert.argsort(stable=True)
        rows = rows[order]
        ends = torch.bincount(expert, minlength=4).cumsum(0).to(torch.int32)
        if self.run == "grouped":
            hidden = F.grouped_mm(rows, self.up.transpose(-2, -1), offs=ends).relu()
            out = F.grouped_mm(hidden, self.down.transpose(-2, -1), offs=ends)
        else:
            starts = [0, *ends.tolist()]
            parts = [rows[starts[e] : starts[e + 1]] for e in range(4)]
            out = torch.cat([F.linear(F.linear(part, self.up[e]).relu(), self.down[e]) for e, part in enumerate(parts)])
        restored = torch.empty_like(out)
        restored[order] = out
        return restored.view(x.shape)


class Block(nn.Module):
    """Two siblings that share an input, and one that takes what comes of them; returns a tuple, as some do."""

    def __init__(self, experts=None):
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.q, self.k = nn.Linear(K, K), nn.Linear(K, K, bias=False)
        self.out = nn.Linear(K, K)
        self.experts = experts

    def forward(self, x, *, scale):
        h = self.norm(x)
        y = x + self.out(torch.tanh(self.q(h)) * self.k(h)) * scale
        return (y if self.experts is None else y + self.experts(y), "more")


class Model(nn.Module):
    def __init__(self, experts=(None, None)):
        super().__init__()
        self.embed = nn.Embedding(50, K)
        self.blocks = nn.ModuleList(Block(each) for each in experts)
        self.head = nn.Linear(K, 50)

    def forward(self, ids):
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x, _ = block(x, scale=1.0 + i)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def batches():
    return list(torch.randint(50, (4, 8, 16), generator=torch.Generator().manual_seed(1)))


def hessian(rows):
    x = rows.reshape(-1, rows.shape[-1]).float()
    return x.T @ x


def close(a, b, share=0.99):
    """Whether two quantized weights have the same scales and codes, but for a few whose sums were added up otherwise."""
    return float((a.dequantize() == b.dequantize()).float().mean()) >= share


@torch.no_grad()
def fed(model, batches, weight):
    """What the named weight of a plain model is multiplied with."""
    seen = []
    handle = model.get_submodule(weight).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(seen)


NAMES = ["blocks.0.q", "blocks.0.out", "blocks.1.q", "blocks.1.k", "blocks.1.out"]


@pytest.mark.parametrize("sequential", [True, False])
def test_weights_are_rounded_by_what_their_block_is_fed(model, batches, sequential):
    plain, options = copy.deepcopy(model), Options(act_order=False, scale_search=False)
    calibrate_(
        model, Recipe((Rule.of("blocks.*", "INT4_G32"),)), batches, Method(sequential=sequential, options=options)
    )
    # A plain model, whose weights become the quantized ones' values as far as the next has to see them.
    oracle = copy.deepcopy(plain)
    for name in ["blocks.0.q", "blocks.0.k", "blocks.0.out", "blocks.1.q", "blocks.1.k", "blocks.1.out"]:
        wanted = gptq(plain.get_submodule(name).weight, hessian(fed(oracle, batches, name)), "INT4_G32", **options)
        found = model.get_submodule(name).weight
        assert isinstance(found, QuantizedTensor)
        assert close(found, wanted), name
        assert close(found, gptq(plain.get_submodule(name).weight, torch.eye(K), "INT4_G32", **options)) is False
        if sequential and name == "blocks.0.out":
            for each in ("q", "k", "out"):
                oracle.blocks[0].get_submodule(each).weight = nn.Parameter(
                    model.blocks[0].get_submodule(each).weight.dequantize()
                )
    assert isinstance(model.embed.weight, nn.Parameter)
    assert not isinstance(model.embed.weight, QuantizedTensor)


def test_inputs_are_rounded_on_their_way_too(model, batches):
    activation = lb.Activation.parse("dynamic:INT8_ROW")
    recipe = Recipe((Rule.of("blocks.*", "INT8_ROW", activation=activation),))
    plain, told = copy.deepcopy(model), []
    calibrate_(model, recipe, batches, Method(rounding="nearest"), take=lambda block, _: told.append(block))
    with torch.no_grad():
        signal = noise = 0.0
        captured = []
        plain.head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        model.head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        for batch in batches:
            plain(batch), model(batch)
            original, quantized = captured[-2:]
            signal += float(original.square().sum())
            noise += float((original - quantized).square().sum())
    # What the report says of the last block is what the model does when it runs for real.
    assert told[-1].sqnr == pytest.approx(10 * torch.log10(torch.tensor(signal / noise)).item(), abs=0.05)
    assert [block.name for block in told] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("aware", [True, False])
def test_hessians_are_of_rounded_inputs_where_asked(model, batches, aware):
    activation, options = "dynamic:int4:1x*:float32", Options(act_order=False, scale_search=False)
    plain = copy.deepcopy(model)
    recipe = Recipe((Rule.of("blocks.*", "INT4_G32", activation=activation),))
    calibrate_(model, recipe, batches, Method(activation_aware=aware, refit=False, options=options))
    x = fed(plain, batches, "blocks.0.q").reshape(-1, K)
    fmt = lb.Format.parse("int4:1x*:float32")
    scales = choose_scale(x, fmt)
    rounded = decode(encode(x, fmt, scales), fmt, scales, K)
    same = [close(model.blocks[0].q.weight, gptq(plain.blocks[0].q.weight, hessian(h), "INT4_G32", **options), 0.999)
            for h in (rounded, x)]  # fmt: skip
    assert same == [aware, not aware]


STATIC = ["static:int8:*x*:float32", "static:int8:*x*:float32:zero=int8", "static:e4m3fn:*x*:float32", "local:NVFP4"]


@pytest.mark.parametrize("activation", STATIC)
def test_static_activations_span_what_was_seen(model, batches, activation):
    weight = "NVFP4" if activation.startswith("local") else "INT8_ROW" if "int8" in activation else "FP8_ROW"
    plain = copy.deepcopy(model)
    recipe = Recipe((Rule.of("blocks.*", weight, activation=activation),))
    calibrate_(model, recipe, batches, Method(rounding="nearest", static="minmax", sequential=False))
    for name in NAMES:
        q, x = model.get_submodule(name).weight, fed(plain, batches, name)
        low, high, amax = float(x.min().clamp_max(0)), float(x.max().clamp_min(0)), float(x.abs().max())
        scale = float(q.act_scale)
        match activation:
            case "static:int8:*x*:float32":
                assert scale == pytest.approx(amax / 127.5, rel=1e-5)
            case "static:int8:*x*:float32:zero=int8":
                assert scale == pytest.approx((high - low) / 255, rel=1e-5)
                assert int(q.act_zero) == round(-128 - low / scale)
            case "static:e4m3fn:*x*:float32":
                assert scale == pytest.approx(amax / 448, rel=1e-5)
            case _:
                # The least power of two that brings block scales into e4m3fn's range.
                assert amax / 6 / 448 <= scale < amax / 6 / 224
    assert model(batches[0]).isfinite().all()


def test_siblings_share_what_engines_fuse(model, batches):
    model.blocks[0].k.weight.data *= 100
    calibrate_(model, Recipe((Rule.of("blocks.*", "NVFP4", activation="local:NVFP4"),)), batches)
    q, k, out = (model.blocks[0].get_submodule(name).weight for name in ("q", "k", "out"))
    assert q.tensor_scale.equal(k.tensor_scale)
    assert q.act_scale.equal(k.act_scale)
    assert not q.tensor_scale.equal(out.tensor_scale)
    assert float(k.tensor_scale) == float(lb.quantize(k.dequantize(), "NVFP4").tensor_scale)


def test_scales_of_inputs_hold_what_files_hold_of_them(model, batches):
    model.bfloat16()
    recipe = Recipe((Rule.of("blocks.*", "INT8_ROW", activation=STATIC[1]),))
    calibrate_(model, recipe, batches, Method(rounding="nearest"))
    scale = model.blocks[0].q.weight.act_scale
    assert scale.dtype == torch.float32
    assert scale.equal(scale.bfloat16().float())


@pytest.mark.parametrize("run", ["grouped", "one by one"])
def test_experts_are_rounded_by_their_own_tokens(batches, run):
    torch.manual_seed(0)
    model = Model([Experts(run=run)])
    plain, options, told = copy.deepcopy(model), Options(act_order=False, scale_search=False), []
    recipe = Recipe((Rule.of("blocks.*.experts.*", "INT4_G32"),))
    calibrate_(model, recipe, batches, Method(options=options, expert_tokens=1), take=lambda b, _: told.append(b))
    rows = fed(plain, batches, "blocks.0.experts").reshape(-1, K)
    expert = (rows[:, 0] > 0).long() * 2 + (rows[:, 1] > 0).long()
    for e in range(4):
        mine = rows[expert == e]
        assert told[0].layers[0].tokens[e] == len(mine)
        hidden = (mine @ plain.blocks[0].experts.up[e].T).relu()
        for name, x in (("up", mine), ("down", hidden)):
            weight = getattr(plain.blocks[0].experts, name)[e]
            wanted = gptq(weight, hessian(x), "INT4_G32", **options)
            assert close(getattr(model.blocks[0].experts, name)[e], wanted), (e, name)


def test_experts_that_saw_little_are_told_and_never_stop_a_run(batches):
    torch.manual_seed(0)
    model, told = Model([Experts()]), []
    model.blocks[0].experts.run = "one by one"
    # Every token has a positive first value, so two of four experts see none.
    model.blocks[0].out.bias.data[0] += 100
    plain = copy.deepcopy(model)
    recipe = Recipe((Rule.of("blocks.*.experts.*", "INT4_G32"),))
    calibrate_(model, recipe, batches, Method(expert_tokens=32), take=lambda b, _: told.append(b))
    up = told[0].layers[0]
    assert up.tokens[0] == up.tokens[1] == 0
    assert {0, 1} <= set(up.starved)
    assert model(batches[0]).isfinite().all()
    rows = fed(plain, batches, "blocks.0.experts").reshape(-1, K)
    shared = gptq(plain.blocks[0].experts.up[0], hessian(rows), "INT4_G32")
    assert close(model.blocks[0].experts.up[0], shared, 0.95)


class Loud(nn.Linear):
    """A Linear of the user's own."""

    def forward(self, x):
        return super().forward(x) + 0.5


def test_hooks_subclasses_and_ties_survive(model, batches):
    calls = []
    loud = Loud(K, K)
    model.blocks[0].q = loud
    loud.register_forward_hook(lambda *_: calls.append(1))
    model.head.weight = model.embed.weight
    model.blocks[1].q.weight = model.blocks[0].q.weight
    recipe = Recipe((Rule.of("blocks.*", "INT8_ROW"),))
    plan = calibrate_(model, recipe, batches)
    calls.clear()
    model(batches[0])
    assert calls
    assert model.blocks[0].q is loud
    assert isinstance(loud.weight, QuantizedTensor)
    assert model.blocks[1].q.weight is loud.weight
    assert model.head.weight is model.embed.weight
    assert {row.name for row in plan.rows if row.action == "quantize"} == {
        "blocks.0.q.weight", "blocks.0.k.weight", "blocks.0.out.weight", "blocks.1.k.weight", "blocks.1.out.weight",
    }  # fmt: skip


def test_what_lies_outside_the_blocks_is_rounded_to_nearest(model, batches):
    plain = copy.deepcopy(model)
    calibrate_(model, Recipe((Rule.of("*", "INT8_ROW", modules="Linear"),)), batches)
    assert torch.equal(model.head.weight.dequantize(), lb.quantize(plain.head.weight, "INT8_ROW").dequantize())


def test_a_model_without_blocks_is_one(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, 8))
    x = [torch.randn(64, K) for _ in range(2)]
    plain = copy.deepcopy(model)
    calibrate_(model, ALL, x)
    wanted = gptq(plain[2].weight, hessian(plain[:2](torch.cat(x)).detach()), "INT4_G32")
    assert close(model[2].weight, wanted)


def untouched(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


class Restless(Model):
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x * 1.5, scale=1.0)
        return x


class Skipping(Model):
    def forward(self, ids):
        return self.blocks[1](self.embed(ids), scale=1.0)


def test_what_cannot_be_calibrated_is_told_and_left(model, batches):
    problems = {
        "block blocks.1 is not fed what the block before it returned": (Restless(), batches, ALL),
        "block blocks.0 was not called once": (Skipping(), batches, ALL),
        "there are no batches": (model, [], ALL),
        "where inputs are not observed": (model, batches, Recipe((Rule.of("*", "INT8_ROW", activation=STATIC[0]),))),
    }
    for message, (given, data, recipe) in problems.items():
        before = copy.deepcopy(given.state_dict())
        with pytest.raises(LowbitError, match=message):
            calibrate_(given, recipe, data)
        assert untouched(given, before)
        assert all("forward" not in vars(module) for module in given.modules())


def test_bad_values_are_told_by_the_weights_name_and_nothing_changes(model, batches):
    before = copy.deepcopy(model.state_dict())
    model.blocks[1].norm.weight.data[3] = torch.nan
    before["blocks.1.norm.weight"][3] = torch.nan
    with pytest.raises(FormatError, match=r"blocks.1.q.weight, blocks.1.k.weight: the Hessian holds a NaN"):
        calibrate_(model, Recipe((Rule.of("blocks.*", "INT4_G32"),)), batches)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(model.state_dict().values(), before.values(), strict=True)
    )
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())


class Idle(Block):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(K, K)


def test_a_weight_that_is_never_used_is_told(batches):
    model = Model()
    model.blocks[0] = Idle()
    with pytest.raises(LowbitError, match="no product with spare.weight was seen"):
        calibrate_(model, Recipe((Rule.of("blocks.*", "INT4_G32"),)), batches)


def on_a_rank(name, learned=0):
    torch.manual_seed(0)
    whole = Model().eval()
    batches = list(torch.randint(50, (4, 8, 16), generator=torch.Generator().manual_seed(1)))
    rank = distributed.get_rank()
    calibrate_(whole, Recipe((Rule.of("blocks.*", name),)), batches[rank::2], Method(learned=learned))
    assert all(parameter.grad is None for parameter in whole.parameters())
    return {key: part.dequantize() for key, part in whole.named_parameters() if isinstance(part, QuantizedTensor)}


def test_two_ranks_make_what_one_makes(model, batches):
    calibrate_(model, Recipe((Rule.of("blocks.*", "INT4_G32"),)), batches)
    with ranks(2) as two:
        first, second = two.run(on_a_rank, "INT4_G32")
    assert set(first) == {f"blocks.{i}.{n}.weight" for i in range(2) for n in ("q", "k", "out")}
    for name, values in first.items():
        assert torch.equal(values, second[name])
        assert float((values == model.get_parameter(name).dequantize()).float().mean()) > 0.98


def test_two_ranks_learn_the_same(model, batches):
    calibrate_(model, Recipe((Rule.of("blocks.*", "int2:1x32:bfloat16"),)), batches)
    with ranks(2) as two:
        first, second = two.run(on_a_rank, "int2:1x32:bfloat16", 10)
    for name, values in first.items():
        assert torch.equal(values, second[name])
    solved = {name: part.dequantize() for name, part in model.named_parameters() if isinstance(part, QuantizedTensor)}
    assert any(float((values == solved[name]).float().mean()) < 0.98 for name, values in first.items())


def test_recipes_are_checked_before_anything_runs(model):
    with pytest.raises(RecipeError, match="matches no parameter|matches nothing"):
        calibrate_(model, Recipe((Rule.of("nothing.weight", "INT8_ROW"),)), [])


class Masked(nn.Module):
    """Blocks that are called with a mask and two tables of positions, made anew for each batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, K), nn.ModuleList(Looking() for _ in range(2))

    def forward(self, ids):
        x, n = self.embed(ids), ids.shape[1]
        mask, positions = torch.ones(n, n).tril(), torch.arange(n)[:, None] / 10
        for block in self.blocks:
            x = block(x, [mask], positions=(positions.sin(), positions.cos()))
        return x


class Looking(nn.Module):
    def forward(self, x, masks, positions):
        return masks[0] @ x * positions[0] + positions[1]


def test_what_batches_are_called_with_is_kept_once_where_it_is_equal():
    torch.manual_seed(0)
    model, fed = Masked(), []
    batches = [torch.randint(50, (2, n)) for n in (8, 8, 6, 8)]
    captured = capture(model, find_blocks(model), batches, keep=fed.append)
    assert not captured.hidden
    assert all(torch.equal(x, model.embed(ids)) for x, ids in zip(fed, batches, strict=True))
    held = [[(*call.args[1], *call.kwargs["positions"]) for call in calls] for calls in captured.calls]
    assert len({id(tensor) for calls in held for call in calls for tensor in call}) == 2 * 3
    for x, ids, first, second in zip(fed, batches, *captured.calls, strict=True):
        assert torch.equal(second(model.blocks[1], first(model.blocks[0], x)), model(ids))
