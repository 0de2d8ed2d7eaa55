"""Loading a checkpoint, quantized or not, as a transformers model whose quantized weights are QuantizedTensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lowbit.errors import CheckpointError
from lowbit.shards import Checkpoint
from lowbit.tensor import QuantizedTensor
from lowbit_hf.experts import use_lowbit_experts
from lowbit_hf.layout import act_scales, format_from_config, from_compressed, shape_of
from lowbit_hf.skeleton import Skeleton, read_config

_LOG = logging.getLogger(__name__)
_METHOD = "compressed-tensors"
_STORED = ("weight", "weight_packed")
_LOCAL = (
    *("weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)


def load(path: str | Path, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A transformers model in eval mode, its compressed weights as QuantizedTensor, on `device`.

    Raises:
        CheckpointError: the folder is damaged or incomplete, is quantized by a method lowbit does not read, or its
            tensors do not fit the model.
    """
    folder = Path(path)
    skeleton = Skeleton.build(folder)
    with Checkpoint.open(folder) as checkpoint:
        groups = Groups.of(read_config(folder), skeleton)
        state = {name: tensor.to(device) for name, tensor in read_tensors(checkpoint, groups).items()}
    try:
        model, info = _assemble(skeleton, state)
    except RuntimeError as error:
        msg = f"{folder} does not fit {type(skeleton.model).__name__}: {error}"
        raise CheckpointError(msg) from error
    # Tensors the model has no place for (MTP layers) are no defect; a place without a tensor is.
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if wrong:
        msg = f"{folder} does not fit {type(model).__name__}: " + "; ".join(f"{k} {v[:5]}" for k, v in wrong.items())
        raise CheckpointError(msg)
    nn.Module.to(model, device).eval().requires_grad_(requires_grad=False)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    use_lowbit_experts(model)
    if groups:
        _LOG.info(
            "%s is loaded in portable form and runs on reference kernels until lowbit.bind(model) is called", folder
        )
    return model


class Groups:
    """The `config_groups` of a compressed-tensors config, and which module each one covers."""

    def __init__(self, groups: list[dict[str, Any]], skeleton: Skeleton | None) -> None:
        """Keep groups, each with its own `format`; `of` reads them from a config."""
        self._groups, self._skeleton = groups, skeleton

    @property
    def dtype(self) -> torch.dtype:
        """dtype that weights read as where their scales do not tell."""
        return torch.bfloat16 if self._skeleton is None else self._skeleton.dtype

    def transposed(self, module: str) -> bool:
        """Whether the model keeps this module's weight as (K, N), though files hold (N, K)."""
        owner = None if self._skeleton is None else self._skeleton.owner(f"{module}.weight")
        return owner is not None and "Conv1D" in owner.classes

    @classmethod
    def of(cls, config: Mapping[str, Any], skeleton: Skeleton | None) -> Groups:
        """The groups of a model's `config.json`; none for a plain checkpoint.

        Raises:
            CheckpointError: the checkpoint is quantized by another method, or the config is malformed.
        """
        quantization = config.get("quantization_config", config.get("compression_config"))
        if quantization is None:
            return cls([], skeleton)
        method = quantization.get("quant_method", _METHOD) if isinstance(quantization, dict) else quantization
        if method != _METHOD or not isinstance(quantization.get("config_groups"), dict):
            msg = f"this checkpoint is quantized by {method!r}; lowbit reads {_METHOD!r} with config_groups"
            raise CheckpointError(msg)
        groups = []
        for name, group in quantization["config_groups"].items():
            targets = group.get("targets") if isinstance(group, dict) else None
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                msg = f"quantization_config group {name!r} must be an object with a list of targets"
                raise CheckpointError(msg)
            _check_patterns(targets)
            groups.append({**group, "format": group.get("format") or quantization.get("format")})
        return cls(groups, skeleton)

    def __bool__(self) -> bool:
        """Whether anything is quantized."""
        return bool(self._groups)

    def __iter__(self) -> Any:
        """The groups, as dicts."""
        return iter(self._groups)

    def find(self, module: str) -> dict[str, Any]:
        """The group that covers checkpoint module `module`: by name, else by pattern, else by class.

        Raises:
            CheckpointError: none does.
        """
        for covers in (_by_name, _by_pattern):
            for group in self._groups:
                if any(covers(target, module) for target in group["targets"]):
                    return group
        owner = None if self._skeleton is None else self._skeleton.owner(f"{module}.weight")
        # One expert's projection is a Linear in every config, though the model holds it as part of a stack.
        classes = ("Linear",) if owner is None or owner.stacked else owner.classes
        for group in self._groups:
            if any(target in classes for target in group["targets"]):
                return group
        msg = f"module {module!r} has quantized tensors, but no group of quantization_config covers it"
        raise CheckpointError(msg)


def read_tensors(checkpoint: Checkpoint, groups: Groups) -> dict[str, Tensor]:
    """All tensors by checkpoint name, those of a compressed module as one QuantizedTensor `module.weight`.

    Raises:
        CheckpointError: a compressed module's tensors are incomplete or do not fit.
    """
    tensors: dict[str, Tensor] = {}
    for module, names in modules_of(checkpoint, groups).items():
        if module is None:
            tensors |= {name: checkpoint.read(checkpoint.entries[name]) for name in names}
        else:
            tensors[f"{module}.weight"] = read_weight(checkpoint, groups, module, names)
    return tensors


def modules_of(checkpoint: Checkpoint, groups: Groups) -> dict[str | None, list[str]]:
    """Tensor names of each compressed module; under None those that are stored as they are."""
    compressed = {
        name.rpartition(".")[0]
        for name in checkpoint.entries
        if groups and name.rpartition(".")[2] in ("weight_packed", "weight_scale")
    }
    modules: dict[str | None, list[str]] = {None: []}
    for name in checkpoint.entries:
        module, _, local = name.rpartition(".")
        owned = module in compressed and local in (*_STORED, *_LOCAL)
        modules.setdefault(module if owned else None, []).append(name)
    return modules


def read_weight(checkpoint: Checkpoint, groups: Groups, module: str, names: list[str]) -> QuantizedTensor:
    """The weight of one compressed module.

    Raises:
        CheckpointError: its tensors are incomplete or do not fit its group.
    """
    group = groups.find(module)
    parts = {name.rpartition(".")[2]: checkpoint.read(checkpoint.entries[name]) for name in names}
    try:
        data, scales, fmt = from_compressed(group, parts)
        _, activation = format_from_config(group, parts["weight_scale"].dtype)
        act_scale, act_zero = (None, None) if activation is None else act_scales(activation, parts)
    except ValueError as error:
        msg = f"module {module!r}: {error}"
        raise CheckpointError(msg) from error
    dtype = scales.scale.dtype if scales.scale.dtype in (torch.float16, torch.bfloat16) else groups.dtype
    return QuantizedTensor.from_parts(
        data,
        scales,
        fmt,
        k=shape_of(group, parts)[1],
        dtype=dtype,
        axis=0 if groups.transposed(module) else -1,
        activation=activation,
        act_scale=act_scale,
        act_zero=act_zero,
    )


def _assemble(skeleton: Skeleton, state: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with `state` in it; transformers stacks experts and ties weights itself, also quantized ones."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # Asked for loading info, transformers returns a pair, which its annotations leave out.
        load: Any = type(skeleton.model).from_pretrained
        options = {"dtype": skeleton.dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        return load(None, config=skeleton.config, state_dict=state, **options)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _check_patterns(targets: Iterable[str]) -> None:
    for target in targets:
        try:
            re.compile(target[3:] if target.startswith("re:") else "")
        except re.error as error:
            msg = f"quantization_config has the target {target!r}, a malformed regular expression: {error}"
            raise CheckpointError(msg) from error


def _by_name(target: str, module: str) -> bool:
    return target == module


def _by_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None
