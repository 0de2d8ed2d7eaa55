"""What the bytes of a file stand for, in NumPy, from the pages on formats and layouts alone; it imports nothing of lowbit.

A weight's values are `(code - zero) * scale`, as float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray]
FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
}
# numpy's views of torch's dtypes, by their bytes.
WIDE = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e8m0fnu: (torch.uint8, ml_dtypes.float8_e8m0fnu),
}
# Which of eight codes of a word each of AWQ's is.
AWQ = [0, 4, 1, 5, 2, 6, 3, 7]


def array(tensor: torch.Tensor) -> NDArray:
    """The same numbers in NumPy."""
    raw, dtype = WIDE.get(tensor.dtype, (tensor.dtype, None))
    found = tensor.contiguous().view(raw).numpy()
    return found if dtype is None else found.view(dtype)


def unsigned(data: NDArray, bits: int, k: int) -> NDArray:
    """Codes (..., k) of a little-endian stream of bits."""
    stream = np.unpackbits(np.ascontiguousarray(data).view(np.uint8), axis=-1, bitorder="little")
    return stream[..., : k * bits].reshape(*data.shape[:-1], k, bits) @ (1 << np.arange(bits))


def numbers(data: NDArray, element: str, k: int) -> NDArray:
    """Numbers (..., k) that packed codes stand for: floats, or integers in two's complement."""
    if element in FLOATS:
        bits = int(element[1]) + int(element[3]) + 1
        return unsigned(data, bits, k).astype(np.uint8).view(FLOATS[element]).astype(np.float64)
    bits = int(element[-1])
    codes = unsigned(data, bits, k)
    return codes if element.startswith("u") else (codes + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def times(codes: NDArray, scale: NDArray) -> NDArray:
    """Codes times scales of blocks (N, K)."""
    blocks = [-(-n // m) for n, m in zip(codes.shape, scale.shape, strict=True)]
    spread = scale.astype(np.float64).repeat(blocks[0], 0)[: codes.shape[0]].repeat(blocks[1], 1)[:, : codes.shape[1]]
    return codes * spread


def exponents(raw: NDArray) -> NDArray:
    """Powers of two that e8m0's bytes stand for."""
    return raw.view(ml_dtypes.float8_e8m0fnu)


def plain(parts: Arrays, element: str, k: int) -> NDArray:
    """A quantized tensor of lowbit, from the tensors inside it."""
    codes = numbers(parts["qdata"].view(np.uint8), element, k).astype(np.float64)
    if "zero" in parts:
        codes -= times(np.ones_like(codes), parts["zero"])
    return times(codes, parts["scale"]) * float(parts.get("tensor_scale", np.ones(1)).item())


def compressed(parts: Arrays) -> NDArray:
    """A weight of compressed-tensors' layouts, and of DeepSeek's and ModelOpt's."""
    scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
    scale = exponents(scale) if scale.dtype == np.uint8 else scale
    divisor, factor = (parts.get(f"weight_{name}", np.ones(1)).item() for name in ("global_scale", "scale_2"))
    data = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    if data.dtype == np.int32:
        n, k = parts["weight_shape"]
        bits = 32 * data.shape[1] // int(k)
        codes = unsigned(data, bits, k) - (1 << bits - 1)
        if "weight_zero_point" in parts:
            zeros = unsigned(np.ascontiguousarray(parts["weight_zero_point"].T), bits, n).T - (1 << bits - 1)
            codes = codes - times(np.ones(codes.shape), zeros)
    elif data.dtype == np.uint8:
        k = scale.shape[1] * (16 if scale.dtype == ml_dtypes.float8_e4m3fn else 32)
        codes = numbers(data, {4: "e2m1", 6: "e2m3"}[8 * data.shape[1] // k], k)
    else:
        codes = data.astype(np.float64)
    return times(codes, scale.reshape(len(scale), -1)) / divisor * factor


def gptq(parts: Arrays) -> NDArray:
    """A weight of 4 bits of GPTQ's first version, whose zero points are stored less 1."""
    codes = unsigned(np.ascontiguousarray(parts["qweight"].T), 4, len(parts["g_idx"]))
    zeros = unsigned(parts["qzeros"], 4, codes.shape[0]).T + 1
    return times(codes - times(np.ones(codes.shape), zeros), parts["scales"].T)


def awq(parts: Arrays) -> NDArray:
    """A weight of AWQ."""
    rows, n = len(parts["qweight"]), parts["scales"].shape[1]
    codes, zeros = (
        unsigned(parts[name], 4, n).reshape(count, -1, 8)[:, :, AWQ].reshape(count, n).T
        for name, count in (("qweight", rows), ("qzeros", len(parts["qzeros"])))
    )
    return times(codes - times(np.ones(codes.shape), zeros), parts["scales"].T)


def moment(codes: NDArray, scale: NDArray, *, signed: bool) -> NDArray:
    """A mean of gradients, or of their squares, in 8 bits: levels of a dynamic tree whose octaves are powers of 8."""
    bits = 8 - signed
    w = 2.0 * np.arange(1 << bits) + 1
    octave = np.floor(np.log2(w))
    levels = 8 ** (octave - 1 - bits) * (7 * w / 2**octave - 6)
    if signed:
        levels[0] = 0
        levels = np.concatenate((levels, [-1.0], -levels[:0:-1]))
    return times(levels[codes], scale)
