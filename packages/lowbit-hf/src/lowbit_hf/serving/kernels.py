"""vLLM's kernel classes, filled with lowbit's `linear`. Imported in a vLLM process only.

vLLM asks a platform's kernels in their order which one takes a layer; these are asked after its own.

Source: vLLM 0.32.0, `model_executor/kernels/linear`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lowbit.bind import Binding
from lowbit_hf.serving.weights import Place, group_of, hold

# No environment that checks types has vLLM: what comes of it is Any.
_linear: Any = import_module("vllm.model_executor.kernels.linear")
_config: Any = import_module("vllm.config")
# The name makes it one of vLLM's own loggers, whose lines reach the server's log.
LOG: Any = import_module("vllm.logger").init_logger("vllm.lowbit")

NAME = "lowbit"
METHODS = ("compressed-tensors", NAME)
"""What vLLM may call the quantization of a checkpoint that lowbit reads."""


def tell(row: Binding) -> None:
    """Say in the server's log, once for all layers alike, what runs on which kernel."""
    inputs = row.activation or "as they are"
    LOG.info_once("lowbit's %s runs %s weights, inputs %s, on %s", row.op, row.format, inputs, row.kernel)


class _Linear:
    """What the kernels of all formats do alike: the layer's weight becomes a bound QuantizedTensor, used as one."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the weight that lowbit runs in the place of what was loaded.

        Raises:
            CheckpointError: the tensors do not fit their config group.
        """
        scheme = layer.quant_method.quantization_config.get_scheme_dict(layer, layer.prefix)
        group = group_of(scheme)
        if hasattr(layer, "weight") and group["format"] != "mxfp8-quantized":
            # vLLM renames the codes of some formats; lowbit reads them under the name they have in the file.
            layer.weight_packed = layer.weight
            del layer.weight
        rows = (int(layer.output_size_per_partition),)
        if hasattr(layer, "weight_global_scale"):  # the one tensor that tells the matrices apart that were fused
            rows = tuple(layer.logical_widths)
        tell(hold(layer, group, Place(rows, int(layer.input_size_per_partition), layer.params_dtype)))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of x (.., K) and the held weight (N, K)."""
        return nn.functional.linear(x, layer.weight, bias)

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On every CPU."""
        del compute_capability
        return True, None

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Whether the checkpoint that is being loaded is one of compressed-tensors'; others store other tensors."""
        del c
        config = _config.get_current_vllm_config_or_none()
        model = None if config is None else config.model_config
        method = None if model is None else model.quantization
        if method in METHODS:
            return True, None
        return False, f"lowbit reads checkpoints of compressed-tensors, not of {method}"


class LowbitIntegers(_Linear, _linear.MPLinearKernel):
    """Integer groups or channels of 2 to 8 bits, symmetric or not, in packed words: W8A16 and its like."""

    @classmethod
    def get_min_capability(cls) -> int:
        """None: a CPU has no such number."""
        return -1


class LowbitMxfp8(_Linear, _linear.Mxfp8LinearKernel):
    """MXFP8 weights; inputs are rounded where the checkpoint says so."""


class LowbitMxfp4(_Linear, _linear.MxFp4LinearKernel):
    """MXFP4 weights; inputs are rounded where the checkpoint says so.

    vLLM asks for rounded inputs for MXFP4A16 too, as its own kernels ignore it; so the checkpoint is looked at.
    """


class LowbitNvfp4(_Linear, _linear.NvFp4LinearKernel):
    """NVFP4 weights with inputs as they are."""


def add_kernels() -> None:
    """Let vLLM find the kernels, last in its lists for CPUs."""
    cpu = import_module("vllm.platforms").PlatformEnum.CPU
    for kernel, kind in ((LowbitIntegers, "mp"), (LowbitMxfp8, "mxfp8"), (LowbitMxfp4, "mxfp4")):
        _linear.register_linear_kernel(kernel, cpu, kind)
