"""Projections that serving engines load into one matrix, and so need in one scheme, under one tensor scale."""

from __future__ import annotations

from collections.abc import Collection, Iterator

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Last names of projections that vLLM and SGLang load into one matrix.

Source: vLLM 0.32.0, `packed_modules_mapping` of vllm/model_executor/models/{llama,qwen3_moe,deepseek_v2}.py.
"""


def fused(modules: Collection[str]) -> Iterator[list[str]]:
    """Of modules, by name, those that engines load into one matrix, a list for each such matrix."""
    known = set(modules)
    for names in FUSED:
        for module in modules:
            parent, dot, last = module.rpartition(".")
            if last in names:
                found = [name for name in (f"{parent}{dot}{other}" for other in names) if name in known]
                if len(found) > 1 and found[0] == module:
                    yield found
