"""Key-value caches: what is written, to the bit, and attention over codes, within what the operator may lose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowbit import KeyValueCache, caching
from lowbit.backends import Call
from lowbit.bench.inputs import sqnr
from lowbit.testing import check_backend
from lowbit_kernels_cuda.backend import backend
from lowbit_kernels_cuda.cache_write import cache_write
from lowbit_kernels_cuda.cached_attention import Plan, cached_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUN = {"cache_write": cache_write, "cached_attention": cached_attention}


def drawn(*shape, seed, device="cpu", dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def parts(cache):
    return cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale


# The interpreter is slow: one dtype, and keys and values in the two formats. It warns of a largest number among NaN alone,
# which scores are of a page that is none.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize(("op", "dtype"), [("cache_write", torch.bfloat16), ("cached_attention", torch.float16)])
def test_kernels_are_checked_in_the_interpreter(op, dtype):
    rows = [row for row in backend.kernels() if row.op == op]

    def refuses(call):
        return rows[0].refuses(call) or ("the same format twice" if str(call.format) in call.facts else None)

    kernel = SimpleNamespace(name=op, op=op, device="cpu", pack=None, run=RUN[op], refuses=refuses)
    own = SimpleNamespace(name="own", probe=lambda: None, kernels=lambda: (kernel,))
    (row,) = check_backend(own, formats=(), dtypes=(dtype,), devices=("cpu",)).rows
    assert row.runs > row.calls == 2


@pytest.mark.gpu
def test_kernels_are_what_their_backend_is_checked_for():
    rows = tuple(row for row in backend.kernels() if row.op in RUN)
    own = SimpleNamespace(name="cuda", probe=lambda: None, kernels=lambda: rows)
    for row in check_backend(own, formats=(), devices=("cuda",)).rows:
        assert row.runs > row.calls > 0


@pytest.mark.parametrize(
    ("device", "d", "dtype"),
    [("cpu", 6, torch.float32), *(pytest.param("cuda", d, torch.float16, marks=pytest.mark.gpu) for d in (80, 250))],
)
def test_what_is_written_is_the_reference_of_any_width_and_strides(device, d, dtype):
    caches = [KeyValueCache.empty(2, 3, 9, d, keys="INT8_ROW", page=3, device=device) for _ in range(2)]
    k, v, q = (drawn(2, d, 2, heads, seed=heads, device=device, dtype=dtype).permute(0, 3, 2, 1) for heads in (3, 3, 5))
    k[0, 0, 0, 2], v[1, 2, 1, 4] = torch.nan, torch.inf
    angle = drawn(2, 2, d // 2, seed=7, device=device, dtype=dtype)
    at = torch.tensor([[8, 3], [-1, 9]], dtype=torch.int32, device=device)
    found = []
    for cache, run in zip(caches, (cache_write, caching.write_cache), strict=True):
        out = run(k, v, q, angle.cos(), angle.sin(), *parts(cache), at, cache.table, str(cache.keys), str(cache.values))
        values = cache.v_codes.view(torch.float8_e4m3fn).float()
        found.append((out, cache.k_codes, cache.k_scale, values, cache.v_scale))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_beside_a_cache_is_written(device):
    whole = KeyValueCache.empty(1, 1, 12, 4, page=4, device=device)
    # The page in the middle is the cache, and the table has none but its neighbours.
    inner, table = [part[1:2] for part in parts(whole)], torch.tensor([[-1, 1]], dtype=torch.int32, device=device)
    k, at = drawn(1, 1, 8, 4, seed=1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    cache_write(k, k, None, None, None, *inner, at, table, str(whole.keys), str(whole.values))
    assert not any(part.any() for part in parts(whole))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "queries", "d", "page", "lengths", "plan"),
    [
        # Rows for two programs, and channels that are no power of two.
        ((12, 1), 6, 80, None, (290, 100), Plan(32, 4, 3, 1)),
        # More programs than some texts have steps.
        ((4, 2), 1, 64, 16, (300, 40), Plan(16, 4, 3, 32)),
        ((4, 4), 2, 128, 64, (320, 0), Plan(32, 4, 3, 8)),
    ],
)
def test_attention_is_that_of_the_reference_however_it_is_shared(device, heads, queries, d, page, lengths, plan):
    cache = KeyValueCache.empty(2, heads[1], 320, d, keys="INT8_ROW", page=page, device=device)
    if page is not None:
        cache.table.copy_(torch.randperm(cache.table.numel(), device=device).view(cache.table.shape))
    k, v = (drawn(2, heads[1], 320, d, seed=i, device=device) for i in (1, 2))
    # Values of one token are large, and those of another small and seen most.
    v[:, :, 30] *= 1000
    k[:, :, 20] *= 3
    start = torch.zeros(2, dtype=torch.int64, device=device)
    caching.write_cache(k, v, None, None, None, *parts(cache), start, cache.table, str(cache.keys), str(cache.values))
    q = drawn(2, queries, heads[0], d, seed=3, device=device).transpose(1, 2)
    for window in (0, 70):
        given = (*parts(cache), torch.tensor(lengths, device=device), cache.table, window, d**-0.5)
        found = cached_attention(q, *given, str(cache.keys), str(cache.values), plan)
        right = caching.attend_cache(q.float(), *given, str(cache.keys), str(cache.values))
        # Weights and results have 11 bits.
        assert sqnr(right, found) > 60


@pytest.mark.parametrize("device", DEVICES)
def test_codes_may_lie_where_no_word_begins(device):
    cache = KeyValueCache.empty(1, 1, 32, 64, device=device)
    k = drawn(1, 1, 32, 64, seed=1, device=device)
    at = torch.zeros(1, dtype=torch.int64, device=device)
    spec = str(cache.keys)
    caching.write_cache(k, k, None, None, None, *parts(cache), at, None, spec, spec)
    moved = torch.zeros(32 * 65, dtype=torch.uint8, device=device).as_strided((1, 32, 1, 64), (2080, 65, 65, 1), 1)
    moved.copy_(cache.v_codes)
    q, given = k[:, :, :2], (torch.tensor([32], device=device), None, 0, 0.125, spec, spec)
    found, right = (
        cached_attention(q, cache.k_codes, cache.k_scale, codes, cache.v_scale, *given)
        for codes in (moved, cache.v_codes)
    )
    assert torch.equal(found, right)


def test_refusals_say_what_is_needed():
    refusals = {row.op: row.refuses for row in backend.kernels() if row.op in RUN}
    fmt = "e4m3fn:1x*:float32"

    def of(op, dtype, k):
        return refusals[op](Call.of(op, fmt, "", torch.device("cuda"), dtype, None, k, fmt))

    assert of("cache_write", torch.float32, 128) is None
    assert of("cached_attention", torch.bfloat16, 256) is None
    assert "bfloat16 or float16" in of("cached_attention", torch.float32, 128)
    assert "even" in of("cache_write", torch.float16, 33)
    assert "256" in of("cached_attention", torch.float16, 512)
