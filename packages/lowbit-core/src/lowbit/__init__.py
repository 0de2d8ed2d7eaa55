"""lowbit: low-bit numbers for PyTorch. Formats, tensors, operators, recipes and the registry that backends join.

`import lowbit` needs torch and safetensors only; backends are found when one is first needed.
"""

from lowbit.activation import Activation
from lowbit.apply import dequantize_, quantize_
from lowbit.attention import Attention, Scheme, attention
from lowbit.backends import explain, select
from lowbit.bind import Bindings, bind, unbind
from lowbit.checkpoint import load, load_into, save
from lowbit.compiling import compile_options
from lowbit.element import ELEMENTS, Element, element
from lowbit.errors import (
    BackendError,
    CheckpointError,
    FormatError,
    LowbitError,
    NoKernelError,
    NotPortableError,
    RecipeError,
    RowError,
    UnsupportedOpError,
)
from lowbit.format import (
    FORMATS,
    FP8_ROW,
    FP8_TENSOR,
    INT4_G32,
    INT4_G128,
    INT8_ROW,
    INT8_ROW_ASYM,
    INT8_TENSOR,
    INT8_TENSOR_ASYM,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    UINT2_G32,
    UINT4_G128,
    WHOLE,
    Format,
    FP8_1x128,
    FP8_128x128,
)
from lowbit.key_values import KeyValueCache
from lowbit.lower import Lowered, lower
from lowbit.numerics import Scales, choose_scale
from lowbit.plan import Plan, plan
from lowbit.recipe import Recipe, Rule
from lowbit.tensor import QuantizedTensor, quantize
from lowbit.varlen import varlen_attention

__all__ = [
    "ELEMENTS",
    "FORMATS",
    "FP8_ROW",
    "FP8_TENSOR",
    "INT4_G32",
    "INT4_G128",
    "INT8_ROW",
    "INT8_ROW_ASYM",
    "INT8_TENSOR",
    "INT8_TENSOR_ASYM",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8",
    "MXFP8_E5M2",
    "MXINT8",
    "NVFP4",
    "UINT2_G32",
    "UINT4_G128",
    "WHOLE",
    "Activation",
    "Attention",
    "BackendError",
    "Bindings",
    "CheckpointError",
    "Element",
    "FP8_1x128",
    "FP8_128x128",
    "Format",
    "FormatError",
    "KeyValueCache",
    "LowbitError",
    "Lowered",
    "NoKernelError",
    "NotPortableError",
    "Plan",
    "QuantizedTensor",
    "Recipe",
    "RecipeError",
    "RowError",
    "Rule",
    "Scales",
    "Scheme",
    "UnsupportedOpError",
    "attention",
    "bind",
    "choose_scale",
    "compile_options",
    "dequantize_",
    "element",
    "explain",
    "load",
    "load_into",
    "lower",
    "plan",
    "quantize",
    "quantize_",
    "save",
    "select",
    "unbind",
    "varlen_attention",
]
