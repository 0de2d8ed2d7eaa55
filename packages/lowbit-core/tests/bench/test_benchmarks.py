"""The benchmarks of lowbit-core: what they measure is what they say, on a CPU and on small shapes."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

import lowbit
from lowbit import FORMATS, Format
from lowbit.backends import Refusal
from lowbit.bench import Given, Use, attention, bags, cast, embedding, grouped, linear, pad, peers, timing
from lowbit.bench.case import footprint
from lowbit.bench.inputs import EXACT, normal
from lowbit.testing import Loopback, installed_backends

CPU = torch.device("cpu")
BENCHMARKS = {
    "attention": attention.benchmark,
    "bags": bags.benchmark,
    "cast": cast.benchmark,
    "embedding": embedding.benchmark,
    "grouped": grouped.benchmark,
    "linear": linear.benchmark,
    "pad": pad.benchmark,
}


def contenders(results):
    return {each["role"]: each for each in results["rows"][0]["contenders"]}


def decibels(exact, found):
    return float(20 * torch.log10(exact.norm() / (exact - found).norm()))


def cases(name, shape, *specs, peers=False):
    return list(BENCHMARKS[name].cases(Given([shape], [Use.parse(spec) for spec in specs], CPU, peers)))


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_drawn_shapes_fit_the_formats_and_are_the_same_for_a_seed(name, seed, device):
    benchmark = BENCHMARKS[name]
    uses = [Use.parse(spec) for spec in benchmark.formats]
    formats = [use.format for use in uses]
    shapes = benchmark.shapes(seed, device, formats)
    assert shapes == benchmark.shapes(seed, device, formats)
    assert shapes != benchmark.shapes(seed + 1, device, formats)
    assert len(shapes) == 10
    assert len(set(shapes)) > 7
    for shape in [*shapes, *benchmark.usual(device)]:
        for use in uses:
            benchmark.check(shape, use)
        for dim, length in zip(benchmark.dims, shape, strict=True):
            assert length % 32 == 0 or not dim.grouped
            assert length >= 1
            assert length <= 4 * (dim.high if device == "cuda" else dim.high_on_cpu)


def test_shapes_are_drawn_evenly_in_their_logarithm():
    drawn = [shape[0] for seed in range(100) for shape in linear.benchmark.shapes(seed, "cuda", [])]
    middle = math.sqrt(1 * 8192)
    assert sum(m < middle for m in drawn) == pytest.approx(500, abs=4 * math.sqrt(250))
    assert min(drawn) == 1
    assert max(drawn) > 7000


def test_cast_counts_bytes_and_measures_what_rounding_costs(bench):
    code, results, printed = bench("cast", "--shapes", "64x256", "--formats", "MXFP8")
    assert code == 0
    told = [(row["case"]["op"], row["case"]["blocks along"]) for row in results["rows"]]
    rest = [("quantize_both", "rows and columns"), ("quantize_blocked", "rows"), ("dequantize", "rows")]
    assert told == [("quantize", "rows"), ("quantize", "columns"), *rest]
    (x,) = cases("cast", (64, 256), "MXFP8")[0].data("outliers")
    for row, axis in zip(results["rows"], (-1, -2, -1, -1, -1), strict=True):
        candidate, baseline, *others = row["contenders"]
        assert candidate["kernel"].startswith("reference.")
        # Two bytes of bfloat16, one of e4m3, and a scale of a byte for each 32; once more along the other axis.
        times = 2 if row["case"]["op"] == "quantize_both" else 1
        assert candidate["moved_bytes"] == baseline["moved_bytes"] == 64 * 256 * (2 + times * (1 + 1 / 32))
        assert [each["name"] for each in others] == (["two casts"] if times == 2 else [])
        values = lowbit.quantize(x, "MXFP8", axis=axis).dequantize(torch.float32)
        if row["case"]["op"] == "dequantize":
            values = values.bfloat16().float()
        assert candidate["sqnr"]["outliers"]["exact"] == pytest.approx(decibels(x.float(), values), abs=1e-3)
        assert candidate["speedup"] == pytest.approx(baseline["seconds"] / candidate["seconds"])
        ceiling = results["ceilings"]["bytes_per_s"]
        assert candidate["of_ceiling"] == pytest.approx(candidate["bytes_per_s"] / ceiling)
    assert "copy of as many bytes" in printed.out
    assert f"{results['rows'][0]['contenders'][0]['sqnr']['normal']['exact']:.1f}  " in printed.out


def test_pad_moves_rows_and_counts_their_bytes(bench):
    code, results, _ = bench("pad", "--shapes", "300x64x5")
    assert code == 0
    padded = (300 + 5 * 127) // 128 * 128
    for row, rows in zip(results["rows"][:2], (padded, 300), strict=True):
        candidate, baseline = row["contenders"]
        assert candidate["kernel"] == f"reference.{row['case']['op']}"
        assert candidate["moved_bytes"] == baseline["moved_bytes"] == 2 * 64 * (300 + rows)
        assert candidate["sqnr"]["outliers"]["exact"] == EXACT
    for row, times in zip(results["rows"][2:], (1, 2), strict=True):
        candidate, baseline, steps = row["contenders"]
        assert candidate["kernel"] == "reference.quantize_groups"
        assert candidate["moved_bytes"] == baseline["moved_bytes"] == 64 * (2 * 300 + padded * times * (1 + 1 / 32))
        # The same codes in another way; 4 bits of mantissa, and 2 bits for a scale that is a power of two.
        assert candidate["sqnr"]["outliers"] == steps["sqnr"]["outliers"]
        assert candidate["sqnr"]["normal"]["exact"] > 6 * 4


@pytest.mark.parametrize("name", ["attention", "pad"])
def test_benchmarks_without_formats_refuse_some(bench, capsys, name):
    with pytest.raises(SystemExit):
        bench(name, "--formats", "MXFP8")
    assert "--formats: this benchmark has no formats" in capsys.readouterr().err


def test_linear_beside_bfloat16_on_a_bound_kernel(bench):
    loopback = Loopback(packs=True)
    with installed_backends(loopback):
        code, results, printed = bench("linear", "--shapes", "3x64x128", "--formats", "INT4_G128")
    assert code == 0
    assert loopback.calls["linear"] > 5
    found = contenders(results)
    assert found["candidate"]["kernel"] == "loopback.linear"
    assert found["candidate"]["sqnr"]["normal"]["reference"] == EXACT
    assert "the same" in printed.out
    assert found["candidate"]["moved_bytes"] == 2 * 3 * (64 + 128) + 64 * 128 * (0.5 + 2 / 128)
    assert found["baseline"]["moved_bytes"] == 2 * (3 * 64 + 3 * 128 + 64 * 128)
    assert found["candidate"]["flops_per_s"] == pytest.approx(2 * 3 * 64 * 128 / found["candidate"]["seconds"])
    x, weight = (part.double() for part in cases("linear", (3, 64, 128), "INT4_G128")[0].data("normal"))
    exact = x @ weight.T
    values = lowbit.quantize(weight.bfloat16(), "INT4_G128").dequantize().double()
    # Rounding the result to bfloat16 costs 2^-9 of it, next to errors of a tenth.
    wanted = decibels(exact, x @ values.T)
    assert found["candidate"]["sqnr"]["normal"]["exact"] == pytest.approx(wanted, abs=0.1)
    assert found["baseline"]["sqnr"]["normal"]["exact"] > 45


@pytest.mark.parametrize(
    ("name", "shape", "spec", "kernel"),
    [
        ("linear", (3, 64, 128), "INT8_ROW/INT8_ROW", "reference.linear"),
        ("linear", (3, 64, 128), "FP8_128x128/FP8_1x128", "reference.linear"),
        ("grouped", (10, 64, 128, 3), "MXFP4", "reference.grouped_mm"),
        ("grouped", (2, 64, 128, 3), "FP8_ROW/FP8_ROW", "reference.grouped_mm"),
        ("embedding", (10, 64, 128), "NVFP4", "reference.embedding"),
        ("bags", (5, 3, 64, 128), "INT4_G32", "reference.embedding_bag"),
        *(("cast", (256, 128), name, "reference.quantize") for name in FORMATS),
    ],
)
def test_the_reference_and_the_candidate_compute_what_is_exact(name, shape, spec, kernel):
    loopback = Loopback()
    for case in cases(name, shape, spec):
        assert case.reference is None
        assert case.candidate.kernel.startswith("reference.")
    with installed_backends(loopback):
        (case, *_) = cases(name, shape, spec)
    assert case.candidate.kernel == kernel.replace("reference", "loopback")
    assert any("reference" in str(refusal) for refusal in case.candidate.refusals)
    data = case.data("normal")
    exact = case.exact(*data)
    results = {}
    for contender in (case.candidate, case.reference, case.baseline):
        make = contender.prepare(*data)
        first, second = make(0), make(1)
        if contender.decode is not None:
            results[contender.name] = contender.decode(contender.run(*first))
        assert footprint(second) == footprint(first)
    assert torch.equal(results["lowbit"], results["reference"])
    # Two bits and no more keep a signal above its noise.
    assert decibels(exact.double(), results["lowbit"].double()) > (3 if "UINT2" in spec else 12)


def test_copies_of_operands_share_no_memory():
    for name, shape, spec in (("linear", (3, 64, 128), "MXFP8"), ("grouped", (10, 64, 128, 3), "MXFP8")):
        (case,) = cases(name, shape, spec)
        for contender in (case.candidate, case.baseline):
            make = contender.prepare(*case.data("normal"))
            operands = [operand for i in range(3) for operand in make(i)]
            pointers = [part.data_ptr() for operand in operands for part in parts(operand)]
            assert len(set(pointers)) == len(pointers)


def parts(operand):
    """The plain tensors in an operand: those of a layer's weight, of a quantized tensor, or itself."""
    held = getattr(operand, "weight", operand)
    return held.inner_tensors().values() if hasattr(held, "inner_tensors") else [held]


def test_calls_of_embedding_pick_other_rows_of_tables_that_no_cache_holds(monkeypatch):
    (case,) = cases("embedding", (16, 1000, 64), "INT8_ROW")
    assert case.candidate.touched == 16 * (64 + 4)
    for rotated, tables in ((60_000, 1), (200_000, 3)):
        monkeypatch.setattr(timing, "_ROTATED", rotated)
        make = case.candidate.prepare(*case.data("normal"))
        calls = [make(i) for i in range(6)]
        assert [table for _, table in calls[:tables]] == [table for _, table in calls[tables : 2 * tables]]
        assert len({id(table) for _, table in calls}) == tables
        assert len({tuple(ids.tolist()) for ids, _ in calls}) == 6


def test_tokens_fewer_than_experts_read_no_more_experts_than_there_are_tokens():
    (case,) = cases("grouped", (2, 64, 128, 8), "INT8_ROW")
    assert case.candidate.moved == 2 * 2 * (64 + 128) + 2 * 64 * (128 + 4)
    assert case.baseline.moved == 2 * 2 * (64 + 128) + 2 * 64 * 128 * 2


def test_operands_are_counted_down_to_the_parts_of_a_quantized_weight():
    weight = lowbit.quantize(torch.ones(4, 64), "MXFP4")
    layer = torch.nn.Linear(64, 4)
    assert footprint((weight, [torch.zeros(3)], "words")) == 4 * (32 + 2) + 12
    assert footprint(layer) == 4 * (4 * 64 + 4)


def test_peers_are_named_with_the_reason_where_they_are_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    found = cases("cast", (64, 128), "MXFP8", peers=True)[0].peers
    assert [peer.kernel for peer in found] == ["torchao to_mx, compiled", "torchao triton_to_mxfp8", "triton_kernels"]
    assert all(isinstance(peer, Refusal) for peer in found)
    assert found[0].reason.startswith("ModuleNotFoundError: ")
    assert found[1].reason == "needs an NVIDIA GPU; this benchmark runs on cpu"
    (case,) = cases("linear", (3, 64, 128), "INT4_G128", peers=True)
    assert {peer.kernel for peer in case.peers if isinstance(peer, Refusal)} == {"humming", "torchao tinygemm", "mslk"}
    (case,) = cases("grouped", (3, 64, 128, 2), "FP8_ROW/FP8_ROW", peers=True)
    assert {peer.kernel for peer in case.peers} == {"torch scaled_grouped_mm", "mslk"}


@pytest.mark.parametrize(
    ("name", "shape", "spec", "peer", "least"),
    [
        ("linear", (3, 64, 256), "INT4_G128", "torch int4pack", 18),
        ("linear", (3, 64, 256), "INT8_ROW/INT8_ROW", "oneDNN qlinear", 35),
        ("bags", (5, 7, 64, 128), "INT8_ROW", "torch quantized byte", 40),
        ("bags", (5, 7, 64, 128), "MXFP4", "torch quantized 4bit", 18),
        ("bags", (5, 7, 64, 128), "int2:1x*:float32", "torch quantized 2bit", 4),
    ],
)
def test_torchs_own_peers_on_a_cpu_compute_the_same(name, shape, spec, peer, least):
    (case,) = cases(name, shape, spec, peers=True)
    (found,) = (each for each in case.peers if getattr(each, "name", "") == peer)
    data = case.data("normal")
    result = found.decode(found.run(*found.prepare(*data)(0)))
    assert decibels(case.exact(*data).double(), result.double()) > least


@pytest.mark.parametrize("spec", ["MXFP8", "MXFP4", "NVFP4"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_scales_and_codes_of_a_peer_are_decoded(monkeypatch, spec, axis):
    """A module that stands for torchao gives what lowbit does, in torchao's order and dtypes."""
    fmt = Format.parse(spec)

    def rounded(x, *args, **kwargs):
        q = lowbit.quantize(x, fmt, tensor_scale=torch.ones(1, 1) if fmt.tensor_scale else None)
        return q.scale, q.qdata

    for name in ("torchao", "torchao.prototype", "torchao.prototype.mx_formats"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, function in (("mx_tensor", "to_mx"), ("nvfp4_tensor", "nvfp4_quantize")):
        module = ModuleType(name)
        setattr(module, function, rounded)
        monkeypatch.setitem(sys.modules, f"torchao.prototype.mx_formats.{name}", module)
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    case = cases("cast", (64, 128), spec, peers=True)[0 if axis == -1 else 1]
    offered = [peer for peer in case.peers if not isinstance(peer, Refusal)]
    assert len(offered) == (0 if (spec, axis) == ("NVFP4", -2) else 1)
    (x,) = case.data("outliers")
    for contender in offered:
        found = contender.decode(contender.run(*contender.prepare(x)(0)))
        scale = torch.ones(1, 1) if fmt.tensor_scale else None
        assert torch.equal(found, lowbit.quantize(x, fmt, tensor_scale=scale, axis=axis).dequantize(torch.float32))


@pytest.mark.parametrize("spec", ["FP8_ROW", "FP8_1x128"])
def test_the_compiled_cast_of_torch_rounds_like_the_format(monkeypatch, spec):
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    case = cases("cast", (128, 256), spec, peers=True)[0]
    (contender,) = (peer for peer in case.peers if not isinstance(peer, Refusal))
    (x,) = case.data("normal")
    found = contender.decode(contender.run(*contender.prepare(x)(0)))
    assert torch.equal(found, lowbit.quantize(x, spec).dequantize(torch.float32))


def test_what_others_products_get_is_rounded_like_the_formats():
    x, weight = (normal(m, 256, kind="outliers", seed=m, device=CPU) for m in (3, 384))
    scale, codes = peers._fp8_groups(x)
    assert scale.stride()[0] == 1
    found = peers._values(peers._FP8_1X128, -1, scale, codes)
    assert torch.equal(found, lowbit.quantize(x, "FP8_1x128").dequantize(torch.float32))
    _, codes, scale = peers._block_copies(x, weight)(0)
    found = codes.float().view(3, 128, 2, 128) * scale.view(3, 1, 2, 1)
    assert torch.equal(found.view(384, 256), lowbit.quantize(weight, "FP8_128x128").dequantize(torch.float32))
    scale, codes = peers._experts(weight.view(3, 128, 256))
    found = codes.float() * scale[..., None]
    assert torch.equal(found, lowbit.quantize(weight.view(3, 128, 256), "FP8_ROW").dequantize(torch.float32))
