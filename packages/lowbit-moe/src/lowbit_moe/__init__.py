"""Low-precision training: layers and experts whose matrix products round their operands, forward and backward."""

from lowbit_moe.convert import Conversion, TrainedExperts, TrainRule, convert_
from lowbit_moe.exchange import Exchange
from lowbit_moe.experts import combine, swiglu_experts
from lowbit_moe.functional import grouped_mm, linear
from lowbit_moe.operands import count_products
from lowbit_moe.optimizer import AdamW
from lowbit_moe.parallel import parallel_swiglu_experts
from lowbit_moe.recipe import RECIPES, Operands, TrainRecipe
from lowbit_moe.routing import Routing
from lowbit_moe.serving import to_serving
from lowbit_moe.sharding import shard_experts_
from lowbit_moe.watching import Lost, NonFiniteError, Watch, watch

__all__ = [
    "RECIPES",
    "AdamW",
    "Conversion",
    "Exchange",
    "Lost",
    "NonFiniteError",
    "Operands",
    "Routing",
    "TrainRecipe",
    "TrainRule",
    "TrainedExperts",
    "Watch",
    "combine",
    "convert_",
    "count_products",
    "grouped_mm",
    "linear",
    "parallel_swiglu_experts",
    "shard_experts_",
    "swiglu_experts",
    "to_serving",
    "watch",
]
