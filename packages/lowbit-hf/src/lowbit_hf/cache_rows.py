"""What a quantized key-value cache is made of: rows of codes and scales, one a token and head, and room for more."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lowbit.errors import FormatError
from lowbit.format import WHOLE, Format
from lowbit.numerics import DEFAULT_MODE, data_shape, tensor_scale_for_amax

TENSOR_SCALE_ROOM = 128.0
"""How much larger than those first written keys or values may get before a format's tensor scale limits them.

A tensor scale (NVFP4) is the least power of two under which block scales of the first write are at most 448 / 128, for
each text and head; it stays until the cache is empty again. Block scales keep all of their bits down to a hundredth of
the largest then.
"""


class Rows:
    """Keys, or values, of one layer: codes, scales and zero points (batch, heads, room, ..), a row a token and head.

    Raises:
        FormatError: the format's groups do not divide a head.
    """

    def __init__(self, fmt: Format, states: Tensor, room: int) -> None:
        self.format, self.k, self.dtype, self.device = fmt, states.shape[-1], states.dtype, states.device
        self.batch, self.heads = states.shape[:2]
        group = fmt.block[-1]
        if group != WHOLE and self.k % group:
            msg = (
                f"heads have {self.k} channels, which groups of {group} do not divide; {fmt} cannot hold them: choose "
                "another group, or one scale a token and head ('1x*')"
            )
            raise FormatError(msg)
        # Of shape (batch, heads, 1, 1).
        self.tensor_scale = self._made(1, 1, torch.float32).fill_(1.0) if fmt.tensor_scale else None
        self.parts = self._parts(room)

    @property
    def room(self) -> int:
        """Tokens that there is room for."""
        return self.parts[0].shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return self.parts if self.tensor_scale is None else [*self.parts, self.tensor_scale]

    def fix_tensor_scale(self, states: Tensor, where: Tensor | None = None) -> None:
        """Choose the tensor scale by `states`, the first ones; `where` () bool says on the device whether they are."""
        if self.tensor_scale is None or not states.shape[2]:
            return
        # What is not finite decodes to NaN by its own scale, and must not cost others their range.
        amax = torch.where(states.isfinite(), states.abs(), 0.0).amax((2, 3), keepdim=True).to(torch.float32)
        least = tensor_scale_for_amax(amax, self.format)
        chosen = torch.where(amax > 0, least * TENSOR_SCALE_ROOM, least)
        self.tensor_scale.copy_(chosen if where is None else torch.where(where, chosen, self.tensor_scale))

    def encode(self, states: Tensor) -> list[Tensor]:
        """Codes, scales and zero points of `states`, as they are held."""
        spec, given = str(self.format), (None, None, self.tensor_scale)
        parts = torch.ops.lowbit.quantize(states.detach(), *given, spec, DEFAULT_MODE, "nearest", 0)
        return [_held(part) for part in parts[: len(self.parts)]]

    def decode(self, start: int, end: int) -> Tensor:
        """Tokens `start` to `end` in the model's dtype."""
        data, scale, *zero = (part[:, :, start:end] for part in self.parts)
        fmt = self.format
        data = data.view(fmt.element.storage)
        # Operators take e8m0 scales as bytes, too.
        scale = scale if fmt.scale.powers_of_two else scale.view(fmt.scale.storage)
        offset = None if fmt.zero is None else zero[0].view(fmt.zero.code_dtype)
        return torch.ops.lowbit.dequantize(data, scale, offset, self.tensor_scale, str(fmt), self.k, self.dtype)

    def move(self, start: int, end: int, room: int) -> None:
        """Give tokens `start` to `end` other room, at the beginning of it."""
        old, self.parts = self.parts, self._parts(room)
        for part, before in zip(self.parts, old, strict=True):
            part[:, :, : end - start].copy_(before[:, :, start:end])

    def select(self, index: Tensor) -> None:
        """Keep the texts of `index` (texts) int64, in that order; in place where there are as many as before."""
        index = index.to(self.device)
        picked = [part.index_select(0, index) for part in self.tensors]
        if index.shape[0] != self.batch:
            self.batch, room = index.shape[0], self.room
            self.parts = self._parts(room)
            self.tensor_scale = None if self.tensor_scale is None else self._made(1, 1, torch.float32)
        for part, moved in zip(self.tensors, picked, strict=True):
            part.copy_(moved)

    def _parts(self, room: int) -> list[Tensor]:
        fmt, groups = self.format, self.format.scale_shape((1, self.k))[-1]
        parts = [
            self._made(room, data_shape((1, self.k), fmt)[-1], fmt.element.storage),
            self._made(room, groups, fmt.scale.storage),
        ]
        return parts if fmt.zero is None else [*parts, self._made(room, groups, fmt.zero.code_dtype)]

    def _made(self, room: int, width: int, dtype: torch.dtype) -> Tensor:
        return lasting_zeros((self.batch, self.heads, room, width), _held_dtype(dtype), self.device)


def lasting_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that later calls may write to, also those outside of the inference mode that this one may be in."""
    if is_compiling():
        return torch.zeros(shape, dtype=dtype, device=device)
    with torch.inference_mode(mode=False):
        return torch.zeros(shape, dtype=dtype, device=device)


def _held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Bytes for dtypes of one: torch cannot copy all of those by index, nor compile what holds e8m0."""
    return torch.uint8 if dtype.itemsize == 1 else dtype


def _held(part: Tensor) -> Tensor:
    held = _held_dtype(part.dtype)
    return part if part.dtype == held else part.view(held)
