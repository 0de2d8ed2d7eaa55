"""Distilling a whole model: its rounding learned from what the original predicts, not block by block.

What a block returns is not what counts; what the model predicts of the next token is. So all weights are learned at
once, by the divergence `sum_v p(v) (log p(v) - log q(v))` of predictions q of the quantized model from those p of the
original. It takes a model that memory holds, with gradients.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network"; Liu et al., "LLM-QAT: Data-Free
Quantization Aware Training for Large Language Models", for what it does for rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from lowbit import LowbitError, QuantizedTensor
from lowbit_algos.blocks import Batch, call_model
from lowbit_algos.learned import Course, Learned, learn, straight, used
from lowbit_algos.rounding import RoundInputs
from lowbit_algos.watch import Watch


class Student:
    """Tells how far the predictions of a model with other parameters are from its own."""

    def __init__(self, model: nn.Module, made: Mapping[str, Tensor]) -> None:
        """`made` is what takes the place of the model's parameters, by name, whether quantized or not."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # What is not learned gets no gradients; modules that share a parameter share what it became.
        shared = {id(parameters[name]): weight for name, weight in made.items()}
        every = {name: made.get(name, shared.get(id(p), p.detach())) for name, p in parameters.items()}
        self._model = model
        self.low = {name: weight for name, weight in every.items() if isinstance(weight, QuantizedTensor)}
        self._plain = {name: weight for name, weight in every.items() if name not in self.low}
        self._see = partial(straight, RoundInputs(self.low))

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The divergence, nats, summed over the tokens of a batch, with `values` of the quantized weights."""
        with torch.no_grad():
            wanted = log_probabilities(self._model, batch)
        found = self.predict(values, batch)
        # A token that the original rules out (logit -inf) adds nothing, whatever the other says of it.
        return torch.where(wanted == -torch.inf, 0.0, wanted.exp() * (wanted - found)).sum()

    def predict(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Log-probabilities for a batch with `values` of the quantized weights."""
        changed: Any = partial(_call, self._model, {**self._plain, **values})
        with Watch(values, self._see):
            return log_probabilities(changed, batch)


@torch.no_grad()
def divergence(model: nn.Module, made: Mapping[str, Tensor], batches: Sequence[Batch]) -> float:
    """How far predictions with `made` in place of a model's parameters are from its own, in nats a token."""
    student = Student(model, made)
    values = {name: used(q) for name, q in student.low.items()}
    parts = [student(values, batch).to(torch.float64) for batch in batches]
    total = torch.stack((torch.stack(parts).sum(), parts[0].new_tensor(sum(tokens_of(model, batches)))))
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total[0] / total[1])


@torch.no_grad()
def replay(model: nn.Module, made: Mapping[str, Tensor], batches: Iterable[Batch]) -> None:
    """Run a model on batches with `made` in place of its parameters, for those who look at its modules meanwhile."""
    student = Student(model, made)
    values = {name: used(q) for name, q in student.low.items()}
    for batch in batches:
        student.predict(values, batch)


def distill(
    model: nn.Module, made: Mapping[str, Tensor], aims: Mapping[str, Tensor], batches: Sequence[Batch], *, steps: int
) -> Learned:
    """Learn quantized weights so that the model with them predicts what `model` does; their loss is nats a token.

    Args:
        model: the original; it stays as it is.
        made: what is to take the place of its parameters, by name, whether quantized or not.
        aims: what quantized weights were rounded from, by name; of others, nothing is learned.
        batches: what the model is called with.
        steps: how many are made.

    Raises:
        LowbitError: the model returns no logits.
    """
    student = Student(model, made)
    rest = {name: used(q) for name, q in student.low.items() if name not in aims}

    def loss(values: Mapping[str, Tensor], i: int) -> Tensor:
        return student({**rest, **values}, batches[i])

    course = Course(steps=steps, tokens=8192, reach=0.25)
    return learn({name: student.low[name] for name in aims}, aims, loss, tokens_of(model, batches), course)


@torch.no_grad()
def tokens_of(model: nn.Module, batches: Sequence[Batch]) -> list[int]:
    """How many tokens each batch has predictions for.

    Raises:
        LowbitError: the model returns no logits.
    """
    return [log_probabilities(model, batch).shape[:-1].numel() for batch in batches]


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Float32 log-probabilities (.., vocabulary) that a model predicts for a batch.

    Raises:
        LowbitError: it returns no logits.
    """
    output = call_model(model, batch)
    logits: Any = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise LowbitError(
            f"the model returns {type(output).__name__} without logits; distillation needs a model that predicts tokens"
        )
    return logits.to(torch.float32).log_softmax(-1)


def _call(model: nn.Module, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    # Modules that share a parameter may have become two, and both are named.
    return functional_call(model, dict(parameters), args, kwargs, tie_weights=False)
