"""The canonical bit order of sub-byte codes; the only place that shifts bits across codes.

Along the last dimension, code `k` of `b` bits stands in bits `[k*b, k*b + b)` of one little-endian bit stream, bit 0
the lowest of byte 0. So 4-bit codes put the even index in the low nibble, four 6-bit codes fill three bytes, and a row
viewed as little-endian int32 words is compressed-tensors' dense `weight_packed` order. Integers are two's complement.

Source: OCP MX v1.0 leaves the order open; this one is compressed-tensors' for fp4, fp6 and int1..7.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from lowbit.element import Element

__all__ = ["pack", "unpack"]

# Merging pairs of lanes doubles the lane each time: bytes, then these.
_LANES = (torch.int16, torch.int32, torch.int64)
_UNSIGNED = (torch.uint8, torch.int16, torch.int32, torch.int64)


def unit(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest run of codes that ends on a byte boundary: 2 codes in 1 byte for 4 bits."""
    shared = gcd(bits, 8)
    return 8 // shared, bits // shared


def packed_bytes(k: int, bits: int) -> int:
    """Bytes that hold `k` codes, padded with zero codes to whole units."""
    codes, size = unit(bits)
    return -(-k // codes) * size


def pack(codes: Tensor, element: Element) -> Tensor:
    """Pack unpacked `codes` (..., K) of `element` into uint8 (..., packed_bytes(K)); whole-byte codes pass through."""
    if not element.packed:
        return codes
    if codes.shape[-1] == 0:
        return codes.view(torch.uint8)
    bits, (run, size) = element.bits, unit(element.bits)
    lanes = codes.view(torch.uint8) & ((1 << bits) - 1)
    if tail := -codes.shape[-1] % run:
        lanes = torch.nn.functional.pad(lanes, (0, tail))
    lanes = lanes.contiguous()
    width = bits
    for lane in _LANES[: run.bit_length() - 1]:
        lanes = lanes.view(lane)
        half = lane.itemsize * 4
        # The upper half's codes slide down next to the lower half's.
        low = (1 << width) - 1
        lanes = (lanes & low) | ((lanes >> (half - width)) & (low << width))
        width *= 2
    if size == 1:
        return lanes.to(torch.uint8)
    raw = lanes.view(torch.uint8).unflatten(-1, (-1, lanes.itemsize))
    return raw[..., :size].flatten(-2)


def unpack(data: Tensor, element: Element, k: int) -> Tensor:
    """Unpack uint8 `data` (..., packed_bytes(k)) into codes (..., k) of `element.code_dtype`."""
    if not element.packed:
        return data
    if data.shape[-1] == 0:
        return data.view(element.code_dtype)
    bits, (run, size) = element.bits, unit(element.bits)
    steps = run.bit_length() - 1
    lane = _UNSIGNED[steps]
    if size == 1:
        lanes = data.to(lane)
    else:
        raw = torch.nn.functional.pad(data.unflatten(-1, (-1, size)), (0, lane.itemsize - size))
        lanes = raw.flatten(-2).view(lane)
    width = bits * run
    for step in reversed(range(steps)):
        half = _LANES[step].itemsize * 4
        width //= 2
        low = (1 << width) - 1
        lanes = ((lanes & low) | ((lanes & (low << width)) << (half - width))).view(_UNSIGNED[step])
    codes = lanes[..., :k]
    if element.kind == "int" and element.signed:
        # Sign-extend two's complement: push the sign bit to the top, then shift back arithmetically.
        return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)
    return codes
