"""Other libraries' ways to do what lowbit does, where they are installed: every one named, or why it is not there.

Each is called as its own documentation or benchmarks call it, compiled where those compile it. Versions they were
tried with stand in the JSON of results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backends import Refusal
from lowbit.bench.case import Contender, Make, Use, copies, peer, plain
from lowbit.errors import NoKernelError
from lowbit.format import FORMATS, Format
from lowbit.numerics import Scales, decode

_E4M3 = torch.float8_e4m3fn
_FP8_ROW, _FP8_1X128, _FP8_128X128 = (FORMATS[name] for name in ("FP8_ROW", "FP8_1X128", "FP8_128X128"))
_INT8_ROW = FORMATS["INT8_ROW"]
_INT4, _MXFP8, _MXFP4, _NVFP4 = (FORMATS[name] for name in ("INT4_G128", "MXFP8", "MXFP4", "NVFP4"))
_ops: Any = torch.ops

Build = Callable[[], Contender]


def casts(fmt: Format, axis: int, moved: float, device: torch.device) -> tuple[Contender | Refusal, ...]:
    """Others that round a matrix (M, K) to `fmt` with blocks along `axis`, -1 or -2."""
    compiled = partial(_cast, fmt, axis, moved)
    found: dict[str, Build] = {}
    if fmt in {_MXFP8, _MXFP4}:
        found["torchao to_mx, compiled"] = lambda: compiled("torchao to_mx, compiled", _torchao_mx(fmt, axis))
    if fmt == _MXFP8:
        found["torchao triton_to_mxfp8"] = _on_gpu(device, lambda: _torchao_triton(axis, moved))
    if axis == -1:
        if fmt == _NVFP4:
            found["torchao nvfp4_quantize, compiled"] = lambda: compiled(
                "torchao nvfp4_quantize, compiled", _torchao_nvfp4()
            )
        if fmt in {_FP8_ROW, _FP8_1X128}:
            found["torch.compile"] = lambda: compiled("torch.compile", partial(_fp8, group=fmt.block[-1]))
        if fmt in {_MXFP8, _MXFP4}:
            found["triton_kernels"] = _on_gpu(device, lambda: _triton_kernels(fmt, moved))
        if fmt in {_FP8_ROW, _FP8_1X128, _NVFP4, _MXFP4}:
            found["mslk"] = _on_gpu(device, lambda: _mslk_cast(fmt, moved))
    return _all(found)


def linears(use: Use, shape: tuple[int, int], moved: float, device: torch.device) -> tuple[Contender | Refusal, ...]:
    """Others' linear layers for a weight (N, K) and inputs in the formats of `use`."""
    fmt, given = use.format, use.input
    found: dict[str, Build] = {}
    if (config := _HUMMING.get((fmt, given))) is not None:
        found["humming"] = lambda: _humming(*config, shape, moved)
    if (fmt, given) == (_INT4, None):
        found |= {"torchao tinygemm": lambda: _torchao_int4(moved), "mslk": lambda: _mslk_int4("bf16", moved)}
    if (fmt, given) == (_INT4, _FP8_ROW):
        found["mslk"] = lambda: _mslk_int4("fp8", moved)
    if (fmt, given) == (_FP8_ROW, _FP8_ROW):
        found |= {"torch scaled_mm": lambda: _scaled_mm(moved), "torchao, compiled": lambda: _torchao_fp8(moved)}
    if (fmt, given) == (_FP8_128X128, _FP8_1X128):
        found |= {"torch scaled_mm": lambda: _block_scaled_mm(moved), "deep_gemm": lambda: _deep_gemm(moved)}
    checked = {name: _on_gpu(device, build) for name, build in found.items()}
    if (fmt, given) == (_INT4, None):
        checked["torch int4pack"] = _on_cpu(device, lambda: _int4pack(moved))
    if (fmt, given) == (_INT8_ROW, _INT8_ROW):
        checked["oneDNN qlinear"] = _on_cpu(device, lambda: _qlinear(moved))
    return _all(checked)


def grouped(use: Use, offs: Tensor, moved: float, device: torch.device) -> tuple[Contender | Refusal, ...]:
    """Others' products of tokens with experts (E, N, K), the e-th one's rows ending at `offs[e]`."""
    if (use.format, use.input) != (_FP8_ROW, _FP8_ROW):
        return ()
    found = {
        "torch scaled_grouped_mm": partial(_scaled_grouped_mm, offs, moved),
        "mslk": partial(_mslk_grouped, offs, moved),
    }
    return _all({name: _on_gpu(device, build) for name, build in found.items()})


def bags(
    fmt: Format, bag: tuple[int, int], contender: Callable[..., Contender], device: torch.device
) -> tuple[Contender | Refusal, ...]:
    """Others' sums of bags (rows, columns) with codes of as many bits; `contender` takes a name and how it is done."""
    (length, columns), bits = bag, fmt.element.bits
    if bits not in _BAGS:
        return ()
    name = f"torch quantized {_BAGS[bits]}"

    def build() -> Contender:
        ops = _ops.quantized
        pack, run = (getattr(ops, f"embedding_bag_{_BAGS[bits]}_{rest}") for rest in ("prepack", "rowwise_offsets"))

        def made(weight: Tensor) -> Tensor:
            return pack(weight.float())

        def pooled(ids: Tensor, table: Tensor) -> Tensor:
            return run(table, ids, torch.arange(0, len(ids), length))

        # A scale and an offset a row: in float32 with bytes, in float16 with fewer bits.
        return contender(name, made, pooled, columns * bits / 8 + (8 if bits == 8 else 4))

    return _all({name: _on_cpu(device, build)})


_BAGS = {8: "byte", 4: "4bit", 2: "2bit"}


def attentions(
    read: float, written: float, device: torch.device, *, causal: bool, decode: bool
) -> tuple[Contender | Refusal, ...]:
    """Others' attention of bfloat16 queries (1, heads, S, D), of which `read` and `written` are the bytes."""
    whole = read + written
    ways = {"FA3": whole, "FA3 fp8": read / 2 + written, "FA3 fp8 after rounding": whole}
    found: dict[str, Build] = {
        name: partial(_fa3, name, moved, causal=causal, decode=decode) for name, moved in ways.items()
    }
    found["sageattention"] = partial(_sage, whole, causal=causal)
    return _all({name: _on_gpu(device, build) for name, build in found.items()})


def optimizers(
    stepping: Callable[[str, Callable[..., Any], float], Contender], device: torch.device
) -> tuple[Contender | Refusal, ...]:
    """Others' AdamW in low precision; `stepping` takes a name, a class, and bytes of states a parameter."""
    bits8, bits4 = 2 + 2 * 4 / 256, 1 + 2 * 4 / 128

    def build(library: str, name: str, states: float) -> Contender:
        return stepping(f"{library} {name}", getattr(import_module(f"{library}.optim"), name), states)

    found: dict[str, Build] = {
        "bitsandbytes AdamW8bit": _on_gpu(device, partial(build, "bitsandbytes", "AdamW8bit", bits8)),
        "torchao AdamW8bit": partial(build, "torchao", "AdamW8bit", bits8),
        "torchao AdamW4bit": partial(build, "torchao", "AdamW4bit", bits4),
    }
    return _all(found)


def _all(found: dict[str, Build]) -> tuple[Contender | Refusal, ...]:
    return tuple(peer(name, build) for name, build in found.items())


def _on(kind: str, device: torch.device, build: Build) -> Build:
    """A builder that refuses devices of another kind."""

    def checked() -> Contender:
        if device.type != kind:
            needed = {"cuda": "an NVIDIA GPU", "cpu": "a CPU"}[kind]
            raise NoKernelError(f"needs {needed}; this benchmark runs on {device.type}")
        return build()

    return checked


_on_gpu, _on_cpu = partial(_on, "cuda"), partial(_on, "cpu")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for the shapes it gets, without what was compiled before: dynamo keeps eight at most."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


# Casts.


def _cast(
    fmt: Format, axis: int, moved: float, name: str, function: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Contender:
    """A compiled function that gives scales and codes."""

    def values(result: tuple[Tensor, Tensor]) -> Tensor:
        return _values(fmt, axis, *result)

    return Contender(name, copies, compiled(function), moved, values)


def _values(fmt: Format, axis: int, scale: Tensor, data: Tensor) -> Tensor:
    """What codes and scales stand for; the second scale of NVFP4 is 1."""
    data = data.view(fmt.element.storage)
    scale = scale.view(fmt.scale.storage) if scale.itemsize == 1 else scale.float()
    whole = torch.ones(1, 1, device=data.device) if fmt.tensor_scale else None
    k = data.shape[-1] * (8 // fmt.element.bits)
    values = decode(data, fmt, Scales(scale.reshape(len(data), -1), None, whole), k)
    return values if axis == -1 else values.mT


def _swapped(fmt: Format, result: tuple[Tensor, Tensor]) -> Tensor:
    """What codes and scales along rows stand for, where codes come first."""
    data, scale = result
    return _values(fmt, -1, scale, data)


def _torchao_mx(fmt: Format, axis: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    to_mx = import_module("torchao.prototype.mx_formats.mx_tensor").to_mx
    element = _E4M3 if fmt == _MXFP8 else torch.float4_e2m1fn_x2
    return lambda x: to_mx(x if axis == -1 else x.mT.contiguous(), elem_dtype=element, block_size=32)


def _torchao_nvfp4() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    quantize = import_module("torchao.prototype.mx_formats.nvfp4_tensor").nvfp4_quantize
    return partial(quantize, block_size=16)


def _torchao_triton(axis: int, moved: float) -> Contender:
    kernels = import_module("torchao.prototype.mx_formats.kernels")
    run = kernels.triton_to_mxfp8_dim0 if axis == -1 else kernels.triton_to_mxfp8_dim1

    def values(result: tuple[Tensor, Tensor]) -> Tensor:
        data, scale = result
        # Along columns the codes come as a view of their transpose.
        return _values(_MXFP8, axis, scale, data if axis == -1 else data.mT)

    return Contender("torchao triton_to_mxfp8", copies, run, moved, values)


def _triton_kernels(fmt: Format, moved: float) -> Contender:
    downcast = import_module("triton_kernels.numerics_details.mxfp").downcast_to_mxfp
    element = _E4M3 if fmt == _MXFP8 else torch.uint8

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return downcast(x, element, axis=-1)

    return Contender("triton_kernels", copies, run, moved, partial(_swapped, fmt))


def _mslk_cast(fmt: Format, moved: float) -> Contender:
    import_module("mslk")
    if fmt.element.bits == 4:
        fp4 = import_module("mslk.quantize.triton.fp4_quantize")
        if fmt == _MXFP4:
            return Contender("mslk", copies, fp4.triton_quantize_mx4_unpack, moved)
        scale = import_module("mslk.quantize.triton.fp4_utils").global_scale_nvfp4

        def prepare(x: Tensor) -> Make:
            # The scale of the whole is not part of what is timed, as it is not in a calibrated layer.
            return copies(x, scale(x))

        return Contender("mslk", prepare, fp4.triton_quantize_nvfp4, moved)
    fp8 = import_module("mslk.quantize.triton.fp8_quantize")
    if fmt == _FP8_1X128:
        return Contender("mslk", copies, fp8.quantize_fp8_group, moved)
    return Contender("mslk", copies, fp8.quantize_fp8_row, moved, partial(_swapped, fmt))


def _fp8(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """Scales (M, K / group) and e4m3 codes of rows, or of groups in them."""
    blocks = x.float().unflatten(-1, (-1, group or x.shape[-1]))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return scale.squeeze(-1), (blocks / scale).to(_E4M3).flatten(-2)


# Linear layers.

# By the formats of weight and input: humming's words for them.
_HUMMING: dict[tuple[Format, Format | None], tuple[dict[str, Any], dict[str, Any] | None]] = {
    (_INT4, None): ({"dtype": "int4", "group_size": 128}, None),
    (_INT4, _FP8_ROW): ({"dtype": "int4", "group_size": 128}, {"dtype": "float8e4m3"}),
    (_MXFP4, None): ({"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}, None),
    (_NVFP4, None): (
        {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3", "scale_2_type": "tensor"},
        None,
    ),
}


def _humming(weight_config: dict[str, Any], input_config: Any, shape: tuple[int, int], moved: float) -> Contender:
    layers, kernels = import_module("humming.layer"), import_module("humming.kernel.humming")
    tune = import_module("humming.tune").get_heuristics_config
    n, k = shape

    def prepare(x: Tensor, weight: Tensor) -> Make:
        # It may change the dicts that it is given.
        given = {"weight_config": dict(weight_config), "input_config": input_config and dict(input_config)}
        layer = layers.HummingLayer(shape_n=n, shape_k=k, torch_dtype=x.dtype, **given).to(x.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        # Of this number of tokens alone: by default it compiles kernels for all numbers.
        found = tune(layer.humming_config, shape_m=len(x))
        tuning = json.dumps(found, default=lambda part: getattr(part, "value", str(part)))
        kernels.HummingKernel.prepare_kernels(layer.humming_config.to_str(), None, tuning, 0)
        return lambda i: (deepcopy(layer) if i else layer, x.clone(), tuning)

    def run(layer: nn.Module, x: Tensor, tuning: str) -> Tensor:
        return layer(x, tuning_config=tuning)

    return Contender("humming", prepare, run, moved, plain)


def _torchao_int4(moved: float) -> Contender:
    api = import_module("torchao.quantization")
    config = api.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    return Contender("torchao tinygemm", partial(_torchao_copies, config), _linear, moved, plain)


def _int4pack(moved: float) -> Contender:
    pack, product = (
        getattr(_ops.aten, f"_{name}_for_cpu") for name in ("convert_weight_to_int4pack", "weight_int4pack_mm")
    )

    def prepare(x: Tensor, weight: Tensor) -> Make:
        n, k = weight.shape
        groups = weight.float().view(n, k // 128, 128)
        low, high = torch.aminmax(groups, dim=-1, keepdim=True)
        scale = (high - low) / 15
        codes = ((groups - low) / scale).round().clamp(0, 15).view(n, k)
        # What is added counts from the middle code.
        pairs = torch.cat((scale, low + 8 * scale), -1).transpose(0, 1).to(x.dtype)
        return copies(x, pack(codes.int(), 1), pairs.contiguous())

    def run(x: Tensor, codes: Tensor, pairs: Tensor) -> Tensor:
        return product(x, codes, 128, pairs)

    return Contender("torch int4pack", prepare, run, moved, plain)


def _qlinear(moved: float) -> Contender:
    pack, product = _ops.onednn.qlinear_prepack, _ops.onednn.qlinear_pointwise

    def prepare(x: Tensor, weight: Tensor) -> Make:
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        codes = (weight.float() / scale[:, None]).round().to(torch.int8)
        zero = torch.zeros(len(weight), dtype=torch.int64)
        return lambda _: (x.clone(), pack(codes, list(x.shape)), scale.clone(), zero)

    def run(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        # It takes one scale of inputs, not one a token.
        by = float(x.abs().amax()) / 127
        rounded = (x / by).round().add(128).to(torch.uint8)
        return product(rounded, by, 128, codes, scale, zero, None, 1.0, 0, x.dtype, "none", [], "")

    return Contender("oneDNN qlinear", prepare, run, moved, plain)


def _torchao_fp8(moved: float) -> Contender:
    api = import_module("torchao.quantization")
    config = api.Float8DynamicActivationFloat8WeightConfig(granularity=api.PerRow())
    return Contender("torchao, compiled", partial(_torchao_copies, config), compiled(_linear), moved, plain)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def _torchao_copies(config: Any, x: Tensor, weight: Tensor) -> Make:
    """Tokens, and what torchao makes of a layer's weight."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    # In a model: of the outermost module alone it makes nothing.
    import_module("torchao.quantization").quantize_(nn.Sequential(layer), config)
    return copies(x, layer.weight.detach())


def _mslk_int4(dtype: str, moved: float) -> Contender:
    import_module("mslk")
    shuffle = import_module("mslk.quantize.shuffle").quantize_int4_preshuffle
    quantize = import_module("mslk.quantize.triton.fp8_quantize").quantize_fp8_row

    def prepare(x: Tensor, weight: Tensor) -> Make:
        codes, scales = shuffle(weight, dtype=dtype)
        return copies(x, codes, *scales)

    def rounded(x: Tensor, codes: Tensor, groups: Tensor, rows: Tensor) -> Tensor:
        data, scale = quantize(x)
        return _ops.mslk.f8i4bf16_shuffled(data, codes, scale, rows, groups)

    run = rounded if dtype == "fp8" else _ops.mslk.bf16i4bf16_shuffled
    return Contender("mslk", prepare, run, moved, plain)


def _scaled_mm(moved: float) -> Contender:
    quantize, product = compiled(_fp8), vars(torch)["_scaled_mm"]

    def prepare(x: Tensor, weight: Tensor) -> Make:
        scale, data = _fp8(weight)
        return copies(x, data, scale.mT.contiguous())

    def run(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        s, q = quantize(x)
        return product(q, data.mT, scale_a=s, scale_b=scale, out_dtype=x.dtype, use_fast_accum=True)

    return Contender("torch scaled_mm", prepare, run, moved, plain)


def _block_scaled_mm(moved: float) -> Contender:
    quantize, kinds = compiled(_fp8_groups), nn.functional.ScalingType

    def run(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        s, q = quantize(x)
        return nn.functional.scaled_mm(
            q,
            data.mT,
            scale_a=s,
            scale_recipe_a=kinds.BlockWise1x128,
            scale_b=scale.mT,
            scale_recipe_b=kinds.BlockWise128x128,
            output_dtype=x.dtype,
        )

    return Contender("torch scaled_mm", _block_copies, run, moved, plain)


def _deep_gemm(moved: float) -> Contender:
    product, quantize = import_module("deep_gemm").fp8_gemm_nt, compiled(_fp8_groups)

    def run(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        s, q = quantize(x)
        out = x.new_empty(len(x), len(data))
        product((q, s), (data, scale), out, disable_ue8m0_cast=True)
        return out

    return Contender("deep_gemm", _block_copies, run, moved, plain)


def _fp8_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (M, K / 128), those of a column side by side, and e4m3 codes of groups of 128."""
    scale, data = _fp8(x, group=128)
    return scale.mT.contiguous().mT, data


def _block_copies(x: Tensor, weight: Tensor) -> Make:
    """Tokens, and codes and scales of a weight in blocks of 128 x 128."""
    n, k = weight.shape
    blocks = weight.float().view(n // 128, 128, k // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-12) / 448
    return copies(x, (blocks / scale).to(_E4M3).view(n, k), scale.view(n // 128, k // 128))


# Experts.


def _scaled_grouped_mm(offs: Tensor, moved: float) -> Contender:
    quantize, product = compiled(_fp8), vars(torch)["_scaled_grouped_mm"]

    def prepare(x: Tensor, weight: Tensor) -> Make:
        scale, data = _experts(weight)
        return copies(x, data, scale)

    def run(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        s, q = quantize(x)
        return product(q, data.mT, s.view(-1), scale, offs=offs, out_dtype=x.dtype, use_fast_accum=True)

    return Contender("torch scaled_grouped_mm", prepare, run, moved, plain)


def _mslk_grouped(offs: Tensor, moved: float) -> Contender:
    import_module("mslk")
    quantize = import_module("mslk.quantize.triton.fp8_quantize").quantize_fp8_row
    sizes = offs.diff(prepend=offs.new_zeros(1)).long()

    def prepare(x: Tensor, weight: Tensor) -> Make:
        scale, data = _experts(weight)
        return copies(x, data, scale)

    def run(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        q, s = quantize(x)
        return _ops.mslk.f8f8bf16_rowwise_grouped_stacked(q, data, s.view(-1, 1), scale, sizes)

    return Contender("mslk", prepare, run, moved, plain)


def _experts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (E, N) and codes (E, N, K), an expert at a time: all in float32 may not fit."""
    parts: Iterable[tuple[Tensor, Tensor]] = map(_fp8, weight)
    scales, codes = zip(*parts, strict=True)
    return torch.stack(scales).squeeze(-1), torch.stack([code.view(torch.uint8) for code in codes]).view(_E4M3)


# Attention.


def _fa3(name: str, moved: float, *, causal: bool, decode: bool) -> Contender:
    module = import_module("flash_attn_interface")
    attend = module.flash_attn_with_kvcache if decode else module.flash_attn_func

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        heads = k.shape[2]
        scales, codes = zip(*(_fp8_heads(x, heads) for x in (q, k, v)), strict=True)
        return [*codes, *scales]

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Make:
        given = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        return copies(*(rounded(*given) if name == "FA3 fp8" else given))

    def run(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor) -> Tensor:
        names = ("q_descale", "k_descale", "v_descale")[: len(scales)]
        return attend(q, k, v, causal=causal, **dict(zip(names, scales, strict=True)))

    if name == "FA3 fp8 after rounding":
        fast = compiled(rounded)
        return Contender(name, prepare, lambda *given: run(*fast(*given)), moved, _heads_first)
    return Contender(name, prepare, run, moved, _heads_first)


def _fp8_heads(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Scales (1, heads) and e4m3 codes of (1, S, H, D), one for each head of keys: queries of one share it."""
    parts = x.float().unflatten(2, (heads, -1))
    scale = parts.abs().amax((1, 3, 4)).clamp_min(1e-12) / 448
    return scale, (parts / scale[:, None, :, None, None]).to(_E4M3).flatten(2, 3)


def _heads_first(result: Tensor) -> Tensor:
    return result.transpose(1, 2)


def _sage(moved: float, *, causal: bool) -> Contender:
    attend = import_module("sageattention").sageattn

    def prepare(*given: Tensor) -> Make:
        # It may change the keys that it is given.
        return lambda _: tuple(x.clone() for x in given)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, tensor_layout="HND", is_causal=causal)

    return Contender("sageattention", prepare, run, moved, plain)
