from __future__ import annotations

import copy
import json
import re
from math import prod

import pytest
import torch
from torch import nn

from lowbit import backends
from lowbit.activation import Activation
from lowbit.apply import quantize_
from lowbit.bind import bind
from lowbit.errors import NoKernelError, RecipeError
from lowbit.format import FORMATS, INT4_G32, INT8_ROW, MXFP4, MXFP8, NVFP4
from lowbit.packed import PackedTensor
from lowbit.plan import Parameter, parameters_of, plan
from lowbit.recipe import Recipe, Rule
from lowbit.tensor import QuantizedTensor, quantize


class Experts(nn.Module):
    """Fused experts, one projection stored (E, N, K), the other (E, K, N)."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 96, 64))
        self.down_proj = nn.Parameter(torch.zeros(4, 32, 80))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(64, 64)
        self.experts = Experts()
        self.norm = nn.LayerNorm(64)


class LoraLinear(nn.Linear):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = LoraLinear(64, 100, bias=False)
        self.lm_head.weight = self.embed.weight


def recipe(*rules):
    return Recipe(tuple(Rule.of(*rule) if isinstance(rule, tuple) else rule for rule in rules))


LINEARS = Rule.of("*.weight", "INT4_G32", modules="Linear")
GATE_UP = Rule.of("*.gate_up_proj", "MXFP4")
DOWN = Rule.of("re:.*down_proj", "NVFP4", k_axis=-2)
LINEARS_ONLY = Rule.of("*.q.weight", "INT4_G32")
EMBEDDING, LINEAR = "reference.embedding", "reference.linear"
HEAD_KEPT = Rule.of("lm_head.weight", None)
GOOD = recipe(HEAD_KEPT, LINEARS, GATE_UP, DOWN, ("*.bias", None))


def test_parameters_of_a_model_on_meta_know_classes_and_ties():
    with torch.device("meta"):
        model = Model()
    listed = {p.name: p for p in parameters_of(model)}
    assert list(listed) == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert listed["embed.weight"] == Parameter("embed.weight", (100, 64), torch.bfloat16, ("Embedding", "Module"))
    assert listed["lm_head.weight"] == Parameter(
        "lm_head.weight", (100, 64), torch.bfloat16, ("LoraLinear", "Linear", "Module"), tied="embed.weight"
    )
    assert listed["layers.2.experts.down_proj"].modules == ("Experts", "Module")


def test_a_module_reached_by_two_paths_is_tied_to_its_first():
    inner = nn.Linear(32, 32)
    listed = parameters_of(nn.ModuleDict({"a": inner, "b": nn.ModuleDict({"c": inner})}))
    assert [(p.name, p.tied) for p in listed] == [
        ("a.weight", None),
        ("a.bias", None),
        ("b.c.weight", "a.weight"),
        ("b.c.bias", "a.bias"),
    ]


def test_a_quantized_parameter_is_known_with_its_format_and_bytes():
    layer = nn.Linear(32, 4, bias=False)
    layer.weight = nn.Parameter(quantize(torch.ones(4, 32), MXFP4), requires_grad=False)
    (parameter,) = parameters_of(layer)
    assert (parameter.format, parameter.bytes) == (MXFP4, 4 * 16 + 4)


def test_every_parameter_has_one_row_with_its_decision():
    model = Model()
    result = plan(model, GOOD)
    rows = {row.name: row for row in result.rows}
    assert [row.name for row in result.rows] == [p.name for p in parameters_of(model)]
    q, gate, down = (rows[f"layers.1.{name}"] for name in ("q.weight", "experts.gate_up_proj", "experts.down_proj"))
    assert (q.action, q.rule, q.format, q.k_axis, q.kernel) == (
        "quantize",
        "*.weight",
        INT4_G32,
        -1,
        "reference.linear",
    )
    # 64 rows of 64 nibbles, and two bf16 scales each.
    assert (q.bytes_before, q.bytes_after) == (64 * 64 * 4, 64 * (32 + 2 * 2))
    assert (gate.format, gate.rule, gate.kernel) == (MXFP4, "*.gate_up_proj", "reference.grouped_mm")
    assert gate.bytes_after == 4 * 96 * (32 + 2)
    # Groups of 16 along the 32, one scale each, and a float32 an expert.
    assert (down.format, down.k_axis, down.bytes_after) == (NVFP4, -2, 4 * (80 * (16 + 2) + 4))
    bias, norm = rows["layers.1.q.bias"], rows["layers.1.norm.weight"]
    assert (bias.action, bias.format, bias.rule, bias.reason) == ("keep", None, "*.bias", "kept by rule '*.bias'")
    assert (norm.action, norm.rule, norm.reason, norm.kernel) == ("keep", None, "no rule matches", None)
    assert norm.bytes_before == norm.bytes_after == 64 * 4


def test_totals_count_each_tensor_once():
    model = Model()
    result = plan(model, GOOD)
    assert result.bytes_before == sum(p.nbytes for p in model.parameters())
    low = [p for n, p in model.named_parameters() if n.endswith(("q.weight", "_proj"))]
    assert result.coverage == sum(p.nbytes for p in low) / result.bytes_before
    after = 3 * (64 * 36 + 4 * 96 * 34 + 4 * (80 * 18 + 4))
    assert result.bytes_after == result.bytes_before - sum(p.nbytes for p in low) + after
    assert result.bits_per_weight == 8 * after / sum(p.numel() for p in low)


@pytest.mark.parametrize(
    "fmt", [*FORMATS.values(), *(FORMATS["INT4_G32"].with_block(*b) for b in ((2, 32), (0, 0)))], ids=str
)
@pytest.mark.parametrize(("shape", "k_axis"), [((5, 256), -1), ((256, 5), 0), ((3, 128, 6), -2), ((3, 7, 640), 2)])
def test_bytes_foretold_are_those_the_tensor_takes(fmt, shape, k_axis):
    result = plan([Parameter("w", shape, torch.bfloat16)], Recipe((Rule("w", fmt, k_axis=k_axis),)))
    assert result.bytes_after == quantize(torch.ones(shape), fmt, axis=k_axis).stored_bytes
    assert result.bytes_before == 2 * prod(shape)


def test_names_of_a_tied_tensor_are_one_decision():
    activation = "dynamic:int8:1x*:float32"
    result = plan(Model(), recipe(Rule.of("lm_head.weight", "INT8_ROW", activation=activation)))
    rows = {row.name: row for row in result.rows}
    first, other = rows["embed.weight"], rows["lm_head.weight"]
    assert (first.action, first.rule, first.format, first.tied) == ("quantize", "lm_head.weight", INT8_ROW, None)
    assert (other.action, other.format, other.tied, other.reason) == (
        "tied",
        INT8_ROW,
        "embed.weight",
        "tied to 'embed.weight'",
    )
    assert (first.kernel, other.kernel) == ("reference.embedding", "reference.linear")
    # A lookup has no input to round; the head has.
    assert (first.activation, other.activation) == (None, Activation.parse(activation))
    assert (first.bytes_after, other.bytes_before, other.bytes_after) == (100 * (64 + 4), 0, 0)


def test_two_rules_that_say_the_same_of_a_tied_tensor_agree():
    result = plan(Model(), recipe(("embed.weight", "INT8_ROW"), ("lm_head.weight", "INT8_ROW")))
    assert result.bytes_before - result.bytes_after == 100 * 64 * 2 - 100 * 68


def test_a_tied_tensor_may_be_listed_in_any_order():
    listed = [
        Parameter("head", (4, 32), torch.float32, tied="embed"),
        Parameter("embed", (4, 32), torch.float32),
    ]
    result = plan(listed, recipe(("embed", "INT8_ROW")))
    assert [(row.action, row.tied, row.bytes_before) for row in result.rows] == [
        ("quantize", None, 512),
        ("tied", "head", 0),
    ]


def test_kernels_are_asked_for_with_the_facts_of_each_use(monkeypatch):
    asked = []

    def select(call, *, bound):
        assert bound
        asked.append(call)
        return real(call)

    real = backends.select
    monkeypatch.setattr(backends, "select", select)
    activation = Activation(MXFP8)
    rules = (Rule("*.experts.*", MXFP4, activation, -2), Rule("embed.weight", MXFP4, activation))
    plan(
        [
            Parameter("a.experts.w", (8, 64, 96), torch.bfloat16, ("Experts",)),
            Parameter("embed.weight", (100, 64), torch.float16, ("Embedding",)),
        ],
        Recipe(rules),
        device="cuda:1",
    )
    assert asked == [
        backends.Call("grouped_mm", MXFP4, activation, "cuda", torch.bfloat16, 96, 64),
        backends.Call("embedding", MXFP4, None, "cuda", torch.float16, 100, 64),
    ]


def test_kernels_foretold_are_those_that_bind_chooses():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 32), "head": nn.Linear(32, 8), "other": nn.Linear(32, 8)})
    model["head"].weight = model["embed"].weight
    rules = recipe(Rule.of("*.weight", "INT8_ROW_ASYM", activation="dynamic:INT8_ROW_ASYM", modules="Linear"))
    foretold = {row.name: row.kernel for row in quantize_(model, rules).rows if row.kernel}
    assert foretold == {row.name: row.kernel for row in bind(model).rows}
    # The second is one that packs, which a table of two uses cannot be.
    assert foretold["head.weight"] != foretold["other.weight"]


def test_a_bound_weight_is_known_with_its_format_and_bytes():
    layer = nn.Linear(32, 4, bias=False)
    quantize_(layer, recipe(Rule.of("weight", "INT8_ROW_ASYM", activation="dynamic:INT8_ROW_ASYM")))
    bind(layer)
    (parameter,) = parameters_of(layer)
    assert isinstance(layer.weight, PackedTensor)
    assert parameter.format == FORMATS["INT8_ROW_ASYM"]
    assert parameter.bytes == sum(part.nbytes for part in layer.weight.parts)


def test_a_weight_that_no_kernel_runs_says_why(monkeypatch):
    def select(call, **_):
        raise NoKernelError(f"no kernel of x86 takes {call}:\n  x86: needs avx2")

    monkeypatch.setattr(backends, "select", select)
    row = plan([Parameter("w", (4, 32), torch.float32)], recipe(("w", "INT8_ROW"))).rows[0]
    assert (row.action, row.kernel) == ("quantize", None)
    assert row.reason == "no kernel of x86 takes linear int8:1x*:float32 on cpu, torch.float32 n=4 k=32"


@pytest.mark.parametrize("owner", [nn.Conv3d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3)], ids=lambda m: type(m).__name__)
def test_a_weight_without_operator_says_so(owner):
    result = plan(nn.Sequential(owner), recipe(("0.weight", "INT8_ROW")))
    assert (result.rows[0].kernel, result.rows[0].format) == (None, INT8_ROW)
    assert result.rows[0].reason == f"no operator takes {type(owner).__name__} weights; dequantize before use"


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize("owner", [Own(32, 4, 3), nn.Conv1d(32, 4, 3)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("rule", [("INT8_ROW", -1), ("INT4_G32", 1)], ids=str)
def test_a_convolution_needs_no_kernel_and_runs(owner, rule):
    model = nn.Sequential(copy.deepcopy(owner))
    fmt, k_axis = rule
    result = quantize_(
        model, recipe(Rule.of("0.weight", fmt, k_axis=k_axis, activation="dynamic:INT8_TENSOR", modules="_ConvNd"))
    )
    row = result.rows[0]
    assert (row.kernel, row.format) == (None, FORMATS[fmt])
    assert row.reason == "PyTorch's own convolution runs it, of dequantized values; there are no kernels to choose from"
    assert row.bytes_after == model[0].weight.stored_bytes
    assert model(torch.ones(1, 32, *(5,) * (len(row.shape) - 2))).isfinite().all()


@pytest.mark.parametrize("activation", ["dynamic:INT8_ROW", "dynamic:MXFP8", "local:NVFP4"])
def test_an_input_that_a_convolution_cannot_round_is_told_before_anything_is_changed(activation):
    model = nn.Sequential(nn.Conv1d(32, 4, 16), nn.Flatten(), nn.Linear(64, 8))
    rule = Rule.of("*.weight", "INT8_ROW", activation=activation)
    words = (
        r"- '0.weight' is the weight of a convolution, and rule '\*.weight' rounds its input to .*one scale a tensor"
    )
    with pytest.raises(RecipeError, match=words):
        quantize_(model, recipe(rule))
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())


def test_a_parameter_quantized_earlier_stays_and_counts_as_covered():
    model = nn.ModuleDict({"a": nn.Linear(32, 4, bias=False), "b": nn.Linear(32, 4, bias=False)})
    model["a"].weight = nn.Parameter(quantize(torch.ones(4, 32), MXFP4), requires_grad=False)
    result = plan(model, recipe(("b.weight", "INT8_ROW")), min_coverage=1.0)
    assert result.rows[0].reason == "no rule matches (it is MXFP4 already)"
    assert (result.rows[0].bytes_before, result.rows[0].bytes_after, result.coverage) == (68, 68, 1.0)


ONE = [Parameter("blocks.0.fc1", (60, 100), torch.float32, ("Linear", "Module"))]
EXPERTS = [Parameter(f"blocks.{i}.experts.w", (2, 64, 100), torch.float32, ("Experts",)) for i in range(4)]
TIED = [Parameter("embed", (8, 32), torch.float32), Parameter("head", (8, 32), torch.float32, (), "embed")]


@pytest.mark.parametrize(
    ("parameters", "rules", "message"),
    [
        (
            ONE,
            [("*", "MXFP4")],
            "'blocks.0.fc1' has k=100 (k_axis=-1 of shape (60, 100)), not a multiple of block 32, and rule '*' gives",
        ),
        (
            ONE,
            [("*", "INT4_G32")],
            "not a multiple of block 32, and rule '*' gives it int4:1x32:bfloat16; use INT8_ROW or pad",
        ),
        (
            EXPERTS,
            [("*", "MXFP4")],
            "; use FP8_ROW or pad, or set k_axis to the dim of size 64 if that is the one summed over",
        ),
        (
            ONE,
            [Rule.of("*", "INT8_ROW", activation="dynamic:MXFP8")],
            "not a multiple of block 32, and rule '*' rounds its input to e4m3fn:1x32:e8m0; use FP8_ROW or pad",
        ),
        (
            ONE,
            [("*", "int8:4x1x32:float32")],
            "'blocks.0.fc1' has shape (60, 100), and rule '*' gives it int8:4x1x32:float32: ",
        ),
        (
            ONE,
            [Rule.of("*", "INT8_ROW", k_axis=2)],
            "'blocks.0.fc1' is 2-D, and rule '*' wants k_axis=2; needed is -2 to 1",
        ),
        (
            [Parameter("norm", (8,), torch.float32), Parameter("scale", (), torch.float32)],
            [("norm", "INT8_ROW"), ("scale", "INT8_ROW")],
            "keep it by an earlier rule without a format, or narrow this one by modules\n- 'scale' is 0-D, and",
        ),
        (
            [Parameter("norm", (8,), torch.float32)],
            [("*", "INT8_ROW")],
            "rule '*' matches vectors only, such as 'norm', and a pattern quantizes tensors of two or more dimensions",
        ),
        (
            [Parameter("ids", (8, 8), torch.int64)],
            [("*", "INT8_ROW")],
            "'ids' is torch.int64, and rule '*' gives it int8:1x*:float32; only float32, float16, bfloat16 and float64",
        ),
        ([Parameter("w", (8, 8), torch.float8_e4m3fn)], [("*", "INT8_ROW")], "'w' is torch.float8_e4m3fn, and rule"),
        (
            [Parameter("w", (8, 32), torch.float32, format=MXFP4, stored_bytes=136)],
            [("*", "INT8_ROW")],
            "'w' is quantized already, to e2m1:1x32:e8m0, and rule '*' gives it int8:1x*:float32; dequantize it first",
        ),
        (
            TIED,
            [("head", None), ("embed", "INT8_ROW")],
            "rule 'embed' says int8:1x*:float32 along k_axis=-1 for 'embed', but rule 'head' says keep for 'head'",
        ),
        (
            ONE,
            [("*", "INT8_ROW"), ("blocks.0.fc2", None)],
            "rule 'blocks.0.fc2' matches no parameter; near it are 'blocks.0.fc1'",
        ),
        (
            EXPERTS,
            [("*", "INT8_ROW"), ("*.expert.w", None)],
            "rule '*.expert.w' matches no parameter; near it are 'blocks.0.",
        ),
        (
            EXPERTS,
            [("*", "INT8_ROW"), (r"re:layers\.9", None)],
            r"rule 're:layers\\.9' matches no parameter; the model has 4 parameters, such as 'bl",
        ),
        (
            EXPERTS,
            [("re:.*[0-1].*", "INT8_ROW"), ("blocks.*", "INT8_ROW"), ("re:.*w", None)],
            "rule 're:.*w' never wins: 're:.*[0-1].*', 'blocks.*' before it takes all of the 4 it matches; move it up",
        ),
        (
            ONE,
            [("*1", "INT8_ROW"), Rule.of("*", "INT8_ROW", modules=["Embedding", "Experts"])],
            "is for modules of class Embedding, Experts, but what it names, such as 'blocks.0.fc1', belongs to Linear",
        ),
        (
            [Parameter("fc.weight", (64, 32), torch.float32, ("LoraLinear", "Linear", "Module"))],
            [Rule.of("*", "MXFP4", k_axis=0)],
            "'fc.weight' is used along its last dim, and rule '*' wants k_axis=0; leave k_axis at -1",
        ),
        (ONE, [("*", None)], "no rule quantizes anything; the model has 1 parameter, such as 'blocks.0.fc1'"),
        ([], [], "no rule quantizes anything; the model has 0 parameters"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_to_do(parameters, rules, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        plan(parameters, recipe(*rules))


def test_one_message_lists_every_problem():
    with pytest.raises(RecipeError) as caught:
        plan(Model(), recipe(("*.biass", None), ("*", "MXFP4"), ("lm_head.weight", None)), min_coverage=0.9)
    heading, *problems = str(caught.value).splitlines()
    assert heading == "the recipe does not fit; nothing was changed:"
    assert [problem[:38] for problem in problems] == [
        "- rule '*.biass' matches no parameter;",
        "- rule 'lm_head.weight' never wins: '*",
        "- 'layers.{0..2}.experts.down_proj' ha",
        "- coverage is 74.03% of 470.8 KiB, bel",
    ]


def test_coverage_below_the_bar_names_both_numbers_and_the_largest_left():
    result = plan(Model(), GOOD)
    assert plan(Model(), GOOD, min_coverage=result.coverage) == result
    with pytest.raises(RecipeError) as caught:
        plan(Model(), GOOD, min_coverage=0.99)
    assert (
        f"coverage is {result.coverage:.2%} of 470.8 KiB, below the 99.00% asked for; the largest parameters left are "
        "'embed.weight' (12.5 KiB: kept by rule 'lm_head.weight'); 'layers.{0..2}.q.bias' (768 B: kept "
    ) in str(caught.value)


@pytest.mark.parametrize("bar", [-0.1, 1.5, 90, float("nan")])
def test_a_bar_that_is_no_share_is_refused(bar):
    with pytest.raises(RecipeError, match=f"min_coverage is {bar}; needed is a share of the bytes, from 0 to 1"):
        plan(Model(), GOOD, min_coverage=bar)


TOTALS = (
    "7 of 19 parameters become low-bit: coverage 38.3% of 470.8 KiB, 5.026 bits per weight; "
    "all parameters 470.8 KiB -> 320.6 KiB"
)


def test_the_plan_reads_as_a_table_with_alike_layers_folded():
    rules = recipe(Rule.of("embed.weight", "INT8_ROW", activation="dynamic:INT8_ROW"), LINEARS_ONLY, DOWN, ("*s", None))
    lines = str(plan(Model(), rules)).splitlines()
    end = lines.index("")
    assert [re.split("  +", line) for line in lines[:end]] == [
        ["parameter", "count", "shape", "dtype", "rule", "format", "activation", "before", "after", "kernel", "note"],
        ["embed.weight", "1", "100x64", "bfloat16", "embed.weight", "INT8_ROW", "12.5 KiB", "6.641 KiB", EMBEDDING],
        ["layers.{0..2}.q.weight", "3", "64x64", "float32", "*.q.weight", "INT4_G32", "48 KiB", "6.75 KiB", LINEAR],
        [
            *("layers.{0..2}.experts.down_proj", "3", "4x32x80", "float32", "re:.*down_proj", "NVFP4 k_axis=-2"),
            *("120 KiB", "16.92 KiB", "reference.grouped_mm"),
        ],
        [
            *(
                "lm_head.weight",
                "1",
                "100x64",
                "bfloat16",
                "embed.weight",
                "INT8_ROW",
                "dynamic INT8_ROW",
                "0 B",
                "0 B",
            ),
            *(LINEAR, "tied to 'embed.weight'"),
        ],
    ]
    assert lines[end + 1 : end + 3] == [
        TOTALS,
        "",
    ]
    assert [re.split("  +", line) for line in lines[end + 3 :]] == [
        ["left as they are", "size", "because"],
        ["layers.{0..2}.q.bias", "768 B", "kept by rule '*s'"],
        ["layers.{0..2}.norm.bias", "768 B", "kept by rule '*s'"],
        ["layers.{0..2}.experts.gate_up_proj", "288 KiB", "no rule matches"],
        ["layers.{0..2}.norm.weight", "768 B", "no rule matches"],
    ]
    # Cells of a column start where its heading does.
    assert all(line[lines[0].index(" shape") :].lstrip()[0].isdigit() for line in lines[1:end])


def test_json_holds_totals_and_rows():
    result = plan(Model(), GOOD)
    document = json.loads(result.to_json())
    assert {key: document[key] for key in document if key != "parameters"} == {
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "coverage": result.coverage,
        "bits_per_weight": result.bits_per_weight,
    }
    assert [row["name"] for row in document["parameters"]] == [row.name for row in result.rows]
    assert next(row for row in document["parameters"] if row["name"] == "layers.0.experts.down_proj") == {
        "name": "layers.0.experts.down_proj",
        "shape": [4, 32, 80],
        "dtype": "float32",
        "action": "quantize",
        "rule": "re:.*down_proj",
        "format": "e2m1:1x16:e4m3fn:tensor",
        "activation": None,
        "k_axis": -2,
        "bytes_before": 4 * 32 * 80 * 4,
        "bytes_after": 4 * (80 * 18 + 4),
        "kernel": "reference.grouped_mm",
        "tied": None,
        "reason": None,
    }
