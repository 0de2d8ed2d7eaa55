"""Attention on FlashAttention-3's 8-bit kernels, where its package is installed: heads with one scale each."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from lowbit.attending import laid_out_as
from lowbit.attention import Scheme, scheme_of
from lowbit.backends import Call
from lowbit.format import WHOLE
from lowbit_kernels_cuda.attention import LEAST, MEASURED, plain

_PACKAGE = "flash_attn_interface"
_CHANNELS = (64, 128, 256)


def refuses(call: Call) -> str | None:
    """What keeps `run` from a call."""
    scheme = Scheme.parse(call.facts[0])
    if (missing := _missing()) is not None:
        return missing
    if torch.cuda.get_device_capability()[0] != 9:
        return "needs a Hopper GPU (compute capability 9.0)"
    if call.x_dtype != torch.bfloat16 or call.k not in _CHANNELS:
        return f"needs bfloat16, and heads of 64, 128 or 256 channels; these are {call.x_dtype} and have {call.k}"
    if "mask" in call.facts:
        return "takes no mask; causal and a window are all that it hides"
    whole = scheme.v is not None and scheme.qk.block[0] == scheme.v.block[0] == WHOLE
    if not whole or scheme.qk.element.kind != "float" or scheme.rotate_v:
        return f"needs e4m3 with one scale a head, and values that are not rotated; this is {scheme}"
    return None


def how(call: Call) -> str:
    """What runs for which lengths, in words."""
    del call
    return (
        f"torch's own attention, which rounds nothing, runs below {LEAST} queries and keys, where it is faster, and on "
        f"heads of other than {MEASURED} channels and with windows, where codes were not measured; prefer=('cuda',) "
        "rounds those, too"
    )


@cache
def _missing() -> str | None:
    if find_spec(_PACKAGE) is None:
        return f"needs FlashAttention-3, whose module {_PACKAGE} is not installed"
    try:
        import_module(_PACKAGE)
    except (ImportError, OSError) as error:
        return f"needs FlashAttention-3, whose module {_PACKAGE} cannot be imported: {error}"
    return None


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
    del mask
    queries, keys = q.shape[2], k.shape[2]
    if not (q.numel() and keys):
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    with torch.cuda.device_of(q):
        # One that all keys are in is none.
        window = window if window < keys else 0
        if not prefer and (min(queries, keys) < LEAST or window or q.shape[3] != MEASURED):
            return plain(q, k, v, scale, cos, sin, causal=causal, window=window)
        heads, attend = import_module("lowbit_kernels_cuda.heads"), import_module(_PACKAGE).flash_attn_func
        codes, scales = zip(*heads.rounded_whole(q, k, v, scheme_of(scheme), cos, sin), strict=True)
        names = ("q_descale", "k_descale", "v_descale")
        out, sums = attend(
            *codes,
            softmax_scale=scale,
            causal=causal,
            window_size=(window - 1, 0) if window else (-1, -1),
            return_attn_probs=True,
            **dict(zip(names, scales, strict=True)),
        )
    if causal and queries > keys:
        # Of queries that see nothing.
        sums = sums.masked_fill(sums == torch.inf, -torch.inf)
    return laid_out_as(out.transpose(1, 2), q), sums
