"""AdamW whose means of gradients are of 8 or 4 bits: in the place of `torch.optim.AdamW`, with what that saved, too."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit import FormatError, NoKernelError
from lowbit.backends import Call, Kernel, select
from lowbit.numerics import Rounding, check_choice
from lowbit_moe.states import BLOCKS, Bits, Item, decode, encode, narrow, step_in_torch, tables

# Rows that are shorter, and vectors, keep float32 states: a scale for few numbers saves nothing.
_LEAST = 64
_MEANS = (("exp_avg", True), ("exp_avg_sq", False))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdamW(Optimizer):
    """AdamW with states of `bits` a number, 8, 4 or 32; arguments and defaults are those of `torch.optim.AdamW`.

    The two means of a parameter of at least two dimensions are codes with a scale for 256 numbers (of 4 bits: 128) of
    what lies under one index of its first dimension; so ranks that have a share of those indices each, as of
    `fully_shard`, have the states that one alone would. Vectors, and matrices of fewer than 64 columns, have float32
    ones. A bfloat16 parameter is rounded by chance, or to "nearest" as torch does, by which small steps are lost. What
    is drawn depends on `seed`, the step and the parameter's place alone, so replicas stay replicas.

    On a GPU a step is one launch for all parameters of a dtype, and may be part of a CUDA graph. `load_state_dict`
    takes what an optimizer of any width has saved, torch's too, and one of 32 bits saves what torch's takes.

    Raises:
        FormatError: an option is out of its range, or one of torch's that this has not (amsgrad, differentiable).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,  # noqa: FBT001, FBT002 - where torch has it
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bits: Bits = 8,
        rounding: Rounding = "stochastic",
        seed: int = 0,
    ) -> None:
        """Take parameters, or groups of them with options of their own."""
        # How torch's would run; here is one way to.
        del foreach, capturable, fused
        if amsgrad or differentiable:
            raise FormatError(
                "AdamW with states of few bits has no amsgrad and is not differentiable; leave both False"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "bits": bits,
            "rounding": rounding,
            "seed": seed,
        }
        self._ready: dict[int, _Ready] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, or copy."""
        super().__setstate__(state)
        self._ready = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch's.

        Raises:
            FormatError: as the class.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except FormatError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's has overloads
        """Change every parameter that has a gradient; returns what `closure`, called first, gives.

        Raises:
            FormatError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for i, group in enumerate(self.param_groups):
            ready = self._ready.setdefault(i, _Ready())
            ready.step(self, group, number)
            number += len(group["params"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what this class, of any width, or `torch.optim.AdamW` has saved; widths and rounding stay this one's.

        Raises:
            FormatError: it is of another optimizer, or of another division of parameters among ranks.
        """
        saved: dict[Any, dict[str, Any]] = state_dict["state"]
        own = [{name: group[name] for name in ("bits", "rounding", "seed")} for group in self.param_groups]
        ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        params: list[Tensor] = list(chain.from_iterable(group["params"] for group in self.param_groups))
        widths = [group["bits"] for group in self.param_groups for _ in group["params"]]
        # Before anything is changed; of another count torch tells.
        pairs = zip(ids, params, widths, strict=True) if len(ids) == len(params) else ()
        states = {p: _taken(saved[name], p, bits) for name, p, bits in pairs if name in saved}
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        self._ready = {}


class _Ready:
    """What a step of a group takes, kept while parameters, gradients and states lie where they did."""

    def __init__(self) -> None:
        self.key: list[Any] = []
        self.steps: list[Tensor] = []
        self.runs: list[tuple[Callable[..., None], list[Item], int]] = []
        # Parameters that have gaps, and what stands for them.
        self.copies: list[tuple[Tensor, Tensor]] = []

    def step(self, optimizer: AdamW, group: dict[str, Any], number: int) -> None:
        pairs = [(_local(p), _local(p.grad), p, i) for i, p in enumerate(group["params"]) if p.grad is not None]
        sparse = [number + i for _, g, _, i in pairs if g.layout != torch.strided]
        if sparse:
            raise FormatError(f"parameters {sparse} have sparse gradients; AdamW takes dense ones")
        gaps = any(not x.is_contiguous() for p, g, _, _ in pairs for x in (p, g))
        if gaps or self._found(optimizer, pairs) != self.key:
            self._prepare(optimizer, pairs, group["bits"], number)
            self.key = self._found(optimizer, pairs)
        if self.steps:
            torch._foreach_add_(self.steps, 1)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] - its documented name
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize", "seed")}
        for run, items, bits in self.runs:
            run(items, **options, bits=bits, stochastic=group["rounding"] == "stochastic")
        for mine, copy in self.copies:
            mine.copy_(copy)

    @staticmethod
    def _found(optimizer: AdamW, pairs: list[tuple[Tensor, Tensor, Tensor, int]]) -> list[Any]:
        """Where everything lies."""
        return [
            (p.data_ptr(), p.dtype, g.data_ptr(), g.dtype, id(optimizer.state[whole].get("exp_avg")))
            for p, g, whole, _ in pairs
        ]

    def _prepare(
        self, optimizer: AdamW, pairs: list[tuple[Tensor, Tensor, Tensor, int]], bits: int, number: int
    ) -> None:
        self.steps, self.copies = [], []
        found: dict[tuple[torch.device, int], list[Item]] = {}
        for p, g, whole, i in pairs:
            state: dict[str, Any] = optimizer.state[whole]
            if not state:
                state.update(_begun(whole, bits))
            mine = p if p.is_contiguous() else p.contiguous()
            if mine is not p:
                self.copies.append((p, mine))
            size, parts = narrow(p.shape), {name: _local(part) for name, part in state.items()}
            self.steps.append(state["step"])
            if p.numel():
                width = bits if "exp_avg_scale" in parts else 32
                rows = (size[0], -1)
                item = Item(
                    *(mine.view(size), g.contiguous().view(size), parts["step"]),
                    *(parts["exp_avg"].view(rows), parts.get("exp_avg_scale")),
                    *(parts["exp_avg_sq"].view(rows), parts.get("exp_avg_sq_scale"), number + i),
                )
                found.setdefault((p.device, width), []).append(item)
        self.runs = [(_stepper(device.type, width), items, width) for (device, width), items in found.items()]


def _stepper(device: str, bits: int) -> Callable[..., None]:
    """A backend's kernel for the device, with a memory of these addresses, or the step in torch."""
    kernel = kernel_for_steps(device)
    if kernel is None:
        return step_in_torch
    return partial(kernel.run, {}, block=BLOCKS[bits], values=tables(bits))


@cache
def kernel_for_steps(device: str) -> Kernel | None:
    """A backend's kernel of the op `moe.adamw`, if there is one for devices of that type.

    It takes a dictionary to keep things in, what `step_in_torch` takes, of how many numbers there is a scale, and what
    codes of both means stand for.
    """
    try:
        return select(Call("moe.adamw", None, None, device, torch.float32)).kernel
    except NoKernelError:
        return None


def _check(group: dict[str, Any]) -> None:
    """Refuse options out of range, before there are states."""
    check_choice("rounding of parameters", group["rounding"], Rounding)
    for name, fits, needed in (
        ("bits", group["bits"] in BLOCKS, "8, 4 or 32"),
        ("lr", float(group["lr"]) >= 0, "at least 0"),
        ("betas", all(0 <= beta < 1 for beta in group["betas"]), "each at least 0 and less than 1"),
        ("eps", group["eps"] >= 0, "at least 0"),
        ("weight_decay", group["weight_decay"] >= 0, "at least 0"),
    ):
        if not fits:
            raise FormatError(f"{name}={group[name]}; needed is {needed}")
    wrong = {p.dtype for p in group["params"]} - set(_DTYPES)
    if wrong:
        raise FormatError(
            f"parameters of AdamW are float32, bfloat16 or float16; these are {', '.join(map(str, wrong))}"
        )


def _tensors(x: Any) -> Any:
    """Torch's module of DTensors if x is one; there are none before it is imported."""
    found = sys.modules.get("torch.distributed.tensor")
    return None if found is None or not isinstance(x, found.DTensor) else found


def _local(x: Any) -> Any:
    """What this rank holds."""
    return x if _tensors(x) is None else x.to_local()


def _width(p: Tensor, bits: int) -> int:
    return bits if p.dim() > 1 and narrow(p.shape)[1] >= _LEAST else 32


def _begun(p: Tensor, bits: int) -> dict[str, Tensor]:
    """States of zeros."""
    local = _local(p)
    rows, columns = narrow(local.shape)
    state = {"step": torch.zeros((), dtype=torch.float32, device=local.device)}
    for name, _ in _MEANS:
        if _width(local, bits) == 32:
            state[name] = _like(p, torch.zeros_like(local, dtype=torch.float32, memory_format=torch.contiguous_format))
            continue
        codes = local.shape if bits == 8 else (rows, -(-columns // 2))
        state[name] = _like(p, torch.zeros(codes, dtype=torch.uint8, device=local.device))
        scales = rows, -(-columns // BLOCKS[bits])
        state[f"{name}_scale"] = _like(p, torch.zeros(scales, dtype=torch.float32, device=local.device))
    return state


def _like(p: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's part, divided as p is; what is under an index of p's first dimension is one dimension."""
    tensors = _tensors(p)
    if tensors is None:
        return local
    placed: Any = p
    shape, placements = list(p.shape), list(placed.placements)
    if local.shape != placed.to_local().shape:
        placements = [tensors.Shard(min(at.dim, 1)) if isinstance(at, tensors.Shard) else at for at in placements]
        parts = (size for size, at in zip(placed.device_mesh.shape, placements, strict=True) if at.is_shard(1))
        shape = [p.shape[0], local.shape[1] * math.prod(parts)]
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tensors.DTensor.from_local(
        local, placed.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def _taken(saved: dict[str, Any], p: Tensor, bits: int) -> dict[str, Tensor]:
    """Saved states, of any width, as this parameter has them."""
    if "exp_avg" not in saved or "exp_avg_sq" not in saved or "max_exp_avg_sq" in saved:
        raise FormatError(
            f"saved states have {', '.join(map(repr, saved))}; needed are those of AdamW, exp_avg and exp_avg_sq, "
            "without amsgrad's"
        )
    local = _local(p)
    rows, columns = narrow(local.shape)
    width = _width(local, bits)
    state = {"step": torch.as_tensor(saved["step"], dtype=torch.float32).to(local.device, copy=True)}
    for name, signed in _MEANS:
        found, scale = (_local(saved.get(key)) for key in (name, f"{name}_scale"))
        had = 32 if scale is None else 8 if found.numel() == local.numel() else 4
        expected = {32: local.numel(), 8: local.numel(), 4: rows * -(-columns // 2)}[had]
        if found.numel() != expected or (scale is not None and scale.shape != (rows, -(-columns // BLOCKS[had]))):
            raise FormatError(
                f"{name} of a parameter {tuple(local.shape)} was saved as {tuple(found.shape)} with scales "
                f"{None if scale is None else tuple(scale.shape)}; load it where parameters are divided among ranks as "
                "they were, or save the states of 32 bits"
            )
        codes = found.to(local.device).reshape(rows, -1)
        scale = None if scale is None else scale.to(local.device, copy=True)
        if had == width:
            new = (codes.clone(), scale)
        else:
            x = codes.to(torch.float32) if scale is None else decode(codes, scale, columns, had, signed=signed)
            new = (x.clone(), None) if width == 32 else encode(x, width, signed=signed)
        whole = new[0].view(local.shape) if width != 4 else new[0]
        state[name] = _like(p, whole.to(torch.float32) if width == 32 else whole)
        if new[1] is not None:
            state[f"{name}_scale"] = _like(p, new[1])
    return state
