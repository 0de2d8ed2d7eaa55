"""Where numbers stop being finite, and how many rounding loses: looked at by hooks, which cost nothing when off."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import LowbitError
from lowbit.format import Format
from lowbit_moe.convert import TrainedModule
from lowbit_moe.operands import Operand, Rounded


class NonFiniteError(LowbitError):
    """An activation or a gradient has a number that is not finite, and its scale would be none."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Shares of numbers that are not 0, of one operand: what rounds to 0, and what is rounded to the largest code."""

    underflow: float
    overflow: float


@dataclass
class Watch:
    """What was seen: by a module's name, of its input, its weight and the gradient of its output, of the last call."""

    lost: dict[str, dict[str, Lost]] = field(default_factory=dict[str, dict[str, Lost]])


@contextmanager
def watch(model: nn.Module, *, rates: bool = False) -> Generator[Watch]:
    """Look at what modules of `model` give within, and at gradients of that, and name the first that is not finite.

    With `rates`, what each layer that rounds loses is measured, too. Every module waits for the device then, and what
    `torch.compile` compiled before is not looked at.

    Raises:
        NonFiniteError: an activation or a gradient of one is not finite, at the module that it is first seen at.
    """
    seen, handles = Watch(), list[Any]()
    for name, module in model.named_modules():
        if not any(True for _ in module.children()) or isinstance(module, TrainedModule):
            handles.append(module.register_forward_hook(partial(_forward, seen, name, rates)))
            handles.append(module.register_full_backward_pre_hook(partial(_backward, seen, name, rates)))
            for parameter, weight in module.named_parameters(recurse=False):
                if weight.requires_grad:
                    handles.append(
                        weight.register_post_accumulate_grad_hook(partial(_learned, name, module, parameter))
                    )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _forward(seen: Watch, name: str, rates: bool, module: nn.Module, given: tuple[Any, ...], out: Any) -> None:  # noqa: FBT001 - a hook's arguments
    for what, tensors in (("input", given), ("output", out)):
        _check(name, module, what, tensors)
    if rates and isinstance(module, TrainedModule) and module.train_recipe.forward is not None:
        recipe, how = module.train_recipe, module.train_recipe.forward
        with torch.no_grad():
            found = {"input": _lost(given[0], how.left, how.align, recipe.mode)}
            for parameter, weight in module.named_parameters(recurse=False):
                if weight.dim() > 1 and "bias" not in parameter:
                    found[parameter] = _lost(weight, how.right, how.align, recipe.mode)
        seen.lost.setdefault(name, {}).update(found)


def _learned(name: str, module: nn.Module, parameter: str, weight: Tensor) -> None:
    _check(name, module, f"gradient of {parameter}", weight.grad)


def _backward(seen: Watch, name: str, rates: bool, module: nn.Module, to_output: Any) -> None:  # noqa: FBT001 - a hook's arguments
    _check(name, module, "gradient of the output", to_output)
    if rates and isinstance(module, TrainedModule) and module.train_recipe.dgrad is not None:
        recipe, how = module.train_recipe, module.train_recipe.dgrad
        with torch.no_grad():
            found = _lost(to_output[0], how.left, how.align, recipe.mode)
        seen.lost.setdefault(name, {})["gradient"] = found


def _check(name: str, module: nn.Module, what: str, tensors: Any) -> None:
    for tensor in _tensors(tensors):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} of {tensor.numel()} numbers of the {what} of {name or 'the model'} ({type(module).__name__}), "
                f"shape {tuple(tensor.shape)}, are not finite, and none before was; look at what it was given, or "
                "train this module in BF16"
            )


def _tensors(values: Any) -> Iterable[Tensor]:
    each = values if isinstance(values, (tuple, list)) else (values,)
    return (value for value in each if isinstance(value, Tensor) and value.dtype.is_floating_point)


def _lost(x: Tensor, fmt: Format, align: int, mode: Any) -> Lost:
    rows = x.reshape(-1, x.shape[-1]) if x.dim() < 3 else x
    operand: Operand = Rounded(mode).along(rows, fmt, align)
    values = operand.values(torch.float32)[..., : rows.shape[-2], : rows.shape[-1]]
    given = rows.to(torch.float32)
    there = given != 0
    count = max(int(there.sum()), 1)
    # What scales leave out of codes' range is rounded to its end: farther off than half of the last step.
    beyond = (given.abs() > values.abs() * (1 + 2.0 ** -(fmt.element.mantissa + 1))) & (values != 0)
    return Lost(int((there & (values == 0)).sum()) / count, int(beyond.sum()) / count)
