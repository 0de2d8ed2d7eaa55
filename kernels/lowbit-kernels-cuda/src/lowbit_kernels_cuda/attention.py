"""Attention on a GPU: codes on Hopper's 8-bit tensor cores, torch's own attention where that is faster."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from lowbit.attention import Scheme
from lowbit.backends import Call

# Channels of a head whose codes and sums fit registers.
_CHANNELS = (64, 128)


def refuses(call: Call) -> str | None:
    """What keeps `run` from a call."""
    scheme = Scheme.parse(call.facts[0])
    if torch.cuda.get_device_capability()[0] != 9:
        return "needs a Hopper GPU (compute capability 9.0)"
    if call.x_dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16; these are {call.x_dtype}"
    if call.k not in _CHANNELS:
        return f"needs heads of 64 or 128 channels; these have {call.k}"
    for fact in call.facts[1:]:
        return f"takes no {fact}; causal is all that it hides"
    return import_module("lowbit_kernels_cuda.heads").takes(scheme)


def how(call: Call) -> str:
    """What runs for which lengths, in words."""
    del call
    return (
        f"torch's own attention, which rounds nothing, runs below {LEAST} queries and keys, where it is faster; "
        "prefer=('cuda',) rounds those, too"
    )


LEAST = 8192
"""From how many queries and keys on attention of codes is faster, rounding included: `lowbit bench attention`."""


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
) -> tuple[Tensor, Tensor]:
    """See `lowbit.attention`."""
    del mask, window
    queries, keys = q.shape[2], k.shape[2]
    with torch.cuda.device_of(q):
        # Torch's causal queries are the first tokens, not the last.
        alike = not causal or queries in (keys, 1)
        if not prefer and min(queries, keys) < LEAST and alike and q.numel() and keys:
            return _plain(q, k, v, scale, causal=causal and queries > 1)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        sums = torch.full(q.shape[:3], -torch.inf, device=q.device)
        if q.numel() and keys:
            made = import_module("lowbit_kernels_cuda.heads").rounded(q, k, v, Scheme.parse(scheme))
            import_module("lowbit_kernels_cuda.hopper_attention").attend(made, out, sums, scale, causal=causal)
        return out, sums


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention in q's dtype, by cuDNN, and the log of its sums."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention  # noqa: SLF001 - only operators give sums
    out, sums, *_ = attend(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out.contiguous(), sums.reshape(q.shape[:3])
