"""Quantizing a model block by block, by what its blocks are fed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit import QuantizedTensor, RecipeError, quantize
from lowbit.hadamard import Rotation
from lowbit.plan import Plan, plan
from lowbit.recipe import Recipe
from lowbit_algos.blocks import Batch, capture, few_tokens, find_blocks
from lowbit_algos.distilled import distill, log_probabilities
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Target
from lowbit_algos.method import Method
from lowbit_algos.rotation import Ends, find_ends
from lowbit_algos.rounding import with_use
from lowbit_algos.walk import BlockResult, Take, Walk, prefix_of


def calibrate_(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Batch],
    method: Method | None = None,
    *,
    take: Take | None = None,
) -> Plan:
    """Quantize `model`'s parameters in place as `recipe` says, by what `batches` make of them; returns the plan.

    A batch is what the model is called with: a tensor, or arguments by name. Weights outside the model's blocks are
    rounded to nearest. A model that cannot be quantized as a whole is left as it was. `take` is told of every block.

    Raises:
        RecipeError: as `plan`, or a weight outside the blocks is to have static activations.
        LowbitError: the model's blocks do not feed one another, a weight to quantize is never multiplied with, or
            values are not finite.
    """
    method = method or Method()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = plan(model, recipe, device=next((p.device for p in parameters.values()), "cpu"))
    targets = {
        row.name: Target(row.format, row.activation, row.k_axis)
        for row in result.rows
        if row.action == "quantize" and row.format is not None
    }
    done, ends = quantize_blocks(model, targets, batches, method, take)
    _put(model, parameters, done, apart=() if ends is None else ends.names)
    return result


def quantize_blocks(
    model: nn.Module, targets: Mapping[str, Target], batches: Iterable[Batch], method: Method, take: Take | None = None
) -> tuple[dict[str, Tensor], Ends | None]:
    """What becomes of a model's parameters, by name, and what lies around its blocks if it is rotated; it stays.

    `take` is told of every block. Raises as `calibrate_`.
    """
    batches, blocks = list(batches), find_blocks(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if method.distilled and batches:
        # Refused before any work.
        with torch.no_grad():
            log_probabilities(model, few_tokens(batches[0]))
    ends = find_ends(model, blocks) if method.rotation else None
    rotation, done = None, dict[str, Tensor]()
    if ends is not None:
        rotation = Rotation(parameters[ends.embedding].shape[-1])
        norm = parameters[ends.norm].detach()
        done = {name: ends.turned(name, parameters[name].detach(), rotation, norm) for name in ends.names}
    done |= {
        name: round_outside(name, done.get(name, parameters[name]), targets[name], method)
        for name in outside(targets, blocks)
    }
    told: list[tuple[BlockResult, Mapping[str, Tensor]]] = []
    tell = take or _ignore

    def keep(block: BlockResult, weights: Mapping[str, Tensor]) -> None:
        done.update(weights)
        if method.distilled:
            told.append((block, weights))
        else:
            tell(block, weights)

    # Blocks are changed as they go; what they were comes back whatever happens.
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        captured = capture(model, blocks, batches, probe=method.probes)
        walk = Walk(method, Hidden.of(captured.turned(rotation)), rotation)
        for k, (name, block) in enumerate(blocks.items()):
            walk.step(name, block, targets, captured.calls[k], keep, probe=captured.probe(k, block))
    finally:
        for name, data in before.items():
            parameters[name].data = data
    if method.distilled:
        del captured
        learned = distill(model, done, walk.aims, batches, steps=method.distilled)
        done |= learned.weights
        note = (
            f"distilled: {learned.before:.4g} -> {learned.after:.4g} nats a token on held out text; SQNR is of before"
        )
        for block, weights in told:
            layers = tuple(replace(layer, notes=(*layer.notes, note)) for layer in block.layers)
            tell(replace(block, layers=layers), {name: done[name] for name in weights})
    return done, ends


def _ignore(block: BlockResult, weights: Mapping[str, Tensor]) -> None:
    """Where nobody wants to be told."""
    del block, weights


def _put(model: nn.Module, parameters: Mapping[str, Tensor], made: Mapping[str, Tensor], apart: Sequence[str]) -> None:
    """Give a model what became of its parameters; those that modules share stay one, but for those named `apart`."""
    fresh: dict[int, nn.Parameter] = {}
    for name, weight in made.items():
        if name in apart:
            _set(model, name, nn.Parameter(weight, requires_grad=False))
        elif isinstance(weight, QuantizedTensor):
            fresh[id(parameters[name])] = nn.Parameter(weight, requires_grad=False)
        else:
            parameters[name].data = weight
    for name, parameter in parameters.items():
        if id(parameter) in fresh and name not in apart:
            _set(model, name, fresh[id(parameter)])
    config = getattr(model, "config", None)
    if apart and getattr(config, "tie_word_embeddings", False):
        # Or it would be saved, and loaded, with one tensor for both.
        setattr(config, "tie_word_embeddings", False)  # noqa: B010 - of a config whose class is not known here


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)


def outside(targets: Iterable[str], blocks: Iterable[str]) -> list[str]:
    """Those of the names that belong to no block."""
    prefixes = tuple(prefix_of(block) for block in blocks)
    return [name for name in targets if not name.startswith(prefixes)]


def round_outside(name: str, weight: Tensor, target: Target, method: Method) -> QuantizedTensor:
    """A weight whose inputs are not observed, rounded to nearest.

    Raises:
        RecipeError: its activation has a range that only observation gives.
    """
    if target.activation is not None and target.activation.scaling != "dynamic":
        raise RecipeError(
            f"{name!r} lies outside the model's blocks, where inputs are not observed, and is to have "
            f"{target.activation.scaling} activations; keep it, or use dynamic ones"
        )
    q = quantize(weight, target.format, axis=target.k_axis, mode=method.mode)
    return with_use(q, target.activation)
