"""Hadamard matrices, and multiplying by them: an orthonormal change of basis that spreads outliers over all channels.

Powers of two are Sylvester's, `H_2n = [[H_n, H_n], [H_n, -H_n]]`; other sizes are Paley's times Sylvester's.

Source: Hedayat and Wallis, "Hadamard Matrices and Their Applications", for both constructions; Ashkboos et al.,
"QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", for what they are good for here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import FormatError

__all__ = ["Rotation", "hadamard"]

# Rows of the Sylvester matrices that larger ones are products of.
_DENSE = 64


@cache
def hadamard(n: int) -> Tensor:
    """An n x n matrix H of 1 and -1 with `H H^T = n I`, float32.

    Raises:
        FormatError: neither construction has one of that size.
    """
    matrix = torch.ones(1, 1)
    for size in _pieces(n):
        matrix = torch.kron(matrix, _piece(size))
    return matrix


@dataclass(frozen=True, slots=True)
class Rotation:
    """Multiplies rows, a piece of `size` channels at a time, by `diag(signs) H / sqrt(size)`, an orthonormal matrix.

    Signs are drawn from `seed`. Without a Hadamard matrix of that `size`, a FormatError says so.
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a size that has no Hadamard matrix.

        Raises:
            FormatError: there is none.
        """
        _pieces(self.size)

    def signs(self) -> Tensor:
        """Signs (size,) of channels: int64, 1 or -1."""
        return torch.randint(2, (self.size,), generator=torch.Generator().manual_seed(self.seed)) * 2 - 1

    def __call__(self, x: Tensor, axis: int = -1) -> Tensor:
        """`x`, float of any shape, with its axis of a multiple of `size` channels multiplied by the matrix."""
        moved = x.movedim(axis, -1)
        y = moved.reshape(-1, self.size) * self.signs().to(x.device, x.dtype) * self.size**-0.5
        left = self.size
        # The factors of a Kronecker product apply to one axis each.
        for size in _pieces(self.size):
            left //= size
            y = _piece(size).to(x.device, x.dtype).T @ y.reshape(-1, size, left)
        return y.reshape(moved.shape).movedim(-1, axis)

    def in_order(self, x: Tensor) -> Tensor:
        """Float32 rows of `x` (.., K) rotated with sums in one order, so that every device has the same bits.

        Of channels a power of two apart, the sum and the difference, from one apart on; the root comes last.

        Raises:
            FormatError: the size is no power of two, or K no multiple of it.
        """
        if self.size & (self.size - 1):
            raise FormatError(f"a rotation in order needs pieces of a power of two; these are of {self.size}")
        if x.shape[-1] % self.size:
            raise FormatError(f"rows of {x.shape[-1]} do not divide into pieces of {self.size} channels")
        y = (x.float().unflatten(-1, (-1, self.size)) * self.signs().to(x.device, torch.float32)).flatten(-2)
        apart = 1
        while apart < self.size:
            first, second = y.unflatten(-1, (-1, 2, apart)).unbind(-2)
            y = torch.stack((first + second, first - second), -2).flatten(-3)
            apart *= 2
        return y * self.size**-0.5


@cache
def _pieces(n: int) -> tuple[int, ...]:
    """Sizes of the matrices whose Kronecker product has n rows: at most one of Paley's, then Sylvester's.

    Raises:
        FormatError: there are none.
    """
    twos = n & -n if n > 0 else 0
    while twos:
        paley = n // twos
        if paley == 1 or _kind(paley):
            sizes = () if paley == 1 else (paley,)
            while twos > 1:
                sizes += (min(twos, _DENSE),)
                twos //= sizes[-1]
            return sizes
        twos //= 2
    raise FormatError(
        f"no Hadamard matrix of {n} rows is known here; known are powers of two times 1, 12, 20, 28, 36 .."
    )


@cache
def _piece(size: int) -> Tensor:
    """A matrix that is no product here."""
    if not _kind(size):
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
        return matrix
    first = _kind(size) == 1
    q = size - 1 if first else size // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    residues = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    index = torch.arange(q)
    inner = residues[(index[:, None] - index) % q]
    border = torch.ones(q + 1, q + 1).fill_diagonal_(0)
    border[1:, 1:] = inner
    if first:
        border[1:, 0] = -1
        return border + torch.eye(q + 1)
    whole = torch.kron(border, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return whole + torch.kron(torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))


def _kind(size: int) -> int:
    """Which of Paley's constructions has that size: the first, the second, or (0) none; powers of two have none."""
    if size & (size - 1) == 0 or size % 4:
        return 0
    if _is_prime(size - 1):
        return 1
    return 2 if size % 8 == 4 and _is_prime(size // 2 - 1) else 0


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))
