"""Stacks of experts: one parameter of a model for a projection of all experts, and what it is as a matrix for each.

Models differ in how a stack lies: (E, N, K) or transposed, (E, K, N), with gate and up one after the other or row by
row in turn. Files may hold the stack (gpt-oss, Llama 4) or a matrix (N, K) for each expert, as compressed-tensors does:

    experts.gate_up_proj    experts.0.gate_proj.weight, experts.0.up_proj.weight, experts.1.gate_proj.weight, ...
    experts.down_proj       experts.0.down_proj.weight, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from lowbit.errors import FormatError
from lowbit.tensor import QuantizedTensor

PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""Last names of stacks, and of the projections that each holds."""

# Of the experts that transformers does not describe, those that are (E, K, N), gate before up.
_TRANSPOSED = frozenset({"Llama4TextExperts"})


@dataclass(frozen=True, slots=True)
class Stack:
    """How a stack holds the matrices of its experts."""

    # Last names of the projections whose rows it holds.
    projections: tuple[str, ...]
    # Whether an expert is (K, N) in it.
    transposed: bool
    # Whether rows of the projections take turns; otherwise one comes after the other.
    interleaved: bool

    def parts(self, module: str, expert: int) -> list[str]:
        """What the matrices of an expert of `module` are called where each is a tensor of its own."""
        return [f"{module}.{expert}.{projection}.weight" for projection in self.projections]

    def modules(self, name: str) -> str:
        """The expression that the modules of all matrices of the stack called `name` match, and nothing else."""
        module, several = re.escape(name.rpartition(".")[0]), len(self.projections) > 1
        last = "|".join(self.projections)
        return rf"{module}\.\d+\.{f'(?:{last})' if several else last}$"

    def matrices(self, name: str) -> str:
        """The expression that all matrices of the stack called `name` match, and nothing else."""
        return self.modules(name).removesuffix("$") + r"\.weight"

    def take(self, slab: Tensor, number: int) -> Tensor:
        """The matrix (N, K) of a projection, a view of what the stack holds of its expert."""
        rows, count = slab.mT if self.transposed else slab, len(self.projections)
        if self.interleaved:
            return rows[number::count]
        n = rows.shape[0] // count
        return rows[number * n : (number + 1) * n]

    def join(self, matrices: Sequence[Sequence[Tensor]]) -> Tensor:
        """The stack of each expert's matrices (N, K), in the order of its projections; all quantized alike, or none.

        Raises:
            FormatError: quantized ones have no common format, or rows that share a scale would be apart.
        """
        made = torch.stack([self._rows(each) for each in matrices])
        if not self.transposed:
            return made
        return made.mT if isinstance(made, QuantizedTensor) else made.mT.contiguous()

    def _rows(self, matrices: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(matrices))
        if not self.interleaved:
            return joined
        count = len(matrices)
        if not isinstance(joined, QuantizedTensor):
            return _by_turns(joined, count)
        if joined.format.block_for(2)[0] > 1:
            msg = f"{joined.format} has one scale for several rows, which the model keeps apart: gate and up take turns"
            raise FormatError(msg)
        n = joined.shape[0]
        return joined.with_inner(
            {
                name: _by_turns(part, count) if name in _OF_ROWS and part.shape[0] == n else part
                for name, part in joined.inner_tensors().items()
            }
        )


_OF_ROWS = frozenset({"qdata", "scale", "zero", "tensor_scale"})


def _by_turns(rows: Tensor, count: int) -> Tensor:
    # Not all devices move fp8; the bytes are what is moved.
    raw = rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows
    return raw.unflatten(0, (count, -1)).transpose(0, 1).flatten(0, 1).view(rows.dtype)


class JoinExperts(ConversionOps):
    """Makes a stack of the matrices of its experts, as transformers' own operations do for the models it knows."""

    def __init__(self, stack: Stack) -> None:
        """Keep how the stack lies."""
        self._stack = stack

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **options: Any
    ) -> dict[str, Any]:
        """The stack by its pattern, of lists of matrices by theirs."""
        del options
        (target,) = target_patterns
        # Of parts that became weights, only the codes' patterns are left.
        columns = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        return {target: self._stack.join(list(zip(*columns, strict=True)))}


def stacks_of(model: nn.Module) -> dict[str, Stack]:
    """The stacks among a model's parameters, by name, where it is known how they lie."""
    found: dict[str, Stack] = {}
    for path, module in model.named_modules():
        told = vars(module)
        known = "is_transposed" in told and "is_concatenated" in told
        if not known and not any(cls.__name__ in _TRANSPOSED for cls in type(module).__mro__):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name in PROJECTIONS and parameter.dim() == 3:
                projections = PROJECTIONS[name]
                turns = len(projections) > 1 and not told.get("is_concatenated", True)
                found[f"{path}.{name}"] = Stack(projections, bool(told.get("is_transposed", True)), turns)
    return found


def converters_of(stacks: Mapping[str, Stack]) -> list[WeightConverter]:
    """What makes each stack of the matrices of its experts, in transformers' terms."""
    kinds: dict[str, set[Stack]] = {}
    for name, stack in stacks.items():
        # Layers are alike, so what a stack is called in them says how it lies.
        kinds.setdefault(".".join(name.split(".")[-3:]), set()).add(stack)
    made: list[WeightConverter] = []
    for name, (stack, *others) in ((name, sorted(kind, key=str)) for name, kind in kinds.items()):
        module = name.rpartition(".")[0]
        if not others:
            sources = [f"{module}.*.{projection}.weight" for projection in stack.projections]
            made.append(WeightConverter(sources, [name], operations=[cast("ConversionOps", JoinExperts(stack))]))
    return made
