"""What a run takes of memory at most, told beforehand from names and shapes.

Every figure is an upper bound, for a plan that is kept is worth more than one that is close. What it cannot know it
takes for the worst: that no two weights share an input, that every expert is given of the mean of all, that all weights
of one width are solved as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from lowbit_algos import Method
from lowbit_algos.gptq import working
from lowbit_algos.inputs import Target

# Bytes that threads which stream rows take: slices of a few MiB, and what is made of them.
_STREAMING, _A_THREAD = 128 << 20, 64 << 20
# Bytes of code that is loaded or compiled on the way, on the host; and of what products work in, on a GPU.
_CODE = 192 << 20
# Bytes of what CUDA's libraries load on the host when a run needs more of them than a first product does.
_CUDA_CODE = 1 << 30
# Bytes that each of a token's widest values takes while a block runs, several being there at once and some in float32;
# where inputs are observed as they are rounded; and besides, with all that the way back through the block needs.
_RUNNING, _ROUNDING, _BACK = 16, 32, 32
# Bytes that learning takes for each value of a weight: float32 values, gradients, and what comes of rounding them.
_LEARNING = 16
# Bytes that a token takes for each token that might be next: predictions of two models, and the way back.
_LOGITS = 40
# Bytes that each value of a matrix takes in float32 while it is rounded, while it is read back, and while outputs are
# judged by some of its rows, of which there are fewer than so many.
_WORKING, _READING, _JUDGING, _JUDGED = 24, 16, 28, 1024
# Bytes that a token takes of a batch's mask for each token it may look at, in each of the two shapes of batches; and
# values of positions, which are sines and cosines for each of a head's channels.
_MASK, _POSITIONS = 8, 256


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of the host's memory, and of the GPU's."""

    host: int
    gpu: int = 0

    def more(self, computed: int) -> Footprint:
        """With so many bytes more where the run computes."""
        return Footprint(self.host, self.gpu + computed) if self.gpu else Footprint(self.host + computed)


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter: its shape, its bytes in the model and in the checkpoint, and what it is to become."""

    shape: tuple[int, ...]
    nbytes: int
    stored: int
    target: Target | None = None

    @property
    def numel(self) -> int:
        """How many values it has."""
        return prod(self.shape)

    @property
    def count(self) -> int:
        """How many matrices it is: one, or that of its experts."""
        return self.shape[0] if self.stacked else 1

    @property
    def k(self) -> int:
        """Columns of a weight that is to be quantized."""
        assert self.target is not None
        return self.shape[self.target.k_axis]

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of experts."""
        return len(self.shape) == 3

    @property
    def rounds(self) -> bool:
        """Whether its input is rounded."""
        return self.target is not None and self.target.activation is not None

    @property
    def inputs(self) -> int:
        """Bytes of its Hessian, or each expert's, and of what is known of its input's rounding errors."""
        return 4 * self.k**2 * self.count * (2 if self.rounds else 1)

    @property
    def reading(self) -> int:
        """Bytes that it takes to read back what became of it, and to judge that."""
        rows = min(self.numel // self.count // self.k, _JUDGED)
        return max(_READING * self.numel, _JUDGING * self.count * rows * self.k)


@dataclass(frozen=True, slots=True)
class Running:
    """How blocks run: tokens at once, tokens of a window, and the most values that a block makes of a token."""

    tokens: int
    length: int
    width: int

    @property
    def calls(self) -> int:
        """Bytes of what blocks are called with besides what flows from block to block."""
        return self.tokens * (_MASK * self.length + 4 * _POSITIONS)


def of_rounding(threads: int, *, cuda: bool) -> Footprint:
    """What rounding to nearest takes, a few rows at a time in every thread."""
    streaming = _STREAMING + threads * _A_THREAD
    return Footprint(streaming + _CUDA_CODE, streaming) if cuda else Footprint(streaming)


def of_calibration(
    blocks: Sequence[Sequence[Held]],
    before: Sequence[Held],
    method: Method,
    running: Running,
    *,
    threads: int,
    cuda: bool,
) -> Footprint:
    """What a calibrated run takes; `before` are the parameters that what the first block is fed comes from."""
    first = sum(p.nbytes for p in (*before, *blocks[0])) + running.calls
    capturing = first + running.tokens * running.width * _RUNNING
    work = max(capturing, *(_of_block(block, method, running, cuda=cuda) + running.calls for block in blocks))
    loading = max(_of_loading((*before, *blocks[0])), *map(_of_loading, blocks))
    rest = of_rounding(threads, cuda=cuda)
    if not cuda:
        return Footprint(max(work, loading, rest.host) + _CODE)
    # A batch on its way to a file or back, and a weight on its way to the output.
    largest = max(p.numel for block in blocks for p in block)
    passing = 8 * running.tokens * running.width + _READING * largest
    return Footprint(max(loading + _CUDA_CODE, passing + _CUDA_CODE, rest.host), max(work, rest.gpu) + _CODE)


def of_distilling(blocks: Sequence[Sequence[Held]], ends: Sequence[Held], running: Running) -> int:
    """Bytes that running and learning the whole model takes, besides what a block takes; `ends` lie outside blocks."""
    inside = [p for block in blocks for p in block]
    codes = sum(p.numel for p in inside if p.target is not None)
    vocabulary = max((p.shape[0] for p in ends), default=0)
    # Weights as they were, what they become and what they were rounded from, while all is learned.
    weights = sum(p.nbytes for p in (*inside, *ends)) + codes + (4 + _LEARNING + _READING) * codes
    back = running.tokens * running.width * (_RUNNING + _BACK) * len(blocks)
    return weights + back + running.tokens * vocabulary * _LOGITS


def _of_loading(parameters: Sequence[Held]) -> int:
    """Bytes that parameters take while they are read: as they are stored, as the model has them, and stacks between."""
    stored = sum(p.stored for p in parameters)
    return stored + sum((2 if p.stacked else 1) * p.nbytes for p in parameters if p.stacked or p.stored != p.nbytes)


def _of_block(parameters: Sequence[Held], method: Method, running: Running, *, cuda: bool) -> int:
    """Bytes that a block takes where it is computed, at the stage that takes most."""
    numel, largest = (of(p.numel for p in parameters) for of in (sum, max))
    chosen = sorted((p for p in parameters if p.target is not None), key=lambda p: p.inputs)
    codes, inputs = (sum(values) for values in ((p.numel for p in chosen), (p.inputs for p in chosen)))
    rounds = any(p.rounds for p in chosen)
    # Weights that were changed are there in float32 too until the block is done.
    weights = sum(p.nbytes for p in parameters) + (4 * numel if method.probes else 0)
    batch = running.tokens * running.width
    at_once = batch * (_ROUNDING if rounds else _RUNNING)
    stages = [weights + inputs + at_once]
    if method.rotation:
        # Where it is tried out, the block is in float32, and so is what the rotation makes of it.
        stages.append(weights + 8 * numel + 3 * 4 * largest)
    if method.smoothing is not None:
        # Under factors that are tried out, the largest Hessian is there twice.
        stages.append(weights + inputs + max((p.inputs for p in chosen), default=0) + _WORKING * largest)
    # A byte holds a code.
    stays = weights + codes
    if method.learned:
        # Nothing is let go of: inputs, the mean of experts added to theirs, and weights fitted to inputs.
        stays += inputs + sum(p.inputs for p in chosen if p.stacked) + (4 * codes if rounds else 0)
        stages.append(stays + _LEARNING * codes + _READING * largest + at_once + batch * _BACK)
    for i, weight in enumerate(chosen):
        left = 0 if method.learned else sum(p.inputs for p in chosen[i:])
        stages.append(stays + left + _of_solving(weight, chosen, method, cuda=cuda))
    return max(stages)


def _of_solving(weight: Held, chosen: Sequence[Held], method: Method, *, cuda: bool) -> int:
    """Bytes that solving a weight takes, with those that may share its input, besides that input's Hessian."""
    group = [weight] if weight.stacked else [p for p in chosen if not p.stacked and p.k == weight.k]
    numel, largest = sum(p.numel for p in group), max(p.numel for p in group)
    # Experts are given of the mean of all.
    matrix = numel // weight.count
    mean = weight.inputs if weight.stacked else 0
    # Weights fitted to inputs stay, in float32; while they are, the factor is there twice, and they a few times.
    fitted, fitting = (4 * numel, 2 * 4 * weight.k**2 + 3 * 4 * matrix) if weight.rounds else (0, 0)
    if method.rounding == "nearest":
        return mean + _WORKING * largest
    solving = 4 * matrix + working(matrix // weight.k, weight.k, experts=weight.count, cuda=cuda)
    return mean + fitted + numel + max(fitting, solving, *(p.reading for p in group))
