"""One packed weight for a table and the linear layer that shares it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import RowError
from lowbit_kernels_x86 import library

pytestmark = pytest.mark.skipif(not library.FILE.exists(), reason="there is no library for this processor or system")
ROWS, COLUMNS = 50, 192


class Tied(nn.Module):
    """The ends of a language model."""

    def __init__(self, dtype):
        super().__init__()
        self.table = nn.Embedding(ROWS, COLUMNS, dtype=dtype)
        self.head = nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def tied(fmt, activation=None, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = Tied(dtype)
    lowbit.quantize_(model, lowbit.Recipe((lowbit.Rule.of("table.weight", fmt, activation=activation),)))
    return model


@pytest.mark.parametrize(
    "fmt",
    [
        *(
            "INT4_G32",
            "uint4:1x64:bfloat16:zero=uint4",
            "INT8_ROW_ASYM",
            "int3:1x64:bfloat16:zero=int3",
            "MXFP4",
            "NVFP4",
        ),
        *("e4m3fn:16x64:float32", "FP8_TENSOR", "INT8_ROW"),
    ],
)
@torch.no_grad()
def test_a_table_and_its_head_share_what_is_packed(fmt):
    model = tied(fmt)
    ids = torch.tensor([[0, 49, 17], [17, 16, 15]])
    rows = model.table(ids)
    wanted = rows.double() @ model.head.weight.dequantize(torch.float32).double().T
    before = {name: part.clone() for name, part in model.table.weight.inner_tensors().items()}
    bindings = lowbit.bind(model)
    assert [(row.op, row.kernel, row.packed) for row in bindings.rows] == [
        ("embedding", "x86.linear", True),
        ("linear", "x86.linear", True),
    ]
    assert model.table.weight is model.head.weight
    assert torch.equal(model.table(ids), rows)
    # As near as a bfloat16 is, and float32 sums of 192 products.
    assert bool(((model(ids).double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-4 * wanted.std()).all())
    # In turns, as a model generates.
    assert torch.equal(model.table(ids.int()), rows)
    assert model.table(ids[:0]).shape == (0, 3, COLUMNS)
    for wrong in (-1, ROWS):
        with pytest.raises(RowError):
            model.table(torch.tensor([0, wrong]))
    lowbit.unbind(model)
    assert all(torch.equal(part, before[name]) for name, part in model.table.weight.inner_tensors().items())
    assert model.table.weight is model.head.weight


@torch.no_grad()
def test_a_rounded_head_leaves_rows_as_they_are():
    model = tied("INT8_ROW", "dynamic:INT8_ROW")
    ids = torch.arange(ROWS)
    rows = model.table(ids)
    assert all(row.kernel == "x86.linear" for row in lowbit.bind(model).rows)
    assert torch.equal(model.table(ids), rows)


@torch.no_grad()
def test_a_compiled_model_looks_up_what_is_packed():
    model = tied("INT4_G32", dtype=torch.float32)
    lowbit.bind(model)
    ids = torch.tensor([3, 1, 2])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(ids), model(ids), atol=1e-5)
