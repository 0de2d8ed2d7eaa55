"""Elements: the number types that codes, scales and zero points are stored in.

An element is a value, not a class: bits, range and exact conversion to and from float32. Codes are handled unpacked,
one a tensor entry; `lowbit.packing` turns sub-byte codes into bytes. Every conversion saturates and rounds to nearest,
ties to even, as the OCP MX specification asks; stochastic rounding takes uniform noise instead.

Source: OCP Microscaling Formats (MX) v1.0, section 5 (element types); OCP 8-bit Floating Point (OFP8) v1.0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import FormatError

_FLOAT32_MANTISSA = 23
_FLOAT32_BIAS = 127


@dataclass(frozen=True, slots=True)
class Element:
    """One number type; a float's value is `(-1)^s * 2^(max(e, 1) - bias) * ([e > 0] + m / 2^mantissa)`."""

    name: str
    bits: int
    kind: Literal["int", "float"]
    # Smallest and largest finite value.
    min: float
    max: float
    # dtype of stored data: packed uint8 below 8 bits.
    storage: torch.dtype
    # Field widths of a float; 0 for an integer.
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    has_nan: bool = False

    @property
    def packed(self) -> bool:
        """Whether several codes share a byte in storage."""
        return self.bits < 8

    @property
    def signed(self) -> bool:
        """Whether negative values exist."""
        return self.min < 0

    @property
    def powers_of_two(self) -> bool:
        """Whether a code is an exponent and nothing else."""
        return self.kind == "float" and self.mantissa == 0

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of unpacked codes: int8 for int1..8, otherwise the storage dtype."""
        return torch.int8 if self.kind == "int" and self.signed else self.storage

    @property
    def smallest(self) -> float:
        """Smallest positive value (a subnormal for floats that have them)."""
        if self.kind == "int":
            return 1.0
        return 2.0**-self.bias if self.mantissa == 0 else 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def max_exponent(self) -> int:
        """`floor(log2(max))`, the exponent of the largest value."""
        return exponent_and_mantissa(self.max)[0]

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Codes of float32 `x` (any shape): nearest even, saturating; NaN becomes NaN, or 0 where there is none.

        `noise`, uniform in [0, 1) and of x's shape, rounds stochastically: up with the probability of the distance
        covered, so that the mean over noise is x to within 2^-24 of a step (finite x inside the range).

        Raises:
            FormatError: noise for an element of more than 8 bits, or for e8m0.
        """
        x = x.to(torch.float32)
        if noise is not None and (self.bits > 8 or self.powers_of_two):
            msg = f"stochastic rounding to {self.name} is not defined; round to an element that can hold codes"
            raise FormatError(msg)
        if self.kind == "int":
            return self.round(x, noise).nan_to_num_(nan=0.0).clamp_(self.min, self.max).to(self.code_dtype)
        if self.powers_of_two:
            return self.store(_encode_e8m0(x))
        if noise is None and self.storage.is_floating_point and self.storage.itemsize * 8 == self.bits:
            return x.clamp(self.min, self.max).to(self.storage)
        return self.store(self._encode_bits(x, noise))

    def decode(self, codes: Tensor) -> Tensor:
        """Exact float32 values of unpacked `codes` (any shape)."""
        if self.kind == "int" or self.storage != torch.uint8:
            return codes.to(torch.float32)
        return self._decode_bits(codes)

    def store(self, bits: Tensor) -> Tensor:
        """Float codes given as uint8, in the dtype that keeps them."""
        return self._decode_bits(bits) if self.storage == torch.float32 else bits.view(self.storage)

    def as_bits(self) -> Element:
        """This 8-bit float with its codes kept as uint8, for compilers that lack the dtype."""
        return replace(self, storage=torch.uint8)

    def as_values(self) -> Element:
        """This 8-bit float with the values of its codes kept in their place, in float32."""
        return replace(self, storage=torch.float32)

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Float32 `x` rounded to integers, to nearest even or by `noise`; only for integer elements."""
        if noise is None:
            return torch.round(x)
        floor = torch.floor(x)
        return floor + (x - floor > noise).to(x.dtype)

    def _encode_bits(self, x: Tensor, noise: Tensor | None) -> Tensor:
        nan = torch.isnan(x)
        x = torch.where(nan, 0.0, x).clamp(self.min, self.max)
        bits = x.view(torch.int32)
        lowest = 1 - self.bias
        exponent = (((bits >> _FLOAT32_MANTISSA) & 0xFF) - _FLOAT32_BIAS).clamp_min(lowest)
        # |x| in units of the last mantissa bit at its exponent: at most 2^(mantissa + 1), so exact in float32.
        steps = self.round(x.abs() * power_of_two(self.mantissa - exponent), noise).to(torch.int32)
        # Steps carry into the exponent field by themselves: subnormals, normals and round-up are one formula.
        magnitude = steps + ((exponent - lowest) << self.mantissa)
        if self.has_nan:
            magnitude = torch.where(nan, self._nan_code, magnitude)
        return (magnitude | ((bits >> (32 - self.bits)) & (1 << (self.bits - 1)))).to(torch.uint8)

    def _decode_bits(self, codes: Tensor) -> Tensor:
        wide = codes.to(torch.int32)
        if self.powers_of_two:
            # 2^-127 is a float32 subnormal, which no exponent field alone can say.
            bits = torch.where(wide == 0, 1 << (_FLOAT32_MANTISSA - 1), wide << _FLOAT32_MANTISSA)
            return torch.where(wide == (1 << self.bits) - 1, torch.nan, bits.view(torch.float32))
        field = (wide >> self.mantissa) & ((1 << self.exponent) - 1)
        fraction = wide & ((1 << self.mantissa) - 1)
        significand = fraction + ((field > 0).to(torch.int32) << self.mantissa)
        value = significand.to(torch.float32) * power_of_two(field.clamp_min(1) - (self.bias + self.mantissa))
        if self.has_nan:
            beyond = value > self.max
            value = torch.where(beyond & (fraction == 0), torch.inf, torch.where(beyond, torch.nan, value))
        return torch.where((wide >> (self.bits - 1)) > 0, -value, value)

    @property
    def _nan_code(self) -> int:
        return (1 << (self.bits - 1)) - 1


def exponent_and_mantissa(value: float) -> tuple[int, int]:
    """Unbiased exponent and 23-bit mantissa field of a positive normal float32."""
    bits = int(torch.tensor(value, dtype=torch.float32, device="cpu").view(torch.int32))
    return (bits >> _FLOAT32_MANTISSA) - _FLOAT32_BIAS, bits & ((1 << _FLOAT32_MANTISSA) - 1)


def power_of_two(exponent: Tensor) -> Tensor:
    """`2^exponent` as float32, built from bits so that it is exact on every device; exponents -126..127."""
    return ((exponent + _FLOAT32_BIAS) << _FLOAT32_MANTISSA).view(torch.float32)


def _encode_e8m0(x: Tensor) -> Tensor:
    """Code of the power of two nearest to float32 x, ties up, saturating; NaN for negative, NaN and infinite x."""
    bits = x.view(torch.int32)
    half = 1 << (_FLOAT32_MANTISSA - 1)
    # A float32 subnormal is at least 2^-127 * 1.5 only when its top two mantissa bits are set; its field is then 1.
    subnormal = (bits < (1 << _FLOAT32_MANTISSA)) & (bits < half + (half >> 1))
    code = torch.where(subnormal, 0, ((bits + half) >> _FLOAT32_MANTISSA).clamp(1, 254))
    code = torch.where(torch.isfinite(x) & (x >= 0), code, 255)
    return code.to(torch.uint8)


def _integer(bits: int, *, signed: bool) -> Element:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    storage = torch.int8 if signed and bits == 8 else torch.uint8
    return Element(f"{'' if signed else 'u'}int{bits}", bits, "int", low, high, storage)


def _small_float(exponent: int, mantissa: int, high: float) -> Element:
    name = f"e{exponent}m{mantissa}"
    bits = 1 + exponent + mantissa
    return Element(name, bits, "float", -high, high, torch.uint8, exponent, mantissa, 2 ** (exponent - 1) - 1)


INT1, INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (_integer(b, signed=True) for b in range(1, 9))
UINT1, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8 = (_integer(b, signed=False) for b in range(1, 9))
E2M1 = _small_float(2, 1, 6.0)
E2M3 = _small_float(2, 3, 7.5)
E3M2 = _small_float(3, 2, 28.0)
E4M3FN = Element("e4m3fn", 8, "float", -448.0, 448.0, torch.float8_e4m3fn, 4, 3, 7, has_nan=True)
E5M2 = Element("e5m2", 8, "float", -57344.0, 57344.0, torch.float8_e5m2, 5, 2, 15, has_nan=True)
E8M0 = Element("e8m0", 8, "float", 2.0**-127, 2.0**127, torch.float8_e8m0fnu, 8, 0, 127, has_nan=True)
FLOAT32 = Element(
    "float32", 32, "float", -3.4028234663852886e38, 3.4028234663852886e38, torch.float32, 8, 23, 127, has_nan=True
)
FLOAT16 = Element("float16", 16, "float", -65504.0, 65504.0, torch.float16, 5, 10, 15, has_nan=True)
BFLOAT16 = Element(
    "bfloat16", 16, "float", -3.3895313892515355e38, 3.3895313892515355e38, torch.bfloat16, 8, 7, 127, has_nan=True
)

ELEMENTS: dict[str, Element] = {
    element.name: element
    for element in (
        *(INT1, INT2, INT3, INT4, INT5, INT6, INT7, INT8),
        *(UINT1, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8),
        *(E2M1, E2M3, E3M2, E4M3FN, E5M2, E8M0, FLOAT32, FLOAT16, BFLOAT16),
    )
}
"""Every element, by name."""


def element(name: str) -> Element:
    """Look an element up by name.

    Raises:
        FormatError: no element has that name.
    """
    try:
        return ELEMENTS[name]
    except KeyError:
        msg = f"no element is named {name!r}; the elements are {', '.join(ELEMENTS)}"
        raise FormatError(msg) from None
