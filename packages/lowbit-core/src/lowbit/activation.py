"""How a linear layer rounds its input before it multiplies: a format, and where the scales come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lowbit.errors import FormatError
from lowbit.format import WHOLE, Format
from lowbit.numerics import DEFAULT_MODE, ScaleMode, check_choice

if TYPE_CHECKING:
    from torch import Tensor

Scaling = Literal["dynamic", "static", "local"]


@dataclass(frozen=True, slots=True)
class Activation:
    """Input quantization of a use site; the input's last dimension is the contraction.

    `dynamic`: every scale is chosen from the input at run time. `static`: one scale (and zero point) for all inputs,
    stored with the weight as `act_scale` and `act_zero`. `local`: block scales at run time under a stored tensor scale,
    kept as `act_scale` (NVFP4). `mode` is how scales that are powers of two are chosen from the input. The spec string
    is `scaling:format`, such as `dynamic:int8:1x*:float32`, with `@mode` after it unless that is the usual one.

    Raises:
        FormatError: static scaling of a format with more than one scale a tensor, local scaling without a tensor scale,
            a mode that is unknown, or one of scales that are stored or no powers of two.
    """

    format: Format
    scaling: Scaling = "dynamic"
    mode: ScaleMode = DEFAULT_MODE

    def __post_init__(self) -> None:
        """Check that the scaling fits the format."""
        if self.scaling == "static" and not self._has_one_scale:
            msg = f"static activations have one scale a tensor (block *x*), not {self.format}; use dynamic scaling"
            raise FormatError(msg)
        if self.scaling == "local" and not self.format.tensor_scale:
            msg = f"local scaling stores a tensor scale, which {self.format} does not have; use dynamic scaling"
            raise FormatError(msg)
        check_choice("scale mode", self.mode, ScaleMode)
        if self.mode != DEFAULT_MODE and (self.scaling == "static" or not self.format.scale.powers_of_two):
            msg = f"scales of {self.scaling} {self.format} are not chosen among powers of two; leave the mode out"
            raise FormatError(msg)

    def __str__(self) -> str:
        """The spec string."""
        return f"{self.scaling}:{self.format}" + (f"@{self.mode}" if self.mode != DEFAULT_MODE else "")

    @property
    def _has_one_scale(self) -> bool:
        return self.format.block == (WHOLE, WHOLE) and not self.format.tensor_scale

    @property
    def convolution_misfit(self) -> str | None:
        """Why the input of a convolution cannot be rounded so; None if it can."""
        if self._has_one_scale:
            return None
        return (
            f"a convolution's windows overlap, so that its input has no rows and no blocks of one window each: it is "
            f"rounded under one scale a tensor (block *x*, as INT8_TENSOR and FP8_TENSOR have it), not as {self}"
        )

    def stored(self, act_scale: Tensor | None) -> Tensor:
        """The scale that static and local scaling take from the weight.

        Raises:
            FormatError: there is none.
        """
        if act_scale is None:
            msg = f"activation {self} needs a stored act_scale, but the weight carries none; calibrate it"
            raise FormatError(msg)
        return act_scale

    @staticmethod
    def parse(spec: str) -> Activation:
        """The activation that `spec` stands for; `parse(str(a)) == a`.

        Raises:
            FormatError: the spec does not follow the grammar.
        """
        scaling, _, rest = spec.partition(":")
        fmt, _, mode = rest.partition("@")
        for known in get_args(Scaling):
            if scaling == known:
                return Activation(Format.parse(fmt), known, mode or DEFAULT_MODE)  # pyright: ignore[reportArgumentType] - it is checked
        msg = f"activation {spec!r} must be 'dynamic:', 'static:' or 'local:' and a format"
        raise FormatError(msg)
