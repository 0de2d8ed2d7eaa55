"""Layers as vLLM hands them over: several projections fused along N, stored as their checkpoint stores them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

import lowbit
import lowbit_hf.serving
from lowbit.tensor import QuantizedTensor
from lowbit.testing import only_backends
from lowbit_hf.layout import to_compressed
from lowbit_hf.schemes import quantization_config, scheme
from lowbit_hf.serving.weights import Place, group_of, hold, hold_experts, stored_tensors

NAMES = [
    *("W8A16", "W4A16", "W3A16", "W2A16_G64", "W4A16_ASYM"),
    *("MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8", "NVFP4A16"),
]
ROWS, K = (96, 32), 256
PLACE = Place(ROWS, K, torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def canonical():
    """Weights stay as they are stored, whatever kernels are installed."""
    with only_backends("reference"):
        yield


def fused(name, scales=(1.0, 1.0), seed=0):
    """A layer of two projections as vLLM has it before `hold`, its scheme as vLLM keeps it, and both weights."""
    entry, generator = scheme(name), torch.Generator().manual_seed(seed)
    fmt = entry.weight_format(torch.bfloat16)
    parts = [(torch.randn(n, K, generator=generator) * s).bfloat16() for n, s in zip(ROWS, scales, strict=True)]
    weights = [lowbit.quantize(part, fmt) for part in parts]
    stored = [to_compressed(entry, w.qdata, w.scales, tuple(w.shape)) for w in weights]
    layer = nn.Module()
    for part in stored[0]:
        both = [each[part] for each in stored]
        # vLLM loads every projection's shape into one place.
        value = both[-1] if part == "weight_shape" else torch.cat(both)
        layer.register_parameter(part, nn.Parameter(value, requires_grad=False))
    (group,) = quantization_config({entry: ["Linear"]}, [])["config_groups"].values()
    parsed = {
        key: None if group[key] is None else QuantizationArgs.model_validate(group[key])
        for key in ("weights", "input_activations")
    }
    return layer, {"format": group["format"], **parsed}, weights


@pytest.mark.parametrize("name", NAMES)
def test_holds_what_was_fused(name):
    layer, given, weights = fused(name)
    row = hold(layer, group_of(given), PLACE)
    assert isinstance(layer.weight, QuantizedTensor)
    assert torch.equal(layer.weight.dequantize(), torch.cat([weight.dequantize() for weight in weights]))
    assert layer.weight.activation == scheme(name).activation
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert row.kernel == "reference.linear"
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = torch.cat([nn.functional.linear(x, weight) for weight in weights], dim=-1)
    if scheme(name).activation is None:
        torch.testing.assert_close(nn.functional.linear(x, layer.weight), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_holds_experts_that_were_stacked(name):
    layers, given = zip(*[fused(name, seed=seed)[:2] for seed in range(3)], strict=True)
    stacked = nn.Module()
    for local, dtype, shape in stored_tensors(group_of(given[0]), PLACE):
        parts = [getattr(layer, local) for layer in layers]
        assert {(part.dtype, tuple(part.shape)) for part in parts} == {(dtype, shape)}
        stacked.register_parameter(f"w_{local}", nn.Parameter(torch.stack(parts), requires_grad=False))
    rows = hold_experts(stacked, group_of(given[0]), {"w": PLACE})
    for layer in layers:
        hold(layer, group_of(given[0]), PLACE)
    assert torch.equal(stacked.w_weight.dequantize(), torch.stack([layer.weight.dequantize() for layer in layers]))
    assert [(row.op, row.kernel) for row in rows] == [("grouped_mm", "reference.grouped_mm")]


def test_experts_of_which_one_has_two_tensor_scales():
    layers, given = zip(*[fused("NVFP4A16", scales=(1.0, s))[:2] for s in (1.0, 64.0)], strict=True)
    stacked = nn.Module()
    for local, _, _ in stored_tensors(group_of(given[0]), PLACE):
        parts = torch.stack([getattr(layer, local) for layer in layers])
        stacked.register_parameter(f"w_{local}", nn.Parameter(parts, requires_grad=False))
    hold_experts(stacked, group_of(given[0]), {"w": PLACE})
    for layer in layers:
        hold(layer, group_of(given[0]), PLACE)
    assert torch.equal(stacked.w_weight.dequantize(), torch.stack([layer.weight.dequantize() for layer in layers]))


def test_tensor_scales_that_differ_keep_their_rows():
    layer, given, weights = fused("NVFP4A16", scales=(1.0, 64.0))
    assert weights[0].tensor_scale != weights[1].tensor_scale
    hold(layer, group_of(given), PLACE)
    assert torch.equal(layer.weight.dequantize(), torch.cat([weight.dequantize() for weight in weights]))


def test_a_tensor_that_does_not_fit_is_named():
    layer, given, _ = fused("MXFP8")
    layer.weight_scale = nn.Parameter(layer.weight_scale[:, 1:].clone(), requires_grad=False)
    with pytest.raises(lowbit.CheckpointError, match=r"weight_scale is torch.uint8 \(128, 7\)"):
        hold(layer, group_of(given), PLACE)


def test_away_from_cpus_nothing_is_registered(monkeypatch):
    platform = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platform)
    lowbit_hf.serving.register.__wrapped__()
    assert "lowbit_hf.serving.kernels" not in sys.modules


def test_importing_it_brings_no_model_library():
    code = "import sys, lowbit_hf.serving, lowbit_hf.serving.weights; print({'transformers', 'typer', 'rich'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
