"""The reference arithmetic: choosing scales, rounding to codes, and back, in float32 and plain PyTorch.

All tensors here are canonical: the contraction axis is last and codes lie packed along it. The order of operations is
part of the specification, so every backend gives the same bits:

    s = float32(scale) [* tensor_scale]      one multiplication, a scale per block
    code = element.encode(x / s [, + zero after rounding])      IEEE division
    value = (code - zero) * s                one multiplication, then one rounding to the wanted dtype

A block that holds a NaN or an infinity gets a NaN scale, so the whole block decodes to NaN: a bad value is neither
clipped nor hidden. A block of zeros gets scale 1 (2^-127 for e8m0, whose rules leave no choice).

Source: OCP MX v1.0, section 6.3 (floor scales); NVIDIA's cuDNN and Transformer Engine documentation (round-up scales
and the two-level NVFP4 scheme).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lowbit.element import Element, exponent_and_mantissa, power_of_two
from lowbit.errors import FormatError
from lowbit.format import Format
from lowbit.packing import pack, packed_bytes, unpack
from lowbit.philox import uniform

ScaleMode = Literal["floor", "ceil", "even", "rceil"]
"""How a block's amax becomes a power of two `2^e`; `max` is the element's largest value, of exponent `p`.

`floor`: e = floor(log2 amax) - p, OCP's rule, saturates amax > max * 2^e. `ceil`: e = ceil(log2 amax) - p.
`even`: floor, after rounding amax to the element's mantissa. `rceil`: the least e with amax <= max * 2^e, unsaturated.
"""

Rounding = Literal["nearest", "stochastic"]

DEFAULT_MODE: ScaleMode = "even"


@dataclass(frozen=True, slots=True)
class Scales:
    """What turns codes into values, in natural shape: `scale` and `zero` of `fmt.scale_shape(x.shape)`.

    `tensor_scale` has x's rank, 1 in the last two dims (one a matrix) or 1 in the last (one a row).
    """

    scale: Tensor
    zero: Tensor | None = None
    tensor_scale: Tensor | None = None

    def cpu(self) -> Scales:
        """The same scales on the CPU."""
        zero, tensor_scale = self.zero, self.tensor_scale
        return Scales(
            self.scale.cpu(),
            zero if zero is None else zero.cpu(),
            tensor_scale if tensor_scale is None else tensor_scale.cpu(),
        )


def choose_scale(
    x: Tensor, fmt: Format, *, mode: ScaleMode = DEFAULT_MODE, tensor_scale: Tensor | None = None
) -> Scales:
    """Scales (and zero points) that fit canonical `x` to `fmt`, rounded to the dtypes they are stored in.

    Symmetric integers take `amax / ((2^bits - 1) / 2)`, floats and unsigned integers `amax / max`, asymmetric ones the
    range `[min(x, 0), max(x, 0)]`; e8m0 scales follow `mode`. A tensor scale that is not given is the least power of
    two that brings every block scale into e4m3fn's range.

    Raises:
        FormatError: x is not floating point, does not fit the format's block, the mode is unknown, or a tensor scale is
            given to a format without one.
    """
    return _fit(_extent(x, fmt, mode, tensor_scale), fmt, mode, tensor_scale)


def choose_scales(
    x: Tensor, fmt: Format, shares: Tensor, *, mode: ScaleMode = DEFAULT_MODE, tensor_scale: Tensor | None = None
) -> Scales:
    """What `choose_scale` makes of `share * x` for each of the float32 `shares` (C,), in a first dim of C.

    Raises:
        FormatError: as `choose_scale`.
    """
    extent = _extent(x, fmt, mode, tensor_scale)
    # Rounding keeps an order, so the largest of products is the product of the largest.
    several = tuple(part * shares.view(-1, *(1,) * part.dim()) for part in extent)
    return _fit(several, fmt, mode, tensor_scale)


def scale_for_amax(
    amax: Tensor, fmt: Format, *, mode: ScaleMode = DEFAULT_MODE, tensor_scale: Tensor | None = None
) -> Scales:
    """Symmetric scales from the float32 largest magnitudes of each block (natural scale shape); see `choose_scale`.

    Raises:
        FormatError: the mode is unknown.
    """
    check_choice("scale mode", mode, ScaleMode)
    if fmt.scale.powers_of_two:
        return Scales(_power_of_two_scale(amax, fmt, mode))
    scale = _divide(amax, amax_divisor(fmt.element))
    if fmt.tensor_scale:
        if tensor_scale is None:
            tensor_scale = tensor_scale_for_amax(_largest_finite(amax), fmt)
        scale = scale / tensor_scale
    return Scales(_store_scale(scale, fmt.scale), None, tensor_scale)


def amax_divisor(element: Element) -> float:
    """What the amax of a block is divided by to give a symmetric scale that is no power of two."""
    return (2**element.bits - 1) / 2 if element.kind == "int" and element.signed else element.max


def mantissa_bound(element: Element, mode: ScaleMode) -> int:
    """The 23-bit mantissa of amax beyond which an e8m0 scale is one larger than the exponents of amax and max say."""
    full = 1 << 23
    mantissa_bits = element.mantissa if element.kind == "float" else element.bits - 1 - element.signed
    bounds: dict[ScaleMode, int] = {
        "floor": full,
        "ceil": 0,
        "even": full - (full >> (mantissa_bits + 1)) - 1,
        "rceil": exponent_and_mantissa(element.max)[1],
    }
    return bounds[mode]


def tensor_scale_for_amax(amax: Tensor, fmt: Format) -> Tensor:
    """The least power of two `t` with `amax / element.max / t <= scale.max`, from the float32 amax of each matrix.

    A power of two converts exactly between conventions that multiply and that divide by the tensor scale. It is 1 where
    amax is zero or not finite.
    """
    exponent, mantissa = _split_float(amax)
    limit, limit_mantissa = exponent_and_mantissa(fmt.element.max * fmt.scale.max)
    exponent = exponent - limit + (mantissa > limit_mantissa).to(torch.int32)
    return torch.where(torch.isfinite(amax) & (amax > 0), power_of_two(exponent.clamp(-126, 127)), 1.0)


def encode(
    x: Tensor, fmt: Format, scales: Scales, *, rounding: Rounding = "nearest", seed: int | Tensor = 0, offset: int = 0
) -> Tensor:
    """Packed codes of canonical `x` under given scales; saturating.

    Stochastic rounding draws `philox.uniform` at each element's canonical index (plus `offset`) under `seed`.

    Raises:
        FormatError: a scale's dtype or shape does not fit, x is not floating point, or the rounding is unknown.
    """
    _check_float(x)
    check_scales(scales, fmt, tuple(x.shape))
    noise = _draw(x, rounding, seed, offset)
    blocks = fmt.block_of(tuple(x.shape))
    scaled = split_blocks(x.to(torch.float32), blocks) / spread(total_scale(scales))
    if scales.zero is None:
        return pack(fmt.element.encode(join_blocks(scaled, x.shape), noise), fmt.element)
    # Rounding before the zero point is added keeps ties to even independent of it.
    codes = fmt.element.round(scaled, None if noise is None else split_blocks(noise, blocks))
    return pack(fmt.element.encode(join_blocks(codes + spread(scales.zero.to(torch.float32)), x.shape)), fmt.element)


def decode(data: Tensor, fmt: Format, scales: Scales, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values `(code - zero) * scale` (..., k) of packed `data`, rounded once to `dtype`.

    Raises:
        FormatError: `data` or a scale does not fit the format.
    """
    check_data(data, fmt, k)
    codes = unpack(data, fmt.element, k)
    check_scales(scales, fmt, tuple(codes.shape))
    values = split_blocks(fmt.element.decode(codes), fmt.block_of(tuple(codes.shape)))
    if scales.zero is not None:
        values = values - spread(scales.zero.to(torch.float32))
    return join_blocks(values * spread(total_scale(scales)), codes.shape).to(dtype)


def check_data(data: Tensor, fmt: Format, k: int) -> None:
    """Refuse packed data that are not rows of k codes.

    Raises:
        FormatError: their dtype or shape differs.
    """
    stored = data_shape((*data.shape[:-1], k), fmt)
    if data.dtype != fmt.element.storage or tuple(data.shape) != stored:
        msg = (
            f"data is {data.dtype} of shape {tuple(data.shape)}; for k={k} in {fmt} needed is {fmt.element.storage} of "
            f"shape {stored}"
        )
        raise FormatError(msg)


def total_scale(scales: Scales) -> Tensor:
    """Float32 `scale * tensor_scale`, in natural scale shape."""
    scale = scales.scale.to(torch.float32)
    return scale if scales.tensor_scale is None else scale * scales.tensor_scale


def check_scales(scales: Scales, fmt: Format, shape: tuple[int, ...]) -> None:
    """Refuse scales that do not belong to `fmt` and a canonical `shape`.

    Raises:
        FormatError: a dtype or shape differs from the natural one, or a part is missing or left over.
    """
    natural = fmt.scale_shape(shape)
    _check_part("scale", scales.scale, fmt.scale, natural, shape)
    if (scales.zero is None) != (fmt.zero is None):
        msg = f"{fmt} {'needs' if fmt.zero else 'has no'} zero points"
        raise FormatError(msg)
    if scales.zero is not None and fmt.zero is not None:
        _check_part("zero", scales.zero, fmt.zero, natural, shape)
    if (scales.tensor_scale is None) == fmt.tensor_scale:
        msg = f"{fmt} {'needs' if fmt.tensor_scale else 'has no'} tensor scale"
        raise FormatError(msg)
    if scales.tensor_scale is not None:
        check_tensor_scale(scales.tensor_scale, fmt, shape)


def check_tensor_scale(tensor_scale: Tensor, fmt: Format, shape: tuple[int, ...]) -> None:
    """Refuse a tensor scale that does not belong to a canonical `shape`.

    Raises:
        FormatError: its dtype or shape is neither of those that there are, or the format has none.
    """
    if not fmt.tensor_scale:
        raise FormatError(f"{fmt} has no tensor scale, and one was given; leave it out")
    given = tuple(tensor_scale.shape)
    # One a row of blocks: a 2-D block cannot be split between two of them.
    allowed = (*fmt.scale_shape(shape)[:-1], 1)
    fits = len(given) == len(shape) and all(g in (1, n) for g, n in zip(given, allowed, strict=True))
    if tensor_scale.dtype != torch.float32 or not fits:
        raise FormatError(
            f"tensor_scale is {tensor_scale.dtype} of shape {given}; needed is torch.float32 of shape "
            f"{(*shape[:-2], *(1,) * min(len(shape), 2))} (one a matrix) or {allowed} (one a row of blocks)"
        )


def check_use(act_scale: Tensor | None, act_zero: Tensor | None, pre_scale: Tensor | None, k: int) -> None:
    """Refuse input parameters that do not belong to a weight with `k` columns.

    Raises:
        FormatError: an activation has more than one scale or zero point, or pre_scale not one a column.
    """
    for name, part in (("act_scale", act_scale), ("act_zero", act_zero)):
        if part is not None and part.numel() != 1:
            msg = f"{name} has shape {tuple(part.shape)}; needed is one value, for all inputs"
            raise FormatError(msg)
    if pre_scale is not None and tuple(pre_scale.shape) != (k,):
        msg = f"pre_scale has shape {tuple(pre_scale.shape)}; needed is ({k},), one a column of the weight"
        raise FormatError(msg)


def check_choice(name: str, given: str, choices: object) -> None:
    """Refuse a scale mode or a rounding that is none.

    Raises:
        FormatError: it is not one of `choices`.
    """
    if given not in get_args(choices):
        msg = f"{name} {given!r} is unknown; use one of {', '.join(get_args(choices))}"
        raise FormatError(msg)


def data_shape(shape: tuple[int, ...], fmt: Format) -> tuple[int, ...]:
    """Shape of the packed data of a canonical `shape`."""
    return (*shape[:-1], packed_bytes(shape[-1], fmt.element.bits)) if fmt.element.packed else shape


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all `tensors` together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _extent(x: Tensor, fmt: Format, mode: ScaleMode, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
    """Of each block, float32: the largest magnitude; for zero points, the smallest and the largest value."""
    _check_float(x)
    check_choice("scale mode", mode, ScaleMode)
    if tensor_scale is not None and not fmt.tensor_scale:
        msg = f"{fmt} has no tensor scale, and one was given; leave it out, or use a format that ends in ':tensor'"
        raise FormatError(msg)
    blocks = split_blocks(x, fmt.block_of(tuple(x.shape)))
    within = tuple(range(1, blocks.dim(), 2))
    if fmt.zero is None:
        return (_largest_magnitude(blocks, within),)
    low, high = torch.aminmax(_merge(blocks, within), dim=-1)
    return low.to(torch.float32), high.to(torch.float32)


def _fit(extent: tuple[Tensor, ...], fmt: Format, mode: ScaleMode, tensor_scale: Tensor | None) -> Scales:
    """Scales that fit `_extent`."""
    if fmt.zero is not None:
        low, high = extent
        return _asymmetric(low, high, fmt)
    (amax,) = extent
    return scale_for_amax(amax, fmt, mode=mode, tensor_scale=tensor_scale)


def _largest_magnitude(blocks: Tensor, within: tuple[int, ...]) -> Tensor:
    """Float32 amax over the dims `within`; NaN where there is one."""
    if blocks.dtype.itemsize != 2:
        return blocks.abs().amax(within).to(torch.float32)
    # Without their sign, floats order as integers, NaN above infinity; on a CPU the maximum of those is much faster.
    return (blocks.view(torch.int16) & 0x7FFF).amax(within).view(blocks.dtype).to(torch.float32)


def _largest_finite(amax: Tensor) -> Tensor:
    """The largest finite entry of each matrix of block amaxes, dims kept as 1; 0 where there is none."""
    matrix = tuple(range(max(amax.dim() - 2, 0), amax.dim()))
    if amax.numel() == 0:
        return amax.new_zeros([1 if d in matrix else n for d, n in enumerate(amax.shape)])
    # A block that is not finite decodes to NaN by its own scale, and must not cost its neighbours their range.
    return torch.where(torch.isfinite(amax), amax, 0.0).amax(matrix, keepdim=True)


def _divide(x: Tensor, by: float) -> Tensor:
    """IEEE `x / by`; torch's CUDA kernel multiplies by the reciprocal of a plain number, which rounds differently."""
    return x / x.new_full((), by)


def _check_part(name: str, part: Tensor, stored: Element, natural: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if part.dtype != stored.code_dtype or tuple(part.shape) != natural:
        msg = (
            f"{name} is {part.dtype} of shape {tuple(part.shape)}; for values of shape {shape} needed is "
            f"{stored.code_dtype} of shape {natural}"
        )
        raise FormatError(msg)


def _check_float(x: Tensor) -> None:
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        msg = f"only float32, float16, bfloat16 and float64 tensors are quantized, not {x.dtype}"
        raise FormatError(msg)


def _draw(x: Tensor, rounding: Rounding, seed: int | Tensor, offset: int) -> Tensor | None:
    check_choice("rounding", rounding, Rounding)
    if rounding == "nearest":
        return None
    return uniform(x.numel(), seed, offset=offset, device=x.device).view(x.shape)


def _power_of_two_scale(amax: Tensor, fmt: Format, mode: ScaleMode) -> Tensor:
    """E8m0 scales: the exponent of amax over the element's, plus one where amax's mantissa passes the mode's bound."""
    top, _ = exponent_and_mantissa(fmt.element.max)
    exponent, mantissa = _split_float(amax)
    exponent = exponent - top + (mantissa > mantissa_bound(fmt.element, mode)).to(torch.int32)
    code = torch.where(torch.isfinite(amax), (exponent + fmt.scale.bias).clamp(0, 254), 255)
    return fmt.scale.store(code.to(torch.uint8))


def _split_float(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased exponent and mantissa field of non-negative float32 `x`; subnormals read as exponent -127."""
    bits = x.view(torch.int32)
    return (bits >> 23) - 127, bits & ((1 << 23) - 1)


def _store_scale(scale: Tensor, stored: Element) -> Tensor:
    """Float32 scales rounded to `stored`: 1 for 0 (a block of zeros), no less than its smallest, NaN if not finite."""
    # A subnormal scale could round to 0, and a block divided by 0 is lost.
    kept = torch.where(scale == 0, 1.0, scale.clamp_min(stored.smallest))
    return stored.encode(torch.where(torch.isfinite(scale), kept, torch.nan))


def _asymmetric(low: Tensor, high: Tensor, fmt: Format) -> Scales:
    assert fmt.zero is not None
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    steps = fmt.element.max - fmt.element.min
    # Divided apart, so that a range wider than float32 does not overflow.
    scale = _store_scale(_divide(high, steps) - _divide(low, steps), fmt.scale)
    zero = fmt.element.min - torch.round(low / scale.to(torch.float32))
    return Scales(scale, fmt.zero.encode(zero.clamp(fmt.element.min, fmt.element.max)))


def split_blocks(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """(d0, d1, ..) -> (d0/b0, b0, d1/b1, b1, ..), edge blocks padded with zeros."""
    # A block larger than the tensor pads nothing.
    blocks = tuple(min(b, max(n, 1)) for n, b in zip(x.shape, blocks, strict=True))
    if any(n % b for n, b in zip(x.shape, blocks, strict=True)):
        pads = [p for n, b in reversed(tuple(zip(x.shape, blocks, strict=True))) for p in (0, -n % b)]
        x = torch.nn.functional.pad(x, pads)
    return x.reshape([d for n, b in zip(x.shape, blocks, strict=True) for d in (n // b, b)])


def join_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Undo `split_blocks`: drop the padding and return the canonical `shape`."""
    x = blocks.reshape([blocks.shape[i] * blocks.shape[i + 1] for i in range(0, blocks.dim(), 2)])
    for dim, n in enumerate(shape):
        x = x.narrow(dim, 0, n)
    return x


def _merge(blocks: Tensor, within: tuple[int, ...]) -> Tensor:
    """Block dims moved last and merged, for reductions that take one dim."""
    return blocks.movedim(within, tuple(range(-len(within), 0))).flatten(-len(within))


def spread(scale: Tensor) -> Tensor:
    """Natural scale shape (s0, s1, ..) -> (s0, 1, s1, 1, ..), to broadcast over `split_blocks` blocks."""
    return scale.reshape([d for n in scale.shape for d in (n, 1)])
