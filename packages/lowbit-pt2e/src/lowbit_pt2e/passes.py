"""Passes over exported graphs: what each looks for, why it may not, what it adds; and who checks that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from lowbit.table import align
from lowbit_pt2e.graphs import GraphError, Region, lacks, regions, source, tidy


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """What a pass found: the node that it is named by, and all that it takes the place of."""

    node: Node
    # Why the pass may not change it; None: it may.
    refusal: str | None
    # Puts something else in its place.
    rewrite: Callable[[], None]


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
    findings: list[Finding] = []
    differences: dict[str, Difference] = {}
    regions(model)
    before = None if inputs is None else outputs(model, inputs)
    for each in passes:
        changed = False
        for region in regions(model):
            known = set(region.nodes)
            for match in each.matches(region):
                findings.append(
                    Finding(each.name, region.name, match.node.name, match.refusal, source(match.node).lstrip(", "))
                )
                if match.refusal is None:
                    match.rewrite()
                    changed = True
            _check(each, region, [node for node in region.nodes if node not in known])
        tidy(model)
        if before is not None and changed:
            after = outputs(model, inputs or ())
            differences[each.name] = difference(before, after)
            before = after
    return Report(tuple(findings), differences)


def _check(each: Pass, region: Region, added: Iterable[Node]) -> None:
    for node in added:
        if node.op == "call_function" and node.target not in each.adds:
            raise GraphError(f"{each.name} added {node.target}, which is not what it says it adds{source(node)}")
        if missing := lacks(node):
            where = region.name or "the graph"
            raise GraphError(f"{each.name} added {node.name} to {where} without {', '.join(missing)}{source(node)}")


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What a model gives for copies of inputs, as a list of tensors; its own state is what it was."""
    kept = {name: part.clone() for name, part in model.state_dict().items()}
    with torch.no_grad():
        found = pytree.tree_leaves(model(*copy.deepcopy(inputs)))
    model.load_state_dict(kept)
    return [each.detach().clone() for each in found if isinstance(each, Tensor)]


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> Difference:
    """Between two lists of as many tensors."""
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(before, after, strict=True)]
    one, other = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    error = (one - other).square().sum()
    largest = float((one - other).abs().max()) if one.numel() else 0.0
    return Difference(largest, float("inf") if error == 0 else float(10 * (one.square().sum() / error).log10()))
