"""Torch's own attention, which rounds nothing: what runs where codes are not faster. It needs no Triton."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from lowbit.attending import roped

# Channels from which on one launch turns queries and keys; it holds halves of them, of powers of two.
_LEAST = 16
# Only operators give sums.
_ops: Any = torch.ops.aten


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Attention like q, in any strides, and the log of its sums; see `lowbit.attention`. There are queries and keys."""
    (*_, queries, d), keys = q.shape, k.shape[2]
    # Kernels take channels in eights.
    q, k, v = _padded(q), _padded(k), _padded(v)
    # Torch's causal queries are the first tokens, not the last.
    alike = not window and (not causal or queries in (keys, 1))
    if mask is None and alike:
        out, sums = _fused(q, k, v, None, scale, causal=causal and queries > 1)
    elif mask is None and q.dtype != torch.float32:
        given = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, sums = _flash(*given, None, None, queries, keys, scale, causal=causal, window=window)
        out = out.transpose(1, 2)
    else:
        bias = _bias(q, keys, mask, causal=causal, window=window)
        out, sums = _fused(q, k, v, bias.expand(*q.shape[:3], keys), scale, causal=False)
        nothing = (bias == -torch.inf).all(-1)
        out, sums = out.masked_fill(nothing.unsqueeze(-1), 0.0), sums.masked_fill(nothing, -torch.inf)
    return out[..., :d], sums


def attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    *,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """As `attend`, of packed sequences in 16 bits; see `lowbit.varlen_attention`."""
    d = q.shape[2]
    given = _padded(q), _padded(k), _padded(v)
    out, sums = _flash(*given, cu_q, cu_k, max_q, max_k, scale, causal=causal, window=window)
    return out[..., :d].contiguous(), sums


def turned(q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and keys with rotary embeddings, where there are tables: see `lowbit.attention`."""
    if cos is None or sin is None:
        return q, k
    d = q.shape[-1]
    if q.dtype == torch.float32 or d & (d - 1) or d < _LEAST or not q.numel():
        return roped(q, cos, sin), roped(k, cos, sin)
    return import_module("lowbit_kernels_cuda.heads").roped(q, k, cos, sin)


def _padded(x: Tensor) -> Tensor:
    # Channels lie side by side.
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(q: Tensor, keys: int, mask: Tensor | None, *, causal: bool, window: int) -> Tensor:
    """What is added to scores, (.., S, T), broadcasting: -inf where nothing is seen."""
    queries, hidden = q.shape[2], None
    if causal:
        last = torch.arange(keys - queries, keys, device=q.device)[:, None]
        key = torch.arange(keys, device=q.device)
        hidden = key > last
        if window:
            hidden |= key <= last - window
    if mask is not None:
        mask = mask.expand(*(1,) * (4 - mask.dim()), *mask.shape)
        # Kernels read rows that begin at multiples of 16.
        steps = (keys, mask.storage_offset(), *mask.stride()[:3])
        even = mask.stride(3) == 1 and not any(step % 16 for step in steps)
        if hidden is None and mask.is_floating_point() and even:
            return mask
    size = (1, 1, queries, keys) if mask is None else (*mask.shape[:2], queries, keys)
    bias = q.new_zeros(*size[:3], keys + -keys % 16)[..., :keys]
    if mask is not None:
        bias = bias.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else bias.copy_(mask)
    return bias if hidden is None else bias.masked_fill_(hidden, -torch.inf)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The kernel that torch chooses."""
    shared = q.shape[1] != k.shape[1]
    choice = _ops._fused_sdp_choice(q, k, v, bias, 0.0, causal, scale=scale, enable_gqa=shared)  # noqa: SLF001 - no public name
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        out, sums, *_ = _ops._scaled_dot_product_cudnn_attention(  # noqa: SLF001 - only operators give sums
            q, k, v, bias, True, 0.0, causal, False, scale=scale
        )
    elif choice == SDPBackend.FLASH_ATTENTION.value:
        out, sums, *_ = _ops._scaled_dot_product_flash_attention(  # noqa: SLF001 - only operators give sums
            q, k, v, 0.0, causal, False, scale=scale
        )
    else:
        if shared:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        out, sums, *_ = _ops._scaled_dot_product_efficient_attention(  # noqa: SLF001 - only operators give sums
            q, k, v, bias, True, 0.0, causal, scale=scale
        )
    return out, sums.flatten(2)[:, :, : q.shape[2]].contiguous()


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    *,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """FlashAttention, whose causal queries are the last tokens, of (B, S, H, D) or packed (tokens, H, D)."""
    windows = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    out, sums, *_ = _ops._flash_attention_forward(  # noqa: SLF001 - only operators give sums
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale, **windows
    )
    # Of a query that sees nothing, sums are infinite.
    return out, sums.masked_fill(sums == torch.inf, -torch.inf)
