"""Weights of lowbit's layout on their way into a model that transformers loads.

transformers reads tensors by itself, renames them, stacks experts, and places them on devices; what it is given here
is how the parts of a weight become one QuantizedTensor before that. Everything is checked beforehand, by names, shapes
and config alone: an error amid its loading would lose its words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key

from lowbit.activation import Activation
from lowbit.errors import CheckpointError
from lowbit.format import Format
from lowbit.shards import Checkpoint
from lowbit_hf.layouts.layout import Outline
from lowbit_hf.layouts.lowbit import PARTS, Lowbit
from lowbit_hf.loading import modules_of, outline_of
from lowbit_hf.skeleton import Owner, Skeleton

_Kind = tuple[Format, Activation | None, list[str]]


class Incoming:
    """The quantized weights of a checkpoint."""

    def __init__(self, layout: Lowbit, weights: Mapping[str, str], joining: Sequence[WeightConverter]) -> None:
        """Keep the layout, for each parameter of the model a weight that goes into it, and what joins experts.

        `of` finds them; `joining` is for experts that transformers has no conversion for.
        """
        self.layout, self.weights, self._joining = layout, weights, joining
        # What a converter that takes parts stands for.
        self._plain: dict[WeightConverter, WeightConverter | None] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, quantization: Mapping[str, Any], files: Sequence[str] | None) -> Incoming:
        """Look at a folder's tensors.

        Raises:
            CheckpointError: there is no folder, or it is damaged, or does not fit the model.
        """
        if not files:
            msg = "lowbit's layout is read from a folder of safetensors files, and from_pretrained was given none"
            raise CheckpointError(msg)
        skeleton = Skeleton(model.config, model)
        layout, found = Lowbit(quantization, skeleton), dict[str, tuple[str, _Kind]]()
        with Checkpoint.open(Path(files[0]).parent) as checkpoint:
            modules = modules_of(checkpoint, layout)
            plain = modules.pop(None)
            for module, names in modules.items():
                owner = skeleton.owner(module or "")
                # A module that the model has no place for (an MTP layer) stays outside.
                if module is None or owner is None:
                    continue
                outline = outline_of(checkpoint, layout, module, names)
                _check_place(model, layout, module, owner, outline)
                kind = outline.format, outline.activation, sorted(layout.split(name)[1] for name in names)
                first, other = found.setdefault(owner.name, (module, kind))
                if other != kind:
                    raise CheckpointError(
                        f"{first!r} is {_told(other)}, and {module!r} is {_told(kind)}; the model has one parameter "
                        f"for both, {owner.name!r}"
                    )
        for name in plain:
            owner = skeleton.owner(name)
            if owner is not None and owner.name in found:
                first, _ = found[owner.name]
                msg = f"{name!r} is plain, and {first!r} is quantized; the model has one parameter for both"
                raise CheckpointError(f"{msg}, {owner.name!r}")
        return cls(layout, {name: module for name, (module, _) in found.items()}, skeleton.joining)

    def conversions(self, plain: Sequence[Any]) -> list[Any]:
        """Conversions that also make weights of parts."""
        renamings = [entry for entry in plain if isinstance(entry, WeightRenaming)]
        renamed = [rename_source_key(weight, renamings, [])[0] for weight in self.weights.values()]
        made: list[Any] = []
        for converter in (*plain, *self._joining):
            if isinstance(converter, WeightConverter) and any(converter.rename_source_key(n)[1] for n in renamed):
                sources = [f"{s.removesuffix('$')}:{part}$" for s in converter.source_patterns for part in PARTS]
                operations = [Assemble(self), *converter.operations]
                taking = WeightConverter(sources, list(converter.target_patterns), operations=operations)
                for name in ("scope_prefix", "base_model_prefix"):
                    # Older transformers know one of the two.
                    if hasattr(converter, name):
                        setattr(taking, name, getattr(converter, name))
                self._plain[taking] = converter
                made.append(taking)
            made.append(converter)
        rest = WeightConverter([f":{part}$" for part in PARTS], "", operations=[Assemble(self)])
        self._plain[rest] = None
        return [*made, rest]

    def plain(self, conversions: Sequence[Any]) -> list[Any]:
        """Of conversions that were used, those that a plain checkpoint would have needed, as transformers reads it."""
        meant = [self._plain.get(entry, entry) for entry in conversions]
        return list(dict.fromkeys(entry for entry in meant if entry is not None and entry not in self._joining))


class Assemble(ConversionOps):
    """Makes weights of their parts."""

    supports_many_to_many = True

    def __init__(self, incoming: Incoming) -> None:
        """Keep what is known of the weights."""
        self._incoming = incoming

    def __deepcopy__(self, memo: dict[int, Any]) -> Assemble:
        """The same: transformers copies a converter for each parameter."""
        return self

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **options: Any
    ) -> dict[str, Any]:
        """Weights by the pattern of their codes, or the one of a parameter by the parameter's name."""
        del source_patterns, target_patterns
        name: str = options["full_layer_name"]
        layout, module = self._incoming.layout, self._incoming.weights[name]
        stacks: dict[str, dict[str, list[Tensor]]] = {}
        for pattern in list(input_dict):
            source, _, part = pattern.rpartition(":")
            stacks.setdefault(source, {})[part.removesuffix("$")] = input_dict.pop(pattern)
        made: dict[str, Any] = {}
        for source, parts in stacks.items():
            weights = [
                layout.read(module, dict(zip(parts, each, strict=True))) for each in zip(*parts.values(), strict=True)
            ]
            if source:
                made[f"{source}:qdata$"] = weights
            else:
                (weight,) = weights
                made[name] = weight.mT if layout.transposed(module) else weight
        return made


def takes_parts(converter: Any) -> bool:
    """Whether a converter makes weights of parts."""
    return any(isinstance(operation, Assemble) for operation in getattr(converter, "operations", ()))


def _told(kind: _Kind) -> str:
    fmt, activation, parts = kind
    return f"{fmt} of inputs {activation or 'plain'} ({', '.join(parts)})"


def _check_place(model: PreTrainedModel, layout: Lowbit, module: str, owner: Owner, outline: Outline) -> None:
    """Refuse a weight that is not of its parameter's shape; of a stack's parts, transformers sees to that."""
    wanted = tuple(model.get_parameter_or_buffer(owner.name).shape)
    *stack, n, k = outline.shape
    shape = (*stack, k, n) if layout.transposed(module) else (*stack, n, k)
    if not owner.stacked and shape != wanted:
        msg = f"{module!r} has shape {shape}, and {type(model).__name__} has {wanted} in its place"
        raise CheckpointError(msg)
