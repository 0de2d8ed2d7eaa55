"""Choosing a kernel for every quantized weight once, packing weights where the kernel wants that, and saying why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from lowbit.backends import Call, Selection, select
from lowbit.packed import PackedTensor
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
        head = ("parameter", "op", "format", "kernel")
        cells = [head, *((r.name, r.op, r.format, r.kernel + (" (packed)" if r.packed else "")) for r in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def bind(model: nn.Module, *, prefer: Sequence[str] = ()) -> Bindings:
    """Choose a kernel for every quantized parameter of `model` on the device it is on, and pack the weight for it.

    A parameter used by modules of different kinds (a tied table) is packed only if one kernel serves all its uses.
    Call it last: after loading, moving and sharding. `unbind` undoes it bit for bit.

    Raises:
        NoKernelError: `prefer` names backends none of which takes a call; nothing is bound then.
    """
    choices: dict[int, list[tuple[str, nn.Module, str, Selection]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, QuantizedTensor):
                chosen = select(_call(module, parameter), prefer=prefer)
                full = f"{prefix}.{name}" if prefix else name
                choices.setdefault(id(parameter), []).append((full, module, name, chosen))
    rows: list[Binding] = []
    for uses in choices.values():
        packs = _bind_parameter(uses)
        rows += [
            _row(full, packs, s if packs or s.kernel.pack is None else select(s.call, prefer=prefer, bound=False))
            for full, _, _, s in uses
        ]
    return Bindings(tuple(rows))


def unbind(model: nn.Module) -> None:
    """Put the canonical tensors back where `bind` packed them."""
    restored: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, PackedTensor):
                if id(parameter) not in restored:
                    restored[id(parameter)] = nn.Parameter(parameter.unpack(), requires_grad=False)
                setattr(module, name, restored[id(parameter)])


def use_of(module: nn.Module, rank: int) -> str:
    """The op through which a module of this kind uses a quantized parameter of `rank` dims."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "grouped_mm" if rank == 3 else "linear"  # noqa: PLR2004 - stacked experts


def _call(module: nn.Module, weight: QuantizedTensor) -> Call:
    op = use_of(module, weight.dim())
    *_, n, k = (1, *weight.canonical_shape)
    activation = None if op == "embedding" else weight.activation
    return Call(op, weight.format, activation, weight.device.type, weight.dtype, n, k)


def _bind_parameter(uses: Sequence[tuple[str, nn.Module, str, Selection]]) -> bool:
    """Pack the parameter in all its modules if every use chose the same packing kernel; whether it was packed."""
    kernels = {selection.kernel.name for *_, selection in uses}
    _, module, name, selection = uses[0]
    if len(kernels) > 1 or selection.kernel.pack is None:
        return False
    with torch.no_grad():
        packed = PackedTensor.from_quantized(getattr(module, name), selection.kernel.name)
    parameter = nn.Parameter(packed, requires_grad=False)
    for _, owner, attribute, _ in uses:
        setattr(owner, attribute, parameter)
    return True


def _row(full: str, packed: bool, selection: Selection) -> Binding:  # noqa: FBT001 - internal
    call = selection.call
    activation = None if call.activation is None else str(call.activation)
    refusals = tuple(str(refusal) for refusal in selection.refusals)
    return Binding(full, call.op, str(call.format), activation, selection.kernel.name, packed, refusals)
