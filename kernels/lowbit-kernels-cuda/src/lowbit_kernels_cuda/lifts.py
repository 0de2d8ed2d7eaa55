"""8-bit scales packed so that codes of floats are bfloat16s by their bits alone.

The bits of a small float among those of a bfloat16 are its value times 2^(bias - 127), subnormals included. Scales make
up for that: powers of two are packed as much larger. e4m3 scales, of which that would be too much, are packed with five
bits of exponent, so that none is subnormal, and their bits among a bfloat16's are 2^107 times the scale; products are
then 2^(bias - 20) times what they stand for, and sums are multiplied by the rest in the end.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit.format import Format
from lowbit_kernels_cuda.scaling import raw
from lowbit_kernels_cuda.weights import repeated

# The exponent of a bfloat16 that is neither infinite nor no number.
_LARGEST = 254
_LARGEST_E4M3 = 126


def lift(fmt: Format) -> int:
    """The power of two by which scales are packed larger, or sums are larger in the end; 0: scales stay as they are."""
    element, scale = fmt.element, fmt.scale
    if element.kind != "float" or not fmt.block_for(2)[-1]:
        return 0
    if scale.powers_of_two:
        return 127 - element.bias
    # A scale times a code is a bfloat16.
    return 20 - element.bias if scale.name == "e4m3fn" and element.mantissa + scale.mantissa < 8 else 0


def lifted(scale: Tensor, codes: Tensor, fmt: Format) -> Tensor:
    """Bytes of scales to be packed; the scales themselves where their format is not lifted, or cannot be here."""
    by = lift(fmt)
    if by and fmt.scale.powers_of_two:
        return raw(scale) + by if int(raw(scale).max()) + by <= _LARGEST else scale
    if by and _none_is_lost(scale, codes, fmt):
        return _five_bits(scale.device)[raw(scale).long()]
    return scale


def is_lifted(scale: Tensor, fmt: Format) -> bool:
    """Whether packed scales are lifted: they are bytes then."""
    return scale.dtype != fmt.scale.storage


def lowered(scale: Tensor, fmt: Format) -> Tensor:
    """Undo `lifted`, where it made bytes."""
    if fmt.scale.powers_of_two:
        return scale - lift(fmt)
    five = _five_bits(scale.device)
    back = torch.zeros(256, dtype=torch.uint8, device=scale.device)
    back[five.long()] = torch.arange(len(five), dtype=torch.uint8, device=scale.device)
    return back[scale.long()]


def _none_is_lost(scale: Tensor, codes: Tensor, fmt: Format) -> bool:
    """Whether codes under scales of 0, which five bits of exponent do not have, are 0, and no such scale has a sign."""
    zero = scale.float() == 0
    if not bool(zero.any()):
        return True
    each = repeated(zero, fmt.block_for(codes.dim()), codes.shape)
    return int(raw(scale).max()) <= _LARGEST_E4M3 and not bool(
        (each & (codes.view(torch.uint8) << (9 - fmt.element.bits) != 0)).any()
    )


@cache
def _five_bits(device: torch.device) -> Tensor:
    """For each e4m3 from 0 to the largest, the byte of 5 bits of exponent, with a bias of 10, and 3 of mantissa."""
    bits = torch.arange(_LARGEST_E4M3 + 1, dtype=torch.uint8).view(torch.float8_e4m3fn).float().view(torch.int32)
    return ((bits >> 20) - ((127 - 10) << 3)).clamp_min(0).to(torch.uint8).to(device)
