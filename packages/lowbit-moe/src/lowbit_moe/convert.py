"""Modules whose products round their operands: classes are exchanged, parameters, names and hooks stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import QuantizedTensor, RecipeError
from lowbit.recipe import Rule
from lowbit.table import align
from lowbit_moe.experts import swiglu_experts
from lowbit_moe.functional import grouped_mm, linear
from lowbit_moe.gathering import CodesTravel, refuses_gathering
from lowbit_moe.parallel import parallel_swiglu_experts
from lowbit_moe.placement import Placement
from lowbit_moe.recipe import TrainRecipe

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last names of modules that choose experts, which only a rule with their own name converts."""


@dataclass(frozen=True, slots=True)
class TrainRule:
    """How the products of parameters that `match` names are computed; not rounded where `recipe` is None.

    `match` and `modules` are as in `lowbit.Rule`: a name, a glob, or `re:` and a regular expression; class names.

    Raises:
        RecipeError: as `lowbit.Rule`, or there is no recipe of that name.
    """

    match: str
    recipe: TrainRecipe | str | None
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before a model is seen."""
        _ = self.rule
        if self.recipe is not None:
            object.__setattr__(self, "recipe", TrainRecipe.parse(self.recipe))

    @property
    def rule(self) -> Rule:
        """What it matches."""
        return Rule.of(self.match, None, modules=self.modules)


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of one module."""

    name: str
    recipe: TrainRecipe | None
    # Why it is left as it is; None: it is not.
    reason: str | None


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of every linear layer and every module of experts."""

    rows: tuple[Converted, ...]

    def __str__(self) -> str:
        """A line for each."""
        return "\n".join(
            align(
                [
                    {
                        "module": row.name,
                        "products": row.recipe.name if row.recipe else "plain",
                        "why": row.reason or "",
                    }
                    for row in self.rows
                ]
            )
        )


def convert_(
    model: nn.Module, rules: Iterable[TrainRule] | TrainRecipe | str, *, fp8_all_gather: bool = False
) -> Conversion:
    """Let linear layers and experts compute as the first rule says that matches their weight; one recipe: all of them.

    Taken are `nn.Linear`, modules of experts as transformers has them (`gate_up_proj` (E, 2 I, K), `down_proj`
    (E, K, I)) and as torchtitan has them (`w1`, `w3` (E, I, K), `w2` (E, K, I)). Norms, biases and embeddings have no
    products; routers' are rounded only where a rule names them, without a pattern. A recipe that keeps first and last
    layers keeps so many of those that its rules match, a layer being all modules whose names begin alike up to a first
    number. With `fp8_all_gather`, `fully_shard` gathers weights of linear layers as codes, which each rank makes of its
    share.

    Raises:
        RecipeError: a rule matches no parameter of a module that can be converted, such a module has weights that are
            quantized already, or weights by a recipe of a linear layer cannot be gathered as codes; nothing is changed
            then.
    """
    given = [TrainRule("*", rules)] if isinstance(rules, (TrainRecipe, str)) else list(rules)
    found = [(name, module, weights_of(module)) for name, module in model.named_modules()]
    found = [(name, module, weights) for name, module, weights in found if weights]
    chosen: list[tuple[str, nn.Module, TrainRule | None]] = []
    used: set[int] = set()
    for name, module, weights in found:
        winner, classes = None, [cls.__name__ for cls in type(module).__mro__]
        for i, rule in enumerate(given):
            names = [f"{name}.{weight}" if name else weight for weight in weights]
            if any(rule.rule.matches(each, classes) for each in names):
                if winner is None and (rule.rule.exact or not _routes(name)):
                    winner = rule
                used.add(i)
        chosen.append((name, module, winner))
    unmatched = [rule.match for i, rule in enumerate(given) if i not in used]
    if unmatched:
        raise RecipeError(
            f"rules {', '.join(map(repr, unmatched))} match no weight of a linear layer or of experts; there are "
            f"{', '.join(f'{name}.{weights[0]}' for name, _, weights in found) or 'none'}"
        )
    quantized = [name for name, module, rule in chosen if rule is not None and _holds_codes(module)]
    if quantized:
        raise RecipeError(f"{', '.join(quantized)} hold quantized weights; training needs plain ones: dequantize them")
    rows = _rows(chosen)
    taken = [(module, row.recipe) for (_, module, _), row in zip(chosen, rows, strict=True) if row.recipe is not None]
    if fp8_all_gather:
        _gather_codes([(module, recipe) for module, recipe in taken if isinstance(module, nn.Linear)])
    for module, recipe in taken:
        _exchange(module, recipe)
    return Conversion(tuple(rows))


def _gather_codes(linears: list[tuple[nn.Linear, TrainRecipe]]) -> None:
    for _, recipe in linears:
        refuses_gathering(recipe)
    for module, recipe in linears:
        module.register_parameter("weight", CodesTravel.of(module.weight, recipe))


def _rows(chosen: list[tuple[str, nn.Module, TrainRule | None]]) -> list[Converted]:
    layers: dict[TrainRecipe, list[str]] = {}
    for name, _, rule in chosen:
        if rule is not None and isinstance(rule.recipe, TrainRecipe):
            layers.setdefault(rule.recipe, []).append(_layer(name))
    kept: set[tuple[TrainRecipe, str]] = set()
    for recipe, names in layers.items():
        order = list(dict.fromkeys(names))
        last = max(0, len(order) - recipe.keep_last)
        kept |= {(recipe, name) for name in (*order[: recipe.keep_first], *order[last:])}
    rows: list[Converted] = []
    for name, _, rule in chosen:
        reason = None
        if rule is None:
            reason = "a router, which no rule names" if _routes(name) else "no rule matches it"
        elif rule.recipe is None:
            reason = f"rule {rule.match!r} keeps it"
        elif (rule.recipe, _layer(name)) in kept:
            reason = "the recipe keeps the first and the last layer"
        recipe = rule.recipe if rule is not None and reason is None and isinstance(rule.recipe, TrainRecipe) else None
        rows.append(Converted(name, recipe, reason))
    return rows


def _layer(name: str) -> str:
    """What modules of one layer have in common: `model.layers.3` of `model.layers.3.mlp.down_proj`."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _routes(name: str) -> bool:
    return any(part in ROUTERS for part in name.split(".")[-2:])


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of a module whose products can be rounded; () of others."""
    if isinstance(module, nn.Linear):
        return ("weight",)
    for names in (("gate_up_proj", "down_proj"), ("w1", "w2", "w3")):
        parts = [getattr(module, name, None) for name in names]
        if all(isinstance(part, Tensor) and part.dim() == 3 for part in parts):
            return names
    return ()


def _holds_codes(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name).data, QuantizedTensor) for name in weights_of(module))


def _exchange(module: nn.Module, recipe: TrainRecipe) -> None:
    layer: Any = module
    layer.train_recipe = recipe
    if isinstance(module, TrainedModule):
        return
    if isinstance(module, nn.Linear):
        how: type[TrainedModule] = TrainedLinear
    else:
        how = TrainedExperts if hasattr(module, "gate_up_proj") else TrainedGroupedExperts
    cls = type(module)
    layer.__class__ = (
        how if cls is nn.Linear else type(f"Trained{cls.__name__}", (how, cls), {"__module__": cls.__module__})
    )


class TrainedModule(nn.Module):
    """A module whose products `train_recipe` rounds the operands of."""

    train_recipe: TrainRecipe

    def extra_repr(self) -> str:
        """The module's own, and the recipe."""
        own = super().extra_repr()
        return f"{own}, recipe={self.train_recipe.name}" if own else f"recipe={self.train_recipe.name}"


class TrainedLinear(TrainedModule, nn.Linear):
    """`nn.Linear` by a recipe."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear has it
        """See `lowbit_moe.linear`."""
        return linear(input, self.weight, self.bias, self.train_recipe)


class TrainedExperts(TrainedModule):
    """Experts as transformers has them, by a recipe."""

    gate_up_proj: Tensor
    down_proj: Tensor
    # Where `shard_experts_` put the experts, and how rows travel to them; None: all are here.
    placement: Placement | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `lowbit_moe.swiglu_experts`."""
        own: Any = self
        names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        parts: list[Any] = [getattr(own, name, None) for name in names]
        if self.placement is not None:
            parts = [None if part is None else self.placement.local(part) for part in parts]
        gate_up, down, gate_up_bias, down_bias = parts
        if getattr(own, "is_transposed", False):
            gate_up, down = gate_up.mT, down.mT
        how: dict[str, Any] = {"gate_up_bias": gate_up_bias, "down_bias": down_bias, "act": own.act_fn}
        how["apply_gate"] = own._apply_gate if hasattr(own, "_apply_gate") else None  # noqa: SLF001 - how its classes differ
        given = hidden_states, top_k_index, top_k_weights, gate_up, down
        if self.placement is None:
            return swiglu_experts(*given, recipe=self.train_recipe, **how)
        group, payload = self.placement.group, self.placement.payload
        return parallel_swiglu_experts(*given, group=group, payload=payload, recipe=self.train_recipe, **how)


class TrainedGroupedExperts(TrainedModule):
    """Experts as torchtitan has them, by a recipe: rows that are in the order of experts already."""

    w1: Tensor
    w2: Tensor
    w3: Tensor

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """`w2 @ (silu(w1 @ x) * (w3 @ x))` of each row's expert; rows beyond the last become zeros."""
        offs, how = num_tokens_per_expert.cumsum(0, dtype=torch.int32), self.train_recipe
        gate, up = (grouped_mm(x, weight, offs, recipe=how) for weight in (self.w1, self.w3))
        return grouped_mm(nn.functional.silu(gate) * up, self.w2, offs, recipe=how)
