"""Key-value caches of codes: what is written, attention over it beside float64, and what is refused."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import lowbit
from lowbit import FormatError, KeyValueCache, UnsupportedOpError
from lowbit.bench.inputs import sqnr

FORMATS = ["FP8_ROW", "INT8_ROW"]
# Errors of e4m3 are 2^-4 / sqrt(3) of each number at most, those of integers 1 / 127 / sqrt(12) of the largest of 64.
LEAST = {"FP8_ROW": 27, "INT8_ROW": 36}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(batch, tokens, d, dtype=torch.float32):
    turned = drawn(batch, tokens, d // 2, seed=9).repeat(1, 1, 2)
    return {"cos": turned.cos().to(dtype), "sin": turned.sin().to(dtype)}


def as_transformers(x, cos, sin):
    """What transformers' models do to queries and keys."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def held(cache, text, tokens, name="k"):
    """Codes and scales of the tokens of a text, (tokens, G, D) and (tokens, G)."""
    parts = getattr(cache, f"{name}_codes"), getattr(cache, f"{name}_scale")
    if cache.table is None:
        return [part[text, tokens] for part in parts]
    page = parts[0].shape[1]
    return [part[cache.table[text, tokens // page].long(), tokens % page] for part in parts]


def filled(batch=2, heads=2, tokens=100, d=64, page=None, dtype=torch.float32, **formats):
    cache = KeyValueCache.empty(batch, heads, tokens, d, page=page, **formats)
    if page is not None:
        order = torch.randperm(cache.table.numel(), generator=torch.Generator().manual_seed(5))
        cache.table.copy_(order.view(cache.table.shape))
    k, v = (drawn(batch, heads, tokens, d, seed=i, dtype=dtype) for i in (1, 2))
    cache.write(k, v, torch.zeros(batch, dtype=torch.int64))
    return cache, k, v


def exact(q, k, v, lengths, window=None):
    """Attention in float64, of the last tokens of each text."""
    found = []
    for i, length in enumerate(lengths):
        last = torch.arange(q.shape[2])[:, None] + length - q.shape[2]
        token = torch.arange(length)
        seen = (token <= last) & (token > last - (window or length + 1))
        each = (x[i : i + 1, :, :length].double() for x in (k, v))
        found.append(scaled_dot_product_attention(q[i : i + 1].double(), *each, attn_mask=seen, enable_gqa=True))
    return torch.cat(found)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("page", [None, 8])
def test_codes_are_those_of_quantize_and_of_numpy(fmt, page):
    cache = KeyValueCache.empty(2, 3, 40, 16, keys=fmt, page=page)
    k, v = (drawn(2, 3, 5, 16, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    k[0, 1, 2] = 0
    assert cache.write(k, v, torch.tensor([30, 7])) is None
    for name, x in (("k", k), ("v", v)):
        for text, first in enumerate((30, 7)):
            codes, scale = held(cache, text, first + torch.arange(5), name)
            q = lowbit.quantize(x[text], fmt)
            assert torch.equal(codes.transpose(0, 1), q.qdata.view(torch.uint8))
            assert torch.equal(scale.T, q.scale.squeeze(-1))
            wide = x[text].float().numpy()
            by = np.abs(wide).max(-1, keepdims=True) / np.float32(448 if fmt == "FP8_ROW" else 127.5)
            by[by == 0] = 1
            kind = ml_dtypes.float8_e4m3fn if fmt == "FP8_ROW" else np.int8
            made = wide / by
            made = (np.rint(made).clip(-128, 127) if fmt == "INT8_ROW" else made).astype(kind).view(np.uint8)
            assert np.array_equal(codes.transpose(0, 1).numpy(), made)
            assert np.array_equal(scale.T.numpy(), by[..., 0])
    # What was not written.
    assert int((cache.k_codes != 0).any(-1).sum()) == 2 * 3 * 5 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotated_and_written_at_once_is_one_after_the_other(dtype, batch):
    q, k, v = (drawn(2, heads, 6, 32, seed=i, dtype=dtype) for i, heads in enumerate((4, 2, 2)))
    turns = angles(batch, 6, 32, dtype)
    at = torch.tensor([[5, 4, 3, 9, 10, 11], [0, 1, 2, 3, 4, 5]])
    fused, apart, halves = (KeyValueCache.empty(2, 2, 12, 32, keys="INT8_ROW") for _ in range(3))
    found = fused.write(k, v, at, q=q, **turns)
    apart.write(as_transformers(k, **turns), v, at)
    assert torch.equal(found, as_transformers(q, **turns))
    # As `lowbit.attention` takes them, too, where texts share them.
    half = {name: part[..., :16] if batch > 1 else part[0, :, :16] for name, part in turns.items()}
    assert torch.equal(halves.write(k, v, at, q=q, **half), found)
    for other in (apart, halves):
        for name in ("k_codes", "k_scale", "v_codes", "v_scale"):
            assert torch.equal(getattr(fused, name), getattr(other, name))
    assert fused.write(k, v, at, **turns) is None


@pytest.mark.parametrize("page", [None, 8])
def test_what_has_no_place_is_not_written(page):
    cache = KeyValueCache.empty(2, 1, 16, 8, page=page)
    if page:
        cache.table[1, 1] = -1
    before = cache.k_codes.clone()
    k = drawn(2, 1, 4, 8)
    cache.write(k, k, torch.tensor([-4, 16]))
    assert torch.equal(cache.k_codes, before)
    cache.write(k, k, torch.tensor([-2, 6]))
    written = {(i, t) for i in range(2) for t in range(16) if held(cache, i, torch.tensor(t))[0].any()}
    assert written == {(0, 0), (0, 1), (1, 6), (1, 7)} | (set() if page else {(1, 8), (1, 9)})
    assert torch.equal(
        held(cache, 0, torch.arange(2))[0][:, 0], lowbit.quantize(k[0, 0, 2:], "FP8_ROW").qdata.view(torch.uint8)
    )


@pytest.mark.parametrize("keys", FORMATS)
@pytest.mark.parametrize("values", FORMATS)
@pytest.mark.parametrize(("page", "window"), [(None, None), (None, 9), (16, None), (16, 40)])
def test_attention_is_near_that_of_float64(keys, values, page, window):
    cache, k, v = filled(tokens=96, page=page, keys=keys, values=values)
    q = drawn(2, 6, 3, 64)
    lengths = (96, 50)
    found = cache.attend(q, torch.tensor(lengths), window=window)
    assert sqnr(exact(q, k, v, lengths, window), found) > min(LEAST[keys], LEAST[values]) - 1


def test_some_queries_at_a_time_are_all_of_them(monkeypatch):
    cache, *_ = filled()
    q, lengths = drawn(2, 4, 30, 64), torch.tensor([100, 40], dtype=torch.int32)
    whole = cache.attend(q, lengths, window=25, scale=0.3)
    monkeypatch.setattr("lowbit.caching._ROWS", 7)
    torch.testing.assert_close(cache.attend(q, lengths, window=25, scale=0.3), whole)


def test_what_no_query_sees_is_not_read():
    cache, *_ = filled(tokens=96, page=8)
    q, lengths = drawn(2, 2, 3, 64), torch.tensor([90, 30])
    right = cache.attend(q, lengths, window=10)
    for text, (first, end) in enumerate(((78, 90), (18, 30))):
        unread = torch.tensor([t for t in range(96) if not first <= t < end])
        for name in ("k", "v"):
            page, place = cache.table[text, unread // 8].long(), unread % 8
            getattr(cache, f"{name}_codes")[page, place] = 0x7F
            getattr(cache, f"{name}_scale")[page, place] = math.nan
        cache.table[text, : first // 8] = -1
        cache.table[text, -(-end // 8) :] = 10**6
    assert torch.equal(cache.attend(q, lengths, window=10), right)


def test_what_is_not_there_is_nan_and_what_sees_nothing_zero():
    cache, *_ = filled(page=10)
    q = drawn(2, 2, 3, 64)
    found = cache.attend(q, torch.tensor([101, 100]))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    cache.table[0, 4] = 20
    found = cache.attend(q, torch.tensor([41, 1]))
    # Queries are the tokens 38 to 40, of which the last is in that page; and of one token two are before it.
    assert found[0, :, 2].isnan().all()
    assert not found[1, :, :2].any()
    assert found[1, :, 2].isfinite().all()
    assert not cache.attend(q, torch.tensor([0, -5])).any()


def test_it_is_one_operator_each_in_compiled_and_exported_models():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = KeyValueCache.empty(2, 2, 32, 16, page=8, values="INT8_ROW")

        def forward(self, q, k, v, at, cos, sin):
            q = self.cache.write(k, v, at, q=q, cos=cos, sin=sin)
            return self.cache.attend(q, at + k.shape[2], window=6)

    layers = [Layer() for _ in range(3)]
    given = [drawn(2, heads, 4, 16, seed=i) for i, heads in enumerate((4, 2, 2))]
    more = (torch.tensor([0, 9]), *angles(1, 4, 16).values())
    right = layers[0](*given, *more)
    assert torch.equal(torch.compile(layers[1], fullgraph=True, backend="aot_eager")(*given, *more), right)
    exported = torch.export.export(layers[2], (*given, *more))
    assert exported.graph_module.code.count("torch.ops.lowbit") == 2
    lowered = lowbit.lower(exported, "reference")
    apart = exported.run_decompositions()
    assert set(apart.graph_signature.buffers_to_mutate.values()) == {
        f"cache.{x}_{y}" for x in "kv" for y in ("codes", "scale")
    }
    for program in (lowered.program, apart):
        assert not [node for node in program.graph.nodes if "lowbit" in str(node.target)]
        module = program.module()
        assert torch.equal(module(*given, *more), right)
        assert torch.equal(module.cache.k_codes, layers[0].cache.k_codes)
    assert torch.equal(layers[1].cache.v_scale, layers[0].cache.v_scale)


def test_bytes_are_those_of_codes_and_scales():
    cache = KeyValueCache.empty(3, 2, 10, 64, page=4)
    assert cache.nbytes == 2 * 3 * 12 * 2 * (64 + 4)
    assert tuple(cache.table.shape) == (3, 3)
    assert "table=(3, 3)" in repr(cache)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": drawn(2, 3, 4, 16)}, "one dtype"),
        ({"k": drawn(2, 3, 4, 16), "v": drawn(2, 3, 4, 16)}, "do not fit a cache"),
        ({"k": drawn(1, 2, 4, 16), "v": drawn(1, 2, 4, 16)}, "do not fit a cache"),
        ({"positions": torch.zeros(2)}, "of integers"),
        ({"positions": torch.zeros(2, 3, dtype=torch.int64)}, "positions are"),
        ({"q": drawn(2, 4, 4, 16)}, "both cos and sin"),
        ({"cos": drawn(1, 4, 16)}, "both cos and sin"),
        ({"cos": drawn(1, 4, 16), "sin": drawn(1, 4, 8)}, "one shape"),
        ({"cos": drawn(1, 4, 6), "sin": drawn(1, 4, 6)}, "cos is"),
        ({"cos": drawn(1, 4, 16).double(), "sin": drawn(1, 4, 16).double()}, "cos is"),
        ({"q": drawn(2, 4, 3, 16), **angles(1, 4, 16)}, "queries are"),
        ({"k": drawn(2, 2, 4, 16).to("meta")}, "one device"),
    ],
)
def test_bad_writes_are_refused_before_anything_is_written(change, reason):
    cache = KeyValueCache.empty(2, 2, 8, 16)
    given = {"k": drawn(2, 2, 4, 16), "v": drawn(2, 2, 4, 16), "positions": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(FormatError, match=reason):
        cache.write(**given)
    assert not cache.k_codes.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": drawn(2, 3, 1, 64)}, "divide"),
        ({"q": drawn(2, 4, 1, 32)}, "do not fit"),
        ({"q": drawn(2, 4, 1, 64).double()}, "float32"),
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths are"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "of integers"),
        ({"window": 0}, "positive"),
    ],
)
def test_bad_queries_are_refused(change, reason):
    cache, *_ = filled()
    with pytest.raises(FormatError, match=reason):
        cache.attend(**{"q": drawn(2, 4, 1, 64), "lengths": torch.tensor([1, 2])} | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"keys": "MXFP8"}, "keys and values of a cache"),
        ({"values": "INT8_TENSOR"}, "keys and values of a cache"),
        ({"k_codes": torch.zeros(2, 8, 2, 16)}, "uint8"),
        ({"v_scale": torch.zeros(2, 2, 8)}, "uint8"),
        ({"k_codes": torch.zeros(2, 8, 16, 2, dtype=torch.uint8).mT}, "side by side"),
        ({"table": torch.zeros(2, 3, dtype=torch.int64)}, "int32"),
    ],
)
def test_bad_caches_are_refused(change, reason):
    codes, scale = torch.zeros(2, 8, 2, 16, dtype=torch.uint8), torch.zeros(2, 8, 2)
    with pytest.raises(FormatError, match=reason):
        KeyValueCache(**{"k_codes": codes, "k_scale": scale, "v_codes": codes, "v_scale": scale} | change)
    with pytest.raises(FormatError, match="positive"):
        KeyValueCache.empty(1, 1, 0, 16)


def test_gradients_are_refused():
    cache, *_ = filled()
    x, at = drawn(2, 2, 1, 64).requires_grad_(), torch.tensor([3, 4])
    with torch.enable_grad():
        with pytest.raises(UnsupportedOpError, match="no_grad"):
            cache.write(x, x.detach(), at)
        with pytest.raises(UnsupportedOpError, match="no_grad"):
            cache.attend(x, at)
    cache.attend(x, at)
