"""GPTQ's layout: integers in groups along K, packed along K, everything transposed.

    qweight  int32 (k*bits/32, n): the words of each column's codes, unsigned
    qzeros   int32 (groups, n*bits/32): the zero points' words along n; version 1 stores them less 1
    scales   float16 (groups, n)
    g_idx    int32 (k,): the group of each row

That is compressed-tensors' `pack-quantized`, transposed. Symmetric weights have the zero point 2^(bits-1).

Source: AutoGPTQ's and GPTQModel's `qlinear` modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.element import BFLOAT16, ELEMENTS, FLOAT16, FLOAT32, Element
from lowbit.errors import CheckpointError
from lowbit.format import WHOLE, Format
from lowbit.header import as_object, quote
from lowbit.numerics import Scales
from lowbit.tensor import QuantizedTensor
from lowbit_hf.layouts.layout import Entry, Layout, Outline, Writer, fits, scale_element, take
from lowbit_hf.patterns import Pattern
from lowbit_hf.skeleton import Skeleton
from lowbit_hf.words import flip_signs, pack_zeros, to_bytes, to_words, transposed, unpack_zeros, words

_BITS = (2, 3, 4, 8)
_SCALES = (FLOAT16, BFLOAT16, FLOAT32)


def integers(bits: int, group: int, scale: Element, *, symmetric: bool) -> Format:
    """Integers in groups of `group` columns (-1: a row); those with zeros are unsigned."""
    codes = ELEMENTS[f"int{bits}" if symmetric else f"uint{bits}"]
    block = (1, WHOLE if group == -1 else group)
    return Format(element=codes, block=block, scale=scale, zero=None if symmetric else codes)


class Gptq(Layout):
    """Reads GPTQ, versions 1 and 2."""

    method = "gptq"
    marks = frozenset({"qweight"})
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    told = frozenset({"qzeros", "g_idx", "scales"})

    def __init__(self, quantization: Mapping[str, Any], skeleton: Skeleton | None) -> None:
        """Read a config."""
        super().__init__(quantization, skeleton)
        said = quantization.get("dynamic") or {}
        given = as_object(said)
        if given is None or not all(isinstance(other, dict) for other in given.values()):
            msg = f"the config has dynamic {quote(said)}; needed is an object of patterns and what is other for each"
            raise CheckpointError(msg)
        # Those that start with a minus stand for modules that are not quantized.
        own = {pattern: as_object(other) or {} for pattern, other in given.items() if not pattern.startswith("-:")}
        self._dynamic = [(Pattern(pattern.removeprefix("+:")), other) for pattern, other in own.items()]

    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """See `Layout`."""
        bits, group = self._sizes(module)
        rows, n = take(parts, "qweight", torch.int32, 2).shape
        k = rows * 32 // bits
        scale, size = scale_element(parts, ("scales",), self.dtype), k if group == -1 else group
        if size < 1 or k % size:
            msg = f"it has {k} columns in groups of {size}, which do not divide them"
            raise CheckpointError(msg)
        groups = k // size
        fits(parts, [("qzeros", torch.int32, (groups, words(n, bits))), ("scales", parts["scales"].dtype, (groups, n))])
        if "g_idx" in parts:
            order = take(parts, "g_idx", torch.int32, 1)
            if not torch.equal(order, torch.arange(k, dtype=torch.int32) // size):
                msg = (
                    "its groups are scattered over the columns by g_idx (desc_act), which no format of lowbit and no "
                    "serving engine's fast kernel holds; quantize with static groups"
                )
                raise CheckpointError(msg)
        symmetric = bool((self._zeros(parts, bits, n) == 1 << (bits - 1)).all())
        return Outline((n, k), integers(bits, group, scale, symmetric=symmetric), None, self.dtype)

    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """See `Layout`."""
        found = self.outline(module, parts)
        (n, k), fmt = found.shape, found.format
        bits = fmt.element.bits
        raw = to_bytes(transposed(take(parts, "qweight", torch.int32, 2)), bits, k)
        data = flip_signs(raw, fmt.element, k).view(fmt.element.storage)
        zero = None if fmt.symmetric else self._zeros(parts, bits, n)
        scale = transposed(parts["scales"]).to(fmt.scale.storage)
        return QuantizedTensor.from_parts(data, Scales(scale, zero, None), fmt, k=k, dtype=found.dtype)

    def _zeros(self, parts: Mapping[str, Tensor], bits: int, n: int) -> Tensor:
        """Zero points (n, groups), uint8."""
        codes = ELEMENTS[f"uint{bits}"]
        zero = unpack_zeros(transposed(parts["qzeros"]), codes, n)
        return zero if self._version == 2 else (zero + 1) & int(codes.max)

    @property
    def _version(self) -> int:
        said = str(self.quantization.get("checkpoint_format") or self.quantization.get("format") or "gptq")
        return 2 if said == "gptq_v2" else 1

    def _sizes(self, module: str) -> tuple[int, int]:
        """Bits and group size of a module; a `dynamic` of GPTQModel may say otherwise than the whole."""
        said = dict(self.quantization)
        said |= next((other for pattern, other in self._dynamic if pattern.starts(module)), {})
        bits, group = said.get("bits"), said.get("group_size", -1)
        if bits not in _BITS or type(group) is not int:
            msg = f"the config has bits {bits!r} and group_size {group!r}; lowbit reads bits {_BITS}, and an integer"
            raise CheckpointError(msg)
        return int(bits), group


class GptqWriter(Writer):
    """Writes GPTQ."""

    def __init__(self, version: int) -> None:
        """Version 1 stores zero points less 1, and so none that are 0."""
        self.version = version
        self.name = "gptq" if version == 1 else "gptq_v2"  # pyright: ignore[reportAttributeAccessIssue] - one class, two names

    def refusal(self, outline: Outline) -> str | None:
        """See `Writer`."""
        fmt = outline.format
        if outline.activation is not None:
            return f"GPTQ's layout leaves inputs as they are, and these are rounded ({outline.activation})"
        return integers_refusal(outline, "GPTQ", _BITS) or (
            None if outline.shape[0] * fmt.element.bits % 32 == 0 else "GPTQ packs rows in whole words of 32 bits"
        )

    def entries(self, outline: Outline) -> list[Entry]:
        """See `Writer`."""
        (n, k), fmt = outline.shape, outline.format
        groups, bits = k // columns_of(fmt, k), fmt.element.bits
        return [
            ("qweight", torch.int32, (words(k, bits), n)),
            ("qzeros", torch.int32, (groups, words(n, bits))),
            ("scales", torch.float16, (groups, n)),
            ("g_idx", torch.int32, (k,)),
        ]

    def tensors(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Writer`."""
        k, fmt = weight.shape[1], weight.format
        bits, codes = fmt.element.bits, ELEMENTS[f"uint{fmt.element.bits}"]
        zero = zeros_of(weight)
        if self.version == 1:
            if bool((zero == 0).any()):
                msg = "it has zero points of 0, which version 1 of GPTQ's layout cannot store; write gptq_v2"
                raise CheckpointError(msg)
            zero = zero - 1
        return {
            "qweight": transposed(to_words(flip_signs(weight.qdata, fmt.element, k), bits, k)),
            "qzeros": transposed(pack_zeros(zero, codes)),
            "scales": transposed(weight.scale).to(torch.float16),
            "g_idx": torch.arange(k, dtype=torch.int32) // columns_of(fmt, k),
        }

    def config(
        self, outlines: Mapping[str, Outline], ignored: Sequence[str], named: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `Writer`."""
        del named
        settings = {module: _settings(outline) for module, outline in outlines.items()}
        kinds = sorted(settings.values(), key=lambda each: list(settings.values()).count(each))
        main = kinds[-1]
        dynamic: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in ignored}
        dynamic |= {f"+:^{re.escape(module)}$": own for module, own in settings.items() if own != main}
        return {
            "quant_method": "gptq",
            **main,
            "desc_act": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "lm_head": False,
            "true_sequential": True,
            "dynamic": dynamic,
            "meta": {"quantizer": ["lowbit"]},
        }

    def files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """See `Writer`."""
        return {"quantize_config.json": {key: value for key, value in config.items() if key != "quant_method"}}


def _settings(outline: Outline) -> dict[str, Any]:
    fmt = outline.format
    group = -1 if fmt.block[1] == WHOLE else fmt.block[1]
    return {"bits": fmt.element.bits, "group_size": group, "sym": fmt.symmetric}


def integers_refusal(outline: Outline, layout: str, bits: Sequence[int]) -> str | None:
    """Why a layout of integers in groups cannot hold a weight."""
    fmt = outline.format
    if len(outline.shape) != 2:
        return f"{layout}'s layout holds matrices, and this is a stack of experts"
    integer = fmt.element.kind == "int" and fmt.block[0] == 1 and not fmt.tensor_scale
    if not integer or fmt.element.bits not in bits or fmt.scale not in _SCALES:
        return f"{layout}'s layout holds integers of {', '.join(map(str, bits))} bits in groups of columns, not {fmt}"
    return None


def columns_of(fmt: Format, k: int) -> int:
    """Columns of a group."""
    return k if fmt.block[1] == WHOLE else fmt.block[1]


def zeros_of(weight: QuantizedTensor) -> Tensor:
    """Zero points (n, groups) of unsigned codes, uint8; for symmetric ones the middle."""
    if weight.zero is not None:
        return weight.zero
    return torch.full(weight.scale.shape, 1 << (weight.format.element.bits - 1), dtype=torch.uint8)
