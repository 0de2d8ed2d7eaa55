"""Rotating what flows from block to block, and the values of attention heads, into bases without outliers.

A model whose norms divide by the root of the mean square returns the same when its hidden states h are `h Q` instead,
Q orthonormal: what makes them is multiplied by Q, what takes them by Q too, after each norm's weight went into it. So
only weights change, and nothing is computed besides. Which weights make them and which take them is found from what a
block computes, and believed only if the block then returns the same, in float32, but rotated.

Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", its rotations that can be folded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit import LowbitError
from lowbit.hadamard import Rotation
from lowbit_algos.blocks import Probe
from lowbit_algos.folds import Fold, find_folds, kept, scale_axis

# Of what a block adds to its input, how much may change: float32 sums in another order do less, a wrong basis far more.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Turns:
    """What a rotation does to a block's parameters."""

    # Norms, whose weights become ones, by the weights that take what they make, and those weights' input axes.
    takers: Mapping[str, tuple[str, int]]
    # What makes hidden states: weights and biases, by the axis of their outputs.
    makers: Mapping[str, int]
    # Weights and biases, by the axis along which their pieces of so many channels are rotated.
    heads: Mapping[str, tuple[int, int]]

    def apply(self, block: nn.Module, rotation: Rotation) -> dict[str, Tensor]:
        """The parameters it changes, in float32."""
        made = {name: block.get_parameter(name).detach().to(torch.float32) for name in {*self.takers, *self.makers}}
        for name, (norm, axis) in self.takers.items():
            made[name] = rotation(scale_axis(made[name], block.get_parameter(norm).to(torch.float32), axis), axis)
        for name, axis in self.makers.items():
            made[name] = rotation(made[name], axis)
        for name, (axis, size) in self.heads.items():
            held = made.get(name, block.get_parameter(name).detach().to(torch.float32))
            made[name] = Rotation(size)(held, axis)
        for norm, _ in self.takers.values():
            made[norm] = torch.ones_like(block.get_parameter(norm), dtype=torch.float32)
        return made


def find_turns(block: nn.Module, weights: Mapping[str, int], probe: Probe, rotation: Rotation) -> Turns:
    """How a block is rotated; `weights` names what is multiplied with inputs, and the axis of each that sums them up.

    Raises:
        LowbitError: it cannot be.
    """
    folds = find_folds(block, weights, probe)
    takers = {
        name: (fold.producer.parameters[0][0], weights[name])
        for fold in folds
        if len(fold.producer.parameters) == 1 and fold.producer.channels == rotation.size and _is_norm(block, fold)
        for name, source in fold.consumers.items()
        if torch.equal(source, torch.arange(len(source)))
    }
    makers = {
        name: axis
        for weight, k_axis in weights.items()
        if weight not in takers
        for name, axis in _outputs(block, weight, k_axis).items()
        if block.get_parameter(name).shape[axis] == rotation.size
    }
    turns = Turns(takers, makers, {})
    error = _difference(block, turns, probe, rotation) if takers and makers else torch.inf
    if not error < _TOLERANCE:
        raise LowbitError(
            "the block does not return the same in a rotated basis: rotation needs norms that divide by the root of "
            "the mean square and multiply by a weight, as Llama's and Qwen's do, and nothing else between hidden "
            "states and weights; choose algorithms without rotation"
        )
    for fold in folds:
        producer = fold.producer.parameters[0][0]
        if producer in weights and fold.producer.outputs == fold.producer.channels:
            turns = _with_heads(block, weights, turns, fold, probe, rotation)
    return turns


def _with_heads(
    block: nn.Module, weights: Mapping[str, int], turns: Turns, fold: Fold, probe: Probe, rotation: Rotation
) -> Turns:
    """The same, and the heads of what a weight makes rotated, where it makes heads that are taken as they are."""
    size = fold.producer.channels & -fold.producer.channels
    while size > 1:
        heads = {name: (axis, size) for name, axis in fold.producer.parameters}
        heads |= {name: (weights[name], size) for name in fold.consumers}
        more = Turns(turns.takers, turns.makers, {**turns.heads, **heads})
        # Within a head, channels keep their order.
        whole = all(_in_pieces(source, size) for source in fold.consumers.values())
        if whole and _difference(block, more, probe, rotation) < _TOLERANCE:
            return more
        size //= 2
    return turns


def _in_pieces(source: Tensor, size: int) -> bool:
    if len(source) % size:
        return False
    pieces = source.view(-1, size)
    return bool((pieces[:, 0] % size == 0).all()) and torch.equal(
        pieces, pieces[:, :1] + torch.arange(size, device=source.device)
    )


def _is_norm(block: nn.Module, fold: Fold) -> bool:
    return block.get_parameter(fold.producer.parameters[0][0]).dim() == 1


def _outputs(block: nn.Module, weight: str, k_axis: int) -> dict[str, int]:
    """A weight and its bias, and the axis of each that its outputs lie along."""
    rank = block.get_parameter(weight).dim()
    found = {weight: next(axis for axis in (-1, -2) if axis != k_axis - rank * (k_axis >= 0))}
    module, _, local = weight.rpartition(".")
    bias = f"{module}.bias" if local == "weight" else f"{weight}_bias"
    return found | ({bias: -1} if bias in dict(block.named_parameters()) else {})


def _difference(block: nn.Module, turns: Turns, probe: Probe, rotation: Rotation) -> float:
    """Of what the block adds to a few tokens, which part is not the same when they are rotated; in float32."""
    with kept(block):
        plain = probe.to(torch.float32)
        for parameter in block.parameters():
            parameter.data = parameter.data.to(torch.float32)
        added = rotation(plain() - plain.hidden)
        for name, values in turns.apply(block, rotation).items():
            block.get_parameter(name).data = values
        turned = plain.fed(rotation(plain.hidden))
        return float((turned() - turned.hidden - added).norm() / added.norm())


@dataclass(frozen=True, slots=True)
class Ends:
    """What lies before and behind the blocks of a model that can be rotated, by name."""

    embedding: str
    norm: str
    head: str

    @property
    def names(self) -> tuple[str, str, str]:
        """All of them."""
        return self.embedding, self.norm, self.head

    def turned(self, name: str, data: Tensor, rotation: Rotation, norm: Tensor) -> Tensor:
        """One of the three, or rows of it, in its dtype; `norm` is the norm's weight as it was."""
        if name == self.norm:
            return torch.ones_like(data)
        values = data.to(torch.float32)
        return rotation(values if name == self.embedding else values * norm.to(torch.float32)).to(data.dtype)


def find_ends(model: nn.Module, blocks: Iterable[str]) -> Ends:
    """What lies before and behind the blocks.

    Raises:
        LowbitError: it is not an embedding, a norm and a head, and nothing else.
    """
    inside = tuple(f"{block}." for block in blocks)
    rest = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(inside)}
    embeddings = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)} & rest.keys()
    norms = [name for name, p in rest.items() if p.dim() == 1]
    heads = [name for name, p in rest.items() if p.dim() == 2 and name not in embeddings]
    if len(embeddings) != 1 or len(norms) != 1 or len(heads) != 1 or len(rest) != len({*embeddings, *norms, *heads}):
        raise LowbitError(
            "rotation needs a model that has an embedding before its blocks, a norm and a head behind them, and no "
            f"other parameters; outside its blocks this one has {', '.join(sorted(rest)) or 'none'}"
        )
    return Ends(embeddings.pop(), norms[0], heads[0])
