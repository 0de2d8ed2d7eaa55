"""Low-precision training: layers and experts whose matrix products round their operands, forward and backward."""

from lowbit_moe.convert import Conversion, TrainRule, convert_
from lowbit_moe.experts import Routing, combine, swiglu_experts
from lowbit_moe.functional import grouped_mm, linear
from lowbit_moe.operands import count_products
from lowbit_moe.recipe import RECIPES, Operands, TrainRecipe

__all__ = [
    "RECIPES",
    "Conversion",
    "Operands",
    "Routing",
    "TrainRecipe",
    "TrainRule",
    "combine",
    "convert_",
    "count_products",
    "grouped_mm",
    "linear",
    "swiglu_experts",
]
