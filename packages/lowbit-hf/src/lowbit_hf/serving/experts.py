"""vLLM's way of running a mixture's experts, filled with lowbit's `grouped_mm`. Imported in a vLLM process only.

Source: vLLM 0.32.0, `model_executor/layers/fused_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_hf.routing import through_experts
from lowbit_hf.serving.kernels import tell
from lowbit_hf.serving.weights import Place, hold_experts, stored_tensors

_moe: Any = import_module("vllm.model_executor.layers.fused_moe")
_attributes: Any = import_module("vllm.model_executor.utils")


class LowbitExperts(_moe.FusedMoEMethodBase):
    """Gated experts of any config group that lowbit reads, tokens sorted by expert, on one device.

    `w13` holds gate and up, `w2` down.
    """

    def __init__(self, layer: Any, group: Mapping[str, Any]) -> None:
        moe = layer.moe_config
        super().__init__(moe)
        wanted = {
            "SiLU between gate and up": moe.activation == _moe.MoEActivation.SILU and moe.swiglu_limit is None,
            "experts without biases": not moe.has_bias,
            "all experts on every rank, in place of expert parallelism": not moe.moe_parallel_config.use_ep,
            "routing weights on the experts' output": not layer.apply_router_weight_on_input,
        }
        if missing := [name for name, has in wanted.items() if not has]:
            raise NotImplementedError(f"lowbit runs experts with {' and '.join(missing)}; this model has others")
        self.group, self.places = group, dict[str, Place]()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make a place in the layer for every stored tensor of all experts.

        Raises:
            CheckpointError: lowbit cannot hold what the config group means.
        """
        wide = intermediate_size_per_partition
        self.places = {
            "w13": Place((wide, wide), hidden_size, params_dtype),
            "w2": Place((hidden_size,), wide, params_dtype),
        }
        for weight, place in self.places.items():
            for name, dtype, shape in stored_tensors(self.group, place):
                stacked = nn.Parameter(torch.empty(num_experts, *shape, dtype=dtype), requires_grad=False)
                layer.register_parameter(f"{weight}_{name}", stacked)
                # What vLLM's loader goes by: where it cuts a tensor for gate and up and among ranks, if it does.
                kind = "tensor" if name == "weight_global_scale" else "channel" if shape[-1:] == (1,) else "group"
                _attributes.set_weight_attrs(
                    stacked, extra_weight_attrs | {"is_transposed": False, "quant_method": kind}
                )

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own experts are not used."""
        del layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the stacked weights that lowbit runs in the place of what was loaded.

        Raises:
            CheckpointError: the tensors do not fit their config group.
        """
        for row in hold_experts(layer, self.group, self.places):
            tell(row)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Tokens x (M, K) through their experts; vLLM itself runs the shared ones."""
        del shared_experts, shared_experts_input

        def experts(tokens: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
            del ids
            both = nn.functional.grouped_mm(tokens, layer.w13_weight.transpose(-2, -1), offs=ends)
            gate, up = both.chunk(2, dim=-1)
            return nn.functional.grouped_mm(nn.functional.silu(gate) * up, layer.w2_weight.transpose(-2, -1), offs=ends)

        return through_experts(x, topk_ids, topk_weights, layer.w2_weight.shape[0], experts)
