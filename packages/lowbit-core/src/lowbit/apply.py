"""Carrying a recipe out on a model in memory, and taking it back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowbit.errors import FormatError, RecipeError
from lowbit.numerics import DEFAULT_MODE, ScaleMode
from lowbit.packed import PackedTensor
from lowbit.plan import Plan, plan
from lowbit.recipe import Recipe
from lowbit.tensor import QuantizedTensor, quantize


def quantize_(model: nn.Module, recipe: Recipe, *, mode: ScaleMode = DEFAULT_MODE, min_coverage: float = 0.0) -> Plan:
    """Round `model`'s parameters in place to the formats that `recipe` gives them; returns the plan carried out.

    Only parameters change, and they no longer require gradients: modules stay what they are, and a tied tensor is
    quantized once and stays tied. Old and new weights are in memory together until the last is made, so that a model
    that cannot be quantized as a whole is left exactly as it was.

    Raises:
        RecipeError: as `plan`, or a parameter to quantize is on the meta device or has activations to be calibrated.
        FormatError: a parameter to quantize holds a NaN or an infinity, or the mode is unknown.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    device = next((p.device for p in parameters.values()), "cpu")
    result = plan(model, recipe, device=device, min_coverage=min_coverage)
    # Under its first name, the activation of whichever use of a tied tensor has one: an embedding's has not.
    activations = {row.tied or row.name: row.activation for row in result.rows if row.activation is not None}
    for name, activation in activations.items():
        if activation.scaling != "dynamic":
            raise RecipeError(
                f"{name!r} is to have {activation.scaling} activations ({activation}), whose scales come from "
                "calibration data; use dynamic ones here"
            )
    chosen = [(row, row.format, parameters[row.name]) for row in result.rows if row.action == "quantize"]
    for row, _, parameter in chosen:
        _check_values(row.name, parameter)
    fresh = {
        id(parameter): nn.Parameter(
            quantize(parameter.detach(), fmt, axis=row.k_axis, mode=mode, activation=activations.get(row.name)),
            requires_grad=False,
        )
        for row, fmt, parameter in chosen
        if fmt is not None
    }
    _swap(model, fresh)
    return result


def dequantize_(model: nn.Module) -> None:
    """Put a plain parameter, of the dtype it reads as, in the place of every quantized one; tied ones stay tied.

    A `pre_scale` is multiplied into the weight, which keeps the layer's function; input rounding ends.

    Raises:
        NotPortableError: a weight was packed for a kernel that cannot unpack it; nothing is changed then.
    """
    plain = {
        id(p): nn.Parameter(plain_weight(p.unpack() if isinstance(p, PackedTensor) else p), requires_grad=False)
        for p in model.parameters()
        if isinstance(p, QuantizedTensor | PackedTensor)
    }
    _swap(model, plain)


def _check_values(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise RecipeError(
            f"{name!r} is on the meta device, where it has no values to quantize; load the weights first "
            "(plan() needs none)"
        )
    # Extremes carry a NaN along, and need no mask as large as the weights. Float64 counts by what float32 holds of it.
    if parameter.numel() and not all(bool(x.to(torch.float32).isfinite()) for x in torch.aminmax(parameter.detach())):
        count = int((~parameter.detach().to(torch.float32).isfinite()).sum())
        raise FormatError(
            f"{name!r} holds {count} values that are NaN or beyond float32; repair the weights, or keep the parameter "
            "by an earlier rule without a format"
        )


def plain_weight(weight: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The plain weight of a layer with the same function, but for the rounding of inputs: `pre_scale` is in it."""
    if weight.pre_scale is None:
        return weight.dequantize(dtype).contiguous()
    shape = [1] * weight.dim()
    shape[weight.permutation.index(weight.dim() - 1)] = -1
    values = weight.dequantize(torch.float32) * weight.pre_scale.to(torch.float32).reshape(shape)
    return values.to(dtype or weight.dtype).contiguous()


def _swap(model: nn.Module, fresh: Mapping[int, nn.Parameter]) -> None:
    """Put `fresh[id(p)]` where parameter p is, under all of its names, or change nothing."""
    slots = [
        (model.get_submodule(path), attribute, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        for path, _, attribute in (name.rpartition("."),)
        if id(parameter) in fresh
    ]
    try:
        for owner, attribute, parameter in slots:
            setattr(owner, attribute, fresh[id(parameter)])
    except BaseException:
        for owner, attribute, parameter in slots:
            if getattr(owner, attribute) is not parameter:
                setattr(owner, attribute, parameter)
        raise
