"""How two engines' greedy tokens of one checkpoint compare, and how far apart rounding alone may bring them.

An engine's log-probabilities are exact ones and an error: bfloat16 rounds every layer's output and the logits, and a
scheme that rounds inputs does so a little differently in every engine (vLLM's int8 scale is amax/127, lowbit's
amax/127.5), so that codes at an edge fall on either side. How large such errors are is measured on lowbit's own answers,
against float32 arithmetic without rounded inputs on the same dequantized weights: `single` is the root mean square of
the error of one log-probability, `between` that of the difference of the two likeliest. The other engine's are taken for
independent ones, and no worse than lowbit's where it computes the same. So two engines are apart by the root of the sum
of both squares: in what they say of one token, by way of `single`; and in which token they prefer, by way of `between`,
which is what lowbit preferred its own by where they take different ones after the same prefix. Four times that is the
bound of a preference, of which there are twenty; twice that, of the root mean square over all tokens in common. Of a
single one there is no bound: where an error tips the choice of an expert, another function is computed. So a preference
beyond its bound is asked for again, of lowbit with embeddings that are off by what bfloat16 rounds by: if most of such
runs are within the bound, the one answer was the exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot
from statistics import median

import torch
from torch import Tensor

TOKENS = 32


@dataclass(frozen=True)
class Answers:
    """Greedy tokens (prompts, TOKENS), and the log-probabilities (prompts, TOKENS, vocabulary) they were taken by."""

    tokens: Tensor
    logs: Tensor


def greedy(model, prompts):
    """lowbit's own answers to prompts (prompts, length) of token ids, whatever token ends texts."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logs = torch.stack(out.logits, dim=1).float().log_softmax(-1)
    return Answers(out.sequences[:, prompts.shape[1] :], logs)


@dataclass(frozen=True)
class Errors:
    """Root mean squares of an engine's errors: in one log-probability, and in the difference of the likeliest two."""

    single: float
    between: float


def errors(exact, prompts, answers):
    """Errors of answers, against a model that computes exactly."""
    ids = torch.cat([prompts, answers.tokens[:, :-1]], dim=1)
    with torch.inference_mode():
        wanted = exact(ids).logits[:, prompts.shape[1] - 1 :].float().log_softmax(-1)
    likeliest = answers.logs.topk(2).indices
    off = answers.logs.gather(-1, likeliest) - wanted.gather(-1, likeliest)
    return Errors(*(float(each.square().mean().sqrt()) for each in (off, off[..., 0] - off[..., 1])))


@dataclass(frozen=True)
class Bounds:
    """How far rounding alone may bring two engines apart: in a preference, and, on average, in a log-probability."""

    gap: float
    apart: float


def bounds(ours, theirs):
    """What the errors of two engines allow."""
    return Bounds(4 * hypot(ours.between, theirs.between), 2 * hypot(ours.single, theirs.single))


@dataclass(frozen=True)
class Agreement:
    """Another engine's tokens of one prompt beside ours."""

    # Tokens before the first that differs.
    common: int
    # By how much we preferred our own token there.
    gap: float
    # How far log-probabilities of the common tokens are apart, each.
    apart: list[float]


def compare(tokens, logs, other_tokens, other_logs):
    """Agreement of our tokens and log-probabilities with another engine's tokens and their log-probabilities."""
    assert len(tokens) == len(other_tokens) == len(other_logs)
    other = torch.tensor(other_tokens)
    differ = (tokens != other).nonzero()
    common = int(differ[0]) if len(differ) else len(tokens)
    mine = logs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    gap = float(mine[common] - logs[common, other[common]]) if len(differ) else 0.0
    return Agreement(common, gap, (mine - torch.tensor(other_logs))[:common].abs().tolist())


def usual_preference(model, ids, one, other, runs=21):
    """By how much lowbit prefers a token to another after `ids`: the median over embeddings off by a rounding of theirs."""
    generator = torch.Generator().manual_seed(0)

    def rounded_otherwise(module, args, out):
        return (out * (1 + (torch.rand(out.shape, generator=generator) - 0.5) * 2**-7)).to(out.dtype)

    hook = model.get_input_embeddings().register_forward_hook(rounded_otherwise)
    try:
        with torch.inference_mode():
            last = [model(ids.unsqueeze(0)).logits[0, -1].float() for _ in range(runs)]
    finally:
        hook.remove()
    return median(float(logits[one] - logits[other]) for logits in last)
