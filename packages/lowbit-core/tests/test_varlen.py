"""Attention of packed sequences: each as it is alone, its gradients, what is traced, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import lowbit
from lowbit import FormatError, Scheme, attention, varlen_attention
from lowbit.attention import SCHEMES
from lowbit.bench.inputs import sqnr

# One token, none, more queries than keys, no keys, no queries, and more than a block.
QUERIES, KEYS = (5, 1, 0, 40, 7, 0, 150), (140, 1, 0, 9, 0, 3, 300)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def operands(queries=QUERIES, keys=KEYS, d=32, dtype=torch.float32):
    shapes = (sum(queries), 4, d), (sum(keys), 2, d), (sum(keys), 2, d)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, shape in enumerate(shapes)]
    # The mean of keys is far from what is beyond their end.
    drawn[1] += 8
    return (*drawn, cumulative(queries), cumulative(keys), max(queries, default=0), max(keys, default=0))


def alone(q, k, v, cu_q, cu_k, *_, **how):
    """Attention of each sequence."""
    found = []
    for i in range(len(cu_q) - 1):
        of_q, of_k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        heads = (x[of].transpose(0, 1).unsqueeze(0) for x, of in ((q, of_q), (k, of_k), (v, of_k)))
        found.append(attention(*heads, **how)[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("scheme", [*SCHEMES, "int8:128x*:float32,none,smooth,rotate_v"])
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"causal": True, "window": 4, "scale": 0.3}])
def test_each_sequence_is_as_it_is_alone(scheme, how):
    given = operands()
    found, expected = varlen_attention(*given, scheme=scheme, **how), alone(*given, scheme=scheme, **how)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # Those of seven queries see no keys.
    assert not found[46:53].any()


def test_sums_are_those_of_each_sequence():
    q, k, v, cu_q, cu_k, *most = operands()
    rest = (*most, True, 0, 0.2, str(SCHEMES["FP8"]), "")
    _, sums = torch.ops.lowbit.varlen_attention(q, k, v, cu_q, cu_k, *rest)
    assert sums.shape == (4, len(q))
    heads = (x[-n:].transpose(0, 1).unsqueeze(0) for x, n in ((q, 150), (k, 300), (v, 300)))
    _, expected = torch.ops.lowbit.attention(*heads, None, *rest[2:])
    torch.testing.assert_close(sums[:, -150:], expected[0])
    assert (sums[:, 46:53] == -math.inf).all()


@pytest.mark.parametrize("how", [{"scheme": "FP8_HEAD"}, {"scheme": "INT8", "causal": True, "window": 30}])
def test_gradients_are_those_of_each_sequence(how):
    found = []
    for run in (varlen_attention, alone):
        given = operands()
        for x in given[:3]:
            x.requires_grad_()
        out = run(*given, **how)
        to_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        found.append(torch.autograd.grad(out, given[:3], to_out))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_sequences_and_no_tokens_are_attended_to():
    assert varlen_attention(*operands((), ())).shape == (0, 4, 32)
    assert varlen_attention(*operands((0, 0), (0, 0))).shape == (0, 4, 32)


class Layer(torch.nn.Module):
    """Packed attention alone."""

    def forward(self, q, k, v, cu_q, cu_k):
        return varlen_attention(q, k, v, cu_q, cu_k, 160, 300, scheme="INT8_FP8", causal=True)


def test_it_compiles_whole_with_gradients():
    given, found = operands(), []
    for x in given[:3]:
        x.requires_grad_()
    for run in (Layer(), torch.compile(Layer(), fullgraph=True, backend="aot_eager")):
        out = run(*given[:5])
        found.append((out, *torch.autograd.grad(out.square().sum(), given[:3])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_is_lowered_and_taken_apart():
    given = operands()[:5]
    exported, right = torch.export.export(Layer(), given), Layer()(*given)
    assert exported.graph_module.code.count("lowbit.varlen_attention") == 1
    lowered = lowbit.lower(exported, "reference")
    apart = exported.run_decompositions()
    for program in (lowered.program, apart):
        assert not [node for node in program.graph.nodes if "lowbit" in str(node.target)]
        torch.testing.assert_close(program.module()(*given), right)
    with pytest.raises(RuntimeError, match="at most max_q"):
        apart.module()(*given[:3], *(cumulative((203, 0, 0, 0, 0, 0, 0)) for _ in range(2)))
    # Compilers to C++ lack 8-bit floats.
    values = [node.meta.get("val") for node in apart.graph.nodes]
    assert not [x for x in values if isinstance(x, torch.Tensor) and str(x.dtype).startswith("torch.float8")]


def changed(place, value):
    given = list(operands())
    given[place] = value
    return given


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (changed(0, torch.zeros(1, 4, 203, 32)), "packed"),
        (changed(1, torch.zeros(453, 3, 32)), "values"),
        (changed(3, cumulative(QUERIES).long()), "int32"),
        (changed(4, cumulative((453,))), "as many"),
        (changed(3, cumulative((*QUERIES[:-1], 149))), "203 tokens"),
        (changed(4, cumulative((500, -47, 0, 0, 0, 0, 0))), "count up"),
        (changed(5, 100), "at most 100"),
    ],
)
def test_bad_input_is_refused(given, reason):
    with pytest.raises(FormatError, match=reason):
        varlen_attention(*given)


def test_error_is_that_of_its_scheme():
    q, k, v, *rest = operands((300, 200), (300, 200), 64)
    exact = alone(*(x.double().float() for x in (q, k, v)), *rest, scheme=Scheme.parse("INT8"))
    assert sqnr(exact, varlen_attention(q, k, v, *rest, scheme="FP8")) > 24
