"""A format for each weight: the least harm that a budget of bits allows, by what each choice does to its block.

Of a block, the weights that share an input (query, key and value; gate and up) are decided on as one, for engines fuse
them. Each decision's harm under each candidate is measured: with these weights alone quantized, by the method that will
be used, how far the block's output moves, as a share of it, in the mean over tokens. Divergences of the model's
predictions add up in proportion to that (docs/quality.md has how closely), so the sum of harms is what is made small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit import Activation, Format, LowbitError, Recipe, Rule
from lowbit.plan import plan
from lowbit_algos.blocks import Batch, Call, capture, find_blocks
from lowbit_algos.calibrate import quantize_blocks
from lowbit_algos.distilled import divergence
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Target
from lowbit_algos.learned import used
from lowbit_algos.method import Method
from lowbit_algos.rounding import RoundInputs
from lowbit_algos.walk import Walk
from lowbit_algos.watch import Watch

WEIGHED = 4
"""Batches by which harm is measured."""
# Measurements that a search makes at most, but for the most precise choice.
_TRIALS = 6


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a weight could become."""

    name: str
    # None: it stays as it is.
    format: Format | None
    activation: Activation | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Weights that become the same, and what each candidate means for them."""

    names: tuple[str, ...]
    # By candidate: `mean |y' - y|^2 / |y|^2` over tokens, for outputs y of the block; and bits of all the weights.
    harms: tuple[float, ...]
    bits: tuple[float, ...]


def weigh(
    prefix: str,
    block: nn.Module,
    axes: Mapping[str, int],
    candidates: Sequence[Candidate],
    calls: Sequence[Call],
    hidden: Hidden,
    method: Method,
) -> list[Decision]:
    """The decisions of a block, which stays as it is; `axes` has its weights and the axis of each that is summed over.

    Args:
        prefix: what comes before the names of the block's parameters in the model.
        block: runs.
        axes: by name in the block.
        candidates: in any order.
        calls: how the block is called, by batch.
        hidden: what it is fed, by batch; it stays.
        method: rounds. What it does before and after that is left out.
    """
    plain = replace(method, smoothing=None, rotation=False, learned=0, distilled=0)
    walk = Walk(plain, hidden)
    parameters = {name: block.get_parameter(name) for name in axes}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    groups: list[tuple[str, ...]] = []
    harms: dict[tuple[str, ...], list[float]] = {}
    with torch.no_grad():
        wanted = [call(block, hidden[i]) for i, call in enumerate(calls)]
        for candidate in sorted(candidates, key=lambda c: c.format is None):
            fmt = candidate.format
            if fmt is None:
                continue
            targets = {name: Target(fmt, candidate.activation, axis) for name, axis in axes.items()}
            seen = walk.observe(block, targets, calls)
            groups = list(dict.fromkeys(tuple(found.names) for found in seen.values()))
            weights = walk.round(prefix, block, originals, targets, seen).weights
            for group in groups:
                for name in group:
                    parameters[name].data = used(weights[name])
                with Watch({name: parameters[name] for name in group}, RoundInputs(weights)):
                    moved = [_moved(call(block, hidden[i]), wanted[i]) for i, call in enumerate(calls)]
                harms.setdefault(group, []).append(_mean(moved))
                for name in group:
                    parameters[name].data = originals[name]
    order = [candidate for candidate in candidates if candidate.format is not None]
    return [
        Decision(
            tuple(prefix + name for name in group),
            tuple(harms[group][order.index(c)] if c.format is not None else 0.0 for c in candidates),
            tuple(sum(_bits(originals[name], c, axes[name]) for name in group) for c in candidates),
        )
        for group in groups
    ]


def _moved(found: Tensor, wanted: Tensor) -> Tensor:
    """Of tokens, the sum of what each moved as a share of it, and how many there are; float64 (2,)."""
    found, wanted = (x.to(torch.float32).reshape(-1, x.shape[-1]) for x in (found, wanted))
    shares = (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack((shares.sum(dtype=torch.float64), shares.new_tensor(len(shares), dtype=torch.float64)))


def _mean(moved: Sequence[Tensor]) -> float:
    total = torch.stack(list(moved)).sum(0)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total[0] / total[1])


def _bits(weight: Tensor, candidate: Candidate, axis: int) -> float:
    if candidate.format is None:
        return 8 * weight.element_size() * weight.numel()
    shape = tuple(weight.movedim(axis, -1).shape)
    return candidate.format.bits_per_element(shape) * weight.numel()


@dataclass(frozen=True, slots=True)
class Mixture:
    """What was chosen for the weights of a model, and what it is measured to do."""

    recipe: Recipe
    decisions: tuple[Decision, ...]
    # The candidate of each decision, by number.
    picks: tuple[int, ...]
    bits_per_weight: float
    # The predictions' divergence from the original's, nats a token on held out batches, where that was bounded.
    kl: float | None


def mix(
    model: nn.Module,
    weights: str,
    candidates: Sequence[Candidate],
    batches: Iterable[Batch],
    method: Method | None = None,
    *,
    bits_per_weight: float | None = None,
    max_kl: float | None = None,
) -> Mixture:
    """Choose one of `candidates` for each of a model's `weights` (a pattern, as rules take it); the model stays.

    Either the least harm for `bits_per_weight`, the mean over all of them, kept ones too; or the fewest bits for a
    divergence of `max_kl` nats a token on an eighth of the batches, which is not calibrated on.

    Raises:
        RecipeError: as `lowbit.plan`, for each candidate.
        LowbitError: as `calibrate_`; none of the candidates meets what is asked; or not one of both was asked.
    """
    if (bits_per_weight is None) == (max_kl is None):
        raise LowbitError("give one of bits_per_weight and max_kl")
    method, batches = method or Method(), list(batches)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    axes: dict[str, int] = {}
    for candidate in candidates:
        if candidate.format is not None:
            recipe = Recipe((Rule(weights, candidate.format, candidate.activation),))
            rows = plan(model, recipe, device=device).rows
            axes |= {row.name: row.k_axis for row in rows if row.action == "quantize"}
    blocks, decisions = find_blocks(model), list[Decision]()
    with torch.no_grad():
        captured = capture(model, blocks, batches[:WEIGHED])
        hidden = Hidden.of(captured.hidden)
        for k, (name, block) in enumerate(blocks.items()):
            prefix, calls = f"{name}." if name else "", captured.calls[k]
            mine = {n.removeprefix(prefix): axis for n, axis in axes.items() if n.startswith(prefix)}
            decisions += weigh(prefix, block, mine, candidates, calls, hidden, method) if mine else []
            hidden = Hidden.of([call(block, hidden[i]) for i, call in enumerate(calls)])
    held = batches[-max(len(batches) // 8, 1) :]

    def measure(choice: Choice) -> float:
        chosen = targets_of(decisions, choice.picks, candidates, axes)
        made, _ = quantize_blocks(model, chosen, batches[: -len(held)] or held, method)
        return divergence(model, made, held)

    count = sum(model.get_parameter(name).numel() for d in decisions for name in d.names)
    if max_kl is None:
        choice, kl = within(decisions, (bits_per_weight or 0.0) * count), None
    else:
        choice, kl = search(decisions, max_kl, measure)
    chosen = targets_of(decisions, choice.picks, candidates, axes)
    names = [name for d in decisions for name in d.names]
    rules = tuple(
        Rule(name, chosen[name].format, chosen[name].activation, axes[name]) if name in chosen else Rule(name, None)
        for name in names
    )
    return Mixture(Recipe(rules), tuple(decisions), choice.picks, choice.bits / count, kl)


def targets_of(
    decisions: Sequence[Decision], picks: Sequence[int], candidates: Sequence[Candidate], axes: Mapping[str, int]
) -> dict[str, Target]:
    """What each weight that does not stay as it is becomes, by name."""
    chosen = {name: candidates[pick] for d, pick in zip(decisions, picks, strict=True) for name in d.names}
    return {
        name: Target(candidate.format, candidate.activation, axes[name])
        for name, candidate in chosen.items()
        if candidate.format is not None
    }


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate for each decision."""

    picks: tuple[int, ...]
    harm: float
    bits: float


def choices(decisions: Sequence[Decision]) -> list[Choice]:
    """From the fewest bits to the least harm: each takes the step from the one before that gains most a bit.

    For each of these budgets there is no better choice; for those between, hardly one.
    """
    hulls = [_hull(decision) for decision in decisions]
    steps = sorted(_steps(hulls, decisions), key=lambda step: -step[0])
    picks = [hull[0] for hull in hulls]
    found = [_choice(decisions, picks)]
    for _, at, pick in steps:
        picks[at] = pick
        found.append(_choice(decisions, picks))
    return found


def within(decisions: Sequence[Decision], bits: float) -> Choice:
    """The choice of least harm that takes no more than so many bits.

    Raises:
        LowbitError: all take more.
    """
    found = choices(decisions)
    fitting = [choice for choice in found if choice.bits <= bits]
    if not fitting:
        raise LowbitError(
            f"the fewest bits that these candidates take are {found[0].bits:.0f}, and {bits:.0f} are allowed; allow "
            "more, or add a candidate that takes fewer"
        )
    picks = list(fitting[-1].picks)
    # What is left is too little for the next step of the row, but may do for a smaller one.
    while True:
        now = _choice(decisions, picks)
        better = [
            ((decision.harms[picks[at]] - decision.harms[c]), at, c)
            for at, decision in enumerate(decisions)
            for c in range(len(decision.harms))
            if decision.harms[c] < decision.harms[picks[at]]
            and now.bits + decision.bits[c] - decision.bits[picks[at]] <= bits
        ]
        if not better:
            return now
        _, at, c = max(better)
        picks[at] = c


def search(decisions: Sequence[Decision], most: float, measure: Callable[[Choice], float]) -> tuple[Choice, float]:
    """The choice of fewest bits whose divergence, as `measure` finds it, is `most` nats a token or less, and that.

    Harm foretells divergence up to a factor, which each measurement corrects; a handful are made.

    Raises:
        LowbitError: the most precise choice diverges further.
    """
    found = choices(decisions)
    low, high, best, factor = -1, len(found), -1, 2.5
    told: dict[int, float] = {}
    while high - low > 1 and len(told) < _TRIALS:
        guess = next((i for i, choice in enumerate(found) if factor * choice.harm <= most), len(found) - 1)
        # Without a first bracket the guess itself, and never one that is known to be too far or no gain.
        at = min(max(guess, low + 1), high - 1)
        told[at] = measure(found[at])
        if found[at].harm > 0:
            factor = told[at] / found[at].harm
        if told[at] <= most:
            high = best = at
        else:
            low = at
    if best < 0 and len(found) - 1 not in told:
        best = len(found) - 1
        told[best] = measure(found[best])
    if best < 0 or told[best] > most:
        raise LowbitError(
            f"the most precise choice of these candidates diverges by {told[len(found) - 1]:.4g} nats a token, and "
            f"{most:g} are allowed; allow more, or add a candidate that is more precise, or keeps weights as they are"
        )
    return found[best], told[best]


def _choice(decisions: Sequence[Decision], picks: Sequence[int]) -> Choice:
    chosen = list(zip(decisions, picks, strict=True))
    return Choice(tuple(picks), math.fsum(d.harms[c] for d, c in chosen), math.fsum(d.bits[c] for d, c in chosen))


def _hull(decision: Decision) -> list[int]:
    """The candidates that are best for some price of a bit, from the fewest bits on."""
    order = sorted(range(len(decision.bits)), key=lambda c: (decision.bits[c], decision.harms[c]))
    hull: list[int] = []
    for c in order:
        if hull and decision.harms[c] >= decision.harms[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(decision, hull[-2], hull[-1]) <= _gain(decision, hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def _gain(decision: Decision, a: int, b: int) -> float:
    """Harm less for each bit more, from candidate a to b."""
    more = decision.bits[b] - decision.bits[a]
    return math.inf if more <= 0 else (decision.harms[a] - decision.harms[b]) / more


def _steps(hulls: Sequence[Sequence[int]], decisions: Sequence[Decision]) -> Iterator[tuple[float, int, int]]:
    """Gain a bit, which decision, and the candidate it goes to."""
    for at, (hull, decision) in enumerate(zip(hulls, decisions, strict=True)):
        for a, b in pairwise(hull):
            yield _gain(decision, a, b), at, b
