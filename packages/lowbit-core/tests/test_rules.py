"""Every operator on a quantized tensor against the same operator on the dequantized one, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import FORMATS, FormatError, QuantizedTensor, UnsupportedOpError, quantize
from lowbit.packing import unit
from lowbit.testing import FORMAT_GRID, sample, shapes

each_format = pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
modes = pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
FEW = [FORMATS[name] for name in ("INT8_ROW_ASYM", "MXFP4", "NVFP4")]
in_modes = pytest.mark.parametrize(
    ("fmt", "mode"),
    [
        *((fmt, nullcontext) for fmt in FORMAT_GRID),
        *((fmt, m) for fmt in FEW for m in (torch.no_grad, torch.inference_mode)),
    ],
    ids=str,
)


def tensors(fmt, dtype=torch.float32):
    """A quantized tensor of each rank, blocked along each axis."""
    for shape in shapes(fmt):
        for axis in range(len(shape)):
            yield quantize(sample(shape, dtype=dtype).movedim(-1, axis), fmt, axis=axis), axis


def check(result, expected):
    assert isinstance(result, QuantizedTensor)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    values = result.dequantize()
    assert values.dtype == expected.dtype
    assert torch.equal(values, expected)


def check_parts(result, expected):
    assert result.storage_layout == expected.storage_layout
    assert result.inner_tensors().keys() == expected.inner_tensors().keys()
    for name, part in expected.inner_tensors().items():
        given_bytes, wanted = (t.contiguous().view(torch.uint8) for t in (getattr(result, name), part))
        assert torch.equal(given_bytes, wanted), name


def blocks(q, axis):
    """Block length of every logical dim, worked out from the axis and not from the tensor's own permutation."""
    block = list(q.format.block_for(q.dim()))
    last = block.pop()
    block.insert(axis, last)
    return block


@in_modes
def test_reordering_dimensions(fmt, mode):
    with mode():
        for q, _ in tensors(fmt):
            d, rank = q.dequantize(), q.dim()
            for dims in permutations(range(rank)):
                check(q.permute(dims), d.permute(dims))
                assert q.permute(dims).qdata.data_ptr() == q.qdata.data_ptr()
            check(q.permute([dim - rank for dim in range(rank)]), d)
            check(q.transpose(0, -1), d.transpose(0, -1))
            check(q.movedim(0, -1), d.movedim(0, -1))
            if rank <= 2:
                check(q.t(), d.t())
            if rank >= 2:
                check(q.mT, d.mT)
                check(q.mT.mT, d)


@each_format
def test_copies(fmt):
    for q, _ in tensors(fmt, torch.bfloat16):
        d = q.dequantize()
        check(q.detach(), d)
        assert q.detach().qdata.data_ptr() == q.qdata.data_ptr()
        for copy in (q.clone(), q.contiguous().clone(), q.to(torch.bfloat16, copy=True), q.cpu().clone()):
            check_parts(copy, q)
            parts = zip(copy.inner_tensors().values(), q.inner_tensors().values(), strict=True)
            assert all(a.data_ptr() != b.data_ptr() for a, b in parts)
        for dtype in (torch.float16, torch.float32, torch.float64):
            check(q.to(dtype), q.dequantize(dtype))
        assert q.to("meta").shape == q.shape
        assert q.to("meta").dequantize().is_meta


@in_modes
def test_cuts(fmt, mode):
    with mode():
        for q, axis in tensors(fmt):
            d, run = q.dequantize(), unit(fmt.element.bits)[0] if fmt.element.packed else 1
            for dim, block in enumerate(blocks(q, axis)):
                n = q.shape[dim]
                cuts = [
                    (0, 1, 1),
                    (1, n, 1),
                    (1, n - 1, 3),
                    (0, n, 2),
                    (n // 2, n // 2, 1),
                    (0, block, 1),
                    (block, n, 1),
                ]
                for start, end, step in [(min(a, b), b, s) for a, b, s in cuts]:
                    index = (slice(None),) * dim + (slice(start, end, step),)
                    whole = step == 1 and start % max(block, 1) == 0 and (end % max(block, 1) == 0 or end == n)
                    if start == end or block <= 1 or whole:
                        check(q[index], d[index])
                        if step == 1 and (dim != axis or (start % run == 0 and (end % run == 0 or end == n))):
                            assert q[index].qdata.untyped_storage().data_ptr() == q.qdata.untyped_storage().data_ptr()
                    else:
                        with pytest.raises(
                            FormatError, match=f"cuts through block {fmt.block_name.replace('*', '.')} of"
                        ):
                            q[index]
                check(q[(slice(None),) * dim + (slice(-n, 10**9),)], d)
                check(q.narrow(dim, 0, n), d)


@in_modes
def test_select_unbind_and_iteration(fmt, mode):
    with mode():
        for q, axis in tensors(fmt):
            d = q.dequantize()
            for dim, block in enumerate(blocks(q, axis)):
                if dim == axis or block > 1:
                    with pytest.raises(FormatError, match=f"block {fmt.block_name.replace('*', '.')}"):
                        q.select(dim, 0)
                    continue
                for index in (0, -1):
                    check(q.select(dim, index), d.select(dim, index))
                for part, plain in zip(q.unbind(dim), d.unbind(dim), strict=True):
                    check(part, plain)
                with pytest.raises(IndexError):
                    q.select(dim, q.shape[dim])
            if axis > 0 and blocks(q, axis)[0] <= 1:
                check(list(q)[1], list(d)[1])
                assert q[1].qdata.untyped_storage().data_ptr() == q.qdata.untyped_storage().data_ptr()


@each_format
def test_pieces_and_their_join(fmt):
    for q, axis in tensors(fmt):
        d = q.dequantize()
        for dim, block in enumerate(blocks(q, axis)):
            size = max(block, 1)
            n = q.shape[dim]
            chunks = n // size if n % size == 0 else 1
            for pieces, plain in (
                (q.split(size, dim), d.split(size, dim)),
                (q.split([size, n - size], dim), d.split([size, n - size], dim)),
                (q.chunk(chunks, dim), d.chunk(chunks, dim)),
            ):
                for piece, values in zip(pieces, plain, strict=True):
                    check(piece, values)
                check_parts(torch.cat(pieces, dim), q)
            with pytest.raises(FormatError, match="must add up to"):
                q.split([1, 1, 1000], dim)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_join_of_any_cuts_is_the_original(data):
    fmt = data.draw(st.sampled_from(FORMAT_GRID))
    shape = data.draw(st.sampled_from(shapes(fmt)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    q = quantize(sample(shape).movedim(-1, axis), fmt, axis=axis)
    dim = data.draw(st.integers(0, len(shape) - 1))
    step = max(blocks(q, axis)[dim], 1)
    cuts = data.draw(st.lists(st.integers(0, q.shape[dim] // step).map(lambda i: i * step), max_size=5))
    ends = [0, *sorted(cuts), q.shape[dim]]
    pieces = [q[(slice(None),) * dim + (slice(a, b),)] for a, b in pairwise(ends)]
    check_parts(torch.cat(pieces, dim), q)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_permute_and_its_inverse_is_the_original(data):
    fmt = data.draw(st.sampled_from(FORMAT_GRID))
    shape = data.draw(st.sampled_from(shapes(fmt)))
    q = quantize(sample(shape), fmt)
    dims = data.draw(st.permutations(range(len(shape))))
    inverse = [dims.index(i) for i in range(len(shape))]
    check_parts(q.permute(dims).permute(inverse), q)


@each_format
def test_join_of_different_tensors(fmt):
    for shape in shapes(fmt):
        whole = tuple(n // max(b, 1) * max(b, 1) for n, b in zip(shape, fmt.block_for(len(shape)), strict=True))
        a, b = (quantize(sample(whole, seed=seed) * 3.0**seed, fmt) for seed in (1, 4))
        for dim, block in enumerate(fmt.block_for(len(shape))):
            if block == 0 or (fmt.tensor_scale and dim == len(shape) - 1):
                with pytest.raises(FormatError, match="scale differ"):
                    torch.cat([a, b], dim)
            else:
                check(torch.cat([a, b], dim), torch.cat([a.dequantize(), b.dequantize()], dim))
        check(torch.stack([a, b]), torch.stack([a.dequantize(), b.dequantize()]))


def test_join_shares_no_memory_with_its_inputs():
    for fmt in (FORMATS["INT8_TENSOR"], FORMATS["NVFP4"], FORMATS["INT8_ROW"]):
        a = quantize(sample((4, 32)), fmt)
        joined = torch.cat([a, a])
        for name, part in a.inner_tensors().items():
            assert getattr(joined, name).data_ptr() != part.data_ptr(), name


def test_join_refuses_what_does_not_match():
    a = quantize(sample((6, 96)), "MXFP4")
    with pytest.raises(FormatError, match="cuts block 16"):
        torch.cat([quantize(sample((4, 24)), "int4:4x16:bfloat16")] * 2, 1)
    with pytest.raises(UnsupportedOpError, match="not with plain tensors"):
        torch.cat([a, a.dequantize()])
    for other in (
        quantize(sample((6, 96)), "MXFP8"),
        a.half(),
        a.t(),
        quantize(sample((6, 96)), "MXFP4", activation="dynamic:MXFP8"),
    ):
        with pytest.raises(FormatError, match="need one format"):
            torch.cat([a, other])


@each_format
def test_squeezing(fmt):
    for shape in shapes(fmt):
        q = quantize(sample(shape), fmt)
        d, block = q.dequantize(), fmt.block_for(len(shape))
        check(q.squeeze(0), d.squeeze(0))
        # What one scale covers has to stay.
        for dim in (dim for dim in range(len(shape)) if block[dim] == 1):
            check(q.unsqueeze(dim).squeeze(dim), d)
        if 1 not in shape:
            check(q.squeeze(), d)
            if block[0] == 1:
                check(q.unsqueeze(0).squeeze(), d)


@each_format
def test_views(fmt):
    for shape in shapes(fmt):
        q = quantize(sample(shape), fmt)
        d, block = q.dequantize(), fmt.block_for(len(shape))
        free = next((i for i, b in enumerate(block) if b != 1), len(shape) - 1)
        check(q.view(shape), d)
        check(q.view(1, *shape), d.view(1, *shape))
        for dim in range(free + 1):
            check(q.unsqueeze(dim), d.unsqueeze(dim))
            assert q.unsqueeze(dim).scale.data_ptr() == q.scale.data_ptr()
        if free >= 2:
            for view in (
                lambda t: t.flatten(0, 1),
                lambda t: t.reshape(-1, *t.shape[2:]),
                lambda t: t.view(-1, *t.shape[2:]),
            ):
                check(view(q), view(d))
        elif len(shape) > 1:
            group, run = block[-1], unit(fmt.element.bits)[0]
            if free == len(shape) - 1 and group > 1 and not fmt.tensor_scale and group % run == 0:
                check(q.flatten(), d.flatten())
                check(q.view(-1, group), d.view(-1, group))
            else:
                with pytest.raises(FormatError, match=f"cuts through block {fmt.block_name.replace('*', '.')}"):
                    q.view(-1, 1)
                with pytest.raises(UnsupportedOpError, match="flattened QuantizedTensor"):
                    q.flatten() + 1
                check(q.flatten().view(shape), d)
        if free >= 1 and shape[0] % 2 == 0:
            check(q.unflatten(0, (2, -1)), d.unflatten(0, (2, -1)))


def test_views_of_cuts_and_wrong_views():
    q = quantize(sample((4, 64)), "INT4_G32")
    cut = q[:, :32]
    check(cut.reshape(2, 2, 32), q.dequantize()[:, :32].reshape(2, 2, 32))
    check(torch.stack([cut, cut]), torch.stack([cut.dequantize()] * 2))
    with pytest.raises(FormatError, match="undo the permute"):
        q.t().view(2, 32, 4)
    with pytest.raises(FormatError, match="invalid for a tensor of 256"):
        q.view(5, 32)
    row = quantize(sample((2, 24)), "int3:1x12:float32")
    with pytest.raises(FormatError, match="cuts through block 1x12"):
        row.view(4, 12)
    for dims in ((0, 0), (0, 2), (0,)):
        with pytest.raises(FormatError):
            q.permute(dims)


def test_as_strided_gives_the_tensor_as_it_is_or_refuses():
    q = quantize(sample((6, 96)), "MXFP4")
    check(q.as_strided((6, 96), (96, 1)), q.dequantize())
    with pytest.raises(UnsupportedOpError, match="gives it as it is"):
        q.as_strided((2,), (1,))


UNSUPPORTED = {
    "aten.add.Tensor": lambda q: q + 1,
    "aten.mul_.Tensor": lambda q: q.mul_(2),
    "aten.sum.default": lambda q: q.sum(),
    "aten.abs.default": lambda q: q.abs(),
    "aten.equal.default": lambda q: torch.equal(q, q),
    "aten.index.Tensor": lambda q: q[torch.tensor([0, 1])],
    "aten.expand.default": lambda q: q.expand(2, 6, 96),
    "aten.roll.default": lambda q: q.roll(1, 0),
    "aten.zero_.default": lambda q: q.zero_(),
    "aten.fill_.Scalar": lambda q: q.fill_(0),
    "aten.bmm.default": lambda q: torch.bmm(torch.zeros(1, 2, 96), q.unsqueeze(0).mT),
    "lowbit.quantize.default": lambda q: quantize(q, "MXFP8"),
}


@pytest.mark.parametrize("op", UNSUPPORTED)
@modes
def test_an_operator_without_a_rule_says_so(op, mode):
    with mode(), pytest.raises(UnsupportedOpError, match=f"^{op} has no rule"):
        UNSUPPORTED[op](quantize(sample((6, 96)), "MXFP4"))


@pytest.mark.parametrize(("spec", "rows", "cut"), [("NVFP4", 16, slice(7, 19, 2)), ("e2m1:16x16:e4m3fn:tensor", 64, slice(48, 80))])  # fmt: skip
def test_unequal_tensor_scales_join_and_cut(spec, rows, cut):
    small, large = quantize(torch.randn(rows, 64), spec), quantize(torch.randn(32, 64) * 100, spec)
    joined = torch.cat([small, large])
    values = torch.cat([small.dequantize(), large.dequantize()])
    assert torch.equal(joined.dequantize(), values)
    assert torch.equal(joined[cut].dequantize(), values[cut])
