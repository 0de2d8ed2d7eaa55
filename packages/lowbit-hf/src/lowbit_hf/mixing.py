"""A scheme for each weight of a checkpoint: the least harm within a budget of bits, or a bound on the divergence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from lowbit.errors import RecipeError
from lowbit_algos import Candidate, Method
from lowbit_algos.calibrate import quantize_blocks
from lowbit_algos.distilled import divergence
from lowbit_algos.mixed import Choice, search, targets_of, within
from lowbit_hf.budget import Budget
from lowbit_hf.calibrated import Calibrated
from lowbit_hf.job import Job
from lowbit_hf.schemes import Scheme

KEEP = "KEEP"
"""The candidate that leaves weights as they are."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What was chosen: the scheme of most weights, others by tensor, and tensors that stay as they are."""

    to: Scheme
    rules: tuple[tuple[str, Scheme], ...]
    keep: tuple[str, ...]
    # Mean over the weights that were decided on, and nats a token on held out text where that was bounded.
    bits_per_weight: float
    kl: float | None

    def __str__(self) -> str:
        """In words."""
        counted = Counter(scheme.name for _, scheme in self.rules)
        if self.keep:
            counted[KEEP] = len(self.keep)
        exceptions = "".join(f", {count} tensors {name}" for name, count in counted.most_common())
        kl = "" if self.kl is None else f", {self.kl:.4g} nats a token from the original on held out text"
        return f"chosen: {self.to.name}{exceptions}; {self.bits_per_weight:.4g} bits per weight{kl}"


def choose(
    jobs: Sequence[tuple[Scheme, Job]], *, keep: bool, device: str, bits_per_weight: float | None, max_kl: float | None
) -> Mix:
    """Choose for each weight one of several schemes, each given with the job that gives it to all of them.

    Weights that the user's rules decide on are left to them. `keep`: weights may stay as they are, too.

    Raises:
        RecipeError: the model has no weights to decide on, or memory does not hold what it takes.
        LowbitError: no choice meets what is asked; or as `run`.
    """
    _, first = jobs[0]
    assert first.calibration is not None
    method, windows = first.method or Method(), first.calibration.windows(first.folder)
    decided = {row.name for row in first.plan.rows if row.action == "quantize" and row.rule == "*"}
    schemes = {name: scheme for name, scheme in first.schemes.items() if name in decided}
    calibrated = Calibrated(first.checkpoint, first.skeleton, first.owners, schemes, device=device)
    if not calibrated.targets:
        raise RecipeError("the model's blocks have no weights to choose schemes for; give one scheme by --to")
    # A bound on the divergence takes the whole model in memory, as distillation does.
    planned = first if max_kl is None else replace(first, method=replace(method, distilled=1))
    tokens = Budget(planned, calibrated, device).tokens
    options: list[Scheme | None] = [*(scheme for scheme, _ in jobs), *([None] if keep else [])]
    candidates = [
        Candidate(KEEP, None) if s is None else Candidate(s.name, s.weight_format(first.dtype), s.activation)
        for s in options
    ]
    tensors = {parameter: tuple(parts) for parameter, parts in calibrated.parts.items()}
    decisions = [
        replace(each, bits=_bits([tensor for name in each.names for tensor in tensors[name]], jobs, keep=keep))
        for each in calibrated.weigh(windows, candidates, method, tokens=tokens)
    ]
    entries = first.checkpoint.entries
    count = sum(prod(entries[t].shape) for each in decisions for name in each.names for t in tensors[name])
    if max_kl is None:
        choice, kl = within(decisions, (bits_per_weight or 0.0) * count), None
    else:
        held = max(len(windows) // 8, 1)
        model, batches = calibrated.whole(windows[:-held] if held < len(windows) else windows, tokens)
        _, held_out = calibrated.whole(windows[-held:], tokens)
        axes = {parameter: target.k_axis for parameter, target in calibrated.targets.items()}

        def measure(choice: Choice) -> float:
            targets = targets_of(decisions, choice.picks, candidates, axes)
            made, _ = quantize_blocks(model, targets, batches, method)
            return divergence(model, made, held_out)

        choice, kl = search(decisions, max_kl, measure)
    picked = {
        tensor: options[pick]
        for each, pick in zip(decisions, choice.picks, strict=True)
        for name in each.names
        for tensor in tensors[name]
    }
    used = Counter(scheme for scheme in picked.values() if scheme is not None)
    if not used:
        raise RecipeError("every weight would stay as it is; allow a larger divergence, or do not quantize the model")
    main = used.most_common(1)[0][0]
    rules = tuple((name, scheme) for name, scheme in picked.items() if scheme is not None and scheme != main)
    kept = tuple(name for name, scheme in picked.items() if scheme is None)
    return Mix(main, rules, kept, choice.bits / count, kl)


def _bits(tensors: Sequence[str], jobs: Sequence[tuple[Scheme, Job]], *, keep: bool) -> tuple[float, ...]:
    """Bits that tensors take in the files, by candidate."""
    stored = [
        sum(
            prod(shape) * dtype.itemsize
            for name in tensors
            for _, dtype, shape in job.outputs(job.checkpoint.entries[name])
        )
        for _, job in jobs
    ]
    plain = [sum(jobs[0][1].checkpoint.entries[name].nbytes for name in tensors)] if keep else []
    return tuple(8.0 * nbytes for nbytes in (*stored, *plain))
