"""Passes over exported graphs: what each looks for, why it may not, what it adds; and who checks that."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from lowbit.table import align
from lowbit_pt2e.graphs import GraphError, Region, lacks, place, regions, source, tidy


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """What a pass found: the node that it is named by, and all that it takes the place of."""

    node: Node
    # Why the pass may not change it; None: it may.
    refusal: str | None
    # Puts something else in its place.
    rewrite: Callable[[], object]


class Pass(Protocol):
    """A change of graphs that keeps what they compute."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def adds(self) -> tuple[Any, ...]:
        """The operators that it may add; attributes it always may."""
        ...

    def matches(self, region: Region) -> Iterator[Match]:
        """What there is of its pattern in a graph, once that is known to be as earlier matches left it."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one match."""

    name: str
    graph: str
    node: str
    # Why it was left as it is; None: it was changed.
    reason: str | None
    # Where it comes from in the user's program.
    source: str
    # Names of the nodes that were put in its place.
    made: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a pass moved what the model gives for the example inputs."""

    largest: float
    # Of all outputs together, in dB; infinite if they are the same.
    sqnr: float


@dataclass(frozen=True, slots=True)
class Report:
    """What passes did."""

    findings: tuple[Finding, ...]
    # By pass, where example inputs were given.
    differences: dict[str, Difference]

    @property
    def changed(self) -> tuple[Finding, ...]:
        """Those that were changed."""
        return tuple(each for each in self.findings if each.reason is None)

    @property
    def refused(self) -> tuple[Finding, ...]:
        """Those that were not."""
        return tuple(each for each in self.findings if each.reason is not None)

    def __str__(self) -> str:
        """A line for each, and one for each pass that was verified."""
        rows = [
            {"pass": each.name, "graph": each.graph or "-", "node": each.node, "": each.reason or "changed"}
            for each in self.findings
        ]
        checks = [
            {"pass": name, "largest difference": f"{each.largest:.3g}", "SQNR, dB": f"{each.sqnr:.1f}"}
            for name, each in self.differences.items()
        ]
        return "\n".join(line for table in (rows, checks) if table for line in align(table))


def run_passes(model: nn.Module, passes: Sequence[Pass], inputs: tuple[Any, ...] | None = None) -> Report:
    """Run passes over every graph of an exported `model`, in place, one after the other; what they did.

    After each, every node that is new is one that the pass says it adds, and says what exported ones do of themselves.
    With example `inputs`, the model runs before and after each pass, and how far its outputs moved is in the report.

    Raises:
        GraphError: the model is none that was exported; or a pass added what it does not say that it does, or nodes
            that lack something.
    """
    differences: dict[str, Difference] = {}
    findings = [
        Finding("-", region.name, node.name, f"{node.target} runs graphs, which stay as they are", place(node))
        for region in regions(model)
        for node in region.unknown
    ]
    before = None if inputs is None else outputs(model, inputs)
    for each in passes:
        changed = False
        for region in regions(model):
            known = set(region.nodes)
            for match in each.matches(region):
                about = each.name, region.name, match.node.name, match.refusal, place(match.node)
                made: tuple[str, ...] = ()
                if match.refusal is None:
                    there = set(region.nodes)
                    match.rewrite()
                    made = tuple(node.name for node in region.nodes if node not in there)
                    changed = True
                findings.append(Finding(*about, made))
            _check(each, region, [node for node in region.nodes if node not in known])
        tidy(model)
        if before is not None and changed:
            after = outputs(model, inputs or ())
            differences[each.name] = difference(before, after)
            before = after
    return Report(tuple(findings), differences)


def _check(each: Pass, region: Region, added: Iterable[Node]) -> None:
    for node in added:
        if node.op not in {"get_attr", "placeholder"} and node.target not in each.adds:
            raise GraphError(f"{each.name} added {node.target}, which is not what it says it adds{source(node)}")
        if missing := lacks(node):
            where = region.name or "the graph"
            raise GraphError(f"{each.name} added {node.name} to {where} without {', '.join(missing)}{source(node)}")


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What a model gives for copies of inputs, as a list of tensors; its own state is what it was."""
    with torch.no_grad(), unchanged(model):
        found = pytree.tree_leaves(model(*copied(inputs)))
    return [each.detach().clone() for each in found if isinstance(each, Tensor)]


@contextmanager
def unchanged(model: nn.Module) -> Generator[None]:
    """Give a model's parameters and buffers back what they held."""
    state = [*model.parameters(), *model.buffers()]
    kept = [part.detach().clone() for part in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, held in zip(state, kept, strict=True):
                part.copy_(held)


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs that a model may change."""
    return pytree.tree_map_only(Tensor, _clone, inputs)


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> Difference:
    """Between two lists of as many tensors; numbers that are the same, infinities too, do not differ."""
    largest, energy, error = 0.0, 0.0, 0.0
    for one, other in zip(before, after, strict=True):
        a, b = one.double(), other.double()
        # A NaN where there was none is as far as can be.
        off = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs().nan_to_num(nan=math.inf))
        if off.numel():
            largest = max(largest, float(off.max()))
            energy += float(torch.where(a.isfinite(), a, 0.0).square().sum())
            error += float(off.square().sum())
    if error == 0:
        return Difference(largest, float("inf"))
    share = energy / error
    return Difference(largest, 10 * math.log10(share) if share else -math.inf)
