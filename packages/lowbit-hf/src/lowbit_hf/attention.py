"""Attention in 8 bits for transformers: functions of its `AttentionInterface`, and the masks that go with them.

A model made or set with `attn_implementation="lowbit"` calls `lowbit.attention`. Where queries are the last of the keys
and nothing else is hidden there is no mask: what is causal, and a window, are arguments. Any other pattern is a mask of
bools.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_tracing

from lowbit.attention import SCHEMES, Scheme, attention
from lowbit.errors import UnsupportedOpError

NAME: Final = "lowbit"
"""What `attn_implementation` is for the scheme INT8_FP8; others follow a colon, as in `lowbit:FP8`."""

# What some models hand to attention that no scheme has.
_REFUSED: Final = {
    "softcap": "caps scores",
    "s_aux": "has attention sinks",
    "sinks": "has attention sinks",
    "position_bias": "adds a bias to scores",
    "cache": "has a paged cache",
    "indices": "attends to chosen keys",
    "block_indices": "attends to chosen keys",
}


def register_attention(name: str, scheme: str | Scheme = "INT8_FP8", *, prefer: str | Sequence[str] = ()) -> None:
    """Make `attn_implementation=name` mean `lowbit.attention` by this scheme, with its `prefer`.

    Raises:
        FormatError: the scheme is unknown.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    AttentionInterface.register(name, partial(_attend, scheme=scheme, prefer=prefer))
    AttentionMaskInterface.register(name, _mask)


def round_attention(model: PreTrainedModel, scheme: str | Scheme) -> None:
    """Attention of a model by this scheme on the reference, which rounds all lengths: to measure what that costs.

    Raises:
        FormatError: the scheme is unknown.
        UnsupportedOpError: the model's attention does not go through the interface.
    """
    _require_interface(type(model))
    name = f"{NAME}:{scheme} rounded"
    register_attention(name, scheme, prefer=("reference",))
    model.set_attn_implementation(name)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,  # noqa: FBT001 - as transformers calls it
    *,
    scheme: Scheme,
    prefer: str | Sequence[str],
    **told: Any,
) -> tuple[Tensor, None]:
    """Attention (B, S, H, D) of queries (B, H, S, D), keys and values (B, G, T, D), and None for its weights."""
    _refuse(module, dropout, told)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A mask has all that is hidden; without one, queries are the last of the keys.
    causal = bool(causal) and attention_mask is None
    window = None if attention_mask is not None else _window(module, key.shape[2], told, causal=causal)
    width = value.shape[3]
    if width < key.shape[3]:
        value = pad(value, (0, key.shape[3] - width))
    out = attention(
        *(query, key, value),
        scheme=scheme,
        mask=attention_mask,
        causal=causal,
        window=window,
        scale=scaling,
        prefer=prefer,
    )
    return out[..., :width].transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, dropout: float, told: dict[str, Any]) -> None:
    """Refuse what would change the result and cannot be done.

    Raises:
        UnsupportedOpError: there is something.
    """
    kind = type(module).__name__
    for name, what in _REFUSED.items():
        if told.get(name) is not None:
            msg = f"{kind} {what} ({name}), which 8-bit attention does not; use attn_implementation='eager'"
            raise UnsupportedOpError(msg)
    if dropout:
        msg = f"{kind} drops {dropout:g} of its weights, 8-bit attention none; set attention_dropout to 0, or use sdpa"
        raise UnsupportedOpError(msg)
    if told.get("output_attentions"):
        msg = "8-bit attention keeps no weights to put out (output_attentions); use attn_implementation='eager'"
        raise UnsupportedOpError(msg)


def _window(module: nn.Module, keys: int, told: dict[str, Any], *, causal: bool) -> int | None:
    """The window of a call that has no mask, unless it holds all keys.

    Raises:
        UnsupportedOpError: the model's config has one that the call does not say; or it looks ahead.
    """
    window = told["sliding_window"] if "sliding_window" in told else _configured(module)
    if window is None or window >= keys:
        return None
    if "sliding_window" not in told or not causal:
        what = "looks both ways" if "sliding_window" in told else "is only in its config: attention is not told of it"
        msg = f"{type(module).__name__} has a window of {window} tokens that {what}; use attn_implementation='sdpa'"
        raise UnsupportedOpError(msg)
    return window


def _configured(module: nn.Module) -> int | None:
    return getattr(getattr(module, "config", None), "sliding_window", None)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: PreTrainedConfig | None = None,
    **rest: Any,
) -> Tensor | None:
    """A mask (B, 1, S, T) of bools, true where a key is seen; None where `_attend` knows without.

    Raises:
        UnsupportedOpError: the config is that of a model whose attention is its own, and would misread the mask.
    """
    if config is not None:
        _require_interface_of(type(config))
    if (
        allow_is_causal_skip
        and _is_plain(kv_length, local_size, config)
        and _are_last(q_length, kv_length, q_offset, kv_offset)
        and _are_seen(attention_mask, kv_length, kv_offset)
    ):
        return None
    return sdpa_mask(
        *(batch_size, q_length, kv_length, q_offset, kv_offset),
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        config=config,
        **rest,
    )


def _is_plain(keys: int, local_size: int | None, config: PreTrainedConfig | None) -> bool:
    """Whether a causal pattern is all keys or a window of them, not chunks."""
    if local_size is None or keys < local_size:
        return True
    return local_size == getattr(config, "sliding_window", None) != getattr(config, "attention_chunk_size", None)


def _are_last(queries: int, keys: int, q_offset: int | Tensor, kv_offset: int) -> bool:
    """Whether queries are the last of the keys; after them a static cache, whose offset is a tensor, has room."""
    if isinstance(q_offset, Tensor) and is_tracing(q_offset):
        return False
    return bool(q_offset + queries == kv_offset + keys)


def _are_seen(padding: Tensor | None, keys: int, kv_offset: int) -> bool:
    """Whether no key is padding; not known while a graph is made."""
    if padding is None:
        return True
    last = kv_offset + keys
    return not is_tracing(padding) and padding.shape[1] >= last and bool(padding[:, kv_offset:last].all())


@torch.compiler.assume_constant_result
def _require_interface_of(config: type[PreTrainedConfig]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING  # noqa: PLC0415 - not while transformers loads

    found: Any = MODEL_MAPPING.get(config, ())
    for model in found if isinstance(found, tuple) else (found,):
        _require_interface(model)


def _require_interface(model: type[PreTrainedModel]) -> None:
    # What set_attn_implementation asks.
    if not model._can_set_attn_implementation():  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        msg = f"the attention of {model.__name__} does not go through transformers' interface, so it stays as it is"
        raise UnsupportedOpError(f"{msg}; use attn_implementation='eager'")


register_attention(NAME)
for _name in SCHEMES:
    register_attention(f"{NAME}:{_name}", _name)
