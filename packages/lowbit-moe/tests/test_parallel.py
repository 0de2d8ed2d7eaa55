"""Experts of two and of three gloo ranks, and of two GPUs, beside one rank that has all of them and every token."""

from __future__ import annotations

import pytest
import torch
from ranked import EXPERTS, Mixture, alone, exchanged, given, idle, together, trained
from ranks import ranks

from lowbit import FormatError, RecipeError, quantize
from lowbit_moe import Operands, TrainRecipe, convert_, parallel_swiglu_experts, shard_experts_


@pytest.fixture(scope="module", params=[(2, "cpu"), (3, "cpu"), pytest.param((2, "cuda"), marks=pytest.mark.gpu)])
def started(request):
    with ranks(*request.param) as several:
        yield *request.param, several


@pytest.mark.parametrize(
    ("recipe", "payload", "most"),
    [("BF16", None, 1e-5), ("MXFP8", None, 1e-5), ("MXFP8", "MXFP8", 0.1), ("FP8_ROW", "e4m3fn:1x*:e8m0", 0.1)],
)
def test_ranks_together_are_one(started, recipe, payload, most):
    """Tokens are rounded alike; of what comes back, and of gradients, codes of 4 digits are one rounding more."""
    count, device, several = started
    sizes, wanted = alone(recipe, count, device)
    found = several.run(together, recipe, payload, device)
    merged = [torch.cat(parts) for parts in zip(*found, strict=True)]
    assert [len(each[0]) for each in found] == sizes
    for one, other in zip(merged, wanted, strict=True):
        assert (one - other).norm() <= most * other.norm()


@pytest.mark.parametrize(
    ("recipe", "payload", "coded"),
    [
        ("MXFP8", None, False),
        ("FP8_ROW", "e4m3fn:1x*:e8m0", False),
        ("WIDE", "e4m3fn:1x24:e8m0", True),
        ("FP8_ROW", "MXFP8", False),
    ],
)
def test_experts_are_given_their_tokens_rounded_once(started, recipe, payload, coded):
    """Rank by rank, and token by token; as codes where products take those, of 72 columns."""
    count, device, several = started
    alike = TrainRecipe(name="WIDE", forward=Operands.of("e4m3fn:1x24:e8m0"))
    found = several.run(exchanged, alike if recipe == "WIDE" else recipe, payload, device)
    tokens = [given(rank, torch.bfloat16) for rank in range(count)]
    filled = [torch.nn.functional.pad(x, (0, 24)) for x, *_ in tokens]
    rounded = [x if payload is None else quantize(x, payload, mode="rceil").dequantize() for x in filled]
    rounded = [x[:, :72] for x in rounded]
    for rank, (rows, was_coded, offs, back, to_x) in enumerate(found):
        assert was_coded == coded
        start = 0
        for expert, end in enumerate(offs, rank * EXPERTS // count):
            wanted = [x[(chosen == expert).any(1)] for x, (_, _, chosen) in zip(rounded, tokens, strict=True)]
            assert torch.equal(rows[start:end], torch.cat(wanted))
            start = end
        assert start == len(rows)
        _, weights, chosen = tokens[rank]
        kept = (weights * ((chosen >= 0) & (chosen < EXPERTS))).float().sum(1, keepdim=True)
        # Rounded already, they come back as they are.
        torch.testing.assert_close(back.float(), rounded[rank].float() * kept, rtol=2**-7, atol=0)
        # Of codes of 4 digits.
        torch.testing.assert_close(to_x.float(), kept.expand_as(to_x), rtol=2**-4 + 2**-6, atol=0)


def test_a_rank_without_tokens_takes_part(started):
    _, device, several = started
    (nothing, no_gradient), *others = several.run(idle, device)
    assert nothing.shape == no_gradient.shape == (0, 72)
    for rank, found in enumerate(others, 1):
        for one, other in zip(found, idle(device, rank), strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


def test_what_cannot_travel_is_refused():
    x, chosen = torch.zeros(3, 64), torch.zeros(3, 1, dtype=torch.int64)
    for payload in ("FP8_128x128", "NVFP4", "FP8_TENSOR"):
        with pytest.raises(FormatError, match="rows travel in formats whose blocks are parts of one row"):
            parallel_swiglu_experts(x, chosen, chosen, x, x, group=None, payload=payload)


@pytest.mark.parametrize(
    ("recipe", "payload", "most"), [("BF16", None, 1e-5), ("MXFP8", None, 1e-5), ("MXFP8", "MXFP8", 0.1)]
)
def test_dense_layers_of_fsdp_beside_experts_of_ranks_learn_what_one_rank_learns(started, recipe, payload, most):
    """Gradients of the first step; and two steps of AdamW, which are as long where a gradient is next to nothing.

    After the first, what differs by a sum's order may be rounded to another code.
    """
    count, device, several = started
    wanted, right = trained(recipe, payload, device, count)
    for gradients, parameters in several.run(trained, recipe, payload, device):
        for one, other in zip(gradients, wanted, strict=True):
            assert (one - other).norm() <= most * other.norm()
        for one, other in zip(parameters, right, strict=True):
            assert (one - other).abs().max() <= 0.04 * 1.01
            assert (one - other).norm() <= (1e-3 if recipe == "BF16" else 0.1) * other.norm()


class Mesh:
    """As many ranks as are told."""

    ndim = 1

    def __init__(self, ranks):
        self.shape = (ranks,)

    def size(self):
        return self.shape[0]


def test_experts_that_cannot_be_divided_are_refused_and_stay():
    model = Mixture()
    with pytest.raises(RecipeError, match="no module of experts was converted"):
        shard_experts_(model, Mesh(2))
    convert_(model, "MXFP8")
    with pytest.raises(RecipeError, match=r"experts has 6 experts for a mesh \(4,\)"):
        shard_experts_(model, Mesh(4))
    with pytest.raises(FormatError, match="rows travel in formats"):
        shard_experts_(model, Mesh(2), payload="NVFP4")
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
