"""A model without weights: which module every tensor of a checkpoint belongs to, and of what kind that module is.

The model is built on the meta device from `config.json` alone; no code from the checkpoint is ever run. Names in a
checkpoint may differ from the model's (`experts.7.gate_proj.weight` is a slice of `experts.gate_up_proj`);
transformers' own conversion tables say how.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import get_ident
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lowbit.errors import CheckpointError
from lowbit.header import as_object, parse_json, quote
from lowbit.shards import read_contained
from lowbit_hf.gguf.source import config_in, is_gguf
from lowbit_hf.stacks import JoinExperts, Stack, converters_of, stacks_of

# Of a config, which may say something of every expert of every layer.
_LARGEST_JSON, _CONTAINERS = 16 << 20, 1 << 18
# What a config may not decide; see `_values`.
_NOT_THE_MODELS = frozenset(
    {"quantization_config", "compression_config", "auto_map", "configuration_files"}
    | {
        f"{start}{kind}_implementation{end}"
        for start in ("", "_")
        for kind in ("attn", "experts")
        for end in ("", "_internal")
    }
)
# A config of a few bytes may ask for as many layers as it likes, and lists and modules are made of each.
_COUNT = re.compile(r"layer|depth|expert|block|stage|head|label")
_LARGEST_COUNT, _MOST_MODULES = 1 << 16, 1 << 16
_LARGEST_BUFFERS = 4 << 30
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LONGEST_REASON = 1000


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
        model_class: Any = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
        # transformers has much besides models, and a config must not choose what of it runs.
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            msg = (
                f"{folder}: architecture {quote(architecture)} is not part of transformers {transformers.__version__}; "
                "a newer transformers may have it (code that comes with a checkpoint is never run)"
            )
            raise CheckpointError(msg)
        try:
            values = _values(raw)
            config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
            if not isinstance(config, model_class.config_class):  # pyright: ignore[reportArgumentType] - every model class has one
                msg = f"it is for model_type {raw['model_type']!r}"
                raise TypeError(msg)  # noqa: TRY301 - told like whatever the constructors raise
            with torch.device("meta"), _bounded():
                model = model_class(config)
            skeleton = cls(config, model)
            skeleton.check()
        except Exception as error:
            told = f"{type(error).__name__}: {str(error)[:_LONGEST_REASON]}"
            msg = f"{folder}: config.json does not describe a {architecture}: {told}"
            raise CheckpointError(msg) from error
        return skeleton

    def check(self) -> None:
        """Refuse what is no model's, and answer now what is asked later of transformers, which may raise anything.

        Raises:
            ValueError: the config names a dtype in which no model computes, or buffers that no model has.
        """
        dtype = getattr(self.config, "dtype", None)
        if dtype is not None and dtype not in _DTYPES:
            msg = f"its dtype is {dtype}, and models are of {', '.join(map(str, _DTYPES))}"
            raise ValueError(msg)
        size = sum(buffer.nbytes for buffer in self.model.buffers())
        if size > _LARGEST_BUFFERS:
            msg = f"its buffers, which no checkpoint holds, take {size} bytes"
            raise ValueError(msg)
        _ = self._names, self._conversions, self.linears, self.output_embedding

    @property
    def dtype(self) -> torch.dtype:
        """dtype the config names for the weights; float32 where it names none."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def owner(self, name: str) -> Owner | None:
        """Where the checkpoint's tensor `name` goes; None if the model has no place for it (an MTP layer, say)."""
        target, source = self._place(name)
        if target not in self._names:
            return None
        prefix, _, _ = target.rpartition(".")
        classes = tuple(c.__name__ for c in type(self.model.get_submodule(prefix)).__mro__)
        return Owner(target, classes, source is not None and "*" in source)

    def stack(self, name: str, shape: tuple[int, ...] | None = None) -> Stack | None:
        """How a checkpoint's tensor `name` holds matrices of experts that could be tensors of their own.

        Without a shape, as the model does. None if it is no such stack, or has another name than those would make it.
        """
        target, source = self._place(name)
        stack = self._stacks.get(target)
        module, _, last = name.rpartition(".")
        if stack is None or last != target.rpartition(".")[2] or (source is not None and "*" in source):
            return None
        if any(self._place(part)[0] != target for part in stack.parts(module, 0)):
            return None
        wanted = tuple(self.model.get_parameter(target).shape)
        if shape is None or shape == wanted:
            return stack
        # transformers turns those of some models when it loads them.
        turned = source is not None and shape == (wanted[0], wanted[2], wanted[1])
        return replace(stack, transposed=not stack.transposed) if turned else None

    def stack_of(self, name: str) -> tuple[str, Stack] | None:
        """The stack that the checkpoint's tensor `name` is an expert's part of, by the name it has in a checkpoint.

        None if it is none, or transformers puts it into its stack by itself.
        """
        target, source = self._place(name)
        ours = any(source in converter.source_patterns for converter in self.joining)
        if not ours or target not in self._names:
            return None
        # MODULE.7.gate_proj.weight
        return f"{name.rsplit('.', 3)[0]}.{target.rpartition('.')[2]}", self._stacks[target]

    @cached_property
    def joining(self) -> list[WeightConverter]:
        """What joins matrices of experts for which transformers has no conversion."""
        return [c for c in self._conversions[1] if any(isinstance(step, JoinExperts) for step in c.operations)]

    def _place(self, name: str) -> tuple[str, str | None]:
        """Name of the parameter that a tensor goes to, if there is one, and the pattern of what converts it."""
        renamings, converters = self._conversions
        return rename_source_key(name, renamings, converters, self.model.base_model_prefix, self._names)

    def assemble(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters, by name, that the checkpoint's `tensors` make; those of a stack must be together."""
        _, converters = self._conversions
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        made: dict[str, Tensor] = {}
        stacks: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, source = self._place(name)
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
    def _names(self) -> dict[str, int]:
        # transformers asks for a dict, of values that are not None.
        names = [n for n, _ in self.model.named_parameters(remove_duplicate=False)]
        return dict.fromkeys([*names, *(n for n, _ in self.model.named_buffers())], 0)

    @cached_property
    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        found = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in found if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in found if isinstance(entry, WeightConverter)]

        # transformers has names of its own for the experts of these.
        taken = [
            target.rpartition("\\1")[2]
            for converter in converters
            if any("*" in source for source in converter.source_patterns)
            for target in converter.target_patterns
        ]
        left = {name: stack for name, stack in self._stacks.items() if not name.endswith(tuple(taken))}
        return renamings, [*converters, *converters_of(left)]

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Names of the parameters that hold experts as (E, K, N)."""
        return frozenset(name for name, stack in self._stacks.items() if stack.transposed)

    @cached_property
    def _stacks(self) -> dict[str, Stack]:
        return stacks_of(self.model)


def _at_once(tensor: Tensor) -> Any:
    """A tensor the way converters take one that is read later."""
    return lambda: tensor


def _values(given: Any) -> Any:
    """A config as its class takes it: without what would have transformers do more than build a model.

    That is to load quantized weights its own way, to take attention from a repository of the hub, or to run the code
    that comes with a checkpoint. JSON has no infinity, which transformers spells {"__float__": "Infinity"}.

    Raises:
        ValueError: a count is larger than any model's.
    """
    if isinstance(given, list):
        return [_values(value) for value in given]
    if not isinstance(given, dict):
        return given
    found = cast("dict[str, Any]", given)
    if found.keys() == {"__float__"} and found["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(found["__float__"])
    for key, value in found.items():
        if isinstance(value, int) and value > _LARGEST_COUNT and _COUNT.search(key):
            msg = f"{key} is {quote(value)}, and no model has more than {_LARGEST_COUNT}"
            raise ValueError(msg)
    return {key: _values(value) for key, value in found.items() if key not in _NOT_THE_MODELS}


@contextmanager
def _bounded() -> Generator[None]:
    """Refuse to build more modules than any model has, before memory is full of them.

    Raises:
        ValueError: there are more.
    """
    thread, made = get_ident(), 0

    def count(_module: nn.Module, _name: str, _submodule: nn.Module | None) -> None:
        nonlocal made
        made += get_ident() == thread
        if made > _MOST_MODULES:
            msg = f"it has more than {_MOST_MODULES} modules"
            raise ValueError(msg)

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


LINEAR = ("Linear", "Conv1D")
"""Classes whose `weight` is multiplied by the input; transformers' Conv1D (GPT-2) stores it as (K, N)."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face folder, or what a GGUF file has in its place.

    Raises:
        CheckpointError: it is missing, too large, or no JSON object; or the file is damaged.
    """
    if is_gguf(folder):
        return config_in(folder)
    return read_json(folder / "config.json", "; MODEL must be a Hugging Face folder of config.json and safetensors")


def read_json(path: Path, needed: str = "") -> dict[str, Any]:
    """The object in a JSON file of a folder; `needed` ends the error if it cannot be read.

    Raises:
        CheckpointError: it is missing, leads outside the folder, is too large, or no JSON object.
    """
    try:
        found = as_object(parse_json(read_contained(path.parent, path.name, _LARGEST_JSON), str(path), _CONTAINERS))
    except CheckpointError as error:
        msg = f"{error}{needed}"
        raise CheckpointError(msg) from error
    if found is None:
        msg = f"{path} holds no JSON object; the folder is damaged"
        raise CheckpointError(msg)
    return found
