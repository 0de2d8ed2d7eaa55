"""Schemes: what `--to` names mean, and the `quantization_config` that tells other readers of them.

A scheme is a weight format, an input rounding and the file format that holds the weight. Names and meanings are those
of compressed-tensors' presets, so W4A16 here is W4A16 in llm-compressor and vLLM. Schemes of integers in groups take a
group size too, as in `W4A16_G64`.

Source: compressed-tensors 0.20.0, `PRESET_SCHEMES`, `QuantizationConfig` and `QuantizationArgs`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

import torch

from lowbit.activation import Activation, Scaling
from lowbit.element import BFLOAT16, E4M3FN, E8M0, FLOAT16, FLOAT32, INT4, INT8, element
from lowbit.errors import FormatError, RecipeError
from lowbit.format import (
    FP8_ROW,
    FP8_TENSOR,
    INT4_G128,
    INT8_ROW,
    INT8_ROW_ASYM,
    INT8_TENSOR,
    INT8_TENSOR_ASYM,
    MXFP4,
    MXFP6_E2M3,
    MXFP8,
    NVFP4,
    UINT4_G128,
    WHOLE,
    Format,
    FP8_1x128,
    FP8_128x128,
)
from lowbit.numerics import DEFAULT_MODE

# The release whose schema the config follows.
_VERSION = "0.20.0"
OWN = "lowbit"
"""File format of what compressed-tensors has none for: that of lowbit's own layout."""

KvCache = Literal["fp8", "fp8-head"]
"""What `--kv-cache` takes: a scale of a layer's keys, and one of its values; or those of each head."""

_DYNAMIC: dict[Scaling, bool | str] = {"static": False, "dynamic": True, "local": "local"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one kind of layer is stored and fed: a row of the table that `lowbit schemes` prints."""

    name: str
    # Integer and fp8 scales are stored in the weight's dtype; bfloat16 stands for it until `weight_format` knows it.
    weight: Format
    # None: inputs stay as they are ("A16").
    activation: Activation | None = None
    # compressed-tensors' name for the tensors that hold the weight; `lowbit_hf.layout` writes them.
    file_format: str
    # Why it cannot be written; None: it can.
    refusal: str | None = None

    def weight_format(self, dtype: torch.dtype) -> Format:
        """The format of a weight of `dtype` under this scheme.

        Raises:
            FormatError: the scales take the weight's dtype, and it is not float16, bfloat16 or float32.
        """
        if self.weight.scale is not BFLOAT16:
            return self.weight
        for scale in (BFLOAT16, FLOAT16, FLOAT32):
            if scale.storage == dtype:
                return replace(self.weight, scale=scale)
        msg = f"{self.name} stores scales in the weight's dtype: float16, bfloat16 or float32, not {dtype}"
        raise FormatError(msg)

    @property
    def needs_data(self) -> bool:
        """Whether its inputs are rounded by a stored scale, which only calibration data tells."""
        return self.activation is not None and self.activation.scaling != "dynamic"

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes, scales included, in a 4096 x 4096 bfloat16 matrix (columns rounded up to a group)."""
        group = max(self.weight.block[-1], 1)
        return self.weight.bits_per_element((4096, -(-4096 // group) * group))

    def config_group(self, targets: Iterable[str] = ("Linear",)) -> dict[str, object]:
        """The `config_groups` entry of this scheme; `lowbit_hf.layout.format_from_config` reads it back."""
        inputs = self.activation
        return {
            "format": self.file_format,
            "targets": list(targets),
            "weights": _arguments(self.weight, row="channel", dynamic=False),
            "input_activations": inputs and _arguments(inputs.format, row="token", dynamic=_DYNAMIC[inputs.scaling]),
            "output_activations": None,
        }


def scheme(name: str) -> Scheme:
    """Look a scheme up by name, in any case; `_G` and a number replaces the group size of a scheme of integers.

    Raises:
        RecipeError: no scheme has that name, it takes no group size, or lowbit cannot write it.
    """
    key = name.upper()
    found = SCHEMES.get(ALIASES.get(key, key)) or _regroup(key)
    if found is None:
        near = get_close_matches(key, [*SCHEMES, *ALIASES])
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        msg = (
            f"no scheme is named {name!r}; {hint}the schemes are {', '.join(SCHEMES)}; those of integers in groups "
            "take a group size too, as in W4A16_G64"
        )
        raise RecipeError(msg)
    if found.refusal is not None:
        msg = f"scheme {found.name} cannot be written: {found.refusal}"
        raise RecipeError(msg)
    return found


def scheme_of_spec(spec: str) -> Scheme:
    """The scheme of a weight's format, and of an input rounding after a `+`, by spec strings; for lowbit's layout.

    Raises:
        FormatError: a spec does not follow the grammar.
    """
    weight, _, inputs = spec.partition("+")
    activation = Activation.parse(inputs) if inputs else None
    return Scheme(name=spec, weight=Format.parse(weight), activation=activation, file_format=OWN)


def scheme_for(fmt: Format, activation: Activation | None) -> Scheme:
    """The scheme that stores weights of a format under inputs that are rounded so.

    Raises:
        FormatError: compressed-tensors has no place for it.
    """
    if activation is not None and activation.mode != DEFAULT_MODE:
        raise FormatError(
            f"compressed-tensors cannot say that scales of inputs are chosen by {activation.mode!r}; lowbit's own "
            f"layout can, and {DEFAULT_MODE!r} is what others do"
        )
    scaled = fmt.scale in (FLOAT16, BFLOAT16, FLOAT32)
    weight = replace(fmt, scale=BFLOAT16) if scaled else fmt
    for found in SCHEMES.values():
        if (found.weight, found.activation) == (weight, activation):
            return found
    code, (rows, columns) = fmt.element, fmt.block
    file_format = ""
    if scaled and code is E4M3FN and fmt.symmetric:
        file_format = "naive-quantized" if activation is None else "float-quantized"
    elif scaled and code.kind == "int" and rows == 1 and (fmt.symmetric or fmt.zero is code):
        file_format = "pack-quantized"
    elif scaled and code is INT8 and fmt.symmetric and activation is not None:
        file_format = "int-quantized"
    if not file_format:
        raise FormatError(f"compressed-tensors has no place for {fmt} weights with {activation or 'plain'} inputs")
    inputs = "A16" if activation is None else f"A{activation.format.element.bits}"
    group = "" if columns == WHOLE else f"_G{columns}"
    name = f"W{code.bits}{inputs}{'' if fmt.symmetric else '_ASYM'}{group}"
    return Scheme(name=name, weight=weight, activation=activation, file_format=file_format)


def targets_of(
    modules: Mapping[Scheme, Sequence[str]], named: Collection[str], classes: Sequence[str] = ("Linear",)
) -> dict[Scheme, list[str]]:
    """Targets of schemes: that of most modules covers `classes`; modules of others, and those `named`, are named."""
    # Readers ask names first.
    main = max(modules, key=lambda scheme: len(modules[scheme]))
    return {
        scheme: [*classes, *sorted(set(named).intersection(names))] if scheme is main else sorted(names)
        for scheme, names in modules.items()
    }


def cache_scheme(kind: KvCache) -> dict[str, object]:
    """The `kv_cache_scheme` of a kind of key-value cache."""
    strategy = "attn_head" if kind == "fp8-head" else "tensor"
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}


def quantization_config(
    groups: Mapping[Scheme, Sequence[str]], ignore: Sequence[str], kv_cache: Mapping[str, object] | None = None
) -> dict[str, object]:
    """The `quantization_config` of a `config.json`: schemes with their targets, and the modules left alone.

    Targets and `ignore` hold module class names, module names of the checkpoint, or `re:` and a regular expression;
    `kv_cache` is the `kv_cache_scheme`.

    Raises:
        RecipeError: there is no group, or a group has no target.
    """
    if not groups or not all(groups.values()):
        given = {group.name: list(targets) for group, targets in groups.items()}
        msg = f"a quantization config needs at least one scheme, and targets for each, not {given}"
        raise RecipeError(msg)
    formats = {group.file_format for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        # Any other status makes transformers build plain weights, which packed tensors do not fit.
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": kv_cache,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {f"group_{i}": group.config_group(groups[group]) for i, group in enumerate(groups)},
    }


def _arguments(fmt: Format, *, row: str, dynamic: bool | str) -> dict[str, object]:
    """QuantizationArgs of a format, whose strategy of one scale a row is named `row`.

    Keys are the few that 0.20 writes itself: readers refuse unknown keys, and have a default for every absent one.
    """
    rows, columns = fmt.block
    strategy = row
    if rows == WHOLE:
        strategy = "tensor"
    elif rows > 1:
        strategy = "block"
    elif columns != WHOLE:
        strategy = "tensor_group" if fmt.tensor_scale else "group"
    arguments: dict[str, object] = {
        "num_bits": fmt.element.bits,
        "type": fmt.element.kind,
        "symmetric": fmt.symmetric,
        "strategy": strategy,
        "group_size": columns if strategy in ("group", "tensor_group") else None,
        "dynamic": dynamic,
    }
    if strategy == "block":
        arguments["block_structure"] = [rows, columns]
    if fmt.scale is E8M0 or fmt.tensor_scale:
        arguments["scale_dtype"] = "torch.uint8" if fmt.scale is E8M0 else "torch.float8_e4m3fn"
    return arguments


def _regroup(key: str) -> Scheme | None:
    """The scheme of integers that `NAME_G64` stands for; None where the name is not of that form."""
    match = re.fullmatch(r"(\w+)_G([1-9]\d{0,5})", key)
    base = SCHEMES.get(match[1]) if match else None
    if match is None or base is None:
        return None
    group = int(match[2])
    if base.weight.element.kind == "float" or base.weight.block[-1] == WHOLE:
        msg = f"scheme {base.name} has no group size to replace; those of integers in groups do, as W4A16_G{group}"
        raise RecipeError(msg)
    if group == base.weight.block[-1]:
        return base
    refusal = "vLLM's kernel for fp8 inputs takes groups of 128 only; use W4AFP8" if base.name == "W4AFP8" else None
    return replace(base, name=key, weight=base.weight.with_block(1, group), refusal=refusal)


def _wide(name: str, weight: Format, activation: Activation) -> Scheme:
    """A scheme of 8-bit codes under scales in the weight's dtype."""
    weight = replace(weight, scale=BFLOAT16)
    file_format = f"{weight.element.kind}-quantized"
    return Scheme(name=name, weight=weight, activation=activation, file_format=file_format)


def _grouped(bits: Iterable[int], suffix: str, activation: Activation | None = None) -> list[Scheme]:
    """Schemes `W{bits}{suffix}` of integers in groups.

    Left to infer it, compressed-tensors takes `int-quantized` (a byte a code) where inputs are quantized. Packed words
    hold the same codes in fewer bits, and vLLM's W4AFP8 kernel reads nothing else.
    """
    return [
        Scheme(
            name=f"W{b}{suffix}",
            weight=replace(INT4_G128, element=element(f"int{b}")),
            activation=activation,
            file_format="pack-quantized",
        )
        for b in bits
    ]


def _mx(name: str, weight: Format, inputs: Format | None = None) -> Scheme:
    bits = weight.element.bits
    file_format = "mxfp8-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"
    return Scheme(name=name, weight=weight, activation=inputs and Activation(inputs), file_format=file_format)


def _nvfp4(name: str, activation: Activation | None = None) -> Scheme:
    return Scheme(name=name, weight=NVFP4, activation=activation, file_format="nvfp4-pack-quantized")


_INT8_TOKEN = Activation(INT8_ROW)
_INT4_TOKEN = Activation(replace(INT8_ROW, element=INT4))
_FP8_TOKEN = Activation(FP8_ROW)
_INT8_STATIC = Activation(INT8_TENSOR, "static")
_INT8_STATIC_ASYM = Activation(INT8_TENSOR_ASYM, "static")

_TABLE = (
    _wide("W8A8", INT8_ROW, _INT8_TOKEN),
    _wide("W8A8_ASYM", INT8_ROW, Activation(INT8_ROW_ASYM)),
    _wide("W8A8_STATIC", INT8_ROW, _INT8_STATIC),
    _wide("W8A8_STATIC_ASYM", INT8_ROW, _INT8_STATIC_ASYM),
    *_grouped(range(8, 1, -1), "A16"),
    Scheme(name="W4A16_ASYM", weight=UINT4_G128, file_format="pack-quantized"),
    *_grouped(range(7, 1, -1), "A8", _INT8_TOKEN),
    *_grouped(range(4, 1, -1), "A4", _INT4_TOKEN),
    *_grouped([4], "AFP8", _FP8_TOKEN),
    _wide("FP8", FP8_TENSOR, Activation(FP8_TENSOR, "static")),
    _wide("FP8_DYNAMIC", FP8_ROW, _FP8_TOKEN),
    _wide("FP8_BLOCK", FP8_128x128, Activation(FP8_1x128)),
    _mx("MXFP8", MXFP8, MXFP8),
    _mx("MXFP8A16", MXFP8),
    _mx("MXFP6A8", MXFP6_E2M3, MXFP8),
    _mx("MXFP6A16", MXFP6_E2M3),
    _mx("MXFP4", MXFP4, MXFP4),
    _mx("MXFP4XFP8", MXFP4, FP8_1x128),
    _mx("MXFP4A16", MXFP4),
    _nvfp4("NVFP4", Activation(NVFP4, "local")),
    _nvfp4("NVFP4A16"),
)

SCHEMES: dict[str, Scheme] = {entry.name: entry for entry in _TABLE}
"""Every preset of compressed-tensors by name, but UNQUANTIZED, which stores nothing low-bit; and W8A8 in more ways."""

ALIASES: dict[str, str] = {"INT8": "W8A8"}
"""Second names that compressed-tensors has for its presets."""
