"""Run by vLLM's python: the kernel that vLLM takes for each kind of linear layer, before and after the plugin registers."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.scalar_type import scalar_types

from lowbit_hf.serving import register

N, K = 256, 512


def integers(weight_type, *, zero_points=False):
    config = linear.MPLinearLayerConfig((K, N), (K, N), weight_type, torch.bfloat16, 128, zero_points)
    return linear.choose_mp_linear_kernel(config)


def fp8():
    keys = quant_utils.kFp8DynamicTokenSym, quant_utils.kFp8StaticChannelSym
    return type(linear.init_fp8_linear_kernel(*keys, torch.bfloat16, torch.bfloat16, (N, K)))


LAYERS = {
    "W8A8": lambda: type(linear.init_int8_linear_kernel(True, False, True, "layer")),
    "W4A16": lambda: integers(scalar_types.uint4b8),
    "W4A16_ASYM": lambda: integers(scalar_types.uint4, zero_points=True),
    "FP8_DYNAMIC": fp8,
    "W8A16": lambda: integers(scalar_types.uint8b128),
    "MXFP4A16": lambda: type(linear.init_mxfp4_linear_kernel(quant_utils.kMxfp4Dynamic)),
    "NVFP4A16": lambda: type(linear.init_nvfp4_linear_kernel(use_a16=True)),
    "MXFP8": lambda: type(linear.init_mxfp8_linear_kernel(weight_shape=(N, K))),
}
CONFIGS = {"W4A16": "pack-quantized", "W8A8": "int-quantized", "NVFP4A16": "nvfp4-pack-quantized"}


def name(choose):
    try:
        return choose().__name__
    except ValueError:
        return "refused"


def layers(method="compressed-tensors"):
    config = VllmConfig()
    config.model_config = SimpleNamespace(quantization=method)
    with set_current_vllm_config(config):
        return {scheme: name(choose) for scheme, choose in LAYERS.items()}


before = layers()
register()
register.__wrapped__()  # vLLM may call it more than once
config = get_quantization_config("lowbit")
overrides = {
    scheme: config.override_quantization_method(
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"format": file_format}}}, None
    )
    for scheme, file_format in CONFIGS.items()
}
assert get_quantization_config("compressed-tensors") is CompressedTensorsConfig
sys.stdout.write(json.dumps({"before": before, "after": layers(), "gptq": layers("gptq"), "overrides": overrides}))
