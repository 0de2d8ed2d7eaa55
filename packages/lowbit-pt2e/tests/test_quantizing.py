"""Linear layers of graphs by a recipe: the numbers of the model whose weights the core quantizes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import FormatError, Recipe, RecipeError, Rule
from lowbit_pt2e import quantize_layers

LINEAR = torch.ops.lowbit.linear.default
FLOAT = {
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.matmul.default,
}


def exported(model, *inputs, decomposed=False, dynamic=None):
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
        return (program.run_decompositions() if decomposed else program).module()


def count(graph, *targets):
    graphs = [each for each in graph.modules() if isinstance(each, torch.fx.GraphModule)]
    return sum(node.target in targets for each in graphs for node in each.graph.nodes)


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 10)
        self.to(dtype).eval()

    def forward(self, x):
        return self.head(x + self.down(self.up(x).relu()))


FORMATS = [
    *(
        ("INT8_ROW", None),
        ("INT4_G32", None),
        ("UINT4_G128", None),
        ("FP8_ROW", None),
        ("MXFP4", None),
        ("NVFP4", None),
    ),
    *(("INT8_ROW", "dynamic:INT8_ROW"), ("INT8_ROW", "dynamic:INT8_ROW_ASYM"), ("INT4_G32", "dynamic:INT8_ROW")),
    *(("FP8_ROW", "dynamic:FP8_ROW"), ("MXFP8", "dynamic:MXFP8")),
]


@pytest.mark.parametrize(
    ("weight", "activation", "dtype", "decomposed"),
    [
        *((*each, dtype, False) for each in FORMATS for dtype in (torch.float32, torch.bfloat16)),
        *((*each, torch.float32, True) for each in FORMATS[-5:-2]),
    ],
)
def test_a_graph_gives_what_the_model_gives_whose_weights_the_core_quantizes(weight, activation, dtype, decomposed):
    recipe = Recipe(
        (
            Rule.of("head.*", None),
            Rule.of("*", weight, activation=activation) if weight != "UINT4_G128" else Rule.of("down.weight", weight),
        )
    )
    model, x = Model(dtype), torch.randn(3, 5, 64).to(dtype)
    graph = exported(model, x, decomposed=decomposed)
    report = quantize_layers(graph, recipe, (x,))
    (difference,) = report.differences.values()
    assert 5 < difference.sqnr < 60
    lowbit.quantize_(model, Recipe((*recipe.rules, Rule.of("*", None))))
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
    assert count(graph, LINEAR) == len(report.changed) == (1 if weight == "UINT4_G128" else 2)
    # The rest says why.
    assert {each.reason for each in report.refused} <= {"rule 'head.*' keeps its weight", "no rule matches its weight"}
    names = {name for name, _ in [*graph.named_parameters(), *graph.named_buffers()]}
    assert "down.weight" not in names
    assert {"down_weight_qdata", "down_weight_scale"} <= names


def test_shapes_that_are_not_known_stay_so():
    model, x = Model(), torch.randn(3, 5, 64)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    graph = exported(model, x, dynamic=({0: batch, 1: length},))
    quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW", activation="dynamic:INT8_ROW"),)))
    lowbit.quantize_(model, Recipe((Rule.of("*", "INT8_ROW", activation="dynamic:INT8_ROW"),)))
    for shape in ((3, 5, 64), (1, 9, 64)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(graph(x), model(x))


def test_rules_speak_of_classes_too():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 32), Own(32, 32)).eval()
    graph = exported(model, torch.randn(2, 32))
    report = quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW", modules="Own"),)))
    assert [each.reason for each in report.findings] == ["no rule matches its weight", None]


class Tied(nn.Module):
    """A weight that two layers share, one of them in a loop, and a product that is none of a module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.table = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 16) / 6)

    def forward(self, x):
        _, x = torch.while_loop(lambda i, v: i < 2, lambda i, v: (i + 1, self.one(v).tanh()), (torch.tensor(0), x))
        return self.one(x) @ self.table


def test_weights_of_loops_are_quantized_once_and_their_numbers_leave_the_model():
    model, x = Tied().eval(), torch.randn(4, 32)
    graph = exported(model, x)
    report = quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW"),)), (x,))
    assert len(report.changed) == 3
    assert count(graph, *FLOAT) == 0
    names = [name for name, _ in [*graph.named_parameters(), *graph.named_buffers()]]
    assert sorted(each for each in names if "lifted" not in each) == [
        *("one.bias", "one_weight_qdata", "one_weight_scale", "table_turned_qdata", "table_turned_scale")
    ]
    weight, table = (lowbit.quantize(each, "INT8_ROW").dequantize() for each in (model.one.weight, model.table.T))
    with torch.no_grad():
        y = x
        for _ in range(2):
            y = nn.functional.linear(y, weight, model.one.bias).tanh()
        wanted = nn.functional.linear(y, weight, model.one.bias) @ table.T
        torch.testing.assert_close(graph(x), wanted, rtol=1e-4, atol=1e-5)
        again = exported(graph, x)
        torch.testing.assert_close(again(x), wanted, rtol=1e-4, atol=1e-5)


def test_what_a_recipe_may_not_say_is_refused_and_nothing_is_changed():
    model, x = Model(), torch.randn(2, 64)
    graph = exported(model, x)
    before = graph.code
    with pytest.raises(RecipeError, match="rules 'nothing.weight' match no weight of a layer; there are up.weight"):
        quantize_layers(graph, Recipe((Rule.of("nothing.weight", "INT8_ROW"), Rule.of("*", "INT8_ROW"))))
    with pytest.raises(RecipeError, match="which data tell: prepare.model, recipe., run what it gives on some"):
        quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR"),)))
    with pytest.raises(FormatError, match="last dimension 64 .* is not a multiple of block 128"):
        quantize_layers(graph, Recipe((Rule.of("*", "INT4_G128"),)))
    assert graph.code == before
    torch.testing.assert_close(graph(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (32, 64)])
def test_a_weight_that_is_used_both_ways_has_codes_for_each(decomposed, shape):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(shape) / 6)

        def forward(self, x):
            return nn.functional.linear(x @ self.w, self.w)

    model, x = Both(), torch.randn(3, 32)
    graph = exported(model, x, decomposed=decomposed)
    quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW"),)), (x,))
    there, back = (lowbit.quantize(each, "INT8_ROW").dequantize() for each in (model.w.detach().T, model.w.detach()))
    with torch.no_grad():
        torch.testing.assert_close(graph(x), nn.functional.linear(nn.functional.linear(x, there), back))


def test_an_activation_that_does_not_fit_is_refused_before():
    graph = exported(nn.Linear(48, 16).eval(), torch.randn(2, 48))
    before = graph.code
    with pytest.raises(FormatError, match="last dimension 48 .* is not a multiple of block 32"):
        quantize_layers(graph, Recipe((Rule.of("*", "FP8_ROW", activation="dynamic:MXFP8"),)))
    assert graph.code == before


def test_products_of_integers_are_left():
    class Integers(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 16)
            self.register_buffer("codes", torch.ones(4, 4, dtype=torch.int64))

        def forward(self, x, i):
            return self.linear(x), i @ self.codes

    x, i = torch.randn(2, 32), torch.ones(2, 4, dtype=torch.int64)
    graph = exported(Integers().eval(), x, i)
    report = quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW"),)))
    assert [each.reason for each in report.findings] == [None, "its layer's weight is torch.int64"]
