"""Learning how weights are rounded, and their scales, from what a block returns, or what the whole model predicts.

Rounding to nearest has no gradient, so that of what comes out of it is taken for that of what goes in. Each step runs
the block, or the model, on some of the tokens and moves every value against the sign of the gradient of the loss; steps
get smaller until, in all, a value may have moved by a part of its grid's step. What was learned is kept if it is better
on tokens that it was not learned from.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"; Esser et al.,
"Learned Step Size Quantization", for the gradient of a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from lowbit import QuantizedTensor, Scales
from lowbit.element import power_of_two
from lowbit.numerics import decode, encode, join_blocks, split_blocks, spread, total_scale
from lowbit_algos.blocks import Call
from lowbit_algos.hidden import Hidden
from lowbit_algos.rounding import with_use
from lowbit_algos.watch import Product, See, Watch

# Of a scale, what part of it may be added or taken away.
_SCALES = 0.5
# Of a grid's step, how far from what it was rounded to a value starts, where that was not the nearest.
_ASIDE = 0.2
# Of so many batches, one is not learned from.
_HELD_OUT = 16


Loss = Callable[[Mapping[str, Tensor], int], Tensor]
"""What batch i loses under the values of weights, by name; summed over its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How long weights are learned, and how far they may go."""

    steps: int
    # Tokens of a step.
    tokens: int
    # Of a grid's step, how far a value may move in all.
    reach: float


@dataclass(frozen=True, slots=True)
class Learned:
    """Weights that were learned, or those given where they are no better; and the loss a token, held out."""

    weights: dict[str, QuantizedTensor]
    before: float
    after: float


def learn_block(
    block: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    originals: Mapping[str, Tensor],
    calls: Sequence[Call],
    fed: Hidden,
    wanted: Hidden,
    see: See,
    *,
    steps: int,
) -> dict[str, QuantizedTensor]:
    """Weights of a block that make of `fed` what comes closer to `wanted`; those given, where none do.

    Args:
        block: what runs; it stays as it is.
        weights: where to start, by name.
        originals: what they were rounded from, by name.
        calls: how the block is called, by batch.
        fed: its inputs, by batch.
        wanted: what it should return, by batch.
        see: rounds the inputs of weights, as `Watch` takes it; gradients pass as if it did not.
        steps: how many are made.
    """
    # What is not learned gets no gradients, though the model may be one in training.
    rest = {name: parameter.detach() for name, parameter in block.named_parameters()}

    def loss(weights: Mapping[str, Tensor], i: int) -> Tensor:
        changed: Any = partial(_call, block, {**rest, **weights})
        with Watch(weights, partial(straight, see)):
            out = calls[i](changed, fed[i])
        return (out.to(torch.float32) - wanted[i].to(torch.float32)).square().sum()

    course = Course(steps=steps, tokens=4096, reach=0.5)
    return learn(weights, originals, loss, [fed.tokens(i) for i in range(len(fed))], course).weights


def learn(
    weights: Mapping[str, QuantizedTensor],
    originals: Mapping[str, Tensor],
    loss: Loss,
    tokens: Sequence[int],
    course: Course,
) -> Learned:
    """Learn `weights` that were rounded from `originals`, by the loss on batches of so many tokens each."""
    learning = {name: _Learning(q, originals[name]) for name, q in weights.items()}
    held = max(len(tokens) // _HELD_OUT, 1) if len(tokens) > 1 else 0
    judged = range(len(tokens) - held, len(tokens)) if held else range(len(tokens))

    def error(weights: Mapping[str, QuantizedTensor]) -> float:
        values = {name: used(q) for name, q in weights.items()}
        total = torch.stack([loss(values, i).to(torch.float64) for i in judged]).sum()
        total = torch.stack((total, total.new_tensor(sum(tokens[i] for i in judged))))
        if dist.is_initialized():
            dist.all_reduce(total)
        return float(total[0] / total[1])

    with torch.no_grad():
        before = error(weights)
    for step, batches in enumerate(_batches(tokens[: len(tokens) - held], course)):
        for i in batches:
            with torch.enable_grad():
                loss({name: each.value() for name, each in learning.items()}, i).backward()
        for each in learning.values():
            each.step(2 * course.reach * (1 - step / course.steps) / course.steps)
    with torch.no_grad():
        learned = {name: each.quantized() for name, each in learning.items()}
        after = error(learned)
    return Learned(learned, before, after) if after < before else Learned(dict(weights), before, before)


def used(q: QuantizedTensor) -> Tensor:
    """Plain values of a weight that is multiplied with its input as it comes."""
    return _as_used(q.dequantize().movedim(_axis(q), -1), q).to(q.dtype)


def _as_used(values: Tensor, q: QuantizedTensor) -> Tensor:
    """Canonical values in the order of the weight's axes, and with its pre_scale."""
    if q.pre_scale is not None:
        values = values.to(torch.float32) * q.pre_scale
    return values.movedim(-1, _axis(q))


def _axis(q: QuantizedTensor) -> int:
    """Which of the weight's axes its blocks lie along."""
    return q.permutation.index(q.dim() - 1)


def _batches(tokens: Sequence[int], course: Course) -> Iterator[list[int]]:
    """For each step, batches that have its tokens; in an order that is always the same."""
    generator = torch.Generator().manual_seed(0)
    left: list[int] = []
    for _ in range(course.steps):
        taken: list[int] = []
        while len(taken) < len(tokens) and sum(tokens[i] for i in taken) < course.tokens:
            left = left or torch.randperm(len(tokens), generator=generator).tolist()
            taken.append(left.pop())
        yield taken


def _call(block: nn.Module, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(block, dict(weights), args, kwargs)


def straight(see: See, product: Product) -> Tensor | None:
    """What `see` makes of inputs, with the gradient that they have without it."""
    with torch.no_grad():
        rounded = see(product)
    if rounded is None:
        return None
    x = product.x.reshape(rounded.shape)
    return x + (rounded - x).detach()


class _Learning:
    """A weight while it is learned: canonical float32 values, and scales, that are rounded whenever they are used."""

    def __init__(self, q: QuantizedTensor, original: Tensor) -> None:
        self._q = q
        rounded = q.dequantize(torch.float32).movedim(_axis(q), -1)
        w = original.detach().to(torch.float32).movedim(_axis(q), -1)
        k = q.canonical_shape[-1]
        nearest = decode(encode(w, q.format, q.scales), q.format, q.scales, k) == rounded
        aside = rounded + (w - rounded).sign() * _ASIDE * self._grid(rounded)
        self._values = torch.where(nearest, w, aside).requires_grad_()
        # A scale of few bits could only jump, and all of its block with it.
        self._learns_scale = q.format.scale.bits > 8
        self._first = q.scales.scale.to(torch.float32)
        self._scale = self._first.clone().requires_grad_(self._learns_scale)

    def value(self) -> Tensor:
        """What the block is to multiply with; gradients come through it."""
        value: Any = _Round.apply(self._values, self._scale, self._q)
        return _as_used(value, self._q).to(self._q.dtype)

    def step(self, rate: float) -> None:
        """Go against the sign of the gradient, by a share `rate` of the grid's step, and of the scale."""
        moves = [(self._values, self._grid(self._values.detach()))]
        if self._learns_scale:
            moves.append((self._scale, self._first))
        with torch.no_grad():
            for part, unit in moves:
                # Tokens of this process may have gone elsewhere, as experts' do.
                grad = torch.zeros_like(part) if part.grad is None else part.grad
                if dist.is_initialized():
                    dist.all_reduce(grad)
                part.sub_(rate * unit * grad.sign())
                part.grad = None
            self._scale.copy_(self._scale.clamp((1 - _SCALES) * self._first, (1 + _SCALES) * self._first))

    def quantized(self) -> QuantizedTensor:
        """What was learned."""
        q = self._q
        # A scale that is not learned keeps its bits.
        scale = q.format.scale.encode(self._scale) if self._learns_scale else q.scales.scale
        scales = replace(q.scales, scale=scale)
        data, k = encode(self._values, q.format, scales), q.canonical_shape[-1]
        learned = QuantizedTensor.from_parts(data, scales, q.format, k=k, dtype=q.dtype, axis=_axis(q))
        return with_use(learned, q.activation, act_scale=q.act_scale, act_zero=q.act_zero, pre_scale=q.pre_scale)

    def _grid(self, values: Tensor) -> Tensor:
        """The grid's step at each value, under the scales that were there at first."""
        fmt, total = self._q.format, spread(total_scale(self._q.scales))
        codes = split_blocks(values, fmt.block_of(tuple(values.shape))) / total
        if fmt.element.kind == "int":
            return join_blocks(total.expand(codes.shape), values.shape)
        # frexp takes the significand to be below 1.
        exponent = (codes.frexp().exponent - 1).clamp(1 - fmt.element.bias, fmt.element.max_exponent)
        return join_blocks(power_of_two(exponent - fmt.element.mantissa) * total, values.shape)


class _Round(torch.autograd.Function):
    """Values rounded under scales that are rounded too; the gradient of a value is that of what it is rounded to."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, q: QuantizedTensor) -> Tensor:
        """What canonical values become."""
        fmt, element = q.format, q.format.element
        stored = fmt.scale.encode(scale) if ctx.needs_input_grad[1] else q.scales.scale
        total = spread(total_scale(Scales(stored, None, q.scales.tensor_scale)))
        x = split_blocks(values, fmt.block_of(tuple(values.shape))) / total
        zero = 0.0 if q.zero is None else spread(q.zero.to(torch.float32))
        codes = element.decode(element.encode(x if q.zero is None else element.round(x) + zero)) - zero
        if ctx.needs_input_grad[1]:
            # With the value held, a scale acts by what rounding adds to a code; where it saturates, by the code.
            inside = (x >= element.min - zero) & (x <= element.max - zero)
            ctx.save_for_backward(torch.where(inside, codes - x, codes))
        return join_blocks(codes * total, values.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The gradient of what values became, and the sum of what it means for each scale."""
        (grad,) = grads
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        (by_scale,) = ctx.saved_tensors
        product = split_blocks(grad, by_scale.shape[1::2]) * by_scale
        return grad, product.sum(tuple(range(1, product.dim(), 2))), None
