"""Models that were trained in low precision, as quantized ones: weights in the codes that their products had."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowbit import Activation, FormatError, QuantizedTensor, RecipeError, quantize
from lowbit.numerics import DEFAULT_MODE, ScaleMode
from lowbit_moe.convert import TrainedModule, convert_, weights_of
from lowbit_moe.recipe import TrainRecipe


def to_serving(
    model: nn.Module, recipe: TrainRecipe | str | None = None, *, mode: ScaleMode | None = None
) -> nn.Module:
    """Put QuantizedTensors in the place of weights whose products are rounded, and give `model` back.

    Their codes and scales are those that training multiplied by, and inputs will be rounded as in training, too, so
    that the model computes what it did, but for the order of sums. Modules become what they were before `convert_`.
    With a `recipe` the model is converted by it first, such as one read from a checkpoint. Modules that share a weight
    with one of these but do not round it, such as an embedding with the head, keep it as it is. `mode` is how scales of
    inputs that are powers of two are chosen; by default as the recipe does, which only lowbit's own layout can say:
    "even" is what engines do that read other layouts.

    Raises:
        RecipeError: nothing in it is rounded, what is summed over is no multiple of a block, or parameters are divided
            among ranks; no weight is changed then.
    """
    if recipe is not None:
        convert_(model, recipe)
    trained = [(name, module) for name, module in model.named_modules() if isinstance(module, TrainedModule)]
    rounding = [(name, module) for name, module in trained if module.train_recipe.forward is not None]
    if not rounding:
        raise RecipeError(
            "no module of the model rounds its products; convert_ it, or give the recipe it was trained by"
        )
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    placed = [name for name, p in model.named_parameters() if tensors is not None and isinstance(p, tensors.DTensor)]
    if placed:
        raise RecipeError(f"{', '.join(placed[:3])}, ... are divided among ranks; gather them into one model first")
    fresh = _fresh(rounding, mode)
    for _, module in rounding:
        for part in weights_of(module):
            module.register_parameter(part, fresh[getattr(module, part)])
    for _, module in trained:
        own: Any = module
        del own.train_recipe
        own.__class__ = next(cls for cls in type(module).__mro__ if not issubclass(cls, TrainedModule))
    return model


def _fresh(rounding: list[tuple[str, TrainedModule]], mode: ScaleMode | None) -> dict[torch.Tensor, nn.Parameter]:
    """What takes the place of each weight."""
    fresh: dict[torch.Tensor, nn.Parameter] = {}
    for name, module in rounding:
        for weight in (getattr(module, part) for part in weights_of(module)):
            if weight not in fresh:
                axis = -2 if getattr(module, "is_transposed", False) else -1
                try:
                    rounded = _rounded(weight.detach(), module.train_recipe, axis, mode)
                except FormatError as error:
                    raise RecipeError(f"{name or 'the model'} can be trained so, but not stored: {error}") from error
                fresh[weight] = nn.Parameter(rounded, requires_grad=False)
    return fresh


def _rounded(weight: torch.Tensor, recipe: TrainRecipe, axis: int, mode: ScaleMode | None) -> QuantizedTensor:
    assert recipe.forward is not None
    inputs = Activation(recipe.forward.left)
    if inputs.format.scale.powers_of_two:
        inputs = replace(inputs, mode=mode or recipe.mode)
    inputs.format.block_of((1, weight.shape[axis]))
    how = recipe.mode if recipe.forward.right.scale.powers_of_two else DEFAULT_MODE
    return quantize(weight, recipe.forward.right, axis=axis, mode=how, activation=inputs)
