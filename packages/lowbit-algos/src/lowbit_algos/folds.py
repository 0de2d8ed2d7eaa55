"""Where factors on a weight's inputs can go instead: into the norm or weight that makes them. Found from data flow.

Whatever a block computes, factors of two pass through it without rounding. So a candidate's outputs are doubled in
patterns that spell each output's number, and inputs of weights that double accordingly are told apart exactly: which
output each one comes from, through norms, activations, attention and heads that share keys and values. A fold is
believed only if the block then returns the same bits with random factors on one side and their inverse on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit_algos.watch import Product, Watch

Run = Callable[[], Tensor]
"""Runs the block on a few tokens, and returns what it returns."""


@dataclass(frozen=True, slots=True)
class Producer:
    """What makes inputs: a weight and its bias, or a norm; or the last of several that are stored as one."""

    # Parameters, and the axis of each that its outputs lie along.
    parameters: tuple[tuple[str, int], ...]
    # How many outputs there are along that axis, and how many at its end are meant.
    outputs: int
    channels: int

    def scaled(self, name: str, data: Tensor, factors: Tensor) -> Tensor:
        """One of its parameters so that its outputs come multiplied by `factors` (channels,)."""
        ones = factors.new_ones(self.outputs - self.channels)
        return scale_axis(data, torch.cat((ones, factors)), dict(self.parameters)[name])


@dataclass(frozen=True, slots=True)
class Fold:
    """A producer of inputs, and where each input of its consumers comes from."""

    producer: Producer
    # For each weight that is multiplied with its outputs: the output (K,) that each of the weight's columns takes.
    consumers: Mapping[str, Tensor]


def find_folds(block: nn.Module, weights: Mapping[str, int], run: Run) -> list[Fold]:
    """Every fold of a block; `weights` names what is multiplied with inputs, and the axis of each that sums them up."""
    found: list[Fold] = []
    with torch.no_grad(), kept(block):
        for producer in _producers(block, weights):
            # Gate and up, or query, key and value, may be one weight; the last of them passes factors on.
            for parts in (1, 2, 3):
                if producer.outputs % parts:
                    continue
                last = replace(producer, channels=producer.outputs // parts)
                fold = _Probe(block, weights, run, last).fold()
                if fold is not None:
                    found.append(fold)
                    break
    return found


def scale_axis(x: Tensor, factors: Tensor, axis: int) -> Tensor:
    """`x` with its slices along an axis multiplied by factors."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return x * factors.to(x.dtype).reshape(shape)


@contextmanager
def kept(block: nn.Module) -> Generator[None]:
    """The block's parameters are what they were, whatever was put in their place."""
    before = {name: p.data for name, p in block.named_parameters()}
    try:
        yield
    finally:
        for name, data in before.items():
            block.get_parameter(name).data = data


def _producers(block: nn.Module, weights: Mapping[str, int]) -> Iterator[Producer]:
    """Parameters whose outputs might be scaled: weights by rows, with a bias; and norms, whose weight is a vector."""
    parameters = dict(block.named_parameters())
    for name, weight in parameters.items():
        module, _, local = name.rpartition(".")
        bias = f"{module}.bias" if local == "weight" else f"{name}_bias"
        if name in weights:
            axis = ({0, 1} if weight.dim() == 2 else {1, 2}) - {weights[name] % weight.dim()}
            along = axis.pop()
        elif weight.dim() == 1 and local == "weight":
            along = 0
        else:
            continue
        channels = weight.shape[along]
        scaled = [(name, along)]
        if bias in parameters and parameters[bias].shape[-1] == channels:
            scaled.append((bias, parameters[bias].dim() - 1))
        yield Producer(tuple(scaled), channels, channels)


class _Probe:
    """The search for one producer's consumers."""

    def __init__(self, block: nn.Module, weights: Mapping[str, int], run: Run, producer: Producer) -> None:
        self._block, self._weights, self._run, self._producer = block, weights, run, producer
        self._channels = producer.channels
        self._plain = {name: block.get_parameter(name).data for name in {*weights, *dict(producer.parameters)}}
        self._consumers: dict[str, Tensor] = {}

    def fold(self) -> Fold | None:
        """The fold, where there is one."""
        plain, output = self._inputs(torch.ones(self._channels))
        # What is found is made up for in the next round: a router that sees other inputs sends tokens elsewhere.
        while True:
            fresh = self._search(plain)
            if not fresh:
                return None
            self._consumers |= fresh
            generator = torch.Generator().manual_seed(0)
            factors = torch.randint(-3, 4, (self._channels,), generator=generator).exp2()
            _, changed = self._inputs(factors)
            if torch.equal(changed, output):
                return Fold(self._producer, self._consumers)

    def _search(self, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Consumers that were not known, and where their inputs come from."""
        numbers = torch.arange(self._channels)
        patterns = [torch.ones(self._channels, dtype=torch.bool)]
        patterns += [((numbers >> bit) & 1).bool() for bit in range(max(self._channels - 1, 1).bit_length())]
        source: dict[str, Tensor] = {}
        for step, pattern in enumerate(patterns):
            seen, _ = self._inputs(torch.where(pattern, 2.0, 1.0))
            for name, x in plain.items():
                if name in self._consumers or (step and name not in source):
                    continue
                doubled, same = (seen[name] == 2 * x).all(0), (seen[name] == x).all(0)
                told = bool(doubled.all()) if step == 0 else bool((doubled ^ same).all())
                if not told:
                    source.pop(name, None)
                elif step == 0:
                    source[name] = torch.zeros(x.shape[-1], dtype=torch.int64)
                else:
                    source[name] += doubled.cpu().long() << (step - 1)
        return source

    def _inputs(self, factors: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of every weight, and the block's output, with the producer's outputs multiplied by factors."""
        for name, data in self._plain.items():
            self._block.get_parameter(name).data = data
        for name, _ in self._producer.parameters:
            parameter = self._block.get_parameter(name)
            parameter.data = self._producer.scaled(name, parameter.data, factors.to(parameter.device))
        for name, source in self._consumers.items():
            parameter = self._block.get_parameter(name)
            inverse = factors[source].reciprocal().to(parameter.device)
            parameter.data = scale_axis(parameter.data, inverse, self._weights[name])
        seen: dict[str, Tensor] = {}

        def see(product: Product) -> None:
            seen.setdefault(product.name, product.x.reshape(-1, product.x.shape[-1]).clone())

        with Watch({name: self._block.get_parameter(name) for name in self._weights}, see):
            output = self._run()
        return seen, output
