"""What a benchmark is made of: shapes, and for each of them and each format what is to be compared.

A benchmark is a `Benchmark` that the entry-point group `lowbit.bench` names; any distribution can bring some.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.backends import Call, Refusal, select
from lowbit.bench.inputs import KINDS, Kind
from lowbit.errors import NoKernelError
from lowbit.format import WHOLE, Format

Shape = tuple[int, ...]
Make = Callable[[int], tuple[Any, ...]]
"""Makes the i-th copy of a call's operands."""

_DRAWN = 10


@dataclass(frozen=True, slots=True)
class Dim:
    """A length that a benchmark's shapes have, and the range that `--shapes-seed` draws it from, evenly in its log."""

    name: str
    low: int
    high: int
    # The upper end on CPUs.
    high_on_cpu: int
    # Whether formats block it, so that it has to be a multiple of their groups, or else of 32.
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """The format of a weight, and that which its inputs are rounded to; None: they are not.

    The spec is a format, or two with a slash between them, as in `INT8_ROW/INT8_ROW`.

    Raises:
        FormatError: (`parse`) it is not.
    """

    spec: str
    format: Format
    input: Format | None = None

    @staticmethod
    def parse(spec: str) -> Use:
        """The use that `spec` stands for."""
        weight, _, given = spec.partition("/")
        return Use(spec, Format.parse(weight), Format.parse(given) if given else None)

    @property
    def activation(self) -> Activation | None:
        """How inputs are rounded: by scales chosen as they come."""
        return None if self.input is None else Activation(self.input)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute what a case asks for."""

    name: str
    # Takes the case's data and says how to make copies of the operands; what it does is not timed.
    prepare: Callable[..., Make]
    # Takes one copy of the operands. This is timed.
    run: Callable[..., Any]
    # Bytes that a call must at least read and write.
    moved: float
    # The plain result of what `run` gives; None: it computes something else, and is there for its time alone.
    decode: Callable[[Any], Tensor] | None = None
    # The kernel of lowbit that does it, and those that do not, each with the reason.
    kernel: str | None = None
    refusals: tuple[Refusal, ...] = ()
    # Bytes of operands that a call touches, where they are not all.
    touched: int | None = None
    # What else is told of it, by name.
    tell: Callable[[], Mapping[str, float]] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders that do the same on the same data."""

    # What tells this case from the others of its benchmark, by column.
    told: dict[str, str | int]
    # Floating-point operations of a call.
    flops: float
    # Random tensors of a kind, which every contender starts from.
    data: Callable[[Kind], tuple[Tensor, ...]]
    # What the results approximate, from the data.
    exact: Callable[..., Tensor]
    candidate: Contender | Refusal
    baseline: Contender
    # lowbit's reference, where that is not the candidate: what the candidate's result should be, to the bit or nearly.
    reference: Contender | None = None
    peers: tuple[Contender | Refusal, ...] = ()
    # The kinds of data that there are.
    kinds: Sequence[Kind] = KINDS
    # How often to measure; None: as often as the time for it allows.
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What the user asks of a benchmark."""

    shapes: Sequence[Shape]
    uses: Sequence[Use]
    device: torch.device
    # Whether other libraries are to be measured, too.
    peers: bool
    # Options of the benchmark's own.
    options: Namespace = field(default_factory=Namespace)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What `lowbit bench NAME` runs."""

    # A line for the help.
    about: str
    dims: tuple[Dim, ...]
    # Specs of the formats that are measured by default.
    formats: tuple[str, ...]
    # The shapes that are measured by default, by device type.
    usual: Callable[[str], Sequence[Shape]]
    # Of a shape, the canonical shapes that must fit the format.
    quantized: Callable[[Shape], Sequence[Shape]]
    cases: Callable[[Given], Iterator[Case]]
    # Whether formats may be followed by a slash and the format of inputs.
    inputs: bool = False
    # Adds options of its own to the command's.
    options: Callable[[ArgumentParser], None] | None = None
    # Whether processes that torchrun starts run it together.
    together: bool = False

    def shapes(self, seed: int, device: str, formats: Sequence[Format]) -> list[Shape]:
        """Ten shapes that nobody tuned for, the same ones for a seed, a device type and formats."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(_DRAWN, len(self.dims), generator=generator, dtype=torch.float64).tolist()
        multiple = math.lcm(32, *(max(b, 1) for fmt in formats for b in fmt.block if b != WHOLE))
        return [
            tuple(_drawn(dim, at, device, multiple) for dim, at in zip(self.dims, row, strict=True)) for row in drawn
        ]

    def check(self, shape: Shape, use: Use) -> None:
        """Refuse a shape that a format does not fit.

        Raises:
            FormatError: it does not.
        """
        for canonical in self.quantized(shape):
            use.format.block_of(canonical)
            if use.input is not None:
                use.input.block_of((1, canonical[-1]))


def _drawn(dim: Dim, at: float, device: str, multiple: int) -> int:
    high = dim.high if device == "cuda" else dim.high_on_cpu
    length = round(dim.low * (high / dim.low) ** at)
    return max(round(length / multiple), 1) * multiple if dim.grouped else length


def copies(*operands: Any) -> Make:
    """Copies of tensors and of what holds some; the first are the operands themselves."""
    return lambda i: deepcopy(operands) if i else operands


def plain(result: Tensor) -> Tensor:
    """What `decode` is of a result that needs none."""
    return result


def lowbits(
    call: Call, candidate: Contender, reference: Contender, *, bound: bool
) -> tuple[Contender | Refusal, Contender | None]:
    """The candidate with the kernel that lowbit runs it on, and the reference where that is another.

    `bound` says whether the candidate's weight may have been packed for the kernel.
    """
    try:
        selection = select(call, bound=bound)
    except NoKernelError as error:
        return Refusal("lowbit", str(error)), None
    name = selection.kernel.name
    candidate = replace(candidate, kernel=name, refusals=selection.refusals)
    return candidate, None if name.startswith("reference.") else reference


def peer(name: str, build: Callable[[], Contender]) -> Contender | Refusal:
    """A contender out of another library, or why it is not there."""
    try:
        return build()
    except NoKernelError as error:
        return Refusal(name, str(error))
    except Exception as error:  # noqa: BLE001 - whatever a stranger's import raises is told, in place of its time
        return Refusal(name, words(error))


def words(error: Exception) -> str:
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def footprint(operand: Any) -> int:
    """Bytes of all tensors that an operand is, or holds."""
    if isinstance(operand, torch.nn.Module):
        return sum(map(footprint, [*operand.parameters(), *operand.buffers()]))
    if isinstance(operand, tuple | list):
        return sum(map(footprint, operand))
    if not isinstance(operand, Tensor):
        return 0
    flatten = getattr(operand, "__tensor_flatten__", None)
    if flatten is not None:
        names, _ = flatten()
        return sum(footprint(getattr(operand, name)) for name in names)
    # oneDNN's own layouts have no storage to ask.
    return operand.numel() * operand.element_size()
