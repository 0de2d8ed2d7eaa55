"""Which plan products run by, what it is expected to cost, and where plain weights are faster."""

from __future__ import annotations

import re
import sys
from itertools import product

import pytest
import torch
from torch import nn

import lowbit
from lowbit.backends import Call, explain, kernel
from lowbit.format import Format
from lowbit.packed import PackedTensor
from lowbit_kernels_cuda import linear, packed, plans
from lowbit_kernels_cuda.compiling import told

SPECS = ("INT4_G128", "UINT4_G128", "INT8_ROW_ASYM", "FP8_ROW", "FP8_128x128", "MXFP6_E2M3", "MXFP4", "NVFP4", "MXINT8")
SPECS += ("int8:1x64:bfloat16:zero=int8", "int2:1x32:bfloat16", "uint3:1x192:float16:zero=uint3")
SPECS += ("int5:1x*:float32", "int7:1x16:float32")
SIZES = (1, 20, 60, 100, 200, 5000)


def how(spec, dtype=torch.bfloat16):
    return linear.constants(Format.parse(spec), dtype, None)


@pytest.mark.parametrize("spec", SPECS)
def test_every_product_has_a_plan_that_its_scales_allow(spec):
    fmt = Format.parse(spec)
    for dtype, hopper, m, experts in product((torch.bfloat16, torch.float16), (False, True), SIZES, (0, 8)):
        constants = how(spec, dtype)
        cost, plan = plans.choose(fmt, constants, m, 4096, 4096, 108, experts, hopper=hopper)
        assert cost > 0
        assert hopper or not plan.kind.depth
        assert plan.kind.exact or not plans.needs_exactness(constants)
        if plan.kind.exact:
            group = constants["GROUP"]
            assert group % plan.kind.columns == 0 or (group < 64 and plan.kind.columns == 64)


def test_parts_of_k_are_no_more_than_steps():
    for spec, m, n, k in product(SPECS, (1, 16, 64, 65, 4096), (16, 4096, 28672), (64, 384, 8192)):
        plan = linear.schedule(Format.parse(spec), torch.bfloat16, m, n, k, torch.device("cpu"), lifted=False)
        assert plan.splits <= max(k // plan.kind.columns // 2, 1)


def test_equal_plans_are_one_so_that_compiling_is_told_once():
    found = [
        linear.schedule(Format.parse("MXFP4"), torch.bfloat16, m, 64, 256, torch.device("cpu"), lifted=True)
        for m in (1, 2)
    ]
    assert found[0] is found[1]


def test_terms_are_what_programs_do():
    """A hundred programs on ten multiprocessors, four at a time: two rounds of four, and two at the end."""
    kind = plans.Kind(64, 16, 128, 4, 3)
    found = plans.terms(plans.Plan(kind, 2), 1, 16, 64 * 50, 128 * 12, 4, 10)
    assert found == [1.0, 1.0, 2 * 16 * 3200 * 4e-9, 3.0, 0.0, 0.0, 6.0, 0.0, 12.0]


def test_steps_of_a_block_beyond_the_last_token_cost_more():
    """Ten programs of 24 steps on ten multiprocessors, each for 128 tokens of which there are 96."""
    plan = plans.Plan(plans.Kind(64, 128, 64, 4, 4, depth=4))
    assert plans.terms(plan, 1, 96, 640, 64 * 24, 2, 10)[4:] == [24.0, 24.0, 0.0]
    assert plans.terms(plan, 1, 128, 640, 64 * 24, 2, 10)[4:] == [0.0, 24.0, 0.0]


def test_costs_are_those_of_the_data():
    """Predicted times of what was measured: never below the bytes of the weight at the speed of memory."""
    for spec, n, k in product(("INT4_G128", "MXFP4", "INT8_ROW"), (4096, 14336, 28672), (4096, 8192)):
        fmt = Format.parse(spec)
        cost, _ = plans.choose(fmt, how(spec), 16, n, k, 132, hopper=True)
        least = n * k * fmt.bits_per_element((n, k)) / 8 / 3.35e12 * 1e6
        assert least < cost < 3 * least + 8


def test_more_experts_than_tokens_are_not_read():
    fmt, constants = Format.parse("MXFP4"), how("MXFP4")
    few, _ = plans.choose(fmt, constants, 8, 1536, 2048, 132, 128, hopper=True)
    all_, _ = plans.choose(fmt, constants, 128, 1536, 2048, 132, 128, hopper=True)
    assert few < all_ / 4


def test_where_it_is_slower_is_told_and_followed():
    found = ((1, 0.4), (64, 0.9), (128, 1.3), (512, 1.1), (1024, 1.01), (4096, 1.2))
    assert plans.slower_tokens(found) == "128 to 512, 4096 and more tokens"
    assert plans.slower_tokens(found[:2]) is None
    assert plans.slower_tokens(found[1:3] + found[4:5]) == "about 128 tokens"
    assert [m for m in (1, 2, 64, 70, 100, 128, 300, 512, 1024, 2048, 9999) if plans.is_slower(found, m)] == [
        *(100, 128, 300, 512, 2048, 9999)
    ]


def test_a_weight_is_kept_plain_only_where_codes_are_slower_somewhere(monkeypatch):
    fast, slow = (
        Call("linear", Format.parse("INT4_G128"), None, "cuda", torch.bfloat16, *s)
        for s in ((8192, 8192), (1024, 4096))
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(linear, "_device", lambda _: (132, True, True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    linear._ratios.cache_clear()
    try:
        assert packed.slower(fast) is None
        assert packed.refuses_values(fast).startswith("needs a weight that is slower than a plain one")
        assert packed.slower(slow).endswith(" tokens")
        assert packed.refuses_values(slow) is None
        monkeypatch.setattr(linear, "_device", lambda _: (108, False))
        linear._ratios.cache_clear()
        assert packed.slower(slow).endswith("(a model: not measured on this GPU)")
    finally:
        linear._ratios.cache_clear()


def test_values_are_used_where_they_are_faster(monkeypatch):
    """With values unlike the codes, so that it shows which were used."""
    monkeypatch.setattr(linear, "_ratios", lambda *_: ((1, 0.5), (16, 0.5), (32, 2.0)))
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, 256, generator=generator).to(torch.bfloat16)
    q = lowbit.quantize(w, "INT4_G128")
    q = q.with_inner(q.inner_tensors() | {"pre_scale": torch.rand(256, generator=generator) + 0.5})
    parts = packed.pack_values(q)
    description = lowbit.backends.Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    assert torch.equal(parts[-1], q.dequantize())
    for name, part in packed.unpack_values(parts, description).items():
        assert torch.equal(part, getattr(q, name))
    parts[-1].mul_(-1)
    for m in (1, 16, 40):
        x = torch.randn(m, 256, generator=generator).to(torch.bfloat16)
        by_codes = packed.run(x, parts[:-1], description, None)
        found = packed.run_values(x, parts, description, None)
        if m <= 16:
            assert torch.equal(found, by_codes)
        else:
            torch.testing.assert_close(found, -by_codes, rtol=0.02, atol=0.1)


@pytest.mark.gpu
def test_bind_keeps_values_if_asked_and_there_is_room(monkeypatch):
    layer = nn.Linear(4096, 1024, dtype=torch.bfloat16, device="cuda")
    q = lowbit.quantize(layer.weight.detach(), "INT4_G128")
    layer.weight = nn.Parameter(q, requires_grad=False)
    row = lowbit.bind(layer).rows[0]
    assert row.kernel == "cuda.linear"
    assert row.slower.endswith("tokens")
    assert "slower than plain at" in str(lowbit.bind(layer))
    assert f"slower than a plain weight at {row.slower}" in explain(
        Call("linear", q.format, None, "cuda", torch.bfloat16, 1024, 4096)
    )
    x = torch.randn(256, 4096, dtype=torch.bfloat16, device="cuda")
    by_codes = layer(x[:4])
    bound = lowbit.bind(layer, policy="fastest").rows[0]
    assert (bound.kernel, bound.slower) == ("cuda.linear_or_plain", None)
    assert torch.equal(layer(x[:4]), by_codes)
    assert torch.equal(layer(x), nn.functional.linear(x, q.dequantize(), layer.bias))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (4, 256):
            assert torch.equal(compiled(x[:m]), layer(x[:m]))
    assert isinstance(layer.weight, PackedTensor)
    assert layer.state_dict()["weight"].inner_tensors().keys() == q.inner_tensors().keys()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 80 << 30))
    short = lowbit.bind(layer, policy="fastest").rows[0]
    assert short.kernel == "cuda.linear"
    assert short.refusals[0].startswith("cuda.linear_or_plain: needs 8 MiB for plain values; 0 MiB")
    assert kernel("cuda.linear_or_plain").keeps


def test_compiling_is_shown_on_a_terminal_and_logged(monkeypatch, caplog, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level("INFO"), told("a kernel"):
        assert capsys.readouterr().err == "lowbit: compiling a kernel ..."
    assert capsys.readouterr().err == "\r\x1b[K"
    assert re.fullmatch(r"compiled a kernel, or read it from Triton's cache, in 0\.0 s", caplog.messages[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with told("another"):
        pass
    assert capsys.readouterr().err == ""
