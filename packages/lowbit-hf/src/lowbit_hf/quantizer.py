"""transformers' quantizer for `quant_method` lowbit: `from_pretrained` and `save_pretrained` take its folders.

Imported while transformers itself is being imported, so what needs models is imported where it is used.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.apply import dequantize_
from lowbit.errors import CheckpointError, RecipeError
from lowbit.packed import PackedTensor
from lowbit.recipe import Recipe
from lowbit.table import fold
from lowbit.tensor import QuantizedTensor
from lowbit_hf.schemes import scheme as scheme_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowbit_hf.incoming import Incoming
    from lowbit_hf.rounding import Rounded

_METHOD = "lowbit"


class LowbitConfig(QuantizationConfigMixin):
    """What weights a folder in lowbit's layout holds; or what is to be made of those of a plain one as it is loaded.

    For a plain one it is made of a scheme's name (see `lowbit schemes`), which then goes to Linear layers and experts,
    but for the head and routers; or of a recipe, which speaks of the model's parameters.

    Raises:
        RecipeError: no scheme has that name.
        CheckpointError: it comes from a file, and has unknown keys.
    """

    def __init__(
        self,
        scheme: str | Recipe | None = None,
        *,
        rules: list[dict[str, Any]] | None = None,
        version: int = 1,
        **unknown: object,
    ) -> None:
        """Keep what is given, as JSON has it."""
        self.quant_method: Any = unknown.pop("quant_method", _METHOD)
        if unknown:
            msg = f"quantization_config has unknown keys {', '.join(sorted(unknown))}; the config is damaged"
            raise CheckpointError(msg)
        self.version, self.rules = version, rules
        self.scheme = scheme_of(scheme).name if isinstance(scheme, str) else None
        if isinstance(scheme, Recipe):
            self.rules = json.loads(scheme.to_json())["rules"]

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        rules = {} if self.rules is None else {"rules": self.rules}
        scheme = {} if self.scheme is None else {"scheme": self.scheme}
        return {"quant_method": self.quant_method, "version": self.version, **rules, **scheme}


class LowbitQuantizer(HfQuantizer):
    """Puts QuantizedTensors in a model that transformers loads, and takes them apart again when it is saved."""

    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **options: Any) -> None:
        """Take a config; nothing is read yet."""
        super().__init__(quantization_config, **options)
        # What the checkpoint holds; or what becomes of its weights.
        self._incoming: Incoming | None = None
        self._rounded: Rounded | None = None
        # How transformers names and stacks the plain tensors of this model's checkpoints.
        self._conversions: list[Any] = []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **options: Any
    ) -> PreTrainedModel:
        """Look at what there is before anything is loaded.

        Raises:
            CheckpointError: the folder is damaged, or does not fit the model.
            RecipeError: what is to be made of the weights cannot be.
        """
        del options
        from lowbit_hf.incoming import Incoming  # noqa: PLC0415 - needs models
        from lowbit_hf.rounding import Rounded  # noqa: PLC0415

        if self.pre_quantized:
            self._incoming = Incoming.of(model, self.quantization_config.to_dict(), checkpoint_files)
        else:
            self._rounded = Rounded(model, self.quantization_config)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """How transformers is to put tensors together; older ones give no model."""
        del model
        self._conversions = list(weight_conversions)
        return weight_conversions if self._incoming is None else self._incoming.conversions(weight_conversions)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast a stored tensor to; parts of weights stay as they are."""
        from lowbit_hf.incoming import takes_parts  # noqa: PLC0415

        return None if takes_parts(converter) else super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        """Whether a parameter is to be quantized as it is loaded."""
        del model, options
        return self._rounded is not None and param_name in self._rounded.rows

    def get_quantize_ops(self) -> Any:
        """What quantizes it."""
        assert self._rounded is not None
        return self._rounded.operation

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        """Make experts run on quantized stacks, and remember how to save.

        Raises:
            RecipeError: weights that were to be quantized hold NaN or infinity.
        """
        del options
        if self._rounded is not None and self._rounded.nonfinite:
            names = ", ".join(repr(name) for name, _ in fold(self._rounded.nonfinite))
            raise RecipeError(f"{names} hold NaN or infinity, which no format here can; keep them by a rule of None")
        from lowbit_hf.experts import use_lowbit_experts  # noqa: PLC0415

        for parameter in model.parameters():
            if isinstance(parameter, QuantizedTensor):
                parameter.requires_grad = False
        use_lowbit_experts(model)
        # Where transformers keeps them.
        used: list[Any] = vars(model)["_weight_conversions"]
        self._conversions = used if self._incoming is None else self._incoming.plain(used)
        # What is saved has been converted back by then, with weights whole; their parts would not survive it.
        vars(model)["_weight_conversions"] = []
        self._incoming = self._rounded = None
        return model

    def adopt(self, model: PreTrainedModel) -> None:
        """Take a model that was quantized in memory as one that was loaded so."""
        self._process_model_after_weight_loading(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """What is saved; the config is made to say what that is."""
        from lowbit_hf.outgoing import outgoing  # noqa: PLC0415

        tensors, config = outgoing(model, self._conversions)
        self.quantization_config.rules, self.quantization_config.scheme = config["rules"], None
        model.config.quantization_config = self.quantization_config
        return tensors, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put plain weights in the place of quantized ones."""
        names = [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor | PackedTensor)]
        dequantize_(model)
        # Not all of the model: what it computes positions with is more precise than its weights.
        for name in names if dtype is not None else ():
            weight = model.get_parameter(name)
            weight.data = weight.data.to(dtype)
        # As a plain model has them.
        vars(model)["_weight_conversions"] = self._conversions
        return model

    def is_serializable(self) -> Any:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Whether weights can be trained."""
        return False


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Let `save_pretrained` write a model of transformers that was quantized in memory, and give it back.

    Raises:
        RecipeError: none of its parameters is quantized.
    """
    if not any(isinstance(p, QuantizedTensor) for p in model.parameters()):
        raise RecipeError("no parameter of the model is quantized; quantize it first, as lowbit.quantize_ does")
    holder: Any = model
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not table.weight:
        # Of one that was, either may have been quantized alone.
        model.config.tie_word_embeddings = False
    if getattr(model, "hf_quantizer", None) is None:
        vars(model).setdefault("_weight_conversions", [])
        holder.hf_quantizer = LowbitQuantizer(LowbitConfig())
        holder.config.quantization_config = holder.hf_quantizer.quantization_config
        holder.hf_quantizer.adopt(model)
    return model


register_quantization_config(_METHOD)(LowbitConfig)
register_quantizer(_METHOD)(LowbitQuantizer)
