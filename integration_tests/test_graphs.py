"""Quantized graphs run by kernels of an installed backend: compiled, lowered, and packaged ahead of time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Recipe, Rule
from lowbit.testing import only_backends
from lowbit_pt2e import convert, fold_norms, prepare, quantize_layers

pytest.importorskip("lowbit_kernels_x86.library")


class Model(nn.Module):
    """Layers with a norm between, one of them in a loop."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.again, self.last = (
            nn.Linear(48, 64),
            nn.BatchNorm1d(64),
            nn.Linear(64, 64),
            nn.Linear(64, 8),
        )
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        _, x = torch.while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, self.again(v).tanh()), (torch.tensor(0), x))
        return self.last(x)


def test_scales_that_data_told_go_with_the_kernels():
    model, x = Model().eval(), torch.randn(4, 48)
    with torch.no_grad():
        graph = torch.export.export(model, (x,)).module()
        prepared = prepare(graph, Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),)))
        prepared(x)
        convert(prepared)
        with only_backends("reference"):
            wanted = graph(x)
        lowered = lowbit.lower(torch.export.export(graph, (x,)), "x86")
        assert [row.kernel for row in lowered.rows] == ["x86.linear", "x86.linear", None]
        torch.testing.assert_close(lowered.program.module()(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_quantized_graph_is_compiled_lowered_and_packaged(tmp_path):
    model, x = Model().eval(), torch.randn(4, 48)
    with torch.no_grad():
        graph = torch.export.export(model, (x,)).module()
        fold_norms(graph, (x,))
        quantize_layers(graph, Recipe((Rule.of("*", "INT8_ROW", activation="dynamic:INT8_ROW"),)), (x,))
        wanted = graph(x)
        exact = model(x)
        assert 10 * ((exact.square().sum() / (wanted - exact).square().sum()).log10()) > 25
        lowered = lowbit.lower(torch.export.export(graph, (x,)), "x86")
        # A weight in a loop stays as it is stored; the reason stands in the table.
        assert [row.kernel for row in lowered.rows] == ["x86.linear", "x86.linear", None]
        torch.testing.assert_close(lowered.program.module()(x), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.compile(graph)(x), wanted, rtol=1e-5, atol=1e-5)
        path = torch._inductor.aoti_compile_and_package(lowered.program, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(packaged(x), wanted, rtol=1e-5, atol=1e-5)
