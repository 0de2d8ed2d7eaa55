"""Recipes of training: the formats that each matrix product of a layer rounds its operands to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit import RecipeError
from lowbit.format import WHOLE, Format
from lowbit.numerics import Rounding, ScaleMode, check_choice

Kernels = Literal["auto", "native", "emulated"]
"""Which kernels multiply: those of tensor cores where there are some, only those, or products of decoded values."""

TILE = 16
"""What kernels sum over is a multiple of this."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Formats of a product's two operands, blocked along what it sums over."""

    left: Format
    right: Format

    @classmethod
    def of(cls, left: str, right: str | None = None) -> Operands:
        """Formats by their specs or names; one of both operands if there is one."""
        return cls(Format.parse(left), Format.parse(left if right is None else right))

    @property
    def align(self) -> int:
        """What the number that is summed over is filled up to a multiple of."""
        groups = (fmt.block[-1] for fmt in (self.left, self.right))
        return max(TILE, *(1 if group == WHOLE else group for group in groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """How the three matrix products of a layer with input x, weight w and gradient g of its output are computed.

    forward `x @ w.T` sums over K, dgrad `g @ w` over N, wgrad `g.T @ x` over the tokens M. Each rounds its two operands
    (input and weight; gradient and weight; gradient and input), or is in the operands' own dtype where it is None.

    Raises:
        RecipeError: groups of an operand's blocks are not such that one count of columns fits both, or something is
            to be rotated that is not rounded in rows of blocks of at least that size.
        FormatError: an option is unknown.
    """

    name: str
    forward: Operands | None = None
    dgrad: Operands | None = None
    wgrad: Operands | None = None
    # How scales that are powers of two are chosen.
    mode: ScaleMode = "rceil"
    # How gradients are rounded; "stochastic" draws from torch's generator of the device.
    gradient: Rounding = "nearest"
    # Wgrad's operands are multiplied by a random Hadamard matrix of this size along the tokens first; 0: they are not.
    rotation: int = 0
    kernels: Kernels = "auto"
    # Layers that `convert_` leaves as they are, first and last, beyond what rules say.
    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        """Check that the options fit together."""
        for what, given, choices in (
            ("scale mode", self.mode, ScaleMode),
            ("rounding", self.gradient, Rounding),
            ("kernels", self.kernels, Kernels),
        ):
            check_choice(what, given, choices)
        for what, operands in self.products.items():
            if operands is not None and any(operands.align % _group(fmt) for fmt in (operands.left, operands.right)):
                raise RecipeError(
                    f"{what} of {self.name} has groups of {operands.left} and {operands.right}; needed is one that is "
                    "a multiple of the other"
                )
        if self.rotation:
            formats = () if self.wgrad is None else (self.wgrad.left, self.wgrad.right)
            if not formats or any(_group(fmt) % self.rotation for fmt in formats):
                raise RecipeError(
                    f"{self.name} rotates pieces of {self.rotation} tokens; needed are operands of wgrad whose blocks "
                    "are whole pieces"
                )

    @property
    def products(self) -> dict[str, Operands | None]:
        """The three products by name."""
        return {"forward": self.forward, "dgrad": self.dgrad, "wgrad": self.wgrad}

    @property
    def align(self) -> int:
        """What groups of tokens begin at multiples of, for wgrad to sum over blocks of one group alone; 1: anywhere."""
        return 1 if self.wgrad is None else self.wgrad.align

    @staticmethod
    def parse(recipe: TrainRecipe | str) -> TrainRecipe:
        """The recipe, by its name if it is a named one.

        Raises:
            RecipeError: there is none of that name.
        """
        if isinstance(recipe, TrainRecipe):
            return recipe
        if recipe.upper() not in RECIPES:
            raise RecipeError(
                f"training recipe {recipe!r} is unknown; use one of {', '.join(RECIPES)}, or a TrainRecipe"
            )
        return RECIPES[recipe.upper()]


def _group(fmt: Format) -> int:
    return 1 if fmt.block[-1] == WHOLE else fmt.block[-1]


def _named(name: str, forward: Operands, dgrad: Operands, wgrad: Operands | None, **options: object) -> TrainRecipe:
    return TrainRecipe(name=name, forward=forward, dgrad=dgrad, wgrad=wgrad, **options)  # pyright: ignore[reportArgumentType] - TrainRecipe checks them


# Scales are powers of two: 8-bit floats lose nothing by it, and products of decoded values are then the same anywhere,
# since bfloat16 holds those as they are.
_TENSOR, _GRADIENT = Operands.of("e4m3fn:*x*:e8m0"), Operands.of("e5m2:*x*:e8m0", "e4m3fn:*x*:e8m0")
_ROW, _MX = Operands.of("e4m3fn:1x*:e8m0"), Operands.of("MXFP8")
_BLOCK, _BLOCKS = Operands.of("e4m3fn:1x128:e8m0", "e4m3fn:128x128:e8m0"), Operands.of("e4m3fn:1x128:e8m0")
_NV, _NV_WEIGHT = Operands.of("NVFP4"), Operands.of("NVFP4", "e2m1:16x16:e4m3fn:tensor")

BF16 = TrainRecipe(name="BF16")
"""Nothing is rounded: what other recipes are held to."""
FP8_TENSOR = _named("FP8_TENSOR", _TENSOR, _GRADIENT, _GRADIENT)
"""E4m3 with one scale a tensor, gradients e5m2."""
FP8_ROW = _named("FP8_ROW", _ROW, _ROW, _ROW)
"""E4m3 with one scale a row of what is summed over."""
FP8_ROW_WGRAD_BF16 = _named("FP8_ROW_WGRAD_BF16", _ROW, _ROW, None)
"""The same, gradients of weights in the operands' dtype."""
FP8_BLOCK = _named("FP8_BLOCK", _BLOCK, _BLOCK, _BLOCKS)
"""E4m3 with scales of 128 columns, of 128x128 for weights, which have the same codes in forward and dgrad.

Source: DeepSeek-V3 technical report, section 3.3.
"""
MXFP8 = _named("MXFP8", _MX, _MX, _MX)
"""E4m3 with e8m0 scales of 32 columns, which are rounded up.

Source: Mishra et al., "Recipes for pre-training LLMs with MXFP8", 2025.
"""
MXFP8_WGRAD_BF16 = _named("MXFP8_WGRAD_BF16", _MX, _MX, None)
"""The same, gradients of weights in the operands' dtype."""
NVFP4 = _named("NVFP4", _NV_WEIGHT, _NV_WEIGHT, _NV, gradient="stochastic", rotation=16, keep_first=1, keep_last=1)
"""E2m1 with e4m3 scales of 16 columns (weights: 16x16), gradients rounded stochastically, wgrad's operands rotated.

Source: NVIDIA, "Pretraining large language models with NVFP4", 2025.
"""

RECIPES: dict[str, TrainRecipe] = {
    each.name: each
    for each in (BF16, FP8_TENSOR, FP8_ROW, FP8_ROW_WGRAD_BF16, FP8_BLOCK, MXFP8, MXFP8_WGRAD_BF16, NVFP4)
}
"""The named recipes."""
