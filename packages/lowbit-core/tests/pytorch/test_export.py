"""torch.export of models with quantized weights: whole operators, dynamic tokens, saved and loaded, taken apart."""

from __future__ import annotations

import pytest
import torch
from cells import HALF, ROWS, column, inputs, model
from test_compile import Convolutions
from tolerance import assert_computed

TOKENS = (2, 5, 12, 40)


def exported(row, made, *, strict=False):
    """The row's program with a dynamic number of tokens."""
    shapes = ({0: torch.export.Dim("m", min=2)},) + ((None,) if row.rank == 3 else ())
    return torch.export.export(made, inputs(row, 12), dynamic_shapes=shapes, strict=strict)


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


# Torch 2.11's own.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@column("torch.export", HALF)
def test_export_and_back(row, tmp_path):
    made = model(row)
    program = exported(row, made)
    op = f"lowbit.{'grouped_mm' if row.rank == 3 else 'linear'}.default"
    assert targets(program).count(op) == 2
    torch.export.save(program, tmp_path / "model.pt2")
    apart = program.run_decompositions()
    assert not [target for target in targets(apart) if "lowbit" in target]
    with torch.no_grad():
        for again in (program, torch.export.load(tmp_path / "model.pt2")):
            assert targets(again).count(op) == 2
            run = again.module()
            for m in TOKENS:
                assert torch.equal(run(*inputs(row, m)), made(*inputs(row, m)))
        run = apart.module()
        for m in TOKENS:
            assert_computed(row, made, run(*inputs(row, m)), inputs(row, m))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_convolutions_export_beside_operators(tmp_path):
    torch.manual_seed(0)
    made, x = Convolutions(), torch.randn(2, 4, 12)
    program = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    torch.export.save(program, tmp_path / "model.pt2")
    apart = program.run_decompositions()
    assert targets(program).count("lowbit.linear.default") == 1
    assert not [target for target in targets(apart) if "lowbit" in target]
    x = torch.randn(3, 4, 12)
    with torch.no_grad():
        for again in (program, torch.export.load(tmp_path / "model.pt2"), apart):
            assert torch.equal(again.module()(x), made(x))


@pytest.mark.parametrize("rank", [2, 3])
def test_strict_export_is_the_same(rank):
    row = next(row for row in ROWS if row.name == "mxfp8" and row.rank == rank)
    made = model(row)
    program = exported(row, made, strict=True)
    assert targets(program) == targets(exported(row, made))
    assert torch.equal(program.module()(*inputs(row, 7)), made(*inputs(row, 7)))
