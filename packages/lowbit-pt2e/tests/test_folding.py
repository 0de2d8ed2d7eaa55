"""Norms folded into layers beside them: equal to what they were, or left with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowbit_pt2e import GraphError, fold_norms

NORMS = {torch.ops.aten.batch_norm.default, torch.ops.aten._native_batch_norm_legit_no_training.default}


def drawn(model):
    """Statistics and parameters as after training, by chance."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for part, low in (
                (module.running_mean, -1.0),
                (module.running_var, 0.2),
                (module.weight, -2.0),
                (module.bias, -1.0),
            ):
                if part is not None:
                    part.data.copy_(low + 2 * torch.rand(part.shape, generator=generator))
    return model.eval()


def exported(model, *inputs, decomposed=False):
    with torch.no_grad():
        program = torch.export.export(model, inputs)
    return (program.run_decompositions() if decomposed else program).module()


def norms(graph):
    """How many there are, in all graphs."""
    found = [graph, *(each for each in graph.modules() if each is not graph and isinstance(each, torch.fx.GraphModule))]
    return sum(node.target in NORMS for each in found for node in each.graph.nodes)


def folded(model, *inputs, left=0, decomposed=False):
    """The report, once the folded graph gives what the model gave, to rounding."""
    wanted = model(*inputs)
    graph = exported(model, *inputs, decomposed=decomposed)
    report = fold_norms(graph, inputs)
    torch.testing.assert_close(graph(*inputs), wanted, rtol=1e-4, atol=1e-5)
    assert norms(graph) == left
    assert len(report.refused) >= left
    for node in graph.graph.nodes:
        if node.op == "call_function":
            assert all(node.meta.get(name) is not None for name in ("val", "stack_trace", "nn_module_stack")), node
    # What is left can be exported once more, with the shapes that it says.
    again = exported(graph, *inputs)
    torch.testing.assert_close(again(*inputs), wanted, rtol=1e-4, atol=1e-5)
    for difference in report.differences.values():
        assert difference.sqnr > 90
    return report


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "2d, groups": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "2d, same": (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "1d, transposed": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "2d, transposed, groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "3d, transposed": (nn.ConvTranspose3d(4, 6, 2, stride=2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "plain": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "linear without bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (5, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_norm_is_folded_into_the_layer_before_it(name, decomposed):
    layer, norm, shape = CONVOLUTIONS[name]
    report = folded(drawn(nn.Sequential(layer, norm)), torch.randn(shape), decomposed=decomposed)
    assert len(report.changed) == 1
    assert "SQNR" in str(report)


def test_two_norms_after_one_another_are_folded_one_by_one():
    model = drawn(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)))
    assert len(folded(model, torch.randn(2, 3, 6, 6)).changed) == 2


class Turned(nn.Module):
    """A norm of a linear layer's channels, once these are dim 1, or of rows that a view made."""

    def __init__(self, way):
        super().__init__()
        self.linear, self.norm, self.way = nn.Linear(4, 6), nn.BatchNorm1d(6 if way != "steps" else 5), way

    def forward(self, x):
        y = self.linear(x)
        if self.way == "transpose":
            return self.norm(y.transpose(1, 2))
        if self.way == "permute":
            return self.norm(y.permute(0, 2, 1))
        if self.way == "view":
            return self.norm(y.reshape(-1, 6)).view(y.shape)
        return self.norm(y)


@pytest.mark.parametrize("way", ["transpose", "permute", "view"])
def test_turns_and_views_on_the_way_are_seen_through(way):
    assert len(folded(drawn(Turned(way)), torch.randn(3, 5, 4)).changed) == 1


def test_a_norm_of_other_channels_than_the_layers_is_left():
    """The third dimension of a linear layer's output: folding it was a wrong result without a word elsewhere."""
    (refused,) = folded(drawn(Turned("steps")), torch.randn(3, 5, 4), left=1).refused
    assert refused.reason == "it normalizes dim 1 of its layer's output, whose channels are dim 2"


class Twice(nn.Module):
    """A layer whose output, weight or norm has other uses."""

    def __init__(self, how):
        super().__init__()
        self.one, self.two, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        if how == "shared weight":
            self.two.weight = self.one.weight

    def forward(self, x):
        if self.how == "output":
            y = self.one(x)
            return self.first(y) + y
        if self.how == "two norms":
            y = self.one(x)
            return self.first(y) - self.second(y)
        if self.how == "called twice":
            return self.first(self.one(x)) + self.one(x.relu())
        if self.how == "weight":
            return self.first(self.one(x)) + self.one.weight.sum()
        return self.first(self.one(x)) + self.two(x.relu())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("output", "linear is used by batch_norm and add"),
        ("two norms", "linear is used by batch_norm and batch_norm_1"),
    ],
)
def test_a_layer_whose_output_has_another_use_is_left(how, reason):
    left = 2 if how == "two norms" else 1
    report = folded(drawn(Twice(how)), torch.randn(3, 4), left=left)
    assert {each.reason for each in report.refused} == {reason}


@pytest.mark.parametrize("how", ["called twice", "shared weight", "weight"])
def test_a_weight_with_another_use_is_folded_as_a_copy(how):
    assert len(folded(drawn(Twice(how)), torch.randn(3, 4)).changed) == 1


class Computed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(4, 6))
        self.bias, self.norm = nn.Parameter(torch.randn(6)), nn.BatchNorm1d(6)

    def forward(self, x):
        if self.how == "mm":
            return self.norm(torch.mm(x, self.weight))
        if self.how == "matmul":
            return self.norm(x @ self.weight)
        if self.how == "addmm":
            return self.norm(torch.addmm(self.bias, x, self.weight))
        if self.how == "scaled":
            return self.norm(torch.addmm(self.bias, x, self.weight, beta=2))
        return self.norm(x @ self.weight.tanh())


@pytest.mark.parametrize("how", ["mm", "matmul", "addmm"])
def test_products_with_constants_are_linear_layers(how):
    assert len(folded(drawn(Computed(how)), torch.randn(3, 4)).changed) == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [("scaled", "its layer scales what it adds"), ("tanh", "its layer's weight is computed or changed in the graph")],
)
def test_what_is_no_constant_is_left(how, reason):
    (refused,) = folded(drawn(Computed(how)), torch.randn(3, 4), left=1).refused
    assert refused.reason == reason


class Changing(nn.Module):
    """A layer whose weight or whose norm changes from call to call, here or in a branch."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.register_buffer("weight", torch.randn(4, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        if self.what == "weight":
            self.weight.add_(1)
        elif self.what == "view":
            self.weight.t()[0].mul_(2)
        elif self.what == "statistics":
            self.norm.running_mean.copy_(x.mean(0))
        return self.norm(nn.functional.linear(x, self.weight))


@pytest.mark.parametrize("what", ["weight", "view", "statistics"])
def test_what_changes_from_call_to_call_is_left(what):
    model, x = drawn(Changing(what)), torch.randn(3, 4)
    graph = exported(model, x)
    (refused,) = fold_norms(graph).refused
    assert refused.reason.endswith("is computed or changed in the graph")
    other = copy.deepcopy(model)
    for _ in range(2):
        torch.testing.assert_close(graph(x), other(x), rtol=1e-4, atol=1e-5)


def test_a_norm_in_train_mode_is_left():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).train()
    x = torch.randn(4, 3, 6, 6)
    graph = exported(model, x)
    report = fold_norms(graph)
    assert [each.reason for each in report.refused] == [
        "it normalizes by the statistics of each batch; export the model in eval mode"
    ]
    torch.testing.assert_close(graph(x), model(x))


def test_a_norm_without_statistics_is_left():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval()
    (refused,) = fold_norms(exported(model, torch.randn(4, 3))).refused
    assert "normalizes by the statistics of each batch" in refused.reason


def test_a_convolution_without_a_batch_is_left():
    """Dim 1 of its output is a window's, whose length is that of the norm by chance."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 5, 1), nn.BatchNorm1d(7)

        def forward(self, x):
            return self.norm(self.conv(x))

    (refused,) = folded(drawn(Alone()), torch.randn(3, 7), left=1).refused
    assert refused.reason == "its layer's output has no batch, so that dim 1 is no channel"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_norm_is_folded_into_the_linear_layer_after_it(bias, decomposed):
    model = drawn(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=bias)))
    assert len(folded(model, torch.randn(5, 4), decomposed=decomposed).changed) == 1


def test_a_norm_before_a_turn_and_a_linear_layer_is_folded():
    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 6)

        def forward(self, x):
            return self.linear(self.norm(x).transpose(1, 2))

    assert len(folded(drawn(Before()), torch.randn(5, 4, 7)).changed) == 1


def test_a_norm_whose_channels_are_not_summed_over_is_left():
    model = drawn(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(7, 6)))
    (refused,) = folded(model, torch.randn(5, 4, 7), left=1).refused
    assert refused.reason == "the layer sums over another dimension than the norm's channels"


class Looped(nn.Module):
    """Layers with norms in the graphs of a loop and of a branch."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.two, self.last = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x):
        def body(i, v):
            return i + 1, self.norm(self.one(v)).tanh()

        _, x = torch.while_loop(lambda i, v: i < 3, body, (torch.tensor(0), x))
        return torch.cond(x.sum() > 100, lambda a: a + 1, lambda a: self.last(self.two(a)), (x.clone(),))


def test_norms_in_loops_and_branches_are_folded():
    x = torch.randn(3, 4)
    model = drawn(Looped())
    graph = exported(model, x)
    assert norms(graph) == 2
    report = fold_norms(graph, (x,))
    assert norms(graph) == 0
    assert {each.graph.split("_graph")[0] for each in report.changed} == {"while_loop_body", "false"}
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_half_precision_weights_are_rounded_once():
    model = drawn(nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))).to(torch.bfloat16)
    graph = exported(model, torch.randn(5, 64, dtype=torch.bfloat16))
    layer, norm = (copy.deepcopy(part).double() for part in model)
    fold_norms(graph)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    wanted = (layer.weight * scale[:, None]).to(torch.bfloat16)
    (weight,) = (p for name, p in graph.named_parameters() if name.endswith("weight"))
    assert torch.equal(weight, wanted)


def test_what_was_not_exported_is_refused():
    with pytest.raises(GraphError, match="a Linear is no exported graph; needed is torch.export.export"):
        fold_norms(nn.Linear(2, 2))


class Kept(nn.Module):
    """A layer's output, a norm's input, or statistics that something else reads or writes in place."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear, self.norm, self.last = how, nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(3, 4))

    def forward(self, x):
        if self.how == "cached":
            y = self.linear(x)
            self.cache.copy_(y)
            return self.norm(y)
        if self.how == "written after":
            y = self.linear(x)
            z = self.norm(y)
            y.add_(1)
            return z
        if self.how == "input written":
            x = x.relu()
            y = self.norm(x)
            x += 1
            return self.last(y), x
        if self.how == "in a list":
            torch._foreach_mul_([self.norm.running_mean], 2.0)
        elif self.how == "part":
            self.norm.running_mean.chunk(2)[0].mul_(2.0)
        return self.norm(self.linear(x))


@pytest.mark.parametrize("how", ["cached", "written after", "input written", "in a list", "part"])
def test_what_is_read_or_written_elsewhere_is_left(how):
    model, x = drawn(Kept(how)), torch.randn(3, 4)
    graph = exported(model, x)
    other = copy.deepcopy(model)
    report = fold_norms(graph)
    assert len(report.refused) == 1
    assert not report.changed
    for _ in range(2):
        torch.testing.assert_close(graph(x), other(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(graph.named_buffers()).get("cache", other.cache), other.cache, rtol=1e-4, atol=1e-5)


def test_a_vector_is_no_layer():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.norm = nn.Parameter(torch.randn(4)), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(nn.functional.linear(x, self.w))

    (refused,) = folded(drawn(Vector()), torch.randn(2, 3, 4), left=1).refused
    assert "weight" in refused.reason


def test_parameters_that_would_not_be_finite_are_left():
    model = drawn(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))).to(torch.float16)
    model[0].weight.data.fill_(300.0)
    model[1].running_var.fill_(1e-6)
    (refused,) = fold_norms(exported(model, torch.randn(3, 4, dtype=torch.float16))).refused
    assert refused.reason == "folded parameters would be too large for torch.float16"


def test_a_norm_whose_statistics_are_used_is_left():
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            norm = self.norm
            y, a, b = torch.native_batch_norm(
                self.linear(x), norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, 1e-5
            )
            return y, a.sum() + b.sum()

    (refused,) = fold_norms(exported(drawn(Told()), torch.randn(3, 4))).refused
    assert refused.reason == "its statistics are used, too, or what it gives is not"


def test_graphs_of_gradient_modes_and_autocast_are_visited():
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            with torch.no_grad():
                x = self.first(self.one(x))
            with torch.autocast("cpu", enabled=False):
                return self.second(self.two(x)).relu()

    model, x = drawn(Modes()), torch.randn(3, 4)
    graph = torch.export.export(model, (x,)).module()
    report = fold_norms(graph, (x,))
    assert len(report.changed) == 2
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_traced_graph_that_was_not_exported_is_refused():
    with pytest.raises(GraphError, match="is no exported graph"):
        fold_norms(torch.fx.symbolic_trace(nn.Linear(2, 2)))
