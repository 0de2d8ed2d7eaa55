"""`lowbit bench ffn`, `experts`, `wgrad` and `optimizer`: what is exact, and how far what is compared may be from it."""

from __future__ import annotations

import math
import sys
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lowbit.backends import Refusal
from lowbit.bench import Given, command, peers, sqnr
from lowbit.bench.case import footprint
from lowbit.bench.ceilings import Ceilings
from lowbit.bench.measure import measure
from lowbit.bench.timing import Timing
from lowbit_moe import grouped_mm, linear
from lowbit_moe.bench import layers, optimizer

CPU = torch.device("cpu")
BENCHMARKS = {
    "experts": layers.experts,
    "ffn": layers.ffn,
    "optimizer": optimizer.benchmark,
    "wgrad": layers.wgrad,
}
# Sizes that are no multiple of each other or of a recipe's groups; of the experts one has no rows.
FFN, EXPERTS = (37, 96, 160), (37, 96, 160, 12)
LAYERS = [pytest.param(layers.ffn, FFN, id="ffn"), pytest.param(layers.experts, EXPERTS, id="experts")]
WGRAD = pytest.param(layers.wgrad, EXPERTS, id="wgrad")
NEAREST = "lowbit, parameters to nearest"


def cases(benchmark, *shape, peers=False):
    return list(benchmark.cases(Given([shape], [], CPU, peers)))


def ran(contender, data):
    return contender.run(*contender.prepare(*data)(0))


def result(contender, data):
    return contender.decode(ran(contender, data))


def module(monkeypatch, name, **holds):
    found = ModuleType(name)
    vars(found).update(holds)
    monkeypatch.setitem(sys.modules, name, found)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Peers of optimizers that need a GPU are built."""
    monkeypatch.setattr(peers, "_on_gpu", lambda device, build: build)


@pytest.fixture
def ends(monkeypatch):
    """The ends of groups that each of lowbit's products of experts was given."""
    seen = []

    def kept(x, weight, offs, *, recipe):
        seen.append(offs.tolist())
        return grouped_mm(x, weight, offs, recipe=recipe)

    monkeypatch.setattr(layers, "grouped_mm", kept)
    return seen


def joined(out, to_x, *to_weights):
    """All in a row, gradients of weights over the root of the number of tokens."""
    return torch.cat([part.flatten() for part in (out, to_x, *(each / math.sqrt(len(out)) for each in to_weights))])


def gated(grad, x, gate, up, down):
    """`down(silu(gate(x)) * up(x))` and its gradients, by hand."""
    a, b = x @ gate.T, x @ up.T
    s = 1 / (1 + (-a).exp())
    hidden, to_hidden = a * s * b, grad @ down
    to_a, to_b = to_hidden * b * s * (1 + a * (1 - s)), to_hidden * a * s
    return joined(hidden @ down.T, to_a @ gate + to_b @ up, to_a.T @ x, to_b.T @ x, grad.T @ hidden)


def one_by_one(grad, x, weight, ends):
    """Each token by its expert's weight, and its gradients."""
    out, to_x, to_weight = torch.zeros_like(grad), torch.zeros_like(x), torch.zeros_like(weight)
    for t in range(len(x)):
        e = next(i for i, end in enumerate(ends) if t < end)
        out[t], to_x[t] = weight[e] @ x[t], weight[e].T @ grad[t]
        to_weight[e] += torch.outer(grad[t], x[t])
    return joined(out, to_x, to_weight)


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_drawn_shapes_are_the_same_for_a_seed_and_in_their_ranges(name, device):
    benchmark = BENCHMARKS[name]
    shapes = benchmark.shapes(0, device, [])
    assert shapes == benchmark.shapes(0, device, [])
    assert shapes != benchmark.shapes(1, device, [])
    for shape in [*shapes, *benchmark.usual(device)]:
        for dim, length in zip(benchmark.dims, shape, strict=True):
            assert dim.low <= length <= max(dim.high if device == "cuda" else dim.high_on_cpu, dim.low)
            assert length % 32 == 0 or not dim.grouped


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = capsys.readouterr().out
    for name, found in BENCHMARKS.items():
        assert f"  {name:<10} {found.about}\n" in said


@pytest.mark.parametrize("name", BENCHMARKS)
def test_formats_are_refused(capsys, name):
    with pytest.raises(SystemExit):
        command.main([name, "--device", "cpu", "--formats", "MXFP8"])
    assert "--formats: this benchmark has no formats" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_the_exact_layer_is_that_of_formulas_in_float64(kind):
    for case in cases(layers.ffn, *FFN):
        data = case.data(kind)
        wanted = gated(*(part.double() for part in data))
        torch.testing.assert_close(case.exact(*data).double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert sqnr(wanted, case.exact(*data)) > 120


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_exact_experts_are_those_of_one_token_after_the_other(ends, kind):
    for case in cases(layers.experts, *EXPERTS):
        data = case.data(kind)
        ran(case.candidate, data)
        assert 0 in torch.tensor([0, *ends[-1]]).diff()
        wanted = one_by_one(*(part.double() for part in data), ends[-1])
        assert sqnr(wanted, case.exact(*data)) > 120


def test_groups_are_uneven_and_the_same_each_time(ends):
    for shape in ((64, 32, 32, 6), (640, 32, 32, 6)):
        for case in cases(layers.experts, *shape) + cases(layers.experts, *shape):
            ran(case.candidate, case.data("normal"))
        assert ends == ends[:1] * 10
        sizes = torch.tensor([0, *ends[0]]).diff()
        assert int(sizes.min()) >= 0
        assert int(sizes.sum()) == shape[0]
        assert int(sizes.max()) > 1.5 * shape[0] / 6
        ends.clear()


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_the_exact_gradient_of_experts_is_a_sum_over_their_tokens(monkeypatch, kind):
    uneven, ends = layers._uneven, []
    monkeypatch.setattr(layers, "_uneven", lambda *given: ends.append(uneven(*given)) or ends[-1])
    found = cases(layers.wgrad, *EXPERTS)
    assert [case.told["recipe"] for case in found] == ["FP8_ROW", "FP8_BLOCK", "MXFP8", "NVFP4"]
    for case, each in zip(found, ends, strict=True):
        grad, x = (part.double() for part in case.data(kind))
        starts = [0, *each.tolist()]
        pieces = [slice(*span) for span in pairwise(starts)]
        torch.testing.assert_close(
            case.exact(grad, x), torch.stack([torch.einsum("tn,tk->nk", grad[rows], x[rows]) for rows in pieces])
        )


@pytest.mark.parametrize(("benchmark", "shape"), [*LAYERS, WGRAD])
@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_bfloat16_and_recipes_are_as_near_to_the_exact_result_as_their_formats(benchmark, shape, kind):
    for case in cases(benchmark, *shape):
        torch.manual_seed(0)
        data = case.data(kind)
        exact, recipe = case.exact(*data), case.told["recipe"]
        assert 40 < sqnr(exact, result(case.baseline, data)) < 60
        found = sqnr(exact, result(case.candidate, data))
        if "FP8" in recipe:
            assert 15 < found < 40
        elif kind == "normal":
            # Beside an outlier blocks of 16 numbers keep nothing else: how near it is then depends on where they are.
            assert 8 < found < 20


def spread(part):
    """A tensor times powers of two that no format holds all of."""
    powers = torch.randint(-16, 4, part.shape, generator=torch.Generator().manual_seed(len(part)))
    return part * powers.to(part.dtype).exp2()


def test_a_layer_is_computed_by_the_recipe_that_its_case_tells():
    outs = []
    for case in cases(layers.ffn, *FFN):
        _, x, gate, up, down = data = tuple(map(spread, case.data("normal")))
        by = partial(linear, recipe=case.told["recipe"])
        outs.append(ran(case.candidate, data)[0])
        assert torch.equal(outs[-1], by(functional.silu(by(x, gate)) * by(x, up), down))
    # So that no other recipe would have passed for it.
    assert len({tuple(out.flatten().tolist()) for out in outs}) == len(outs) == 5


def test_experts_are_computed_by_the_recipe_that_their_case_tells(ends):
    outs, off = [], {}
    for case in cases(layers.experts, *EXPERTS):
        _, x, weight = data = tuple(map(spread, case.data("normal")))
        found, wanted = ran(case.candidate, data), ran(case.baseline, data)
        offs = torch.tensor(ends[-1], dtype=torch.int32)
        assert torch.equal(found[0], grouped_mm(x, weight, offs, recipe=case.told["recipe"]))
        outs.append(found[0])
        off[case.told["recipe"]] = [sqnr(*pair) for pair in zip(wanted, found, strict=True)]
    # Those two differ in the gradient of weights alone.
    assert len({tuple(out.flatten().tolist()) for out in outs}) == len(outs) - 1 == 4
    assert off["FP8_ROW"][:2] == off["FP8_ROW_WGRAD_BF16"][:2]
    assert max(off["FP8_ROW"]) < 40 < off["FP8_ROW_WGRAD_BF16"][2]


@pytest.mark.parametrize(("benchmark", "shape"), LAYERS)
def test_operations_are_those_of_all_products_forward_and_backward(benchmark, shape):
    for case in cases(benchmark, *shape):
        with FlopCounterMode(display=False) as counter:
            case.exact(*case.data("normal"))
        assert case.flops == counter.get_total_flops()


def test_bytes_of_experts_are_those_of_three_products():
    for case in cases(layers.experts, *EXPERTS):
        grad, x, weight = data = case.data("normal")
        out, to_x, to_weight = ran(case.baseline, data)
        moved = footprint([(x, weight, out), (grad, weight, to_x), (grad, x, to_weight)])
        assert case.candidate.moved == case.baseline.moved == moved


@pytest.mark.parametrize(("benchmark", "shape"), LAYERS)
def test_copies_of_a_layer_are_their_own_and_may_be_run_again(benchmark, shape):
    case = cases(benchmark, *shape)[0]
    data = case.data("normal")
    before = [part.clone() for part in data]
    for contender in (case.candidate, case.baseline):
        make = contender.prepare(*data)
        calls = [make(i) for i in range(3)]
        parts = [part for _, grad, x, weights in calls for part in (grad, x, *weights)]
        assert len({part.data_ptr() for part in parts}) == len(parts) == 3 * len(data)
        found = [contender.decode(contender.run(*call)) for call in (*calls, *calls)]
        assert all(torch.equal(each, found[0]) for each in found)
        assert all(map(torch.equal, data, before))


@pytest.mark.parametrize(
    ("benchmark", "shape", "names"),
    [
        (layers.ffn, FFN, {"FP8_TENSOR": "torchao float8 tensorwise", "FP8_ROW": "torchao float8 rowwise"}),
        (layers.experts, EXPERTS, {"FP8_ROW": "torchao fp8 rows"}),
    ],
)
def test_torchaos_layers_are_named_where_there_is_no_gpu(benchmark, shape, names):
    for case in cases(benchmark, *shape, peers=True):
        wanted = [name for recipe, name in names.items() if recipe == case.told["recipe"]]
        assert [str(peer) for peer in case.peers] == [f"{name}: needs an NVIDIA GPU; this is cpu" for name in wanted]
    assert all(case.peers == () for case in cases(benchmark, *shape))


def torchaos(name):
    """Torchao's layer beside one's case, built as on a GPU and run on the CPU."""
    contender, gpu = partial(layers._contender, CPU, moved=0.0), torch.device("cuda")
    if name == "experts":
        return layers._torchao_experts(torch.tensor([5, 5, 24, 37], dtype=torch.int32), contender, gpu)
    return layers._torchao_ffn(name, contender, gpu)


@pytest.mark.parametrize("name", ["FP8_TENSOR", "FP8_ROW", "experts"])
def test_torchaos_layers_are_named_where_it_is_missing(monkeypatch, name):
    for missing in ("torchao", "torchao.float8", "torchao.prototype.moe_training.fp8_grouped_mm"):
        monkeypatch.setitem(sys.modules, missing, None)
    refusal = torchaos(name)
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith("ModuleNotFoundError: ")


@pytest.mark.parametrize(("recipe", "asked"), [("FP8_TENSOR", "tensorwise"), ("FP8_ROW", "rowwise")])
def test_torchaos_gated_layer_is_the_one_that_it_exchanges_modules_of(monkeypatch, recipe, asked):
    """A module that stands for torchao's, whose layers give twice or three times as much."""
    times = {"tensorwise": 2, "rowwise": 3}

    def convert(layer, config):
        for each in layer.children():
            assert isinstance(each, torch.nn.Linear)
            each.register_forward_hook(lambda _, given, out: times[config] * out)
        return layer

    config = SimpleNamespace(from_recipe_name=lambda name: name)
    module(monkeypatch, "torchao.float8", Float8LinearConfig=config, convert_to_float8_training=convert)
    monkeypatch.setattr(torch, "compile", lambda layer, **_: layer)
    contender = torchaos(recipe)
    assert contender.name == f"torchao float8 {asked}"
    data = cases(layers.ffn, *FFN)[0].data("normal")
    before = [part.clone() for part in data]
    grad, x, gate, up, down = (part.double() for part in data)
    by = times[asked]
    # As if all weights were that much larger; of them gradients are larger once more.
    parts = gated(grad, x, by * gate, by * up, by * down).split([part.numel() for part in data])
    wanted = torch.cat((*parts[:2], *(by * part for part in parts[2:])))
    make = contender.prepare(*data)
    calls = [make(i) for i in range(2)]
    for call in calls:
        assert sqnr(wanted, contender.decode(contender.run(*call))) > 40
    assert all(map(torch.equal, data, before))
    weights = [weight.data_ptr() for _, _, _, held in calls for weight in held]
    assert len(set(weights)) == len(weights) == 6


def test_torchaos_experts_multiply_by_transposed_weights(monkeypatch):
    name = "torchao.prototype.moe_training.fp8_grouped_mm"

    def multiplied(x, weight, offs):
        ends = offs.tolist()
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        return torch.cat([rows @ each for rows, each in zip(x.split(sizes), weight, strict=True)])

    module(monkeypatch, name, _to_fp8_rowwise_then_scaled_grouped_mm=multiplied)
    data = cases(layers.experts, 37, 96, 160, 4)[0].data("normal")
    wanted = one_by_one(*(part.double() for part in data), [5, 5, 24, 37])
    assert sqnr(wanted, result(torchaos("experts"), data)) > 40


def stepped(values, gradients):
    """The change of parameters by torch's AdamW, plain and in float64."""
    parameter = torch.nn.Parameter(values.double())
    parameter.grad = gradients.double()
    torch.optim.AdamW([parameter], lr=1e-3, eps=1e-8, weight_decay=1e-2, foreach=False).step()
    return parameter.detach() - values


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_the_exact_step_is_torchs_in_float64(kind):
    found = cases(optimizer.benchmark, 5000)
    assert [case.told["bits"] for case in found] == [8, 4]
    for case in found:
        data = case.data(kind)
        torch.testing.assert_close(case.exact(*data), stepped(*data), rtol=1e-9, atol=1e-16)


# Of outliers, which are a hundredth, chance draws fewer.
@pytest.mark.parametrize(("kind", "within"), [("normal", 0.1), ("outliers", 1)])
def test_steps_are_exact_but_for_how_parameters_are_rounded(kind, within):
    for case in cases(optimizer.benchmark, 100_000):
        data = case.data(kind)
        wanted = stepped(*data)
        after = data[0] + wanted
        low = after.float().view(torch.int32) & -65536
        below, above = (ends.view(torch.float32).double() for ends in (low, low + 65536))
        noise = ((after - below) * (above - after)).sum()
        by_chance = 10 * math.log10(float(wanted.square().sum() / noise))
        to_nearest = sqnr(wanted, after.bfloat16() - data[0].double())
        assert by_chance < to_nearest - 3
        (nearest,) = case.peers
        assert sqnr(wanted, result(case.candidate, data)) == pytest.approx(by_chance, abs=within)
        assert sqnr(wanted, result(nearest, data)) == pytest.approx(to_nearest, abs=0.1)
        assert sqnr(wanted, result(case.baseline, data)) == pytest.approx(to_nearest, abs=0.1)


def test_the_optimizers_bytes_are_those_of_its_tensors(monkeypatch):
    # One layer of matrices of 256 columns and 1024, of whole blocks, and two norms.
    monkeypatch.setattr(optimizer, "_LAYERS", 1)
    count = 12 * 256**2 + 2 * 256
    for case in cases(optimizer.benchmark, count):
        data = case.data("normal")
        assert case.flops == 0
        assert case.baseline.moved == 14 * count
        for contender in (case.baseline, case.candidate, *case.peers):
            stepping, parameters, _ = contender.prepare(*data)(1)
            states = [part for state in stepping.state.values() for name, part in state.items() if name != "step"]
            gradients = [parameter.grad for parameter in parameters]
            # Norms have states of float32.
            less = 0 if contender is case.baseline else 2 * 256 * 8
            held = footprint((parameters, gradients, states))
            assert held - less <= contender.touched <= held
            moved = footprint((parameters, parameters, gradients, states, states))
            assert moved - 2 * less <= contender.moved <= moved


@pytest.mark.parametrize("count", [1, 31, 1000, 100_000, 1 << 20, 123_456_789, 1 << 29])
def test_parameters_are_so_many_in_tensors_of_many_shapes(count):
    shapes = optimizer._tensors(count)
    assert sum(math.prod(shape) for shape in shapes) == count
    if count >= 1 << 20:
        assert len(set(shapes)) >= 5
        assert {len(shape) for shape in shapes} == {1, 2}
        # None is most of it.
        assert max(map(math.prod, shapes)) < count / 2


def test_copies_of_an_optimizer_are_their_own_and_only_the_first_starts_from_zero():
    for case in cases(optimizer.benchmark, 50_000):
        data = case.data("normal")
        before = [x.clone() for x in data]
        for contender in (case.candidate, case.baseline, *case.peers):
            make = contender.prepare(*data)
            operands = [make(i) for i in range(3)]
            assert [len(stepping.state) > 0 for stepping, _, _ in operands] == [False, True, True]
            for each in operands:
                contender.run(*each)
            parts = [part for _, parameters, _ in operands for p in parameters for part in (p, p.grad)]
            assert len({part.data_ptr() for part in parts}) == len(parts)
            assert all(map(torch.equal, data, before))
            first, second, _ = (torch.cat([p.flatten() for p in parameters]) for _, parameters, _ in operands)
            assert not torch.equal(first, second)


def test_the_kernel_that_steps_is_told_where_there_is_one(monkeypatch):
    assert [case.candidate.kernel for case in cases(optimizer.benchmark, 64)] == [None, None]
    kernels = {"cpu": SimpleNamespace(name="some.adamw")}
    monkeypatch.setattr(optimizer, "kernel_for_steps", kernels.get)
    assert [case.candidate.kernel for case in cases(optimizer.benchmark, 64)] == ["some.adamw"] * 2


def test_others_optimizers_step_as_torchs_does(monkeypatch, as_on_gpu):
    module(monkeypatch, "bitsandbytes")
    module(monkeypatch, "bitsandbytes.optim", AdamW8bit=torch.optim.AdamW)
    module(monkeypatch, "torchao")
    module(monkeypatch, "torchao.optim", AdamW8bit=torch.optim.AdamW, AdamW4bit=torch.optim.AdamW)
    names = [NEAREST, "bitsandbytes AdamW8bit", "torchao AdamW8bit", "torchao AdamW4bit"]
    # Two states of a code each, and a float32 scale for each 256 codes of 8 bits, or 128 of 4.
    of_8, of_4 = 2 * 25_600 + 2 * 4 * 100, 25_600 + 2 * 4 * 200
    for case in cases(optimizer.benchmark, 25_600, peers=True):
        data = case.data("normal")
        assert [peer.name for peer in case.peers] == names
        own = of_8 if case.told["bits"] == 8 else of_4
        assert case.candidate.touched == 4 * 25_600 + own
        for peer, states in zip(case.peers, (own, of_8, of_8, of_4), strict=True):
            assert peer.moved == 6 * 25_600 + 2 * states
            assert peer.touched == 4 * 25_600 + states
            assert sqnr(case.exact(*data), result(peer, data)) > 30


def test_others_optimizers_are_named_with_the_reason_where_they_are_not(monkeypatch, as_on_gpu):
    for name in ("bitsandbytes", "bitsandbytes.optim", "torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    for case in cases(optimizer.benchmark, 64, peers=True):
        nearest, *found = case.peers
        assert nearest.name == NEAREST
        assert [peer.kernel for peer in found] == ["bitsandbytes AdamW8bit", "torchao AdamW8bit", "torchao AdamW4bit"]
        assert all(isinstance(peer, Refusal) and peer.reason.startswith("ModuleNotFoundError: ") for peer in found)
    for case in cases(optimizer.benchmark, 64):
        assert [peer.name for peer in case.peers] == [NEAREST]


@pytest.mark.parametrize(
    ("name", "shape"), [("ffn", FFN), ("experts", EXPERTS), ("wgrad", EXPERTS), ("optimizer", (5000,))]
)
def test_a_row_of_results_has_every_contenders_error_and_its_speed_over_the_baseline(monkeypatch, name, shape):
    monkeypatch.setattr("lowbit.bench.timing._ROTATED", 1)
    timing = Timing(1, 1, 1, 3, 1, 1, "rotated")
    ceilings = Ceilings(1e9, 1, 1e9, 1, "float32", timing, timing)
    case = cases(BENCHMARKS[name], *shape)[0]
    row = measure(case, CPU, ceilings, budget=0.001)
    ours, theirs, *others = row["contenders"]
    assert [each["name"] for each in others] == ([NEAREST] if name == "optimizer" else [])
    for kind in ("normal", "outliers"):
        data = case.data(kind)
        assert theirs["sqnr"][kind]["exact"] == sqnr(case.exact(*data), result(case.baseline, data))
        assert 0 < ours["sqnr"][kind]["exact"] < theirs["sqnr"][kind]["exact"]
    for each in (ours, theirs, *others):
        assert each["speedup"] == pytest.approx(theirs["seconds"] / each["seconds"])
        assert each["flops_per_s"] == pytest.approx(case.flops / each["seconds"])
