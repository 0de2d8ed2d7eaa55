"""Hidden states between blocks, one tensor a batch: in memory, or in a file where a later run may go on with them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lowbit import CheckpointError, LowbitError
from lowbit.shards import byte_view


class Hidden:
    """A tensor a batch, by number; those in a file take no memory, and are read anew each time."""

    def __init__(self, like: Sequence[Tensor], path: Path | None = None, device: torch.device | None = None) -> None:
        """Room for tensors like `like`, in memory or, with what it holds if it exists, in the file `path`.

        `device` is where they are to be read to, by default that of `like`.
        """
        self.path = path
        self._device = device or like[0].device
        self._like: list[Tensor] = []
        self._kept: list[Tensor | None] = []
        self._offsets = [0]
        for tensor in like:
            self.make_room(tensor)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], path: Path | None = None) -> Self:
        """The tensors themselves, kept in memory or written to a file."""
        self = cls(tensors, path)
        for i, tensor in enumerate(tensors):
            self[i] = tensor
        return self

    def make_room(self, like: Tensor) -> None:
        """Room for one more tensor, like `like`, at the end."""
        self._like.append(torch.empty(like.shape, dtype=like.dtype, device="meta"))
        self._kept.append(None)
        self._offsets.append(self._offsets[-1] + like.numel() * like.element_size())

    def after(self, path: Path | None) -> Hidden:
        """Where the tensors go that come of these: their own place, or another file, so that these stay."""
        return self if path is None else Hidden(self._like, path, self._device)

    def __len__(self) -> int:
        return len(self._like)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def tokens(self, i: int) -> int:
        """Tokens of batch i."""
        like = self._like[i]
        return like.numel() // max(like.shape[-1], 1)

    def __getitem__(self, i: int) -> Tensor:
        kept = self._kept[i]
        if kept is not None:
            return kept
        assert self.path is not None
        tensor = torch.empty_like(self._like[i], device="cpu")
        with self.path.open("rb") as file:
            file.seek(self._offsets[i])
            if file.readinto(byte_view(tensor)) != self._offsets[i + 1] - self._offsets[i]:
                raise CheckpointError(f"{self.path} ends too early; delete {self.path.parent} and start again")
        return tensor.to(self._device)

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        if self.path is None:
            self._kept[i] = tensor
            return
        like = self._like[i]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise LowbitError(
                f"a block made {tensor.dtype} {tuple(tensor.shape)} of {like.dtype} {tuple(like.shape)}; calibration "
                "from disk needs blocks that return what they are fed"
            )
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            view, done = byte_view(tensor.detach().cpu().contiguous()), 0
            while done < len(view):
                done += os.pwrite(fd, view[done:], self._offsets[i] + done)
        finally:
            os.close(fd)
