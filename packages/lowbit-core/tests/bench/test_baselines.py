"""`lowbit bench attention`, where lowbit has nothing yet: baselines and others compute what is exact."""

from __future__ import annotations

import math
import sys
from functools import partial
from itertools import product
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from lowbit import attending
from lowbit.backends import Refusal
from lowbit.bench import Given, attention, peers
from lowbit.bench.case import footprint
from lowbit.bench.command import main
from lowbit.bench.inputs import sqnr
from lowbit.testing import Loopback, installed_backends

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(autouse=True)
def rotary_embeddings_are_not_compiled(monkeypatch):
    monkeypatch.setattr(attention, "compiled", lambda function: function)


def cases(length, *, peers=False):
    return list(attention.benchmark.cases(Given([(length,)], [], CPU, peers)))


def result(contender, data):
    return contender.decode(contender.run(*contender.prepare(*data)(0)))


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Peers that need a GPU are built, and what they compile is not."""
    monkeypatch.setattr(peers, "_on_gpu", lambda device, build: build)
    monkeypatch.setattr(peers, "compiled", lambda function: function)


def module(monkeypatch, name, **holds):
    found = ModuleType(name)
    vars(found).update(holds)
    monkeypatch.setitem(sys.modules, name, found)


def attended(q, k, v, *, causal):
    """`softmax(q k^T / sqrt(D)) v`, every query of a head in a loop."""
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        keys, values = (x[0, head * k.shape[1] // q.shape[1]] for x in (k, v))
        for i, query in enumerate(q[0, head]):
            seen = i + 1 if causal else len(keys)
            weights = (keys[:seen] @ query / math.sqrt(128)).exp()
            out[0, head, i] = weights @ values[:seen] / weights.sum()
    return out


def test_attention_is_prefill_and_decode_with_all_and_with_fewer_heads_of_keys(bench):
    code, results, printed = bench("attention", "--shapes", "48")
    assert code == 0
    told = [tuple(row["case"].values()) for row in results["rows"]]
    steps = ("causal prefill", "causal prefill + RoPE", "prefill")
    schemes = ("INT8_FP8", "INT8_FP8_ROTATED", "FP8_HEAD")
    wanted = [
        (step, f"32/{heads}", 48, scheme)
        for heads in (32, 8)
        for step, scheme in (*product(steps, schemes), ("decode", "INT8_FP8"))
    ]
    caches = [f"cache {name}:1x*:float32" for name in ("e4m3fn", "int8")]
    assert told == wanted + [("decode", f"32/{heads}", 48, cache) for heads in (32, 8) for cache in caches]
    assert "not lowbit: no installed backend has attention (20 times)" in printed.out
    assert "not lowbit: no installed backend attends to a cache (4 times)" in printed.out
    for row in results["rows"]:
        _, baseline = row["contenders"]
        assert baseline["name"] in {"torch flash", "torch math"}
        # Weights and results are rounded to bfloat16, each by 2^-9 at most.
        assert baseline["sqnr"]["normal"]["exact"] > 20 * math.log10(2**9 / 2)
        assert baseline["flops_per_s"] == pytest.approx(row["flops"] / baseline["seconds"])


def test_attention_has_the_heads_that_are_asked_for(bench, capsys):
    code, results, _ = bench("attention", "--shapes", "16", "--heads", "6/3,2/1")
    assert code == 0
    flops = {}
    for row in results["rows"]:
        flops.setdefault(row["case"]["heads"], set()).add(row["flops"])
    assert flops == {f"{heads}/{heads // 2}": {4 * heads * n * 16 * 128 for n in (16, 8, 1)} for heads in (6, 2)}
    for wrong in ("6/4", "0/1", "6", "6/0", ""):
        with pytest.raises(SystemExit):
            main(["attention", "--heads", wrong])
        assert f"argument --heads: {wrong!r} must be heads of queries, a slash" in capsys.readouterr().err


def test_operations_and_bytes_of_attention_are_those_of_its_products_and_operands():
    for case in cases(48):
        data, causal = case.data("normal"), case.told["step"].startswith("causal")
        data = data[:3]
        assert [len(x[0]) for x in data] == [32, *2 * [int(case.told["heads"].removeprefix("32/"))]]
        with FlopCounterMode(display=False) as counter:
            out = attention._attention(SDPBackend.MATH, *data, causal=False)
        assert case.flops == counter.get_total_flops() / (2 if causal else 1)
        assert case.baseline.moved == footprint((*data, out))


def test_a_cache_is_read_in_codes():
    with installed_backends(Loopback()):
        found = [case for case in cases(48) if case.told["scheme"].startswith("cache")]
    for case, bound in zip(found, (24, 36, 24, 36), strict=True):
        data = case.data("normal")
        operands = case.candidate.prepare(*data)(0)
        assert case.candidate.kernel == "loopback.cached_attention"
        # Three bits of mantissa, or eight bits of which normal values take some.
        assert bound < sqnr(case.exact(*data), result(case.candidate, data)) < bound + 10
        assert case.candidate.moved == footprint(operands[:2]) + data[0].nbytes


def test_exact_attention_is_that_of_one_query_after_the_other(monkeypatch):
    monkeypatch.setattr(attention, "_ROWS", 16)
    for case in cases(40):
        data = case.data("outliers")
        q, k, v, *tables = (x.double() for x in data)
        q, k = (attending.roped(x, *tables or (None, None)) for x in (q, k))
        wanted = attended(q, k, v, causal=case.told["step"].startswith("causal"))
        torch.testing.assert_close(case.exact(*data), wanted, rtol=1e-12, atol=1e-12)


def test_the_baseline_is_the_fastest_of_the_backends_that_run(monkeypatch):
    seconds, ran = {SDPBackend.FLASH_ATTENTION: 2.0, SDPBackend.EFFICIENT_ATTENTION: 1.0, SDPBackend.MATH: 3.0}, []

    def attend(backend, *data, causal, turn):
        ran.append(backend)
        if backend not in seconds:
            raise RuntimeError("no viable backend")
        return backend

    monkeypatch.setattr(attention, "_attention", attend)
    monkeypatch.setattr(attention, "time_calls", lambda make, *_, **__: SimpleNamespace(median=seconds[make(0)()]))
    data = (torch.ones(1, 32, 4, 128),) * 3
    name, run = attention.fastest(data, causal=True)
    assert (name, run(*data)) == ("efficient", SDPBackend.EFFICIENT_ATTENTION)
    assert SDPBackend.CUDNN_ATTENTION in ran
    seconds.clear()
    with pytest.raises(RuntimeError, match="no viable backend"):
        attention.fastest(data, causal=True)


def test_others_attention_computes_what_is_exact(monkeypatch, as_on_gpu):
    """Modules that stand for FlashAttention 3, heads before last, and for sageattention, which changes its keys."""
    asked = []

    def flash(name, q, k, v, causal, q_descale=None, k_descale=None, v_descale=None):
        asked.append((name, q.dtype))
        if q_descale is not None:
            each = q.shape[2] // k.shape[2]
            assert q_descale.shape == k_descale.shape == v_descale.shape == (1, k.shape[2])
            q = q.float() * q_descale.repeat_interleave(each, 1)[:, None, :, None]
            k, v = k.float() * k_descale[:, None, :, None], v.float() * v_descale[:, None, :, None]
        assert q.shape[2] == 32
        q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
        return attended(q, k, v, causal=causal).bfloat16().transpose(1, 2)

    def sage(q, k, v, tensor_layout, is_causal):
        assert tensor_layout == "HND"
        k -= k.mean(2, keepdim=True)
        return attended(q.double(), k.double(), v.double(), causal=is_causal).bfloat16()

    attends = {name: partial(flash, name) for name in ("flash_attn_func", "flash_attn_with_kvcache")}
    module(monkeypatch, "flash_attn_interface", **attends)
    module(monkeypatch, "sageattention", sageattn=sage)
    for case in cases(24, peers=True):
        if case.told["step"].endswith("RoPE"):
            assert not case.peers
            continue
        data = case.data("normal")
        before, exact = [x.clone() for x in data], case.exact(*data)
        found = {peer.name: sqnr(exact, result(peer, data)) for peer in case.peers}
        assert list(found) == ["FA3", "FA3 fp8", "FA3 fp8 after rounding", "sageattention"]
        # Results, and keys by sage, are rounded to bfloat16; operands to e4m3, by 2^-4 at most.
        assert found["FA3"] > 50
        assert found["sageattention"] > 45
        assert 24 < found["FA3 fp8"] == found["FA3 fp8 after rounding"] < 40
        assert all(map(torch.equal, data, before))
        name = "flash_attn_with_kvcache" if case.told["step"] == "decode" else "flash_attn_func"
        assert asked == [(name, dtype) for dtype in (torch.bfloat16, *2 * [torch.float8_e4m3fn])]
        asked.clear()
        whole, halves, again, _ = (peer.moved for peer in case.peers)
        assert whole == again == case.baseline.moved
        assert halves == sum(x.nbytes for x in data) / 2 + data[0].nbytes


def test_codes_of_heads_are_scaled_by_the_greatest_value_of_those_that_share_keys():
    q, k, _ = cases(24)[10].data("outliers")
    for x, each in ((q.transpose(1, 2), 4), (k.transpose(1, 2), 1)):
        scale, codes = peers._fp8_heads(x, 8)
        for head in range(x.shape[2]):
            shared = x[0, :, head // each * each : head // each * each + each].float()
            assert float(scale[0, head // each]) == pytest.approx(float(shared.abs().max()) / 448)
            values = codes[0, :, head].float() * scale[0, head // each]
            # Half a step of three bits of mantissa, or of the least subnormal.
            bound = (x[0, :, head].float().abs() / 16).clamp_min(float(scale[0, head // each]) * 2**-10)
            assert ((values - x[0, :, head].float()).abs() <= bound * 1.001).all()


def test_others_are_named_with_the_reason_where_they_are_not(monkeypatch, as_on_gpu):
    for name in ("flash_attn_interface", "sageattention"):
        monkeypatch.setitem(sys.modules, name, None)
    found = cases(64, peers=True)[0].peers
    assert [peer.kernel for peer in found] == ["FA3", "FA3 fp8", "FA3 fp8 after rounding", "sageattention"]
    assert all(isinstance(peer, Refusal) and peer.reason.startswith("ModuleNotFoundError: ") for peer in found)
    assert cases(64)[0].peers == ()
