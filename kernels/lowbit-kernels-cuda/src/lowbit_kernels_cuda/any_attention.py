"""Attention on any GPU: what the kernel of codes takes, and when torch's own runs instead. It needs no Triton."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lowbit.attending import Seen, laid_out_as
from lowbit.attention import Scheme, scheme_of
from lowbit.backends import Call
from lowbit_kernels_cuda import plain_attention

_CHANNELS = 256
_DTYPES = (torch.float16, torch.bfloat16)
_MEASURED = (64, 128)
_WINDOWS: dict[int, tuple[int, int]] = {9: (32768, 2048)}
"""Tokens, and a window of them, from which on codes are faster than torch, by major compute capability.

Measured with `_MEASURED` channels and rounded values, nothing rotated: rounding included, 1.26 to 1.65 times as fast.
What is not here was not measured to be faster.
"""


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
    if call.op == "varlen_attention" and call.x_dtype == torch.float32:
        return "codes run, as torch has no attention of packed sequences in float32"
    least = _windows(Scheme.parse(call.facts[0]), call.k) if call.facts[1:] == ("window",) else None
    if call.op == "varlen_attention" or least is None:
        runs = "runs, as codes were not measured to be faster"
    else:
        runs = f"runs below {least[0]} tokens or with a window below {least[1]}, where it is faster"
    return f"torch's own attention, which rounds nothing, {runs}; prefer=('cuda',) rounds"


def _windows(scheme: Scheme, channels: int | None) -> tuple[int, int] | None:
    """From how many tokens and what window on codes are faster."""
    if scheme.v is None or scheme.rotate_qk or scheme.rotate_v or channels not in _MEASURED:
        return None
    return _WINDOWS.get(torch.cuda.get_device_capability()[0])


def _faster(scheme: Scheme, channels: int, tokens: int, window: int) -> bool:
    """Whether codes are, for all queries and keys of so many tokens or more."""
    least = _windows(scheme, channels) if window else None
    return least is not None and tokens >= least[0] and window >= least[1]


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
    (batch, _, queries, d), keys, parsed = q.shape, k.shape[2], scheme_of(scheme)
    # One that all keys are in is none.
    window = window if window < keys else 0
    with torch.cuda.device_of(q):
        if not (q.numel() and keys):
            return torch.zeros_like(q), _nothing(q, q.shape[:3])
        given = plain_attention.turned(q, k, cos, sin)
        if prefer or (mask is None and _faster(parsed, d, min(queries, keys), window)):
            kernel = _kernel()
            of_q, of_k = kernel.Sequences(batch, queries), kernel.Sequences(batch, keys)
            out, sums = kernel.attend(*given, v, of_q, of_k, Seen(mask, causal, window), scale, parsed)
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
            out = torch.zeros_like(q, memory_format=torch.contiguous_format)
            return out, _nothing(q, (q.shape[1], len(q)))
        if not prefer and q.dtype != torch.float32:
            return plain_attention.attend_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal=causal, window=window)
        kernel, count = _kernel(), len(cu_q) - 1
        of_q, of_k = kernel.Sequences(count, len(q), cu_q), kernel.Sequences(count, len(k), cu_k)
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out, sums = kernel.attend(*heads, of_q, of_k, Seen(None, causal, window), scale, scheme_of(scheme))
        return out[0].transpose(0, 1).contiguous(), sums[0]


def _nothing(q: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Logs of sums of queries that see nothing."""
    return torch.full(shape, -torch.inf, device=q.device)


def _kernel() -> Any:
    return import_module("lowbit_kernels_cuda.general_attention")
