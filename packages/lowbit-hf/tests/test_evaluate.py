from __future__ import annotations

import itertools
from math import exp, inf, isnan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lowbit.errors import CheckpointError
from lowbit_hf.evaluate import evaluate, split_windows, tokenize

VOCABULARY = 50


class Bigrams(nn.Module):
    """A language model whose logits are a row of a table, chosen by the last token."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.batches = []

    def forward(self, ids, *, use_cache):
        assert not use_cache
        assert torch.is_inference_mode_enabled()
        self.batches.append(tuple(ids.shape))
        return SimpleNamespace(logits=self.table[ids])


def table(seed, dtype=torch.float32):
    return (torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def text(count, seed=0):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def oracle(model, base, ids, context):
    """Perplexity, KL and top-1 in float64, a position at a time."""
    loss, divergence, agree, count = 0.0, 0.0, 0, 0
    whole = max(len(ids) // context, 1)
    for start in range(0, whole * context, context):
        window = ids[start : start + context].tolist()
        for now, after in itertools.pairwise(window):
            p, q = (t[now].double().numpy() for t in (base, model))
            p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (p, q))
            loss -= q[after]
            divergence += float((np.exp(p) * (p - q)).sum())
            agree += p.argmax() == q.argmax()
            count += 1
    return np.exp(loss / count), divergence / count, agree / count, count


@pytest.mark.parametrize(("count", "context"), [(400, 20), (399, 20), (30, 32), (2, 32), (9000, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(count, context, dtype):
    model, base, ids = table(1, dtype), table(2, dtype), text(count)
    found = evaluate(Bigrams(model), ids, context=context, base=Bigrams(base))
    perplexity, kl, top1, tokens = oracle(model, base, ids, context)
    # Float32 log-probabilities of size ~10 are off by half an ulp, 5e-7, each; means of them by no more.
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(perplexity, rel=5e-6)
    assert found.kl == pytest.approx(kl, abs=5e-6)
    assert found.top1 == top1
    alone = evaluate(Bigrams(model), ids, context=context)
    assert (alone.perplexity, alone.kl, alone.top1) == (found.perplexity, None, None)


def test_a_model_against_itself():
    found = evaluate(Bigrams(table(1)), text(100), context=10, base=Bigrams(table(1)))
    assert (found.kl, found.top1) == (0.0, 1.0)


def test_uniform_predictions_are_as_perplexed_as_the_vocabulary():
    assert evaluate(Bigrams(torch.zeros(50, 50)), text(64), context=8).perplexity == pytest.approx(50, rel=1e-6)


def test_tokens_a_model_rules_out():
    base = table(1)
    base[:, 40:] = -inf
    ids = text(200) % 40
    found = evaluate(Bigrams(table(2)), ids, context=20, base=Bigrams(base))
    finite = table(1)
    finite[:, 40:] = -1e30
    assert found.kl == pytest.approx(oracle(table(2), finite, ids, 20)[1], abs=5e-6)
    # What the base allows and the model rules out is infinitely far.
    assert evaluate(Bigrams(base), ids, context=20, base=Bigrams(table(2))).kl == inf
    assert evaluate(Bigrams(base), text(200) % 10 + 40, context=20).perplexity == inf


def test_perplexity_beyond_any_float():
    sure = torch.zeros(50, 50)
    sure[:, 0] = 2000.0
    assert evaluate(Bigrams(sure), torch.ones(20, dtype=torch.int64), context=10).perplexity == inf


def test_nan_is_told():
    broken = table(1)
    broken[3, 7] = torch.nan
    found = evaluate(Bigrams(broken), text(400), context=20, base=Bigrams(table(1)))
    assert isnan(found.perplexity)
    assert isnan(found.kl)


def test_windows():
    ids = torch.arange(10)
    assert split_windows(ids, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert split_windows(ids, 10).tolist() == [list(range(10))]
    assert split_windows(ids, 11).tolist() == [list(range(10))]


def test_batches_hold_no_more_tokens_than_they_may(monkeypatch):
    monkeypatch.setattr("lowbit_hf.evaluate._BATCH_TOKENS", 4096)
    model, seen = Bigrams(table(1)), []
    evaluate(model, text(20_000), context=500, advance=seen.append)
    assert model.batches == [(8, 500)] * 5
    assert seen == [4000] * 5
    model = Bigrams(table(1))
    evaluate(model, text(10_000), context=5000)
    assert model.batches == [(1, 5000)] * 2


@pytest.mark.parametrize("count", [0, 1])
def test_too_short(count):
    with pytest.raises(CheckpointError, match=f"the text has {count} tokens; needed are at least 2"):
        evaluate(Bigrams(table(1)), text(count), context=10)


def test_another_vocabulary():
    with pytest.raises(CheckpointError, match="the base has a vocabulary of 60, the model one of 50"):
        evaluate(Bigrams(table(1)), text(20), context=10, base=Bigrams(torch.zeros(50, 60)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(models.WordLevel({"?": 0, "ja": 1, "nein": 2, "ü": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", model_max_length=4).save_pretrained(path)
    return path


def test_tokenize(folder, tmp_path):
    (tmp_path / "text").write_text("ja nein ü\nwas ja ja ja", encoding="utf-8")
    ids = tokenize(folder, tmp_path / "text")  # longer than the tokenizer's limit, without a warning
    assert ids.tolist() == [1, 2, 3, 0, 1, 1, 1]
    assert ids.dtype == torch.int64


def test_text_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name in ("latin", "missing", "."):
        with pytest.raises(CheckpointError, match="cannot be read as UTF-8 text"):
            tokenize(folder, tmp_path / name)


def test_no_tokenizer(make, tmp_path):
    (tmp_path / "text").write_text("ja")
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can load"):
        tokenize(make("llama"), tmp_path / "text")


def test_perplexity_is_the_mean_s_exponential():
    ids = torch.tensor([0, 1, 0, 1])
    logits = torch.full((50, 50), -50.0)
    logits[0, 1], logits[1, 0] = 0.0, 0.0
    logits[0, 2], logits[1, 2] = 0.0, 0.0  # each next token has probability 1/2
    assert evaluate(Bigrams(logits), ids, context=4).perplexity == pytest.approx(exp(np.log(2)), rel=1e-6)
