"""Choosing a kernel for every quantized weight once, packing weights where the kernel wants that, and saying why."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit.backends import Call, Refusal, Selection, select, slower_at
from lowbit.errors import LowbitError, NoKernelError
from lowbit.packed import PackedTensor
from lowbit.table import align
from lowbit.tensor import QuantizedTensor

_POLICY = Literal["smallest", "fastest"]


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
    # At how many tokens it is slower than a plain weight; None: at none, as far as is known.
    slower: str | None


@dataclass(frozen=True, slots=True)
class Bindings:
    """The table that `bind` returns."""

    rows: tuple[Binding, ...]

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    def __str__(self) -> str:
        """The table as aligned text."""
        slow = any(row.slower for row in self.rows)
        return "\n".join(
            align(
                [
                    {
                        "parameter": row.name,
                        "op": row.op,
                        "format": row.format,
                        "kernel": row.kernel + (" (packed)" if row.packed else ""),
                    }
                    | ({"slower than plain at": row.slower or ""} if slow else {})
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
    # Whether FSDP gathers and drops the parameter, so that it cannot be packed.
    gathered: bool


class _State:
    """Which modules give portable state dicts, and who may bind now: one thread at a time, its own calls included."""

    def __init__(self) -> None:
        self.hooks: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()
        self.renew()

    def renew(self) -> None:
        """Start with a free lock, as a forked process must: the thread that held it is not there."""
        self.lock = threading.RLock()


_STATE = _State()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_STATE.renew)


def bind(model: nn.Module, *, prefer: Sequence[str] = (), policy: _POLICY = "smallest") -> Bindings:
    """Choose a kernel for every quantized parameter of `model` on the device it is on, and pack the weight for it.

    With the policy "fastest", weights that are slower than plain ones at some numbers of tokens keep their plain values
    beside the codes, for these, as long as a tenth of the GPU's memory stays free.
    Convolutions are PyTorch's own, so that there is nothing to choose for them: they stay as they are.
    A parameter used by modules of different kinds (a tied table) is packed only if one kernel serves all its uses: one
    for linear layers may look rows up, too.
    Call it last: after loading, moving and sharding. Tensor-parallel shards are packed on each rank; what FSDP gathers
    stays canonical. `state_dict()` of a bound model is that of the canonical one. `unbind` undoes it bit for bit;
    binding again starts from there.

    Raises:
        NoKernelError: `prefer` names backends none of which takes a call; nothing is bound then.
        LowbitError: there is no such policy.
    """
    if policy not in get_args(_POLICY):
        raise LowbitError(f"policy {policy!r} is unknown; use one of {', '.join(get_args(_POLICY))}")
    with _STATE.lock:
        unbind(model)
        uses: dict[int, list[_Use]] = {}
        gathered = _gathered(model)
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                weight = parameter if id(parameter) in gathered else _local(parameter)
                if isinstance(_local(parameter), QuantizedTensor) and not isinstance(module, nn.Conv1d | nn.Conv2d):
                    full = f"{prefix}.{name}" if prefix else name
                    use = _Use(full, module, name, _call(module, weight), id(parameter) in gathered)
                    uses.setdefault(id(parameter), []).append(use)
        # Every choice is made before the first weight is packed: one that cannot be made leaves the model alone.
        room = _Room(keeps=policy == "fastest")
        chosen = [(group, *_choose(group, prefer, room)) for group in uses.values()]
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
    with _STATE.lock:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if isinstance(_local(parameter), PackedTensor):
                    if id(parameter) not in restored:
                        restored[id(parameter)] = nn.Parameter(_unpacked(parameter), requires_grad=False)
                    setattr(module, name, restored[id(parameter)])
            if (hook := _STATE.hooks.pop(module, None)) is not None:
                hook.remove()


def use_of(module: nn.Module, rank: int) -> str:
    """The op through which a module of this kind uses a quantized parameter of `rank` dims."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.EmbeddingBag):
        return "embedding_bag"
    return "grouped_mm" if rank == 3 else "linear"


def _local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter; there are no DTensors before their module is imported."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not isinstance(parameter, tensors.DTensor):
        return parameter
    placed: Any = parameter
    with torch.no_grad():
        return placed.to_local()


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local` in the place of what this rank holds of `parameter`."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not isinstance(parameter, tensors.DTensor):
        return local
    placed: Any = parameter
    return tensors.DTensor.from_local(
        local, placed.device_mesh, placed.placements, run_check=False, shape=placed.shape, stride=placed.stride()
    )


def _gathered(model: nn.Module) -> set[int]:
    """Identities of the parameters that FSDP2 gathers: those of its modules that are DTensors."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    roots = [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    return {id(p) for root in roots for p in root.parameters() if _local(p) is not p}


def _unpacked(parameter: Tensor) -> Tensor:
    packed = _local(parameter)
    assert isinstance(packed, PackedTensor)
    return _like(parameter, packed.unpack())


def _make_portable(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put canonical tensors into a state dict where the module has packed ones."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if isinstance(_local(parameter), PackedTensor) and prefix + name in state:
            state[prefix + name] = _unpacked(parameter)


def _call(module: nn.Module, weight: Tensor) -> Call:
    op = use_of(module, weight.dim())
    local = _local(weight)
    assert isinstance(local, QuantizedTensor)
    *_, n, k = (1, *(weight.shape[local.permutation.index(d)] for d in range(weight.dim())))
    activation = None if op.startswith("embedding") else local.activation
    return Call(op, local.format, activation, local.device.type, local.dtype, n, k)


class _Room:
    """What there is of each GPU's memory for plain values; `keeps` says whether any are to be kept."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.left: dict[torch.device, int] = {}

    def refuses(self, weight: Tensor) -> str | None:
        """Why there is no room for the values of a weight, or None; they count as kept then."""
        needed = weight.numel() * weight.dtype.itemsize
        if weight.is_cuda and weight.device not in self.left:
            free, total = torch.cuda.mem_get_info(weight.device)
            self.left[weight.device] = free - total // 10
        left = self.left.get(weight.device, needed)
        if needed > left:
            return f"needs {needed >> 20} MiB for plain values; {max(left, 0) >> 20} MiB of the GPU's memory are left"
        self.left[weight.device] = left - needed
        return None


def _choose(uses: Sequence[_Use], prefer: Sequence[str], room: _Room) -> tuple[list[Selection], bool]:
    """A kernel for each use of one parameter, and whether the parameter carries it; the op finds it otherwise."""
    selections = [select(use.call, prefer=prefer, keeps=room.keeps) for use in uses]
    kernel = selections[0].kernel
    if kernel.keeps and (reason := room.refuses(_local(getattr(uses[0].module, uses[0].name)))) is not None:
        selections = [select(use.call, prefer=prefer) for use in uses]
        selections = [replace(s, refusals=(Refusal(kernel.name, reason), *s.refusals)) for s in selections]
        kernel = selections[0].kernel
    tables = [selection.call.op == "embedding" for selection in selections]
    if any(tables) and not all(tables):
        kernel = selections[tables.index(False)].kernel
        if kernel.lookup is not None:
            selections = [
                replace(s, kernel=kernel) if table else s for s, table in zip(selections, tables, strict=True)
            ]
    if not uses[0].gathered and all(selection.kernel is kernel for selection in selections):
        return selections, kernel.pack is not None or select(uses[0].call, bound=False).kernel is not kernel
    selections = [select(use.call, prefer=prefer, bound=False) for use in uses]
    for use, selection in zip(uses, selections, strict=True):
        if select(use.call, bound=False).kernel is not selection.kernel:
            raise NoKernelError(
                f"{use.full!r} cannot carry {selection.kernel.name}: parameters that FSDP gathers, and those tied "
                "between ops with a kernel each, cannot; put that backend first for all models by LOWBIT_BACKENDS"
            )
    return selections, False


def _bind_parameter(uses: Sequence[_Use], kernel: str) -> None:
    canonical = getattr(uses[0].module, uses[0].name)
    weight = _local(canonical)
    assert isinstance(weight, QuantizedTensor)
    with torch.no_grad():
        packed = _like(canonical, PackedTensor.from_quantized(weight, kernel))
    parameter = nn.Parameter(packed, requires_grad=False)
    for use in uses:
        setattr(use.module, use.name, parameter)
        if use.module not in _STATE.hooks:
            _STATE.hooks[use.module] = use.module.register_state_dict_post_hook(_make_portable)


def _row(full: str, selection: Selection) -> Binding:
    call, row = selection.call, selection.kernel
    activation = None if call.activation is None else str(call.activation)
    refusals = tuple(str(refusal) for refusal in selection.refusals)
    slower = slower_at(selection)
    return Binding(full, call.op, str(call.format), activation, row.name, row.pack is not None, refusals, slower)
