"""`lowbit bench gptq`: what it calls accuracy, and what it compares."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lowbit.backends import Refusal
from lowbit.bench import Given, Use
from lowbit.bench.ceilings import Ceilings
from lowbit.bench.measure import measure
from lowbit.bench.timing import Timing
from lowbit_algos.bench import benchmark

CPU = torch.device("cpu")


def cases(*specs, peers=False):
    return list(benchmark.cases(Given([(48, 128)], [Use.parse(spec) for spec in specs], CPU, peers)))


def test_a_factorization_for_each_shape_and_two_choices_for_each_format():
    told = [(case.told["step"], case.told["format"], case.told["choices"]) for case in cases("INT4_G32", "MXFP4")]
    assert told == [
        ("factorization", "", ""),
        *(("GPTQ", spec, choices) for spec in ("INT4_G32", "MXFP4") for choices in ("plain", "default")),
        *(("GPTQ of 4 experts", spec, "default") for spec in ("INT4_G32", "MXFP4")),
    ]


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_accuracy_is_that_of_the_outputs_error(kind):
    _, _, default, _ = cases("INT4_G32")
    weight, hessian = default.data(kind)
    assert torch.linalg.eigvalsh(hessian.double()).min() > 0
    assert (hessian.diagonal().max() / hessian.diagonal().median() > 100) == (kind == "outliers")
    exact, found = default.exact(weight, hessian).double(), {}
    for contender in (default.candidate, default.baseline):
        result = contender.run(*contender.prepare(weight, hessian)(0))
        error = (weight - result[0].dequantize()).double()
        wanted = ((error @ hessian.double()) * error).sum() / ((weight.double() @ hessian.double()) * weight).sum()
        off = exact - contender.decode(result)
        # The factor that it is taken by is damped by a millionth.
        assert float(off.square().sum() / exact.square().sum()) == pytest.approx(float(wanted), rel=1e-3)
        found[contender.name] = wanted
    assert found["lowbit"] < found["round to nearest"]


def test_experts_at_once_become_what_they_become_one_by_one():
    *_, stacked = cases("INT4_G32")
    data = stacked.data("normal")
    found, wanted = (each.decode(each.run(*each.prepare(*data)(0))) for each in (stacked.candidate, stacked.baseline))
    assert found.shape == (4, 48, 128)
    assert torch.equal(found, wanted)
    assert not torch.equal(found[0], found[1])


def test_both_factorizations_multiply_to_the_damped_hessian():
    factoring = cases()[0]
    data = factoring.data("normal")
    damped = data[1] + 0.01 * data[1].diagonal().mean() * torch.eye(128)
    assert torch.equal(factoring.exact(*data), damped)
    for contender in (factoring.candidate, factoring.baseline):
        product = contender.decode(contender.run(*contender.prepare(*data)(0)))
        assert float((product - damped).norm() / damped.norm()) < 1e-4


def test_torchaos_loop_runs_on_a_cpu_and_keeps_what_it_is_given(monkeypatch, tmp_path):
    """A module that stands for torchao's, with the lines that keep it off CPUs and the functions it may lack."""
    source = tmp_path / "api.py"
    source.write_text(
        "int4_row_quantize_zp = pack_int4 = None\n"
        "def gptq_quantize(hessian, weight, config):\n"
        "    device = hessian.device\n"
        '    assert device.type == "cuda"\n'
        "    codes, scale, zero = int4_row_quantize_zp(weight, config.group)\n"
        "    seen.append((weight.clone(), codes, scale, zero, pack_int4(codes)))\n"
        "    weight.zero_(), hessian.zero_()\n"
    )
    api = ModuleType("torchao.prototype.gptq.api")
    api.seen = []
    exec(compile(source.read_text(), source, "exec"), vars(api))
    api.GPTQConfig = lambda step, base_config: base_config
    quantization = ModuleType("torchao.quantization")
    quantization.Int4WeightOnlyConfig = lambda group_size: SimpleNamespace(group=group_size)
    for name in ("torchao", "torchao.prototype", "torchao.prototype.gptq"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    monkeypatch.setitem(sys.modules, "torchao.prototype.gptq.api", api)
    found = cases("INT4_G128", peers=True)
    (contender,) = found[1].peers
    assert found[2].peers == ()
    data = found[1].data("normal")
    before = [part.clone() for part in data]
    contender.run(*contender.prepare(*data)(0))
    assert all(map(torch.equal, data, before))
    ((weight, codes, scale, zero, packed),) = api.seen
    assert int(codes.min()) == -8
    assert int(codes.max()) == 7
    # Every value is within half a step of what its code stands for.
    assert ((codes * scale.mT + zero.mT - weight).abs() <= scale.mT * 0.501).all()
    assert torch.equal(packed & 15, codes[:, ::2] & 15)
    assert torch.equal(packed >> 4, codes[:, 1::2])


def test_torchao_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    (refusal,) = cases("INT4_G128", peers=True)[1].peers
    assert isinstance(refusal, Refusal)
    assert "torchao" in refusal.reason
    assert cases("MXFP4", peers=True)[1].peers == ()


def test_a_row_of_results_has_both_errors_and_the_speed_over_the_inverse(monkeypatch):
    monkeypatch.setattr("lowbit.bench.timing._ROTATED", 1)
    timing = Timing(1, 1, 1, 3, 1, 1, "rotated")
    ceilings = Ceilings(1e9, 1, 1e9, 1, "float32", timing, timing)
    factoring, rounding, *_ = (measure(case, CPU, ceilings, budget=0.001) for case in cases("INT8_ROW"))
    ours, theirs = rounding["contenders"]
    for kind in ("normal", "outliers"):
        assert ours["sqnr"][kind]["exact"] > theirs["sqnr"][kind]["exact"]
    ours, theirs = factoring["contenders"]
    assert ours["speedup"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert factoring["flops"] == 128**3 / 3
    assert rounding["contenders"][0]["moved_bytes"] == 4 * (48 * 128 + 128**2) + 48 * 132
