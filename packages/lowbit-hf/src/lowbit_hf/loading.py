"""Loading a checkpoint, quantized or not, as a transformers model whose quantized weights are QuantizedTensors."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lowbit.errors import CheckpointError
from lowbit.shards import Checkpoint
from lowbit.tensor import QuantizedTensor
from lowbit_hf.experts import use_lowbit_experts
from lowbit_hf.gguf.source import locate, open_checkpoint
from lowbit_hf.layouts import Layout, Outline, layout_of
from lowbit_hf.skeleton import Skeleton, read_config, read_json

_LOG = logging.getLogger(__name__)
_GENERATION = "generation_config.json"
# Weights that a file may lack and be told by name.
_ROOM = 1 << 26


def load(path: str | Path, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A transformers model in eval mode, its compressed weights as QuantizedTensor, on `device`.

    Raises:
        CheckpointError: the folder is damaged or incomplete, is quantized by a method lowbit does not read, or its
            tensors do not fit the model.
    """
    folder = locate(Path(path))
    skeleton = Skeleton.build(folder)
    with open_checkpoint(folder) as checkpoint:
        layout = layout_of(folder, read_config(folder), skeleton)
        state = {name: tensor.to(device) for name, tensor in read_tensors(checkpoint, layout).items()}
    model = assemble(folder, skeleton, state)
    nn.Module.to(model, device)
    if layout is not None:
        _LOG.info(
            "%s is loaded in portable form and runs on reference kernels until lowbit.bind(model) is called", folder
        )
        if layout.cache_scheme is not None:
            _LOG.warning(
                "%s has scales for a key-value cache of few bits; here the cache stays in the model's dtype", folder
            )
    return model


def assemble(folder: Path, skeleton: Skeleton, state: dict[str, Tensor]) -> PreTrainedModel:
    """The model of `folder` with these tensors, which are named as in its files, in eval mode.

    Raises:
        CheckpointError: they do not fit it.
    """
    _require_fit(folder, skeleton, state)
    try:
        model, info = _filled(skeleton, _stacked(skeleton, state))
    except Exception as error:
        msg = f"{folder} does not fit {type(skeleton.model).__name__}: {error}"
        raise CheckpointError(msg) from error
    # Tensors the model has no place for (MTP layers) are no defect; a place without a tensor is.
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if wrong:
        msg = f"{folder} does not fit {type(model).__name__}: " + "; ".join(f"{k} {v[:5]}" for k, v in wrong.items())
        raise CheckpointError(msg)
    model.eval().requires_grad_(requires_grad=False)
    if model.can_generate() and (folder / _GENERATION).is_file():
        model.generation_config = _generation_config(folder)
    use_lowbit_experts(model)
    return model


def read_tensors(checkpoint: Checkpoint, layout: Layout | None) -> dict[str, Tensor]:
    """All tensors by checkpoint name, those of a quantized module as one QuantizedTensor under its weight's name.

    Scales of a key-value cache are left out: the model's cache is in its own dtype.

    Raises:
        CheckpointError: a quantized module's tensors are incomplete or do not fit.
    """
    if layout is None:
        return {name: checkpoint.read(entry) for name, entry in checkpoint.entries.items()}
    tensors: dict[str, Tensor] = {}
    for module, names in modules_of(checkpoint, layout).items():
        if module is None:
            tensors |= {n: checkpoint.read(checkpoint.entries[n]) for n in names if layout.cache_name(n) is None}
        else:
            tensors[layout.weight_name(module)] = read_weight(checkpoint, layout, module, names)
    return tensors


def modules_of(checkpoint: Checkpoint, layout: Layout) -> dict[str | None, list[str]]:
    """Tensors of each quantized module; under None those that are stored as they are.

    Raises:
        CheckpointError: there is no quantized module.
    """
    found = layout.modules(checkpoint.entries)
    if set(found) == {None}:
        msg = f"config.json says that it is quantized by {layout.method!r}, but none of its tensors are"
        raise CheckpointError(msg)
    return found


def read_weight(checkpoint: Checkpoint, layout: Layout, module: str, names: Iterable[str]) -> QuantizedTensor:
    """The weight of one quantized module, as the model keeps it.

    Raises:
        CheckpointError: its tensors are incomplete or do not fit its config.
    """
    parts = {layout.split(name)[1]: checkpoint.read(checkpoint.entries[name]) for name in names}
    try:
        weight = layout.read(module, parts)
    except ValueError as error:
        msg = f"module {module!r}: {error}"
        raise CheckpointError(msg) from error
    return cast("QuantizedTensor", weight.mT) if layout.transposed(module) else weight


def outline_of(checkpoint: Checkpoint, layout: Layout, module: str, names: Iterable[str]) -> Outline:
    """What the weight of one quantized module is; its codes are not read.

    Raises:
        CheckpointError: its tensors are incomplete or do not fit its config.
    """
    parts: dict[str, Tensor] = {}
    for name in names:
        entry, local = checkpoint.entries[name], layout.split(name)[1]
        told = local in layout.told
        parts[local] = checkpoint.read(entry) if told else torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    try:
        return layout.outline(module, parts)
    except ValueError as error:
        msg = f"module {module!r}: {error}"
        raise CheckpointError(msg) from error


def _stacked(skeleton: Skeleton, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with stacks of experts that transformers would not make of their matrices; `state` is emptied."""
    stacks: dict[str, dict[str, Tensor]] = {}
    made: dict[str, Tensor] = {}
    for name in list(state):
        place = skeleton.stack_of(name)
        (made if place is None else stacks.setdefault(place[0], {}))[name] = state.pop(name)
    for name in list(stacks):
        (stack,) = skeleton.assemble(stacks.pop(name)).values()
        made[name] = stack
    return made


def _require_fit(folder: Path, skeleton: Skeleton, state: Mapping[str, Tensor]) -> None:
    """Refuse a model that is far larger than what there is for it: transformers makes room for all of it at once.

    Raises:
        CheckpointError: it is.
    """
    wanted, held = (sum(tensor.numel() for tensor in of) for of in (skeleton.model.parameters(), state.values()))
    if wanted > 2 * held + _ROOM:
        msg = (
            f"{folder} does not fit {type(skeleton.model).__name__}: its config.json describes {wanted} weights, and "
            f"its files hold {held}; download the folder again"
        )
        raise CheckpointError(msg)


def _generation_config(folder: Path) -> GenerationConfig:
    """What `generation_config.json` says.

    Raises:
        CheckpointError: it leads outside the folder, or transformers cannot read it.
    """
    read_json(folder / _GENERATION)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        msg = f"{folder / _GENERATION} is none that transformers can load: {type(error).__name__}: {error}"
        raise CheckpointError(msg) from error


@contextmanager
def quiet() -> Generator[None]:
    """Keep transformers from drawing progress of its own, and from warning."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _filled(skeleton: Skeleton, state: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with `state` in it; transformers stacks experts and ties weights itself, also quantized ones."""
    # Asked for loading info, transformers returns a pair, which its annotations leave out.
    load: Any = type(skeleton.model).from_pretrained
    options = {"dtype": skeleton.dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        return load(None, config=skeleton.config, state_dict=state, **options)
