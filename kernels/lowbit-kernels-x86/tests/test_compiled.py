"""Bound models compiled, exported, and as a package that knows of the library alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import lowbit
from lowbit_kernels_x86 import library

pytestmark = pytest.mark.skipif(not library.FILE.exists(), reason="there is no library for this processor or system")


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.bags = nn.Embedding(50, 64), nn.EmbeddingBag(50, 64, mode="mean")
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 40)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.table(ids) + self.bags(ids)[:, None])))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Words().bfloat16()
    rounded = lowbit.Rule.of("down.weight", "INT8_ROW", activation="dynamic:INT8_ROW_ASYM")
    lowbit.quantize_(made, lowbit.Recipe((rounded, lowbit.Rule.of("*.weight", "INT4_G32"))))
    rows = lowbit.bind(made).rows
    assert {row.kernel for row in rows} == {"x86.linear", "x86.embedding", "x86.embedding_bag"}
    return made


def ids(batch, tokens):
    return torch.randint(50, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def test_a_compiled_model_is_one_graph_for_any_number_of_tokens(model):
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3), (5, 3), (1, 7)):
            torch.testing.assert_close(compiled(ids(*shape)), model(ids(*shape)), rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch 2.11's own
def test_a_package_runs_where_only_the_library_is_loaded(model, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (ids(4, 3),), dynamic_shapes=({0: batch},))
        called = {str(node.target) for node in program.graph.nodes if "lowbit" in str(node.target)}
        # Tables stay as they are stored, for the neutral operators, which a package takes apart.
        assert called == {"lowbit_x86.linear.default", "lowbit.embedding.default", "lowbit.embedding_bag.default"}
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
        torch.save([(ids(n, 3), model(ids(n, 3))) for n in (1, 4, 33)], tmp_path / "wanted.pt")
    code = f"""
        import sys, torch
        torch.ops.load_library({str(library.FILE)!r})
        model = torch._inductor.aoti_load_package({package!r})
        for x, y in torch.load({str(tmp_path / "wanted.pt")!r}):
            torch.testing.assert_close(model(x), y, rtol=0.02, atol=0.02)
        assert not [name for name in sys.modules if name.startswith("lowbit")]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
