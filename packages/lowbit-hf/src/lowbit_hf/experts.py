"""Running transformers' stacked experts through `grouped_mm`, which quantized and packed experts understand.

transformers chooses between several ways to run experts, some of which index or slice the stacked weights; the way that
is registered here as "lowbit" never does.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lowbit_hf.routing import through_experts

NAME = "lowbit"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Mixture of experts over tokens (M, K): sort token copies by expert, two grouped products, weigh and add up.

    `self` is a transformers experts module: weights (E, N, K), or (E, K, N) where it says `is_transposed`.
    """

    def experts(tokens: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
        gated = bool(self.has_gate)
        out = _project(self, "gate_up_proj" if gated else "up_proj", tokens, ends, ids)
        out = self._apply_gate(out) if gated else self.act_fn(out)
        out = _project(self, "down_proj", out, ends, ids)
        return self.post_expert_norm(out) if getattr(self, "has_post_expert_norm", False) else out

    return through_experts(hidden_states, top_k_index, top_k_weights, self.num_experts, experts)


def all_experts_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4's experts (E, K, N), each of which takes as many rows of (M, K): the first takes the first M / E of them.

    `self` is the module, which multiplies by `bmm` and has no other way to run.
    """
    rows = hidden_states.reshape(-1, self.hidden_size)
    ends = torch.arange(1, self.num_experts + 1, dtype=torch.int32, device=rows.device) * (
        len(rows) // self.num_experts
    )
    both = torch.nn.functional.grouped_mm(rows, self.gate_up_proj, offs=ends)
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.grouped_mm(up * self.act_fn(gate), self.down_proj, offs=ends)


def use_lowbit_experts(model: PreTrainedModel) -> None:
    """Make every stacked-experts module run through `experts_forward`, Llama 4's through `all_experts_forward`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.set_experts_implementation(NAME)
    for module in model.modules():
        # By name: its file takes a second to import.
        if type(module).__name__ == "Llama4TextExperts":
            module.forward = MethodType(all_experts_forward, module)


def _project(module: Any, name: str, tokens: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    weight = getattr(module, name)
    stacked = weight if module.is_transposed else weight.transpose(-2, -1)
    out = torch.nn.functional.grouped_mm(tokens.to(weight.dtype), stacked, offs=ends)
    return out + getattr(module, f"{name}_bias")[ids] if module.has_bias else out
