"""F.embedding_bag of quantized tables, against PyTorch's own of their values in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import lowbit
from lowbit.errors import FormatError, RowError, UnsupportedOpError
from lowbit.packed import PackedTensor
from lowbit.recipe import Recipe, Rule
from lowbit.tensor import QuantizedTensor
from lowbit.testing import Loopback, installed_backends, sample

FORMATS = ("INT8_ROW", "UINT2_G32", "MXFP4", "NVFP4", "FP8_128x128", "int3:1x32:float16", "int1:1x*:float32")
IDS = torch.tensor([3, 9, 3, 0, 19, 9, 9, 4, 1, 3])
OFFSETS = torch.tensor([0, 3, 3, 8])


def table(spec, dtype=torch.float32, rows=20, columns=96):
    return lowbit.quantize(sample((rows, columns), dtype=dtype), spec)


def near(found, q, ids, offsets, **options):
    """Within what a float32 sum of at most ten rows loses, and a rounding to the table's dtype."""
    weights = options.pop("per_sample_weights", None)
    options["per_sample_weights"] = None if weights is None else weights.double()
    values = q.dequantize(torch.float64)
    wanted = functional.embedding_bag(ids, values, offsets, **options)
    size = values.abs().max() * 10 * (1 if weights is None else weights.abs().max())
    torch.testing.assert_close(
        found.double(), wanted, rtol=torch.finfo(q.dtype).eps, atol=float(20 * torch.finfo(torch.float32).eps * size)
    )
    assert found.dtype == q.dtype


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("spec", FORMATS)
def test_bags_are_those_of_the_values(spec, mode):
    q = table(spec)
    for ids, offsets in ((IDS, OFFSETS), (IDS.int(), OFFSETS.int()), (IDS.view(5, 2), None)):
        for padding in (None, 9, -11):
            found = functional.embedding_bag(ids, q, offsets, mode=mode, padding_idx=padding)
            near(found, q, ids, offsets, mode=mode, padding_idx=padding)
    # What follows the end of the last bag is in none; of float64 PyTorch counts it in.
    last = torch.tensor([0, 4, 9])
    found = functional.embedding_bag(IDS, q, last, mode=mode, include_last_offset=True)
    near(found, q, IDS[:9], last[:2], mode=mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_weighted_and_rounded_once(dtype):
    q, by = table("INT4_G32", dtype), sample((10,), dtype=dtype)
    near(
        functional.embedding_bag(IDS, q, OFFSETS, mode="sum", per_sample_weights=by),
        *(q, IDS, OFFSETS),
        mode="sum",
        per_sample_weights=by,
    )


def test_nothing_gives_zeros():
    q = table("INT8_ROW")
    none = torch.zeros(0, dtype=torch.int64)
    for mode in ("sum", "mean", "max"):
        assert functional.embedding_bag(none, q, none, mode=mode).shape == (0, 96)
        assert torch.equal(functional.embedding_bag(none, q, none.new_zeros(2), mode=mode), torch.zeros(2, 96))
        assert torch.equal(functional.embedding_bag(none.view(3, 0), q, mode=mode), torch.zeros(3, 96))


def test_where_bags_begin_does_not_depend_on_who_asked_first():
    """Calls of one shape share it, whatever watched the first of them."""
    q = table("INT8_ROW")
    wanted = q.dequantize()[:15].view(5, 3, 96).sum(1)
    ids = torch.arange(15).view(5, 3)
    with torch.device("meta"), torch.inference_mode():
        found = [functional.embedding_bag(ids, q, mode="sum")]
    by = torch.ones(5, 3, requires_grad=True)
    found += [functional.embedding_bag(ids, q, mode="sum", per_sample_weights=given) for given in (by, None)]
    for each in found:
        torch.testing.assert_close(each, wanted)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "told"),
    [
        ((IDS, None), {}, FormatError, r"takes rows \(M,\) with offsets \(B,\), or \(B, L\) without"),
        ((IDS.view(5, 2), OFFSETS), {}, FormatError, "takes rows"),
        ((IDS.float(), OFFSETS), {}, FormatError, "must be int32 or int64; these are torch.float32"),
        ((IDS, OFFSETS[1:]), {}, FormatError, "must begin with 0, not fall, and not pass the 10 rows"),
        ((IDS, torch.tensor([0, 5, 4])), {}, FormatError, "must begin with 0, not fall"),
        ((IDS, torch.tensor([0, 11])), {}, FormatError, "must begin with 0, not fall"),
        ((IDS, OFFSETS[:0]), {"include_last_offset": True}, FormatError, "needs an offset at least"),
        ((IDS, OFFSETS), {"padding_idx": 20}, FormatError, "must be a row of the table, which has 20; it is 20"),
        ((IDS, OFFSETS), {"max_norm": 1.0}, UnsupportedOpError, "max_norm rewrites its table"),
        ((IDS, OFFSETS), {"mode": "min"}, UnsupportedOpError, "has the modes sum, mean, max"),
        ((IDS, OFFSETS), {"per_sample_weights": torch.ones(10)}, UnsupportedOpError, "per_sample_weights for the sum"),
        (
            (IDS, OFFSETS),
            {"mode": "sum", "per_sample_weights": torch.ones(9)},
            FormatError,
            r"need the shape of the input, \(10,\); they have \(9,\)",
        ),
    ],
)
def test_what_makes_no_bags_is_refused(arguments, options, kind, told):
    q = table("INT8_ROW")
    for weight in (q, bound(q).weight):
        with pytest.raises(kind, match=told):
            functional.embedding_bag(arguments[0], weight, arguments[1], **options)


def test_a_row_that_is_not_there_is_refused():
    for row in (20, -1):
        with pytest.raises(RowError, match=f"row {row} is not in the table, which has 20 rows"):
            functional.embedding_bag(torch.tensor([0, row]), table("INT8_ROW"), torch.tensor([0]))


def bound(q):
    module = nn.EmbeddingBag(*q.shape, device="meta")
    module.weight = nn.Parameter(q, requires_grad=False)
    lowbit.bind(module)
    return module


def test_recipes_quantize_tables_and_bind_finds_kernels_for_them():
    model = nn.Sequential(nn.EmbeddingBag(50, 64, mode="sum"))
    lowbit.quantize_(model, Recipe((Rule.of("0.weight", "INT4_G32"),)))
    # One that would run anyway leaves the weight as it is; another one it carries.
    for prefer, priority, kind in (((), 10, QuantizedTensor), (["other"], -1, PackedTensor)):
        with installed_backends(Loopback("other", priority=priority)):
            (row,) = lowbit.bind(model, prefer=prefer).rows
            assert type(model[0].weight) is kind
            assert (row.op, row.kernel) == ("embedding_bag", "other.embedding_bag")
            found = model[0](IDS, OFFSETS)
            lowbit.unbind(model)
        near(found, model[0].weight, IDS, OFFSETS, mode="sum")


@pytest.mark.parametrize("dynamic", [False, True])
def test_bags_compile_whole(dynamic):
    module = bound(table("INT4_G32"))
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for ids in (IDS, IDS[:9]):
        assert torch.equal(compiled(ids, OFFSETS), module(ids, OFFSETS))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch 2.11's own
def test_an_exported_program_has_the_operator():
    module = nn.EmbeddingBag(20, 96, mode="mean")
    module.weight = nn.Parameter(table("MXFP4"), requires_grad=False)
    program = torch.export.export(module, (IDS, OFFSETS))
    assert torch.equal(program.module()(IDS, OFFSETS), module(IDS, OFFSETS))
    assert any("embedding_bag" in str(node.target) for node in program.graph.nodes)
    aten = program.run_decompositions()
    torch.testing.assert_close(aten.module()(IDS, OFFSETS), module(IDS, OFFSETS))
