"""Key-value caches of 8-bit codes: writing to them, and attention that reads codes and never decodes all of them.

A cache holds keys and values of G heads as codes (B, T, G, D), one float32 scale for each token and head (B, T, G); or
in pages, codes (P, page, G, D) and scales (P, page, G), where the token t of text b is in the place `t % page` of the
page `table[b, t // page]`. With the rotation of RoPE where `cos` and `sin` are given, and S tokens of a text:

    k_codes, k_scale = quantize(rotate(k));  v_codes, v_scale = quantize(v)
    s = q (k_codes k_scale)^T * scale                   (B, H, S, T), each of G heads serves H / G of queries
    out = softmax(s, seen tokens only) (v_codes v_scale)

Queries are the last S of a text's tokens, and see those up to their own.

Source: Su et al., "RoFormer", for the rotation; Kwon et al., "Efficient Memory Management for Large Language Model
Serving with PagedAttention", for pages; Dao et al., "Flash-Decoding", for tokens that programs share.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit.attention import DTYPES, check_devices
from lowbit.errors import FormatError, UnsupportedOpError
from lowbit.format import FP8_ROW, INT8_ROW, Format

FORMATS: Final = (FP8_ROW, INT8_ROW)
"""What keys and values may be rounded to."""

_INTEGERS = (torch.int32, torch.int64)
_PARTS = ("k_codes", "k_scale", "v_codes", "v_scale")


class KeyValueCache(nn.Module):
    """Codes, uint8 (B, T, G, D), and scales, float32 (B, T, G), of keys and values; in pages where there is a table.

    Channels lie side by side, all else may have any strides. `table` is (B, most pages of a text) int32. Buffers are
    the caller's to share, move and fill; they are not part of a `state_dict`.

    Raises:
        FormatError: a format is neither FP8_ROW nor INT8_ROW, or shapes or dtypes do not fit.
    """

    k_codes: Tensor
    k_scale: Tensor
    v_codes: Tensor
    v_scale: Tensor
    table: Tensor | None

    def __init__(
        self,
        k_codes: Tensor,
        k_scale: Tensor,
        v_codes: Tensor,
        v_scale: Tensor,
        table: Tensor | None = None,
        *,
        keys: Format | str = FP8_ROW,
        values: Format | str | None = None,
    ) -> None:
        super().__init__()
        self.keys, self.values = (_format(each) for each in (keys, keys if values is None else values))
        parts = (k_codes, k_scale, v_codes, v_scale)
        _check_buffers(parts, table)
        for name, part in zip((*_PARTS, "table"), (*parts, table), strict=True):
            self.register_buffer(name, part, persistent=False)

    @staticmethod
    def empty(
        batch: int,
        heads: int,
        tokens: int,
        d: int,
        *,
        keys: Format | str = FP8_ROW,
        values: Format | str | None = None,
        page: int | None = None,
        device: torch.device | str | None = None,
    ) -> KeyValueCache:
        """Room for `tokens` of each of `batch` texts, with `heads` of `d` channels; zeros.

        With a `page` of so many tokens, the pages of a text are one after another; change the table for other ones.

        Raises:
            FormatError: a format is neither FP8_ROW nor INT8_ROW, or a size is not positive.
        """
        if min(batch, heads, tokens, d, 1 if page is None else page) < 1:
            raise FormatError(f"a cache needs positive sizes; given are {batch=}, {heads=}, {tokens=}, {d=}, {page=}")
        table, rows, each = None, batch, tokens
        if page is not None:
            most = -(-tokens // page)
            rows, each = batch * most, page
            table = torch.arange(rows, dtype=torch.int32, device=device).view(batch, most)
        # Tokens of a head lie side by side: that is how attention reads them.
        codes, scales = (
            [torch.zeros(rows, heads, each, *width, dtype=dtype, device=device).transpose(1, 2) for _ in range(2)]
            for width, dtype in (((d,), torch.uint8), ((), torch.float32))
        )
        parts = codes[0], scales[0], codes[1], scales[1]
        return KeyValueCache(*parts, table, keys=keys, values=values)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in (self.k_codes, self.k_scale, self.v_codes, self.v_scale))

    def write(
        self,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        q: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor | None:
        """Write keys and values (B, G, S, D), rounded, to `positions`; the rotated queries, where some are given.

        `positions` are (B, S), or (B,) those of the first tokens, int32 or int64. One that is negative, as that of
        padding, or beyond the room, or whose page the table does not have, is not written. No two may be the same.
        With `cos` and `sin` (S, D or D / 2), or of each text (1 or B, S, ..), keys and queries (B, H, S, D) are first
        rotated: channels i and i + D / 2 are a pair. Each product and each sum is rounded to their dtype, as
        transformers' models do it.

        Raises:
            FormatError: shapes, dtypes or devices do not fit, or queries come without `cos` and `sin`.
            UnsupportedOpError: keys, values or queries require a gradient, while gradients are on.
        """
        parts = (self.k_codes, self.k_scale, self.v_codes, self.v_scale)
        cos, sin = (x[None] if x is not None and x.dim() == 2 else x for x in (cos, sin))
        arguments = (k, v, q, cos, sin, *parts, positions, self.table, str(self.keys), str(self.values))
        turned = torch.ops.lowbit.cache_write(*arguments)
        return None if q is None else turned

    def attend(self, q: Tensor, lengths: Tensor, *, window: int | None = None, scale: float | None = None) -> Tensor:
        """Attention (B, H, S, D), in q's dtype, of the last S of a text's `lengths` (B,) int32 or int64 tokens.

        Of those a query sees only its own and, with a `window`, the `window - 1` before. `scale` is `1 / sqrt(D)`
        unless given. A query that sees nothing gets zeros, a text of which more tokens are said to be there than there
        is room for NaN, and so does one of whose queries any sees a page which is none. What no query sees is not read.

        Scores and sums are in float32; weights times scales of values have 11 bits, down to 2^-14 of the
        largest of a block of tokens.

        Raises:
            FormatError: shapes, dtypes or devices do not fit, or the window is not positive.
            UnsupportedOpError: queries require a gradient, while gradients are on.
        """
        if window is not None and window < 1:
            raise FormatError(f"a window of {window} tokens must be positive: it ends at the query's own token")
        parts = (self.k_codes, self.k_scale, self.v_codes, self.v_scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        given = (lengths, self.table, window or 0, scale, str(self.keys), str(self.values))
        return torch.ops.lowbit.cached_attention(q, *parts, *given)

    def extra_repr(self) -> str:
        """The sizes and the formats."""
        paged = "" if self.table is None else f", table={tuple(self.table.shape)}"
        return f"{tuple(self.k_codes.shape)}{paged}, keys={self.keys}, values={self.values}"


def check_write(
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    positions: Tensor,
    table: Tensor | None,
    k_format: str,
    v_format: str,
) -> None:
    """Refuse what the operator `cache_write` cannot do.

    Raises:
        FormatError: see `KeyValueCache.write`.
        UnsupportedOpError: see there.
    """
    _refuse_gradients(k, v, q, cos, sin)
    for fmt in (k_format, v_format):
        _format(fmt)
    parts = (k_codes, k_scale, v_codes, v_scale)
    _check_buffers(parts, table)
    if k.dim() != 4 or k.shape != v.shape or k.dtype not in DTYPES or v.dtype != k.dtype:
        raise FormatError(
            f"keys and values are (B, G, S, D) in one dtype of float32, bfloat16 and float16; given are {_told(k)} and "
            f"{_told(v)}"
        )
    batch, _, tokens, d = k.shape
    _check_fit("keys", k, parts, table)
    if positions.shape not in ((batch,), (batch, tokens)) or positions.dtype not in _INTEGERS:
        raise FormatError(f"positions are ({batch},) or ({batch}, {tokens}) of integers; given are {_told(positions)}")
    if (cos is None) != (sin is None) or (q is not None and cos is None):
        raise FormatError("a rotation needs both cos and sin, and queries are there to be rotated; some are missing")
    for name, part in (("cos", cos), ("sin", sin)):
        if part is not None and (
            d % 2
            or part.dim() != 3
            or part.shape[0] not in (1, batch)
            or part.shape[1] != tokens
            or part.shape[2] not in (d, d // 2)
            or part.dtype != k.dtype
        ):
            raise FormatError(
                f"{name} is (1 or {batch}, {tokens}, {d} or {d / 2:g}) in keys' {k.dtype}, and channels are even in "
                f"number; given is {_told(part)}"
            )
    if cos is not None and sin is not None and cos.shape != sin.shape:
        raise FormatError(f"cos and sin have one shape; given are {_told(cos)} and {_told(sin)}")
    if q is not None and (q.dim() != 4 or (q.shape[0], *q.shape[2:]) != (batch, tokens, d) or q.dtype != k.dtype):
        raise FormatError(f"queries are ({batch}, H, {tokens}, {d}) in keys' {k.dtype}; given are {_told(q)}")
    check_devices(k, v, q, cos, sin, *parts, positions, table)


def check_attend(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    window: int,
    softmax_scale: float,
    k_format: str,
    v_format: str,
) -> None:
    """Refuse what the operator `cached_attention` cannot do.

    Raises:
        FormatError: see `KeyValueCache.attend`.
        UnsupportedOpError: see there.
    """
    del window, softmax_scale
    _refuse_gradients(q)
    for fmt in (k_format, v_format):
        _format(fmt)
    parts = (k_codes, k_scale, v_codes, v_scale)
    _check_buffers(parts, table)
    if q.dim() != 4 or q.dtype not in DTYPES or q.shape[1] % k_codes.shape[2]:
        raise FormatError(
            f"queries are (B, H, S, D) in float32, bfloat16 or float16, and the cache's {k_codes.shape[2]} heads "
            f"divide H; given are {_told(q)}"
        )
    _check_fit("queries", q, parts, table)
    if lengths.shape != (q.shape[0],) or lengths.dtype not in _INTEGERS:
        raise FormatError(f"lengths are ({q.shape[0]},) of integers; given are {_told(lengths)}")
    check_devices(q, *parts, lengths, table)


def _format(given: Format | str) -> Format:
    fmt = Format.parse(given) if isinstance(given, str) else given
    if fmt not in FORMATS:
        names = " or ".join(map(str, FORMATS))
        raise FormatError(f"keys and values of a cache are {names}; this is {fmt}")
    return fmt


def _check_buffers(parts: tuple[Tensor, ...], table: Tensor | None) -> None:
    shape = parts[0].shape
    needed = ((shape, torch.uint8), (shape[:-1], torch.float32)) * 2
    told = ", ".join(map(_told, parts))
    fits = all((x.shape, x.dtype) == each for x, each in zip(parts, needed, strict=True))
    if len(shape) != 4 or not shape[2] or not fits:
        raise FormatError(
            "a cache has codes (B, T, G, D) in uint8 (view others as that) and scales (B, T, G) in float32, of keys "
            f"and of values, or pages (P, page, ..) of them; given are {told}"
        )
    if any(codes.stride(3) != 1 and shape[3] > 1 for codes in parts[::2]):
        raise FormatError(
            f"channels of codes lie side by side; strides are {', '.join(str(x.stride()) for x in parts[::2])}"
        )
    if table is not None and (table.dim() != 2 or table.dtype != torch.int32):
        raise FormatError(f"a table of pages is (B, most pages of a text) int32; given is {_told(table)}")


def _check_fit(name: str, x: Tensor, parts: tuple[Tensor, ...], table: Tensor | None) -> None:
    codes = parts[0]
    texts = codes.shape[0] if table is None else table.shape[0]
    heads_too = name == "keys" and x.shape[1] != codes.shape[2]
    if (x.shape[0], x.shape[3]) != (texts, codes.shape[3]) or heads_too:
        told = f"codes {tuple(codes.shape)}" + ("" if table is None else f" and a table {tuple(table.shape)}")
        raise FormatError(f"{name} {tuple(x.shape)} do not fit a cache of {told}")


def _refuse_gradients(*given: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        raise UnsupportedOpError(
            "a cache of codes has no gradient; call it under torch.no_grad() or torch.inference_mode(), or detach what "
            "is given"
        )


def _told(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
