"""Plain weights that are quantized as transformers loads them, one parameter at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from lowbit.errors import RecipeError
from lowbit.plan import Row, parameters_of, plan
from lowbit.recipe import Recipe, Rule
from lowbit.tensor import quantize
from lowbit_hf.job import ROUTER
from lowbit_hf.layouts.lowbit import read_rules
from lowbit_hf.schemes import Scheme, scheme
from lowbit_hf.skeleton import LINEAR, Skeleton

if TYPE_CHECKING:
    from lowbit_hf.quantizer import LowbitConfig


class Rounded:
    """What becomes of the parameters of a plain model."""

    def __init__(self, model: PreTrainedModel, config: LowbitConfig) -> None:
        """Decide for every parameter.

        Raises:
            RecipeError: the config says nothing, or it cannot be done; or inputs need calibration data.
        """
        if config.scheme is None and config.rules is None:
            raise RecipeError("LowbitConfig says not how to quantize a plain model; give a scheme or a recipe")
        recipe = read_rules(config.to_dict()) if config.scheme is None else _recipe(model, scheme(config.scheme))
        # Nothing is tied yet.
        tied = model.all_tied_weights_keys
        planned = plan([replace(p, tied=tied.get(p.name)) for p in parameters_of(model)], recipe).rows
        # Under its first name, the activation of whichever use of a tied tensor has one: an embedding's has not.
        inputs = {row.tied or row.name: row.activation for row in planned if row.activation is not None}
        for name, activation in inputs.items():
            if activation.scaling != "dynamic":
                raise RecipeError(
                    f"{name!r} is to have {activation.scaling} activations ({activation}), whose scale only data "
                    "tells; use lowbit quantize with --calibrate, or dynamic ones"
                )
        chosen = {
            row.name: replace(row, activation=inputs.get(row.name)) for row in planned if row.action == "quantize"
        }
        # Of tied tensors, a file may have either.
        self.rows: dict[str, Row] = {
            row.name: chosen[row.tied or row.name] for row in planned if row.action != "keep" and row.format is not None
        }
        # Told once transformers is done: amid its loading, an error would lose its words.
        self.nonfinite: list[str] = []
        self.operation = Round(self)


class Round(ConversionOps):
    """Quantizes parameters."""

    def __init__(self, rounded: Rounded) -> None:
        """Keep what is decided."""
        self._rounded = rounded

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **options: Any
    ) -> dict[str, Any]:
        """Parameters by name, those that are to be low-bit quantized."""
        del source_patterns, target_patterns, options
        made: dict[str, Any] = {}
        for name, given in input_dict.items():
            tensor: Tensor = given[0] if isinstance(given, list) else given
            row = self._rounded.rows.get(name)
            if row is None or row.format is None:
                made[name] = tensor
                continue
            if not bool(tensor.isfinite().all()):
                self._rounded.nonfinite.append(name)
            made[name] = quantize(tensor, row.format, axis=row.k_axis, activation=row.activation)
        return made


def _recipe(model: PreTrainedModel, scheme: Scheme) -> Recipe:
    """Rules for what a scheme speaks of: linear layers and experts, but for the output head and routers."""
    head = f"{Skeleton(model.config, model).output_embedding}.weight"
    rules: list[Rule] = []
    fmt = scheme.weight_format(model.dtype)
    for prefix, module in model.named_modules():
        classes = {cls.__name__ for cls in type(module).__mro__}
        for local, parameter in module.named_parameters(prefix, recurse=False):
            stacked = parameter.dim() == 3 and hasattr(module, "is_transposed")
            linear = not classes.isdisjoint(LINEAR) and local.endswith(".weight")
            if (stacked or linear) and local != head and not ROUTER.search(local):
                turned = "Conv1D" in classes or (stacked and bool(module.is_transposed))
                rules.append(Rule(local, fmt, scheme.activation, -2 if turned else -1))
    return Recipe((*rules, Rule("*", None)))
