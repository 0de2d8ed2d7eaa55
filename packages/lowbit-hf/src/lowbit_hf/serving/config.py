"""vLLM's compressed-tensors config, for checkpoints with layers that no kernel can be added for from outside.

vLLM 0.32 asks a fixed list of its own kernels for NVFP4A16, and for experts of any scheme. A config of one's own is how
vLLM lets others run what it does not: `register_quantization_config`, chosen by `override_quantization_method`.

Source: vLLM 0.32.0, `model_executor/layers/quantization` and `config/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lowbit_hf.serving.experts import LowbitExperts
from lowbit_hf.serving.kernels import LOG, METHODS, NAME, LowbitNvfp4
from lowbit_hf.serving.weights import group_of

_NVFP4 = "nvfp4-pack-quantized"
_moe: Any = import_module("vllm.model_executor.layers.fused_moe")
_tensors: Any = import_module("vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors")
_schemes: Any = import_module("vllm.model_executor.layers.quantization.compressed_tensors.schemes")
_linear: Any = import_module("vllm.model_executor.kernels.linear")
_quantization: Any = import_module("vllm.model_executor.layers.quantization")


class Nvfp4Scheme(_schemes.CompressedTensorsW4A4Fp4):
    """vLLM's NVFP4A16 scheme, on lowbit's kernel: it makes and loads the parameters."""

    def __init__(self) -> None:
        # vLLM's own constructor does nothing besides, but looks for a kernel, in vain.
        self.use_a16, self.group_size = True, 16
        kernel: Any = LowbitNvfp4  # vLLM's constructor, which type checkers cannot see
        self.kernel = kernel(_linear.NvFp4LinearLayerConfig())

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read the scales as they are in the file: a divisor for each of the layers that were fused."""
        self.kernel.process_weights_after_loading(layer)


class LowbitConfig(_tensors.CompressedTensorsConfig):
    """compressed-tensors as vLLM reads it, with lowbit's scheme where vLLM has no kernel for NVFP4A16."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """This config's name for a checkpoint that may have such layers; None leaves the choice to vLLM."""
        if hf_quant_cfg.get("quant_method") != METHODS[0] or user_quant not in (None, *METHODS):
            return None
        groups = (hf_quant_cfg.get("config_groups") or {}).values()
        formats = [group.get("format") or hf_quant_cfg.get("format") for group in groups]
        return NAME if _NVFP4 in formats or _has_experts(hf_config) else None

    def get_scheme(self, layer: Any, layer_name: str | None = None) -> Any:
        """vLLM's scheme of a linear layer, or lowbit's where vLLM finds no kernel for NVFP4A16.

        Raises:
            ValueError: vLLM refuses the layer for another reason.
        """
        try:
            return super().get_scheme(layer, layer_name)
        except ValueError:
            scheme = self.get_scheme_dict(layer, layer_name)
            if scheme["format"] == _NVFP4 and scheme["input_activations"] is None:
                return Nvfp4Scheme()
            raise

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """vLLM's way of running a layer, or lowbit's for experts that vLLM has no kernel for.

        Raises:
            ValueError: vLLM refuses a layer that is no mixture's.
            NotImplementedError: the experts are of a kind that lowbit does not run either.
        """
        if not isinstance(layer, _moe.RoutedExperts):
            return super().get_quant_method(layer, prefix)
        try:
            method = super().get_quant_method(layer, prefix)
        except (NotImplementedError, ValueError) as refusal:
            if len(_schemes_of(self, layer, prefix)) > 1:  # which is what it was refused for
                raise
            LOG.info_once("vLLM has no kernel for these experts: %s", str(refusal))
        else:
            # For MXFP4, vLLM names a kernel without asking whether it is one for this device.
            chosen = getattr(method, "experts_cls", None)
            if chosen is None or chosen._supports_current_device():  # noqa: SLF001 - the one question there is
                return method
        (scheme,) = _schemes_of(self, layer, prefix)
        return LowbitExperts(layer, group_of(scheme))


def _schemes_of(config: Any, layer: Any, prefix: str) -> list[Any]:
    """The different schemes of an expert's three projections."""
    names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    schemes: list[Any] = []
    for name in names:
        scheme = config.get_scheme_dict(layer, f"{prefix}.0.{name}")
        schemes += [] if scheme in schemes else [scheme]
    return schemes


def _has_experts(config: Any) -> bool:
    """Whether a transformers config is one of a mixture, by any of the names their number goes by."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return config is not None and any(getattr(config, name, None) for name in names)


def add_config() -> None:
    """Let vLLM find the config."""
    _quantization.register_quantization_config(NAME)(LowbitConfig)
