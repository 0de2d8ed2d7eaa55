"""Experts of a converted model, divided among ranks."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowbit import RecipeError
from lowbit.format import Format
from lowbit_moe.convert import TrainedExperts
from lowbit_moe.exchange import payload_of
from lowbit_moe.placement import Placement


def shard_experts_(model: nn.Module, mesh: Any, *, payload: Format | str | None = "MXFP8") -> list[str]:
    """Leave each rank of a one-dimensional `mesh` its share of the experts that `convert_` took; names of the modules.

    Parameters (E, ..) become DTensors `Shard(0)`, of which rank r has experts `r E / R` and on, and rows travel to them
    in the format `payload`: see `parallel_swiglu_experts`. Every rank calls it with the same weights, before
    `fully_shard` is given the rest of the model, with these parameters as `ignored_params`; their gradients are those
    of the mean of the ranks' losses, as `fully_shard` has them.

    Raises:
        RecipeError: there are no such experts, or their number is no multiple of that of the ranks; nothing is changed
            then.
        FormatError: the payload has blocks of several rows, a tensor scale, or zero points.
    """
    from torch.distributed.tensor import Shard, distribute_tensor  # noqa: PLC0415 - takes a second to import

    placement = Placement(mesh, payload_of(payload))
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, TrainedExperts)]
    if not found:
        raise RecipeError("no module of experts was converted; give convert_ rules that match some first")
    for name, module in found:
        experts = len(module.gate_up_proj)
        if mesh.ndim != 1 or experts % mesh.size():
            raise RecipeError(
                f"{name} has {experts} experts for a mesh {tuple(mesh.shape)}; needed is one dimension, of which the "
                "number of experts is a multiple"
            )
    for _, module in found:
        for name, parameter in list(module.named_parameters(recurse=False)):
            share = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(share, requires_grad=parameter.requires_grad))
        module.placement = placement
    return [name for name, _ in found]
