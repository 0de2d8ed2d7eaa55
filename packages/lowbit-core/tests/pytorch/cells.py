"""The rows of the table in docs/pytorch.md: formats in 2-D and 3-D, each with a small model, its tokens and its oracle.

A test function marked `@column("name")` runs once a row; the session notes how each cell went in the file that the
variable LOWBIT_CELLS names, if it is set. What a cell may refuse stands in REFUSED, with the words it must say.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit import LowbitError, QuantizedTensor, quantize

REFUSED: dict[tuple[str, str], str] = {}
"""(column, row) -> a regular expression for the LowbitError that the cell raises; at most four."""


@dataclass(frozen=True)
class Row:
    """A format, what rounds the input, and the rank of the weights."""

    name: str
    format: str
    activation: str | None
    rank: int

    def __str__(self):
        return f"{self.name}-{self.rank}d"


KINDS = (
    ("int8-row", "INT8_ROW", "dynamic:INT8_ROW"),
    ("int8-row-static", "INT8_ROW", "static:INT8_TENSOR_ASYM"),
    ("int4-g128", "INT4_G128", None),
    ("uint4-g128", "UINT4_G128", None),
    ("fp8-row", "FP8_ROW", "dynamic:FP8_ROW"),
    ("mxfp8", "MXFP8", "dynamic:MXFP8"),
    ("mxfp6", "MXFP6_E2M3", None),
    ("mxfp4", "MXFP4", None),
    ("nvfp4", "NVFP4", None),
)
ROWS = tuple(Row(*kind, rank) for kind in KINDS for rank in (2, 3))
# Every format once, and ranks in turn, for what takes seconds a row; and the rest.
HALF = tuple(row for i, row in enumerate(ROWS) if i % 4 in {1, 2})
OTHERS = tuple(row for row in ROWS if row not in HALF)

K, H, E = 256, 512, 4


class Linears(nn.Module):
    """Two linear layers; H and K are multiples of 2 x 128, so that rows and columns split over two ranks."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, H), nn.Linear(H, K)

    def forward(self, x):
        return self.down(functional.silu(self.up(x)))


class Experts(nn.Module):
    """Two grouped products; tokens come sorted by expert, `offs` ends each expert's."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, H, K) / 16), nn.Parameter(torch.randn(E, K, H) / 16)

    def forward(self, x, offs):
        hidden = functional.silu(functional.grouped_mm(x, self.up.mT, offs=offs))
        return functional.grouped_mm(hidden, self.down.mT, offs=offs)


def quantized(row, weight):
    """`weight` as the row says, with a static input scale and zero point where that calls for them."""
    q = quantize(weight.detach(), row.format, activation=row.activation)
    if q.activation is not None and q.activation.scaling == "static":
        use = {"act_scale": torch.full((1,), 0.04), "act_zero": torch.full((1,), -7, dtype=torch.int8)}
        q = q.with_inner({**q.inner_tensors(), **{name: part.to(q.device) for name, part in use.items()}})
    return nn.Parameter(q, requires_grad=False)


def model(row, *, seed=0, device="cpu"):
    """The row's model with quantized weights, in float32."""
    torch.manual_seed(seed)
    made = Linears() if row.rank == 2 else Experts()
    for module in (made.up, made.down) if row.rank == 2 else (made,):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == row.rank:
                setattr(module, name, quantized(row, parameter))
    return made.to(device)


def inputs(row, m, *, seed=1, device="cpu"):
    """m tokens, and for experts the ends of their shares; one expert has none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, K, generator=generator).to(device)
    ends = torch.tensor([m // 3, m // 3, m // 2, m], dtype=torch.int32, device=device)
    return (x,) if row.rank == 2 else (x, ends)


def weights(made):
    """The quantized parameters by name."""
    return {name: p for name, p in made.named_parameters() if isinstance(p, QuantizedTensor)}


def assert_same(a, b):
    """Two quantized tensors hold the same bits and read alike."""
    assert a.storage_layout == b.storage_layout
    left, right = a.inner_tensors(), b.inner_tensors()
    assert left.keys() == right.keys()
    for name, part in left.items():
        assert part.dtype == right[name].dtype, name
        assert torch.equal(part.contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8)), name


def refusal(name, row):
    """The context that a cell runs in: it must raise where REFUSED says so."""
    words = REFUSED.get((name, str(row)))
    return nullcontext() if words is None else pytest.raises(LowbitError, match=words)


def column(name, quick=ROWS):
    """Run a test once a row, as the cells of column `name`; where not all are `quick`, the rest is slow."""
    rows = [pytest.param(row, marks=() if row in quick else pytest.mark.slow) for row in ROWS]

    def mark(test):
        return pytest.mark.cell(name)(pytest.mark.parametrize("row", rows, ids=str)(test))

    return mark


assert len(REFUSED) <= 4
