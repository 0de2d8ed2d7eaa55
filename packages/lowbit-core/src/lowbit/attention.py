"""Attention whose queries, keys and values are rounded before they are multiplied.

With queries `q` (B, H, S, D), keys and values `k`, `v` (B, G, T, D), each of whose G heads serves `H / G` of queries:

    s = round(rotate(q)) round(rotate(k - mean(k)))^T * scale      (B, H, S, T)
    p = exp(s - max s), seen tokens only
    out = unrotate(round(p) round(rotate(v)) / sum(p))             (B, H, S, D)

A mean that is taken from all keys changes no softmax, and a rotation by an orthonormal matrix no product: both only
spread what would be rounded badly.

Source: Shah et al., "FlashAttention-3", for block scales and rotations; Zhang et al., "SageAttention2", for integers
and the mean of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit.backends import Call, Selection, generation, select
from lowbit.errors import FormatError
from lowbit.format import WHOLE, Format
from lowbit.hadamard import hadamard
from lowbit.numerics import ScaleMode

TOKENS: Final = 128
"""Tokens of a head that a block scale covers."""

SAMPLE: Final = 256
"""At most so many keys, evenly spread, are what the mean of keys is taken of."""

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What queries, keys and values may be in."""

MODE: Final[ScaleMode] = "rceil"
"""How scales that are powers of two are chosen: the least that saturates nothing."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How attention rounds; the spec string is its parts with commas, as `int8:128x*:float32,e4m3fn:128x*:e8m0,smooth`.

    Scales cover 128 tokens of a head (block 128x*) or all of them (*x*); of queries then those of all heads that share
    keys.

    Raises:
        FormatError: an element that is not int8 or e4m3fn, values in int8, other blocks, or zero points.
    """

    # Of queries and keys.
    qk: Format
    # Of values and, without scales but with 2^8 in place of 1, of weights `p`; None: both stay in the input's dtype.
    v: Format | None
    # Whether the mean of keys is subtracted from them.
    smooth: bool = True
    # Whether queries and keys, and whether values, are multiplied by a Hadamard matrix over sqrt(D).
    rotate_qk: bool = False
    rotate_v: bool = False

    def __post_init__(self) -> None:
        """Check what formats may be."""
        for name, fmt, elements in (("qk", self.qk, ("int8", "e4m3fn")), ("v", self.v, ("e4m3fn",))):
            if fmt is None:
                continue
            if fmt.element.name not in elements or fmt.zero is not None or fmt.tensor_scale:
                names = " or ".join(elements)
                msg = f"attention rounds {name} to {names}, without zero points and tensor scales; this is {fmt}"
                raise FormatError(msg)
            if fmt.block not in {(TOKENS, WHOLE), (WHOLE, WHOLE)}:
                msg = f"a scale of attention covers 128 tokens of a head (128x*) or all (*x*); {name} is {fmt}"
                raise FormatError(msg)

    def __str__(self) -> str:
        """The spec string."""
        told = [str(self.qk), "none" if self.v is None else str(self.v)]
        return ",".join(told + [name for name in _FLAGS if getattr(self, name)])

    @staticmethod
    def parse(spec: str) -> Scheme:
        """The scheme of a spec string, or of a name in `SCHEMES`; `parse(str(s)) == s`.

        Raises:
            FormatError: it is neither, or no such scheme can be.
        """
        if spec in SCHEMES:
            return SCHEMES[spec]
        qk, *rest = spec.split(",")
        unknown = set(rest[1:]) - set(_FLAGS)
        if not rest or unknown:
            wrong = f"{sorted(unknown)} in it is unknown" if unknown else "it is neither"
            msg = (
                f"attention scheme {spec!r}: {wrong}; use one of {', '.join(SCHEMES)}, or a format of queries and keys,"
                f" one of values or none, and any of {', '.join(_FLAGS)}, with commas"
            )
            raise FormatError(msg)
        values = None if rest[0] == "none" else Format.parse(rest[0])
        return Scheme(Format.parse(qk), values, **{name: name in rest[1:] for name in _FLAGS})


_FLAGS: Final = tuple(field.name for field in fields(Scheme) if field.name not in {"qk", "v"})
_INT8, _E4M3 = Format.parse("int8:128x*:float32"), Format.parse("e4m3fn:128x*:float32")
_VALUES, _HEAD = Format.parse("e4m3fn:128x*:e8m0"), Format.parse("e4m3fn:*x*:float32")

SCHEMES: Final[dict[str, Scheme]] = {
    "INT8_FP8": Scheme(_INT8, _VALUES),
    "INT8_FP8_ROTATED": Scheme(_INT8, _VALUES, rotate_qk=True),
    "INT8": Scheme(_INT8, None),
    "FP8": Scheme(_E4M3, _VALUES),
    "FP8_HEAD": Scheme(_HEAD, _HEAD, smooth=False),
}
"""Schemes by name. A rotation helps integers, whose steps are even, and not e4m3, whose errors are relative."""

scheme_of = lru_cache(maxsize=1024)(Scheme.parse)
"""`Scheme.parse` for kernels and operators, which are called again and again, and which no compiler looks into."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scheme: str | Scheme = "INT8_FP8",
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    prefer: str | Sequence[str] = (),
) -> Tensor:
    """Attention (B, H, S, D), in q's dtype, of float queries (B, H, S, D), keys and values (B, G, T, D).

    `mask`, broadcast to (B, H, S, T), is true where a token is seen, or added to `s`. Queries are the last of the
    tokens: if `causal`, the query i sees keys up to `i + T - S`, and with a `window` of those only the last `window`.
    `scale` is `1 / sqrt(D)` unless given. A query that sees nothing gets zeros. `prefer` names the only backends that
    will do, which then also run where plain attention would be faster.

    `rope` is the cosine and the sine (T, D / 2) or (B, T, D / 2) of each token's angles: queries and keys get rotary
    position embeddings, which turn the channels `i` and `i + D / 2`, before they are rounded. Of tables with D columns,
    whose halves are alike in transformers, the first half is read. They have no gradient.

    Raises:
        FormatError: the scheme is unknown, shapes or dtypes do not fit, or a window is given without causal.
        NoKernelError: no backend of `prefer` takes this call.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    check_heads(q, k, v, mask, scheme, causal=causal, window=window)
    tables = (None, None) if rope is None else _tables(rope, q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = mask, causal, window or 0, scale, str(scheme), preferred(prefer)
    return torch.ops.lowbit.attention(q, k, v, *arguments, *tables)[0]


def preferred(prefer: str | Sequence[str]) -> str:
    """Names of backends as operators take them; a string is one name."""
    return prefer if isinstance(prefer, str) else ",".join(prefer)


class Attention(nn.Module):
    """`attention` with what does not change from call to call: the scheme, `causal`, `window`, `scale`, `prefer`."""

    def __init__(
        self,
        scheme: str | Scheme = "INT8_FP8",
        *,
        causal: bool = False,
        window: int | None = None,
        scale: float | None = None,
        prefer: str | Sequence[str] = (),
    ) -> None:
        """Keep what is given; see `attention`.

        Raises:
            FormatError: the scheme is unknown.
        """
        super().__init__()
        self.scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        self.causal, self.window, self.scale, self.prefer = causal, window, scale, preferred(prefer)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `attention`."""
        return attention(
            *(q, k, v),
            scheme=self.scheme,
            mask=mask,
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            rope=rope,
            prefer=self.prefer,
        )

    def extra_repr(self) -> str:
        """The scheme, and what else is not usual."""
        told = [str(self.scheme), *("causal",) * self.causal]
        return ", ".join(told + ([f"window={self.window}"] if self.window else []))


def check_heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scheme: Scheme, *, causal: bool, window: int | None
) -> None:
    """Refuse what is no attention.

    Raises:
        FormatError: see `attention`.
    """
    shapes = f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        msg = f"attention needs queries (B, H, S, D), and keys and values (B, G, T, D); given are {shapes}"
        raise FormatError(msg)
    if not q.shape[3]:
        msg = f"attention needs heads of a channel or more; given are {shapes}"
        raise FormatError(msg)
    check_devices(q, k, v, mask)
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        msg = f"heads of keys must divide those of queries; given are {shapes}"
        raise FormatError(msg)
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        msg = f"attention needs one dtype of float32, bfloat16 and float16; given are {q.dtype}, {k.dtype}, {v.dtype}"
        raise FormatError(msg)
    if window is not None and (window < 1 or not causal):
        msg = f"a window of {window} tokens must be positive, and needs causal=True: it ends at the query's own token"
        raise FormatError(msg)
    if mask is not None:
        _check_mask(mask, q, k)
    if scheme.rotate_qk or scheme.rotate_v:
        hadamard(q.shape[-1])


def check_devices(*given: Tensor | None) -> None:
    """Refuse tensors on several devices.

    Raises:
        FormatError: they are.
    """
    devices = {str(x.device) for x in given if x is not None}
    if len(devices) > 1:
        msg = f"all tensors must be on one device; given are some on {' and '.join(sorted(devices))}"
        raise FormatError(msg)


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    if mask.dtype not in (torch.bool, q.dtype):
        msg = f"the mask's dtype must be bool, or that of queries, {q.dtype}; it is {mask.dtype}"
        raise FormatError(msg)
    whole = (*q.shape[:3], k.shape[2])
    fits = all(size in (1, of) for size, of in zip(reversed(mask.shape), reversed(whole), strict=False))
    if mask.dim() > 4 or not fits:
        msg = f"the mask {tuple(mask.shape)} does not broadcast to (B, H, S, T) {whole}"
        raise FormatError(msg)


def _tables(rope: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The tables (.., T, D / 2) of rotary embeddings, checked."""
    cos, sin = rope
    (batch, _, queries, d), keys = q.shape, k.shape[2]
    told = f"cos {tuple(cos.shape)} in {cos.dtype}, sin {tuple(sin.shape)} in {sin.dtype}"
    fits = cos.shape == sin.shape and cos.dim() in (2, 3) and cos.shape[-2] == keys and cos.shape[-1] in (d // 2, d)
    if not fits or (cos.dim() == 3 and cos.shape[0] not in (1, batch)) or d % 2 or queries > keys:
        shape = "cos and sin (T, D / 2) or (B, T, D / 2)"
        msg = f"rope needs {shape} of all {keys} keys' tokens, {d} channels; given: {told}"
        raise FormatError(msg)
    if not (cos.is_floating_point() and sin.is_floating_point()):
        msg = f"rope needs floating point tables; given: {told}"
        raise FormatError(msg)
    check_devices(q, cos, sin)
    if cos.requires_grad or sin.requires_grad:
        msg = "rope's tables have no gradient here; detach them"
        raise FormatError(msg)
    return cos[..., : d // 2], sin[..., : d // 2]


def attention_call(
    q: Tensor, mask: Tensor | None, window: int, scheme: str
) -> tuple[str, str, torch.device, torch.dtype, int | None, int | None, *tuple[str, ...]]:
    """What decides on the kernel, as `Call.of` takes it after the op's name."""
    facts = (scheme, *("mask",) * (mask is not None), *("window",) * bool(window))
    return str(scheme_of(scheme).qk), "", q.device, q.dtype, None, q.shape[-1], *facts


def selection(q: Tensor, mask: Tensor | None, window: int, scheme: str, prefer: str) -> Selection:
    """The kernel that attention of these runs on, and why others do not.

    Raises:
        NoKernelError: none does.
    """
    return selected("attention", attention_call(q, mask, window, scheme), prefer, generation())


@cache
def selected(op: str, call: tuple[Any, ...], prefer: str, renewed: int) -> Selection:
    """The kernel for an op's `attention_call` among backends of one `generation`.

    Raises:
        NoKernelError: none takes it.
    """
    # Backends may have been found anew.
    del renewed
    return select(Call.of(op, *call), prefer=tuple(prefer.split(",")) if prefer else (), bound=False)
