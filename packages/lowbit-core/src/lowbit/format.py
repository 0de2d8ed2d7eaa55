"""Formats: what stored numbers mean. A format is a frozen value with a spec string that parses back to it.

    value = (code - zero) * scale [* tensor_scale], one scale a block

The spec is `element:block:scale[:zero=element][:tensor]`, for example `int4:1x128:bfloat16` (groups of 128 along the
last dimension), `uint4:1x128:bfloat16:zero=uint4` (asymmetric), `int8:1x*:float32` (one scale a row) or
`e2m1:1x16:e4m3fn:tensor` (NVFP4). Specs are all that op schemas and files know of a format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from lowbit.element import (
    BFLOAT16,
    E2M1,
    E2M3,
    E3M2,
    E4M3FN,
    E5M2,
    E8M0,
    FLOAT32,
    INT4,
    INT8,
    UINT2,
    UINT4,
    Element,
    element,
)
from lowbit.errors import FormatError

WHOLE: Final = 0
"""Block length that spans a whole dimension; `*` in a spec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What stored numbers mean: `value = (code - zero) * scale [* tensor_scale]`, one scale a block.

    Dimensions here are those of the canonical layout, in which the contraction (blocked) axis is last.

    Raises:
        FormatError: there is no block, a block length is out of range, a zero point is asked of a float element or
            beside e8m0 scales or a tensor scale, the scale is not a float element of at least 8 bits, or a tensor scale
            sits on a scale that does not need one.
    """

    element: Element
    # Elements a scale covers, over the trailing dims; dims before them have one scale an index. Kept as two or more
    # entries without leading 1s, so that equal meanings compare equal.
    block: tuple[int, ...]
    scale: Element = FLOAT32
    # Element of the zero points; None: symmetric.
    zero: Element | None = None
    # A second, float32 scale a matrix, on top of the block scales (NVFP4).
    tensor_scale: bool = False
    # The spec string, made once: every call of an operator asks for it, and is looked up by it.
    _spec: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the parts against one another and normalise the block."""
        if not self.block or any(not 0 <= b < 10**9 for b in self.block):
            msg = f"block {self.block} must be one or more lengths, each from 1 to 999999999, or WHOLE (0)"
            raise FormatError(msg)
        if self.element.kind == "float" and (self.element.mantissa == 0 or self.element.bits > 8):
            msg = f"{self.element.name} cannot hold quantized codes; use an integer or a float of 4 to 8 bits"
            raise FormatError(msg)
        if self.scale.kind == "int" or self.scale.packed or self.scale is E5M2:
            msg = f"{self.scale.name} cannot be a scale; use e8m0, e4m3fn, float16, bfloat16 or float32"
            raise FormatError(msg)
        if self.zero is not None and (self.element.kind, self.zero.kind) != ("int", "int"):
            msg = f"zero points need integer codes and integer zeros, not {self.element.name} and {self.zero.name}"
            raise FormatError(msg)
        if self.zero is not None and not (self.zero.min <= self.element.min and self.zero.max >= self.element.max):
            msg = f"zero points of {self.element.name} range over its codes; {self.zero.name} does not cover them"
            raise FormatError(msg)
        if self.zero is not None and (self.tensor_scale or self.scale is E8M0):
            msg = (
                f"zero points go with neither e8m0 scales nor a tensor scale, and {self.element.name} was given one; "
                "use float16, bfloat16 or float32 scales"
            )
            raise FormatError(msg)
        if self.tensor_scale and self.scale.name != E4M3FN.name:
            msg = f"a tensor scale extends the range of e4m3fn block scales; {self.scale.name} does not need one"
            raise FormatError(msg)
        object.__setattr__(self, "block", _normalise(self.block))
        zero = "" if self.zero is None else f":zero={self.zero.name}"
        parts = f"{self.element.name}:{self.block_name}:{self.scale.name}{zero}"
        object.__setattr__(self, "_spec", parts + ":tensor" * self.tensor_scale)

    def __str__(self) -> str:
        """The spec string."""
        return self._spec

    def __hash__(self) -> int:
        return hash(self._spec)

    @staticmethod
    def parse(spec: str) -> Format:
        """The format that `spec` (or the name of a constant, such as `MXFP4`) stands for; `parse(str(f)) == f`.

        Raises:
            FormatError: the spec does not follow the grammar, or names parts that do not fit together.
        """
        return _parse(spec)

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.zero is None

    def block_for(self, rank: int) -> tuple[int, ...]:
        """Block lengths for every dim of a canonical tensor of `rank` dims; WHOLE stays WHOLE.

        Raises:
            FormatError: there are fewer dims than the block needs.
        """
        missing = self.block[: max(len(self.block) - rank, 0)]
        if rank == 0 or any(b > 1 for b in missing):
            msg = f"a tensor of {rank} dimensions is too small for block {self.block_name} of {self}"
            raise FormatError(msg)
        return (1,) * (rank - len(self.block)) + self.block[len(missing) :]

    def block_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Block lengths for every dim of a canonical `shape`, whole dims filled in.

        Raises:
            FormatError: the shape has fewer dims than the block needs, or its last dim is no multiple of a 1-D group.
        """
        full = tuple(max(n, 1) if b == WHOLE else b for b, n in zip(self.block_for(len(shape)), shape, strict=True))
        group, k = full[-1], shape[-1]
        # Two-dimensional blocks may end in a partial block, as DeepSeek's fp8 checkpoints have them.
        if k % group and all(b == 1 for b in self.block_for(len(shape))[:-1]):
            msg = (
                f"last dimension {k} of shape {tuple(shape)} is not a multiple of block {group} of {self}; "
                f"choose a group that divides {k}, one scale a row ('1x*'), or pad the tensor"
            )
            raise FormatError(msg)
        return full

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Natural shape of scale and zero for a canonical `shape`: `ceil(dim / block)` in every dim.

        Raises:
            FormatError: as `block_of`.
        """
        return tuple(-(-n // b) for n, b in zip(shape, self.block_of(shape), strict=True))

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Bits stored per element of a canonical `shape`, scales and zero points included.

        Raises:
            FormatError: as `block_of`.
        """
        count = _product(shape)
        overhead = self.scale.bits + (0 if self.zero is None else self.zero.bits)
        tensor = 32 * max(_product(shape[:-2]), 1) if self.tensor_scale else 0
        return self.element.bits + (_product(self.scale_shape(shape)) * overhead + tensor) / max(count, 1)

    def with_block(self, *block: int) -> Format:
        """This format with another block."""
        return replace(self, block=block)

    @property
    def block_name(self) -> str:
        """The block as the spec writes it, such as `1x128`."""
        return "x".join("*" if b == WHOLE else str(b) for b in self.block)


def _normalise(block: tuple[int, ...]) -> tuple[int, ...]:
    while len(block) > 2 and block[0] == 1:
        block = block[1:]
    return (1, *block) if len(block) == 1 else block


_LENGTH = r"(?:\*|[1-9]\d{0,8})"
_SPEC = re.compile(
    rf"(?P<element>\w+):(?P<block>{_LENGTH}(?:x{_LENGTH})*):(?P<scale>\w+)(?::zero=(?P<zero>\w+))?(?P<tensor>:tensor)?"
)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


@lru_cache(maxsize=1024)
def _parse(spec: str) -> Format:
    if spec.upper() in FORMATS:
        return FORMATS[spec.upper()]
    match = _SPEC.fullmatch(spec)
    if match is None:
        msg = (
            f"format {spec!r} is not one of {', '.join(FORMATS)} nor 'element:block:scale[:zero=element][:tensor]', "
            "such as 'int4:1x128:bfloat16', with block lengths joined by 'x' and * for a whole dimension"
        )
        raise FormatError(msg)
    return Format(
        element=element(match["element"]),
        block=tuple(WHOLE if part == "*" else int(part) for part in match["block"].split("x")),
        scale=element(match["scale"]),
        zero=element(match["zero"]) if match["zero"] else None,
        tensor_scale=match["tensor"] is not None,
    )


INT8_ROW = Format(element=INT8, block=(1, WHOLE))
INT8_ROW_ASYM = Format(element=INT8, block=(1, WHOLE), zero=INT8)
INT8_TENSOR = Format(element=INT8, block=(WHOLE, WHOLE))
INT8_TENSOR_ASYM = Format(element=INT8, block=(WHOLE, WHOLE), zero=INT8)
INT4_G32 = Format(element=INT4, block=(1, 32), scale=BFLOAT16)
INT4_G128 = Format(element=INT4, block=(1, 128), scale=BFLOAT16)
UINT2_G32 = Format(element=UINT2, block=(1, 32), scale=BFLOAT16, zero=UINT2)
UINT4_G128 = Format(element=UINT4, block=(1, 128), scale=BFLOAT16, zero=UINT4)
FP8_TENSOR = Format(element=E4M3FN, block=(WHOLE, WHOLE))
FP8_ROW = Format(element=E4M3FN, block=(1, WHOLE))
FP8_1x128 = Format(element=E4M3FN, block=(1, 128))
FP8_128x128 = Format(element=E4M3FN, block=(128, 128))
MXFP8 = Format(element=E4M3FN, block=(1, 32), scale=E8M0)
MXFP8_E5M2 = Format(element=E5M2, block=(1, 32), scale=E8M0)
MXFP6_E2M3 = Format(element=E2M3, block=(1, 32), scale=E8M0)
MXFP6_E3M2 = Format(element=E3M2, block=(1, 32), scale=E8M0)
MXFP4 = Format(element=E2M1, block=(1, 32), scale=E8M0)
MXINT8 = Format(element=INT8, block=(1, 32), scale=E8M0)
NVFP4 = Format(element=E2M1, block=(1, 16), scale=E4M3FN, tensor_scale=True)

FORMATS: dict[str, Format] = {name.upper(): value for name, value in globals().items() if isinstance(value, Format)}
"""The named formats, by upper-case name."""
