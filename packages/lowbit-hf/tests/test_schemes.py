from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from lowbit.element import INT3
from lowbit.errors import FormatError, RecipeError
from lowbit.format import Format
from lowbit_hf.schemes import ALIASES, SCHEMES, quantization_config, scheme

# What compressed-tensors 0.20.0 itself wrote for a model quantized with each preset.
WRITTEN = json.loads((Path(__file__).parent / "data" / "presets_0.20.0.json").read_bytes())
# lowbit stores codes of fewer than 8 bits packed where compressed-tensors would infer a byte a code.
REPACKED = {name for name in SCHEMES if re.fullmatch(r"W[2-7]A(4|8|FP8)", name)}


def without_observer(args):
    return args and {key: value for key, value in args.items() if key not in ("observer", "zp_dtype")}


@pytest.mark.parametrize("name", WRITTEN)
def test_config_is_what_compressed_tensors_writes(name):
    expected = WRITTEN[name]
    del expected["moe_sparsity_config"]
    group = expected["config_groups"]["group_0"]
    group["input_activations"] = without_observer(group["input_activations"])
    if name in REPACKED:
        assert group["format"] == expected["format"] == "int-quantized"
        group["format"] = expected["format"] = "pack-quantized"
    assert quantization_config({SCHEMES[name]: ["Linear"]}, ["lm_head"]) == expected


OURS = {"W8A8_ASYM", "W8A8_STATIC", "W8A8_STATIC_ASYM"}


def test_every_preset_has_a_scheme():
    assert {*SCHEMES, *ALIASES} - OURS == set(PRESET_SCHEMES) - {"UNQUANTIZED"}


def test_ways_to_round_inputs_that_no_preset_has():
    eight = SCHEMES["W8A8"]
    for name, strategy, dynamic, symmetric in (
        ("W8A8_ASYM", "token", True, False),
        ("W8A8_STATIC", "tensor", False, True),
        ("W8A8_STATIC_ASYM", "tensor", False, False),
    ):
        parsed = QuantizationScheme(**SCHEMES[name].config_group())
        inputs = parsed.input_activations
        assert (inputs.num_bits, str(inputs.type)) == (8, "int")
        assert (str(inputs.strategy), inputs.dynamic, inputs.symmetric) == (strategy, dynamic, symmetric)
        assert parsed.weights == QuantizationScheme(**eight.config_group()).weights


@pytest.mark.parametrize("name", sorted({*SCHEMES, *ALIASES} - OURS))
def test_group_means_what_the_preset_means(name):
    given = SCHEMES[ALIASES.get(name, name)]
    preset = preset_name_to_scheme(name, ["Linear"])
    parsed = QuantizationScheme(**given.config_group())
    for part in ("weights", "input_activations"):
        ours, theirs = getattr(parsed, part), getattr(preset, part)
        assert without_observer(ours and ours.model_dump()) == without_observer(theirs and theirs.model_dump())
    inferred = infer_module_format(torch.nn.Linear, preset).value
    assert given.file_format == ("pack-quantized" if name in REPACKED else inferred)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_take_the_weights_dtype_where_the_format_leaves_it_open(dtype):
    for name, given in SCHEMES.items():
        stored = given.weight_format(dtype).scale.storage
        fixed = {"MX": torch.float8_e8m0fnu, "NV": torch.float8_e4m3fn}
        assert stored == fixed.get(name[:2], dtype), name


def test_scales_refuse_a_dtype_that_cannot_be_stored():
    with pytest.raises(FormatError, match=r"W4A16 stores scales in the weight's dtype: .* not torch.float64"):
        SCHEMES["W4A16"].weight_format(torch.float64)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("W8A8", 8 + 16 / 4096),
        ("W4A16", 4 + 16 / 128),
        ("W4A16_ASYM", 4 + 20 / 128),
        ("W3A16_G32", 3 + 16 / 32),
        ("W4A16_G48", 4 + 16 / 48),
        ("FP8_BLOCK", 8 + 16 / 128**2),
        ("MXFP6A16", 6 + 8 / 32),
        ("MXFP4XFP8", 4 + 8 / 32),
        ("NVFP4A16", 4 + 8 / 16 + 32 / 4096**2),
    ],
)
def test_bits_per_weight(name, bits):
    assert scheme(name).bits_per_weight == pytest.approx(bits, rel=1e-12)


def test_names_are_case_insensitive_and_have_aliases():
    assert scheme("fp8_Dynamic") is SCHEMES["FP8_DYNAMIC"]
    assert scheme("int8") is SCHEMES["W8A8"]


def test_group_size_replaces_that_of_integers():
    small = scheme("w3a16_g32")
    assert small.name == "W3A16_G32"
    assert small.weight_format(torch.float16) == Format.parse("int3:1x32:float16")
    assert small.config_group()["weights"] == SCHEMES["W3A16"].config_group()["weights"] | {"group_size": 32}
    assert scheme("W4A16_ASYM_G64").weight == Format.parse("uint4:1x64:bfloat16:zero=uint4")
    assert scheme("W4A8_G64").activation == SCHEMES["W4A8"].activation
    assert scheme("W4A16_G128") is SCHEMES["W4A16"]
    assert small.weight.element is INT3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("W4A61", r"no scheme is named 'W4A61'; did you mean W4A16 or "),
        ("NF4_G64", r"no scheme is named 'NF4_G64'; "),
        ("W4A16_G0", r"no scheme is named 'W4A16_G0'; .*as in W4A16_G64"),
        ("W8A8_G128", r"W8A8 has no group size to replace"),
        ("MXFP4_G16", r"MXFP4 has no group size to replace"),
        ("W4AFP8_G64", r"W4AFP8_G64 cannot be written: .*groups of 128 only"),
    ],
)
def test_lookup_refuses_in_words(name, words):
    with pytest.raises(RecipeError, match=words):
        scheme(name)


def test_several_schemes_make_one_config():
    groups = {SCHEMES["W4A16"]: ["re:.*mlp.*"], SCHEMES["FP8_DYNAMIC"]: ["re:.*attn.*", "model.head"]}
    config = quantization_config(groups, ["lm_head"])
    assert config["format"] == "mixed-precision"
    parsed = QuantizationConfig(**config)
    assert [group.format for group in parsed.config_groups.values()] == ["pack-quantized", "float-quantized"]
    assert [group.targets for group in parsed.config_groups.values()] == list(groups.values())
    assert parsed.quantization_status.value == "compressed"
    # Two schemes held alike are not mixed.
    alike = quantization_config({SCHEMES["W4A16"]: ["a"], SCHEMES["W3A16"]: ["b"]}, [])
    assert alike["format"] == "pack-quantized"


@pytest.mark.parametrize("groups", [{}, {SCHEMES["W4A16"]: []}])
def test_config_needs_schemes_and_targets(groups):
    with pytest.raises(RecipeError, match="needs at least one scheme, and targets for each"):
        quantization_config(groups, [])
