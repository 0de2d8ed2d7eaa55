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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.shards import Checkpoint
from lowbit_algos.blocks import capture, find_blocks
from lowbit_algos.calibrate import BlockResult, Method, Walk, outside
from lowbit_algos.gptq import WORKING
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Target
from lowbit_hf.experts import use_lowbit_experts
from lowbit_hf.schemes import Scheme
from lowbit_hf.skeleton import Owner, Skeleton
from lowbit_hf.stream import Part, Stream

# Tokens that run through a block at once, where memory allows.
BATCH_TOKENS = 4096
# Bytes that a token takes for each of a block's widest outputs: a few of them live at once, some in float32.
_ACTIVATIONS = 16

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
        device: str = "cpu",
    ) -> None:
        """Match the schemes of tensors to the parameters of the model; those of a stack of experts have one."""
        self._skeleton = skeleton
        self._device = device
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
        # Every tensor of a block is written when the block is done: factors may go into those that stay plain.
        self.names = {name for parts in self.parts.values() for name in parts}

    def memory(self, method: Method, tokens: int) -> int:
        """Bytes that a run holds at most besides what the process holds now, `tokens` running through a block at once.

        An upper bound: it counts a Hessian for every weight, though those that share an input share it.
        """
        bytes_of = {
            name: p.numel() * self._skeleton.dtype.itemsize for name, p in self._stream.model.named_parameters()
        }
        shapes = {name: tuple(p.shape) for name, p in self._stream.model.named_parameters()}
        inside = sum(b for n, b in bytes_of.items() if n.startswith(tuple(f"{block}." for block in self._blocks)))
        head = f"{self._skeleton.output_embedding}."
        before = sum(bytes_of.values()) - inside - sum(b for n, b in bytes_of.items() if n.startswith(head))
        most = 0
        for block in self._blocks:
            mine = {n for n in bytes_of if n.startswith(f"{block}.")}
            weights = sum(bytes_of[n] for n in mine)
            squares = [_square(shapes[n], self.targets[n].k_axis) for n in mine & self.targets.keys()]
            # What comes of weights lies beside them, and for a while several as one; smoothed ones are float32 too.
            solving = 2.5 * weights if method.smoothing is None else 4.5 * weights
            widest = max((max(shapes[n]) for n in mine), default=0)
            # Hessians go one by one, the smallest first; the one at hand has its factors beside it.
            squares.sort()
            squared = max((sum(squares[i:]) + squares[i] for i in range(len(squares))), default=0)
            running = weights + sum(squares) + tokens * widest * _ACTIVATIONS
            most = max(most, running, before + weights, int(solving) + squared + WORKING)
        return most

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
        probe = method.smoothing is not None
        captured = capture(model, self._blocks, _without_cache(model, batches), probe=probe)
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
        walk = Walk(method, *self._start(captured.hidden, begin, paths))
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
            for path in paths(k):
                path.unlink(missing_ok=True)

    def _is(self, tensor: str, prefix: str) -> bool:
        part = self._stream.parts.get(tensor)
        return part is not None and part.parameter.startswith(prefix)

    @staticmethod
    def _start(
        hidden: Sequence[Tensor], k: int, paths: Callable[[int], tuple[Path, Path]]
    ) -> tuple[Hidden, Hidden | None]:
        """What block k is fed, from the files of an earlier run if it is not the first."""
        fed, beside = paths(k)
        if k == 0:
            return Hidden.of(hidden, fed), None
        return Hidden(hidden, fed), Hidden(hidden[: Walk.judged(len(hidden))], beside)


def _square(shape: tuple[int, ...], k_axis: int) -> int:
    """Bytes of the Hessians of a weight."""
    k = shape[k_axis]
    return 4 * k * k * (shape[0] if len(shape) == 3 else 1)


def _without_cache(model: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Batches as the model takes them: not all have a cache to leave out."""
    known = "use_cache" in signature(model.forward).parameters
    return ({k: v for k, v in batch.items() if known or k != "use_cache"} for batch in batches)
