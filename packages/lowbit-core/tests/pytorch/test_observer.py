"""Observers against numpy on the values they saw, in one process, in pieces, and on two gloo ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import ranks
from torch import nn

from lowbit import Format, FormatError
from lowbit.observer import (
    AbsMax,
    Hessian,
    Histogram,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    PerChannelAbsMax,
    PerChannelMinMax,
)

K = 8
MAKE = {
    "abs max": AbsMax,
    "min max": MinMax,
    "moving average": MovingAverage,
    "percentile": lambda: Percentile(99.0),
    "histogram": Histogram,
    "per-channel abs max": lambda: PerChannelAbsMax(K),
    "per-channel min max": lambda: PerChannelMinMax(K),
    "hessian": lambda: Hessian(K),
}
RANGES = [name for name in MAKE if name != "hessian"]
FORMATS = ["int8:*x*:float32", "int8:*x*:float32:zero=int8", "e4m3fn:*x*:float32", "NVFP4"]


def batches(seed=0, count=4):
    """Off centre, with one large channel; bfloat16 values, so that counting them loses nothing."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(K).index_fill(0, torch.tensor(3), 30.0)
    return [(torch.randn(64, K, generator=generator) * scale + 0.5).bfloat16() for _ in range(count)]


def ends(name, seen):
    """The range that numpy finds."""
    x = torch.cat(seen).double().numpy()
    match name:
        case "abs max":
            return -np.abs(x).max(), np.abs(x).max()
        case "min max":
            return x.min(), x.max()
        case "moving average":
            return np.mean([float(b.min()) for b in seen]), np.mean([float(b.max()) for b in seen])
        case "percentile":
            return np.percentile(x, [0.5, 99.5], method="lower")[0], np.percentile(x, 99.5, method="higher")
        case "per-channel abs max":
            return -np.abs(x).max(0), np.abs(x).max(0)
        case "per-channel min max":
            return x.min(0), x.max(0)


@pytest.mark.parametrize("name", [name for name in RANGES if name != "histogram"])
def test_range_is_numpys(name):
    observer, seen = MAKE[name](), batches()
    for batch in seen:
        observer.update(batch)
    low, high = observer.range(Format.parse(FORMATS[0]))
    wanted_low, wanted_high = ends(name, seen)
    np.testing.assert_allclose(low.numpy(), np.atleast_1d(wanted_low), rtol=1e-6)
    np.testing.assert_allclose(high.numpy(), np.atleast_1d(wanted_high), rtol=1e-6)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_qparams_span_the_range(name, fmt):
    observer, fmt = MAKE[name](), Format.parse(fmt)
    for batch in batches():
        observer.update(batch)
    low, high = (end.double() for end in observer.range(fmt))
    scales = observer.qparams(fmt)
    scale = scales.scale.double() * (1 if scales.tensor_scale is None else scales.tensor_scale.double())
    assert scale.shape == (len(low), 1)
    if fmt.zero is None:
        amax = torch.maximum(-low, high)
        largest = 127.5 if fmt.element.kind == "int" else fmt.element.max
        # NVFP4 rounds its scale to e4m3fn, of 3 bits of mantissa.
        torch.testing.assert_close(scale.flatten() * largest, amax, rtol=2**-4 if fmt.tensor_scale else 1e-6, atol=0)
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
        zero = scales.zero.double()
        decoded = [((code - zero) * scale).flatten() for code in (fmt.element.min, fmt.element.max)]
        torch.testing.assert_close(decoded[0], low, rtol=0, atol=0.501 * float(scale.max()))
        torch.testing.assert_close(decoded[1], high, rtol=0, atol=0.501 * float(scale.max()))


@pytest.mark.parametrize(
    "fmt", ["int8:*x*:float32", "int4:*x*:float32", "int4:*x*:float32:zero=int4", "e2m1:*x*:float32"]
)
def test_histogram_finds_the_range_of_least_error(fmt):
    fmt = Format.parse(fmt)
    seen = [torch.randn(1000, generator=torch.Generator().manual_seed(1)).pow(3).bfloat16()]
    x = torch.cat(seen).float()

    def error(low, high):
        probe = MinMax()
        probe.update(torch.stack((low.flatten()[0], high.flatten()[0])))
        scales = probe.qparams(fmt)
        scale, zero = scales.scale.double(), 0 if scales.zero is None else scales.zero.double()
        scaled = (x.double() / scale).flatten()
        if fmt.element.kind == "int":
            rounded = (scaled.round() + zero).clamp(fmt.element.min, fmt.element.max) - zero
        else:
            grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
            grid = torch.cat((-grid, grid))
            rounded = grid[(scaled[:, None] - grid).abs().argmin(1)]
        return float((rounded * scale - x.double()).square().sum())

    best, whole = Histogram(), MinMax()
    for batch in seen:
        best.update(batch)
        whole.update(batch)
    found = error(*best.range(fmt))
    low, high = whole.range(fmt)
    low, high = (low.clamp_max(0), high.clamp_min(0)) if fmt.zero else (-x.abs().max()[None], x.abs().max()[None])
    grid = [error(low * a, high * a) for a in torch.linspace(0.05, 1, 77)]
    assert found <= min(grid) * 1.001
    assert found < error(low, high) * (1 if fmt.element.bits == 8 else 0.9)


@pytest.mark.parametrize("name", list(MAKE))
def test_two_halves_make_the_whole(name):
    whole, halves = MAKE[name](), [MAKE[name](), MAKE[name]()]
    for i, batch in enumerate(batches()):
        whole.update(batch)
        halves[i % 2].update(batch)
    halves[0].merge(halves[1])
    for buffer, expected in whole.state_dict().items():
        torch.testing.assert_close(halves[0].get_buffer(buffer), expected, rtol=1e-5, atol=1e-4)


def on_a_rank(name):
    rank, mine, whole = torch.distributed.get_rank(), MAKE[name](), MAKE[name]()
    for i, batch in enumerate(batches()):
        whole.update(batch)
        if i % 2 == rank:
            mine.update(batch)
    mine.all_reduce()
    for buffer, expected in whole.state_dict().items():
        torch.testing.assert_close(mine.get_buffer(buffer), expected, rtol=1e-5, atol=1e-4)
        if mine.reductions[buffer] != "sum" or not expected.is_floating_point():
            assert torch.equal(mine.get_buffer(buffer), expected)


@pytest.fixture(scope="module")
def two():
    with ranks(2) as started:
        yield started


@pytest.mark.parametrize("name", list(MAKE))
def test_two_ranks_know_what_one_would(two, name):
    two.run(on_a_rank, name)


@pytest.mark.parametrize("name", list(MAKE))
def test_statistics_are_saved_and_move_undiminished(name):
    model = nn.Sequential(MAKE[name]())
    for batch in batches():
        model[0].update(batch.float() * 1.001)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(saved) == {f"0.{buffer}" for buffer in model[0].reductions}
    model.to(torch.bfloat16)
    other = nn.Sequential(MAKE[name]())
    other.load_state_dict(saved)
    for key, value in saved.items():
        assert torch.equal(model.state_dict()[key], value)
        assert torch.equal(other.state_dict()[key], value)
        assert model.state_dict()[key].dtype == value.dtype
    assert all(buffer.is_meta for buffer in model.to("meta").buffers())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hessian_is_the_sum_in_float64_of_what_inputs_hold(dtype, device):
    x = torch.randn(3, 400, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 5] *= 30
    observer = Hessian(48).to(device)
    for rows in x:
        observer.update(rows.to(device))
    wide = x.flatten(0, 1).double()
    # A float32 sum of 1,200 products, each in error by no more than the sum of magnitudes rounds by.
    bound = 1200 * 2.0**-24 * (wide.abs().T @ wide.abs())
    assert ((observer.hessian.cpu().double() - wide.T @ wide).abs() <= bound).all()
    assert observer.tokens.item() == 1200


def test_hessian_of_experts_is_that_of_each_ones_rows():
    x, ends = torch.cat(batches()), torch.tensor([100, 100, 256], dtype=torch.int32)
    observer = Hessian(K, experts=3)
    observer.update(x[:40], torch.tensor([40, 40, 40]))
    observer.update(x[40:], ends - 40)
    parts = [x[:100].double(), x[100:100].double(), x[100:].double()]
    assert observer.tokens.tolist() == [100, 0, 156]
    for found, rows in zip(observer.hessian, parts, strict=True):
        torch.testing.assert_close(found.double(), rows.T @ rows, rtol=1e-5, atol=1e-3)


def test_values_beyond_finite_are_told():
    for name in RANGES:
        for bad in (torch.nan, torch.inf, -torch.inf):
            observer = MAKE[name]()
            observer.update(batches()[0])
            observer.update(torch.full((1, K), bad))
            with pytest.raises(FormatError, match="NaN or an infinity"):
                observer.qparams(Format.parse(FORMATS[0]))


@pytest.mark.parametrize("name", RANGES)
def test_nothing_seen_is_told(name):
    observer: Observer = MAKE[name]()
    observer.update(torch.empty(0, K))
    with pytest.raises(FormatError, match="has seen no values"):
        observer.qparams(Format.parse(FORMATS[0]))


def test_what_does_not_fit_is_told():
    with pytest.raises(FormatError, match="MinMax cannot take in what AbsMax has seen"):
        MinMax().merge(AbsMax())
    with pytest.raises(FormatError, match=r"shape \(4,\) here and \(8,\) there"):
        PerChannelAbsMax(4).merge(PerChannelAbsMax(8))
    with pytest.raises(FormatError, match=r"shape \(2, 7\) were seen where the last dimension had to be 8"):
        PerChannelAbsMax(8).update(torch.ones(2, 7))
    with pytest.raises(FormatError, match="where each one's rows end"):
        Hessian(K, experts=2).update(torch.ones(2, K))
    with pytest.raises(FormatError, match="knows no range"):
        Hessian(K).qparams(Format.parse("INT8_TENSOR"))
    with pytest.raises(FormatError, match="percent=0 must lie above 0"):
        Percentile(0)
