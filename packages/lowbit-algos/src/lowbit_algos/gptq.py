"""GPTQ for every format: columns are rounded one after the other, and those to come make up for each one's error.

A group's scale is chosen when its turn comes, from the weights as they are by then, and stays. Groups with larger
inputs go first, and so do the columns of a group; the result is stored in the original order.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", in the form
that `lowbit_algos.columns` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from lowbit import Format, FormatError, QuantizedTensor, Scales, choose_scale
from lowbit.numerics import DEFAULT_MODE, ScaleMode, choose_scales, encode
from lowbit_algos.columns import kernel_for_columns, round_columns, rows_a_scale
from lowbit_algos.factor import Factors, factors

# Of a group's values, those that the candidates of a search fit; beyond, all saturates.
_SHARES = tuple(1 - i / 32 for i in range(-1, 15))
# For scales that are powers of two.
_POWERS = (1.0, 0.5, 2.0)
_BLOCK = 128
# Values of a weight that are worked on at a time: on a GPU enough to keep it busy.
_ELEMENTS, _ELEMENTS_ON_GPU = 1 << 23, 1 << 26


@dataclass(frozen=True, slots=True)
class Solution:
    """A weight that GPTQ quantized, and how that went."""

    weight: QuantizedTensor
    # Of the mean of each Hessian's diagonal, added to it: more than asked for where that was too little.
    damping: tuple[float, ...]


DAMPING = 0.01
"""What is added to the diagonal of a Hessian, as a share of its mean, where nothing else is asked for."""


def working(n: int, k: int, *, cuda: bool) -> int:
    """Bytes at most that a matrix (N, K) is worked on in, besides it, its Hessian, and that one's factors."""
    rows = min(n, _rows_at_a_time(k, cuda=cuda))
    # In float32: what is rounded, its order, targets, errors, and codes in the making. On a GPU, a block of columns is
    # there for every candidate, as it is by then, what it errs by, and the next of both.
    return 4 * rows * (6 * k + (3 * len(_SHARES) * _BLOCK if cuda else 0))


def _rows_at_a_time(k: int, *, cuda: bool) -> int:
    return max((_ELEMENTS_ON_GPU if cuda else _ELEMENTS) // k, 1)


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
    wholes = [None] * len(matrices) if tensor_scale is None else list(tensor_scale[None] if one else tensor_scale)
    solved = [solver.solve(*given) for given in zip(matrices, hessians, wholes, strict=True)]
    data, scales, dampings = zip(*solved, strict=True)
    if one:
        joined, codes = scales[0], data[0]
    else:
        joined, codes = _map(torch.stack, scales), _joined(torch.stack, data)
    q = QuantizedTensor.from_parts(codes, joined, parsed, k=canonical.shape[-1], dtype=weight.dtype, axis=k_axis)
    return Solution(q, dampings)


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

    def solve(self, weight: Tensor, hessian: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Scales, float]:
        """Codes and scales of one matrix (N, K), and the damping it took."""
        (n, k), (together, group) = weight.shape, self.fmt.block_of(tuple(weight.shape))
        block = self._block(group) if group < k else self.block or _BLOCK
        found = factors(hessian, self._order(hessian.diagonal(), group), self.damping)
        if tensor_scale is None and self.fmt.tensor_scale:
            tensor_scale = self._choose(weight, None).tensor_scale
        # Rows are independent, so that only some of them need to be in float32 at a time.
        rows = -(-_rows_at_a_time(k, cuda=weight.is_cuda) // together) * together
        parts = [self._rows(part.to(torch.float32), found, block, tensor_scale) for part in weight.split(min(rows, n))]
        data, scales = zip(*parts, strict=True)
        return _joined(torch.cat, data), replace(_map(torch.cat, scales), tensor_scale=tensor_scale), found.damping

    def _rows(self, w: Tensor, found: Factors, block: int, tensor_scale: Tensor | None) -> tuple[Tensor, Scales]:
        """Codes and scales of float32 rows (N, K)."""
        order, d, group = found.order, found.d, self.fmt.block_of(tuple(w.shape))[1]
        grouped = group < w.shape[1]
        scales = self._room(w, tensor_scale) if grouped else self._choose(w, tensor_scale)
        # On a GPU column by column in memory, so that rows lie side by side.
        w = w.mT.index_select(0, order).mT if w.is_cuda else w[:, order]
        if not grouped:
            scales = self._search_rows(w, found, scales, block)
        targets, errors = torch.empty_like(w), torch.empty_like(w)
        for spans in _blocks(order, group, block):
            start, end = spans[0].first, spans[-1].end
            whole = slice(start, end)
            inside = found.m(whole, whole)
            # Transposed, so that it lies in memory as `w` does on a GPU.
            x = torch.addmm(w.mT[whole], found.m(slice(0, start), whole).mT, errors.mT[:start]).mT
            for a, b, at in spans:
                one, here, after = slice(a, b), slice(a - start, b - start), slice(b - start, None)
                given = w[:, one], x[:, here], inside[here, here], d[one]
                if grouped:
                    self._group(
                        *given, _each(lambda part, at=at: part[:, at : at + 1], scales), targets[:, one], errors[:, one]
                    )
                else:
                    rounded = round_columns(*given, _each(_alone, scales), self.fmt)
                    targets[:, one], errors[:, one] = rounded.targets, rounded.errors
                if b < end:
                    x[:, after].addmm_(errors[:, one], inside[here, after])
        return encode(targets[:, order.argsort()], self.fmt, scales), scales

    def _room(self, w: Tensor, tensor_scale: Tensor | None) -> Scales:
        """Scales that are yet to be chosen."""
        shape, zero = self.fmt.scale_shape(tuple(w.shape)), self.fmt.zero
        zeros = None if zero is None else w.new_empty(shape, dtype=zero.code_dtype)
        return Scales(w.new_empty(shape, dtype=self.fmt.scale.code_dtype), zeros, tensor_scale)

    def _order(self, diagonal: Tensor, group: int) -> Tensor:
        """Columns in the order they are rounded; those of a group stay together."""
        k = len(diagonal)
        if not self.act_order:
            return torch.arange(k, device=diagonal.device)
        means = torch.stack([part.mean() for part in diagonal.split(group)])
        groups = means.argsort(descending=True, stable=True).tolist()
        starts = [g * group for g in groups]
        inside = [diagonal[a : a + group].argsort(descending=True, stable=True) + a for a in starts]
        return torch.cat(inside)

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

    def _group(
        self, w: Tensor, x: Tensor, m: Tensor, d: Tensor, scales: Scales, targets: Tensor, errors: Tensor
    ) -> None:
        """Write a group's scales, chosen from what its weights are by now, and its columns rounded under them."""
        # How far they would go if none of them were rounded: `x_j - w_j` solved for their own part in it.
        free = torch.linalg.solve_triangular(m, x - w, upper=True, left=False, unitriangular=True)
        kernel = (
            None if w.device.type == "cpu" else kernel_for_columns("round_group", self.fmt, w.device.type, w.shape[1])
        )
        if kernel is not None:
            shares = _on(w.device, self._shares)
            kernel.run(w, x, m, d, free, shares, scales.tensor_scale, self.fmt, self.mode, scales, targets, errors)
            return
        candidates = self._candidates(w + free, scales.tensor_scale)
        rounded = round_columns(w, x, m, d, candidates, self.fmt)
        chosen = self._best(candidates, rounded.losses)
        # Rows that share a scale agree on one, which need not be the best of each.
        if len(rounded.losses) > 1 and self.fmt.block[0] != 1:
            rounded = round_columns(w, x, m, d, _each(_alone, chosen), self.fmt)
        scales.scale.copy_(chosen.scale)
        if scales.zero is not None and chosen.zero is not None:
            scales.zero.copy_(chosen.zero)
        targets.copy_(rounded.targets)
        errors.copy_(rounded.errors)

    def _search_rows(self, w: Tensor, found: Factors, scales: Scales, block: int) -> Scales:
        """Scales that hold for whole rows: those of least loss when blocks of columns are rounded each on its own."""
        if not self.scale_search:
            return scales
        candidates = self._candidates(w, scales.tensor_scale)
        losses: list[Tensor] = []
        for a in range(0, w.shape[1], block):
            part = slice(a, a + block)
            given = w[:, part], w[:, part], found.m(part, part), found.d[part]
            losses.append(round_columns(*given, candidates, self.fmt).losses)
        return self._best(candidates, torch.stack(losses).sum(0))

    def _best(self, candidates: Scales, losses: Tensor) -> Scales:
        """Of the candidates, for each block of rows, the one of least loss (C, N)."""
        rows = rows_a_scale(self.fmt, losses.shape[1])
        if rows > 1:
            losses = torch.nn.functional.pad(losses, (0, -losses.shape[1] % rows)).unflatten(1, (-1, rows)).sum(-1)
        best = losses.argmin(0)[None, :, None]

        def pick(part: Tensor) -> Tensor:
            return _bytes(part).gather(0, best)[0].view(part.dtype)

        return _each(pick, candidates)


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


def _blocks(order: Tensor, group: int, block: int) -> list[list[_Span]]:
    """Columns, in the order they are rounded, as blocks of groups. A row is cut anywhere."""
    k = len(order)
    if group < k:
        numbers, sizes = (part.tolist() for part in torch.unique_consecutive(order // group, return_counts=True))
    else:
        sizes = [min(block, k - a) for a in range(0, k, block)]
        numbers = [0] * len(sizes)
    blocks: list[list[_Span]] = [[]]
    first = 0
    for number, size in zip(numbers, sizes, strict=True):
        if blocks[-1] and first + size - blocks[-1][0].first > block:
            blocks.append([])
        blocks[-1].append(_Span(first, first + size, number))
        first += size
    return blocks


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
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"the {name} holds a NaN or an infinity, which would spread to every column")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
