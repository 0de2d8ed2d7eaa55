"""Observation apart from storage: modules that watch what passes, and become quantized ones when enough was seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit import Activation, Format, LowbitError, Plan, QuantizedTensor, Recipe, quantize
from lowbit.numerics import DEFAULT_MODE, ScaleMode
from lowbit.observer import MinMax, Observer
from lowbit.plan import plan
from lowbit_algos.rounding import with_use
from lowbit_algos.watch import Product, Watch

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)


class ObservedLinear(nn.Module, Generic[Layer]):
    """A linear layer, conv1d, conv2d or embedding, or a subclass, whose input, weight and output may be observed.

    Each is by an observer, or by none. It knows no format: the same statistics serve any, when `convert` is called.
    Observers see channels last: those of a convolution's inputs and outputs, and the rows of a weight, which are
    output channels, or the words of a table.

    Raises:
        LowbitError: the layer is of another kind, or an embedding's input, which is indices, has an observer.
    """

    def __init__(
        self,
        linear: Layer,
        *,
        input: Observer | None = None,  # noqa: A002 - what it observes
        weight: Observer | None = None,
        output: Observer | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):  # pyright: ignore[reportUnnecessaryIsInstance] - callers need not be typed
            raise LowbitError(
                f"a {type(linear).__name__} was given; needed is a Linear, Conv1d, Conv2d or Embedding, or a subclass"
            )
        if isinstance(linear, nn.Embedding) and input is not None:
            raise LowbitError("an embedding's input is indices, which have no range; observe its weight or its output")
        self.linear = linear
        self.input, self.weight, self.output = input, weight, output
        if weight is not None:
            # Rows are what formats tell apart.
            weight.update(linear.weight.flatten(1).T)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of x: (.., K), (N, C, ..) for a convolution, or indices, observed as is the result."""
        # Before the dims of a window, or last where there is none.
        channels = 1 - self.linear.weight.dim()
        if self.input is not None:
            self.input.update(x.movedim(channels, -1))
        y: Tensor = self.linear(x)
        if self.output is not None:
            self.output.update(y.movedim(channels, -1))
        return y

    def convert(
        self,
        fmt: Format | str,
        activation: Activation | str | None = None,
        *,
        axis: int = -1,
        mode: ScaleMode = DEFAULT_MODE,
    ) -> Layer:
        """The layer itself, its weight now quantized, with the static scale of its input if the activation has one.

        A weight that was observed is rounded under its observer's scales: of a format with one in all, or, by an
        observer of as many channels as there are rows, with one a row; of NVFP4 it says the tensor scale. Blocks run
        along `axis`, which for a convolution may be that of its input channels, 1.

        Raises:
            LowbitError: the activation needs an observed input, or nothing was observed, or the layer cannot round its
                input so, or sums over no such axis; the layer is unchanged then.
        """
        fmt = Format.parse(fmt) if isinstance(fmt, str) else fmt
        activation = Activation.parse(activation) if isinstance(activation, str) else activation
        weight = self.linear.weight.detach()
        _check_use(self.linear, activation, axis)
        if self.weight is not None:
            scales = self.weight.qparams(fmt, mode=mode)
            parts = (scales.scale, scales.zero, scales.tensor_scale)
            scale, zero, whole = (None if part is None else _as_rows(part, weight) for part in parts)
            given = (None, None) if fmt.tensor_scale else (scale, zero)
            q = quantize(weight, fmt, *given, whole, axis=axis, mode=mode)
        else:
            q = quantize(weight, fmt, axis=axis, mode=mode)
        used = _with_static(q, activation, self.input, "the layer")
        self.linear.weight = nn.Parameter(used, requires_grad=False)
        return self.linear


class Observation(nn.Module):
    """What `observe` has seen of a model; its state dict holds the statistics, and `convert_` uses them."""

    def __init__(self, model: nn.Module, result: Plan, make: Callable[[], Observer]) -> None:
        super().__init__()
        self.plan = result
        parameters = dict(model.named_parameters(remove_duplicate=False))
        rows = {row.name: row for row in result.rows if row.action == "quantize" and row.activation is not None}
        self.inputs = nn.ModuleDict({name.replace(".", "/"): make() for name in rows})
        self._watch: list[Watch] = []
        self._parameters_by_name = {name: parameters[name] for name in rows}
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def of(self, name: str) -> Observer:
        """The observer of the inputs of a parameter."""
        found = self.inputs[name.replace(".", "/")]
        assert isinstance(found, Observer)
        return found

    def remove(self) -> None:
        """Take the hooks off the model; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def convert_(self, model: nn.Module, *, mode: ScaleMode = DEFAULT_MODE) -> Plan:
        """Round `model`'s parameters in place, to nearest, as the recipe says, inputs by what was observed.

        Raises:
            LowbitError: a static activation's input was not seen; nothing is changed then.
        """
        self.remove()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        fresh: dict[int, nn.Parameter] = {}
        for row in self.plan.rows:
            if row.action != "quantize" or row.format is None:
                continue
            q = quantize(parameters[row.name].detach(), row.format, axis=row.k_axis, mode=mode)
            seen = self.of(row.name) if row.activation is not None else None
            fresh[id(parameters[row.name])] = nn.Parameter(
                _with_static(q, row.activation, seen, row.name), requires_grad=False
            )
        for name, parameter in parameters.items():
            if id(parameter) in fresh:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, fresh[id(parameter)])
        return self.plan

    def _enter(self, module: nn.Module, args: Any) -> None:
        del module, args
        watch = Watch(self._parameters_by_name, self._see, convolutions=True)
        watch.__enter__()
        self._watch.append(watch)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        if self._watch:
            self._watch.pop().__exit__(None, None, None)

    def _see(self, product: Product) -> None:
        self.of(product.name).update(product.x)


def observe(model: nn.Module, recipe: Recipe, *, observer: Callable[[], Observer] = MinMax) -> Observation:
    """Watch the inputs that `recipe` rounds while `model` runs, by hooks on the model and without changing it.

    Run the model on calibration data, then call `convert_` on what this returns; leaving it as a context, or `remove`,
    takes the hooks off. `observer` makes one for each parameter.

    Raises:
        RecipeError: as `lowbit.plan`.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Observation(model, plan(model, recipe, device=device), observer)


def _check_use(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding, activation: Activation | None, axis: int
) -> None:
    """Refuse what the layer could not run.

    Raises:
        LowbitError: its input cannot be rounded so, or it does not sum over the axis.
    """
    if activation is not None and isinstance(layer, nn.Embedding):
        raise LowbitError(f"an embedding's input is indices, which {activation} cannot round; leave the activation out")
    convolves = isinstance(layer, nn.Conv1d | nn.Conv2d)
    if activation is not None and convolves and (misfit := activation.convolution_misfit) is not None:
        raise LowbitError(misfit)
    if axis % layer.weight.dim() == 0:
        raise LowbitError(f"axis {axis} tells the rows of a weight apart, and blocks run along one that is summed over")


def _as_rows(part: Tensor, weight: Tensor) -> Tensor:
    """One value for each row of `weight`, or one in all, in a tensor of its rank."""
    return part.reshape(-1, *(1,) * (weight.dim() - 1))


def _with_static(
    q: QuantizedTensor, activation: Activation | None, seen: Observer | None, name: str
) -> QuantizedTensor:
    """A weight used under an activation, whose stored scale is what an observer says.

    Raises:
        LowbitError: there is no observer, or it has seen nothing.
    """
    if activation is None or activation.scaling == "dynamic":
        return with_use(q, activation)
    if seen is None:
        raise LowbitError(f"{activation} stores a scale for its input, and the input of {name} was not observed")
    scales = seen.qparams(activation.format)
    if activation.scaling == "local":
        return with_use(q, activation, act_scale=scales.tensor_scale)
    return with_use(q, activation, act_scale=scales.scale.to(torch.float32), act_zero=scales.zero)
