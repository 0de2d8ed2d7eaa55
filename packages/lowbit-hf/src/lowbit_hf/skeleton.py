"""A model without weights: which module every tensor of a checkpoint belongs to, and of what kind that module is.

The model is built on the meta device from `config.json` alone; no code from the checkpoint is ever run. Names in a
checkpoint may differ from the model's (`experts.7.gate_proj.weight` is a slice of `experts.gate_up_proj`);
transformers' own conversion tables say how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lowbit.errors import CheckpointError

_LARGEST_JSON = 16 << 20


@dataclass(frozen=True, slots=True)
class Owner:
    """Where a tensor of the checkpoint goes in the model."""

    # Name of the model's parameter or buffer that holds it, alone or with others.
    name: str
    # Class names of the module it belongs to, most derived first.
    classes: tuple[str, ...]
    # Whether it is one expert's part of a stacked parameter.
    stacked: bool


class Skeleton:
    """The meta-device model of a Hugging Face folder."""

    def __init__(self, config: PreTrainedConfig, model: PreTrainedModel) -> None:
        """Keep a config and the model that was built of it; `build` does both."""
        self.config, self.model = config, model

    @classmethod
    def build(cls, folder: Path) -> Skeleton:
        """Build the model that `folder/config.json` describes.

        Raises:
            CheckpointError: there is no usable config, or transformers has no such architecture.
        """
        raw = read_config(folder)
        named = raw.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else None
        model_class: Any = getattr(transformers, str(architecture), None)
        # transformers has much besides models, and a config must not choose what of it runs.
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            msg = (
                f"{folder}: architecture {architecture!r} is not part of transformers {transformers.__version__}; a "
                "newer transformers may have it (code that comes with a checkpoint is never run)"
            )
            raise CheckpointError(msg)
        try:
            # As transformers reads it: JSON has no infinity, and it spells that in a way of its own.
            values, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
            # Or transformers would load quantized weights its own way.
            values = {key: values[key] for key in values if key not in ("quantization_config", "compression_config")}
            config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
            if not isinstance(config, model_class.config_class):  # pyright: ignore[reportArgumentType] - every model class has one
                msg = f"it is for model_type {raw['model_type']!r}"
                raise TypeError(msg)  # noqa: TRY301 - told like whatever the constructors raise
            with torch.device("meta"):
                model = model_class(config)
        except Exception as error:
            msg = f"{folder}: config.json does not describe a {architecture}: {type(error).__name__}: {error}"
            raise CheckpointError(msg) from error
        return cls(config, model)

    @property
    def dtype(self) -> torch.dtype:
        """dtype the config names for the weights; float32 where it names none."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def owner(self, name: str) -> Owner | None:
        """Where the checkpoint's tensor `name` goes; None if the model has no place for it (an MTP layer, say)."""
        renamings, converters = self._conversions
        target, source = rename_source_key(
            name, renamings, converters, self.model.base_model_prefix, dict.fromkeys(self._names, 0)
        )
        if target not in self._names:
            return None
        prefix, _, _ = target.rpartition(".")
        classes = tuple(c.__name__ for c in type(self.model.get_submodule(prefix)).__mro__)
        return Owner(target, classes, source is not None and "*" in source)

    def assemble(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters, by name, that the checkpoint's `tensors` make; those of a stack must be together."""
        renamings, converters = self._conversions
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        made: dict[str, Tensor] = {}
        stacks: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, source = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, dict.fromkeys(self._names, 0)
            )
            if source is None:
                made[target] = tensors[name]
            else:
                stack = stacks.setdefault(target, deepcopy(by_pattern[source]))
                stack.add_tensor(target, name, source, _at_once(tensors[name]))
        for target, stack in stacks.items():
            converted: dict[str, Any] = stack.convert(target, model=self.model, config=self.model.config)
            made |= {name: parts[0] if isinstance(parts, list) else parts for name, parts in converted.items()}
        return made

    def fill_buffers(self) -> None:
        """Give the buffers that no checkpoint holds, such as rotary frequencies, the values that the model computes."""
        for key, buffer in list(self.model.named_non_persistent_buffers()):
            owner, _, name = key.rpartition(".")
            self.model.get_submodule(owner).register_buffer(
                name, torch.empty_like(buffer, device="cpu"), persistent=False
            )
        initialize = self.model._init_weights  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - where models say it
        with torch.no_grad():
            for module in self.model.modules():
                if any(not buffer.is_meta for buffer in module.buffers(recurse=False)):
                    initialize(module)

    @cached_property
    def linears(self) -> dict[str, nn.Module]:
        """Every module that multiplies by a weight matrix of its own, by name."""
        return {n: m for n, m in self.model.named_modules() if set(LINEAR) & {c.__name__ for c in type(m).__mro__}}

    @cached_property
    def output_embedding(self) -> str | None:
        """Name of the module that turns hidden states into logits."""
        return self._name_of(self.model.get_output_embeddings())

    @cached_property
    def input_embedding(self) -> str | None:
        """Name of the module that turns tokens into hidden states."""
        return self._name_of(self.model.get_input_embeddings())

    def _name_of(self, wanted: Any) -> str | None:
        return next((name for name, module in self.model.named_modules() if module is wanted), None)

    @cached_property
    def _names(self) -> set[str]:
        return {n for n, _ in self.model.named_parameters(remove_duplicate=False)} | {
            n for n, _ in self.model.named_buffers()
        }

    @cached_property
    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        found = get_model_conversion_mapping(self.model)
        return (
            [entry for entry in found if isinstance(entry, WeightRenaming)],
            [entry for entry in found if isinstance(entry, WeightConverter)],
        )


def _at_once(tensor: Tensor) -> Any:
    """A tensor the way converters take one that is read later."""
    return lambda: tensor


LINEAR = ("Linear", "Conv1D")
"""Classes whose `weight` is multiplied by the input; transformers' Conv1D (GPT-2) stores it as (K, N)."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face folder.

    Raises:
        CheckpointError: it is missing, too large, or no JSON object.
    """
    return read_json(folder / "config.json", "; MODEL must be a Hugging Face folder of config.json and safetensors")


def read_json(path: Path, needed: str = "") -> dict[str, Any]:
    """The object in a JSON file of a folder; `needed` ends the error if it cannot be read.

    Raises:
        CheckpointError: it is missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            msg = f"{path} has {path.stat().st_size} bytes, which no config has; the folder is damaged"
            raise CheckpointError(msg)
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path} cannot be read: {error}{needed}"
        raise CheckpointError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} holds no JSON object; the folder is damaged"
        raise CheckpointError(msg)
    return cast("dict[str, Any]", found)
