"""Training through rounding: values and gradients by their equations, and the converted graph beside the trained one."""

from __future__ import annotations

import copy

import pytest
import torch
from test_carrying import carried, exported, sqnr
from test_passes import Nested
from torch import nn
from torch._higher_order_ops.scan import scan

import lowbit
from lowbit import Recipe, Rule
from lowbit.format import Format
from lowbit_pt2e import GraphError, convert, fold_norms, lower_to_onednn, prepare, prepare_qat
from lowbit_pt2e.codes import DECODE, ENCODE
from lowbit_pt2e.training import FakeQuantize

STATIC = "static:INT8_TENSOR_ASYM"
UNSIGNED = "uint8:*x*:float32:zero=uint8"


@pytest.mark.parametrize("spec", ["INT8_TENSOR", "INT8_TENSOR_ASYM", "FP8_TENSOR"])
def test_values_are_those_of_codes_and_gradients_those_of_the_equation(spec):
    torch.manual_seed(0)
    x = (torch.randn(7, 33) * 3).requires_grad_()
    fake = FakeQuantize(Format.parse(spec), (1, 1), lowbit.observer.MinMax())
    fake(x * 0.5)
    fake.observing = False
    scale, zero = fake.scale.item(), int(fake.zero)
    found, grad = fake(x), torch.randn(7, 33)
    assert torch.equal(found, DECODE(ENCODE(x.detach(), scale, zero, spec), scale, zero, torch.float32))
    found.backward(grad)
    element = Format.parse(spec).element
    low, high = element.min - zero, element.max - zero
    steps = x.detach().double() / scale
    inside = (steps >= low) & (steps <= high)
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(x.grad, torch.where(inside, grad, 0))
    rounded = found.detach().double() / scale
    each = torch.where(inside, rounded - steps, steps.clamp(low, high))
    wanted = (grad * each).sum() / (x.numel() * element.max) ** 0.5
    torch.testing.assert_close(fake.scale.grad.double().sum(), wanted, rtol=1e-4, atol=1e-6)


def test_rows_of_a_weight_learn_a_scale_each():
    torch.manual_seed(0)
    weight, fmt = torch.randn(3, 64), Format.parse("int4:1x32:float32")
    fake = FakeQuantize(fmt, (3, 2))
    assert torch.equal(fake(weight), lowbit.quantize(weight, fmt).dequantize())
    fake.observing = False
    fake.scale.data *= 0.7
    found = fake(weight)
    assert torch.equal(found, lowbit.quantize(weight, fmt, fake.scale.detach()).dequantize())
    found[1].sum().backward()
    assert fake.scale.grad[[0, 2]].eq(0).all()
    assert fake.scale.grad[1].ne(0).all()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.relu, self.flatten, self.head = nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)

    def forward(self, x):
        return self.head(self.flatten(self.relu(self.norm(self.conv(x)))))


def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1, 8, 8, generator=generator)
    return x, (x.flatten(1) @ torch.randn(64, 10, generator=generator)).argmax(1)


def train(module, x, y, steps, freeze=None):
    best = torch.optim.AdamW(module.parameters(), 5e-3)
    for i in range(steps):
        if i == freeze:
            module.freeze_observers()
        loss = nn.functional.cross_entropy(module(x), y)
        best.zero_grad()
        loss.backward()
        best.step()
    return loss.item()


def test_a_trained_graph_is_what_it_becomes_and_better_than_one_that_only_rounds():
    torch.manual_seed(0)
    (x, y), model = task(), Model()
    train(model, x, y, 60)
    recipe = Recipe((Rule.of("*", "int4:1x*:float32", activation=STATIC),))
    plain = exported(model.eval(), x)
    fold_norms(plain)
    with torch.no_grad():
        prepared = prepare(plain, recipe)
        prepared(x)
        convert(prepared)
        rounded = nn.functional.cross_entropy(plain(x), y).item()
    graph = exported(model.eval(), x)
    fold_norms(graph)
    learning = prepare_qat(graph, recipe)
    names = [name for name, _ in learning.named_parameters()]
    assert [name for name in names if "scale" in name] == [
        *("inputs.0.scale", "inputs.1.scale", "weights.0.scale", "weights.1.scale")
    ]
    before = {name: held.detach().clone() for name, held in learning.named_parameters()}
    train(learning, x, y, 40, freeze=10)
    assert all(not torch.equal(held, before[name]) for name, held in learning.named_parameters())
    # What was trained is loaded elsewhere, and is what it was.
    other = exported(model.eval(), x)
    fold_norms(other)
    again = prepare_qat(other, recipe)
    again.load_state_dict(learning.state_dict())
    with torch.no_grad():
        exact = learning(x)
        assert torch.equal(again(x), exact)
        convert(learning)
        assert sqnr(exact, graph(x)) > 100
        assert nn.functional.cross_entropy(graph(x), y).item() < 0.5 * rounded


def test_int8_that_was_trained_runs_on_onednn():
    torch.manual_seed(0)
    (x, y), model = task(), Model()
    graph = exported(model.eval(), x)
    fold_norms(graph)
    learning = prepare_qat(graph, Recipe((Rule.of("*", "INT8_ROW", activation=STATIC),)))
    train(learning, x, y, 12, freeze=4)
    with torch.no_grad():
        exact = learning(x)
        convert(learning)
        report = lower_to_onednn(graph)
        assert not report.refused
        assert sqnr(exact, graph(x)) > 60


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("INT4_G32", None),
        ("FP8_ROW", "dynamic:FP8_ROW"),
        ("MXFP8", "dynamic:MXFP8"),
        ("FP8_ROW", "static:FP8_TENSOR"),
        ("NVFP4", "local:NVFP4"),
    ],
)
def test_any_format_is_trained_through(weight, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.randn(32, 64), torch.arange(32) % 10
    graph = exported(model, x)
    learning = prepare_qat(graph, Recipe((Rule.of("*", weight, activation=activation),)))
    first = train(learning, x, y, 1)
    assert train(learning, x, y, 15, freeze=5) < 0.8 * first
    with torch.no_grad():
        exact = learning(x)
        convert(learning)
        assert sqnr(exact, graph(x)) > 90


def test_loops_and_branches_are_trained_with_what_they_carry_in_codes():
    torch.manual_seed(0)
    model, x = Nested(), torch.randn(3, 4)
    graph = exported(model.eval(), x)
    fold_norms(graph)
    learning = prepare_qat(graph, Recipe((Rule.of("*", "INT8_ROW", activation=STATIC),)))
    wanted = torch.randn(3, 4)
    best = torch.optim.AdamW(learning.parameters(), 1e-2)
    losses = []
    for i in range(12):
        if i == 4:
            learning.freeze_observers()
        loss = (learning(x) - wanted).square().mean() + 0 * learning(-x).sum()
        best.zero_grad()
        loss.backward()
        best.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(held.grad is not None and held.grad.ne(0).any() for _, held in graph.named_parameters())
    with torch.no_grad():
        exact = learning(x)
        convert(learning)
        found = carried(graph)
        assert found["while_loop_body"][1] == found["while_loop_body"][-1] == "int8"
        assert found["scan"][0] == found["scan"][-2] == "int8"
        assert found["true"][0] == found["true"][-1] == found["false"][-1] == "int8"
        assert sqnr(exact, graph(x)) > 60


def test_rows_that_a_scan_carries_too_are_what_they_become():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one = nn.Linear(8, 8)

        def forward(self, x):
            def step(carry, row):
                found = (self.one(carry) + row.sum()).tanh()
                return found, found.clone()

            return scan(step, x, x)[1]

    x = torch.randn(8, 8)
    graph = exported(Model(), x)
    learning = prepare_qat(graph, Recipe((Rule.of("*", "INT8_ROW", activation=STATIC),)))
    with torch.no_grad():
        learning(x)
        learning(3 * x)
        learning.freeze_observers()
        exact = learning(x)
        convert(learning)
        assert sqnr(exact, graph(x)) > 60


def test_unsigned_codes_empty_batches_and_copies():
    torch.manual_seed(0)
    x = torch.randn(16, 4, 6, 6) - 2
    graph = exported(nn.Conv2d(4, 4, 3), x)
    learning = prepare_qat(graph, Recipe((Rule.of("*", "INT8_ROW", activation=f"static:{UNSIGNED}"),)))
    with torch.no_grad():
        learning(x)
        other = copy.deepcopy(learning)
        assert torch.equal(other(x), learning(x))
        (rounds,) = learning.inputs
        assert rounds(x[:0]).shape == (0, 4, 6, 6)
        learning.freeze_observers()
        exact = learning(x)
        convert(learning)
        assert sqnr(exact, graph(x)) > 100
        with pytest.raises(GraphError, match="converted before"):
            convert(learning)
        convert(other)
        assert torch.equal(other.model(x), graph(x))


def test_norms_train_until_they_are_frozen():
    torch.manual_seed(0)
    (x, y), model = task(), Model()
    with torch.no_grad():
        graph = torch.export.export(model.train(), (x,)).module()
    learning = prepare_qat(graph, Recipe((Rule.of("*", "INT8_ROW", activation=STATIC),)))
    mean = graph.get_buffer("norm.running_mean").clone()
    train(learning, x, y, 3)
    assert not torch.equal(graph.get_buffer("norm.running_mean"), mean)
    with pytest.raises(GraphError, match=r"batch_norm normalizes by the statistics of each batch; freeze_norms\(\)"):
        convert(learning)
    learning.freeze_norms()
    mean = graph.get_buffer("norm.running_mean").clone()
    train(learning, x, y, 3, freeze=0)
    assert torch.equal(graph.get_buffer("norm.running_mean"), mean)
    with torch.no_grad():
        exact = learning(x)
        convert(learning)
        assert sqnr(exact, graph(x)) > 100
