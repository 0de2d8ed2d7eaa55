"""Attention on a GPU: codes on Hopper's 8-bit tensor cores, torch's own attention where that is faster."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from lowbit.attending import laid_out_as
from lowbit.attention import Scheme, scheme_of
from lowbit.backends import Call
from lowbit.format import WHOLE
from lowbit_kernels_cuda import plain_attention

# Channels of a head whose codes and sums fit registers.
_CHANNELS = (64, 128)
# From how many queries and keys on attention of codes is faster, rounding included: `lowbit bench attention`.
LEAST = 8192
# Channels of a head that this is so with; with 64 it is 0.87 to 1.03 times as fast up to 32768 tokens.
MEASURED = 128


def refuses(call: Call) -> str | None:
    """What keeps `run` from a call."""
    scheme = Scheme.parse(call.facts[0])
    if torch.cuda.get_device_capability()[0] != 9:
        return "needs a Hopper GPU (compute capability 9.0)"
    if call.x_dtype not in (torch.bfloat16, torch.float16) or call.k not in _CHANNELS:
        return f"needs bfloat16 or float16, and heads of 64 or 128 channels; these are {call.x_dtype} and have {call.k}"
    if call.facts[1:]:
        return f"takes no {' and no '.join(call.facts[1:])}; causal is all that it hides"
    if scheme.v is None or scheme.rotate_v:
        return f"needs values in e4m3 that are not rotated; this is {scheme}"
    if WHOLE in (scheme.qk.block[0], scheme.v.block[0]) or not scheme.v.scale.powers_of_two:
        return f"needs scales of 128 tokens, those of values powers of two (e8m0); this is {scheme}"
    return None


def how(call: Call) -> str:
    """What runs for which lengths, in words."""
    del call
    return (
        f"torch's own attention, which rounds nothing, runs below {LEAST} queries and keys, where it is faster, "
        f"and on heads of other than {MEASURED} channels; prefer=('cuda',) rounds those, too"
    )


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
    del mask, window
    queries, keys = q.shape[2], k.shape[2]
    with torch.cuda.device_of(q):
        if not prefer and (min(queries, keys) < LEAST or q.shape[3] != MEASURED) and q.numel() and keys:
            return plain(q, k, v, scale, cos, sin, causal=causal)
        out, sums = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
        if not (q.numel() and keys):
            return out.zero_(), sums.fill_(-torch.inf)
        made = import_module("lowbit_kernels_cuda.heads").rounded(q, k, v, scheme_of(scheme), cos, sin)
        # Heads lie beside one another in a token, or tokens in a head.
        simple = out.is_contiguous() or out.transpose(1, 2).is_contiguous()
        to = out if simple else out.contiguous()
        import_module("lowbit_kernels_cuda.hopper_attention").attend(made, to, sums, scale, causal=causal)
        return out if simple else out.copy_(to), sums


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    causal: bool,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention in q's dtype, by cuDNN where it sees the same, and the log of its sums."""
    queries, keys, given = q.shape[2], k.shape[2], q
    q, k = plain_attention.turned(q, k, cos, sin)
    # CuDNN's causal queries are the first tokens, not the last.
    alike, first = not window and (not causal or queries in (keys, 1)), causal and queries > 1
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, first, q.shape[1] != k.shape[1])
    if not alike or not torch.backends.cuda.can_use_cudnn_attention(params):
        out, sums = plain_attention.attend(q, k, v, None, scale, causal=causal, window=window)
        return laid_out_as(out, given), sums
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention  # noqa: SLF001 - only operators give sums
    out, sums, *_ = attend(q, k, v, None, True, 0.0, first, False, scale=scale)
    return laid_out_as(out, given), sums.reshape(q.shape[:3])
