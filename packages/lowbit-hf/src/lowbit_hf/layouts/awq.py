"""AWQ's layout (version `gemm`): four-bit integers in groups along K, packed along N in an order of its own.

    qweight  int32 (k, n/8), qzeros int32 (groups, n/8): nibble i of a word is column 8 j + [0, 2, 4, 6, 1, 3, 5, 7][i]
    scales   float16 (groups, n)

Source: AutoAWQ's `WQLinear_GEMM`; vLLM's `auto_awq`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.element import UINT4
from lowbit.errors import CheckpointError
from lowbit.numerics import Scales
from lowbit.packing import pack, unpack
from lowbit.tensor import QuantizedTensor
from lowbit_hf.layouts.gptq import columns_of, integers, integers_refusal, zeros_of
from lowbit_hf.layouts.layout import Entry, Layout, Outline, Writer, fits, scale_element, take
from lowbit_hf.words import flip_signs, transposed

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_BACK = [_ORDER.index(i) for i in range(8)]
_WORD = 8


class Awq(Layout):
    """Reads AWQ."""

    method = "awq"
    marks = frozenset({"qweight"})
    parts = frozenset({"qweight", "qzeros", "scales"})
    told = frozenset({"qzeros", "scales"})

    def __init__(self, quantization: Mapping[str, Any], skeleton: Any) -> None:
        """Read a config."""
        super().__init__(quantization, skeleton)
        bits, self._group = quantization.get("bits", quantization.get("w_bit")), quantization.get("group_size", 128)
        version = str(quantization.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm" or not isinstance(self._group, int):
            msg = (
                f"the config has {bits} bits, version {version!r} and group_size {self._group!r}; lowbit reads AWQ of "
                "4 bits, version 'gemm', in groups"
            )
            raise CheckpointError(msg)

    def outline(self, module: str, parts: Mapping[str, Tensor]) -> Outline:
        """See `Layout`."""
        del module
        k, count = take(parts, "qweight", torch.int32, 2).shape
        n, group = count * _WORD, k if self._group == -1 else self._group
        if group < 1 or k % group:
            msg = f"it has {k} columns in groups of {group}, which do not divide them"
            raise CheckpointError(msg)
        scale = scale_element(parts, ("scales",), self.dtype)
        fits(parts, [("qzeros", torch.int32, (k // group, count)), ("scales", parts["scales"].dtype, (k // group, n))])
        symmetric = bool((_columns(parts["qzeros"]) == 8).all())
        return Outline((n, k), integers(4, self._group, scale, symmetric=symmetric), None, self.dtype)

    def read(self, module: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """See `Layout`."""
        found = self.outline(module, parts)
        (_, k), fmt = found.shape, found.format
        raw = pack(transposed(_columns(parts["qweight"])), UINT4)
        data = flip_signs(raw, fmt.element, k).view(fmt.element.storage)
        zero = None if fmt.symmetric else transposed(_columns(parts["qzeros"]))
        scale = transposed(parts["scales"]).to(fmt.scale.storage)
        return QuantizedTensor.from_parts(data, Scales(scale, zero, None), fmt, k=k, dtype=found.dtype)


class AwqWriter(Writer):
    """Writes AWQ; symmetric weights get zero points of 8, for all readers take it that there are some."""

    name = "awq"

    def refusal(self, outline: Outline) -> str | None:
        """See `Writer`."""
        if outline.activation is not None:
            return f"AWQ's layout leaves inputs as they are, and these are rounded ({outline.activation})"
        return integers_refusal(outline, "AWQ", (4,)) or (
            None
            if outline.shape[0] % _WORD == 0
            else f"AWQ packs {_WORD} rows in a word, and this has {outline.shape[0]}"
        )

    def entries(self, outline: Outline) -> list[Entry]:
        """See `Writer`."""
        n, k = outline.shape
        groups = k // columns_of(outline.format, k)
        return [
            ("qweight", torch.int32, (k, n // _WORD)),
            ("qzeros", torch.int32, (groups, n // _WORD)),
            ("scales", torch.float16, (groups, n)),
        ]

    def tensors(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Writer`."""
        k = weight.shape[1]
        codes = unpack(flip_signs(weight.qdata, weight.format.element, k), UINT4, k)
        return {
            "qweight": _words(transposed(codes)),
            "qzeros": _words(transposed(zeros_of(weight))),
            "scales": transposed(weight.scale).to(torch.float16),
        }

    def config(
        self, outlines: Mapping[str, Outline], ignored: Sequence[str], named: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `Writer`."""
        del named
        groups = {columns: module for module, outline in outlines.items() for columns in [outline.format.block[1]]}
        if len(groups) > 1:
            msg = f"AWQ has one group size for all weights; {', '.join(groups.values())} have several"
            raise CheckpointError(msg)
        (group,) = groups
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored) or None,
        }


def _columns(packed: Tensor) -> Tensor:
    """Codes (rows, n) of words (rows, n/8), uint8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    return nibbles[..., _BACK].to(torch.uint8).flatten(1)


def _words(codes: Tensor) -> Tensor:
    """Undo `_columns`."""
    nibbles = codes.view(codes.shape[0], -1, _WORD)[..., _ORDER]
    return pack(nibbles.flatten(1), UINT4).view(torch.int32)
