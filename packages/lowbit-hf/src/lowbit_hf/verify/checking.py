"""Every weight of a checkpoint, read by lowbit and by other programs, and compared value by value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowbit.apply import dequantize_, plain_weight
from lowbit.errors import CheckpointError
from lowbit.table import size
from lowbit.tensor import QuantizedTensor
from lowbit_hf.evaluate import Evaluation
from lowbit_hf.gguf.source import is_gguf, open_checkpoint
from lowbit_hf.layouts import Layout, layout_of
from lowbit_hf.layouts.lowbit import Lowbit
from lowbit_hf.loading import assemble, load, modules_of, quiet
from lowbit_hf.skeleton import Skeleton, read_config
from lowbit_hf.stored import Plain, open_plain
from lowbit_hf.verify.readers import READERS, Reader

TRANSFORMERS = "transformers"
"""What `--with` calls it; others are `READERS`."""


@dataclass(frozen=True, slots=True)
class Unequal:
    """A weight of which two programs read different values."""

    name: str
    values: int
    # Of how many, and the largest difference; NaN where only one has a number.
    of: int
    largest: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What another program makes of a checkpoint."""

    reader: str
    # Weights that it read, and those of them that lowbit reads otherwise.
    weights: int = 0
    unequal: tuple[Unequal, ...] = ()
    # Why it reads none.
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """What other programs make of a checkpoint, and what their model is worth beside lowbit's."""

    readings: tuple[Reading, ...]
    # The other model, and what keeps transformers from running it.
    other: str | None = None
    hindrance: str | None = None
    # lowbit's against the other, and the other.
    ours: Evaluation | None = None
    theirs: Evaluation | None = None

    @property
    def failed(self) -> bool:
        """Whether a value differs, or there is no other reader that reads it."""
        return any(reading.unequal for reading in self.readings) or all(reading.refused for reading in self.readings)


def compare(
    folder: Path, names: Sequence[str] = (), *, device: str = "cpu", advance: Callable[[int], None] | None = None
) -> tuple[Reading, ...]:
    """Compare all quantized weights with what the readers of these names make of them; by default all that can.

    transformers reads on `device`.

    Raises:
        CheckpointError: the checkpoint is damaged or not quantized, or none of the readers knows its layout.
    """
    skeleton = Skeleton.build(folder)
    layout = layout_of(folder, read_config(folder), skeleton)
    if layout is None:
        raise CheckpointError(f"{folder} is not quantized, so there is nothing to verify")
    chosen = [reader for reader in READERS if reader.knows(layout) and (not names or reader.name in names)]
    missing = [reader.package for reader in chosen if not reader.installed()]
    if missing:
        raise CheckpointError(
            f"the layout {layout.method!r} is verified with {missing[0]}, which is not installed; run: "
            "pip install 'lowbit-hf[verify]'"
        )
    whole = not isinstance(layout, Lowbit) and (not names or TRANSFORMERS in names)
    if not chosen and not whole:
        raise CheckpointError(
            f"nothing that is independent of lowbit{' and was asked for' if names else ''} reads the layout "
            f"{layout.method!r}; write another one first: lowbit export {folder} --as compressed-tensors -o OUT"
        )
    readings = [_by_weight(folder, layout, reader(layout), advance) for reader in chosen]
    if whole:
        short = _short_of_memory(folder)
        readings.append(_by_model(folder, device) if short is None else Reading(_title(), refused=short))
    return tuple(readings)


@dataclass(frozen=True, slots=True)
class Pair:
    """lowbit's model, and the same one by another program."""

    ours: PreTrainedModel
    theirs: PreTrainedModel
    # Who the other is and how it runs, and what keeps transformers from running it.
    how: str
    hindrance: str | None = None


def pair(folder: Path, names: Sequence[str] = (), *, device: str = "cpu") -> Pair:
    """A verified checkpoint as two models to evaluate, on `device`.

    The other is transformers' as it runs by itself, inputs rounded as transformers does it; where it cannot, its plain
    weights; and where it cannot read them either, those of the first other reader. Plain weights have plain inputs, and
    lowbit's model is then made plain too.

    Raises:
        CheckpointError: memory cannot hold two models.
    """
    short, hindrance = _short_of_memory(folder), None
    if short is not None:
        raise CheckpointError(f"two models {short}; without them, --no-eval compares the weights")
    for plain in (False, True) if not names or TRANSFORMERS in names else ():
        try:
            theirs = _by_transformers(folder, device, plain=plain)
        except Exception as error:  # noqa: BLE001 - another program's, which may be anything
            hindrance = hindrance or _words(error)
            continue
        how = f"{_title()}, {'plain weights' if plain else 'as it runs'}"
        return Pair(_ours(folder, device, plain=plain), theirs, how, hindrance)
    skeleton = Skeleton.build(folder)
    layout = layout_of(folder, read_config(folder), skeleton)
    assert layout is not None
    reader = next(each for each in READERS if each.knows(layout) and (not names or each.name in names))
    theirs = assemble(folder, skeleton, _state(folder, layout, reader(layout), skeleton))
    nn.Module.to(theirs, device)
    how = f"{reader.title()}, plain weights"
    return Pair(_ours(folder, device, plain=True), theirs, how, hindrance)


def _short_of_memory(folder: Path) -> str | None:
    """What another program's model needs beside lowbit's, if that is more than is free; None where nothing tells."""
    with open_plain(folder, read_config(folder), Skeleton.build(folder)) as checkpoint:
        stored = checkpoint.stored.nbytes if isinstance(checkpoint, Plain) else checkpoint.nbytes
        needed = checkpoint.nbytes + stored
    told = Path("/proc/meminfo")
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines()) if told.exists() else {}
    free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else needed
    return None if needed <= free else f"need {size(needed)} of memory, of which {size(free)} are free"


def _by_weight(folder: Path, layout: Layout, reader: Reader, advance: Callable[[int], None] | None) -> Reading:
    """Compare a weight at a time."""
    unequal: list[Unequal] = []
    with open_checkpoint(folder) as checkpoint:
        modules = modules_of(checkpoint, layout)
        modules.pop(None)
        for module, names in modules.items():
            assert module is not None
            parts = {layout.split(name)[1]: checkpoint.read(checkpoint.entries[name]) for name in names}
            theirs = reader.read(module, parts)
            unequal += _unequal(layout.weight_name(module), layout.read(module, parts).dequantize(theirs.dtype), theirs)
            if advance is not None:
                advance(sum(checkpoint.entries[name].nbytes for name in names))
    return Reading(reader.title(), len(modules), tuple(unequal))


def _by_model(folder: Path, device: str) -> Reading:
    """Compare with what transformers makes of all of it."""
    try:
        theirs = dict(_by_transformers(folder, device, plain=True).named_parameters())
    except Exception as error:  # noqa: BLE001 - another program's, which may be anything
        return Reading(_title(), refused=_words(error))
    unequal: list[Unequal] = []
    weights = {name: p for name, p in load(folder).named_parameters() if isinstance(p, QuantizedTensor)}
    for name, weight in weights.items():
        unequal += _unequal(name, plain_weight(weight), theirs[name].detach().cpu())
    return Reading(_title(), len(weights), tuple(unequal))


def _ours(folder: Path, device: str, *, plain: bool) -> PreTrainedModel:
    model = load(folder, device=device)
    if plain:
        dequantize_(model)
    return model


def _by_transformers(folder: Path, device: str, *, plain: bool) -> PreTrainedModel:
    """transformers' model of a folder or GGUF file, its weights plain or as transformers keeps them.

    Raises:
        CheckpointError: it would leave experts as they were initialized.
    """
    if not is_gguf(folder):
        skeleton = Skeleton.build(folder)
        with open_checkpoint(folder) as checkpoint:
            weights = (f"{name.rpartition('.')[0]}.weight" for name in checkpoint.entries)
            alone = next((name for name in weights if skeleton.stack_of(name) is not None), None)
        if alone is not None:
            model = type(skeleton.model).__name__
            raise CheckpointError(f"it reads the experts of {model} as stacks alone, and {alone!r} is of one expert")
    # compressed-tensors draws progress whatever transformers is told, and transformers prints a report before it fails.
    with quiet(), redirect_stderr(StringIO()):
        model = _loaded(folder, device, plain=plain)
        # What is to stay compressed until it is used is decompressed now; in inference mode it would stay of that mode.
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
        return model


def _loaded(folder: Path, device: str, *, plain: bool) -> PreTrainedModel:
    # What compressed-tensors has put on a device stays there whatever `to` says, so it is put there at once.
    where: Any = {} if device == "cpu" else {"device_map": {"": device}}
    where |= {"local_files_only": True, "trust_remote_code": False}
    if is_gguf(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder.parent, gguf_file=folder.name, dtype=Skeleton.build(folder).dtype, **where
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if plain:
        config.quantization_config["dequantize"] = True
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **where)


def _state(folder: Path, layout: Layout, reader: Reader, skeleton: Skeleton) -> dict[str, Tensor]:
    """All tensors by checkpoint name, quantized weights as a reader's values."""
    state: dict[str, Tensor] = {}
    with open_checkpoint(folder) as checkpoint:
        for module, names in modules_of(checkpoint, layout).items():
            parts = {name: checkpoint.read(checkpoint.entries[name]) for name in names}
            if module is None:
                state |= {name: tensor for name, tensor in parts.items() if layout.cache_name(name) is None}
            else:
                local = {layout.split(name)[1]: tensor for name, tensor in parts.items()}
                values = reader.read(module, local).to(skeleton.dtype)
                state[layout.weight_name(module)] = values.mT if layout.transposed(module) else values
    return state


def _unequal(name: str, ours: Tensor, theirs: Tensor) -> list[Unequal]:
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{name!r} is {tuple(theirs.shape)} to another reader and {tuple(ours.shape)} to lowbit")
    differ = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    if not bool(differ.any()):
        return []
    largest = float((ours.to(torch.float64) - theirs.to(torch.float64))[differ].abs().amax())
    return [Unequal(name, int(differ.sum()), ours.numel(), largest)]


def _title() -> str:
    return f"{TRANSFORMERS} {transformers.__version__}"


def _words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
