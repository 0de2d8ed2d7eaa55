"""The table of docs/pt2e.md: what layers become by each scheme, found by doing it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lowbit import Recipe, Rule
from lowbit_pt2e import convert, lower_to_onednn, prepare, quantize_layers
from lowbit_pt2e.layers import CONVOLUTIONS, LINEARS
from lowbit_pt2e.onednn_ops import LAYERS

PAGE = Path(__file__).parents[3] / "docs" / "pt2e.md"


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 16))

    def forward(self, x):
        return x @ self.weight


KINDS = {
    "linear": (nn.Linear(64, 16), (4, 64)),
    "product with a constant": (Product(), (4, 64)),
    "convolution, 1 dimension": (nn.Conv1d(32, 16, 3), (2, 32, 9)),
    "convolution, 2 dimensions": (nn.Conv2d(32, 16, 3), (2, 32, 6, 6)),
    "convolution, 3 dimensions": (nn.Conv3d(32, 16, 3), (1, 32, 4, 4, 4)),
    "convolution, each channel alone": (nn.Conv2d(32, 32, 8, groups=32), (2, 32, 9, 9)),
    "convolution, transposed": (nn.ConvTranspose2d(32, 16, 2), (2, 32, 4, 4)),
}
SCHEMES = {
    "weights alone: `INT8_ROW`, `INT4_G32`": [("INT8_ROW", None), ("INT4_G32", None)],
    "inputs as they come: `INT8_ROW`, `dynamic:INT8_ROW`": [("INT8_ROW", "dynamic:INT8_ROW")],
    "`INT8_ROW`, `dynamic:INT8_TENSOR`": [("INT8_ROW", "dynamic:INT8_TENSOR")],
    "from data: `INT8_ROW`, `static:INT8_TENSOR_ASYM`": [("INT8_ROW", "static:INT8_TENSOR_ASYM")],
    "`FP8_ROW`, `static:FP8_TENSOR`": [("FP8_ROW", "static:FP8_TENSOR")],
}
KNOWN = {*LAYERS, *LINEARS, *CONVOLUTIONS, torch.ops.lowbit.linear.default}


def becomes(model, shape, weight, activation):
    """The operator that a layer is in the end; of one that is left, why."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    with torch.no_grad():
        graph = torch.export.export(model.eval(), (x,)).module()
        recipe = Recipe((Rule.of("*", weight, activation=activation),))
        if activation is not None and activation.startswith("static"):
            prepared = prepare(graph, recipe)
            prepared(x)
            report = convert(prepared)
        else:
            report = quantize_layers(graph, recipe)
        lower_to_onednn(graph)
    if report.refused:
        return "left"
    (node,) = [node for node in graph.graph.nodes if node.target in KNOWN and "prepack" not in str(node.target)]
    name = str(node.target).rpartition(".")[0].replace(".", "::")
    return f"`{name}`" if not name.startswith("aten") else "of decoded codes"


def table():
    lines = ["| | " + " | ".join(SCHEMES) + " |", "|---" * (1 + len(SCHEMES)) + "|"]
    for kind, (model, shape) in KINDS.items():
        cells = []
        for pairs in SCHEMES.values():
            (found,) = {becomes(model, shape, *pair) for pair in pairs}
            cells.append(found)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_is_what_happens():
    found = table()
    assert found in PAGE.read_text(encoding="utf-8"), f"docs/pt2e.md should have\n{found}"
