"""Attention on any GPU: what the kernel of codes takes, and when torch's own runs instead. It needs no Triton."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lowbit.attending import laid_out_as
from lowbit.attention import Scheme
from lowbit.backends import Call
from lowbit_kernels_cuda import plain_attention

_CHANNELS = 256
_DTYPES = (torch.float16, torch.bfloat16)
_LEAST: dict[int, int] = {}
"""Queries and keys from which on codes were measured to be faster than torch, by major compute capability."""


def refuses(call: Call) -> str | None:
    """What keeps `run` from a call."""
    if call.x_dtype not in (*_DTYPES, torch.float32) or not 0 < (call.k or 0) <= _CHANNELS:
        return (
            f"needs float16, bfloat16 or float32, and heads of 1 to {_CHANNELS} channels; these are {call.x_dtype} and "
            f"have {call.k}"
        )
    if call.x_dtype == torch.float32 and Scheme.parse(call.facts[0]).v is None:
        return f"needs float16 or bfloat16 where values stay as they are; these are {call.x_dtype}"
    return None


def how(call: Call) -> str:
    """What runs for which lengths, in words."""
    plain, forced = "torch's own attention, which rounds nothing, runs", "prefer=('cuda',) rounds"
    if call.op == "varlen_attention" and call.x_dtype == torch.float32:
        return "codes run, as torch has no attention of packed sequences in float32"
    least = _least()
    if least is None:
        return f"{plain}: codes were not measured to be faster on such a GPU; {forced}"
    return f"{plain} below {least} queries and keys, where it is faster; {forced} those, too"


def _least() -> int | None:
    return _LEAST.get(torch.cuda.get_device_capability()[0])


def _codes(prefer: str, queries: int, keys: int) -> bool:
    """Whether codes are multiplied."""
    return bool(prefer) or ((least := _least()) is not None and min(queries, keys) >= least)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,  # noqa: FBT001 - an operator's arguments
    window: int,
    scale: float,
    scheme: str,
    prefer: str,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `lowbit.attention`."""
    (batch, _, queries, _), keys = q.shape, k.shape[2]
    with torch.cuda.device_of(q):
        if not (q.numel() and keys):
            return _nothing(q, q.shape[:3])
        given = plain_attention.turned(q, k, cos, sin)
        if _codes(prefer, queries, keys):
            kernel = _kernel()
            of_q, of_k = kernel.Sequences(batch, queries), kernel.Sequences(batch, keys)
            seen = kernel.Seen(mask, causal, window)
            out, sums = kernel.attend(*given, v, of_q, of_k, seen, scale, Scheme.parse(scheme))
        else:
            out, sums = plain_attention.attend(*given, v, mask, scale, causal=causal, window=window)
        return laid_out_as(out, q), sums


def run_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,  # noqa: FBT001 - an operator's arguments
    window: int,
    scale: float,
    scheme: str,
    prefer: str,
) -> tuple[Tensor, Tensor]:
    """See `lowbit.varlen_attention`."""
    with torch.cuda.device_of(q):
        if not (q.numel() and len(k)):
            return _nothing(q, (q.shape[1], len(q)))
        if q.dtype != torch.float32 and not _codes(prefer, max_q, max_k):
            return plain_attention.attend_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal=causal, window=window)
        kernel, count = _kernel(), len(cu_q) - 1
        of_q, of_k = kernel.Sequences(count, len(q), cu_q), kernel.Sequences(count, len(k), cu_k)
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out, sums = kernel.attend(*heads, of_q, of_k, kernel.Seen(None, causal, window), scale, Scheme.parse(scheme))
        return out[0].transpose(0, 1).contiguous(), sums[0]


def _nothing(q: Tensor, sums: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What queries get that see nothing."""
    return torch.zeros_like(q), torch.full(sums, -torch.inf, device=q.device)


def _kernel() -> Any:
    return import_module("lowbit_kernels_cuda.general_attention")
