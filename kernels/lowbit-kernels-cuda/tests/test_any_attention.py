"""Attention of codes on any GPU, interpreted where there is none, and torch's own beside float64."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowbit import attending
from lowbit.attention import SCHEMES, Scheme
from lowbit.backends import Call, Kernel
from lowbit.bench.inputs import sqnr
from lowbit.testing import check_backend
from lowbit.varlen_attending import attend_varlen
from lowbit_kernels_cuda import any_attention, general_heads, plain_attention
from lowbit_kernels_cuda.general_heads import Sequences, channels

ALL = SCHEMES | {"turned": replace(SCHEMES["INT8_FP8_ROTATED"], rotate_v=True)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HALF = torch.float16


def on(device, *rows):
    """Rows for the interpreter, and for a GPU."""
    return [pytest.param(device, *row, marks=pytest.mark.gpu if device == "cuda" else ()) for row in rows]


def drawn(*shape, seed, device="cpu", dtype=HALF):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def near(scheme):
    """What sums may be off by: a code may be the next one in a rotation, and tensor cores lose bits of e4m3."""
    return 1e-2 if ALL[scheme].rotate_qk else 5e-3 if ALL[scheme].qk.element.kind == "float" else 1e-3


def operands(device, dtype, h, g, queries, keys, d):
    """Heads of a token lie side by side."""
    shapes = (queries, h), (keys, g), (keys, g)
    return [drawn(2, *shape, d, seed=i, device=device, dtype=dtype).transpose(1, 2) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("device", "scheme", "dtype"),
    on("cpu", ("FP8_HEAD", HALF)) + on("cuda", *((scheme, dtype) for scheme in ALL for dtype in DTYPES)),
)
def test_the_kernel_is_what_its_backend_is_checked_for(device, scheme, dtype):
    def refuses(call):
        wanted = call.x_dtype == dtype and call.facts[0] == str(ALL[scheme])
        # The interpreter is slow.
        wanted &= device == "cuda" or "window" in call.facts
        return any_attention.refuses(call) if wanted else "not now"

    runs = {"attention": any_attention.run, "varlen_attention": any_attention.run_varlen}
    rows = tuple(Kernel(f"own.{op}", op, device, 1, run, refuses) for op, run in runs.items())
    own = SimpleNamespace(name="own", probe=lambda: None, kernels=lambda: rows)
    if scheme == "INT8" and dtype == torch.float32:
        pytest.skip("values stay as they are in 16 bits alone")
    checked = check_backend(own, formats=(), devices=(device,)).rows
    assert [row.calls for row in checked] == ([3, 2] if device == "cuda" else [1, 1])
    assert all(row.runs > row.calls for row in checked)


CASES = [
    ("INT8_FP8", HALF, 2, 1, 70, 150, 40, True, 0, None),
    ("INT8", torch.bfloat16, 2, 2, 150, 70, 64, True, 33, None),
    ("turned", torch.float32, 2, 1, 30, 140, 32, False, 0, "added"),
]
MORE = [
    *CASES,
    *(("INT8_FP8", HALF, 4, 2, 700, 1000, d, True, 200, None) for d in (16, 24, 64, 96, 128, 192, 256)),
    *((scheme, torch.bfloat16, 4, 2, 500, 500, 128, True, 0, "bool") for scheme in SCHEMES),
    ("FP8_HEAD", torch.float32, 6, 2, 1, 700, 256, True, 50, "added"),
    ("INT8", HALF, 4, 1, 1000, 300, 256, True, 0, None),
    ("turned", HALF, 4, 1, 300, 1000, 256, False, 0, "keys"),
]


@pytest.mark.parametrize(
    ("device", "scheme", "dtype", "h", "g", "queries", "keys", "d", "causal", "window", "mask"),
    on("cpu", *CASES) + on("cuda", *MORE),
)
def test_products_are_those_of_the_reference(device, scheme, dtype, h, g, queries, keys, d, causal, window, mask):
    q, k, v = operands(device, dtype, h, g, queries, keys, d)
    k = k + 2
    if mask is not None:
        mask = {
            "bool": drawn(queries, keys, seed=4, device=device) > 0,
            "keys": drawn(2, 1, 1, keys, seed=4, device=device) > 0,
            "added": drawn(1, h, 1, keys, seed=4, device=device, dtype=dtype).expand(1, h, queries, keys),
        }[mask]
    arguments = q, k, v, mask, causal, window, d**-0.5, str(ALL[scheme]), "cuda"
    found, sums = any_attention.run(*arguments)
    expected, of = attending.attend(*arguments)
    assert found.dtype == dtype
    # Beside another order of sums, in which a weight, and for a rotation a code, may become the next one.
    assert sqnr(expected, found) > 40
    seen = of.isfinite()
    assert torch.equal(seen, sums.isfinite())
    torch.testing.assert_close(sums[seen], of[seen], rtol=1e-4, atol=near(scheme))
    assert not found[~seen].any()


@pytest.mark.parametrize(
    ("device", "scheme"), on("cpu", ("INT8_FP8",), ("FP8_HEAD",)) + on("cuda", *((name,) for name in ALL))
)
def test_heads_are_rounded_as_the_reference_rounds_them(device, scheme):
    how, (q, k, v) = ALL[scheme], operands(device, torch.bfloat16, 2, 1, 150, 300, 64 if scheme == "turned" else 40)
    v = torch.cat([v[:, :, :200], v[:, :, 200:] * 64], 2)
    made = general_heads.rounded(q, k + 3, v, how, Sequences(2, 150), Sequences(2, 300))
    wanted, d = attending.rounded(q, k + 3, v, how), channels(q.shape[3])
    for codes, parts, values in zip((made.q, made.k, made.v), wanted, (False, False, True), strict=True):
        if values and how.v is None:
            assert torch.equal(codes, parts[0])
            continue
        (_, heads, tokens, width), data = parts[0].shape, codes.data
        data = (data.mT if values else data).view(heads, 2, -1, d).transpose(0, 1)
        # Sums of a rotation have another order, and a few results are on the other side of a line between codes.
        turned = how.rotate_v if values else how.rotate_qk
        assert (data[:, :, :tokens, :width].float() != parts[0].float()).float().mean() <= (0.001 if turned else 0.0)
        scale = codes.scale.repeat_interleave(heads // len(codes.scale), 0).view(heads, 2, -1, 1).transpose(0, 1)
        torch.testing.assert_close(scale, parts[1].float(), rtol=1e-5 if turned else 0.0, atol=0.0)
        assert not data[:, :, tokens:].float().any()
        assert not data[..., width:].float().any()


PACKED = [("INT8", HALF, 40, True, 0), ("INT8_FP8_ROTATED", torch.float32, 32, True, 50)]


@pytest.mark.parametrize(
    ("device", "scheme", "dtype", "d", "causal", "window"),
    on("cpu", PACKED[0])
    + on("cuda", *PACKED, *((scheme, torch.bfloat16, d, False, 0) for scheme in ALL for d in (64, 128, 256))),
)
def test_packed_sequences_are_each_as_the_reference_has_them(device, scheme, dtype, d, causal, window):
    queries, keys = (1, 0, 130, 20, 5), (131, 3, 7, 0, 9)
    if device == "cuda":
        queries, keys = (*queries, *range(20), 1000), (*keys, *range(1, 21), 900)
    q, k, v = (
        drawn(sum(n), h, d, seed=i, device=device, dtype=dtype)
        for i, (n, h) in enumerate(((queries, 2), (keys, 1), (keys, 1)))
    )
    ends = [torch.tensor([0, *each], device=device).cumsum(0).to(torch.int32) for each in (queries, keys)]
    arguments = q, k + 2, v, *ends, max(queries), max(keys), causal, window, d**-0.5, str(ALL[scheme]), "cuda"
    found, sums = any_attention.run_varlen(*arguments)
    expected, of = attend_varlen(*arguments)
    assert found.is_contiguous()
    assert sqnr(expected, found) > 40
    seen = of.isfinite()
    assert torch.equal(seen, sums.isfinite())
    torch.testing.assert_close(sums[seen], of[seen], rtol=1e-4, atol=near(scheme))
    assert not found.transpose(0, 1)[~seen].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 30)])
def test_torch_attends_to_packed_sequences_unless_codes_are_asked_for(causal, window):
    queries, keys, d = (1, 0, 300, 20, 5), (131, 3, 200, 0, 9), 100
    q, k, v = (
        drawn(sum(n), h, d, seed=i, device="cuda") for i, (n, h) in enumerate(((queries, 4), (keys, 2), (keys, 2)))
    )
    ends = [torch.tensor([0, *each], device="cuda").cumsum(0).to(torch.int32) for each in (queries, keys)]
    found, sums = any_attention.run_varlen(q, k, v, *ends, 300, 200, causal, window, 0.1, str(SCHEMES["FP8"]), "")
    for i in range(5):
        rows, columns = (slice(int(end[i]), int(end[i + 1])) for end in ends)
        heads = (q[rows].double(), *(x[columns].double().repeat_interleave(2, 1) for x in (k, v)))
        of_q, of_k, of_v = (x.transpose(0, 1).unsqueeze(0) for x in heads)
        scores = (of_q @ of_k.mT * 0.1).unsqueeze(2)
        scores = attending.Seen(None, causal, window).apply(scores, 0, queries[i]).squeeze(2)
        expected = (scores.softmax(-1).nan_to_num(0.0) @ of_v)[0].transpose(0, 1)
        torch.testing.assert_close(found[rows].double(), expected, rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(sums[:, rows].double(), scores.logsumexp(-1)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("device", on("cpu", ()) + on("cuda", ()))
def test_what_is_not_finite_is_not_hidden_and_what_no_query_sees_not_read(device):
    how = Scheme(SCHEMES["FP8"].qk, SCHEMES["FP8"].v, smooth=False)
    lost = slice(128, 256), slice(130, 135), slice(130, 135)
    for i, bad in enumerate((math.nan, math.inf, -math.inf)):
        given = operands(device, HALF, 1, 1, 400, 400, 16)
        given[i][0, 0, 130, 7] = bad
        found, _ = any_attention.run(*given, None, True, 5, 0.25, str(how), "cuda")
        assert found[0, 0, lost[i]].isnan().any(-1).all()
        # A NaN times a weight of zero is one, too.
        assert found[0, 0, :64].isfinite().all()
        assert found[0, 0, 384:].isfinite().all()
        assert found[1].isfinite().all()


def test_codes_run_unasked_where_they_were_measured_to_be_faster(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    given = SCHEMES["INT8_FP8"], 128, 32768, 2048
    assert any_attention._faster(*given)
    less = (SCHEMES["INT8"], *given[1:]), (given[0], 96, *given[2:]), (*given[:2], 32767, 2048), (*given[:3], 2047)
    assert not any(any_attention._faster(*each) for each in (*less, (*given[:3], 0)))
    for window, told in (("window",), "below 32768 tokens"), ((), "not measured"):
        call = Call.of("attention", "", "", torch.device("cuda"), HALF, None, 128, "INT8_FP8", *window)
        assert told in any_attention.how(call)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert not any_attention._faster(*given)


def test_what_is_added_hides_what_is_not_seen():
    q = torch.empty(1, 4, 5, 8)
    last = torch.arange(5)[:, None] + 12
    key = torch.arange(17)
    seen, given = drawn(2, 1, 1, 17, seed=0) > 0, drawn(5, 17, seed=0, dtype=torch.float32)
    for causal, window in ((False, 0), (True, 0), (True, 4)):
        near = (key <= last) & (key > last - (window or 99)) if causal else torch.ones(5, 17, dtype=torch.bool)
        found = plain_attention._bias(q, 17, seen, causal=causal, window=window)
        assert torch.equal(found.expand(2, 1, 5, 17) == 0, seen & near)
        found = plain_attention._bias(q, 17, given, causal=causal, window=window)
        assert torch.equal(found[0, 0], given.masked_fill(~near, -torch.inf))
        # As kernels need it.
        assert found.stride(2) % 16 == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 100, 256])
@pytest.mark.parametrize(
    ("queries", "keys", "causal", "window", "mask"),
    [
        (300, 300, True, 0, None),
        (200, 300, True, 0, None),
        (300, 200, True, 0, None),
        (1, 300, True, 20, None),
        (300, 320, True, 50, None),
        (300, 300, False, 0, "bool"),
        (300, 300, True, 40, "bool"),
        (300, 304, False, 0, "added"),
    ],
)
def test_torch_runs_unless_codes_are_asked_for(dtype, d, queries, keys, causal, window, mask):
    q, k, v = operands("cuda", dtype, 4, 2, queries, keys, d)
    if mask is not None:
        seen = drawn(2, 1, queries, keys, seed=4, device="cuda") > 0
        seen[:, :, 7] = False
        added = torch.where(seen, drawn(1, 4, 1, keys, seed=5, device="cuda"), -torch.inf).to(dtype)
        mask = seen if mask == "bool" else added
    found, sums = any_attention.run(q, k, v, mask, causal, window, 0.1, str(SCHEMES["FP8"]), "")
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = attending.Seen(mask, causal, window).apply((q.double() @ k.mT * 0.1).unsqueeze(2), 0, queries).squeeze(2)
    expected = scores.softmax(-1).nan_to_num(0.0) @ v
    assert sqnr(expected, found) > 45
    of = scores.logsumexp(-1)
    seen = of.isfinite()
    assert torch.equal(seen, sums.isfinite())
    torch.testing.assert_close(sums[seen].double(), of[seen], rtol=2e-3, atol=2e-3)
    assert not found[~seen].any()
