"""What is done to a model's weights: which algorithms, with which options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lowbit import RecipeError
from lowbit.numerics import DEFAULT_MODE, ScaleMode
from lowbit_algos.gptq import Options
from lowbit_algos.inputs import Static
from lowbit_algos.smooth import Smoothing

Rounding = Literal["nearest", "clipped", "gptq"]

# The names that `Method.of` takes; of one kind, one.
_KINDS = {
    "rtn": "rounding",
    "gptq": "rounding",
    "smoothquant": "smoothing",
    "awq": "smoothing",
    "rotation": "rotation",
    "learned": "learned",
    "distilled": "distilled",
}

# Steps that `learned` and `distilled` stand for.
_LEARNED, _DISTILLED = 200, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How weights are rounded, and what is done to them before."""

    # To nearest; to nearest under the scale of least loss; or by GPTQ.
    rounding: Rounding = "gptq"
    # Whether a block is fed what quantized blocks before it make of the data, or what the original ones do.
    sequential: bool = True
    # What is done before: factors that make inputs and weights alike hard to round, or weights easier.
    smoothing: Smoothing | None = None
    # Whether hidden states and heads are rotated first.
    rotation: bool = False
    # The exponent of smoothing; None: the best of several.
    alpha: float | None = None
    # Whether factors that nothing takes over stay with the weight, which multiplies its input by them.
    pre_scale: bool = True
    # Whether GPTQ sees inputs as the activation rounds them, and whether it first fits weights to what that loses.
    activation_aware: bool = True
    refit: bool = True
    # Steps by which rounding and scales are then learned from a block's output.
    learned: int = 0
    # Steps by which they are learned in the end from what the whole model predicts; it has to be in memory.
    distilled: int = 0
    # How static activations choose their range.
    static: Static = "histogram"
    # Tokens an expert should have seen; for GPTQ, it is sent what it lacks of those that came closest to it. What it
    # lacks then, it is given of the mean of all experts. None: as many as it has columns.
    expert_tokens: int | None = None
    # How e8m0 scales are rounded.
    mode: ScaleMode = DEFAULT_MODE
    # What GPTQ is told besides.
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            RecipeError: learning without what it learns from.
        """
        if self.learned and not self.sequential:
            raise RecipeError("learned rounding follows blocks in sequence; leave one pass, or learning")

    @classmethod
    def of(cls, name: str, **more: Any) -> Method:
        """The method of algorithms joined by "+", such as `smoothquant+gptq`; `rtn` is rounding to nearest.

        Raises:
            RecipeError: a name is unknown, or two of them do the same.
        """
        parts = name.lower().split("+")
        kinds = [_KINDS.get(part) for part in parts]
        if None in kinds or len(set(kinds)) < len(kinds):
            raise RecipeError(
                f"algorithm {name!r} is not known; it is rtn or gptq, smoothquant or awq, rotation, learned, "
                "distilled, or one of each joined by '+', such as awq+gptq"
            )
        if set(parts) <= {"rotation", "rtn"} and "rotation" in parts:
            raise RecipeError(
                "rotation spreads outliers, and where there are none, rounding to nearest is worse for it; join it "
                "with gptq or learned, such as rotation+gptq"
            )
        smoothing: Smoothing | None = "smoothquant" if "smoothquant" in parts else "awq" if "awq" in parts else None
        # Without GPTQ, the search for scales is AWQ's other half.
        alone: Rounding = "clipped" if smoothing == "awq" else "nearest"
        return cls(
            rounding="gptq" if "gptq" in parts else alone,
            smoothing=smoothing,
            rotation="rotation" in parts,
            learned=_LEARNED if "learned" in parts else 0,
            distilled=_DISTILLED if "distilled" in parts else 0,
            **more,
        )

    @property
    def probes(self) -> bool:
        """Whether it looks at what a block computes before it changes it."""
        return self.rotation or self.smoothing is not None

    @property
    def name(self) -> str:
        """Its algorithms, joined by "+"."""
        parts = {
            "rotation": self.rotation,
            self.smoothing: self.smoothing is not None,
            "gptq": self.rounding == "gptq",
            "learned": self.learned > 0,
            "distilled": self.distilled > 0,
        }
        found = "+".join(str(part) for part, used in parts.items() if used)
        return found or ("rtn" if self.rounding == "nearest" else "clipping")
