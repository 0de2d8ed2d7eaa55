"""Attention that rounds: the reference beside float64, its gradients, what is seen, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lowbit
from lowbit import Attention, FormatError, NoKernelError, Scheme, UnsupportedOpError, attending, attention
from lowbit.attending import mean_of_keys
from lowbit.attention import SCHEMES, selection
from lowbit.backends import Kernel
from lowbit.bench.inputs import sqnr
from lowbit.testing import installed_backends


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(heads=4, groups=2, queries=200, keys=300, d=64, dtype=torch.float32):
    shapes = (heads, queries), (groups, keys), (groups, keys)
    return [drawn(2, *shape, d, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def exact(q, k, v, seen=None):
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen, enable_gqa=True)


def lower(queries, keys, window=None):
    """What causal queries, the last of the tokens, see."""
    last = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    return (key <= last) & (key > last - (window or keys + queries))


# Errors of 8 bits: of e4m3 2^-4 / sqrt(3) of each number at most, of integers less.
LEAST = {"INT8": 36, "INT8_FP8": 27, "INT8_FP8_ROTATED": 27, "FP8": 24, "FP8_HEAD": 24}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", ["all", "causal", "window", "mask", "added", "one query"])
def test_results_are_near_those_of_float64(scheme, case):
    q, k, v = operands(queries=1 if case == "one query" else 200)
    given, seen = {}, None
    if case in {"causal", "one query"}:
        given, seen = {"causal": True}, lower(q.shape[2], 300)
    elif case == "window":
        given, seen = {"causal": True, "window": 40}, lower(200, 300, 40)
    elif case != "all":
        seen = drawn(2, 1, 200, 300, seed=5) > 0
        seen = seen if case == "mask" else torch.where(seen, drawn(1, 4, 200, 300, seed=6), -math.inf)
        given = {"mask": seen}
    seen = seen.double() if seen is not None and seen.is_floating_point() else seen
    assert sqnr(exact(q, k, v, seen), attention(q, k, v, scheme=scheme, **given)) > LEAST[scheme]


def test_channels_with_outliers_are_kept_by_means_and_rotation():
    q, k, v = operands(queries=512, keys=512, d=128)
    # x100 on 2 % of the channels, and a mean, as keys of language models have it.
    k[..., :: 128 // 3] *= 100
    k += 20
    right = exact(q, k, v)
    found = {
        name: sqnr(right, attention(q, k, v, scheme=name)) for name in ("INT8_FP8_ROTATED", "INT8_FP8", "FP8_HEAD")
    }
    assert found["INT8_FP8_ROTATED"] > 22
    assert found["INT8_FP8_ROTATED"] > max(found["INT8_FP8"], found["FP8_HEAD"]) + 2


def test_rounding_is_that_of_numpy():
    q, k, v = operands(heads=1, groups=1, queries=3, keys=130, d=32)
    found = attention(q, k, v, scheme=Scheme.parse("e4m3fn:*x*:float32,e4m3fn:128x*:e8m0"))[0, 0]

    def e4m3(x, scale):
        return (x / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale

    a, b, c = (x[0, 0].numpy().astype(np.float64) for x in (q, k, v))
    a, b = (e4m3(x, np.float32(np.abs(x).max() / 448)) for x in (a, b))
    c = np.concatenate([e4m3(x, 2.0 ** np.ceil(np.log2(np.abs(x).max() / 448))) for x in (c[:128], c[128:])])
    s = a @ b.T / 32**0.5 / math.log(2)
    p = 2 ** (s - np.ceil(s.max(1, keepdims=True))) * 256
    rounded = p.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = torch.from_numpy(rounded @ c / p.sum(1, keepdims=True))
    # A weight at the middle of two codes may be on either side of it.
    assert sqnr(expected, found) > 60


def test_queries_that_share_keys_have_one_scale_a_head():
    q, k, v = operands()
    q[:, 1] *= 100
    (_, scale), *_ = attending.rounded(q, k, v, SCHEMES["FP8_HEAD"])
    most = q.view(2, 2, 2 * 200, 64).abs().amax((2, 3)).repeat_interleave(2, 1)
    torch.testing.assert_close(scale[..., 0, 0], most / 448)


def test_the_mean_is_of_keys_evenly_spread():
    k = drawn(1, 2, 1000, 8)
    spread = torch.tensor([i * 1000 // 256 for i in range(256)])
    torch.testing.assert_close(mean_of_keys(k), k[:, :, spread].mean(2, keepdim=True))
    torch.testing.assert_close(mean_of_keys(k[:, :, :200]), k[:, :, :200].mean(2, keepdim=True))


@pytest.mark.parametrize(
    ("causal", "scheme"), [(False, "INT8"), (True, "INT8_FP8_ROTATED"), (True, "int8:128x*:float32,none,rotate_v")]
)
def test_gradients_are_near_those_of_plain_attention(causal, scheme):
    given = operands()
    seen = lower(200, 300) if causal else None
    for x in given:
        x.requires_grad_()
    to_out = drawn(2, 4, 200, 64, seed=9)
    right = torch.autograd.grad(exact(*given, seen), given, to_out.double())
    found = torch.autograd.grad(attention(*given, scheme=scheme, causal=causal), given, to_out)
    for one, other in zip(right, found, strict=True):
        assert sqnr(one, other) > 28


def test_gradients_are_those_of_codes_where_the_forward_rounds_nothing():
    def run(q, k, v, mask, causal, window, scale, *rest):
        scores = q.double() @ k.double().repeat_interleave(2, 1).mT * scale
        values = v.double().repeat_interleave(2, 1)
        return (scores.softmax(-1) @ values).to(q.dtype), scores.logsumexp(-1).float()

    row = Kernel("own.attention", "attention", "cpu", 5, run, lambda call: None)
    own = SimpleNamespace(name="own", probe=lambda: None, kernels=lambda: (row,))
    # Its sums are of scores with the mean of keys.
    q, k, v = operands()
    given, to_out = (
        [x.requires_grad_() for x in (q, k + 5 * drawn(1, 1, 1, 64, seed=7), v)],
        drawn(2, 4, 200, 64, seed=9),
    )
    right = torch.autograd.grad(exact(*given), given, to_out.double())
    with installed_backends(own):
        found = torch.autograd.grad(attention(*given, scheme="INT8"), given, to_out)
    for one, other in zip(right, found, strict=True):
        assert sqnr(one, other) > 28


def test_a_second_gradient_is_refused():
    given = [x.requires_grad_() for x in operands()]
    with pytest.raises(UnsupportedOpError, match="second gradient"):
        torch.autograd.grad(attention(*given).square().sum(), given, create_graph=True)


def test_lengths_stay_dynamic_where_it_is_taken_apart():
    # Fewer are fewer than a block, or than the mean is taken of.
    lengths = {2: torch.export.Dim("tokens", min=257, max=2000)}
    traced = operands(queries=300, keys=300)
    program = torch.export.export(Attention("INT8", causal=True), tuple(traced), dynamic_shapes=(lengths,) * 3)
    apart = program.run_decompositions().module()
    for tokens in (300, 270, 700):
        given = operands(queries=tokens, keys=tokens)
        assert sqnr(attention(*given, scheme="INT8", causal=True), apart(*given)) > 40


def test_some_queries_at_a_time_are_all_of_them(monkeypatch):
    given, to_out = [x.requires_grad_() for x in operands()], drawn(2, 4, 200, 64, seed=9)
    how = {"mask": drawn(2, 4, 200, 300, seed=5) > 0, "causal": True, "window": 150}
    found = []
    for rows in (512, 64):
        monkeypatch.setattr(attending, "_ROWS", rows)
        out = attention(*given, **how)
        found.append((out, *torch.autograd.grad(out, given, to_out)))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def turns(tokens, d, batch=None):
    """Tables (.., T, D / 2) of rotary embeddings, of sequences that begin at other places."""
    at = torch.arange(tokens) + (0 if batch is None else torch.arange(batch)[:, None] * 5)
    angles = at[..., None] * 1e4 ** (-torch.arange(d // 2) / (d // 2))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("batch", [None, 2])
def test_rotary_embeddings_turn_pairs_of_channels(batch):
    q, k, v = operands()
    cos, sin = turns(300, 64, batch)
    turn = torch.complex(cos, sin).to(torch.complex128)
    turn = turn if batch is None else turn[:, None]
    found = [attending.roped(x, cos, sin) for x in (q, k)]
    for x, out in zip((q, k), found, strict=True):
        pairs = torch.complex(*x.double().chunk(2, -1)) * turn[..., -x.shape[2] :, :]
        torch.testing.assert_close(out, torch.cat([pairs.real, pairs.imag], -1).float())
    expected = attention(*found, v, scheme="INT8_FP8_ROTATED", causal=True)
    for tables in ((cos, sin), tuple(torch.cat([x, x], -1) for x in (cos, sin))):
        assert torch.equal(attention(q, k, v, scheme="INT8_FP8_ROTATED", causal=True, rope=tables), expected)
        assert torch.equal(Attention("INT8_FP8_ROTATED", causal=True)(q, k, v, rope=tables), expected)


def test_rotary_embeddings_round_as_transformers_does():
    x, (cos, sin) = drawn(2, 4, 300, 64, dtype=torch.bfloat16), turns(300, 64)
    both = [torch.cat([table, table], -1).bfloat16() for table in (cos, sin)]
    assert torch.equal(attending.roped(x, cos, sin), apply_rotary_pos_emb(x, x, *(t[None] for t in both))[0])


def test_gradients_pass_rotary_embeddings():
    given, tables, to_out = operands(), turns(300, 64), drawn(2, 4, 200, 64, seed=9)
    for x in given:
        x.requires_grad_()
    q, k, v = given
    wide = [x.double() for x in tables]
    turned = attending.roped(q.double(), *wide), attending.roped(k.double(), *wide), v
    right = torch.autograd.grad(exact(*turned, lower(200, 300)), given, to_out.double())
    found = torch.autograd.grad(attention(q, k, v, scheme="INT8", causal=True, rope=tables), given, to_out)
    for one, other in zip(right, found, strict=True):
        assert sqnr(one, other) > 28


def test_codes_are_what_backward_keeps():
    given = [x.requires_grad_() for x in operands(queries=256, keys=256, dtype=torch.bfloat16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        out = attention(*given, scheme="INT8_FP8")
    whole = sum(x.nbytes for x in given)
    # Codes are half, beside the result and the sums.
    assert sum(kept) < 0.51 * whole + out.nbytes + 4 * out.numel() // out.shape[-1]


def test_a_query_that_sees_nothing_gets_zeros():
    q, k, v = operands(queries=300, keys=200)
    found, sums = torch.ops.lowbit.attention(q, k, v, None, True, 0, 0.125, "INT8_FP8", "")
    assert not found[:, :, :100].any()
    assert (sums[:, :, :100] == -math.inf).all()
    assert found[:, :, 100:].isfinite().all()
    assert not attention(q, k[:, :, :0], v[:, :, :0]).any()
    given = [x.requires_grad_() for x in (q, k, v)]
    to_q, *others = torch.autograd.grad(attention(*given, causal=True).sum(), given)
    assert not to_q[:, :, :100].any()
    assert all(x.isfinite().all() and x.any() for x in (to_q, *others))


def test_it_compiles_whole_and_is_a_module():
    q, k, v = operands()
    module = Attention("FP8", causal=True, window=100)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, scheme="FP8", causal=True, window=100))
    assert "window=100" in repr(module)
    assert torch.export.export(module, (q, k, v)).graph_module.code.count("lowbit.attention") == 1


def test_it_is_lowered_and_taken_apart():
    given, module = tuple(operands(queries=130, keys=130)), Attention("INT8_FP8", causal=True)
    exported, right = torch.export.export(module, given), module(*given)
    lowered = lowbit.lower(exported, "reference")
    apart = exported.run_decompositions()
    for program in (lowered.program, apart):
        assert not [node for node in program.graph.nodes if "lowbit" in str(node.target)]
        torch.testing.assert_close(program.module()(*given), right)
    assert [row.kernel for row in lowered.rows] == ["reference.attention"]
    # Compilers to C++ lack 8-bit floats.
    values = [node.meta.get("val") for node in apart.graph.nodes]
    assert not [x for x in values if isinstance(x, torch.Tensor) and str(x.dtype).startswith("torch.float8")]


def test_what_is_not_finite_is_not_hidden():
    q, k, v = operands(queries=256, keys=256)
    # Of queries those of its block are lost.
    for i, seen in enumerate((slice(0, 128), slice(None), slice(None))):
        for bad in (math.nan, math.inf):
            given = [each.clone() for each in (q, k, v)]
            given[i][0, 0, 5, 3] = bad
            found = attention(*given)
            assert found[0, 0, seen].isnan().any(-1).all()
            assert found[1].isfinite().all()


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_are_their_strings(name):
    assert Scheme.parse(str(SCHEMES[name])) == SCHEMES[name] == Scheme.parse(name)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("FP7", "INT8_FP8"),
        ("int8:128x*:float32,none,smoth", "smoth"),
        ("int4:128x*:float32,none", "int8 or e4m3fn"),
        ("int8:1x*:float32,none", "128 tokens"),
        ("int8:128x*:float32,int8:128x*:float32", "e4m3fn"),
    ],
)
def test_bad_schemes_are_refused(scheme, reason):
    with pytest.raises(FormatError, match=reason):
        attention(*operands(), scheme=scheme)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": drawn(2, 3, 300, 64), "v": drawn(2, 3, 300, 64)}, "must divide"),
        ({"v": drawn(2, 2, 299, 64)}, "needs queries"),
        ({"q": drawn(2, 4, 200, 64).bfloat16()}, "one dtype"),
        ({"k": drawn(2, 2, 300, 64).to("meta"), "v": drawn(2, 2, 300, 64).to("meta")}, "one device"),
        ({name: drawn(2, 2, 300, 0) for name in "qkv"}, "a channel or more"),
        ({"window": 3}, "causal=True"),
        ({"window": 0, "causal": True}, "positive"),
        ({"mask": torch.ones(2, 3, 200, 300, dtype=torch.bool)}, "broadcast"),
        ({"mask": torch.ones(300, dtype=torch.int32)}, "dtype"),
        ({"rope": turns(200, 64)}, "all 300 keys' tokens"),
        ({"rope": turns(300, 32)}, "64 channels"),
        ({"rope": turns(300, 64, 3)}, "cos and sin"),
        ({"rope": (turns(300, 64)[0], turns(300, 64)[1].int())}, "floating point"),
        ({"rope": (turns(300, 64)[0], turns(300, 64)[1].requires_grad_())}, "detach"),
    ],
)
def test_bad_input_is_refused(change, reason):
    given = dict(zip("qkv", operands(), strict=True)) | change
    with pytest.raises(FormatError, match=reason):
        attention(**given)


def test_masks_have_no_gradient():
    mask = drawn(200, 300).requires_grad_()
    with pytest.raises(UnsupportedOpError, match="detach"):
        attention(*operands(), mask=mask).sum().backward()


def test_backends_are_asked_with_what_is_known():
    asked = []

    def refuses(call):
        asked.append(call)
        return "takes no mask" if "mask" in call.facts else None

    def run(q, *rest):
        assert rest[-1] == "own"
        return q + 1, q.new_zeros(q.shape[:3])

    row = Kernel("own.attention", "attention", "cpu", 5, run, refuses)
    own = SimpleNamespace(name="own", probe=lambda: None, kernels=lambda: (row,))
    q, k, v = operands()
    mask = torch.ones(300, dtype=torch.bool)
    with installed_backends(own):
        assert torch.equal(attention(q, k, v, prefer=("own",)), q + 1)
        assert torch.equal(attention(q, k, v, prefer="own"), q + 1)
        assert asked[0].facts == (str(SCHEMES["INT8_FP8"]),)
        assert asked[0].k == 64
        attention(q, k, v, causal=True, window=9, prefer=("own",))
        assert asked[-1].facts[1:] == ("window",)
        with pytest.raises(NoKernelError, match="takes no mask"):
            attention(q, k, v, mask=mask, prefer=("own",))
        assert selection(q, mask, 0, "FP8", "").kernel.name == "reference.attention"
