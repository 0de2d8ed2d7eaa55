"""Codes as int32 words, the way checkpoints of integers keep them: a little-endian stream of bits, row by row.

Code j of a row lies in bits [j*bits, (j+1)*bits) of the row's stream, unsigned, with zeros after the last. Canonical
codes follow the same stream, in two's complement and padded to whole bytes, so words differ from them in sign bits and
padding only.

Source: compressed-tensors 0.20.0, `compressors/pack_quantized`; GPTQ's `qweight` is the same, transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.element import Element
from lowbit.packing import pack, packed_bytes, unpack


def words(k: int, bits: int) -> int:
    """How many words hold k codes."""
    return -(-k * bits // 32)


def flip_signs(data: Tensor, codes: Element, k: int) -> Tensor:
    """New uint8 bytes of packed `data` between two's complement and offset binary; unsigned codes and padding stay."""
    # The least code has nothing but the sign bit, and is 0 for unsigned codes.
    signs = pack(torch.full((k,), int(codes.min), dtype=codes.code_dtype, device=data.device), codes)
    return data.view(torch.uint8) ^ signs.view(torch.uint8)


def to_words(raw: Tensor, bits: int, k: int) -> Tensor:
    """Packed bytes of `k` codes a row as int32 words."""
    count = words(k, bits)
    # By way of one dimension: a row that stands alone may have a stride that no wider view accepts.
    return _resize(raw, count * 4).reshape(-1).view(torch.int32).view(raw.shape[0], count)


def to_bytes(packed: Tensor, bits: int, k: int) -> Tensor:
    """Undo `to_words`."""
    raw = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], packed.shape[1] * 4)
    return _resize(raw, packed_bytes(k, bits))


def _resize(raw: Tensor, size: int) -> Tensor:
    """Bytes (n, size): only padding is cut off or added."""
    return raw if raw.shape[1] == size else torch.nn.functional.pad(raw, (0, size - raw.shape[1]))


def pack_zeros(zero: Tensor, codes: Element) -> Tensor:
    """Zero points (n, groups) as words along n: (words, groups)."""
    return transposed(to_words(pack(transposed(zero), codes), codes.bits, zero.shape[0]))


def unpack_zeros(packed: Tensor, codes: Element, n: int) -> Tensor:
    """Undo `pack_zeros`."""
    return transposed(unpack(to_bytes(transposed(packed), codes.bits, n), codes, n))


def transposed(x: Tensor) -> Tensor:
    """The transpose of a matrix, contiguous."""
    return x.T.clone(memory_format=torch.contiguous_format)
