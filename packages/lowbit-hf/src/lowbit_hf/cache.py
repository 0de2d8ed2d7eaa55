"""A key-value cache in few bits for transformers: keys and values are kept as codes and scales of a format.

Every token is rounded once, when it is written, and never again; the most recent ones are no exception. So attention,
of whatever implementation, sees the same values of a token from its first use on, however texts are cut into calls, and
a cache that is cropped or reordered is one that was written so. A scale covers channels of one token and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import Cache, DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from lowbit.errors import FormatError, UnsupportedOpError
from lowbit.format import Format
from lowbit.numerics import total_bytes
from lowbit_hf.cache_rows import Rows, lasting_zeros


class QuantizedCache(Cache):
    """A cache for `generate(past_key_values=...)` and for `model(...)`, whose keys and values are codes of a format.

    `keys` and `values` are formats or their specs; `values` is `keys` where it is not given. Without `max_cache_len`
    room grows by half whenever it is used up, and layers with a window keep what it shows. With it there is room for as
    many tokens from the start, which compiled models write into; such layers keep all tokens, and masks hide some.

    Raises:
        FormatError: a format is unknown, or its scales cover several tokens.
        UnsupportedOpError: the model has layers that keep something else than keys and values.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        keys: Format | str,
        values: Format | str | None = None,
        *,
        max_cache_len: int | None = None,
    ) -> None:
        formats = (_row_format(keys), _row_format(keys if values is None else values))
        if max_cache_len is not None and max_cache_len < 1:
            msg = f"max_cache_len is {max_cache_len}; needed is room for one token or more, or None to let it grow"
            raise FormatError(msg)
        # transformers knows best which layer of a config is of which kind.
        like = DynamicCache(config=config).layers
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or [
            type(layer).__name__ for layer in like
        ]
        for i, (layer, kind) in enumerate(zip(like, kinds, strict=False)):
            if not _keeps_both(layer):
                raise UnsupportedOpError(
                    f"layer {i} of the model is a {kind!r} layer, which keeps something else than keys and values; a "
                    "QuantizedCache has layers of full, sliding and chunked attention alone: use DynamicCache"
                )
        super().__init__(layers=[_layer_like(layer, formats, max_cache_len) for layer in like])

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales that there is room for now."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, CodeLayer))

    @property
    def bfloat16_nbytes(self) -> int:
        """Bytes that a cache with room for as many tokens takes in bfloat16."""
        return sum(layer.bfloat16_nbytes for layer in self.layers if isinstance(layer, CodeLayer))


class CodeLayer(CacheLayerMixin):
    """A layer that keeps keys and values as codes; its first update decides shapes, dtype and device."""

    def __init__(self, formats: tuple[Format, Format]) -> None:
        super().__init__()
        self.formats = formats
        # Of keys and of values, once there are any.
        self.rows: tuple[Rows, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales that there is room for now."""
        return sum(total_bytes(rows.tensors) for rows in self.rows)

    @property
    def bfloat16_nbytes(self) -> int:
        """Bytes that as much room takes in bfloat16."""
        return sum(2 * rows.batch * rows.heads * rows.room * rows.k for rows in self.rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put text `beam_idx[i]` in place i, as beam search does."""
        for rows in self.rows:
            rows.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put each text `repeats` times in a row."""
        for rows in self.rows:
            rows.select(torch.arange(rows.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the texts that `indices` pick, by number or by a bool each."""
        for rows in self.rows:
            rows.select(torch.arange(rows.batch, device=indices.device)[indices])

    def offload(self) -> None:
        """Refuse to move to the CPU and back, which transformers does to layers in the model's dtype.

        Raises:
            UnsupportedOpError: always.
        """
        raise UnsupportedOpError("a QuantizedCache is not offloaded; keep it where the model is, or use DynamicCache")

    def require_fit(self, key_states: Tensor, value_states: Tensor) -> int:
        """How many tokens come.

        Raises:
            FormatError: keys and values are not as many, or differ from the first ones in more than that.
        """
        tokens = key_states.shape[2]
        for name, rows, states in zip(("keys", "values"), self.rows, (key_states, value_states), strict=True):
            needed = (rows.batch, rows.heads, tokens, rows.k)
            if tuple(states.shape) != needed or states.dtype != rows.dtype:
                msg = (
                    f"{name} are {states.dtype} of shape {tuple(states.shape)}; this cache was begun with others, and "
                    f"needed is {rows.dtype} of shape {needed}: make a cache for each batch, or reset() it"
                )
                raise FormatError(msg)
        return tokens


class GrowingLayer(CodeLayer):
    """A layer with room that grows; one with a window keeps the `window - 1` tokens that the next can see."""

    is_croppable = True

    def __init__(self, formats: tuple[Format, Format], window: int | None = None) -> None:
        super().__init__(formats)
        self.window, self.is_sliding, self.record_past = window, window is not None, False
        # Tokens held are those from start to end; seen counts those that left the window, too.
        self._start, self._end, self._seen = 0, 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first keys and values; room is made when they are written."""
        states = zip(self.formats, (key_states, value_states), strict=True)
        self.rows = tuple(Rows(fmt, each, 0) for fmt, each in states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (batch, heads, tokens, channels); all those that these tokens may see, as held.

        Raises:
            FormatError: they do not fit the format, or those that came before.
        """
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = self.require_fit(key_states, value_states)
        self._make_room(tokens)
        for rows, states in zip(self.rows, (key_states, value_states), strict=True):
            if not self._seen:
                rows.fix_tensor_scale(states)
            for part, new in zip(rows.parts, rows.encode(states), strict=True):
                part[:, :, self._end : self._end + tokens].copy_(new)
        self._end, self._seen = self._end + tokens, self._seen + tokens
        # A window may show the first of these tokens some that it hides from the last.
        start = self._start if self.window is None else max(self._start, self._end - tokens - self.window + 1)
        keys, values = (rows.decode(start, self._end) for rows in self.rows)
        if not self.record_past:
            self._forget()
        return keys, values

    def get_seq_length(self) -> int:
        """How many tokens were written, those that left the window included."""
        return self._seen

    def get_max_length(self) -> int:
        """Tokens of the window; -1 where there is none."""
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys an update by `query_length` tokens will return, and the position of the first."""
        held = self._seen if self.window is None else min(self._seen, self.window - 1)
        return held + query_length, self._seen - held

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next `crop`, so that it can bring them back."""
        self.record_past = self.window is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, and what `activate_past_recording` kept.

        Raises:
            FormatError: the number is positive.
            UnsupportedOpError: tokens would be needed that left the window.
        """
        removed = min(_to_remove(tokens_to_remove), self._seen)
        needed = self._seen - removed if self.window is None else min(self._seen - removed, self.window - 1)
        if self._end - self._start - removed < needed:
            msg = (
                f"{removed} tokens cannot be removed from a layer with a window of {self.window} that has seen "
                f"{self._seen}: those before them are gone; call activate_past_recording() before they are written"
            )
            raise UnsupportedOpError(msg)
        self._end, self._seen = self._end - removed, self._seen - removed
        self._forget()

    def reset(self) -> None:
        """Forget all tokens, and the shapes."""
        self.rows, self.is_initialized = (), False
        self._start, self._end, self._seen = 0, 0, 0

    def _make_room(self, tokens: int) -> None:
        held, room = self._end - self._start, self.rows[0].room
        if self._end + tokens <= room:
            return
        needed = held + tokens
        # The first room is exact, as a prompt is often all that comes.
        room = needed + needed // 2 + 1 if held else needed
        for rows in self.rows:
            rows.move(self._start, self._end, room)
        self._start, self._end = 0, held

    def _forget(self) -> None:
        if self.window is not None:
            self._start = max(self._start, self._end - self.window + 1)


class FixedLayer(CodeLayer):
    """A layer with room for `max_cache_len` tokens, in tensors that stay in place: compiled models write there."""

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self, formats: tuple[Format, Format], max_cache_len: int) -> None:
        super().__init__(formats)
        self.max_cache_len = max_cache_len
        # Tokens written, () int64 on the layer's device: as a number it would be compiled into each step.
        self.length = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first keys and values, and make all room."""
        states = zip(self.formats, (key_states, value_states), strict=True)
        self.rows = tuple(Rows(fmt, each, self.max_cache_len) for fmt, each in states)
        self.length = lasting_zeros((), torch.int64, key_states.device)
        if not is_compiling():
            # Only who compiles needs it; CUDA graphs then write into these tensors and not into copies.
            from torch._dynamo import mark_static_address  # noqa: PLC0415

            for tensor in (self.length, *(each for rows in self.rows for each in rows.tensors)):
                mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (batch, heads, tokens, channels); all `max_cache_len`, zeros where none are yet.

        Raises:
            FormatError: they do not fit the format or those that came before, or there is no room for them. On a GPU
                and in compiled models the latter is an error of torch's.
        """
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = self.require_fit(key_states, value_states)
        if not is_compiling() and self.length.device.type == "cpu" and int(self.length) + tokens > self.max_cache_len:
            msg = f"{int(self.length)} tokens are held and {tokens} more come; max_cache_len is {self.max_cache_len}"
            raise FormatError(f"{msg}: make a cache with a larger one, or none that is fixed")
        at = torch.arange(tokens, device=self.length.device) + self.length
        for rows, states in zip(self.rows, (key_states, value_states), strict=True):
            rows.fix_tensor_scale(states, self.length == 0)
            for part, new in zip(rows.parts, rows.encode(states), strict=True):
                part.index_copy_(2, at, new)
        self.length.add_(tokens)
        keys, values = (rows.decode(0, self.max_cache_len) for rows in self.rows)
        return keys, values

    def get_seq_length(self) -> Any:
        """How many tokens were written, () int64; 0 before the first."""
        return self.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys an update returns, whatever `query_length`, and the position of the first."""
        del query_length
        return self.max_cache_len, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            FormatError: the number is positive.
        """
        self.length.sub_(_to_remove(tokens_to_remove)).clamp_min_(0)

    def reset(self) -> None:
        """Forget all tokens; shapes and room stay."""
        for rows in self.rows:
            for part in rows.parts:
                part.zero_()
        self.length.zero_()


def _row_format(given: Format | str) -> Format:
    """A format whose scales each cover channels of one row.

    Raises:
        FormatError: it is unknown, or has other scales.
    """
    fmt = Format.parse(given) if isinstance(given, str) else given
    if fmt.block[:-1] != (1,):
        msg = (
            f"a scale of {fmt} covers {fmt.block_name} values, so several tokens; a cache is written token by token, "
            "and needs scales within one row: FP8_ROW, INT8_ROW, INT4_G32, NVFP4, MXFP8 or another of block '1x...'"
        )
        raise FormatError(msg)
    return fmt


def _stores_nothing(layer: Any) -> bool:
    # Older versions of transformers make no such layers.
    return isinstance(layer, getattr(cache_utils, "DummyLayer", ()))


def _keeps_both(layer: Any) -> bool:
    return type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} or _stores_nothing(layer)


def _layer_like(layer: Any, formats: tuple[Format, Format], max_cache_len: int | None) -> Any:
    """What stands in a QuantizedCache where a DynamicCache has `layer`."""
    if _stores_nothing(layer):
        return layer
    if max_cache_len is not None:
        return FixedLayer(formats, max_cache_len)
    return GrowingLayer(formats, layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None)


def _to_remove(given: int) -> int:
    """How many tokens transformers' `crop` takes away.

    Raises:
        FormatError: the number is positive, which once was the length to be kept.
    """
    if given > 0:
        msg = f"crop was given {given}; it takes minus the number of tokens to remove"
        raise FormatError(msg)
    return -given
