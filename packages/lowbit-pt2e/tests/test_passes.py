"""Every graph of a model is visited once, and what passes add is checked."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan

from lowbit_pt2e import GraphError, Match, fold_norms, run_passes
from lowbit_pt2e.graphs import Editor, regions

aten = torch.ops.aten


def exported(model, *inputs):
    with torch.no_grad():
        return torch.export.export(model, inputs).module()


class Nested(nn.Module):
    """A branch within a scan within a loop, each with a layer and its norm; and the layer of the branch outside, too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))

    def part(self, i, x):
        return self.norms[i](self.layers[i](x)).tanh()

    def forward(self, x):
        def step(carry, row):
            carry = torch.cond(row.sum() > 0, lambda a: self.part(0, a), lambda a: a - 1, (carry,))
            return self.part(1, carry), carry.sum(1)

        def body(i, v):
            v, _ = scan(step, v, torch.stack((v, -v)))
            return i + 1, self.part(2, v)

        _, x = torch.while_loop(lambda i, v: i < 2, body, (torch.tensor(0), x))
        return x + self.layers[0](x)


@pytest.fixture(scope="module")
def nested():
    torch.manual_seed(0)
    model = Nested()
    for norm in model.norms:
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return model.eval(), torch.randn(3, 4)


def test_graphs_within_graphs_are_found_once(nested):
    graph = exported(nested[0], nested[1])
    found = regions(graph)
    assert len({id(each.module) for each in found}) == len(found) == 6
    assert found[0].name == ""
    inner = [each.name.rpartition(".")[2].split("_graph")[0].split("_combine")[0] for each in found[1:]]
    assert sorted(inner) == ["false", "scan", "true", "while_loop_body", "while_loop_cond"]
    # A constant is known however deep; what a loop carries is none.
    deep = next(each for each in found if "true" in each.name)
    (linear,) = (node for node in deep.nodes if node.target is aten.linear.default)
    assert deep.constant(linear.args[1]) is graph.get_parameter("layers.0.weight")
    assert deep.constant(linear.args[0]) is None


def test_norms_of_graphs_within_graphs_are_folded(nested):
    model, x = nested
    graph = exported(model, x)
    report = fold_norms(graph, (x,))
    assert len(report.changed) == 3
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(difference.sqnr > 90 for difference in report.differences.values())
    # The layer of the branch has another use, outside, and kept its weight there.
    (linear,) = (node for node in graph.graph.nodes if node.target is aten.linear.default)
    assert torch.equal(graph.get_parameter(str(linear.args[1].target)), model.layers[0].weight)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return map_rows(lambda row: self.norm(self.linear(row)), x)


@pytest.mark.parametrize("alike", [True, False])
def test_a_graph_that_two_calls_share_is_changed_once_if_both_give_it_the_same_weights(alike):
    x = torch.randn(2, 3, 4)
    graph = exported(Shared().eval(), x)
    graph.register_buffer("other", torch.randn(4, 4))
    (call,) = (node for node in graph.graph.nodes if node.target is torch.ops.higher_order.map_impl)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    first = next(iter(call.users))
    given = list(call.args[2])
    with graph.graph.inserting_before(output):
        if not alike:
            at = next(i for i, node in enumerate(given) if node.target == "linear.weight")
            other = graph.graph.get_attr("other")
            other.meta["val"], given[at] = given[at].meta["val"], other
        again = graph.graph.call_function(call.target, (call.args[0], [first], given))
        second = graph.graph.call_function(first.target, (again, 0))
    for node, like in ((again, call), (second, first)):
        node.meta |= like.meta
    output.args = ((second,),)
    graph.recompile()
    wanted = graph(x)
    assert len(regions(graph)) == 2
    (found,) = fold_norms(graph).findings
    assert found.reason == (None if alike else "its layer's weight is computed or changed in the graph")
    torch.testing.assert_close(graph(x), wanted, rtol=1e-4, atol=1e-5)


class Halved(nn.Module):
    def forward(self, x):
        return (x * 2).relu()


@dataclass
class Broken:
    """Puts a product in the place of one, as `how` says."""

    how: str
    name: str = "broken"
    adds: tuple = (aten.mul.Tensor,)

    def matches(self, region):
        for node in region.nodes:
            if node.target is aten.mul.Tensor:
                yield Match(
                    node, "on purpose" if self.how == "refused" else None, lambda node=node: self.put(region, node)
                )

    def put(self, region, node):
        target = aten.add.Tensor if self.how == "undeclared" else aten.mul.Tensor
        new = Editor(region, node, node).call(target, node.args[0], 4 if self.how == "wrong" else 2)
        if self.how == "bare":
            del new.meta["stack_trace"]
        node.replace_all_uses_with(new)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("undeclared", r"broken added aten.add.Tensor, which is not what it says it adds, from File .*test_passes.py"),
        ("bare", "broken added mul_tensor to the graph without stack_trace"),
    ],
)
def test_what_a_pass_may_not_add_is_an_error_that_names_it(how, match):
    with pytest.raises(GraphError, match=match):
        run_passes(exported(Halved(), torch.randn(3)), [Broken(how)])


def test_how_far_results_moved_is_told():
    x = torch.tensor([1.0, 2.0, -3.0])
    report = run_passes(exported(Halved(), x), [Broken("wrong")], (x,))
    assert report.differences["broken"].largest == 4
    assert report.differences["broken"].sqnr == 0
    right = run_passes(exported(Halved(), x), [Broken("right")], (x,))
    assert right.differences["broken"].sqnr == float("inf")


def test_what_is_refused_is_told_with_its_place():
    report = run_passes(exported(Halved(), torch.randn(3)), [Broken("refused")])
    (found,) = report.refused
    assert (found.node, found.reason) == ("mul", "on purpose")
    assert found.source.startswith("from File ")
    assert found.source.endswith("return (x * 2).relu()")
    assert "on purpose" in str(report)
