"""Calls of attention, and what they must give: what `check_backend` holds backends to beside the cases of `cases`.

Rounded operands are those of the specification, and so are their products, in float64. A kernel may sum in float32 in
any order, and products of 8-bit floats in tensor cores for these, so that scores are off by some `e`: a weight may then
be any that `exp(s - e)` to `exp(s + e)` is rounded to. Weights far below a row's largest may be rounded in steps of one
of 2^8 of it, in the unit of the largest scale of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.attending import ONE, Seen, roped, rounded, unrotated, values_of
from lowbit.attention import SCHEMES, Scheme, attention_call
from lowbit.backends import Call
from lowbit.cases import Case, Cases, Wanted, rounded_to, tensor_core_error
from lowbit.element import E4M3FN
from lowbit.format import WHOLE
from lowbit.grid import sample

_UNIT, _D = 2.0**-24, 64
# Sequences, heads of queries and of keys, queries, keys.
_SIZES = ((2, 4, 2, 5, 200), (1, 2, 2, 130, 130), (1, 3, 1, 1, 1), (1, 2, 1, 4, 3), (1, 1, 1, 0, 5), (1, 1, 1, 3, 0))
# Queries and keys of sequences that are packed.
_LENGTHS = (((5, 1, 0, 130, 3), (140, 1, 3, 130, 0)), ((0, 0), (0, 0)))
# In the place of the log of no sum.
_NONE = -1e4


def attentions(dtypes: Sequence[torch.dtype], device: str) -> Iterator[tuple[Call, Cases]]:
    """Calls of named schemes and one that rotates values, with a mask, a window or neither; each with its cases."""
    for dtype in dtypes:
        for scheme in (*SCHEMES.values(), replace(SCHEMES["INT8_FP8_ROTATED"], rotate_v=True)):
            for masked, window in ((False, 0), (True, 0), (False, 7)):
                q = torch.empty(1, 1, 1, _D, dtype=dtype)
                here = Call.of("attention", *attention_call(q, q if masked else None, window, str(scheme)))
                call = replace(here, device=device)
                yield call, partial(_cases, scheme, dtype, masked=masked, window=window)
                if not masked:
                    yield replace(call, op="varlen_attention"), partial(_packed, scheme, dtype, window=window)


def _cases(scheme: Scheme, dtype: torch.dtype, *, masked: bool, window: int) -> Iterator[Case]:
    for batch, heads, groups, queries, keys in _SIZES:
        shapes = ((batch, queries, heads, _D), *2 * [(batch, keys, groups, _D)])
        # Heads of a token lie side by side, as the layer before leaves them.
        q, k, v = (sample(shape, seed=i, dtype=dtype).transpose(1, 2) for i, shape in enumerate(shapes))
        mask = sample((batch, 1, queries, keys), seed=3, dtype=torch.float32) > 0 if masked else None
        turns = torch.arange(keys * _D // 2).view(keys, _D // 2) * 0.1
        tables = [(None, None), (turns.cos(), turns.sin())][: 1 + (queries <= keys)]
        for causal, (cos, sin) in product((True,) if window else (False, True), tables):
            told = f"q {tuple(q.shape)}, k {tuple(k.shape)}, {causal=}" + ", rotary embeddings" * (cos is not None)
            # A backend is named, so that codes are multiplied however few there are.
            arguments = (q, k, v, mask, causal, window, _D**-0.5, str(scheme), "checked", cos, sin)
            turned = roped(q, cos, sin), roped(k, cos, sin), v
            yield Case(told, arguments, _wanted(*turned, Seen(mask, causal, window), scheme), read=_told)


def _packed(scheme: Scheme, dtype: torch.dtype, *, window: int) -> Iterator[Case]:
    heads, groups = 4, 2
    for lengths in _LENGTHS:
        tokens = list(map(sum, lengths))
        shapes = ((tokens[0], heads, _D), *2 * [(tokens[1], groups, _D)])
        q, k, v = (sample(shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
        ends = [torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in lengths]
        for causal in (True,) if window else (False, True):
            wanted: list[list[Tensor]] = [[], [], [], []]
            of_each = [x.split(each) for x, each in zip((q, k, v), (*lengths, lengths[1]), strict=True)]
            for each in zip(*of_each, strict=True):
                one, two, three = (x.transpose(0, 1).unsqueeze(0) for x in each)
                for i, told in enumerate(_wanted(one, two, three, Seen(None, causal, window), scheme)):
                    assert told.bound is not None
                    wanted[2 * i].append(told.value[0].transpose(0, 1))
                    wanted[2 * i + 1].append(told.bound[0].transpose(0, 1))
            value, bound, total, near = (torch.cat(each) for each in wanted)
            arguments = (q, k, v, *ends, *map(max, lengths), causal, window, _D**-0.5, str(scheme), "checked")
            expected = Wanted(value, dtype, bound), Wanted(total.T, torch.float32, near.T)
            yield Case(f"lengths {lengths}, {causal=}", arguments, expected, read=_told)


def _told(found: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The result, and sums of which none is infinite, so that they can be compared."""
    out, sums = found
    return out, sums.masked_fill(sums == -math.inf, _NONE)


def _wanted(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scheme: Scheme) -> tuple[Wanted, Wanted]:
    """The result and the log of its sums, each with what a kernel may be off by."""
    q_parts, k_parts, v_parts = rounded(q, k, v, scheme)
    queries, keys = (values_of(part, scheme.qk, _D, torch.float32) for part in (q_parts, k_parts))
    values = values_of(v_parts, scheme.v, _D, torch.float32)
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
    scores, error = _scores(queries, keys, as_bytes=scheme.qk.element.kind == "float")
    scores = seen.apply(scores.unsqueeze(2), 0, q.shape[2]).squeeze(2)
    # Of no keys there is no largest.
    most = pad(scores, (0, 1), value=_NONE).amax(-1, keepdim=True)
    most = (most / math.log(2)).ceil() * math.log(2)
    exact = (scores - most).exp() * ONE
    total = exact.sum(-1, keepdim=True).clamp_min(ONE * _UNIT)
    # With one scale a head, kernels of other libraries may round under any largest score, to half a step of e4m3.
    free = 2.0**-4 if scheme.v is not None and WHOLE == scheme.qk.block[0] == scheme.v.block[0] else 0.0
    low, weights, high = (
        _weights(exact * torch.exp(sign * error), scheme, q.dtype) * (1 + sign * free) for sign in (-1, 0, 1)
    )
    size = values.double().abs()
    lost = (high - low) @ size + (k.shape[2] + _D) * _UNIT * (high @ size)
    if scheme.v is not None:
        # The least step of e4m3, of ONE, for each key that is seen.
        largest = pad(size, (0, 0, 0, 1)).amax((2, 3), keepdim=True)
        lost = lost + E4M3FN.smallest * (exact > 0).sum(-1, keepdim=True) * largest
        lost = lost + _tensor_core_errors(weights, values.mT)
    off = pad(error, (0, 1)).amax(-1, keepdim=True)
    value, bound = weights @ values.double() / total, lost / total
    bound = bound + 2 * off * value.abs()
    if scheme.rotate_v:
        value, bound = unrotated(value), bound.norm(dim=-1, keepdim=True).expand_as(bound)
    sums = ((total / ONE).log() + most).masked_fill(exact.sum(-1, keepdim=True) == 0, _NONE)
    near = off + (k.shape[2] + 64) * _UNIT * (1 + sums.abs())
    value, bound = rounded_to(value, bound, None, q.dtype)
    return Wanted(value, q.dtype, bound), Wanted(sums.squeeze(-1), torch.float32, near.squeeze(-1))


def _scores(q: Tensor, k: Tensor, *, as_bytes: bool) -> tuple[Tensor, Tensor]:
    """Float64 scores (B, H, S, T), and what a kernel may be off by."""
    left, right, scale = q.double(), k.double(), _D**-0.5
    scores, size = left @ right.mT * scale, left.abs() @ right.abs().mT * scale
    error = (_D + 64) * _UNIT * (size + 1)
    if not as_bytes:
        # Sums of integers are held as floats, and known to two units of their products.
        units = [x.abs().flatten(1).amax(-1) / 127 if x.numel() else x.new_zeros(len(x)) for x in (left, right)]
        return scores, error + 2 * scale * (units[0] * units[1])[:, None, None, None]
    return scores, error + scale * _tensor_core_errors(q, k)


def _tensor_core_errors(a: Tensor, b: Tensor) -> Tensor:
    """What products of 8-bit floats `a b^T` of all heads may lose."""
    if not a.numel() or not b.numel():
        return a.new_zeros(*a.shape[:-1], b.shape[-2])
    each = map(tensor_core_error, a.flatten(0, 1), b.flatten(0, 1))
    return torch.stack(list(each)).view(*a.shape[:-1], b.shape[-2])


def _weights(weights: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Float64 of weights as a scheme rounds them."""
    near = weights.to(torch.float32)
    return (near.to(dtype) if scheme.v is None else E4M3FN.decode(E4M3FN.encode(near))).double()
