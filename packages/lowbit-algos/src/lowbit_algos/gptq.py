"""GPTQ for every format: columns are rounded one after the other, and those to come make up for each one's error.

A group's scale is chosen when its turn comes, from the weights as they are by then, and stays. Groups with larger
inputs go first, and so do the columns of a group; the result is stored in the original order.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", in the form
that `lowbit_algos.columns` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from math import inf
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from lowbit import Format, FormatError, QuantizedTensor, Scales, choose_scale
from lowbit.numerics import DEFAULT_MODE, ScaleMode, choose_scales, encode
from lowbit_algos.columns import Rounded, kernel_for_columns, round_columns, rows_a_scale
from lowbit_algos.factor import ROWS, Factors, factors

# Of a group's values, those that the candidates of a search fit; beyond, all saturates.
_SHARES = tuple(1 - i / 32 for i in range(-1, 15))
# For scales that are powers of two.
_POWERS = (1.0, 0.5, 2.0)
_BLOCK = 128
# Values of a weight, and of Hessians where that is of several, that are worked on at a time: on a GPU enough to keep it
# busy.
_ELEMENTS, _ELEMENTS_ON_GPU = 1 << 23, 1 << 26
# Columns that a GPU brings up to date with all before them by one product; one of a block alone would not fill it.
_AHEAD = 1024


@dataclass(frozen=True, slots=True)
class Solution:
    """A weight that GPTQ quantized, and how that went."""

    weight: QuantizedTensor
    # Of the mean of each Hessian's diagonal, added to it: more than asked for where that was too little.
    damping: tuple[float, ...]


DAMPING = 0.01
"""What is added to the diagonal of a Hessian, as a share of its mean, where nothing else is asked for."""


def working(n: int, k: int, *, experts: int = 1, cuda: bool) -> int:
    """Bytes at most that a matrix (N, K), or some experts, are worked on in, besides them and their Hessians."""
    count = min(experts, _experts_at_a_time(n, k, cuda=cuda))
    rows = count * n if count > 1 else min(n, _rows_at_a_time(k, cuda=cuda))
    # In float32: factors; while they are made, some of a Hessian's rows in order; then what is rounded, errors, values,
    # and codes in the making. On a GPU, a block of columns is there for every candidate, what it errs by, and the next.
    loop = rows * (6 * k + (3 * len(_SHARES) * _BLOCK if cuda else 0))
    return 4 * (count * k * k + max(2 * count * min(k, ROWS) * k, loop))


def _rows_at_a_time(k: int, *, cuda: bool) -> int:
    return max((_ELEMENTS_ON_GPU if cuda else _ELEMENTS) // k, 1)


def _experts_at_a_time(n: int, k: int, *, cuda: bool) -> int:
    return max(_rows_at_a_time(k, cuda=cuda) // max(n, k), 1)


class Options(TypedDict, total=False):
    """How `gptq` and `solve` go about it.

    - `damping` (0.01): added to the diagonal of the Hessian, as a share of its mean.
    - `block`: columns that are rounded before the rest of the weight is brought up to date, a multiple of the group; by
      default 128 or a little more.
    - `act_order` (on): round columns with larger inputs first; otherwise in the order they have.
    - `scale_search` (on): try several scales a group (a row, for formats with one a row), keep that of least loss.
    - `mode`: how e8m0 scales are rounded.
    """

    damping: float
    block: int | None
    act_order: bool
    scale_search: bool
    mode: ScaleMode


def gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: str | Format,
    *,
    k_axis: int = -1,
    tensor_scale: Tensor | None = None,
    **options: Unpack[Options],
) -> QuantizedTensor:
    """Quantize a weight so that its products with inputs like those seen change least; see `solve`."""
    return solve(weight, hessian, fmt, k_axis=k_axis, tensor_scale=tensor_scale, **options).weight


@torch.no_grad()
def solve(
    weight: Tensor,
    hessian: Tensor,
    fmt: str | Format,
    *,
    k_axis: int = -1,
    tensor_scale: Tensor | None = None,
    **options: Unpack[Options],
) -> Solution:
    """Quantize a weight so that its products with inputs like those seen change least, and tell how that went.

    It lowers `tr((W - Wq) H (W - Wq)^T)` greedily, in float32 whatever the weight's dtype; what is given stays as it
    is. A column whose inputs were all zero is rounded to nearest, and no other makes up for it.

    Args:
        weight: a matrix (N, K), or experts (E, N, K), with the contraction axis at `k_axis`.
        hessian: `sum x x^T` over inputs x (K,), any multiple of it: (K, K), or (E, K, K) for experts.
        fmt: a format or its spec; for experts, one without scales that several share.
        k_axis: the axis of the weight that products sum over.
        tensor_scale: that of NVFP4, where siblings share one; (1, 1), or (E, 1, 1) for experts.
        options: see `Options`.

    Raises:
        FormatError: shapes do not fit, the weight or a Hessian is not finite, `block` is no multiple of the group, or
            `damping` is not positive.
        LowbitError: a Hessian is not positive definite, however it is damped.
    """
    parsed = Format.parse(fmt) if isinstance(fmt, str) else fmt
    _check(weight, hessian, k_axis, tensor_scale)
    solver = _Solver(parsed.with_block(*parsed.block_for(2)), **options)
    canonical = weight.detach().movedim(k_axis, -1)
    one = canonical.dim() == 2
    matrices, hessians = (canonical[None], hessian[None]) if one else (canonical, hessian)
    count = _experts_at_a_time(*matrices.shape[1:], cuda=weight.is_cuda)
    given, wholes = (matrices.split(count), hessians.split(count)), [None] * -(-len(matrices) // count)
    if tensor_scale is not None:
        wholes = (tensor_scale[None] if one else tensor_scale).split(count)
    solved = [solver.solve(*some) for some in zip(*given, wholes, strict=True)]
    data, scales, dampings = zip(*solved, strict=True)
    codes, joined = _joined(torch.cat, data), _map(torch.cat, scales)
    if one:
        whole = None if joined.tensor_scale is None else joined.tensor_scale[0]
        codes, joined = codes[0], replace(_each(lambda part: part[0], joined), tensor_scale=whole)
    q = QuantizedTensor.from_parts(codes, joined, parsed, k=canonical.shape[-1], dtype=weight.dtype, axis=k_axis)
    return Solution(q, tuple(damping for some in dampings for damping in some))


@dataclass(frozen=True, slots=True)
class _Solver:
    """How matrices are to be solved; the format's block has two entries."""

    fmt: Format
    damping: float = DAMPING
    block: int | None = None
    act_order: bool = True
    scale_search: bool = True
    mode: ScaleMode = DEFAULT_MODE

    def __post_init__(self) -> None:
        """Refuse what no matrix can be solved with.

        Raises:
            FormatError: a number is not positive.
        """
        if self.damping <= 0 or (self.block is not None and self.block < 1):
            raise FormatError(f"damping={self.damping} and block={self.block} must be positive")

    def solve(
        self, weight: Tensor, hessian: Tensor, tensor_scale: Tensor | None
    ) -> tuple[Tensor, Scales, tuple[float, ...]]:
        """Codes and scales of matrices (E, N, K), and the damping that each took."""
        _, n, k = weight.shape
        _, together, group = self.fmt.block_of(tuple(weight.shape))
        block = self._block(group) if group < k else self.block or _BLOCK
        order, groups = self._order(hessian.diagonal(dim1=1, dim2=2), group)
        found = factors(hessian, order, self.damping)
        if tensor_scale is None and self.fmt.tensor_scale:
            tensor_scale = self._choose(weight, None).tensor_scale
        # Rows are independent, so that only some of them need to be in float32 at a time.
        rows = n if len(weight) > 1 else -(-_rows_at_a_time(k, cuda=weight.is_cuda) // together) * together
        parts = [self._rows(part, found, groups, block, tensor_scale) for part in weight.split(rows, 1)]
        data, scales = zip(*parts, strict=True)
        join = partial(torch.cat, dim=1)
        return _joined(join, data), replace(_map(join, scales), tensor_scale=tensor_scale), found.damping

    def _rows(
        self, weight: Tensor, found: Factors, groups: Tensor, block: int, tensor_scale: Tensor | None
    ) -> tuple[Tensor, Scales]:
        """Codes and scales of rows (E, N, K)."""
        w = _taken(weight, found.order).to(torch.float32)
        targets, errors = torch.empty_like(w), torch.empty_like(w)
        m, group = found.m, self.fmt.block_of(tuple(w.shape))[2]
        grouped = group < w.shape[2]
        scales = self._room(w, tensor_scale) if grouped else self._choose(w, tensor_scale)
        if not grouped:
            scales = self._search_rows(w, found, scales, block)
        kernel = inverses = None
        if grouped and w.device.type != "cpu":
            kernel = kernel_for_columns("round_groups", self.fmt, w.device.type, group)
            inverses = None if kernel is None else _inverses(m, group)
        since = ahead = 0
        brought = w.mT
        for spans in _blocks(self._sizes(w.shape[2], group, block), block):
            start, end = spans[0].first, spans[-1].end
            if end > ahead:
                since, ahead = start, max(end, start + _AHEAD) if w.is_cuda else end
                brought = w.mT[:, since:ahead].clone(memory_format=torch.contiguous_format)
                _add_product(brought, m.mT[:, since:ahead, :since], errors.mT[:, :since])
            # Transposed, so that it lies in memory as `w` does on a GPU.
            x, whole = brought[:, start - since : end - since], slice(start, end)
            _add_product(x, m.mT[:, whole, since:start], errors.mT[:, since:start])
            given = w[:, :, whole], x.mT, m[:, whole, whole], found.d[:, whole]
            if kernel is None or inverses is None:
                self._spans(spans, *given, scales, targets[:, :, whole], errors[:, :, whole], grouped=grouped)
                continue
            numbers, shares = slice(spans[0].group, spans[-1].group + 1), _on(w.device, self._shares)
            these = _each(lambda part, numbers=numbers: part[:, :, numbers], scales)
            how = inverses[:, numbers], shares, tensor_scale, self.fmt, self.mode
            kernel.run(*given, *how, these, targets[:, :, whole], errors[:, :, whole])
        if grouped:
            places = groups.argsort(1)[:, None]
            scales = _each(lambda part: _gathered(part, 2, places.expand(part.shape)), scales)
        return encode(_taken(targets, found.order.argsort(1)), self.fmt, scales), scales

    def _spans(
        self,
        spans: list[_Span],
        w: Tensor,
        x: Tensor,
        m: Tensor,
        d: Tensor,
        scales: Scales,
        targets: Tensor,
        errors: Tensor,
        *,
        grouped: bool,
    ) -> None:
        """Write targets and errors of a block's columns, and the scales of its groups."""
        for a, b, at in spans:
            one, after = (slice(part - spans[0].first, end) for part, end in ((a, b - spans[0].first), (b, None)))
            given = w[:, :, one], x[:, :, one], m[:, one, one], d[:, one]
            if grouped:
                rounded = self._group(*given, _each(lambda part, at=at: part[:, :, at : at + 1], scales))
            else:
                rounded = round_columns(*given, _each(_alone, scales), self.fmt)
            targets[:, :, one], errors[:, :, one] = rounded.targets, rounded.errors
            _add_product(x.mT[:, after], m.mT[:, after, one], errors.mT[:, one])

    def _room(self, w: Tensor, tensor_scale: Tensor | None) -> Scales:
        """Scales that are yet to be chosen."""
        shape, zero = self.fmt.scale_shape(tuple(w.shape)), self.fmt.zero
        zeros = None if zero is None else w.new_empty(shape, dtype=zero.code_dtype)
        return Scales(w.new_empty(shape, dtype=self.fmt.scale.code_dtype), zeros, tensor_scale)

    def _order(self, diagonal: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Columns (E, K) and groups (E, G) in the order they are rounded; columns of a group stay together.

        A group of fewer columns goes first, so that all experts have the same number of columns at a time.
        """
        count, k = diagonal.shape
        starts = torch.arange(0, k, group, device=diagonal.device)
        if not self.act_order:
            order, groups = (torch.arange(size, device=diagonal.device) for size in (k, len(starts)))
            return order.expand(count, -1), groups.expand(count, -1)
        lacking = -k % group
        parts = torch.nn.functional.pad(diagonal, (0, lacking), value=-inf).unflatten(1, (-1, group))
        sums = parts.sum(2)
        if lacking:
            sums[:, -1] = inf
        groups = sums.argsort(dim=1, descending=True, stable=True)
        inside = parts.argsort(dim=2, descending=True, stable=True) + starts[:, None]
        order = _gathered(inside, 1, groups[:, :, None].expand(inside.shape)).flatten(1)
        return torch.cat([order[:, : group - lacking], order[:, group:]], 1), groups

    def _sizes(self, k: int, group: int, block: int) -> list[int]:
        """Columns that are rounded together, in their order: of a group, or of a block where a scale covers rows."""
        size = group if group < k else block
        sizes, rest = [size] * (k // size), [k % size] if k % size else []
        return rest + sizes if self.act_order and group < k else sizes + rest

    def _block(self, group: int) -> int:
        """Columns of a block: whole groups.

        Raises:
            FormatError: those asked for are not.
        """
        if self.block is not None and self.block % group:
            raise FormatError(
                f"block={self.block} is not a multiple of the {group} columns that share a scale in {self.fmt}; "
                f"use block={-(-self.block // group) * group}"
            )
        return self.block or -(-_BLOCK // group) * group

    def _choose(self, w: Tensor, tensor_scale: Tensor | None) -> Scales:
        return choose_scale(w, self.fmt, mode=self.mode, tensor_scale=tensor_scale)

    @property
    def _shares(self) -> tuple[float, ...]:
        """Of what a scale covers, what the candidates of a search fit."""
        return (_POWERS if self.fmt.scale.powers_of_two else _SHARES) if self.scale_search else (1.0,)

    def _candidates(self, w: Tensor, tensor_scale: Tensor | None) -> Scales:
        """Scales to try, in a first dim."""
        return choose_scales(w, self.fmt, _on(w.device, self._shares), mode=self.mode, tensor_scale=tensor_scale)

    def _group(self, w: Tensor, x: Tensor, m: Tensor, d: Tensor, scales: Scales) -> Rounded:
        """Write a group's scales, chosen from what its weights are by now, and round its columns under them."""
        # How far they would go if none of them were rounded: `x_j - w_j` solved for their own part in it.
        free = torch.linalg.solve_triangular(m, x - w, upper=True, left=False, unitriangular=True)
        candidates = self._candidates(w + free, scales.tensor_scale)
        rounded = round_columns(w, x, m, d, candidates, self.fmt)
        chosen = self._best(candidates, rounded.losses)
        # Rows that share a scale agree on one, which need not be the best of each.
        if len(rounded.losses) > 1 and self.fmt.block[0] != 1:
            rounded = round_columns(w, x, m, d, _each(_alone, chosen), self.fmt)
        scales.scale.copy_(chosen.scale)
        if scales.zero is not None and chosen.zero is not None:
            scales.zero.copy_(chosen.zero)
        return rounded

    def _search_rows(self, w: Tensor, found: Factors, scales: Scales, block: int) -> Scales:
        """Scales that hold for whole rows: those of least loss when blocks of columns are rounded each on its own."""
        if not self.scale_search:
            return scales
        candidates = self._candidates(w, scales.tensor_scale)
        losses: list[Tensor] = []
        for a in range(0, w.shape[2], block):
            part = slice(a, a + block)
            given = w[:, :, part], w[:, :, part], found.m[:, part, part], found.d[:, part]
            losses.append(round_columns(*given, candidates, self.fmt).losses)
        return self._best(candidates, torch.stack(losses).sum(0))

    def _best(self, candidates: Scales, losses: Tensor) -> Scales:
        """Of the candidates, for each block of rows, the one of least loss (C, E, N)."""
        rows = rows_a_scale(self.fmt, losses.shape[2])
        if rows > 1:
            losses = torch.nn.functional.pad(losses, (0, -losses.shape[2] % rows)).unflatten(2, (-1, rows)).sum(-1)
        best = losses.argmin(0)[None, :, :, None]
        return _each(lambda part: _gathered(part, 0, best)[0], candidates)


def _each(function: Callable[[Tensor], Tensor], scales: Scales) -> Scales:
    """What a function makes of scales and zero points; a tensor scale stays, which broadcasts."""
    zero = scales.zero
    return replace(scales, scale=function(scales.scale), zero=zero if zero is None else function(zero))


def _alone(part: Tensor) -> Tensor:
    return part[None]


@cache
def _on(device: torch.device, shares: tuple[float, ...]) -> Tensor:
    return torch.tensor(shares, device=device)


class _Span(NamedTuple):
    """Columns that are rounded together, by their place in the order, and the number of their group."""

    first: int
    end: int
    group: int


def _blocks(sizes: list[int], block: int) -> Iterator[list[_Span]]:
    """Columns, in the order they are rounded, as blocks of groups."""
    spans: list[_Span] = []
    for group, (first, end) in enumerate(pairwise(accumulate(sizes, initial=0))):
        if spans and end - spans[0].first > block:
            yield spans
            spans = []
        spans.append(_Span(first, end, group))
    yield spans


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a b` of every expert."""
    if a.numel() == 0:
        return
    if to.device.type != "cpu":
        to.baddbmm_(a, b)
        return
    # One after the other: of several at once, a CPU's library may add up in another order.
    for part, left, right in zip(to, a, b, strict=True):
        part.addmm_(left, right)


def _inverses(m: Tensor, group: int) -> Tensor:
    """The inverses (E, G, g, g) of M's blocks of a group by itself."""
    blocks = m.unflatten(2, (-1, group)).unflatten(1, (-1, group)).diagonal(dim1=1, dim2=3).movedim(3, 1)
    identity = torch.eye(group, device=m.device).expand(blocks.shape)
    return torch.linalg.solve_triangular(blocks, identity, upper=True, unitriangular=True)


def _taken(w: Tensor, order: Tensor) -> Tensor:
    """Columns (E, K) of matrices (E, N, K); on a GPU column by column in memory, so that rows lie side by side."""
    if not w.is_cuda:
        return w.gather(2, order[:, None].expand(w.shape))
    return w.mT.gather(1, order[:, :, None].expand(w.mT.shape)).mT


def _gathered(part: Tensor, dim: int, index: Tensor) -> Tensor:
    """`torch.gather`, for 8-bit floats too."""
    return _bytes(part).gather(dim, index).view(part.dtype)


def _map(function: Callable[[list[Tensor]], Tensor], several: Sequence[Scales]) -> Scales:
    """One `Scales` of several, part by part."""
    return Scales(*(_joined(function, [getattr(s, part.name) for s in several]) for part in fields(Scales)))


def _joined(function: Callable[[list[Tensor]], Tensor], parts: Sequence[Tensor | None]) -> Any:
    """What a function makes of tensors, as bytes where torch lacks that for 8-bit floats; None of nothing."""
    given = [part for part in parts if part is not None]
    return function([_bytes(part) for part in given]).view(given[0].dtype) if given else None


def _bytes(part: Tensor) -> Tensor:
    return part.view(torch.uint8) if part.dtype.itemsize == 1 else part


def _check(weight: Tensor, hessian: Tensor, k_axis: int, tensor_scale: Tensor | None) -> None:
    """Refuse what does not fit together.

    Raises:
        FormatError: it does not.
    """
    if weight.dim() not in {2, 3} or not weight.is_floating_point():
        raise FormatError(f"GPTQ takes a float matrix (N, K) or experts (E, N, K), not {weight.dtype} {_shape(weight)}")
    if not -weight.dim() <= k_axis < weight.dim() or (weight.dim() == 3 and k_axis % 3 == 0):
        raise FormatError(f"k_axis={k_axis} is no axis that products of a weight {_shape(weight)} sum over")
    k = weight.shape[k_axis]
    needed = (*weight.shape[:-2], k, k)
    if tuple(hessian.shape) != needed or not hessian.is_floating_point() or hessian.device != weight.device:
        raise FormatError(
            f"the Hessian is {hessian.dtype} {_shape(hessian)} on {hessian.device}; for a weight {_shape(weight)} on "
            f"{weight.device} with k_axis={k_axis} needed is a float one of shape {needed} there"
        )
    if tensor_scale is not None and tuple(tensor_scale.shape) != (*weight.shape[:-2], 1, 1):
        raise FormatError(f"the tensor scale is {_shape(tensor_scale)}; needed is {(*weight.shape[:-2], 1, 1)}")
    for name, tensor in (("weight", weight), ("Hessian", hessian)):
        # Without a tensor of as many flags.
        if tensor.numel() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
            raise FormatError(f"the {name} holds a NaN or an infinity, which would spread to every column")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
