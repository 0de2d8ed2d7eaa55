"""The part of a run that calibrates: one decoder block after the other, from a checkpoint into an output in the making.

What a run that was killed needs to go on lies in the output's scratch folder: what the next block is fed, as files, and
how the blocks before fared, as JSON. Under torchrun every process feeds the blocks its share of the text, and all make
the same weights, which the first one writes; the others keep what they feed in the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.hadamard import Rotation
from lowbit.memory import release
from lowbit.shards import Checkpoint
from lowbit_algos.blocks import capture, find_blocks
from lowbit_algos.calibrate import BlockResult, Method, Walk, outside
from lowbit_algos.gptq import WORKING
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Target
from lowbit_algos.rotation import Ends, find_ends
from lowbit_hf.experts import use_lowbit_experts
from lowbit_hf.schemes import Scheme
from lowbit_hf.skeleton import Owner, Skeleton
from lowbit_hf.stream import Part, Stream

# Tokens that run through a block at once, where memory allows.
BATCH_TOKENS = 4096
# Bytes that a token takes for each of a block's widest outputs: a few of them live at once, some in float32.
_ACTIVATIONS = 16
# Bytes that learning takes for each value of a weight: float32 values, gradients, and what comes of rounding them.
_LEARNING = 28

Write = Callable[[str, Tensor | None], None]
"""Takes the name of a tensor of the checkpoint, and what became of it; None: it stays as it is."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run keeps what one that continues it needs."""

    scratch: Path
    # Whether a block is done, and to be told when one is.
    is_done: Callable[[str], bool]
    done: Callable[[str, Sequence[Path]], None]


class Calibrated:
    """The blocks of a checkpoint, and what of it they quantize."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: Skeleton,
        owners: Mapping[str, Owner | None],
        schemes: Mapping[str, Scheme],
        *,
        rotated: bool = False,
        device: str = "cpu",
    ) -> None:
        """Match the schemes of tensors to the parameters of the model; those of a stack of experts have one.

        Raises:
            LowbitError: the model is to be `rotated`, and cannot be.
        """
        self._skeleton = skeleton
        self._device = device
        # Where nothing is rotated, there is neither.
        self.ends: Ends | None = None
        self.rotation: Rotation | None = None
        self._stream = Stream(checkpoint, skeleton, dict(owners), device)
        self._blocks = find_blocks(self._stream.model)
        self.targets: dict[str, Target] = {}
        # Tensors of the checkpoint by the parameter they are part of.
        self.parts: dict[str, dict[str, Part]] = {}
        left = set(outside([owner.name for owner in owners.values() if owner is not None], self._blocks))
        for name, part in self._stream.parts.items():
            if part.parameter in left:
                continue
            owner, scheme = owners[name], schemes.get(name)
            self.parts.setdefault(part.parameter, {})[name] = part
            if owner is None or scheme is None:
                continue
            axis = 0 if "Conv1D" in owner.classes else -1
            self.targets[part.parameter] = Target(scheme.weight_format(skeleton.dtype), scheme.activation, axis)
        if rotated:
            self.ends = find_ends(self._stream.model, self._blocks)
            self.rotation = Rotation(self._hidden_size)
        # Every tensor of a block is written when the block is done: factors may go into those that stay plain.
        self.names = {name for parts in self.parts.values() for name in parts}

    def memory(self, method: Method, tokens: int, samples: int) -> int:
        """Bytes that a run holds at most besides what the process holds now.

        `tokens` run through a block at once, of `samples` tokens in all. An upper bound: it counts a Hessian for every
        weight, though those that share an input share it.
        """
        itemsize = self._skeleton.dtype.itemsize
        shapes = {name: tuple(p.shape) for name, p in self._stream.model.named_parameters()}
        bytes_of = {name: prod(shape) * itemsize for name, shape in shapes.items()}
        inside = sum(b for n, b in bytes_of.items() if n.startswith(tuple(f"{block}." for block in self._blocks)))
        head = f"{self._skeleton.output_embedding}."
        before = sum(bytes_of.values()) - inside - sum(b for n, b in bytes_of.items() if n.startswith(head))
        # Rotated, what the first block is fed is there twice.
        fed = samples * self._hidden_size * itemsize * (1 if self.rotation is None else 2)
        most = 0
        for block in self._blocks:
            mine = {n for n in bytes_of if n.startswith(f"{block}.")}
            weights = sum(bytes_of[n] for n in mine)
            quantized = mine & self.targets.keys()
            squares = sorted(_square(shapes[n], self.targets[n]) for n in quantized)
            # What comes of weights lies beside them, and for a while several as one; those changed first are float32.
            exact = method.probes or any(self.targets[n].activation is not None for n in quantized)
            solving = (4.5 if exact else 2.5) * weights
            widest = max((max(shapes[n]) for n in mine), default=0)
            running = weights + sum(squares) + tokens * widest * _ACTIVATIONS
            # Hessians go one by one, the smallest first; the one at hand has its factors beside it.
            squared = max((sum(squares[i:]) + squares[i] for i in range(len(squares))), default=0)
            if method.learned:
                # Values and gradients in float32, and all that the way back through a block needs.
                learning = weights // itemsize * _LEARNING + sum(squares) + 4 * tokens * widest * _ACTIVATIONS
                squared = max(squared + sum(squares), learning - int(solving))
            most = max(most, running, before + weights + fed, int(solving) + squared + WORKING)
        return most

    @property
    def _hidden_size(self) -> int:
        return int(self._skeleton.config.get_text_config().hidden_size)

    def run(self, windows: Tensor, method: Method, progress: Progress, write: Write, *, tokens: int) -> None:
        """Quantize block after block, from the first that is not done; `write` is given every tensor.

        `tokens` is how many run through a block at once.

        Raises:
            LowbitError: the model's blocks cannot be run one by one, or values are not finite.
        """
        model, names = self._stream.model, list(self._blocks)
        use_lowbit_experts(self._skeleton.model)
        rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        batches = [
            {"input_ids": batch.to(self._device), "use_cache": False}
            for batch in windows[rank::count].split(max(tokens // windows.shape[1], 1))
        ]
        first = self._stream.names([f"{names[0]}."])
        # Of what lies outside the blocks, the output head is never reached.
        head = f"{self._skeleton.output_embedding}."
        before = [n for n in self._stream.names([f"{n}." for n in names], outside=True) if not self._is(n, head)]
        self._stream.load([*before, *first])
        captured = capture(model, self._blocks, _without_cache(model, batches), probe=method.probes)
        self._stream.drop(before)
        begin = next((k for k, name in enumerate(names) if not progress.is_done(name)), len(names))
        if dist.is_initialized():
            told = [begin]
            dist.broadcast_object_list(told)
            begin = told[0]

        def paths(k: int) -> tuple[Path, Path]:
            return progress.scratch / f"hidden-{rank}-{k}", progress.scratch / f"other-{rank}-{k}"

        if begin:
            self._stream.drop(first)
        hidden = captured.turned(self.rotation)
        fed, other = self._start(hidden, begin, paths, Walk.beside(method, len(hidden)))
        del hidden
        walk = Walk(method, fed, self.rotation, other)
        captured.hidden.clear()
        for k in range(begin, len(names)):
            name = names[k]
            block = self._stream.names([f"{name}."])
            if k:
                # The first is there, to have been captured.
                self._stream.load(block)

            def take(result: BlockResult, weights: Mapping[str, Tensor], k: int = k) -> None:
                for parameter, parts in self.parts.items():
                    for tensor, part in parts.items() if parameter.startswith(f"{result.name}.") else ():
                        write(tensor, part.of(weights[parameter]) if parameter in weights else None)
                record = progress.scratch / f"block-{k}.json"
                record.write_text(json.dumps(asdict(result)))
                progress.done(result.name, [record, *paths(k + 1)])

            runs = captured.probe(k, self._blocks[name])
            walk.step(name, self._blocks[name], self.targets, captured.calls[k], take, probe=runs, paths=paths(k + 1))
            self._stream.drop(block)
            release()
            for path in paths(k):
                path.unlink(missing_ok=True)

    def _is(self, tensor: str, prefix: str) -> bool:
        part = self._stream.parts.get(tensor)
        return part is not None and part.parameter.startswith(prefix)

    @staticmethod
    def _start(
        hidden: Sequence[Tensor], k: int, paths: Callable[[int], tuple[Path, Path]], count: int
    ) -> tuple[Hidden, Hidden]:
        """What block k is fed, and the first `count` of it beside; an earlier run left them if it is not the first."""
        fed, beside = paths(k)
        if k == 0:
            return Hidden.of(hidden, fed), Hidden.of(hidden[:count], beside)
        return Hidden(hidden, fed), Hidden(hidden[:count], beside)


def _square(shape: tuple[int, ...], target: Target) -> int:
    """Bytes of the Hessians of a weight, and of what is known of its inputs' rounding errors."""
    k = shape[target.k_axis]
    return 4 * k * k * (shape[0] if len(shape) == 3 else 1) * (1 if target.activation is None else 2)


def _without_cache(model: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Batches as the model takes them: not all have a cache to leave out."""
    known = "use_cache" in signature(model.forward).parameters
    return ({k: v for k, v in batch.items() if known or k != "use_cache"} for batch in batches)
