"""The part of a run that calibrates: one decoder block after the other, from a checkpoint into an output in the making.

What a run that was killed needs to go on lies in the output's scratch folder: what the next block is fed, as files, and
how the blocks before fared, as JSON. Where a GPU holds what blocks are fed, such files are written now and then, and
the blocks since then count as done. Under torchrun every process feeds the blocks its share of the text, and all make
the same weights, which the first one writes; the others keep what they feed in the same folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.hadamard import Rotation
from lowbit.memory import release
from lowbit.shards import Checkpoint
from lowbit_algos.blocks import Captured, capture, find_blocks
from lowbit_algos.calibrate import outside, quantize_blocks
from lowbit_algos.distilled import replay
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Target
from lowbit_algos.method import Method
from lowbit_algos.mixed import WEIGHED, Candidate, Decision, weigh
from lowbit_algos.rotation import Ends, find_ends
from lowbit_algos.walk import BlockResult, Take, Walk
from lowbit_hf.experts import use_lowbit_experts
from lowbit_hf.footprint import Footprint, Held, Running, of_calibration, of_distilling
from lowbit_hf.kv_cache import CacheScales, CacheWatch
from lowbit_hf.schemes import Scheme
from lowbit_hf.skeleton import Owner, Skeleton
from lowbit_hf.stream import Part, Stream

# Tokens that run through a block at once, where memory allows.
BATCH_TOKENS = 4096
# Seconds of work that a kill may undo where a GPU holds what blocks are fed.
_UNSAVED = 20.0

Write = Callable[[str, Tensor | None], None]
"""Takes the name of a tensor of the checkpoint, and what became of it; None: it stays as it is.

Also that of a scale of the key-value cache, and the scale.
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run keeps what one that continues it needs."""

    scratch: Path
    # Whether a block is done, and to be told when some are.
    is_done: Callable[[str], bool]
    done: Callable[[Sequence[str], Sequence[Path]], None]


class _Saving:
    """Blocks that are finished, and when what a run that goes on after them needs is on disk."""

    def __init__(self, progress: Progress, files: Sequence[Path]) -> None:
        """Begin where an earlier run left `files`, if there was one."""
        self._progress, self._files, self._since = progress, files, time.monotonic()
        self._finished: dict[str, Path] = {}

    @property
    def due(self) -> bool:
        """Whether a kill would undo more than it may."""
        return time.monotonic() - self._since > _UNSAVED

    def finished(self, name: str, record: Path) -> None:
        """A block is finished, and `record` tells how it fared."""
        self._finished[name] = record

    def save(self, files: Sequence[Path], held: Sequence[Hidden] = ()) -> None:
        """What finished counts as done, with `files` for what comes next; those before are not needed any more.

        What is `held` in memory is written to them.
        """
        for hidden, path in zip(held, files, strict=False):
            Hidden.of(list(hidden), path)
        self._progress.done(list(self._finished), [*self._finished.values(), *files])
        for path in self._files:
            path.unlink(missing_ok=True)
        self._finished.clear()
        self._files, self._since = files, time.monotonic()


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
        kv_cache: CacheScales | None = None,
    ) -> None:
        """Match the schemes of tensors to the parameters of the model; those of a stack of experts have one.

        `kv_cache` is what is to be measured of the key-value cache.

        Raises:
            LowbitError: the model is to be `rotated`, and cannot be.
        """
        self._skeleton, self._checkpoint = skeleton, checkpoint
        self._device = device
        # Where nothing is rotated, there is neither.
        self.ends: Ends | None = None
        self.rotation: Rotation | None = None
        self._stream = Stream(checkpoint, skeleton, dict(owners), device)
        self._blocks = find_blocks(self._stream.model)
        self._cache = CacheWatch(kv_cache, self._stream.model)
        # By parameter: of the blocks, and of what lies outside them.
        self.targets: dict[str, Target] = {}
        self._outside: dict[str, Target] = {}
        # Tensors of the checkpoint by the parameter they are part of.
        self.parts: dict[str, dict[str, Part]] = {}
        left = set(outside([owner.name for owner in owners.values() if owner is not None], self._blocks))
        for name, part in self._stream.parts.items():
            owner, scheme = owners[name], schemes.get(name)
            if part.parameter in left:
                if owner is not None and scheme is not None:
                    self._outside[part.parameter] = _target(owner, part, scheme, skeleton.dtype)
                continue
            self.parts.setdefault(part.parameter, {})[name] = part
            if owner is None or scheme is None:
                continue
            self.targets[part.parameter] = _target(owner, part, scheme, skeleton.dtype)
        if rotated:
            self.ends = find_ends(self._stream.model, self._blocks)
            self.rotation = Rotation(int(skeleton.config.get_text_config().hidden_size))
        # Every tensor of a block is written when the block is done: factors may go into those that stay plain.
        self.names = {name for parts in self.parts.values() for name in parts}

    def memory(self, method: Method, tokens: int, length: int) -> Footprint:
        """What a run takes at most besides what the process holds, with `tokens` of windows of `length` at once."""
        parameters = dict(self._stream.model.named_parameters())
        stored = dict.fromkeys(parameters, 0)
        for name, part in self._stream.parts.items():
            # Buffers are in no plan; they are tiny.
            if part.parameter in stored:
                stored[part.parameter] += self._checkpoint.entries[name].nbytes
        itemsize = self._skeleton.dtype.itemsize
        held = {
            name: Held(tuple(p.shape), p.numel() * itemsize, stored[name], self.targets.get(name))
            for name, p in parameters.items()
        }
        blocks = [[each for n, each in held.items() if n.startswith(f"{block}.")] for block in self._blocks]
        left = outside(held, self._blocks)
        ends = [held[name] for name in left]
        before = [held[name] for name in left if not name.startswith(f"{self._skeleton.output_embedding}.")]
        running = Running(tokens, length, self._width(length, blocks))
        cuda = torch.device(self._device).type == "cuda"
        threads = torch.get_num_threads()
        needed = of_calibration(blocks, before, method, running, threads=threads, cuda=cuda)
        return needed.more(of_distilling(blocks, ends, running)) if method.distilled else needed

    def _width(self, length: int, blocks: Sequence[Sequence[Held]]) -> int:
        """The most values that a block makes of a token, in a window of `length`, before they become fewer again."""
        config = self._skeleton.config.get_text_config()
        # Those of all experts that see it are there at once.
        copies = getattr(config, "num_experts_per_tok", None)
        widths = [max(p.shape[-2:]) * ((copies or p.shape[0]) if p.stacked else 1) for block in blocks for p in block]
        if getattr(config, "_attn_implementation", None) == "eager":
            widths.append(length * int(config.num_attention_heads))
        return max(widths)

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in order."""
        return list(self._blocks)

    def stored(self, block: str) -> dict[str, tuple[str, Part]]:
        """Tensors of the checkpoint that a block is made of, each with the parameter that it is a part of."""
        return {
            tensor: (parameter, part)
            for parameter, parts in self.parts.items()
            if parameter.startswith(f"{block}.")
            for tensor, part in parts.items()
        }

    def fed(self, tokens: int, at_once: int, method: Method) -> int:
        """Bytes of what blocks are fed of so many tokens, and of what runs through the original ones."""
        size = int(self._skeleton.config.get_text_config().hidden_size) * self._skeleton.dtype.itemsize
        batches = -(-tokens // at_once)
        return (batches + Walk.beside(method, batches)) * at_once * size

    def run(
        self, windows: Tensor, method: Method, progress: Progress, write: Write, *, tokens: int, held: bool = False
    ) -> None:
        """Quantize block after block, from the first that is not done; `write` is given every tensor.

        `tokens` is how many run through a block at once. What blocks are fed is `held` where they run, or in files.

        Raises:
            LowbitError: the model's blocks cannot be run one by one, or values are not finite.
        """
        names = list(self._blocks)
        rank = dist.get_rank() if dist.is_initialized() else 0
        batches = _share(windows, tokens)
        begin = _agreed(next((k for k, name in enumerate(names) if not progress.is_done(name)), len(names)))

        def paths(k: int) -> tuple[Path, Path]:
            return progress.scratch / f"hidden-{rank}-{k}", progress.scratch / f"other-{rank}-{k}"

        saving = _Saving(progress, () if method.distilled else paths(begin))

        def take(result: BlockResult, weights: Mapping[str, Tensor]) -> None:
            for tensor, (parameter, part) in self.stored(result.name).items():
                write(tensor, part.of(weights[parameter]) if parameter in weights else None)
            self._cache.give(result.name, write)
            k = names.index(result.name)
            record = progress.scratch / f"block-{k}.json"
            # Every process writes it, with its own times: whole, whichever is last.
            part = progress.scratch / f"block-{k}-{rank}.part"
            part.write_text(json.dumps(asdict(result)))
            part.replace(record)
            saving.finished(result.name, record)
            files = () if k + 1 == len(names) or method.distilled else paths(k + 1)
            if not held:
                saving.save(files)
            elif not files or _agreed(int(saving.due)):
                saving.save(files, (walk.hidden, walk.other))

        if begin == len(names):
            return
        if method.distilled:
            self._distill(windows, method, take, tokens)
            return
        captured, walk = self._start(batches, method, begin, paths(begin), held=held)
        for k in range(begin, len(names)):
            name = names[k]
            block = self._stream.names([f"{name}."])
            if k:
                # The first is there, to have been captured.
                self._stream.load(block)

            runs = captured.probe(k, self._blocks[name])
            walk.step(
                *(name, self._blocks[name], self.targets, captured.calls[k], take),
                probe=runs,
                paths=(None, None) if held else paths(k + 1),
                feeding=self._cache.seeing,
            )
            self._stream.drop(block)
            release()

    def _distill(self, windows: Tensor, method: Method, take: Take, tokens: int) -> None:
        """Quantize the whole model, in memory, and see what it puts into its cache in the end."""
        model, inputs = self.whole(windows, tokens)
        told: list[tuple[BlockResult, Mapping[str, Tensor]]] = []
        targets = {**self.targets, **self._outside}

        def keep(result: BlockResult, weights: Mapping[str, Tensor]) -> None:
            told.append((result, weights))

        made, _ = quantize_blocks(model, targets, inputs, method, keep)
        if self._cache.looks:
            with self._cache.seeing():
                replay(model, made, inputs)
        for result, weights in told:
            take(result, weights)

    def whole(self, windows: Tensor, tokens: int) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
        """The model with all its weights in memory, and this process's batches of `windows` as it takes them."""
        self._stream.load(self._stream.names([""]))
        # A head that is tied to the embedding has no tensor of its own.
        self._skeleton.model.tie_weights()
        use_lowbit_experts(self._skeleton.model)
        return self._stream.model, list(self._inputs(_share(windows, tokens)))

    def weigh(self, windows: Tensor, candidates: Sequence[Candidate], method: Method, *, tokens: int) -> list[Decision]:
        """Every candidate's harm to each weight that is quantized, block by block, by a few batches of `windows`."""
        batches = _share(windows, tokens)[:WEIGHED]
        captured = self._capture(batches)
        hidden, found = Hidden.of(captured.hidden), list[Decision]()
        for k, (name, block) in enumerate(self._blocks.items()):
            stored, prefix, calls = self._stream.names([f"{name}."]), f"{name}.", captured.calls[k]
            if k:
                self._stream.load(stored)
            axes = {n.removeprefix(prefix): t.k_axis for n, t in self.targets.items() if n.startswith(prefix)}
            found += weigh(prefix, block, axes, candidates, calls, hidden, method) if axes else []
            for i, call in enumerate(calls):
                hidden[i] = call(block, hidden[i])
            self._stream.drop(stored)
            release()
        return found

    def _start(
        self, batches: Sequence[Tensor], method: Method, begin: int, paths: tuple[Path, Path], *, held: bool
    ) -> tuple[Captured, Walk]:
        """How blocks are called, and the way through them from block `begin`; what that one is fed is in `paths`.

        It goes there batch by batch, unless an earlier run left it there; or, `held`, it stays where blocks run.
        """
        device = torch.device(self._device)
        fed, beside = (Hidden((), None if held and not begin else path, device) for path in paths)
        rooms = (fed, len(batches)), (beside, Walk.beside(method, len(batches)))

        def keep(hidden: Tensor) -> None:
            # Later blocks are fed what has the same shape.
            turned = hidden if begin or self.rotation is None else self.rotation(hidden)
            for room, most in rooms:
                if len(room) < most:
                    room.make_room(hidden)
                    if not begin:
                        room[len(room) - 1] = turned

        captured = self._capture(batches, keep, probe=method.probes)
        if begin:
            self._stream.drop(self._stream.names([f"{next(iter(self._blocks))}."]))
            if held:
                fed, beside = (Hidden.of(list(room)) for room, _ in rooms)
        return captured, Walk(method, fed, self.rotation, beside)

    def _capture(
        self, batches: Iterable[Tensor], keep: Callable[[Tensor], None] | None = None, *, probe: bool = False
    ) -> Captured:
        """What `capture` tells of batches of token ids; the first block stays loaded."""
        use_lowbit_experts(self._skeleton.model)
        # Of what lies outside the blocks, the output head is never reached.
        head = f"{self._skeleton.output_embedding}."
        rest = self._stream.names([f"{name}." for name in self._blocks], outside=True)
        before = [name for name in rest if not self._is(name, head)]
        self._stream.load([*before, *self._stream.names([f"{next(iter(self._blocks))}."])])
        captured = capture(self._stream.model, self._blocks, self._inputs(batches), probe=probe, keep=keep)
        self._stream.drop(before)
        return captured

    def _inputs(self, batches: Iterable[Tensor]) -> Iterator[dict[str, Any]]:
        """Batches of token ids as the model takes them: not all have a cache to leave out."""
        known = {"use_cache": False} if "use_cache" in signature(self._stream.model.forward).parameters else {}
        return ({"input_ids": batch.to(self._device), **known} for batch in batches)

    def _is(self, tensor: str, prefix: str) -> bool:
        part = self._stream.parts.get(tensor)
        return part is not None and part.parameter.startswith(prefix)


def _agreed(begin: int) -> int:
    """The block that process 0 begins with."""
    told = [begin]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def _share(windows: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """This process's share of the windows, in batches of so many tokens."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return windows[rank::count].split(max(tokens // windows.shape[1], 1))


def _target(owner: Owner, part: Part, scheme: Scheme, dtype: torch.dtype) -> Target:
    """What a scheme makes of a weight of a module."""
    axis = 0 if "Conv1D" in owner.classes else -2 if part.transposed else -1
    return Target(scheme.weight_format(dtype), scheme.activation, axis)
