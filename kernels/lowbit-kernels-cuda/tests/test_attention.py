"""Attention of codes: their rounding, to the bit, and on Hopper its products, beside the reference and float64."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from lowbit import attending, attention
from lowbit.attention import SCHEMES, Scheme
from lowbit.bench.inputs import sqnr
from lowbit.testing import check_backend
from lowbit_kernels_cuda import flash3, heads
from lowbit_kernels_cuda.backend import backend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def drawn(*shape, seed, device, dtype=torch.bfloat16, outliers=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if outliers:
        x[..., :: max(shape[-1] // 3, 1)] *= 100
    return x.to(device, dtype)


def turns(tokens, d, device, batch=1):
    """Tables (batch, T, D / 2) of rotary embeddings, of sequences that begin at other places."""
    at = torch.arange(tokens) + torch.arange(batch)[:, None] * 5
    angles = at[..., None] * 1e4 ** (-torch.arange(d // 2) / (d // 2))
    return angles.cos().to(device), angles.sin().to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["INT8_FP8", "FP8", "INT8_FP8_ROTATED"])
@pytest.mark.parametrize(("queries", "keys", "turned"), [(200, 300, True), (128, 700, False)])
def test_heads_are_rounded_as_the_reference_rounds_them(device, scheme, queries, keys, turned):
    how = SCHEMES[scheme]
    # Heads of values are beside one another, as a projection leaves them.
    q = drawn(2, queries, 4, 64, seed=0, device=device).transpose(1, 2)
    k, v = (drawn(2, keys, 2, 64, seed=i, device=device, outliers=i == 2).transpose(1, 2) for i in (1, 2))
    k = k + 3
    tables = turns(keys, 64, device, batch=2) if turned else (None, None)
    made, parts = heads.rounded(q, k, v, how, *tables), attending.rounded(q, k, v, how, *tables)
    blocks = -(-keys // 128)
    # Slots 16 a + 4 t + 2 b + c to tokens 16 a + 8 b + 2 t + c.
    values = made.v.view(torch.uint8).view(4, 64, blocks * 8, 4, 2, 2).transpose(3, 4).reshape(2, 2, 64, -1).mT
    found = [made.q.view(2, 4, -1, 64), made.k.view(2, 2, -1, 64), values.contiguous().view(torch.float8_e4m3fn)]
    scales = [made.q_scale.view(2, 4, -1, 1), made.k_scale.view(2, 2, -1, 1), made.v_power.view(2, 2, -1, 1).exp2()]
    for codes, scale, part, tokens in zip(found, scales, parts, (queries, keys, keys), strict=True):
        # Sums of a rotation have another order, and a few results are on the other side of a line between codes.
        rounding = 1e-4 if "ROTATED" in scheme else 0.0
        assert (codes[:, :, :tokens].float() != part[0].float()).float().mean() <= rounding
        torch.testing.assert_close(scale.float(), part[1].float(), rtol=1e-6 if rounding else 0.0, atol=0.0)
        assert not codes[:, :, tokens:].float().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["FP8_HEAD", "e4m3fn:*x*:float32,e4m3fn:*x*:float32,smooth,rotate_qk"])
def test_heads_with_one_scale_are_rounded_as_the_reference_rounds_them(device, scheme):
    q = drawn(2, 4, 130, 64, seed=0, device=device)
    k, v = (drawn(2, 2, 300, 64, seed=i, device=device) for i in (1, 2))
    q[:, 3] *= 3
    how, tables = Scheme.parse(scheme), turns(300, 64, device)
    parts = attending.rounded(q, k, v, how, *tables)
    for (codes, scale), part in zip(heads.rounded_whole(q, k, v, how, *tables), parts, strict=True):
        rounding = 1e-4 if how.rotate_qk else 0.0
        assert (codes.transpose(1, 2).float() != part[0].float()).float().mean() <= rounding
        each = part[1].shape[1] // scale.shape[1]
        torch.testing.assert_close(scale, part[1][:, ::each, 0, 0], rtol=1e-6 if rounding else 0.0, atol=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_embeddings_are_those_of_the_reference(device, dtype):
    q = drawn(2, 70, 3, 64, seed=0, device=device, dtype=dtype).transpose(1, 2)
    k, tables = drawn(2, 1, 200, 64, seed=1, device=device, dtype=dtype), turns(200, 64, device, batch=2)
    for x, found in zip((q, k), heads.roped(q, k, *tables), strict=True):
        assert torch.equal(found, attending.roped(x, *tables))


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_with_what_is_not_finite_have_no_scale(device):
    given = [drawn(1, 2, 256, 64, seed=i, device=device) for i in range(3)]
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        given[i][0, 1, 130, 7] = bad
    made = heads.rounded(*given, Scheme(SCHEMES["FP8"].qk, SCHEMES["FP8"].v, smooth=False))
    for scale in (made.q_scale, made.k_scale, made.v_power):
        assert scale.isnan().tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_of_zeros_have_a_small_scale(device):
    q, k, v = (torch.zeros(1, 1, 256, 64, dtype=torch.bfloat16, device=device) for _ in range(3))
    q[:, :, 128:], k[:, :, :128] = 1, 2
    made = heads.rounded(q, k, v, Scheme(SCHEMES["INT8_FP8"].qk, SCHEMES["INT8_FP8"].v, smooth=False))
    assert (made.q_scale == 2**-40).tolist() == [[True, False]]
    assert (made.k_scale == 2**-40).tolist() == [[False, True]]
    assert made.v_power.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda.attention", "cuda.attention_fa3"])
def test_the_kernel_is_what_its_backend_is_checked_for(name):
    if name.endswith("fa3"):
        pytest.importorskip("flash_attn_interface", reason="FlashAttention-3 is not installed")
    rows = tuple(kernel for kernel in backend.kernels() if kernel.name == name)
    own = SimpleNamespace(name="cuda", probe=lambda: None, kernels=lambda: rows)
    (row,) = check_backend(own, formats=(), devices=("cuda",)).rows
    assert row.runs > row.calls > 0


@pytest.mark.parametrize("device", DEVICES)
def test_channels_may_lie_apart(device):
    given = [drawn(1, 2, 64, 300, seed=i, device=device).mT for i in range(3)]
    made, same = (heads.rounded(*each, SCHEMES["INT8_FP8"]) for each in (given, [x.contiguous() for x in given]))
    for name in ("q", "k", "v", "q_scale", "k_scale", "v_power"):
        assert torch.equal(*(getattr(each, name).view(torch.uint8) for each in (made, same)))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["INT8_FP8", "FP8", "INT8_FP8_ROTATED"])
@pytest.mark.parametrize(
    ("batch", "h", "g", "queries", "keys", "d", "causal"),
    [
        (2, 4, 4, 512, 512, 128, True),
        (1, 4, 2, 300, 300, 128, True),
        (2, 4, 1, 200, 700, 64, True),
        (1, 3, 3, 333, 1000, 128, False),
        (1, 2, 2, 700, 200, 64, True),
        (1, 2, 1, 1, 1, 128, True),
        (1, 8, 2, 4096, 4096, 128, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_reference(scheme, batch, h, g, queries, keys, d, causal, dtype):
    q = drawn(batch, h, queries, d, seed=0, device="cuda", dtype=dtype)
    k, v = (drawn(batch, g, keys, d, seed=i, device="cuda", dtype=dtype) for i in (1, 2))
    v[:, :, keys // 2 :] *= 16
    found, sums = torch.ops.lowbit.attention(q, k, v, None, causal, 0, d**-0.5, str(SCHEMES[scheme]), "cuda")
    expected, of = attending.attend(q, k, v, None, causal, 0, d**-0.5, scheme, "")
    # Beside another order of sums, weights that are small beside a row's largest are rounded in another unit.
    assert sqnr(expected, found) > 34
    seen = of.isfinite()
    assert torch.equal(seen, sums.isfinite())
    # Beside another order of sums in a rotation, a code may be the next one: a step of 1/127 of 3.5, times another number
    # of 3.5 or less, over sqrt(D).
    next_code = 0.1 * d**-0.5 if "ROTATED" in scheme else 0.0
    torch.testing.assert_close(sums[seen], of[seen], rtol=1e-4, atol=1e-3 + next_code)
    assert not found[~seen].any()


@pytest.mark.gpu
def test_attention_is_near_that_of_float64_on_channels_with_outliers():
    q, v = (drawn(1, 4, 2048, 128, seed=i, device="cuda") for i in (0, 2))
    k = drawn(1, 4, 2048, 128, seed=1, device="cuda", outliers=True) + 5
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    rotated, plain = (
        sqnr(exact, attention(q, k, v, scheme=scheme, prefer=("cuda",))) for scheme in ("INT8_FP8_ROTATED", "FP8")
    )
    assert rotated > 22
    assert rotated > plain + 2


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "causal"), [(300, True), (300, False), (1, True), (200, True)])
@pytest.mark.parametrize("turned", [False, True])
def test_short_ones_are_not_rounded(queries, causal, turned):
    q = drawn(2, 8, queries, 128, seed=0, device="cuda")
    k, v = (drawn(2, 2, 300, 128, seed=i, device="cuda") for i in (1, 2))
    tables = turns(300, 128, "cuda") if turned else (None, None)
    found, sums = torch.ops.lowbit.attention(q, k, v, None, causal, 0, 0.1, str(SCHEMES["FP8"]), "", *tables)
    q, k = (attending.roped(x, *tables) for x in (q, k))
    k, v = (x.double().repeat_interleave(4, 1) for x in (k, v))
    scores = q.double() @ k.mT * 0.1
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(301 - queries), -torch.inf)
    assert sqnr(scores.softmax(-1) @ v, found) > 45
    torch.testing.assert_close(sums.double(), scores.logsumexp(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gradients_are_near_those_of_float64_where_torch_s_own_attention_ran():
    given = [drawn(1, heads, 512, 128, seed=i, device="cuda").requires_grad_() for i, heads in enumerate((4, 2, 2))]
    q, k, v = given
    # A mean, which sums of scores that were not rounded have, and those of codes have not.
    k = k + 5
    to_out = drawn(1, 4, 512, 128, seed=9, device="cuda")
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.cpu().double() for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    right = torch.autograd.grad(exact, given, to_out.cpu().double(), retain_graph=True)
    found = torch.autograd.grad(attention(q, k, v, causal=True), given, to_out)
    for one, other in zip(right, found, strict=True):
        assert sqnr(one, other) > 28


@pytest.mark.gpu
def test_values_that_are_zeros_count_in_sums():
    q, k, v = (drawn(1, 2, 2176, 128, seed=i, device="cuda") for i in range(3))
    v[:, :, :2048] = 0
    v *= 600
    expected = attending.attend(q, k, v, None, False, 0, 0.1, "INT8_FP8", "")[0]
    assert sqnr(expected, attention(q, k, v, scale=0.1, prefer=("cuda",))) > 34


def test_flash_attention_3_gets_codes_and_the_scales_of_heads(monkeypatch):
    def attend(q, k, v, softmax_scale, causal, window_size, return_attn_probs, **scales):
        assert return_attn_probs
        assert window_size == (6, 0)
        q, k, v = (
            x.float() * scales[f"{name}_descale"].repeat_interleave(x.shape[2] // 2, 1)[:, None, :, None]
            for name, x in (("q", q), ("k", k), ("v", v))
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        last = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        key = torch.arange(k.shape[2])
        scores = q @ k.repeat_interleave(2, 1).mT * softmax_scale
        scores = scores.masked_fill((key > last) | (key < last - 6), -torch.inf)
        out = scores.softmax(-1).nan_to_num(0) @ v.repeat_interleave(2, 1)
        sums = scores.logsumexp(-1)
        return out.transpose(1, 2).bfloat16(), sums.masked_fill(sums == -torch.inf, torch.inf)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=attend))
    q = drawn(2, 200, 4, 64, seed=0, device="cpu").transpose(1, 2)
    k, v = (drawn(2, 2, 150, 64, seed=i, device="cpu") for i in (1, 2))
    scheme = str(SCHEMES["FP8_HEAD"])
    out, sums = flash3.run(q, k, v, None, True, 7, 0.1, scheme, "cuda")
    expected, of = attending.attend(q, k, v, None, True, 7, 0.1, scheme, "")
    # Of weights in e4m3 and those that are not.
    assert sqnr(expected, out) > 26
    assert out.stride() == q.stride()
    torch.testing.assert_close(sums, of)


@pytest.mark.gpu
def test_what_is_not_finite_is_not_hidden():
    for i in range(3):
        given = [drawn(1, 2, 300, 128, seed=j, device="cuda") for j in range(3)]
        given[i][0, 1, 130, 7] = torch.nan
        found = attention(*given, scheme="INT8_FP8", prefer=("cuda",))
        assert found[0, 1, 130].isnan().any()
        assert found[0, 0].isfinite().all()
