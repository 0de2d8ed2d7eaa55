"""The checkpoint under a lint: its config, its tensors' headers, and the modules that both speak of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.header import as_object
from lowbit.shards import Checkpoint, TensorEntry
from lowbit_hf.lint.arguments import Group, Names, bad_pattern, read_group
from lowbit_hf.lint.table import Part, Runtime
from lowbit_hf.skeleton import LINEAR, Skeleton, read_config

EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d{1,6})\.(?P<projection>.+)")
LOCAL = frozenset(
    {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx"}
    | {"input_scale", "input_zero_point", "input_global_scale"}
)
"""Local names of the tensors that a quantized module has besides `weight`."""

_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the checkpoint, and what the model says of it."""

    name: str
    # Its tensors by local name.
    parts: Mapping[str, TensorEntry]
    # Class names in transformers, most derived first; empty: the model has no place for it.
    classes: tuple[str, ...]
    # (N, K) in the file as the model has it; None: the model does not tell.
    shape: tuple[int, int] | None
    head: bool

    @property
    def quantized(self) -> bool:
        """Whether it holds codes."""
        weight = self.parts.get("weight")
        packed = "weight_packed" in self.parts or "weight_scale" in self.parts
        return packed or (weight is not None and weight.dtype in _CODES)

    @property
    def part(self) -> Part:
        """Whether it is one expert's projection."""
        return "experts" if EXPERT.fullmatch(self.name) else "linear"

    @property
    def embedding(self) -> bool:
        """Whether it looks rows up."""
        return "Embedding" in self.classes or (not self.classes and "embed" in self.last)

    @property
    def last(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def multiplies(self) -> bool:
        """Whether serving engines have one of their Linear classes for it: routers too, but no convolution."""
        weight = self.parts.get("weight")
        matrix = "weight_packed" in self.parts or (weight is not None and len(weight.shape) == 2)
        convolves = any(name.startswith("Conv") and name not in LINEAR for name in self.classes)
        return matrix and not self.embedding and not convolves


class Subject:
    """A folder, opened, with the runtimes that shall load it."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, runtimes: tuple[Runtime, ...], tp: int, gpu: tuple[str, int] | None
    ) -> None:
        """Keep what `open` found; `gpu` is a name and its compute capability."""
        self.folder, self.checkpoint, self.runtimes, self.tp, self.gpu = folder, checkpoint, runtimes, tp, gpu
        self.config = read_config(folder)
        self.unknown: str | None = None
        try:
            self.skeleton: Skeleton | None = Skeleton.build(folder)
        except CheckpointError as error:
            self.skeleton, self.unknown = None, str(error)

    @property
    def everywhere(self) -> tuple[str, ...]:
        """The names of all runtimes."""
        return tuple(runtime.name for runtime in self.runtimes)

    @property
    def engines(self) -> tuple[str, ...]:
        """The names of those with classes of their own."""
        return tuple(runtime.name for runtime in self.runtimes if runtime.own_classes)

    @property
    def readers(self) -> tuple[str, ...]:
        """The names of those with transformers' classes."""
        return tuple(runtime.name for runtime in self.runtimes if not runtime.own_classes)

    @cached_property
    def quantization(self) -> dict[str, object] | None:
        """`quantization_config` as it stands, under whichever name; None: there is none."""
        return as_object(self.config.get("quantization_config", self.config.get("compression_config")))

    @property
    def method(self) -> str | None:
        """Who quantized it; None: nobody did."""
        quantization = self.quantization
        return None if quantization is None else str(quantization.get("quant_method", "compressed-tensors"))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The config groups, in order."""
        quantization = self.quantization or {}
        given = as_object(quantization.get("config_groups")) or {}
        return tuple(read_group(name, raw, quantization.get("format")) for name, raw in given.items())

    @cached_property
    def ignore(self) -> tuple[str, ...]:
        """The entries of `ignore` that can be read."""
        given = (self.quantization or {}).get("ignore")
        entries = given if isinstance(given, list) else []
        return tuple(entry for entry in entries if isinstance(entry, str) and bad_pattern(entry) is None)

    @cached_property
    def _ignored(self) -> Names[str]:
        return Names((entry, entry) for entry in self.ignore)

    @cached_property
    def _targeted(self) -> Names[Group]:
        return Names((target, group) for group in self.groups for target in group.targets)

    def ignored(self, module: str, runtime: Runtime | None = None) -> bool:
        """Whether `ignore` names a module, as a runtime reads it."""
        if runtime is not None and runtime.suffixes and any(module.endswith(f".{entry}") for entry in self.ignore):
            return True
        return self._ignored.find(module) is not None

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Modules with a matrix, in order of their tensors."""
        parts: dict[str, dict[str, TensorEntry]] = {}
        for name, entry in self.checkpoint.entries.items():
            module, _, local = name.rpartition(".")
            if local in LOCAL or (local == "weight" and len(entry.shape) > 1):
                parts.setdefault(module, {})[local] = entry
        return {name: self._module(name, tensors) for name, tensors in parts.items()}

    def _module(self, name: str, parts: Mapping[str, TensorEntry]) -> Module:
        owner = None if self.skeleton is None else self.skeleton.owner(f"{name}.weight")
        last = name.rpartition(".")[2]
        if owner is None or self.skeleton is None:
            return Module(name, parts, (), None, last == "lm_head")
        if owner.stacked:  # one expert's projection is a Linear in every config
            return Module(name, parts, ("Linear",), None, head=False)
        prefix, _, local = owner.name.rpartition(".")
        shape = None
        # Where the model has joined what the file keeps apart, its shape is not the file's.
        if prefix.rpartition(".")[2] == last:
            parameter: Tensor | None = getattr(self.skeleton.model.get_submodule(prefix), local, None)
            size = () if parameter is None else tuple(parameter.shape)
            if len(size) == 2:
                shape = (size[1], size[0]) if "Conv1D" in owner.classes else (size[0], size[1])
        return Module(name, parts, owner.classes, shape, head=prefix == self.skeleton.output_embedding)

    def group_of(self, module: Module, runtime: Runtime | None = None) -> Group | None:
        """The group that covers a module for a runtime; without one, for any: by name, else by class."""
        if (named := self._targeted.find(module.name)) is not None:
            return named
        if runtime is None:
            classes = {*module.classes, "Linear"}
        elif runtime.own_classes:
            classes = {"Linear"} if module.multiplies and not module.head else set[str]()
        else:
            classes = set(module.classes)
        return next((group for group in self.groups if classes & set(group.targets)), None)

    def named(self, module: str) -> bool:
        """Whether a target is the module's name or a pattern that fits it."""
        return self._targeted.find(module) is not None

    @cached_property
    def quantized(self) -> tuple[tuple[Module, Group], ...]:
        """Quantized modules and their groups, as far as they have one that can be read."""
        found = [(module, self.group_of(module)) for module in self.modules.values() if module.quantized]
        return tuple((m, g) for m, g in found if g is not None and g.weights is not None and not g.problems)

    def members(self, group: Group) -> list[Module]:
        """The quantized modules of a group."""
        return [module for module, own in self.quantized if own is group]

    def parts_of(self, group: Group) -> list[Part]:
        """Whether a group has linear modules, experts, or both."""
        return sorted({module.part for module in self.members(group)})

    @property
    def experts(self) -> int | None:
        """How many experts a layer has, as the config says."""
        inner = as_object(self.config.get("text_config")) or {}
        for key in _COUNTS:
            count = self.config.get(key, inner.get(key))
            if type(count) is int:
                return count
        return None

    @property
    def dtype(self) -> str | None:
        """dtype the config names for the weights."""
        inner = as_object(self.config.get("text_config")) or {}
        named: Any = None
        for place in (self.config, inner):
            named = named or place.get("dtype") or place.get("torch_dtype")
        return named if isinstance(named, str) else None
