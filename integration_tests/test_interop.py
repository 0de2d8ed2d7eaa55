"""What lowbit writes means the same to others: to compressed-tensors, to transformers, and to a rounding written here.

The oracle rounds in numpy, from the formats' definitions alone, and knows nothing of lowbit but the names of schemes.
"""

from __future__ import annotations

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.reference import quantize_input
from lowbit.tensor import QuantizedTensor
from lowbit_hf import load
from lowbit_hf.schemes import SCHEMES

WRITABLE = [name for name, entry in SCHEMES.items() if not entry.needs_data]
MODELS = ["lm-tiny", "moe-tiny"]
# One of each file format and strategy, on which all depends that experts and other readers do with it.
FORMATS = [
    "W8A8",
    "W4A16",
    "W3A16",
    "W4A16_ASYM",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "MXFP8A16",
    "MXFP6A16",
    "MXFP4A16",
    "NVFP4A16",
]
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]

# Rounding, independently.


def bf16(x):
    return np.asarray(x, dtype=np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def blocked(w, rows, columns):
    """(n, k) -> (n/rows, rows, k/columns, columns)."""
    n, k = w.shape
    assert n % rows == k % columns == 0
    return w.reshape(n // rows, rows, k // columns, columns)


def largest(blocks):
    return np.abs(blocks).max(axis=(1, 3), keepdims=True)


def integers(w, bits, group):
    blocks = blocked(w, 1, group)
    scale = bf16(largest(blocks) / np.float32((2**bits - 1) / 2))
    scale[scale == 0] = 1
    codes = np.clip(np.rint(blocks / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int32)
    return codes.astype(np.float32) * scale


def offset_integers(w, group):
    blocks = blocked(w, 1, group)
    low, high = (np.float32(f(blocks, axis=(1, 3), keepdims=True)) for f in (np.min, np.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = bf16(high / np.float32(15) - low / np.float32(15))
    scale[scale == 0] = 1
    zero = np.clip(-np.rint(low / scale), 0, 15)
    codes = np.clip(np.rint(blocks / scale) + zero, 0, 15)
    return (codes - zero + np.float32(0)).astype(np.float32) * scale


def fp8(w, rows, columns):
    blocks = blocked(w, rows, columns)
    scale = bf16(largest(blocks) / np.float32(448))
    scale[scale == 0] = 1
    return np.clip(blocks / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def microscaled(w, element, top, mantissa):
    """MX: the power of two of each 32's largest magnitude, after rounding that to the element's mantissa."""
    blocks = blocked(w, 1, 32)
    amax = largest(blocks).astype(np.float64)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(amax))
        # Ties go up: 1.75 of a two-bit significand is 2.
        exponent += amax / np.exp2(exponent) >= 2 - 2.0 ** -(mantissa + 1)
    scale = np.exp2(np.where(amax == 0, -127, np.maximum(exponent - np.floor(np.log2(top)), -127))).astype(np.float32)
    return np.clip(blocks / scale, -top, top).astype(element).astype(np.float32) * scale


def nvfp4(w, amax):
    """Scales of 16 in e4m3, over the least power of two that lets the matrix' (or its siblings') largest be one."""
    tensor = np.float32(1)
    while amax / 6 / tensor > 448:
        tensor *= 2
    while amax / 6 / (tensor / 2) <= 448:
        tensor /= 2
    blocks = blocked(w, 1, 16)
    scale = (largest(blocks) / np.float32(6) / tensor).astype(np.float32)
    smallest = np.float32(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).smallest_subnormal)
    stored = np.where(scale == 0, 1, np.maximum(scale, smallest)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    total = stored * tensor
    return np.clip(blocks / total, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * total


def rounded(name, w, amax):
    """Float32 (n, k) values that weight `w` has under a scheme."""
    if match := re.fullmatch(r"W(\d)A(16|8|8_ASYM|4|FP8)", name):
        bits = int(match[1])
        return integers(w, bits, w.shape[1] if name in ("W8A8", "W8A8_ASYM") else 128).reshape(w.shape)
    family = {
        "W4A16_ASYM": lambda: offset_integers(w, 128),
        "FP8_DYNAMIC": lambda: fp8(w, 1, w.shape[1]),
        "FP8_BLOCK": lambda: fp8(w, 128, 128),
        "NVFP4A16": lambda: nvfp4(w, amax),
        **dict.fromkeys(("MXFP8", "MXFP8A16"), lambda: microscaled(w, ml_dtypes.float8_e4m3fn, 448, 3)),
        **dict.fromkeys(("MXFP6A8", "MXFP6A16"), lambda: microscaled(w, ml_dtypes.float6_e2m3fn, 7.5, 3)),
        **dict.fromkeys(("MXFP4", "MXFP4XFP8", "MXFP4A16"), lambda: microscaled(w, ml_dtypes.float4_e2m1fn, 6, 1)),
    }
    return family[name]().reshape(w.shape)


def is_linear(name):
    return re.search(r"(_proj)\.weight$", name) is not None


def dense(name, state):
    """The checkpoint `state` with every linear weight rounded to a scheme."""
    result = {}
    for tensor, values in state.items():
        if not is_linear(tensor):
            result[tensor] = values
            continue
        parent, _, projection = tensor.removesuffix(".weight").rpartition(".")
        group = next((names for names in FUSED if projection in names), (projection,))
        amax = max(float(state[f"{parent}.{sibling}.weight"].abs().max()) for sibling in group)
        w = values.to(torch.float32).numpy()
        result[tensor] = torch.from_numpy(rounded(name, w, np.float32(amax))).to(torch.bfloat16)
    return result


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


def differing(a, b):
    """Names of the tensors that are not the same bits in both."""
    assert a.keys() == b.keys()
    return [name for name in a if not same_bits(a[name], b[name])]


def parameters(model):
    return {
        name: p.dequantize().contiguous() if isinstance(p, QuantizedTensor) else p.detach()
        for name, p in model.named_parameters()
    }


def logits(model):
    ids = torch.arange(3, 259).view(4, 64)
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def from_pretrained(folder, *, dequantize=None):
    """transformers' model, and what it missed; `dequantize` in the config, for as an argument it warns."""
    config = AutoConfig.from_pretrained(folder)
    if dequantize is not None:
        config.quantization_config["dequantize"] = dequantize
    model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="session")
def twin(models, tmp_path_factory):
    """`twin("lm-tiny", "W4A16")`: a plain folder of the weights that the oracle rounds to."""
    made = {}

    def of(model, name):
        if (model, name) not in made:
            folder = tmp_path_factory.mktemp("twin") / name
            shutil.copytree(models / model, folder)
            state = dense(name, load_file(folder / "model.safetensors"))
            save_file(state, folder / "model.safetensors", {"format": "pt"})
            made[model, name] = folder
        return made[model, name]

    return of


CASES = [*[("lm-tiny", name) for name in WRITABLE], *[("moe-tiny", name) for name in FORMATS]]
every_scheme = pytest.mark.parametrize(("model", "name"), CASES)
every_model = pytest.mark.parametrize("model", MODELS)


@every_scheme
def test_weights_are_those_of_an_independent_rounding(quantized, twin, model, name):
    ours, theirs = load(quantized(model, name)), from_pretrained(twin(model, name))
    assert differing(parameters(ours), parameters(theirs)) == []
    low = [p for p in ours.parameters() if isinstance(p, QuantizedTensor)]
    assert len(low) == {"lm-tiny": 6 * 7, "moe-tiny": 4 * 6}[model]
    if SCHEMES[name].activation is None:
        wanted = logits(theirs)
        if model == "lm-tiny":
            assert torch.equal(logits(ours), wanted)
        else:  # where experts' parts are summed in another order, of which two roundings differ
            assert float((logits(ours) - wanted).abs().max()) <= 8 * 2**-8 * float(wanted.abs().max())


@every_scheme
def test_compressed_tensors_decompresses_the_same(quantized, twin, model, name):
    folder = quantized(model, name)
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (entry,) = config.config_groups.values()
    reader = BaseCompressor.get_value_from_registry(entry.format or config.format)
    modules, plain = {}, {}
    for tensor, values in load_file(folder / "model.safetensors").items():
        module, _, local = tensor.rpartition(".")
        if is_linear(f"{module}.weight"):
            modules.setdefault(module, {})[local] = values
        else:
            plain[tensor] = values
    read = {f"{module}.weight": reader.decompress(parts, entry)["weight"] for module, parts in modules.items()}
    assert differing(plain | read, load_file(twin(model, name) / "model.safetensors")) == []


# What transformers cannot do with a layout that is right, by model and whether it is to dequantize; see each reason.
ASYMMETRIC = "transformers 5.23 shapes packed zero points as if they were not packed"
EXPERTS = "transformers 5.23 stacks experts of symmetric packed, fp8 channel, mxfp4 and mxfp6 weights only"
GLOBAL = "transformers 5.23 drops experts' weight_global_scale without a word"
FAILS = {("lm-tiny", "W4A16_ASYM", False): ASYMMETRIC} | {
    ("moe-tiny", name, dequantize): EXPERTS
    for name in ("W8A8", "W4A16_ASYM", "FP8_BLOCK", "MXFP8A16")
    for dequantize in (True, False)
}
WRONG = {("moe-tiny", "NVFP4A16", dequantize): GLOBAL for dequantize in (True, False)}


@every_scheme
def test_transformers_loads_the_same_dequantized(quantized, twin, model, name):
    case = (model, name, True)
    if case in FAILS:
        with pytest.raises(RuntimeError):
            from_pretrained(quantized(model, name), dequantize=True)
        return
    theirs = parameters(from_pretrained(quantized(model, name), dequantize=True))
    different = differing(theirs, parameters(from_pretrained(twin(model, name))))
    if case in WRONG:
        assert all(".mlp.experts." in tensor for tensor in different)
        assert len(different) == 8
    else:
        assert different == []


@every_model
@pytest.mark.parametrize("name", FORMATS)
def test_transformers_runs_it_compressed(quantized, twin, model, name):
    case = (model, name, False)
    if case in FAILS:
        with pytest.raises(RuntimeError):
            from_pretrained(quantized(model, name), dequantize=False)
        return
    theirs = from_pretrained(quantized(model, name), dequantize=False)
    got = logits(theirs)  # the first call decompresses
    plain = from_pretrained(twin(model, name))
    weights = {tensor: p for tensor, p in parameters(theirs).items() if tensor in dict(plain.named_parameters())}
    different = differing(weights, parameters(plain))
    if case in WRONG:
        assert len(different) == 8
    else:
        assert different == []
        if SCHEMES[name].activation is None:
            assert torch.equal(got, logits(plain))


@pytest.mark.parametrize("name", ["W8A8_STATIC", "W8A8_STATIC_ASYM", "FP8", "NVFP4"])
def test_transformers_rounds_inputs_by_the_scales_that_calibration_found(models, tmp_path, lowbit, name):
    text = models / "calibration.txt"
    line = ["quantize", models / "lm-tiny", "--to", name, "--calibrate", text, "--samples", "8", "--seq-len", "64"]
    # Two layers tell what six would.
    assert lowbit(*line, "--keep", "*.layers.[2-5].*", "-o", tmp_path / "out")[0] == 0
    ours, theirs = load(tmp_path / "out"), from_pretrained(tmp_path / "out", dequantize=False)
    stored, x = load_file(tmp_path / "out" / "model.safetensors"), torch.randn(64, 256, dtype=torch.float64).float() * 2
    modules = {tensor.rpartition(".")[0] for tensor in stored if re.search(r"\.input_(global_)?scale$", tensor)}
    assert len(modules) == 2 * 7
    for module in modules:
        held, weight = theirs.get_submodule(module), ours.get_submodule(module).weight
        parts = {part: getattr(held, f"input_{part}", None) for part in ("scale", "zero_point", "global_scale")}
        for part, values in parts.items():
            if (tensor := f"{module}.input_{part}") in stored:
                assert torch.equal(values.flatten(), stored[tensor])
        inputs = x.repeat(1, weight.shape[1] // 256)
        args = held.quantization_scheme.input_activations
        wanted = forward_quantize(held.float(), inputs, "input", args)
        # In float32, in which both choose the same codes but where a quotient is all but a tie.
        found = quantize_input(inputs, weight.activation, weight.act_scale, weight.act_zero).values()
        assert float((found != wanted).float().mean()) < 1e-3


def test_mixed_schemes(models, tmp_path, lowbit):
    rules = [
        "--rule",
        "*.down_proj=W8A8",
        "--rule",
        "*.0.self_attn.*=NVFP4A16",
        "--rule",
        "model.embed_tokens.weight=W8A16",
    ]
    rules += ["--keep", "*.5.mlp.*"]
    out = tmp_path / "out"
    assert lowbit("quantize", models / "lm-tiny", "--to", "W4A16", *rules, "-o", out)[0] == 0
    ours = load(out)
    state = load_file(models / "lm-tiny/model.safetensors")
    rounded_to = {scheme: dense(scheme, state) for scheme in ("W4A16", "NVFP4A16", "W8A8")}
    expected = {}
    for tensor, values in state.items():
        scheme = "W8A16" if tensor == "model.embed_tokens.weight" else "W4A16"
        scheme = "NVFP4A16" if ".0.self_attn." in tensor else "W8A8" if "down_proj" in tensor else scheme
        if tensor == "model.embed_tokens.weight":
            w = rounded(scheme, values.float().numpy(), None)
            expected[tensor] = torch.from_numpy(w).to(torch.bfloat16)
        else:
            expected[tensor] = values if ".5.mlp." in tensor else rounded_to[scheme][tensor]
    assert differing(parameters(ours), expected) == []
    # transformers 5.23 takes one group for all modules where it dequantizes, so it is to decompress in the first call.
    embedding_kept = tmp_path / "linear"
    assert lowbit("quantize", models / "lm-tiny", "--to", "W4A16", *rules[:4], *rules[6:], "-o", embedding_kept)[0] == 0
    theirs = from_pretrained(embedding_kept, dequantize=False)
    logits(theirs)
    plain = expected | {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}
    assert differing({tensor: parameters(theirs)[tensor] for tensor in plain}, plain) == []


# The config and the tensors, as published layouts have them.


def weights(bits, kind, strategy, group=None, *, symmetric=True, dynamic=False, **more):
    args = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": group}
    return args | {"dynamic": dynamic} | more


UINT8, E4M3 = {"scale_dtype": "torch.uint8"}, {"scale_dtype": "torch.float8_e4m3fn"}
INT8_TOKEN, INT4_TOKEN = (weights(bits, "int", "token", dynamic=True) for bits in (8, 4))
FP8_TOKEN, FP8_GROUP = weights(8, "float", "token", dynamic=True), weights(8, "float", "group", 128, dynamic=True)
MX8, MX4 = (weights(bits, "float", "group", 32, dynamic=True, **UINT8) for bits in (8, 4))
CONFIG = {
    "W8A8": ("int-quantized", weights(8, "int", "channel"), INT8_TOKEN),
    "W8A8_ASYM": ("int-quantized", weights(8, "int", "channel"), INT8_TOKEN | {"symmetric": False}),
    "W4A16_ASYM": ("pack-quantized", weights(4, "int", "group", 128, symmetric=False), None),
    "W4AFP8": ("pack-quantized", weights(4, "int", "group", 128), FP8_TOKEN),
    "FP8_DYNAMIC": ("float-quantized", weights(8, "float", "channel"), FP8_TOKEN),
    "FP8_BLOCK": ("float-quantized", weights(8, "float", "block", block_structure=[128, 128]), FP8_GROUP),
    "MXFP8": ("mxfp8-quantized", weights(8, "float", "group", 32, **UINT8), MX8),
    "MXFP8A16": ("mxfp8-quantized", weights(8, "float", "group", 32, **UINT8), None),
    "MXFP6A8": ("mxfp6-pack-quantized", weights(6, "float", "group", 32, **UINT8), MX8),
    "MXFP6A16": ("mxfp6-pack-quantized", weights(6, "float", "group", 32, **UINT8), None),
    "MXFP4": ("mxfp4-pack-quantized", weights(4, "float", "group", 32, **UINT8), MX4),
    "MXFP4XFP8": ("mxfp4-pack-quantized", weights(4, "float", "group", 32, **UINT8), FP8_GROUP),
    "MXFP4A16": ("mxfp4-pack-quantized", weights(4, "float", "group", 32, **UINT8), None),
    "NVFP4A16": ("nvfp4-pack-quantized", weights(4, "float", "tensor_group", 16, **E4M3), None),
    **{f"W{b}A16": ("pack-quantized", weights(b, "int", "group", 128), None) for b in range(2, 9)},
    **{f"W{b}A8": ("pack-quantized", weights(b, "int", "group", 128), INT8_TOKEN) for b in range(2, 8)},
    **{f"W{b}A4": ("pack-quantized", weights(b, "int", "group", 128), INT4_TOKEN) for b in range(2, 5)},
}


def layout(name, n, k):
    """Local tensors of a weight (n, k): dtype and shape."""
    file_format, args, _ = CONFIG[name]
    group, bits = args["group_size"], args["num_bits"]
    scales = {"channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}.get(args["strategy"], (n, k // (group or k)))
    if file_format == "pack-quantized":
        packed = {"weight_packed": ("int32", (n, -(-k * bits // 32))), "weight_shape": ("int64", (2,))}
        zeros = {} if args["symmetric"] else {"weight_zero_point": ("int32", (-(-n * bits // 32), k // group))}
        return packed | zeros | {"weight_scale": ("bfloat16", scales)}
    if file_format in ("int-quantized", "float-quantized"):
        return {
            "weight": ("int8" if file_format[0] == "i" else "float8_e4m3fn", (n, k)),
            "weight_scale": ("bfloat16", scales),
        }
    if file_format == "mxfp8-quantized":
        return {"weight": ("float8_e4m3fn", (n, k)), "weight_scale": ("uint8", scales)}
    packed = {"weight_packed": ("uint8", (n, k * bits // 8))}
    if file_format == "nvfp4-pack-quantized":
        return packed | {"weight_scale": ("float8_e4m3fn", scales), "weight_global_scale": ("float32", (1,))}
    return packed | {"weight_scale": ("uint8", scales)}


@every_scheme
def test_config_and_tensors(models, quantized, model, name):
    folder = quantized(model, name)
    before, after = (json.loads((each / "config.json").read_text()) for each in (models / model, folder))
    file_format, args, inputs = CONFIG[name]
    group = {"format": file_format, "targets": ["Linear"], "weights": args, "input_activations": inputs}
    routers = [f"model.layers.{n}.mlp.gate" for n in range(4)] if model == "moe-tiny" else []
    assert after.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": file_format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": sorted(["lm_head", *routers]),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {"group_0": group | {"output_activations": None}},
    }
    assert after == before
    expected = {}
    for tensor, values in load_file(models / model / "model.safetensors").items():
        module = tensor.removesuffix(".weight")
        parts = layout(name, *values.shape) if is_linear(tensor) else None
        if parts is None:
            expected[tensor] = (str(values.dtype).removeprefix("torch."), tuple(values.shape))
        else:
            expected |= {f"{module}.{local}": part for local, part in parts.items()}
    written = load_file(folder / "model.safetensors")
    assert {t: (str(v.dtype).removeprefix("torch."), tuple(v.shape)) for t, v in written.items()} == expected
    others = {path.name for path in (models / model).iterdir()} - {"config.json", "model.safetensors"}
    for other in others:
        assert (folder / other).read_bytes() == (models / model / other).read_bytes()
    assert {path.name for path in folder.iterdir()} == others | {
        "config.json",
        "model.safetensors",
        "report.json",
        "report.html",
    }


@every_model
def test_fused_projections_share_a_global_scale(quantized, model):
    written = load_file(quantized(model, "NVFP4A16") / "model.safetensors")
    scales = {t.removesuffix(".weight_global_scale"): float(v) for t, v in written.items() if "global_scale" in t}
    for module, scale in scales.items():
        parent, _, projection = module.rpartition(".")
        for group in FUSED:
            if projection in group:
                assert {scales[f"{parent}.{sibling}"] for sibling in group} == {scale}


def test_generation_is_that_of_the_dequantized_model(quantized, twin):
    for model in MODELS:
        greedy = {"max_new_tokens": 8, "do_sample": False}
        ids = torch.arange(3, 35).view(2, 16)
        ours, theirs = load(quantized(model, "W4A16")), from_pretrained(twin(model, "W4A16"))
        assert torch.equal(ours.generate(ids, **greedy), theirs.generate(ids, **greedy))
