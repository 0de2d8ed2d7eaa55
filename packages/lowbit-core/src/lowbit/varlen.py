"""Attention of packed sequences: each as `lowbit.attention` has it, all in one call.

Tokens of B sequences follow one another in queries (tokens, H, D) and keys and values (tokens, G, D); the sequence b
has those from `cu[b]` to `cu[b + 1]`, and is rounded on its own: blocks of scales begin where it begins, and the mean
is that of its keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.attention import Scheme, attention_call, check_heads, preferred, selected
from lowbit.backends import Selection, generation
from lowbit.errors import FormatError


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scheme: str | Scheme = "INT8_FP8",
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    prefer: str | Sequence[str] = (),
) -> Tensor:
    """Attention (tokens, H, D), in q's dtype, of packed queries (tokens, H, D), keys and values (tokens, G, D).

    `cu_q` and `cu_k` (B + 1,) int32 count up from 0 to all tokens, `max_q` and `max_k` are the tokens of the longest
    sequence, or more. Values of these are not checked on a GPU, which would have to be waited for. The rest is as in
    `attention`: the queries of a sequence are the last of its tokens.

    Raises:
        FormatError: the scheme is unknown, shapes or dtypes do not fit, a window is given without causal, or, not on a
            GPU, lengths are not those of sequences.
        NoKernelError: no backend of `prefer` takes this call.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    check_packed(q, k, v, cu_q, cu_k, scheme, causal=causal, window=window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = max_q, max_k, causal, window or 0, scale, str(scheme), preferred(prefer)
    return torch.ops.lowbit.varlen_attention(q, k, v, cu_q, cu_k, *arguments)[0]


def check_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scheme: Scheme,
    *,
    causal: bool,
    window: int | None,
) -> None:
    """Refuse what is no attention of packed sequences.

    Raises:
        FormatError: see `varlen_attention`.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        msg = (
            "attention of packed sequences needs queries (tokens, H, D), and keys and values (tokens, G, D); given are "
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
        )
        raise FormatError(msg)
    one, two, three = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    check_heads(one, two, three, None, scheme, causal=causal, window=window)
    for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
        if cu.dim() != 1 or cu.dtype != torch.int32 or cu.device != q.device or cu.shape != cu_q.shape or not len(cu):
            msg = (
                f"{name} must be int32 of shape (B + 1,), as many as cu_q has, on {q.device}; it is {cu.dtype} of "
                f"shape {tuple(cu.shape)} on {cu.device}"
            )
            raise FormatError(msg)


def varlen_selection(q: Tensor, window: int, scheme: str, prefer: str) -> Selection:
    """The kernel that attention of these packed sequences runs on, and why others do not.

    Raises:
        NoKernelError: none does.
    """
    return selected("varlen_attention", attention_call(q, None, window, scheme), prefer, generation())
