"""Choosing a kernel for every quantized weight once, packing weights where the kernel wants that, and saying why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from lowbit.backends import Call, Selection, select
from lowbit.errors import NoKernelError
from lowbit.packed import PackedTensor
from lowbit.table import align
from lowbit.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Binding:
    """The kernel chosen for one parameter."""

    name: str
    op: str
    format: str
    activation: str | None
    kernel: str
    packed: bool
    # Why each other kernel was not chosen.
    refusals: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bindings:
    """The table that `bind` returns."""

    rows: tuple[Binding, ...]

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    def __str__(self) -> str:
        """The table as aligned text."""
        return "\n".join(
            align(
                [
                    {
                        "parameter": row.name,
                        "op": row.op,
                        "format": row.format,
                        "kernel": row.kernel + (" (packed)" if row.packed else ""),
                    }
                    for row in self.rows
                ]
            )
        )


@dataclass(frozen=True, slots=True)
class _Use:
    """A module that holds a parameter, under the parameter's full name and its own."""

    full: str
    module: nn.Module
    name: str
    call: Call


def bind(model: nn.Module, *, prefer: Sequence[str] = ()) -> Bindings:
    """Choose a kernel for every quantized parameter of `model` on the device it is on, and pack the weight for it.

    A parameter used by modules of different kinds (a tied table) is packed only if one kernel serves all its uses.
    Call it last: after loading, moving and sharding. `unbind` undoes it bit for bit; binding again starts from there.

    Raises:
        NoKernelError: `prefer` names backends none of which takes a call; nothing is bound then.
    """
    unbind(model)
    uses: dict[int, list[_Use]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, QuantizedTensor):
                full = f"{prefix}.{name}" if prefix else name
                uses.setdefault(id(parameter), []).append(_Use(full, module, name, _call(module, parameter)))
    # Every choice is made before the first weight is packed: one that cannot be made leaves the model alone.
    chosen = [(group, *_choose(group, prefer)) for group in uses.values()]
    for group, selections, carried in chosen:
        if carried:
            _bind_parameter(group, selections[0].kernel.name)
    rows = (_row(use.full, s) for group, found, _ in chosen for use, s in zip(group, found, strict=True))
    return Bindings(tuple(rows))


def unbind(model: nn.Module) -> None:
    """Put the canonical tensors back where `bind` packed them.

    Raises:
        NotPortableError: a kernel cannot restore what it packed.
    """
    restored: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, PackedTensor):
                if id(parameter) not in restored:
                    restored[id(parameter)] = nn.Parameter(parameter.unpack(), requires_grad=False)
                setattr(module, name, restored[id(parameter)])


def use_of(module: nn.Module, rank: int) -> str:
    """The op through which a module of this kind uses a quantized parameter of `rank` dims."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "grouped_mm" if rank == 3 else "linear"


def _call(module: nn.Module, weight: QuantizedTensor) -> Call:
    op = use_of(module, weight.dim())
    *_, n, k = (1, *weight.canonical_shape)
    activation = None if op == "embedding" else weight.activation
    return Call(op, weight.format, activation, weight.device.type, weight.dtype, n, k)


def _choose(uses: Sequence[_Use], prefer: Sequence[str]) -> tuple[list[Selection], bool]:
    """A kernel for each use of one parameter, and whether the parameter carries it; the op finds it otherwise."""
    selections = [select(use.call, prefer=prefer) for use in uses]
    kernel = selections[0].kernel
    # Packed experts have no use yet: grouped_mm takes canonical ones.
    if kernel.op != "grouped_mm" and all(selection.kernel is kernel for selection in selections):
        return selections, kernel.pack is not None or select(uses[0].call, bound=False).kernel is not kernel
    selections = [select(use.call, prefer=prefer, bound=False) for use in uses]
    for use, selection in zip(uses, selections, strict=True):
        if select(use.call, bound=False).kernel is not selection.kernel:
            raise NoKernelError(
                f"{use.full!r} cannot carry {selection.kernel.name}: experts, and parameters tied between ops with a "
                "kernel each, cannot; put that backend first for all models by LOWBIT_BACKENDS"
            )
    return selections, False


def _bind_parameter(uses: Sequence[_Use], kernel: str) -> None:
    with torch.no_grad():
        packed = PackedTensor.from_quantized(getattr(uses[0].module, uses[0].name), kernel)
    parameter = nn.Parameter(packed, requires_grad=False)
    for use in uses:
        setattr(use.module, use.name, parameter)


def _row(full: str, selection: Selection) -> Binding:
    call, row = selection.call, selection.kernel
    activation = None if call.activation is None else str(call.activation)
    refusals = tuple(str(refusal) for refusal in selection.refusals)
    return Binding(full, call.op, str(call.format), activation, row.name, row.pack is not None, refusals)
