"""A checkpoint's weights in its model, a part at a time: loaded when asked for, dropped when done with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.shards import Checkpoint
from lowbit_hf.skeleton import Owner, Skeleton


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor of the checkpoint lies in the model's parameter: all of it, or rows of one expert."""

    parameter: str
    expert: int | None = None
    # First row, the end, and how far the rows lie from one another.
    rows: tuple[int, int, int] | None = None
    # Whether the parameter holds the expert with its rows as columns.
    transposed: bool = False

    def of(self, weight: Tensor) -> Tensor:
        """That part of the parameter, quantized or not."""
        if self.expert is None or self.rows is None:
            return weight
        matrix = weight[self.expert]
        return (matrix.mT if self.transposed else matrix)[slice(*self.rows)]


class Stream:
    """The model of a checkpoint on the meta device, and its weights as they are asked for."""

    def __init__(
        self, checkpoint: Checkpoint, skeleton: Skeleton, owners: dict[str, Owner | None], device: str = "cpu"
    ) -> None:
        self._checkpoint, self._skeleton, self._owners, self._device = checkpoint, skeleton, owners, device
        skeleton.fill_buffers()
        self.model: nn.Module = skeleton.model.eval().requires_grad_(requires_grad=False)
        for name, buffer in list(self.model.named_buffers()):
            if not buffer.is_meta:
                self._place(name, buffer)

    def names(self, prefixes: Iterable[str], *, outside: bool = False) -> list[str]:
        """Tensors of the checkpoint whose parameters' names begin so; or all others that the model has a place for."""
        begins = tuple(prefixes)
        owned = {name: owner.name for name, owner in self._owners.items() if owner is not None}
        return [name for name, parameter in owned.items() if parameter.startswith(begins) != outside]

    def load(self, names: Iterable[str]) -> None:
        """Read tensors of the checkpoint, and put them in the model."""
        read = {name: self._checkpoint.read(self._checkpoint.entries[name]) for name in names}
        dtype = self._skeleton.dtype
        for name, tensor in self._skeleton.assemble(read).items():
            self._place(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def drop(self, names: Iterable[str]) -> None:
        """Let go of the memory of tensors of the checkpoint."""
        for name in {owner.name for name in names if (owner := self._owners[name]) is not None}:
            module, _, attribute = name.rpartition(".")
            self._place(name, torch.empty_like(getattr(self.model.get_submodule(module), attribute), device="meta"))

    def _place(self, name: str, tensor: Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        moved = tensor if tensor.is_meta else tensor.to(self._device)
        if attribute in dict(module.named_parameters(recurse=False)):
            setattr(module, attribute, nn.Parameter(moved, requires_grad=False))
        else:
            setattr(module, attribute, moved)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Where each tensor of the checkpoint lies in the model.

        Raises:
            CheckpointError: a stack of experts is not made of whole matrices, one after the other.
        """
        owned = {name: owner for name, owner in self._owners.items() if owner is not None}
        parts = {name: Part(owner.name) for name, owner in owned.items() if not owner.stacked}
        stacked = [name for name, owner in owned.items() if owner.stacked]
        # One column of each matrix, that of number i holding i, shows where it comes to lie.
        rows = {name: self._checkpoint.entries[name].shape[0] for name in stacked}
        probes = {name: torch.full((rows[name], 1), i, dtype=torch.int32) for i, name in enumerate(stacked)}
        made, transposed = self._skeleton.assemble(probes), self._skeleton.transposed
        for i, name in enumerate(stacked):
            parameter = owned[name].name
            turned, count = parameter in transposed, rows[name]
            place = made[parameter].mT if turned and made[parameter].dim() == 3 else made[parameter]
            found = (place == i).nonzero()
            if place.dim() != 3 or len(found) != count or len(found[:, 0].unique()) != 1:
                raise CheckpointError(f"{name!r} is not a matrix of rows of {parameter!r}; keep such experts by --keep")
            step = int(found[1, 1] - found[0, 1]) if count > 1 else 1
            lies = int(found[0, 1]), int(found[-1, 1]) + 1, step
            parts[name] = Part(parameter, int(found[0, 0]), lies, turned)
        return parts
