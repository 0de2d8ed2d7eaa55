"""lowbit's own file form: a safetensors file whose header says how its plain tensors make up quantized ones.

Every inner tensor of parameter `a.b` is stored plainly as `a.b.qdata`, `a.b.scale`, ...; the header's metadata entry
`lowbit` is JSON of the shape

    {"version": 1, "tensors": {"a.b": {"format": spec, "activation": spec or null, "permutation": [..], "tail": 0,
     "dtype": "bfloat16", "parts": ["qdata", "scale"]}}, "tied": {"c.d": "a.b"}}

No Python class name is stored, and a file of a newer schema is refused with the version that reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.activation import Activation
from lowbit.errors import CheckpointError
from lowbit.format import Format
from lowbit.header import written_by
from lowbit.numerics import check_scales, check_use, data_shape
from lowbit.packed import PackedTensor
from lowbit.shards import Checkpoint
from lowbit.tensor import INNER, SCHEMA_VERSION, Layout, QuantizedTensor, canonical_shape, check_schema

_KEY = "lowbit"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def save(source: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a model's state, or named tensors, to one safetensors file that appears whole or not at all.

    Tensors that are one object are stored once; weights packed by `bind` are stored unpacked.

    Raises:
        CheckpointError: two names would be stored under one key, a tensor is on meta, or the file cannot be written.
    """
    tensors = source.state_dict(keep_vars=True) if isinstance(source, nn.Module) else source
    stored: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
            continue
        whole = tensor.unpack() if isinstance(tensor, PackedTensor) else tensor.detach()
        if whole.is_meta:
            msg = f"{name!r} is on the meta device, where it has no values to save; load the weights first"
            raise CheckpointError(msg)
        if isinstance(whole, QuantizedTensor):
            described[name] = _describe(whole)
            parts = {f"{name}.{part}": value for part, value in whole.inner_tensors().items()}
        else:
            parts = {name: whole}
        for key, value in parts.items():
            if key in stored:
                msg = f"two tensors would be stored as {key!r}; rename one of them"
                raise CheckpointError(msg)
            # Views of one storage and odd strides are written as what they read as.
            stored[key] = value.contiguous().clone()
    header = json.dumps({"version": SCHEMA_VERSION, "tensors": described, "tied": tied})
    _write(stored, Path(path), {_KEY: header, "format": "pt"} | written_by("lowbit-core"))


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The named tensors that `save` wrote, quantized ones as QuantizedTensor, tied names as one object.

    Raises:
        CheckpointError: the file is damaged, is not lowbit's, or has a newer schema (the message names the version).
    """
    if Path(path).is_dir():
        raise CheckpointError(
            f"{path} is a folder; needed is the file that lowbit.save wrote (lowbit_hf.load reads others)"
        )
    # Not by safetensors itself, which keeps some bytes of every tensor that it reads until the process ends.
    with Checkpoint.open(path) as file:
        metadata = file.metadata
        plain = {name: file.read(entry).to(device) for name, entry in file.entries.items()}
    if _KEY not in metadata:
        msg = f"{path} has no {_KEY!r} entry in its header; lowbit.save did not write it (lowbit_hf.load reads others)"
        raise CheckpointError(msg)
    try:
        return _assemble(plain, json.loads(metadata[_KEY]))
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        msg = f"{path} describes its tensors wrongly: {type(error).__name__}: {error}"
        raise CheckpointError(msg) from error


def load_into(model: nn.Module, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> None:
    """Replace a model's parameters and buffers (it may be on meta) by those of a file from `save`.

    Raises:
        CheckpointError: as `load`, or names are missing or left over, or a shape differs; the model is as it was then.
    """
    tensors = load(path, device=device)
    wanted = model.state_dict(keep_vars=True)
    if wanted.keys() != tensors.keys():
        missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        lacks, adds = f"{missing[:5]} ({len(missing)})", f"{extra[:5]} ({len(extra)})"
        msg = f"{path} does not fit the model: it lacks {lacks} and adds {adds}"
        raise CheckpointError(msg)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            msg = f"{path} does not fit the model: {name!r} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
            raise CheckpointError(msg)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        prefix, _, attribute = name.rpartition(".")
        module = model.get_submodule(prefix)
        if name in parameters:
            grad = tensor.is_floating_point() and not isinstance(tensor, QuantizedTensor)
            if id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(tensor, requires_grad=grad)
            setattr(module, attribute, made[id(tensor)])
        else:
            setattr(module, attribute, tensor)


def _describe(tensor: QuantizedTensor) -> dict[str, Any]:
    layout = tensor.storage_layout
    return {
        "format": layout.format,
        "activation": layout.activation,
        "permutation": list(layout.permutation),
        "tail": layout.tail,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "parts": list(tensor.inner_tensors()),
    }


def _assemble(plain: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    check_schema(header["version"])
    whole: dict[str, Tensor] = {}
    for name, entry in header["tensors"].items():
        parts = {part: plain.pop(f"{name}.{part}") for part in entry["parts"]}
        whole[name] = _restore(name, entry, parts)
    whole |= plain
    whole |= {name: whole[other] for name, other in header["tied"].items()}
    return whole


def _restore(name: str, entry: dict[str, Any], parts: dict[str, Tensor]) -> QuantizedTensor:
    """A QuantizedTensor from a file, after checking that its parts fit: a file is data, not truth."""
    fmt = Format.parse(entry["format"])
    activation = None if entry["activation"] is None else str(Activation.parse(entry["activation"]))
    permutation, tail = tuple(entry["permutation"]), entry["tail"]
    layout = Layout(str(fmt), activation, permutation, tail, _DTYPES[entry["dtype"]])
    qdata = parts["qdata"]
    shape = canonical_shape(qdata, layout)
    wrong_parts = not set(parts) <= set(INNER) or sorted(permutation) != list(range(qdata.dim()))
    if wrong_parts or tuple(qdata.shape) != data_shape(shape, fmt) or qdata.dtype != fmt.element.storage:
        msg = f"tensor {name!r}: data {qdata.dtype} {tuple(qdata.shape)} does not fit {fmt} with tail {tail}"
        raise CheckpointError(msg)
    tensor = QuantizedTensor(parts, layout)
    check_scales(tensor.scales, fmt, shape)
    check_use(tensor.act_scale, tensor.act_zero, tensor.pre_scale, shape[-1])
    return tensor


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        try:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(tensors, partial, metadata)
            # safetensors leaves a file that only its owner may read.
            partial.chmod(mode)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        msg = f"{path} cannot be written: {error}"
        raise CheckpointError(msg) from error
