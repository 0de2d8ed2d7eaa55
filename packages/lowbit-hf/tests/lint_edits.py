"""What tests of the linter share: names, and changes of a good checkpoint's tensors or config for `change` to make."""

from __future__ import annotations

import torch

ALL = ("vllm", "transformers", "sglang")
ENGINES = ("vllm", "sglang")
LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
GROUP = "quantization_config.config_groups.group_0"


def group_of(config, name="group_0"):
    return config["quantization_config"]["config_groups"][name]


def beside(local, tensors):
    """Put `tensors` beside every tensor of this local name."""

    def edit(state):
        for module in [name.removesuffix(f".{local}") for name in state if name.endswith(f".{local}")]:
            state |= {f"{module}.{name}": tensor.clone() for name, tensor in tensors.items()}

    return edit


def drop(*prefixes):
    def edit(state):
        for name in [name for name in state if name.startswith(prefixes)]:
            del state[name]

    return edit


def put(name, made):
    """Set a tensor to what `made` makes of the old one."""

    def edit(state):
        state[name] = made(state.get(name))

    return edit


def filled(index, value):
    def edit(tensor):
        tensor = tensor.clone()
        tensor.flatten()[index] = value
        return tensor

    return edit


def weights(**values):
    return lambda config: group_of(config)["weights"].update(values)


def inputs(values):
    return lambda config: group_of(config).update(input_activations=values)


def top(**values):
    return lambda config: config["quantization_config"].update(values)


def plain(module, shape, *, ignore):
    """Store a module unquantized, and say so or not."""

    def tensors(state):
        drop(f"{module}.")(state)
        state[f"{module}.weight"] = torch.randn(shape).bfloat16()

    def config(values):
        if ignore:
            values["quantization_config"]["ignore"].append(module)

    return {"tensors": tensors, "config": config}


def in_blocks(state):
    """Give fp8 weights a scale for each 128 x 128."""
    for name in [name for name in state if name.endswith(".weight_scale")]:
        n, k = state[name.removesuffix("_scale")].shape
        state[name] = torch.ones(-(-n // 128), -(-k // 128)).bfloat16()


def both(*edits):
    def edit(values):
        for each in edits:
            each(values)

    return edit
